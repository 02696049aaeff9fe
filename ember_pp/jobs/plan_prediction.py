"""What one layout, replicas of stages on given devices, is predicted to hold and to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
from ember_pp.errors import CapacityError, ConfigError
from ember_pp.layout import Layout, StageDevice, choose_split
from ember_pp.memory_model import StageBytes
from ember_pp.model_config import ModelConfig
from ember_pp.partition import LayerRange
from ember_pp.stage import capacity

HOP_S = 10e-6
"""Assumed: from the end of a stage to the start of the next."""

_GIB = 1024**3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """One stage; where replicas have different devices, of the worst of them."""

    device: StageDevice
    """The one with the least memory to spare: what is held is held there."""
    slowest: StageDevice
    """The one that takes longest for the average plan; times are of a plan there."""
    layers: LayerRange
    held: StageBytes
    """With the KV cache that is agreed on."""
    num_kv_tokens: int
    """That would fit here; the least of all stages is agreed on."""
    cost: PlanCost
    steady_s: float
    """Prompts coming as fast as answers end."""
    decode_s: float
    """Decodes alone."""
    prefill_s: float
    """Prompt tokens alone, as many as a plan takes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A layout with its layers placed, and how it serves a workload."""

    layout: Layout
    stages: list[StagePrediction]
    replica_steady_s: list[list[float]]
    """The average plan on each stage of each replica; ``stages`` has the slowest."""
    workload: Workload
    """Of each replica, with no more requests at once than its KV cache holds."""
    num_microbatches: int
    max_in_flight: int

    @property
    def num_replicas(self) -> int:
        """Copies of the pipeline."""
        return len(self.layout.devices)

    @property
    def is_measured(self) -> bool:
        """Whether times are by profiles; they do not compare with times at peak rates."""
        return all(stage.slowest.profile is not None for stage in self.stages)

    @property
    def has_unequal_replicas(self) -> bool:
        """Whether a stage runs on different devices in different replicas."""
        return any(len(self.layout.devices_of(stage)) > 1 for stage in range(len(self.stages)))

    @property
    def num_kv_tokens(self) -> int:
        """KV cache of each replica."""
        return min(stage.num_kv_tokens for stage in self.stages)

    @property
    def limiting_stage(self) -> int:
        """The stage with the smallest KV cache."""
        return min(range(len(self.stages)), key=lambda stage: self.stages[stage].num_kv_tokens)

    @property
    def steady(self) -> PlanSize:
        """The average plan."""
        most = self.layout.settings.max_tokens_per_plan
        return self.workload.steady_plan(self.num_microbatches, most)

    @property
    def steady_s(self) -> float:
        """Between two tokens of a sequence, prompts coming as fast as answers end."""
        return self._cycle_s([stage.steady_s for stage in self.stages])

    @property
    def decode_s(self) -> float:
        """Between two tokens of a sequence, no prompt being there."""
        return self._cycle_s([stage.decode_s for stage in self.stages])

    @property
    def bubbles(self) -> list[float]:
        """Share of the time that each stage has nothing to do, in the steady state."""
        return [1 - self.num_microbatches * stage.steady_s / self.steady_s for stage in self.stages]

    @property
    def prompt_s(self) -> float:
        """To the first token of a single prompt, alone in the pipeline."""
        most = self.layout.settings.max_tokens_per_plan
        end_s = [0.0] * len(self.stages)
        for start in range(0, self.workload.prompt_tokens, most):
            end = min(start + most, self.workload.prompt_tokens)
            at_s = 0.0
            for index, stage in enumerate(self.stages):
                start_s = max(at_s + HOP_S * (index > 0), end_s[index])
                at_s = end_s[index] = start_s + stage.cost.time_s(0, end - start, end)
        return end_s[-1]

    @property
    def output_tokens_per_s(self) -> float:
        """Of all replicas, each at its own pace, in the steady state."""
        num_rows = self.steady.num_decodes * self.num_microbatches
        return sum(num_rows / self._cycle_s(times_s) for times_s in self.replica_steady_s)

    def overrides(self, config: Config) -> list[str]:
        """Settings that turn ``config`` into this layout."""
        counts = [end - start for start, end in (stage.layers for stage in self.stages)]
        given = [f"pipeline.stages={len(counts)}"]
        if len(counts) > 1:
            given.append(f"pipeline.split=[{','.join(map(str, counts))}]")
        elif isinstance(config.pipeline.split, list):
            given.append("pipeline.split=auto")
        if self.num_replicas != config.pipeline.replicas:
            given.append(f"pipeline.replicas={self.num_replicas}")
        max_sequences = self.layout.settings.max_sequences
        if max_sequences != config.scheduler.max_sequences:
            given.append(f"scheduler.max_sequences={max_sequences}")
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
                    "slowest_device": stage.slowest.spec.name,
                    "is_measured": stage.slowest.profile is not None,
                    "layers": list(stage.layers),
                    "memory_bytes": stage.device.spec.memory_bytes,
                    "bytes": dataclasses.asdict(stage.held) | {"total": stage.held.total},
                    "kv_tokens": stage.num_kv_tokens,
                    "steady_s": stage.steady_s,
                    "decode_s": stage.decode_s,
                    "prefill_s": stage.prefill_s,
                    "bubble": bubble,
                }
                for stage, bubble in zip(self.stages, self.bubbles, strict=True)
            ],
        }

    def _cycle_s(self, times_s: Sequence[float]) -> float:
        """From one step of a micro-batch to its next, given what its plan takes on each stage."""
        num_hops = len(times_s) if len(times_s) > 1 else 0
        return max(self.num_microbatches * max(times_s), sum(times_s) + HOP_S * num_hops)


def predict(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    num_replicas: int,
    num_stages: int,
) -> Prediction:
    """The best split of this layout, and what it does.

    Raises:
        CapacityError: it does not fit; says which stage lacks how much.
        ConfigError: more stages than layers, or requests longer than the model can do.
    """
    run_ahead = config.pipeline.run_ahead
    max_in_flight = config.pipeline.max_in_flight or default_max_in_flight(num_stages, run_ahead)
    num_microbatches = choose_num_microbatches(num_stages, max_in_flight, run_ahead)
    layout = _lay_out(config, cfg, devices, num_replicas, num_stages, max_in_flight)
    workload = Workload(
        prompt_tokens=config.plan.prompt_tokens,
        output_tokens=config.plan.output_tokens,
        sequences=layout.settings.max_sequences,
    )
    _check_length(workload, layout.settings.max_model_len)
    split = config.pipeline.split
    if isinstance(split, list) and len(split) != num_stages:
        split = "auto"  # it is for another layout than this one

    def place(num_sequences: int) -> _Placement:
        return _place(layout, split, workload, num_sequences, num_microbatches)

    return _describe(_with_all_that_fit(place, workload.sequences), num_microbatches, max_in_flight)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Placement:
    """Layers placed for some number of sequences at once."""

    layout: Layout
    workload: Workload
    ranges: list[LayerRange]
    num_kv_tokens: list[int]

    @property
    def num_fitting(self) -> int:
        """Sequences that the KV cache holds."""
        return min(self.num_kv_tokens) // self.workload.total_tokens

    @property
    def is_enough(self) -> bool:
        """It holds all that are to run at once."""
        return self.num_fitting >= self.workload.sequences


def _place(
    layout: Layout,
    split: str | Sequence[int],
    workload: Workload,
    num_sequences: int,
    num_microbatches: int,
) -> _Placement:
    settings = dataclasses.replace(layout.settings, max_sequences=num_sequences)
    layout = dataclasses.replace(layout, settings=settings)
    workload = dataclasses.replace(workload, sequences=num_sequences)
    size = workload.steady_plan(num_microbatches, settings.max_tokens_per_plan)
    ranges = choose_split(layout, split, size=size, num_kv_tokens=workload.total_tokens)
    num_kv_tokens = [
        _num_kv_tokens(layout, stage, end - start) for stage, (start, end) in enumerate(ranges)
    ]
    return _Placement(layout=layout, workload=workload, ranges=ranges, num_kv_tokens=num_kv_tokens)


def _with_all_that_fit(place: Callable[[int], _Placement], num_wanted: int) -> _Placement:
    """The placement for as many sequences as are wanted, or as fit at once.

    Not more than fit: a slot without a KV cache takes memory for its logits, and sequences would
    push each other out. And the split is for what runs.

    Raises:
        CapacityError: not even one fits.
    """
    found = _try_to(place, num_wanted)
    if found is not None and found.is_enough:
        return found
    best = _try_to(place, found.num_fitting) if found is not None and found.num_fitting else None
    if best is None or not best.is_enough:
        best = place(1)
        _check_kv(best.workload, min(best.num_kv_tokens))
    # With more slots less memory is left for the KV cache, so no more fit than do here.
    low, high = best.workload.sequences, min(num_wanted, best.num_fitting)
    while low < high:
        middle = (low + high + 1) // 2
        found = _try_to(place, middle)
        if found is not None and found.is_enough:
            best, low = found, middle
        else:
            high = middle - 1
    return best


def _try_to(place: Callable[[int], _Placement], num_sequences: int) -> _Placement | None:
    try:
        return place(num_sequences)
    except CapacityError:
        return None


def _describe(placement: _Placement, num_microbatches: int, max_in_flight: int) -> Prediction:
    layout, workload = placement.layout, placement.workload
    most = layout.settings.max_tokens_per_plan
    steady = workload.steady_plan(num_microbatches, most)
    decode = workload.decode_plan(num_microbatches)
    prefill = PlanSize(num_decodes=0, num_prefill_tokens=most, num_context_tokens=most)
    num_kv_tokens = min(placement.num_kv_tokens)
    num_blocks = num_kv_tokens // layout.settings.block_size
    stages, steady_s = [], []
    for stage, (start, end) in enumerate(placement.ranges):
        count = end - start
        costs = {device: layout.cost(stage, count, device) for device in layout.devices_of(stage)}
        times_s = {device: steady.time_s(cost) for device, cost in costs.items()}
        slowest = max(costs, key=lambda device: (times_s[device], device.spec.name))
        limiting = layout.limiting_device(stage, count, num_kv_tokens)
        held = layout.held(stage, count, limiting)
        steady_s.append(times_s)
        stages.append(
            StagePrediction(
                device=limiting,
                slowest=slowest,
                layers=(start, end),
                held=held.with_kv(num_blocks * layout.block_bytes(count)),
                num_kv_tokens=placement.num_kv_tokens[stage],
                cost=costs[slowest],
                steady_s=times_s[slowest],
                decode_s=max(map(decode.time_s, costs.values())),
                prefill_s=max(map(prefill.time_s, costs.values())),
            )
        )
    return Prediction(
        layout=layout,
        stages=stages,
        replica_steady_s=[
            [times_s[device] for times_s, device in zip(steady_s, replica, strict=True)]
            for replica in layout.devices
        ],
        workload=workload,
        num_microbatches=num_microbatches,
        max_in_flight=max_in_flight,
    )


def factorizations(num_devices: int, num_layers: int) -> Iterator[tuple[int, int]]:
    """(replicas, stages) that use every device."""
    for num_stages in range(1, min(num_devices, num_layers) + 1):
        if num_devices % num_stages == 0:
            yield num_devices // num_stages, num_stages


def least_stages(config: Config, cfg: ModelConfig, device: DeviceSpec, *, above: int) -> int | None:
    """Fewest stages, more than ``above``, that hold the model on devices like this; None: none."""

    def fits(num_stages: int) -> bool:
        try:
            predict(config, cfg, [device] * num_stages, 1, num_stages)
        except CapacityError:
            return False
        return True

    low, high = above + 1, cfg.num_layers
    if low > high or not fits(high):
        return None
    while low < high:  # what fits n stages fits n + 1: a layer less each, and the same beside
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def _lay_out(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    num_replicas: int,
    num_stages: int,
    max_in_flight: int,
) -> Layout:
    settings = dataclasses.replace(
        stage_settings(config, choose_max_model_len(config.model, cfg), max_in_flight),
        max_sequences=-(-config.plan.sequences // num_replicas),
    )
    num_processes = num_replicas * num_stages
    num_threads = choose_cpu_threads(config, num_processes)
    placed = with_profiles(config, cfg, _assign(devices, num_processes), num_threads)
    replicas = [placed[start : start + num_stages] for start in range(0, num_processes, num_stages)]
    return Layout(cfg, settings, replicas)


def _assign(devices: Sequence[DeviceSpec], num_processes: int) -> list[DeviceSpec]:
    """A device for each stage, in order; its part of one where there are more stages."""
    if len(devices) >= num_processes:
        return list(devices[:num_processes])
    index = [process * len(devices) // num_processes for process in range(num_processes)]
    return [devices[i].share(index.count(i)) for i in index]


def _check_length(workload: Workload, max_model_len: int) -> None:
    if workload.total_tokens > max_model_len:
        raise ConfigError(
            f"plan.prompt_tokens: {workload.prompt_tokens} and plan.output_tokens="
            f"{workload.output_tokens} are more than the {max_model_len} tokens of a sequence "
            "(model.context_length, or what the checkpoint can do)"
        )


def _check_kv(workload: Workload, num_kv_tokens: int) -> None:
    if num_kv_tokens < workload.total_tokens:
        raise CapacityError(
            f"the KV cache holds {num_kv_tokens:,} tokens, and one request of plan.prompt_tokens + "
            f"plan.output_tokens has {workload.total_tokens:,}; raise cache.memory_gib or free "
            "memory"
        )


def _num_kv_tokens(layout: Layout, stage: int, num_layers: int) -> int:
    """What the stage itself will say that fits."""
    settings = layout.settings
    if any(device.spec.memory_bytes is not None for device in layout.devices_of(stage)):
        return layout.num_kv_tokens(stage, num_layers)
    given = settings.kv_memory_bytes
    num_blocks = capacity.num_cpu_blocks(
        layout.block_bytes(num_layers),
        memory_gib=None if given is None else given / _GIB,
        num_stages=layout.num_stages * len(layout.devices),
        most_blocks=settings.max_sequences * -(-settings.max_model_len // settings.block_size),
    )
    return num_blocks * settings.block_size
