"""The split of layers: the exact optimum, against all splits there are."""

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
from ember_pp.partition import kv_bytes_per_token, split_layers, stage_weight_bytes

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
QWEN3_0_6B = dataclasses.replace(
    SMALL,
    hidden_size=1024,
    num_layers=28,
    num_heads=16,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=3072,
    vocab_size=151936,
    has_qkv_bias=False,
)


def parameters(cfg: ModelConfig, start: int, end: int, is_first: bool, is_last: bool) -> int:
    shapes = expected_tensors(cfg, start, end, is_first=is_first, is_last=is_last)
    return sum(math.prod(shape) for shape in shapes.values())


def costs(cfg: ModelConfig, counts: tuple[int, ...]) -> list[int]:
    """Parameters that a decode step reads on each stage."""
    last = len(counts) - 1
    return [
        parameters(cfg, 0, count, False, False)
        + (cfg.hidden_size * (1 + cfg.vocab_size) if stage == last else 0)
        for stage, count in enumerate(counts)
    ]


def counts_of(ranges: list[tuple[int, int]]) -> tuple[int, ...]:
    assert ranges[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    return tuple(end - start for start, end in ranges)


@settings(max_examples=60, deadline=None)
@given(
    num_layers=st.integers(1, 9),
    num_stages=st.integers(1, 5),
    vocab_size=st.sampled_from([1, 100, 1000, 3000, 10_000]),
)
def test_auto_is_the_best_of_all_splits(num_layers: int, num_stages: int, vocab_size: int) -> None:
    cfg = dataclasses.replace(SMALL, num_layers=num_layers, vocab_size=vocab_size)
    if num_stages > num_layers:
        with pytest.raises(ConfigError, match=f"use at most {num_layers}"):
            split_layers(cfg, num_stages)
        return
    every_split = [
        counts
        for counts in itertools.product(range(1, num_layers + 1), repeat=num_stages)
        if sum(counts) == num_layers
    ]

    chosen = costs(cfg, counts_of(split_layers(cfg, num_stages)))

    def rank(cost: list[int]) -> tuple[int, int]:
        return max(cost), sum(value**2 for value in cost)

    assert rank(chosen) == min(rank(costs(cfg, counts)) for counts in every_split)


def test_auto_gives_the_head_its_layers_worth() -> None:
    """The lm_head of a 0.6B model reads as much as 9.9 of its layers."""
    assert counts_of(split_layers(QWEN3_0_6B, 4)) == (9, 9, 9, 1)
    assert counts_of(split_layers(QWEN3_0_6B, 2)) == (19, 9)
    assert counts_of(split_layers(QWEN3_0_6B, 28)) == (1,) * 28


def test_ties_leave_the_remainder_to_earlier_stages() -> None:
    no_head = dataclasses.replace(SMALL, vocab_size=1)
    assert counts_of(split_layers(no_head, 4)) == (3, 3, 2, 2)


def test_equal_differs_by_one_at_most() -> None:
    assert counts_of(split_layers(SMALL, 4, "equal")) == (3, 3, 2, 2)
    assert split_layers(SMALL, 1, "equal") == [(0, 10)]


def test_given_counts_are_taken_as_they_are() -> None:
    assert split_layers(SMALL, 3, [1, 7, 2]) == [(0, 1), (1, 8), (8, 10)]


@pytest.mark.parametrize(
    ("num_stages", "split", "message"),
    [
        (11, "auto", r"pipeline.stages: 11 stages for a model of 10 layers; use at most 10"),
        (11, "equal", r"pipeline.stages: 11 stages"),
        (2, [5, 6], r"pipeline.split: 5\+6 = 11 layers; the model has 10"),
        (3, [5, 5], r"pipeline.split: 2 counts for pipeline.stages=3"),
        (2, [10, 0], r"pipeline.split: expected layer counts above 0"),
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
    assert kv_bytes_per_token(QWEN3_0_6B, 28, 2) == 114_688
