"""Router: prompts that begin alike meet, and no replica idles while another is full."""

import random

import pytest

from ember_pp.coordinator.router import Router

PREFIX = 16


def prompt(family, length=40):
    return [family] * PREFIX + list(range(length - PREFIX))


def test_without_load_equal_beginnings_meet():
    router = Router(4, prefix_tokens=PREFIX)
    loads = [0, 0, 0, 0]
    homes = {}
    for step in range(200):
        family = step % 8
        home = router.choose(prompt(family), loads)
        assert homes.setdefault(family, home) == home


@pytest.mark.parametrize("length", [1, PREFIX - 1])
def test_short_prompts_go_where_least_is_open(length):
    router = Router(3, prefix_tokens=PREFIX)
    assert router.choose(list(range(length)), [5, 2, 9]) == 1


def test_a_popular_beginning_does_not_fill_one_replica():
    router = Router(4, prefix_tokens=PREFIX)
    loads = [0, 0, 0, 0]
    for _ in range(400):
        loads[router.choose(prompt(7), loads)] += 40
    assert min(loads) > 0.7 * max(loads)


def test_loads_stay_close_for_mixed_prompts():
    rng = random.Random(0)
    router = Router(3, prefix_tokens=PREFIX)
    loads = [0, 0, 0]
    for _ in range(3000):
        length = rng.randrange(PREFIX, 400)
        loads[router.choose(prompt(rng.randrange(50), length), loads)] += length
    assert min(loads) > 0.7 * max(loads)


def test_it_forgets_the_oldest_beginnings(monkeypatch):
    monkeypatch.setattr("ember_pp.coordinator.router._MAX_REMEMBERED", 10)
    router = Router(2, prefix_tokens=PREFIX)
    for family in range(1000):
        router.choose(prompt(family), [0, 0])
    assert len(router._homes) == 10
