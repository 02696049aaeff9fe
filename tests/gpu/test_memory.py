"""Predicted memory against what the driver says is taken; ``-s`` shows both."""

from __future__ import annotations

import sys

import pytest

from benchmarks import plan_memory
from ember_pp import __main__ as entry
from ember_pp.errors import EXIT_CANNOT_FIT

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

TOLERANCE = 0.03


@pytest.mark.parametrize("case", plan_memory.CASES, ids=lambda case: case.name)
def test_a_run_takes_what_was_predicted(case: plan_memory.Case) -> None:
    result = plan_memory.measure(case)
    sys.stdout.write(f"\n{plan_memory.render(result)}\n")
    most, measured = result["predicted_bytes"], result["measured_bytes"]
    least = most - result["graph_bytes"]
    assert least * (1 - TOLERANCE) < measured < most * (1 + TOLERANCE)


def test_a_cache_larger_than_the_card_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["job=bench", "model=qwen3-0.6b", "model.load=random", "cache.memory_gib=4000"]
    assert entry.main(arguments) == EXIT_CANNOT_FIT
    assert "KV cache 4000.00 GiB: lower cache.memory_gib" in capsys.readouterr().err
