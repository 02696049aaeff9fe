"""Memory of the machine a stage runs on: how many KV blocks fit into it, and what to lower where
something does not. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ember_pp.config import Config
from ember_pp.devices import cpu_name
from ember_pp.layout import gib
from ember_pp.memory_model import kv_budget_bytes

_GIB = 1024**3
_CPU_SHARE = 0.25
_ANY_NUMBER = 2**31 - 1


def host_facts() -> dict[str, Any]:
    """``device`` of ``StageHello`` for the machine: ``name kind total_bytes free_bytes``."""
    memory = _meminfo()
    limits = [limit for limit, _ in _cgroup_memory()]
    return {
        "name": cpu_name(),
        "kind": "cpu",
        "total_bytes": min([memory["MemTotal"], *limits]),
        "free_bytes": available_bytes(),
    }


def available_bytes() -> int:
    """Memory that this process can still get without swapping, within its cgroup's limit."""
    left_by_cgroups = [max(0, limit - used) for limit, used in _cgroup_memory()]
    return min([_meminfo()["MemAvailable"], *left_by_cgroups])


def num_cpu_blocks(
    block_bytes: int, *, memory_gib: float | None, num_stages: int, most_blocks: int
) -> int:
    """KV blocks of a CPU stage: what the setting says, else a share of the free memory.

    Args:
        block_bytes: bytes of one block on this stage; 0 on one that has no layers, which takes
            any number.
        memory_gib: ``cache.memory_gib``; None takes a quarter of what is available, divided
            by the stages, since all of them are likely to share the machine.
        num_stages: stages of all replicas.
        most_blocks: what all sequences at full length need; more is not taken unasked.
    """
    if block_bytes == 0:
        return most_blocks
    if memory_gib is not None:
        return int(memory_gib * _GIB) // block_bytes
    share = int(available_bytes() * _CPU_SHARE) // num_stages
    return min(share // block_bytes, most_blocks)


def num_cuda_blocks(
    block_bytes: int,
    *,
    memory_gib: float | None,
    memory_share: float,
    free_bytes: int,
    total_bytes: int,
    weight_bytes: int,
    reserved_bytes: int,
    num_stages_on_device: int,
) -> int:
    """KV blocks of a CUDA stage: what the setting says, else a share of what is free.

    ``free_bytes`` is measured with this stage's weights loaded. Stages that share a device may
    not have loaded theirs yet, so each takes no more than its part of the whole card.

    Args:
        block_bytes: bytes of one block on this stage; 0: any number.
        memory_gib: ``cache.memory_gib``; None: by ``memory_share``.
        memory_share: ``cache.memory_share``.
        free_bytes: of the device, now.
        total_bytes: of the device.
        weight_bytes: of this stage.
        reserved_bytes: for activations and graphs, out of the share.
        num_stages_on_device: this one among them.
    """
    if block_bytes == 0:
        return _ANY_NUMBER
    if memory_gib is not None:
        return int(memory_gib * _GIB) // block_bytes
    part = total_bytes // num_stages_on_device - weight_bytes
    budget = kv_budget_bytes(min(free_bytes, part), reserved_bytes, memory_share)
    return max(0, budget) // block_bytes


def loading_advice(num_layers: int, weight_bytes: int, device: str) -> str:
    """What to do where the weights of a stage do not fit; the end of a sentence."""
    return (
        f" while loading: {num_layers} layers and what belongs to them are {gib(weight_bytes)} of "
        f"weights on {device}; raise pipeline.stages, or use other devices (pipeline.devices)"
    )


def step_advice(
    config: Config, plan: int, weight_bytes: int, kv_bytes: int, activation_bytes: int
) -> str:
    """What to lower where a plan does not fit beside what is there; the end of a sentence."""
    cache = config.cache
    share = f"cache.memory_share={cache.memory_share:g}, or set cache.memory_gib"
    kv = share if cache.memory_gib is None else f"cache.memory_gib={cache.memory_gib:g}"
    return (
        f" in plan {plan}: beside {gib(weight_bytes)} of weights and {gib(kv_bytes)} of KV cache, "
        f"{gib(activation_bytes)} were set aside for activations; lower "
        f"scheduler.max_tokens_per_plan={config.scheduler.max_tokens_per_plan} or {kv}"
    )


def _meminfo() -> dict[str, int]:
    """``/proc/meminfo`` in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = (line.split(":", 1) for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, value in fields if value.split()[1:]}


def _cgroup_memory() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each cgroup (version 2) that this process is in.

    A batch system such as Slurm limits a job this way; ``/proc/meminfo`` shows the whole machine.
    """
    root = Path("/sys/fs/cgroup")
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
    except OSError:
        return
    group = root / own.strip("/")
    while group.is_relative_to(root):
        try:
            limit = (group / "memory.max").read_text().strip()
            if limit != "max":
                yield int(limit), int((group / "memory.current").read_text())
        except OSError:
            pass  # the root has no limit; a namespace may hide the path
        group = group.parent
