"""What one layout, replicas of stages on given devices, is predicted to do."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from ember_pp import memory_model
from ember_pp.config import Config
from ember_pp.coordinator.preparation import (
    choose_cpu_threads,
    choose_max_model_len,
    choose_num_microbatches,
    default_max_in_flight,
    stage_settings,
    with_profiles,
)
from ember_pp.cost_model import PlanCost, PlanSize, Workload
from ember_pp.devices import DeviceSpec
from ember_pp.errors import CapacityError
from ember_pp.layout import Pipelines, StageDevice, choose_split
from ember_pp.memory_model import StageBytes
from ember_pp.model_config import ModelConfig
from ember_pp.partition import LayerRange
from ember_pp.stage import capacity

HOP_S = 10e-6
"""Assumed: from the end of a stage to the start of the next."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of the first replica."""

    device: StageDevice
    layers: LayerRange
    held: StageBytes
    """With the KV cache that is agreed on."""
    num_kv_tokens: int
    """That would fit here; the least of all stages is agreed on."""
    cost: PlanCost
    steady_s: float
    decode_s: float
    prefill_s: float
    """Of a full plan of prompt tokens."""
    bubble: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPlan:
    """A layout and its prediction."""

    pipelines: Pipelines
    stages: list[StagePlan]
    workload: Workload
    """Of each replica, as far as its KV cache allows."""
    num_microbatches: int
    max_in_flight: int
    steady: PlanSize

    @property
    def num_replicas(self) -> int:
        """Copies of the pipeline."""
        return len(self.pipelines.devices)

    @property
    def num_kv_tokens(self) -> int:
        """KV cache of each replica."""
        return min(stage.num_kv_tokens for stage in self.stages)

    @property
    def limiting_stage(self) -> int:
        """The stage with the smallest KV cache."""
        return min(range(len(self.stages)), key=lambda stage: self.stages[stage].num_kv_tokens)

    def cycle_s(self, times_s: Sequence[float]) -> float:
        """From one step of a micro-batch to its next, given the times of its plan."""
        alone_s = sum(times_s) + HOP_S * (len(times_s) if len(times_s) > 1 else 0)
        return max(self.num_microbatches * max(times_s), alone_s)

    @property
    def steady_s(self) -> float:
        """Between two tokens of a sequence, prompts coming as fast as answers end."""
        return self.cycle_s([stage.steady_s for stage in self.stages])

    @property
    def decode_s(self) -> float:
        """Between two tokens of a sequence, no prompt being there."""
        return self.cycle_s([stage.decode_s for stage in self.stages])

    @property
    def prompt_s(self) -> float:
        """To the first token of a single prompt, alone in the pipeline."""
        most = self.pipelines.settings.max_tokens_per_plan
        full, rest = divmod(self.workload.prompt_tokens, most)
        sizes = [most] * full + ([rest] if rest else [])
        end_s = [0.0] * len(self.stages)
        for index, tokens in enumerate(sizes):
            at_s = 0.0
            for stage, plan in enumerate(self.stages):
                start_s = max(at_s + HOP_S * (stage > 0), end_s[stage])
                at_s = end_s[stage] = start_s + plan.cost.time_s(0, tokens, index * most + tokens)
        return end_s[-1]

    @property
    def output_tokens_per_s(self) -> float:
        """Of all replicas, in the steady state."""
        rows = self.steady.num_decodes * self.num_microbatches
        return self.num_replicas * rows / self.steady_s

    def overrides(self, config: Config) -> list[str]:
        """What to give ``launch.sh`` for this layout, beside the model."""
        counts = [end - start for start, end in (stage.layers for stage in self.stages)]
        given = [f"pipeline.stages={len(self.stages)}"]
        if len(counts) > 1:
            given.append(f"pipeline.split=[{','.join(map(str, counts))}]")
        if self.num_replicas > 1:
            given.append(f"pipeline.replicas={self.num_replicas}")
        if self.pipelines.settings.max_sequences != config.scheduler.max_sequences:
            given.append(f"scheduler.max_sequences={self.pipelines.settings.max_sequences}")
        return given

    def to_plain(self) -> dict[str, Any]:
        """For JSON. Times in seconds, memory in bytes."""
        return {
            "replicas": self.num_replicas,
            "output_tokens_per_s": self.output_tokens_per_s,
            "steady_step_s": self.steady_s,
            "decode_step_s": self.decode_s,
            "prompt_s": self.prompt_s,
            "kv_tokens": self.num_kv_tokens,
            "sequences": self.workload.sequences,
            "limiting_stage": self.limiting_stage,
            "max_in_flight": self.max_in_flight,
            "stages": [
                {
                    "device": stage.device.spec.name,
                    "is_measured": stage.device.profile is not None,
                    "layers": list(stage.layers),
                    "memory_bytes": stage.device.spec.memory_bytes,
                    "bytes": dataclasses.asdict(stage.held) | {"total": stage.held.total},
                    "kv_tokens": stage.num_kv_tokens,
                    "steady_s": stage.steady_s,
                    "decode_s": stage.decode_s,
                    "prefill_s": stage.prefill_s,
                    "bubble": stage.bubble,
                }
                for stage in self.stages
            ],
        }


def factorizations(num_devices: int, num_layers: int) -> Iterator[tuple[int, int]]:
    """(replicas, stages) that use every device."""
    for num_stages in range(1, min(num_devices, num_layers) + 1):
        if num_devices % num_stages == 0:
            yield num_devices // num_stages, num_stages


def assign(devices: Sequence[DeviceSpec], num_stages: int) -> list[DeviceSpec]:
    """A device for each stage, in order; each its share where there are more stages."""
    if len(devices) >= num_stages:
        return list(devices[:num_stages])
    index = [stage * len(devices) // num_stages for stage in range(num_stages)]
    return [devices[i].share(index.count(i)) for i in index]


def plan_layout(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    num_replicas: int,
    num_stages: int,
) -> LayoutPlan:
    """The best split of this layout, and what it does.

    Raises:
        CapacityError: it does not fit; says which stage lacks how much.
        ConfigError: more stages than layers, or a split that does not go with them.
    """
    pipelines, max_in_flight = _pipelines(config, cfg, devices, num_replicas, num_stages)
    num_microbatches = choose_num_microbatches(num_stages, max_in_flight, config.pipeline.run_ahead)
    workload = Workload(
        prompt_tokens=config.plan.prompt_tokens,
        output_tokens=config.plan.output_tokens,
        sequences=pipelines.settings.max_sequences,
    )
    most = pipelines.settings.max_tokens_per_plan
    split = config.pipeline.split
    if isinstance(split, list) and len(split) != num_stages:
        split = "auto"  # it is for another layout than this one
    for _ in range(2):  # the KV cache depends on the split, and the best split on what runs
        size = workload.steady_plan(num_microbatches, most)
        ranges = choose_split(pipelines, split, size=size, num_kv_tokens=workload.total_tokens)
        tokens = [
            _num_kv_tokens(pipelines, stage, end - start)
            for stage, (start, end) in enumerate(ranges)
        ]
        fitting = max(1, min(tokens) // workload.total_tokens)
        if fitting >= workload.sequences:
            break
        workload = dataclasses.replace(workload, sequences=fitting)
    _check_kv(workload, min(tokens))
    return LayoutPlan(
        pipelines=pipelines,
        stages=_stages(pipelines, ranges, tokens, workload, num_microbatches),
        workload=workload,
        num_microbatches=num_microbatches,
        max_in_flight=max_in_flight,
        steady=workload.steady_plan(num_microbatches, most),
    )


def _check_kv(workload: Workload, num_kv_tokens: int) -> None:
    if num_kv_tokens < workload.total_tokens:
        raise CapacityError(
            f"the KV cache holds {num_kv_tokens} tokens, one request of plan.prompt_tokens + "
            f"plan.output_tokens has {workload.total_tokens}; raise cache.memory_gib or free memory"
        )


def _pipelines(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    num_replicas: int,
    num_stages: int,
) -> tuple[Pipelines, int]:
    run_ahead = config.pipeline.run_ahead
    max_in_flight = config.pipeline.max_in_flight or default_max_in_flight(num_stages, run_ahead)
    settings = dataclasses.replace(
        stage_settings(config, choose_max_model_len(config.model, cfg), max_in_flight),
        max_sequences=-(-config.plan.sequences // num_replicas),
    )
    num_processes = num_replicas * num_stages
    placed = with_profiles(
        config, cfg, assign(devices, num_processes), choose_cpu_threads(config, num_processes)
    )
    replicas = [placed[start : start + num_stages] for start in range(0, num_processes, num_stages)]
    return Pipelines(cfg, settings, replicas), max_in_flight


def _num_kv_tokens(pipelines: Pipelines, stage: int, num_layers: int) -> int:
    """What the stage itself will say that fits."""
    settings = pipelines.settings
    if any(device.spec.memory_bytes is not None for device in pipelines.at(stage)):
        return pipelines.num_kv_tokens(stage, num_layers)
    given = settings.kv_memory_bytes
    blocks = capacity.num_cpu_blocks(
        memory_model.block_bytes(pipelines.cfg, num_layers, settings),
        memory_gib=None if given is None else given / 2**30,
        num_stages=pipelines.num_stages,
        most_blocks=settings.max_sequences * -(-settings.max_model_len // settings.block_size),
    )
    return blocks * settings.block_size


def _stages(
    pipelines: Pipelines,
    ranges: Sequence[LayerRange],
    tokens: Sequence[int],
    workload: Workload,
    num_microbatches: int,
) -> list[StagePlan]:
    settings = pipelines.settings
    most = settings.max_tokens_per_plan
    steady = workload.steady_plan(num_microbatches, most)
    decode = workload.decode_plan(num_microbatches)
    prefill = PlanSize(num_decodes=0, num_prefill_tokens=most, num_context_tokens=most)
    costs = [
        pipelines.cost(stage, end - start, pipelines.devices[0][stage])
        for stage, (start, end) in enumerate(ranges)
    ]
    steady_s = [steady.time_s(cost) for cost in costs]
    slowest_s = max(num_microbatches * max(steady_s), sum(steady_s) + HOP_S * (len(costs) - 1))
    stages = []
    for stage, (cost, (start, end)) in enumerate(zip(costs, ranges, strict=True)):
        device = pipelines.devices[0][stage]
        blocks = min(tokens) // settings.block_size
        kv_bytes = blocks * memory_model.block_bytes(pipelines.cfg, end - start, settings)
        stages.append(
            StagePlan(
                device=device,
                layers=(start, end),
                held=pipelines.held(stage, end - start, device).with_kv(kv_bytes),
                num_kv_tokens=tokens[stage],
                cost=cost,
                steady_s=steady_s[stage],
                decode_s=decode.time_s(cost),
                prefill_s=prefill.time_s(cost),
                bubble=1 - num_microbatches * steady_s[stage] / slowest_s,
            )
        )
    return stages


def smallest_that_fits(config: Config, cfg: ModelConfig, device: DeviceSpec, above: int) -> int:
    """Stages that hold the model on devices of this kind, more than ``above``; 0: none do."""
    for num_stages in itertools.takewhile(
        lambda count: count <= cfg.num_layers, itertools.count(above + 1)
    ):
        try:
            plan_layout(config, cfg, [device] * num_stages, 1, num_stages)
        except CapacityError:
            continue
        return num_stages
    return 0


def fullness(stage: StagePlan) -> float:
    """Share of its device that a stage takes; 0 where memory is not limited."""
    memory_bytes = stage.device.spec.memory_bytes
    return stage.held.total / memory_bytes if memory_bytes else math.nan
