"""Layers over stages over devices: the split that is best for a workload, and whether it fits.

The costs that ``partition.best_counts`` weighs up come from here: the time of the average plan of
a workload on each stage's device, for every number of layers, where memory allows it. Pure
arithmetic, no torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from ember_pp import memory_model, partition
from ember_pp.cost_model import PlanCost, PlanSize, Profile, stage_cost
from ember_pp.devices import DeviceSpec
from ember_pp.errors import CapacityError
from ember_pp.memory_model import StageBytes, StageSettings
from ember_pp.model_config import ModelConfig
from ember_pp.partition import LayerRange

_GIB = 1024**3
_PICOSECONDS = 1e12
_MOST_TOKENS = 2**50  # more than any device holds, and more bytes than any has

_Entry = Callable[[int, int], int]
"""Of a table: from a stage and its number of layers."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageDevice:
    """Where a stage runs, and what was measured there, if anything was."""

    spec: DeviceSpec
    profile: Profile | None = None

    @property
    def context_bytes(self) -> int:
        """Memory that a process takes of a GPU before it allocates anything."""
        if self.profile is not None and self.profile.context_bytes:
            return self.profile.context_bytes
        return memory_model.CUDA_CONTEXT_BYTES


@dataclasses.dataclass(frozen=True, slots=True)
class Pipelines:
    """A model on the devices of one pipeline, or of equal replicas of it.

    Methods are given a stage and a number of layers, and answer for the worst replica.
    """

    cfg: ModelConfig
    settings: StageSettings
    devices: Sequence[Sequence[StageDevice]]
    """``devices[replica][stage]``."""

    @property
    def num_stages(self) -> int:
        """Of each replica."""
        return len(self.devices[0])

    def at(self, stage: int) -> list[StageDevice]:
        """The devices of one stage, over the replicas, each kind once."""
        return list(dict.fromkeys(replica[stage] for replica in self.devices))

    def cost(self, stage: int, num_layers: int, device: StageDevice) -> PlanCost:
        """What plans cost on this stage."""
        return stage_cost(
            self.cfg,
            num_layers,
            is_first=stage == 0,
            is_last=stage == self.num_stages - 1,
            bytes_per_element=self.settings.bytes_per_element,
            device=device.spec,
            profile=device.profile,
        )

    def held(self, stage: int, num_layers: int, device: StageDevice) -> StageBytes:
        """What the stage holds beside its KV cache."""
        return memory_model.stage_bytes(
            self.cfg,
            num_layers,
            self.settings,
            is_first=stage == 0,
            is_last=stage == self.num_stages - 1,
            kind=device.spec.kind,
            context_bytes=device.context_bytes,
        )

    def lacking_bytes(self, stage: int, num_layers: int, num_kv_tokens: int) -> int:
        """Memory that is missing for a KV cache of ``num_kv_tokens``; negative: what is left."""
        return max(
            self._needed_bytes(stage, num_layers, num_kv_tokens, device)
            - (device.spec.memory_bytes or _MOST_TOKENS)
            for device in self.at(stage)
        )

    def num_kv_tokens(self, stage: int, num_layers: int) -> int:
        """Tokens that the stage's KV cache holds; a large number where memory is no limit."""
        num_bytes = memory_model.block_bytes(self.cfg, num_layers, self.settings)
        limited = [device for device in self.at(stage) if device.spec.memory_bytes is not None]
        if not num_bytes or not limited:
            return _MOST_TOKENS
        blocks = min(
            memory_model.num_kv_blocks(
                device.spec.memory_bytes or 0,
                self.held(stage, num_layers, device),
                num_bytes,
                self.settings.kv_memory_bytes,
            )
            for device in limited
        )
        return max(0, blocks) * self.settings.block_size

    def _needed_bytes(
        self, stage: int, num_layers: int, num_kv_tokens: int, device: StageDevice
    ) -> int:
        held = self.held(stage, num_layers, device)
        num_bytes = memory_model.block_bytes(self.cfg, num_layers, self.settings)
        kv_bytes = -(-num_kv_tokens // self.settings.block_size) * num_bytes
        if self.settings.kv_memory_bytes is not None and num_layers:
            return held.total + max(self.settings.kv_memory_bytes, kv_bytes)
        # The inverse of ``num_kv_blocks``: a stage leaves a share of what is free unused.
        share = memory_model.KV_SHARE_OF_FREE
        return held.context + held.weights + math.ceil((held.activations + kv_bytes) / share)


def choose_split(
    pipelines: Pipelines,
    split: str | Sequence[int],
    *,
    size: PlanSize,
    num_kv_tokens: int,
) -> list[LayerRange]:
    """Layer ranges of the stages, as ``partition.split_layers``; ``auto`` is best for ``size``.

    Args:
        pipelines: model, settings and devices.
        split: ``auto``, ``equal``, or the number of layers of each stage.
        size: the average plan, whose time at the slowest stage is made least. Of equally fast
            splits, the one whose KV cache is largest, then the most even one.
        num_kv_tokens: what the KV cache must hold at least.

    Raises:
        ConfigError: more stages than layers, or counts that do not add up.
        CapacityError: it does not fit; says which stage lacks how much.
    """
    cfg, num_stages = pipelines.cfg, pipelines.num_stages
    partition.check_num_stages(cfg, num_stages)
    if split != "auto":
        ranges = partition.split_layers(cfg, num_stages, split)
        _check_fits(pipelines, ranges, num_kv_tokens)
        return ranges
    lacking = _table(
        pipelines, lambda stage, count: pipelines.lacking_bytes(stage, count, num_kv_tokens)
    )
    costs = [
        [
            _slowest(pipelines, stage, count, size) if lack is not None and lack <= 0 else None
            for count, lack in enumerate(row)
        ]
        for stage, row in enumerate(lacking)
    ]
    counts = partition.best_counts(costs, _table(pipelines, _pressure_of(pipelines)))
    if counts is None:
        least = partition.best_counts([[_positive(lack) for lack in row] for row in lacking])
        assert least is not None, "without a limit every split is possible"
        _check_fits(pipelines, partition.layer_ranges(least), num_kv_tokens)
        raise AssertionError("what fits was not found")
    return partition.layer_ranges(counts)


def _positive(lack: int | None) -> int | None:
    return None if lack is None else max(0, lack)


def _table(pipelines: Pipelines, entry: _Entry) -> list[list[int | None]]:
    num_stages, num_layers = pipelines.num_stages, pipelines.cfg.num_layers
    return [
        [
            entry(stage, count) if count >= partition.least_count(stage, num_stages) else None
            for count in range(num_layers + 1)
        ]
        for stage in range(num_stages)
    ]


def _slowest(pipelines: Pipelines, stage: int, count: int, size: PlanSize) -> int:
    """Picoseconds of a plan on the slowest replica."""
    times_s = [size.time_s(pipelines.cost(stage, count, device)) for device in pipelines.at(stage)]
    return round(max(times_s) * _PICOSECONDS)


def _pressure_of(pipelines: Pipelines) -> _Entry:
    def pressure(stage: int, count: int) -> int:
        return _MOST_TOKENS // (1 + pipelines.num_kv_tokens(stage, count))

    return pressure


def _check_fits(pipelines: Pipelines, ranges: Sequence[LayerRange], num_kv_tokens: int) -> None:
    lacking = [
        pipelines.lacking_bytes(stage, end - start, num_kv_tokens)
        for stage, (start, end) in enumerate(ranges)
    ]
    worst = max(range(len(ranges)), key=lambda stage: lacking[stage])
    if lacking[worst] <= 0:
        return
    start, end = ranges[worst]
    device = min(pipelines.at(worst), key=lambda device: device.spec.memory_bytes or _MOST_TOKENS)
    held, memory_bytes = pipelines.held(worst, end - start, device), device.spec.memory_bytes or 0
    block_bytes = memory_model.block_bytes(pipelines.cfg, end - start, pipelines.settings)
    kv_bytes = block_bytes * num_kv_tokens // pipelines.settings.block_size
    raise CapacityError(
        f"pipeline.stages={len(ranges)}: stage {worst} of {len(ranges)} lacks "
        f"{gib(lacking[worst])} on {device.spec.name}, which has {gib(memory_bytes)}: "
        f"{end - start} layers and what belongs to them are {gib(held.weights)} of weights, the "
        f"CUDA context takes {gib(held.context)}, activations {gib(held.activations)}, and a KV "
        f"cache of {num_kv_tokens} tokens {gib(kv_bytes)}"
    )


def gib(num_bytes: float) -> str:
    """As people read it."""
    return f"{num_bytes / _GIB:.2f} GiB"
