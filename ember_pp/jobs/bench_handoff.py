"""``job=bench job.workload=handoff``: time of a hop between stages, by size of message and path.

No model runs: between every two devices that hand on to each other, two processes send messages
back and forth by the hand-off that stages use (``ember_pp/stage/handoff_rates.py``). Each path is
tried in a pair of processes of its own; one that cannot be had, or does not end, says why.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.config import BenchJob, Config
from ember_pp.coordinator.preparation import choose_devices
from ember_pp.devices import count_gpus
from ember_pp.errors import ConfigError, EmberError
from ember_pp.jobs.bench_conditions import cards, changed_settings, conditions
from ember_pp.jobs.child import run_child

SIZES = tuple(2**power for power in (11, 13, 14, 16, 18, 20, 22, 24, 26))
"""Bytes: 2 KiB, a token of the smallest model, to 64 MiB, a prompt of thousands."""
HOPS = 200
"""Of one lap and size, up to 1 MiB; fewer above."""
WHAT = (
    "half a round trip between two processes, from the end of the sender's last kernel to the "
    "start of the receiver's first; on a CPU by the host's clock"
)


def measure(config: Config, job: BenchJob) -> dict[str, Any]:
    """The result of the workload, with all conditions.

    Raises:
        ConfigError: there is no hop, or a device is not there.
        EmberError: no path could be timed between two devices.
    """
    measured: list[dict[str, Any]] = [
        {
            "devices": list(pair),
            "paths": [_measure_path(config, job, pair, path) for path in find_paths(config)],
        }
        for pair in find_pairs(config)
    ]
    for one in measured:
        if all("reason" in path for path in one["paths"]):
            reasons = "; ".join(f"{path['path']}: {path['reason']}" for path in one["paths"])
            raise EmberError(f"no hand-off between {' and '.join(one['devices'])}: {reasons}")
    timed = [path for one in measured for path in one["paths"] if "reason" not in path]
    uuids = dict.fromkeys(uuid for path in timed for uuid in path["uuids"] if uuid)
    return {
        "benchmark": "bench",
        "workload": {"name": "handoff", "what": WHAT, "sizes": list(SIZES), "hops": HOPS},
        "num_warmup": job.warmup,
        "num_laps": job.repeats,
        "handoff": measured,
        "conditions": conditions(timed[0]["versions"]) | {"cards": cards(list(uuids))},
        "settings": changed_settings(config),
    }


def find_pairs(config: Config) -> list[tuple[str, str]]:
    """Devices that hand on to each other, each pair once: the way there and back is one.

    Raises:
        ConfigError: there is one stage, or a device is not there.
    """
    num_stages = config.pipeline.stages
    if num_stages < 2:
        raise ConfigError(
            "pipeline.stages: job.workload=handoff times the hop from a stage to the next; give "
            "at least 2"
        )
    num_processes = num_stages * config.pipeline.replicas
    devices = choose_devices(config.pipeline.devices, num_processes, count_gpus())
    pairs: dict[frozenset[str], tuple[str, str]] = {}
    for index in range(num_processes):
        stage = index % num_stages
        pair = devices[index], devices[index - stage + (stage + 1) % num_stages]
        pairs.setdefault(frozenset(pair), pair)
    return list(pairs.values())


def find_paths(config: Config) -> list[str]:
    """The path that ``handoff`` forces; without one, all that there are."""
    if config.handoff != "auto":
        return [config.handoff]
    known = typing.get_args(typing.get_type_hints(Config)["handoff"])
    return [path for path in known if path != "auto"]


def _measure_path(
    config: Config, job: BenchJob, devices: Sequence[str], path: str
) -> dict[str, Any]:
    """``sizes`` and how they were measured, or ``reason``."""
    wanted = {
        "path": path,
        "devices": list(devices),
        "sizes": list(SIZES),
        "hops": HOPS,
        "laps": job.repeats,
        "warmup": job.warmup,
        "num_threads": 1,
    }
    try:
        return run_child(
            "ember_pp.stage.handoff_rates",
            wanted,
            timeout_s=config.coordinator.start_timeout_s,
            what=f"the hand-off {path} from {devices[0]} to {devices[1]}",
        )
    except EmberError as error:
        return {"path": path, "devices": list(devices), "reason": str(error)}


# --------------------------------------------------------------------------------------
# table


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    blocks = [
        f"workload  handoff: {result['num_laps']} laps over all sizes after "
        f"{result['num_warmup']} to warm up; a hop is {WHAT}"
    ]
    blocks += ["\n".join(_render_pair(pair)) for pair in result["handoff"]]
    return "\n\n".join(blocks)


def _render_pair(pair: Mapping[str, Any]) -> list[str]:
    timed = [path for path in pair["paths"] if "reason" not in path]
    columns = [
        title
        for path in timed
        for title in (f"{path['path']} p50, us", "p99, us", "lowest, us", "GB/s")
    ]
    rows: list[list[str]] = [["size", *columns]]
    for sizes in zip(*(path["sizes"] for path in timed), strict=True):
        cells = [
            f"{size[key]:,.1f}" if key != "gb_per_s" else f"{size[key]:,.3g}"
            for size in sizes
            for key in ("p50_us", "p99_us", "min_us", "gb_per_s")
        ]
        rows.append([_in_words(sizes[0]["num_bytes"]), *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [f"{' - '.join(pair['devices'])}"]
    lines += ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    for path in pair["paths"]:
        lines += [f"  {path['path']}: {note}" for note in _notes(path)]
    return lines


def _notes(path: Mapping[str, Any]) -> list[str]:
    if "reason" in path:
        return [f"not possible: {path['reason']}"]
    late = [size["num_bytes"] for size in path["sizes"] if size["is_host_bound"]]
    if late:
        return [f"bound by the hosts for {', '.join(map(_in_words, late))}"]
    return []


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes >= 2**20 else f"{num_bytes // 2**10} KiB"
