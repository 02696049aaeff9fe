"""What a result of ``job=bench`` says about where and how it was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ember_pp import __version__
from ember_pp import config as configuration
from ember_pp.config import Config
from ember_pp.devices import cpu_name

_ROOT = Path(__file__).resolve().parent.parent.parent
_CARD_FIELDS = (
    "name",
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)


def conditions(versions: Mapping[str, Any]) -> dict[str, Any]:
    """Time, command, commit, versions and processor. ``versions``: of what this process does not
    load."""
    commit, is_dirty = _checkout()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "commit": commit,
        "is_dirty": is_dirty,
        "versions": {
            "ember_pp": __version__,
            **versions,
            "cuda_core": _version("cuda-core"),
            "transformers": _version("transformers"),
        },
        "system": platform.platform(),
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }


def cards(uuids: Sequence[str]) -> list[dict[str, str]]:
    """What ``nvidia-smi`` says of these GPUs now; nothing where it is not there."""
    if not uuids:
        return []
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(_CARD_FIELDS)}",
        "--format=csv,noheader",
        "-i",
        ",".join(uuids),
    ]
    output = _output_of(command)
    return [
        dict(zip(_CARD_FIELDS, map(str.strip, line.split(",")), strict=False))
        for line in output.splitlines()
    ]


def changed_settings(config: Config) -> dict[str, Any]:
    """Dotted keys that are not at their defaults, but for the architecture of a preset."""
    given = configuration.to_plain(config)
    defaults = configuration.to_plain(configuration.Config(job=type(config.job)()))
    changed: dict[str, Any] = {}
    for group, value in given.items():
        if not isinstance(value, dict):
            changed |= {group: value} if value != defaults[group] else {}
            continue
        for name, setting in value.items():
            if setting != defaults[group][name] and (group, name) != ("model", "architecture"):
                changed[f"{group}.{name}"] = setting
    return changed


def _checkout() -> tuple[str | None, bool | None]:
    """Commit, and whether files differ from it; None where this is no checkout of its own."""
    if _git("rev-parse", "--show-toplevel") != str(_ROOT):
        return None, None
    return _git("rev-parse", "HEAD"), bool(_git("status", "--porcelain", "-uno"))


def _git(*arguments: str) -> str:
    return _output_of(["git", "-C", str(_ROOT), *arguments]).strip()


def _output_of(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
