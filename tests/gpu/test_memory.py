"""Predicted memory against what the driver says is taken; ``-s`` shows both."""

from __future__ import annotations

import sys

import pytest

from benchmarks import plan_memory

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

TOLERANCE = 0.03


@pytest.mark.parametrize("case", plan_memory.CASES, ids=lambda case: case.name)
def test_a_run_takes_what_was_predicted(case: plan_memory.Case) -> None:
    result = plan_memory.measure(case)
    sys.stdout.write(f"\n{plan_memory.render(result)}\n")
    assert result["predicted_bytes"] == pytest.approx(result["measured_bytes"], rel=TOLERANCE)
