"""``benchmarks.chaos``, a few rounds of it: one of each kind, and nothing lost, wrong or left."""

import argparse
import random

import pytest

from benchmarks import chaos

pytestmark = [pytest.mark.multiproc, pytest.mark.slow]

NUM_ROUNDS = 6
NUM_STAGES = 3


def seed_with_all_kinds():
    """The first that draws every kind in so few rounds."""
    for seed in range(1000):
        rng = random.Random(seed)
        if {chaos.draw_plan(rng, NUM_STAGES).kind for _ in range(NUM_ROUNDS)} == set(chaos.KINDS):
            return seed
    raise AssertionError


def test_nothing_is_lost_differs_or_is_left():
    options = argparse.Namespace(
        rounds=NUM_ROUNDS,
        requests=12,
        stages=NUM_STAGES,
        device="cpu",
        dtype="float32",
        reference="alone",
        seed=seed_with_all_kinds(),
        seconds=1e9,
        kinds=",".join(chaos.KINDS),
    )
    run = chaos.run_rounds(options)
    summary = chaos.summarise(run)
    assert summary["requests"] == NUM_ROUNDS * 12
    for key in ("requests lost", "answers differing", "orphans", "segments left"):
        assert summary[key] == 0, run
    by_kind = summary["by kind"]
    assert set(by_kind) == set(chaos.KINDS)
    for kind in ("kill", "kill two", "freeze"):
        assert by_kind[kind]["with a new epoch"] == by_kind[kind]["rounds"]
    assert by_kind["slow"]["with a new epoch"] == 0
    assert [end["exit_code"] for end in run["ends"]] == [0]
