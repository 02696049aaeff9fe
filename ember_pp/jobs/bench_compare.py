"""The peer that ``job.compare`` names, on the same device, in the same run, in a child process."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.config import BenchJob, Config
from ember_pp.coordinator.preparation import Preparation
from ember_pp.errors import ConfigError
from ember_pp.jobs import bench_report
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
    result: Mapping[str, Any],
) -> dict[str, Any] | None:
    """What the peer takes beside what we took; None where nothing is compared.

    Its model runs whole on the device of the first stage.
    """
    if job.compare == "none":
        return None
    measured = run_child(
        "ember_pp.stage.transformers_run",
        {
            "model_config": preparation.model_config.to_plain(),
            "folder": None if config.model.load == "random" else str(preparation.folder),
        },
        timeout_s=config.coordinator.start_timeout_s,
        what="job.compare: transformers",
    )
    return measured
