"""The split of layers: the exact optimum of any table, against all splits there are."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp.checkpoint import expected_tensors
from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig, RopeConfig
from ember_pp.partition import best_counts, kv_bytes_per_token, split_layers, stage_weight_bytes

SMALL = ModelConfig(
    model_type="qwen3",
    hidden_size=64,
    num_layers=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    vocab_size=1000,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope=RopeConfig(rope_type="default", theta=1e4),
    tie_word_embeddings=True,
    has_qk_norm=True,
    has_qkv_bias=True,
    has_output_bias=False,
    has_mlp_bias=False,
)


def parameters(cfg: ModelConfig, start: int, end: int, is_first: bool, is_last: bool) -> int:
    shapes = expected_tensors(cfg, start, end, is_first=is_first, is_last=is_last)
    return sum(math.prod(shape) for shape in shapes.values())


def counts_of(ranges: list[tuple[int, int]]) -> list[int]:
    assert ranges[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    return [end - start for start, end in ranges]


# Small numbers, so that there are many ties; None where a stage cannot have so many layers.
def tables(num_layers: int, num_stages: int) -> st.SearchStrategy[list[list[int | None]]]:
    entry = st.none() | st.integers(0, 6)
    row = st.lists(entry, min_size=num_layers + 1, max_size=num_layers + 1)
    return st.lists(row, min_size=num_stages, max_size=num_stages)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int | None]], list[list[int | None]] | None]:
    shape = draw(st.tuples(st.integers(0, 6), st.integers(1, 4)))
    return draw(tables(*shape)), draw(st.none() | tables(*shape))


@settings(max_examples=400, deadline=None)
@given(problem=problems())
def test_best_counts_are_the_best_of_all_splits(problem) -> None:
    costs, pressures = problem
    num_layers = len(costs[0]) - 1
    possible = [
        counts
        for counts in itertools.product(range(num_layers + 1), repeat=len(costs))
        if sum(counts) == num_layers
        and all(
            table[stage][count] is not None
            for table in (costs, pressures)
            if table is not None
            for stage, count in enumerate(counts)
        )
    ]
    # The least largest cost is over what the costs allow; pressures then rule out more.
    by_cost = [
        counts
        for counts in itertools.product(range(num_layers + 1), repeat=len(costs))
        if sum(counts) == num_layers
        and all(costs[stage][count] is not None for stage, count in enumerate(counts))
    ]

    def slowest(counts) -> int:
        return max(costs[stage][count] for stage, count in enumerate(counts))

    def rank(counts) -> tuple[object, ...]:
        fullest = 0
        if pressures is not None:
            fullest = max(pressures[stage][count] for stage, count in enumerate(counts))
        squares = sum(costs[stage][count] ** 2 for stage, count in enumerate(counts))
        return fullest, squares, [-count for count in counts]

    least = min(map(slowest, by_cost), default=None)
    candidates = [counts for counts in possible if slowest(counts) == least]
    best = list(min(candidates, key=rank)) if candidates else None
    assert best_counts(costs, pressures) == best


def test_many_stages_and_layers_take_no_time() -> None:
    costs = [[count * (1 + stage % 3) for count in range(129)] for stage in range(64)]
    counts = best_counts(costs)
    assert counts is not None
    assert sum(counts) == 128
    assert max(row[count] for row, count in zip(costs, counts, strict=True)) == 4


def test_equal_differs_by_one_at_most() -> None:
    assert counts_of(split_layers(SMALL, 4, "equal")) == [3, 3, 2, 2]
    assert split_layers(SMALL, 1, "equal") == [(0, 10)]


def test_given_counts_are_taken_as_they_are() -> None:
    assert split_layers(SMALL, 3, [1, 7, 2]) == [(0, 1), (1, 8), (8, 10)]
    assert split_layers(SMALL, 2, [10, 0]) == [(0, 10), (10, 10)]  # the lm_head alone


@pytest.mark.parametrize(
    ("num_stages", "split", "message"),
    [
        (11, "equal", r"pipeline.stages: 11 stages for a model of 10 layers; use at most 10"),
        (2, [5, 6], r"pipeline.split: 5\+6 = 11 layers; the model has 10"),
        (3, [5, 5], r"pipeline.split: 2 counts for pipeline.stages=3"),
        (2, [0, 10], r"pipeline.split: expected layer counts above 0 \(the last"),
        (3, [5, 0, 5], r"pipeline.split: expected layer counts above 0"),
        (1, [0], r"pipeline.split: expected layer counts above 0"),
        (2, [11, -1], r"pipeline.split: expected layer counts above 0"),
    ],
)
def test_refuses_a_split_that_cannot_be(num_stages: int, split: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_layers(SMALL, num_stages, split)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ends", list(itertools.product([True, False], repeat=2)))
def test_weight_bytes_are_those_of_the_expected_tensors(
    tied: bool, ends: tuple[bool, bool]
) -> None:
    cfg = dataclasses.replace(SMALL, tie_word_embeddings=tied)
    counted = stage_weight_bytes(
        cfg, (2, 5), is_first=ends[0], is_last=ends[1], bytes_per_element=4
    )
    assert counted == 4 * parameters(cfg, 2, 5, *ends)


def test_kv_bytes_count_keys_and_values() -> None:
    # Qwen3-0.6B in bf16: 2 x 28 layers x 8 heads x 128 x 2 bytes
    cfg = dataclasses.replace(SMALL, num_layers=28, num_kv_heads=8, head_dim=128)
    assert kv_bytes_per_token(cfg, 28, 2) == 114_688
