"""The peer that ``job.compare`` names: same device, same run, in a child process of its own."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.checkpoint import read_config
from ember_pp.config import BenchJob, Config
from ember_pp.coordinator.preparation import Preparation
from ember_pp.errors import ConfigError
from ember_pp.jobs.bench_workload import BenchWorkload
from ember_pp.jobs.child import run_child


def check_installed(job: BenchJob) -> None:
    """
    Raises:
        ConfigError: what is to be compared with is not there; says what to install.
    """
    if job.compare == "transformers" and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "job.compare: transformers is not installed; pip install 'ember-pp[compare]'"
        )


def compare(
    config: Config,
    job: BenchJob,
    workload: BenchWorkload,
    preparation: Preparation,
    *,
    ours: Mapping[str, Any],
    first_tokens: Sequence[int],
) -> dict[str, Any]:
    """What transformers takes for ``workload`` beside what we took.

    Its model runs whole on the device of the first stage, once nothing else is there.

    Args:
        workload: as it ran in the first of our runs that count.
        ours: the summary of our runs.
        first_tokens: of our answers in that run.
    """
    folder = None if config.model.load == "random" else preparation.folder
    measured = run_child(
        "ember_pp.stage.transformers_run",
        {
            "model_config": preparation.model_config.to_plain(),
            "architecture": _architecture(config, preparation),
            "folder": None if folder is None else str(folder),
            "dtype": config.model.dtype,
            "device": preparation.devices[0],
            "num_threads": preparation.cpu_threads,
            "token_ids": [request.token_ids for request in workload.requests],
            "output_tokens": workload.requests[0].output_tokens,
            "repeats": job.repeats,
        },
        timeout_s=config.coordinator.start_timeout_s,
        what="job.compare: transformers",
    )
    unit, our_spread = (
        ("ms for all prompts", {key: value * 1e3 for key, value in ours["elapsed_s"].items()})
        if workload.name == "prefill"
        else ("ms per token", ours.get("step_ms"))
    )
    return {
        "unit": unit,
        "device": preparation.devices[0],
        "ours": our_spread,
        "others": {
            f"transformers {attention}": _held_against(run, workload, our_spread, first_tokens)
            for attention, run in measured["runs"].items()
        },
    }


def _architecture(config: Config, preparation: Preparation) -> dict[str, Any]:
    if preparation.folder is not None:
        return read_config(preparation.folder)
    return dict(config.model.architecture or {})


def _held_against(
    run: Mapping[str, Any],
    workload: BenchWorkload,
    ours: Mapping[str, float] | None,
    first_tokens: Sequence[int],
) -> dict[str, Any]:
    if "error" in run:
        return {"error": run["error"]}
    output_tokens = workload.requests[0].output_tokens
    times_ms = [
        1e3 * repeat["elapsed_s"]
        if workload.name == "prefill"
        else 1e3 * (repeat["elapsed_s"] - repeat["first_s"]) / (output_tokens - 1)
        for repeat in run["repeats"]
    ]
    median = statistics.median(times_ms)
    pairs = zip(run["first_tokens"], first_tokens, strict=True)
    return {
        "summary": {"median": median, "min": min(times_ms), "max": max(times_ms)},
        "times_ours": None if ours is None else median / ours["median"],
        "equal_first_tokens": sum(theirs == our for theirs, our in pairs),
        "repeats": run["repeats"],
    }
