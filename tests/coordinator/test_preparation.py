"""What is decided before any process starts: the split by cost, devices, and their refusals."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ember_pp import __version__
from ember_pp import config as configuration
from ember_pp.coordinator import preparation
from ember_pp.coordinator.pipeline import Pipeline
from ember_pp.coordinator.preparation import choose_devices, prepare
from ember_pp.cost_model import MeasuredCost, Profile, architecture_key, profile_path
from ember_pp.devices import find_devices, parse_devices
from ember_pp.errors import CapacityError, ConfigError
from ember_pp.model_config import ModelConfig

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 96,
    "vocab_size": 4000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


def make(tmp_path, **groups) -> configuration.Config:
    plain = {
        "model": {"architecture": ARCHITECTURE, "load": "random"},
        "pipeline": {"stages": 2, "devices": "cpu", "cpu_threads": 1},
        "plan": {"profile_folder": str(tmp_path)},
    }
    for group, values in groups.items():
        plain[group] = plain.get(group, {}) | values
    return configuration.build(plain)


def counts(prepared: preparation.Preparation) -> list[int]:
    return [end - start for start, end in prepared.layer_ranges]


def test_the_split_is_for_the_workload_of_the_plan(tmp_path) -> None:
    """Long sequences are read by layers, and make the head count less."""
    short = {"prompt_tokens": 4, "output_tokens": 4}
    long = {"prompt_tokens": 3500, "output_tokens": 500}
    first = counts(prepare(make(tmp_path, plan=short)))
    second = counts(prepare(make(tmp_path, plan=long)))
    assert sum(first) == sum(second) == 8
    assert first[0] > second[0] >= 4


@pytest.mark.parametrize(("split", "expected"), [("equal", [4, 4]), ([7, 1], [7, 1])])
def test_other_splits_are_taken_as_they_are(tmp_path, split, expected) -> None:
    assert counts(prepare(make(tmp_path, pipeline={"split": split}))) == expected


def plan_time_of_the_scheduler(config, prepared):
    class Supervisor:
        num_blocks = 64

    pipeline = Pipeline.__new__(Pipeline)
    pipeline._config, pipeline._preparation = config, prepared
    pipeline.supervisor = Supervisor()  # type: ignore[assignment]
    pipeline._open_scheduler()
    assert pipeline.scheduler is not None
    return pipeline.scheduler._plan_time_s


def test_what_is_only_guessed_of_a_cpu_times_no_plans(tmp_path) -> None:
    config = make(tmp_path)
    prepared = prepare(config)
    assert prepared.plan_cost is None
    assert plan_time_of_the_scheduler(config, prepared) is None


def write_profile(tmp_path) -> None:
    """A decode takes a second a layer, and the head as long as six layers."""
    cfg = ModelConfig.from_hf(ARCHITECTURE)
    name = find_devices(["cpu"])[0].name
    profile = Profile(
        model=architecture_key(cfg),
        dtype="bfloat16",
        device=name,
        num_threads=1,
        version=__version__,
        decode_context=128,
        layer_decode=((1, 1.0),),
        layer_prefill=((1, 0.0), (512, 0.0)),
        context_token_s=0.0,
        head=((1, 6.0),),
        plan_overhead_s=0.0,
    )
    path = profile_path(str(tmp_path), cfg, "bfloat16", name, 1, __version__)
    path.write_text(json.dumps(profile.to_plain()))


def test_a_profile_decides_where_there_is_one_for_every_device(tmp_path) -> None:
    write_profile(tmp_path)
    prepared = prepare(make(tmp_path))
    assert counts(prepared) == [7, 1]
    assert isinstance(prepared.plan_cost, MeasuredCost)
    assert counts(prepare(make(tmp_path, plan={"use_profile": False}))) != [7, 1]
    assert counts(prepare(make(tmp_path, pipeline={"cpu_threads": 2}))) != [7, 1]


def test_plans_are_timed_by_the_slowest_stage(tmp_path) -> None:
    write_profile(tmp_path)
    config = make(tmp_path)
    prepared = prepare(config)
    assert plan_time_of_the_scheduler(config, prepared) == prepared.plan_cost.time_s
    assert prepared.plan_cost.time_s(1, 0, 128) == pytest.approx(7.0)  # seven layers of 1 s
    head = prepare(make(tmp_path, pipeline={"split": [1, 7]})).plan_cost
    assert head.time_s(1, 0, 128) == pytest.approx(13.0)  # seven layers and the head


def test_what_cannot_fit_is_refused_before_a_byte_is_read(tmp_path, monkeypatch) -> None:
    (card,) = parse_devices({"name": "tiny", "memory_gib": 0.5, "bandwidth_gbps": 9, "tflops": 1})
    monkeypatch.setattr(preparation, "count_gpus", lambda: 2)
    monkeypatch.setattr(preparation, "find_devices", lambda names: [card for _ in names])
    config = make(tmp_path, pipeline={"devices": "auto"})
    with pytest.raises(CapacityError, match=r"stage \d of 2 lacks 0\.\d\d GiB on tiny"):
        prepare(config)
    roomy = dataclasses.replace(card, memory_bytes=2 * 1024**3)
    monkeypatch.setattr(preparation, "find_devices", lambda names: [roomy for _ in names])
    assert prepare(config).devices == ["cuda:0", "cuda:1"]


def test_devices_are_spread_in_order() -> None:
    assert choose_devices("auto", 3, 0) == ["cpu"] * 3
    assert choose_devices("auto", 2, 4) == ["cuda:0", "cuda:1"]
    assert choose_devices("auto", 4, 2) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert choose_devices(["cuda:1", "auto"], 2, 2) == ["cuda:1", "cuda:1"]
    with pytest.raises(ConfigError, match=r"pipeline.devices: cuda:2 is not there; .* 2 GPUs"):
        choose_devices("cuda:2", 1, 2)


def test_devices_of_a_replica(tmp_path) -> None:
    prepared = prepare(make(tmp_path, pipeline={"replicas": 3}))
    prepared = dataclasses.replace(prepared, devices=list("abcdef"))
    assert prepared.devices_of(1) == ["c", "d"]
