"""The best split of a model's layers over given devices.

The tables that ``partition.best_counts`` weighs up are filled here: the time of the average plan
of a workload on each stage's device, for every number of layers, where memory allows it. Pure
arithmetic, no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ember_pp import memory_model, partition
from ember_pp.cost_model import PlanCost, PlanSize, Profile, stage_cost
from ember_pp.devices import DeviceSpec
from ember_pp.errors import CapacityError
from ember_pp.memory_model import StageBytes, StageSettings
from ember_pp.model_config import ModelConfig
from ember_pp.partition import CostTable, LayerRange

_GIB = 1024**3
_PICOSECONDS = 1e12
_NO_LIMIT = 2**50
"""Tokens or bytes where memory is not limited: more than any device holds."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageDevice:
    """Where a stage runs, and what was measured there, if anything was."""

    spec: DeviceSpec
    profile: Profile | None = None

    @property
    def context_bytes(self) -> int:
        """Memory that a process takes of a GPU before it allocates anything."""
        if self.spec.kind == "cpu":
            return 0
        measured = 0 if self.profile is None else self.profile.context_bytes
        return measured or memory_model.CUDA_CONTEXT_BYTES


@dataclasses.dataclass(frozen=True)
class Layout:
    """A model over the devices of a pipeline, or of equal replicas of it; layers not yet placed.

    Methods are given a stage and a number of layers there. Where replicas have different
    devices, they answer for the worst.
    """

    cfg: ModelConfig
    settings: StageSettings
    devices: Sequence[Sequence[StageDevice]]
    """``devices[replica][stage]``."""

    @property
    def num_stages(self) -> int:
        """Of each replica."""
        return len(self.devices[0])

    def devices_of(self, stage: int) -> tuple[StageDevice, ...]:
        """The devices of one stage over all replicas, equal ones once."""
        return self._devices_by_stage[stage]

    @functools.cached_property
    def _devices_by_stage(self) -> list[tuple[StageDevice, ...]]:
        return [tuple(dict.fromkeys(column)) for column in zip(*self.devices, strict=True)]

    def cost(self, stage: int, num_layers: int, device: StageDevice) -> PlanCost:
        """What plans cost on this stage."""
        return stage_cost(
            self.cfg,
            num_layers,
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
            is_cpu=device.spec.kind == "cpu",
            context_bytes=device.context_bytes,
        )

    def block_bytes(self, num_layers: int) -> int:
        """One KV block of so many layers."""
        return memory_model.block_bytes(self.cfg, num_layers, self.settings)

    def num_kv_tokens(self, stage: int, num_layers: int) -> int:
        """Tokens that the stage's KV cache holds; a huge number where memory is not limited."""
        block_bytes = self.block_bytes(num_layers)
        limited = [device for device in self.devices_of(stage) if device.spec.memory_bytes]
        if not block_bytes or not limited:
            return _NO_LIMIT
        num_blocks = min(self._num_kv_blocks(stage, num_layers, device) for device in limited)
        return max(0, num_blocks) * self.settings.block_size

    def lacking_bytes(self, stage: int, num_layers: int, num_kv_tokens: int) -> int:
        """Memory that is missing for a KV cache of ``num_kv_tokens``; negative: what is left."""
        return max(
            self._lacking_bytes(stage, num_layers, num_kv_tokens, device)
            for device in self.devices_of(stage)
        )

    def limiting_device(self, stage: int, num_layers: int, num_kv_tokens: int) -> StageDevice:
        """That of ``lacking_bytes``: the one with the least memory to spare.

        Of several it is the slowest, then the first by name: the order of replicas decides
        nothing.
        """
        return min(
            self.devices_of(stage),
            key=lambda device: (
                -self._lacking_bytes(stage, num_layers, num_kv_tokens, device),
                device.spec.bandwidth_bytes_per_s,
                device.spec.name,
            ),
        )

    def slowest_cost(self, ranges: Sequence[LayerRange], size: PlanSize) -> PlanCost:
        """What plans cost on the stage that takes longest for one of ``size``."""
        costs = [
            self.cost(stage, end - start, device)
            for stage, (start, end) in enumerate(ranges)
            for device in self.devices_of(stage)
        ]
        return max(costs, key=size.time_s)

    def scheduler_cost(self, ranges: Sequence[LayerRange], size: PlanSize) -> PlanCost | None:
        """What a scheduler times plans by: the slowest stage.

        None with CPU stages that nobody has measured: what a plan costs there beside its tokens
        is not known, and decides how large chunks are.
        """
        is_rough = any(
            device.spec.kind == "cpu" and device.profile is None
            for stage in range(self.num_stages)
            for device in self.devices_of(stage)
        )
        return None if is_rough else self.slowest_cost(ranges, size)

    def _num_kv_blocks(self, stage: int, num_layers: int, device: StageDevice) -> int:
        held, block_bytes = self.held(stage, num_layers, device), self.block_bytes(num_layers)
        if self.settings.kv_memory_bytes is not None:
            return self.settings.kv_memory_bytes // block_bytes
        free_bytes = (device.spec.memory_bytes or _NO_LIMIT) - held.context - held.loaded
        share = self.settings.memory_share
        return memory_model.kv_budget_bytes(free_bytes, held.reserved, share) // block_bytes

    def _lacking_bytes(
        self, stage: int, num_layers: int, num_kv_tokens: int, device: StageDevice
    ) -> int:
        needed_bytes = self._needed_bytes(stage, num_layers, num_kv_tokens, device)
        return needed_bytes - (device.spec.memory_bytes or _NO_LIMIT)

    def _needed_bytes(
        self, stage: int, num_layers: int, num_kv_tokens: int, device: StageDevice
    ) -> int:
        held = self.held(stage, num_layers, device)
        num_blocks = -(-num_kv_tokens // self.settings.block_size)
        kv_bytes = num_blocks * self.block_bytes(num_layers)
        if self.settings.kv_memory_bytes is not None and num_layers:
            return held.total + max(self.settings.kv_memory_bytes, kv_bytes)
        # The inverse of ``kv_budget_bytes``: a stage leaves a share of what is free unused.
        share = self.settings.memory_share
        return held.context + held.loaded + math.ceil((held.reserved + kv_bytes) / share)


def choose_split(
    layout: Layout,
    split: str | Sequence[int],
    *,
    size: PlanSize,
    num_kv_tokens: int,
) -> list[LayerRange]:
    """Half-open layer ranges of the stages, in order.

    Args:
        layout: model, settings and devices.
        split: ``auto``, or what ``partition.split_layers`` takes.
        size: the average plan. ``auto`` makes its time at the slowest stage least; of equally
            fast splits it takes the one with the largest KV cache, then the most even one.
        num_kv_tokens: what the KV cache must hold at least.

    Raises:
        ConfigError: more stages than layers, or counts that do not add up.
        CapacityError: it does not fit; says which stage lacks how much.
    """
    cfg, num_stages = layout.cfg, layout.num_stages
    if split != "auto":
        ranges = partition.split_layers(cfg, num_stages, split)
        _check_fits(layout, ranges, num_kv_tokens)
        return ranges
    partition.check_num_stages(cfg, num_stages)
    lacking = _table(layout, lambda stage, n: layout.lacking_bytes(stage, n, num_kv_tokens))
    fits = [[lack is not None and lack <= 0 for lack in row] for row in lacking]
    costs = _table(layout, lambda stage, n: _picoseconds(layout, stage, n, size), fits)
    fullness = _table(
        layout, lambda stage, n: _NO_LIMIT // (1 + layout.num_kv_tokens(stage, n)), fits
    )
    counts = partition.best_counts(costs, fullness)
    if counts is not None:
        return partition.layer_ranges(counts)
    shortage = [[None if lack is None else max(0, lack) for lack in row] for row in lacking]
    least = partition.best_counts(shortage)
    assert least is not None, "without a limit every split is possible"
    _check_fits(layout, partition.layer_ranges(least), num_kv_tokens)
    raise AssertionError("a split that fits was not found")


def _table(
    layout: Layout,
    entry: Callable[[int, int], int],
    fits: Sequence[Sequence[bool]] | None = None,
) -> CostTable:
    """``entry(stage, num_layers)`` of all that is possible, or only of what fits."""
    num_stages, num_layers = layout.num_stages, layout.cfg.num_layers
    rows: dict[Any, list[int | None]] = {}  # stages between the ends are alike on equal devices
    table = []
    for stage in range(num_stages):
        kind = (layout.devices_of(stage), stage == 0, stage == num_stages - 1)
        if kind not in rows:
            least = partition.least_count(stage, num_stages)
            rows[kind] = [
                entry(stage, count) if count >= least and (not fits or fits[stage][count]) else None
                for count in range(num_layers + 1)
            ]
        table.append(rows[kind])
    return table


def _picoseconds(layout: Layout, stage: int, num_layers: int, size: PlanSize) -> int:
    devices = layout.devices_of(stage)
    slowest_s = max(size.time_s(layout.cost(stage, num_layers, device)) for device in devices)
    return round(slowest_s * _PICOSECONDS)


def _check_fits(layout: Layout, ranges: Sequence[LayerRange], num_kv_tokens: int) -> None:
    lacking = [
        layout.lacking_bytes(stage, end - start, num_kv_tokens)
        for stage, (start, end) in enumerate(ranges)
    ]
    worst = lacking.index(max(lacking))
    if lacking[worst] <= 0:
        return
    start, end = ranges[worst]
    device = layout.limiting_device(worst, end - start, num_kv_tokens)
    held = layout.held(worst, end - start, device)
    raise CapacityError(
        f"pipeline.stages={len(ranges)}: stage {worst} of {len(ranges)} lacks "
        f"{gib(lacking[worst])} on {device.spec.name}, which has "
        f"{gib(device.spec.memory_bytes or 0)}: {end - start} layers and what belongs to them are "
        f"{gib(held.weights)} of weights, the CUDA context takes {gib(held.context)}, activations "
        f"{gib(held.activations)}, graphs {gib(held.graphs)}, "
        f"{_describe_kv(layout, end - start, num_kv_tokens)}"
    )


def _describe_kv(layout: Layout, num_layers: int, num_kv_tokens: int) -> str:
    """What the KV cache takes, and which setting could make that less."""
    settings = layout.settings
    kv_bytes = layout.block_bytes(num_layers) * num_kv_tokens // settings.block_size
    if settings.kv_memory_bytes is not None and settings.kv_memory_bytes > kv_bytes:
        given = gib(settings.kv_memory_bytes)
        return f"and its KV cache {given}: lower cache.memory_gib, or raise pipeline.stages"
    unused = f"{1 - settings.memory_share:.0%}"
    return (
        f"and a KV cache of {num_kv_tokens:,} tokens {gib(kv_bytes)}; {unused} of what is free "
        "beside the weights stays unused (cache.memory_share)"
    )


def gib(num_bytes: float) -> str:
    """As people read it."""
    return f"{num_bytes / _GIB:.2f} GiB"
