"""Checks of single settings, for ``config``: each raises ``ConfigError`` with the dotted key."""

from __future__ import annotations

from typing import Any

from ember_pp.errors import ConfigError


def at_least(key: str, value: int | None, low: int) -> None:
    """Refuse a number below ``low``; None passes."""
    if value is not None and value < low:
        raise ConfigError(f"{key}: expected at least {low}, got {value}")


def check_devices(devices: Any, num_stages: int, num_replicas: int) -> None:
    """Refuse what ``pipeline.devices`` cannot be."""
    key = "pipeline.devices"
    if isinstance(devices, str):
        if devices not in ("auto", "cpu") and not is_device(devices):
            raise ConfigError(
                f"{key}: expected auto, cpu, cuda:N or a list of these, got {devices!r}"
            )
        return
    if not isinstance(devices, list | tuple):
        raise ConfigError(f"{key}: expected auto, cpu, cuda:N or a list of these, got {devices!r}")
    if len(devices) != num_stages * num_replicas:
        copies = f" and pipeline.replicas={num_replicas}" if num_replicas > 1 else ""
        raise ConfigError(
            f"{key}: {len(devices)} devices for pipeline.stages={num_stages}{copies}; give one "
            "per stage"
        )
    for device in devices:
        if device not in ("auto", "cpu") and not is_device(device):
            raise ConfigError(f"{key}: expected auto, cpu or cuda:N, got {device!r}")


def is_device(device: Any) -> bool:
    """Whether it is ``cuda:N``."""
    return isinstance(device, str) and device.startswith("cuda:") and device[5:].isdecimal()


def check_split(split: Any, num_stages: int) -> None:
    """Refuse what ``pipeline.split`` cannot be."""
    if split in ("auto", "equal"):
        return
    is_counts = isinstance(split, list | tuple) and all(
        isinstance(count, int)
        and not isinstance(count, bool)
        and count >= (0 if 0 < stage == len(split) - 1 else 1)
        for stage, count in enumerate(split)
    )
    if not is_counts:
        raise ConfigError(
            f"pipeline.split: expected auto, equal or a list of layer counts, got {split!r}"
        )
    if len(split) != num_stages:
        raise ConfigError(f"pipeline.split: {len(split)} counts for pipeline.stages={num_stages}")


def check_shard(shard: str) -> None:
    """Refuse what is not ``I/N``."""
    index, _, total = shard.partition("/")
    is_valid = index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)
    if not is_valid:
        raise ConfigError(f"job.shard: expected I/N with 1 <= I <= N, such as 3/16; got {shard!r}")
