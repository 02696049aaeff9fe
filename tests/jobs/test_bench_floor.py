"""Floors of a pipeline: bytes and operations counted by hand, and which stage they are of."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from bench_requests import workload_of

from ember_pp.jobs.bench_floor import Floor, StageFloor, stage_floor
from ember_pp.model_config import ModelConfig

PRESETS = Path(__file__).parents[2] / "conf" / "model"


def preset(name: str) -> ModelConfig:
    plain = yaml.safe_load((PRESETS / f"{name}.yaml").read_text())
    return ModelConfig.from_hf(plain["architecture"])


def stage(device="cuda:0", weight_bytes=1000, **changes) -> StageFloor:
    """Reads 100 bytes and multiplies 1000 times in a second."""
    fields = {
        "read_bytes_per_s": 100.0,
        "flops_per_s": 1000.0,
        "kv_bytes_per_token": 2,
        "flops_per_token": 30,
        "flops_per_row": 0,
    }
    return StageFloor(device=device, weight_bytes=weight_bytes, **(fields | changes))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        # Of the published checkpoint, less the embedding, which is not read but for a row ...
        ("qwen3-8b", 8_190_735_360 - 151_936 * 4096),
        # ... unless it is the lm_head too.
        ("qwen3-0.6b", 596_049_920),
    ],
)
def test_a_step_reads_what_it_multiplies_with(name, num_parameters):
    cfg = preset(name)
    rates = {"read_bytes_per_s": 3e12, "flops_per_s": 7e14}
    whole = stage_floor(
        cfg, (0, cfg.num_layers), is_last=True, bytes_per_element=2, device="cuda:0", **rates
    )
    assert whole.weight_bytes == 2 * num_parameters
    assert whole.kv_bytes_per_token == cfg.num_layers * 2 * 8 * 128 * 2
    parts = [
        stage_floor(cfg, layers, is_last=is_last, bytes_per_element=2, device="cuda:0", **rates)
        for layers, is_last in (((0, 20), False), ((20, cfg.num_layers), True))
    ]
    for field in ("weight_bytes", "kv_bytes_per_token", "flops_per_token", "flops_per_row"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field)


def test_one_stream_takes_the_sum_over_the_stages():
    floor = Floor(stages=[stage("cuda:0", 1000), stage("cuda:1", 500)], microbatches=2)
    # 1000 bytes + 10 tokens * 2 bytes, 500 + 20, at 100 bytes a second
    assert floor.step_s(batch=1, context_tokens=10) == pytest.approx(10.2 + 5.2)


def test_a_full_pipeline_takes_what_its_slowest_stage_takes():
    stages = [stage("cuda:0", 1000), stage("cuda:1", 500)]
    floor = Floor(stages=stages, microbatches=2)
    # Two micro-batches of 4 rows and 40 tokens: 1000 + 80 bytes each, one after the other;
    # less than that is the way of one of them, 10.8 + 5.8.
    assert floor.step_s(batch=8, context_tokens=80) == pytest.approx(2 * 10.8)
    shared = [stage("cuda:0", 1000), stage("cuda:0", 500)]
    on_one = Floor(stages=shared, microbatches=2)
    assert on_one.step_s(batch=8, context_tokens=80) == pytest.approx(2 * (10.8 + 5.8))
    on_cpu = Floor(
        stages=[stage("cpu", 1000), stage("cpu", 500)], microbatches=2
    )  # threads of their own
    assert on_cpu.step_s(batch=8, context_tokens=80) == pytest.approx(2 * 10.8)


def test_replicas_share_the_rows():
    floor = Floor(stages=[stage()], microbatches=1, replicas=2)
    assert floor.step_s(batch=8, context_tokens=80) == pytest.approx((1000 + 40 * 2) / 100)


def test_many_rows_are_bound_by_operations():
    floor = Floor(stages=[stage(flops_per_row=70)], microbatches=1)
    assert floor.step_s(batch=200, context_tokens=200) == pytest.approx(200 * (30 + 70) / 1000)


def test_prefill_multiplies_every_prompt_token_and_a_row_of_each_prompt():
    workload = workload_of([(50, 1), (70, 1)])
    floor = Floor(stages=[stage(flops_per_row=100), stage("cuda:1", 10)], microbatches=2)
    assert floor.prefill_s(workload) == pytest.approx(10.0)  # 1000 bytes beat 120 * 30 + 200
    fast = Floor(stages=[stage(flops_per_row=100, weight_bytes=1)], microbatches=1)
    assert fast.prefill_s(workload) == pytest.approx((120 * 30 + 2 * 100) / 1000)


def test_a_whole_workload_is_bound_by_the_longest_answer():
    workload = workload_of([(4, 3), (6, 5)])
    floor = Floor(stages=[stage(flops_per_token=0)], microbatches=1)
    # Decode steps: 4+1, 4+2 and 6+1 .. 6+4 tokens to read, to within half a token of each step
    contexts = 2 * (4 + 1.5) + 4 * (6 + 2.5)
    assert floor.whole_s(workload) == pytest.approx((5 * 1000 + 2 * contexts) / 100)
    slow = Floor(
        stages=[stage(weight_bytes=0, kv_bytes_per_token=0, flops_per_row=50)], microbatches=1
    )
    assert slow.whole_s(workload) == pytest.approx(((10 + 6) * 30 + 8 * 50) / 1000)
