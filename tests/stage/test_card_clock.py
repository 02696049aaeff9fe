"""ClockOffset: of all samples the one counts that is known best, by its width and its age."""

import random

import pytest

from ember_pp.stage.card_clock import ClockOffset


def test_before_any_sample_times_are_left_alone():
    assert ClockOffset().ns == 0


def test_a_sample_is_taken_at_its_middle():
    offset = ClockOffset()
    offset.add(1_000, 50, 1_010)
    assert offset.ns == 1_005 - 50


def test_a_wider_sample_is_taken_only_once_the_other_is_old():
    offset = ClockOffset()
    offset.add(0, -5_000, 10_000)  # known to 5 us
    offset.add(1_000_000, 1_000_000, 1_040_000)
    assert offset.ns == 10_000
    offset.add(1_000_000_000, 1_000_000_000, 1_000_040_000)
    assert offset.ns == 20_000, "after a second a clock may have drifted by 100 us"


@pytest.mark.parametrize("drift", [0.0, 40e-6, -40e-6])
def test_the_offset_stays_within_what_is_known(drift):
    """Clocks that drift, samples of any width: never off by more than the best sample explains."""
    rng, offset, error_ns, at_ns = random.Random(1), ClockOffset(), float("inf"), 0
    for now_ns in range(0, 60_000_000_000, 2_000_000_000):
        width_ns = rng.randrange(8_000, 150_000)
        card_ns = 77 + (now_ns + rng.randrange(width_ns)) * (1 + drift)
        offset.add(now_ns, int(card_ns), now_ns + width_ns)
        error_ns = min(error_ns + 100e-6 * (now_ns - at_ns), width_ns / 2)
        at_ns = now_ns
        assert abs(card_ns + offset.ns - now_ns) <= error_ns + width_ns + 2_000_000_000 * 40e-6
