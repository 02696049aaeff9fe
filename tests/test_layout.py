"""The best split over devices, against all splits there are; memory, replicas, errors by name."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp.cost_model import MeasuredCost, PlanSize, Profile
from ember_pp.devices import DeviceSpec, parse_devices
from ember_pp.errors import CapacityError, ConfigError
from ember_pp.layout import Layout, StageDevice, choose_split
from ember_pp.memory_model import CUDA_CONTEXT_BYTES, StageSettings
from ember_pp.model_config import ModelConfig

GIB = 1024**3
MIB = 1024**2
CFG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "hidden_size": 512,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 20_000,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
)
SETTINGS = StageSettings(
    bytes_per_element=2,
    block_size=16,
    max_sequences=8,
    max_tokens_per_plan=64,
    max_in_flight=4,
    max_model_len=1024,
)
DECODE = PlanSize(num_decodes=4, num_prefill_tokens=0, num_context_tokens=400)
MIXED = PlanSize(num_decodes=4, num_prefill_tokens=60, num_context_tokens=1000)
NUM_KV_TOKENS = 256


def device(memory_bytes: int | None = 4 * GIB, speed: float = 1.0) -> StageDevice:
    return StageDevice(
        DeviceSpec(
            name=f"card at {speed:g}",
            memory_bytes=memory_bytes,
            bandwidth_bytes_per_s=speed * 1e11,
            flops_per_s=speed * 1e13,
        )
    )


def counts_of(layout: Layout, split="auto", size=DECODE, num_kv_tokens=NUM_KV_TOKENS) -> list[int]:
    ranges = choose_split(layout, split, size=size, num_kv_tokens=num_kv_tokens)
    assert ranges[0][0] == 0
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    return [end - start for start, end in ranges]


devices = st.builds(
    device,
    st.sampled_from([620 * MIB, 680 * MIB, 760 * MIB, 4 * GIB, None]),
    st.sampled_from([0.5, 1.0, 1.5, 4.0]),
)


@settings(max_examples=150, deadline=None)
@given(
    num_stages=st.integers(1, 4),
    num_replicas=st.integers(1, 2),
    size=st.sampled_from([DECODE, MIXED]),
    data=st.data(),
)
def test_auto_is_the_fastest_split_that_fits(num_stages, num_replicas, size, data) -> None:
    row = st.lists(devices, min_size=num_stages, max_size=num_stages)
    layout = Layout(
        CFG, SETTINGS, data.draw(st.lists(row, min_size=num_replicas, max_size=num_replicas))
    )

    def time_s(counts) -> float:
        return max(
            size.time_s(layout.cost(stage, count, one))
            for stage, count in enumerate(counts)
            for one in layout.devices_of(stage)
        )

    def kv_tokens(counts) -> int:
        return min(layout.num_kv_tokens(stage, count) for stage, count in enumerate(counts))

    fitting = [
        counts
        for counts in itertools.product(range(CFG.num_layers + 1), repeat=num_stages)
        if sum(counts) == CFG.num_layers
        and all(counts[:-1])
        and (counts[-1] or num_stages > 1)
        and all(
            layout.lacking_bytes(stage, count, NUM_KV_TOKENS) <= 0
            for stage, count in enumerate(counts)
        )
    ]
    if not fitting:
        with pytest.raises(CapacityError, match=r"stage \d of \d lacks"):
            counts_of(layout, size=size)
        return

    chosen = counts_of(layout, size=size)

    assert tuple(chosen) in fitting
    assert time_s(chosen) == pytest.approx(min(map(time_s, fitting)), rel=1e-9)
    as_fast = [counts for counts in fitting if time_s(counts) <= time_s(chosen) * (1 + 1e-9)]
    assert kv_tokens(chosen) == max(map(kv_tokens, as_fast))


def test_the_head_counts_as_the_layers_that_it_reads_as_much_as() -> None:
    """The lm_head of 20,000 x 512 reads as much as 2.6 layers."""
    assert counts_of(Layout(CFG, SETTINGS, [[device()] * 2])) == [5, 2]
    # The embedding costs no time, but memory: so of those that are as fast, not [3, 2, 2, 0].
    assert counts_of(Layout(CFG, SETTINGS, [[device()] * 4])) == [2, 3, 2, 0]


def test_a_faster_device_gets_more_layers_and_a_small_one_what_it_holds() -> None:
    fast_first = Layout(CFG, SETTINGS, [[device(speed=3), device()]])
    assert counts_of(fast_first) == [7, 0]
    enough_for_3 = 4 * GIB + fast_first.lacking_bytes(0, 3, NUM_KV_TOKENS)
    assert counts_of(Layout(CFG, SETTINGS, [[device(enough_for_3, speed=3), device()]])) == [3, 4]


def test_the_worst_replica_decides() -> None:
    slow_end = [device(), device(speed=0.25)]
    assert counts_of(Layout(CFG, SETTINGS, [[device()] * 2, slow_end])) == counts_of(
        Layout(CFG, SETTINGS, [slow_end])
    )


def test_the_replica_with_the_least_to_spare_limits_in_any_order() -> None:
    small, slow, fast = device(2 * GIB), device(speed=9), device(speed=10)
    for order in itertools.permutations([small, slow, fast]):
        layout = Layout(CFG, SETTINGS, [[one] for one in order])
        assert layout.limiting_device(0, 7, NUM_KV_TOKENS) == small
        alone = Layout(CFG, SETTINGS, [[small]])
        assert layout.lacking_bytes(0, 7, NUM_KV_TOKENS) == alone.lacking_bytes(0, 7, NUM_KV_TOKENS)
    for order in ([slow, fast], [fast, slow]):  # as much memory: the slower one
        layout = Layout(CFG, SETTINGS, [[one] for one in order])
        assert layout.limiting_device(0, 7, NUM_KV_TOKENS) == slow


def test_replicas_of_one_kind_are_one_device() -> None:
    layout = Layout(CFG, SETTINGS, [[device(), device(speed=2)]] * 3)
    assert layout.devices_of(1) == (device(speed=2),)


def test_kv_blocks_are_what_is_left() -> None:
    layout = Layout(CFG, SETTINGS, [[device()] * 2])
    held = layout.held(0, 5, device())
    left = 4 * GIB - held.context - held.loaded
    block_bytes = 16 * 2 * 5 * 2 * 64 * 2  # tokens, keys and values, layers, heads, d, bytes
    assert layout.block_bytes(5) == block_bytes
    assert held.reserved == held.activations + 512 * MIB
    blocks = (int(0.9 * left) - held.reserved) // block_bytes
    assert layout.num_kv_tokens(0, 5) == 16 * blocks
    half = dataclasses.replace(SETTINGS, memory_share=0.5)
    blocks = (int(0.5 * left) - held.reserved) // block_bytes
    assert Layout(CFG, half, [[device()] * 2]).num_kv_tokens(0, 5) == 16 * blocks
    given = dataclasses.replace(SETTINGS, kv_memory_bytes=10 * block_bytes + 1)
    assert Layout(CFG, given, [[device()] * 2]).num_kv_tokens(0, 5) == 160


@pytest.mark.parametrize("count", [1, 4, 7])
@pytest.mark.parametrize("kv_memory_bytes", [None, 64 * MIB])
def test_what_lacks_nothing_holds_its_kv_cache(count: int, kv_memory_bytes: int | None) -> None:
    """``lacking_bytes`` and ``num_kv_tokens`` are two views of one formula."""
    given = dataclasses.replace(SETTINGS, kv_memory_bytes=kv_memory_bytes)
    lacking = Layout(CFG, given, [[device(0x7FFFFFFF)] * 2]).lacking_bytes(0, count, 1024)
    enough = 0x7FFFFFFF + lacking
    assert Layout(CFG, given, [[device(enough)] * 2]).lacking_bytes(0, count, 1024) == 0
    assert Layout(CFG, given, [[device(enough)] * 2]).num_kv_tokens(0, count) >= 1024
    less = Layout(CFG, SETTINGS, [[device(enough - MIB)] * 2])
    if kv_memory_bytes is None:
        assert less.num_kv_tokens(0, count) < 1024


def test_memory_without_a_limit_holds_anything() -> None:
    cpu = StageDevice(parse_devices("cpu")[0])
    assert cpu.context_bytes == 0
    layout = Layout(CFG, SETTINGS, [[cpu] * 2])
    assert layout.num_kv_tokens(0, 7) > 10**12
    assert layout.num_kv_tokens(1, 0) > 10**12
    assert sum(counts_of(layout, num_kv_tokens=10**9)) == CFG.num_layers


def test_the_slowest_stage_is_that_of_the_plan_at_hand() -> None:
    layout = Layout(CFG, SETTINGS, [[device()] * 3])
    cost = layout.slowest_cost([(0, 1), (1, 6), (6, 7)], DECODE)
    assert cost == layout.cost(1, 5, device())
    unequal = Layout(CFG, SETTINGS, [[device()] * 2, [device(), device(speed=0.1)]])
    assert unequal.slowest_cost([(0, 5), (5, 7)], DECODE) == unequal.cost(1, 2, device(speed=0.1))


def test_a_scheduler_is_given_no_times_that_are_only_guessed() -> None:
    cpu = StageDevice(parse_devices("cpu")[0])
    ranges = [(0, 5), (5, 7)]
    assert Layout(CFG, SETTINGS, [[cpu] * 2]).scheduler_cost(ranges, DECODE) is None
    assert Layout(CFG, SETTINGS, [[device()] * 2, [device(), cpu]]).scheduler_cost(
        ranges, DECODE
    ) is None  # fmt: skip
    profile = Profile(
        model="", dtype="", device="", num_threads=1, version="", decode_context=1,
        layer_decode=((1, 1.0),), layer_prefill=((1, 1.0),), head=((1, 0.5),),
        context_token_s=0.0, plan_overhead_s=0.0,
    )  # fmt: skip
    measured = Layout(CFG, SETTINGS, [[dataclasses.replace(cpu, profile=profile)] * 2])
    assert measured.scheduler_cost(ranges, DECODE) == MeasuredCost(
        profile=profile, num_layers=5, is_last=False
    )
    cards = Layout(CFG, SETTINGS, [[device()] * 2])
    assert cards.scheduler_cost(ranges, DECODE) == cards.slowest_cost(ranges, DECODE)


def test_says_by_how_much_it_does_not_fit() -> None:
    layout = Layout(CFG, SETTINGS, [[device(), device(CUDA_CONTEXT_BYTES + 607 * MIB)]])
    with pytest.raises(CapacityError) as error:
        counts_of(layout, split=[1, 6])
    lacking = layout.lacking_bytes(1, 6, NUM_KV_TOKENS)
    text = str(error.value)
    assert f"stage 1 of 2 lacks {lacking / GIB:.2f} GiB on card at 1" in text
    assert f"which has {(CUDA_CONTEXT_BYTES + 607 * MIB) / GIB:.2f}" in text
    assert "KV cache of 256 tokens" in text
    assert error.value.exit_code == 3
    assert counts_of(layout, split=[7, 0]) == [7, 0]


@pytest.mark.parametrize(
    ("split", "num_stages", "message"),
    [
        ("auto", 8, r"pipeline.stages: 8 stages for a model of 7 layers; use at most 7"),
        ("equal", 8, r"pipeline.stages: 8 stages"),
        ([1, 2], 2, r"pipeline.split: 1\+2 = 3 layers; the model has 7"),
    ],
)
def test_refuses_what_cannot_be(split: object, num_stages: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        counts_of(Layout(CFG, SETTINGS, [[device()] * num_stages]), split=split)


def test_a_given_split_is_taken_though_another_is_faster() -> None:
    layout = Layout(CFG, SETTINGS, [[device()] * 2])
    assert counts_of(layout, split="equal") == [4, 3]
    assert counts_of(layout, split=[1, 6]) == [1, 6]


def test_a_kv_cache_that_was_asked_for_and_does_not_fit_is_named() -> None:
    given = dataclasses.replace(SETTINGS, kv_memory_bytes=9 * GIB)
    with pytest.raises(
        CapacityError, match=r"lacks [56]\.\d\d GiB .*KV cache 9\.00 GiB: lower "
    ) as error:
        counts_of(Layout(CFG, given, [[device()]]))
    assert "lower cache.memory_gib, or raise pipeline.stages" in str(error.value)
