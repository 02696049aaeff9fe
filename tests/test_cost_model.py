"""Time of a plan on a stage: bytes and operations counted by hand, and measured points."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ember_pp.cost_model import (
    CountedCost,
    MeasuredCost,
    PlanSize,
    Profile,
    Workload,
    architecture_key,
    profile_path,
    read_profile,
    stage_cost,
)
from ember_pp.devices import DeviceSpec
from ember_pp.model_config import ModelConfig

GB = 10**9
DEVICE = DeviceSpec(
    name="slow",
    memory_bytes=24 * GB,
    bandwidth_bytes_per_s=1e9,
    flops_per_s=1e12,
    plan_overhead_s=0.001,
)
CFG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
)
# q 64, k and v 32 each, o 64, gate, up and down 128 each, two norms of 8, QK norms of 4 each
LAYER = 64 + 2 * 32 + 64 + 3 * 128 + 2 * 8 + 2 * 4
PROFILE = Profile(
    model=architecture_key(CFG),
    dtype="bfloat16",
    device="slow",
    num_threads=0,
    version="1",
    decode_context=100,
    layer_decode=((1, 1.0), (5, 3.0)),
    layer_prefill=((1, 1.0), (11, 6.0)),
    context_token_s=0.001,
    head=((1, 0.5), (3, 0.9)),
    plan_overhead_s=0.25,
)


def counted(num_layers: int, *, is_last: bool = False, device: DeviceSpec = DEVICE) -> CountedCost:
    cost = stage_cost(CFG, num_layers, is_last=is_last, bytes_per_element=2, device=device)
    assert isinstance(cost, CountedCost)
    return cost


def measured(num_layers: int, *, is_last: bool) -> MeasuredCost:
    return MeasuredCost(profile=PROFILE, num_layers=num_layers, is_last=is_last)


def test_a_decode_reads_weights_once_and_keys_of_every_row() -> None:
    cost = counted(3)
    kv_bytes = 3 * 2 * 4 * 2  # layers, keys and values, d, bytes
    # Two rows with 10 tokens each; they store their own, and come in and go out as hidden states.
    expected = 3 * LAYER * 2 + kv_bytes * (20 + 2) + 2 * (2 * 8 * 2)
    assert cost.num_bytes(2, 0, 20) == expected
    assert cost.time_s(2, 0, 20) == pytest.approx(0.001 + expected / 1e9)


def test_the_last_stage_reads_the_head_and_writes_logits() -> None:
    head = counted(0, is_last=True)
    logits = 100 * (2 + 2 + 4 + 4)
    assert head.num_bytes(1, 0, 50) == 2 * (100 * 8 + 8) + logits + 2 * 8 * 2
    assert head.num_flops(3, 0, 150) == 3 * 2 * 100 * 8
    middle = counted(2).num_bytes(4, 0, 40)
    both = counted(2, is_last=True).num_bytes(4, 0, 40)
    assert both - middle == 2 * (100 * 8 + 8) + 4 * logits


def test_long_prompts_go_by_operations() -> None:
    cost = counted(1)
    num_pairs = 64 * 32  # each token attends to half of the prompt, on average
    flops = 2 * LAYER * 64 + 4 * 8 * num_pairs
    assert cost.num_flops(0, 64, 64) == flops
    fast_memory = dataclasses.replace(DEVICE, bandwidth_bytes_per_s=1e15)
    assert counted(1, device=fast_memory).time_s(0, 64, 64) == pytest.approx(0.001 + flops / 1e12)
    # A later chunk of the same length also attends to what was before it.
    assert cost.num_flops(0, 64, 164) == flops + 4 * 8 * 64 * 100


@pytest.mark.parametrize("cost", [counted(3, is_last=True), measured(3, is_last=True)])
@pytest.mark.parametrize("size", [(0, 0, 0), (1, 0, 100), (4, 7, 500), (64, 256, 9000)])
def test_more_work_never_takes_less_time(cost, size) -> None:
    time_s = cost.time_s(*size)
    assert time_s > 0
    for index in range(3):
        more = list(size)
        more[index] += 5
        assert cost.time_s(*more) >= time_s


def test_measured_times_are_joined_by_straight_lines() -> None:
    cost = measured(2, is_last=False)
    assert cost.time_s(1, 0, 100) == pytest.approx(0.25 + 2 * 1.0)
    assert cost.time_s(3, 0, 300) == pytest.approx(0.25 + 2 * 2.0)
    assert cost.time_s(9, 0, 900) == pytest.approx(0.25 + 2 * 5.0)  # beyond: the last slope
    assert cost.time_s(1, 0, 600) == pytest.approx(0.25 + 2 * (1.0 + 0.5))  # 500 tokens more
    assert cost.time_s(0, 6, 6) == pytest.approx(0.25 + 2 * (3.5 + 0.003))


def test_a_profile_knows_how_far_it_goes() -> None:
    assert (PROFILE.most_decodes, PROFILE.most_tokens) == (3, 11)  # the head was measured to 3
    longer = dataclasses.replace(PROFILE, head=((1, 0.5), (9, 0.9)))
    assert longer.most_decodes == 5


def test_prompt_tokens_add_what_they_add_to_a_prompt() -> None:
    cost = measured(1, is_last=False)
    # 5 decodes take 3.0; 6 tokens more take a prompt of 5 (3.0) to one of 11 (6.0)
    assert cost.time_s(5, 6, 503) == pytest.approx(0.25 + 3.0 + 3.0)


def test_only_the_last_stage_has_the_measured_head() -> None:
    with_head, without = measured(1, is_last=True), measured(1, is_last=False)
    assert with_head.time_s(2, 0, 200) - without.time_s(2, 0, 200) == pytest.approx(0.7)
    assert with_head.time_s(0, 5, 5) == without.time_s(0, 5, 5)  # a chunk that draws nothing


def test_a_profile_takes_the_place_of_counts() -> None:
    cost = stage_cost(CFG, 2, is_last=True, bytes_per_element=2, device=DEVICE, profile=PROFILE)
    assert cost == measured(2, is_last=True)


def test_the_steady_plan_has_the_prompts_of_the_answers_that_end() -> None:
    workload = Workload(prompt_tokens=300, output_tokens=100, sequences=80)
    plan = workload.steady_plan(4, 512)
    assert (plan.num_decodes, plan.num_prefill_tokens) == (20, 60)
    # 20 rows at 350 tokens, and a chunk of 60 in the middle of a prompt of 300
    assert plan.num_context_tokens == pytest.approx(20 * 350 + 180)
    full = workload.steady_plan(1, 100)
    assert full.num_decodes + full.num_prefill_tokens == pytest.approx(100)
    assert full.num_prefill_tokens == pytest.approx(3 * full.num_decodes)


def test_the_decode_plan_has_rows_alone() -> None:
    workload = Workload(prompt_tokens=300, output_tokens=100, sequences=80)
    assert workload.decode_plan(4) == PlanSize(
        num_decodes=20, num_prefill_tokens=0, num_context_tokens=20 * 350
    )


def test_profiles_are_stored_by_what_they_belong_to(tmp_path) -> None:
    path = profile_path(str(tmp_path), CFG, "bfloat16", "RTX 3090 / a", 0, "1.0")
    assert path.parent == tmp_path
    assert set(path.name) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._"
    )
    others = [
        profile_path(str(tmp_path), CFG, "float32", "RTX 3090 / a", 0, "1.0"),
        profile_path(str(tmp_path), CFG, "bfloat16", "RTX 3090", 0, "1.0"),
        profile_path(str(tmp_path), CFG, "bfloat16", "RTX 3090 / a", 2, "1.0"),
        profile_path(str(tmp_path), CFG, "bfloat16", "RTX 3090 / a", 0, "1.1"),
        profile_path(
            str(tmp_path), dataclasses.replace(CFG, num_kv_heads=2), "bfloat16", "RTX 3090 / a",
            0, "1.0",
        ),
    ]  # fmt: skip
    assert len({path, *others}) == 6
    deeper = dataclasses.replace(CFG, num_layers=9)  # equal layers take equally long
    assert profile_path(str(tmp_path), deeper, "bfloat16", "RTX 3090 / a", 0, "1.0") == path


def test_a_profile_is_read_as_it_was_written(tmp_path) -> None:
    path = tmp_path / "profile.json"
    assert read_profile(path) is None
    path.write_text(json.dumps(PROFILE.to_plain()))
    assert read_profile(path) == PROFILE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"profile_version": 99}, "expected profile_version"),
        ({"head": []}, "head: empty"),
        ({"head": [[1]]}, "not enough values"),
        ({"head": 7}, "not iterable"),
        ({"head": [[0, 1.0]]}, "head: sizes do not rise"),
        ({"head": [[1, float("inf")]]}, "head: times below 0 or not finite"),
        ({"layer_decode": [[float("inf"), 1.0]]}, "infinity"),
        ({"context_token_s": "long"}, "not supported"),
        ({"plan_overhead_s": float("nan")}, "plan_overhead_s: expected"),
        ({"unknown": 1}, "unknown"),
        ("{", "Expecting"),
        # JSON, but not a profile
        ("[]", "expected a map, got list"),
        ("[1, 2]", "expected a map, got list"),
        ("null", "expected a map, got NoneType"),
        ('"text"', "expected a map, got str"),
        ("7", "expected a map, got int"),
        ('{"profile_version": 1}', "layer_decode: missing"),
    ],
)
def test_a_damaged_profile_is_named(tmp_path, change, message) -> None:
    path = tmp_path / "profile.json"
    path.write_text(change if isinstance(change, str) else json.dumps(PROFILE.to_plain() | change))
    with pytest.raises(ValueError, match=message) as error:
        read_profile(path)
    assert str(path) in str(error.value)
    assert "measure again" in str(error.value)
