"""Small workloads for tests of ``job=bench``."""

from __future__ import annotations

from collections.abc import Sequence

from ember_pp.jobs.bench_workload import BenchRequest, BenchWorkload


def workload_of(lengths: Sequence[tuple[int, int]], name: str = "fixed") -> BenchWorkload:
    """Requests of so many prompt and output tokens; ids count up from 1."""
    return BenchWorkload(
        name=name,
        requests=[
            BenchRequest(token_ids=list(range(1, prompt + 1)), output_tokens=output)
            for prompt, output in lengths
        ],
        temperature=0.0,
    )
