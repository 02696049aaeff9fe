"""``job=check``: does this machine compute what transformers computes, and N stages what one does?

In this order: check everything that can be known; run the prompts through coordinator and stages
as configured, the plans recorded and what stages compute written for as many of them as fit the
disk; end all that. Then, each in a child process of its own, one after the other, so that neither
needs memory beside another model: the same plans on one stage, compared bit by bit; and the same
sequences with transformers, compared within tolerance. ``docs/checking.md`` has the whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from ember_pp import config as configuration
from ember_pp import partition
from ember_pp.checkpoint import read_config
from ember_pp.config import CheckJob, Config
from ember_pp.coordinator.preparation import (
    BYTES_PER_ELEMENT,
    Preparation,
    check_writable,
    choose_devices,
    prepare,
)
from ember_pp.devices import count_gpus, find_devices
from ember_pp.errors import (
    EXIT_OK,
    EXIT_TOLERANCE,
    CapacityError,
    ConfigError,
    EmberError,
    NumericalError,
)
from ember_pp.jobs.bench_conditions import changed_settings, conditions
from ember_pp.jobs.check_report import render
from ember_pp.jobs.check_verdict import judge
from ember_pp.jobs.check_workload import make_prompts
from ember_pp.jobs.child import run_child
from ember_pp.jobs.session import open_client
from ember_pp.jobs.telling import report, say
from ember_pp.stage.recorded import RecordedPlan, from_wanted

_MOST_TOGETHER = 256
"""Requests that shall decode together: as many as steps are captured for."""
_SHARE_OF_FREE_DISK = 0.8
_LAST_PLANS_S = 120.0
_GIB = 1024**3


class CheckClient(Protocol):
    """What a check needs of ``ember_pp.client.Client``."""

    @property
    def submit(self) -> Callable[..., Any]:
        """Sends a request."""

    def status(self) -> Mapping[str, Any]:
        """State of the coordinator."""


Connect = Callable[[Config], contextlib.AbstractContextManager[CheckClient]]


def run(config: Config, *, connect: Connect = open_client) -> int:
    """Run the check that ``config.job`` describes; the exit code.

    Raises:
        ConfigError: a setting is wrong, or the result could not be written.
        CapacityError: what is to be compared with does not fit.
        EmberError: the model cannot run.
    """
    job = config.job
    assert isinstance(job, CheckJob)
    config = _as_checked(config, job)
    preparation = _prepare(config, job)
    prompts = make_prompts(config, job, preparation)
    with _temporary_folder() as folder:
        result = _check(config, job, preparation, prompts, folder, connect)
    result["faults"] = judge(result)
    say("")
    report(render(result), result, job.output)
    return EXIT_TOLERANCE if result["faults"] else EXIT_OK


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder that goes, with its gigabytes, on SIGTERM as well."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with tempfile.TemporaryDirectory(prefix="ember-pp-check-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------
# before anything runs


def _as_checked(config: Config, job: CheckJob) -> Config:
    """As configured, but that as many requests decode together as there may be, and that a stage
    which dies is not replaced: plans begin anew then, and what ran before is no record of them."""
    together = max(config.scheduler.max_sequences, min(job.requests, _MOST_TOGETHER))
    scheduler = dataclasses.replace(config.scheduler, max_sequences=together)
    supervisor = dataclasses.replace(config.supervisor, max_restarts=0)
    return dataclasses.replace(config, scheduler=scheduler, supervisor=supervisor)


def _prepare(config: Config, job: CheckJob) -> Preparation:
    if config.coordinator.address is not None:
        raise ConfigError(
            "coordinator.address: job=check starts a coordinator of its own; leave this out"
        )
    if config.debug.tap is not None or config.debug.record is not None:
        raise ConfigError("debug: job=check taps and records by itself; leave these out")
    if config.pipeline.replicas > 1:
        raise ConfigError("pipeline.replicas: job=check looks at one replica; leave this out")
    if job.output not in (None, "-"):
        check_writable("job.output", Path(str(job.output)))
    if job.against != "one_stage" and importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "job.against: transformers is not installed; pip install 'ember-pp[compare]', or "
            "leave it out with job.against=one_stage"
        )
    if job.device is not None:
        choose_devices(job.device, 1, count_gpus())
    preparation = prepare(config)
    if job.against != "transformers":
        _check_one_stage(config, preparation)
    return preparation


def _check_one_stage(config: Config, preparation: Preparation) -> None:
    devices = find_devices(preparation.devices)
    names = list(dict.fromkeys(device.name for device in devices))
    if len(names) > 1:
        raise ConfigError(
            f"job.against: stages on {' and '.join(names)} round differently, so one stage "
            "cannot give the same bits; use pipeline.devices of a kind, or job.against=transformers"
        )
    cfg = preparation.model_config
    weight_bytes = partition.stage_weight_bytes(
        cfg,
        (0, cfg.num_layers),
        is_first=True,
        is_last=True,
        bytes_per_element=BYTES_PER_ELEMENT[config.model.dtype],
    )
    memory_bytes = find_devices(preparation.devices[:1])[0].memory_bytes
    if memory_bytes is not None and weight_bytes >= memory_bytes:
        raise CapacityError(
            f"job.against: one stage with all {cfg.num_layers} layers needs "
            f"{weight_bytes / _GIB:.1f} GiB for its weights, {preparation.devices[0]} has "
            f"{memory_bytes / _GIB:.1f}; job.against=transformers leaves that comparison out"
        )


# --------------------------------------------------------------------------------------
# running


def _check(
    config: Config,
    job: CheckJob,
    preparation: Preparation,
    prompts: list[list[int]],
    folder: Path,
    connect: Connect,
) -> dict[str, Any]:
    tap_every = _choose_tap_every(config, job, preparation, prompts, folder)
    started_s = time.monotonic()
    recorded = _record(config, job, prompts, folder, tap_every, connect)
    seconds = {"pipeline": time.monotonic() - started_s}
    wanted = _wanted(config, preparation, prompts, recorded["answers"], folder)
    plans = from_wanted(wanted)
    result: dict[str, Any] = {
        "check": "model",
        "model": {
            "path": config.model.path,
            "dtype": config.model.dtype,
            "load": config.model.load,
            "is_tied": preparation.model_config.tie_word_embeddings,
        },
        "devices": preparation.devices,
        "edges": recorded["edges"],
        "workload": _describe_workload(job, plans, prompts),
        "plans": {
            "plans": len(plans),
            "tapped": sum(plan.execute.tap is not None for plan in plans),
            "tap_every": tap_every,
            "most_rows": max(len(set(plan.requests)) for plan in plans),
        },
        "failed_requests": recorded["failed"],
        "one_stage": None,
        "transformers": None,
        "seconds": seconds,
        "settings": changed_settings(config),
    }
    versions = {}
    if job.against != "transformers":
        say("running the same plans on one stage ...")
        started_s = time.monotonic()
        result["one_stage"] = _run_one_stage(config, preparation, wanted)
        seconds["one_stage"] = time.monotonic() - started_s
        versions = result["one_stage"]["versions"]
    if job.against != "one_stage":
        say("running transformers ...")
        started_s = time.monotonic()
        result["transformers"] = _run_transformers(config, job, preparation, wanted)
        seconds["transformers"] = time.monotonic() - started_s
        versions = result["transformers"]["versions"]
    result["conditions"] = conditions(versions)
    return result


def _choose_tap_every(
    config: Config,
    job: CheckJob,
    preparation: Preparation,
    prompts: list[list[int]],
    folder: Path,
) -> int:
    """So that what is written fits, graphs run as well, and every micro-batch has its turn."""
    if job.tap_every is not None:
        return job.tap_every
    cfg, num_stages = preparation.model_config, len(preparation.devices)
    num_tokens = sum(len(prompt) + job.output_tokens - 1 for prompt in prompts)
    row_bytes = cfg.hidden_size * BYTES_PER_ELEMENT[config.model.dtype]
    num_bytes = num_tokens * row_bytes * (cfg.num_layers + num_stages - 1)
    num_bytes += len(prompts) * job.output_tokens * cfg.vocab_size * 4  # logits, in fp32
    room_bytes = min(job.disk_gib * _GIB, shutil.disk_usage(folder).free * _SHARE_OF_FREE_DISK)
    every = max(1, math.ceil(num_bytes / max(1, room_bytes)))
    if config.cuda_graphs and any(device != "cpu" for device in preparation.devices):
        every = max(2, every)  # a tapped plan is no graph
    while math.gcd(every, preparation.num_microbatches) > 1:
        every += 1
    return every


def _record(
    config: Config,
    job: CheckJob,
    prompts: list[list[int]],
    folder: Path,
    tap_every: int,
    connect: Connect,
) -> dict[str, Any]:
    """Answers to all prompts from the pipeline as configured; the plans go to ``folder``."""
    debug = configuration.DebugSettings(
        tap=str(folder / "taps"), tap_every=tap_every, record=str(folder / "plans")
    )
    answers: list[list[int]] = []
    failed = []
    with connect(dataclasses.replace(config, debug=debug)) as client:
        say("loading ...")
        while (status := client.status())["phase"] != "ready":
            time.sleep(0.1)
        say(f"running {len(prompts):,} requests ...")
        requests = [
            client.submit(token_ids=prompt, sampling=_sampling(job, index), stream=True)
            for index, prompt in enumerate(prompts)
        ]
        for index, request in enumerate(requests):
            answers.append([])
            try:
                for delta in request:
                    answers[index] += delta.token_ids
            except NumericalError as error:
                failed.append({"request": index, "error": str(error)})
        _wait_for_stages(client)
    return {"answers": answers, "failed": failed, "edges": dict(status.get("edges", {}))}


def _wait_for_stages(client: CheckClient) -> None:
    """The answers are here; a stage may still be writing, and be at plans that nobody needs."""
    deadline_s = time.monotonic() + _LAST_PLANS_S
    while time.monotonic() < deadline_s:
        status = client.status()
        if all(stage.get("plan") == status["num_plans"] - 1 for stage in status["stages"]):
            return
        time.sleep(0.1)
    raise EmberError(f"stages did not finish their last plans within {_LAST_PLANS_S:.0f} s")


def _sampling(job: CheckJob, index: int) -> dict[str, Any]:
    """Greedy, whatever the checkpoint's defaults; the seed names the request in the record."""
    return {
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": job.output_tokens,
        "ignore_eos": True,
        "seed": index,
    }


def _describe_workload(
    job: CheckJob, plans: list[RecordedPlan], prompts: list[list[int]]
) -> dict[str, Any]:
    computed = sum(
        position < len(prompts[request])
        for plan in plans
        for request, position in zip(plan.requests, plan.positions, strict=True)
    )
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    return {
        "requests": len(prompts),
        "prompt_tokens": prompt_tokens,
        "output_tokens": job.output_tokens,
        "chunked_prompts": len({r for plan in plans for r in plan.unfinished}),
        "cached_tokens": max(0, prompt_tokens - computed),
    }


# --------------------------------------------------------------------------------------
# what it is compared with


def _wanted(
    config: Config,
    preparation: Preparation,
    prompts: list[list[int]],
    answers: list[list[int]],
    folder: Path,
) -> dict[str, Any]:
    """What both children need."""
    block_size = config.cache.block_size
    return {
        "record": str(folder / "plans"),
        "taps": str(folder / "taps"),
        "sizes": {
            "max_slots": config.scheduler.max_sequences,
            "max_blocks_per_sequence": -(-preparation.max_model_len // block_size),
            "block_size": block_size,
        },
        "layer_ranges": [list(layers) for layers in preparation.layer_ranges],
        "model_config": preparation.model_config.to_plain(),
        "prompts": prompts,
        "answers": answers,
    }


def _run_one_stage(
    config: Config, preparation: Preparation, wanted: dict[str, Any]
) -> dict[str, Any]:
    device = preparation.devices[0]
    pipeline = dataclasses.replace(config.pipeline, stages=1, devices=[device], split="auto")
    single = dataclasses.replace(
        config, pipeline=pipeline, trace=configuration.TraceSettings(), job=configuration.ServeJob()
    )
    try:
        return run_child(
            "ember_pp.stage.check_one_stage",
            wanted
            | {
                "config": configuration.to_plain(single),
                "device": device,
                "num_threads": preparation.cpu_threads,
                "eos_token_ids": list(preparation.eos_token_ids),
                "max_model_len": preparation.max_model_len,
                "max_in_flight": preparation.max_in_flight,
            },
            timeout_s=config.coordinator.start_timeout_s,
            what="job.against: one stage",
        )
    except CapacityError as error:
        raise CapacityError(
            f"job.against: all layers as one stage do not fit {device}; job.against=transformers "
            f"leaves that comparison out ({error})"
        ) from None


def _run_transformers(
    config: Config, job: CheckJob, preparation: Preparation, wanted: dict[str, Any]
) -> dict[str, Any]:
    device = job.device or preparation.devices[0]
    folder = None if config.model.load == "random" else preparation.folder
    architecture = dict(config.model.architecture or {})
    if preparation.folder is not None:
        architecture = read_config(preparation.folder)
    found = run_child(
        "ember_pp.stage.check_transformers",
        wanted
        | {
            "architecture": architecture,
            "folder": None if folder is None else str(folder),
            "dtype": config.model.dtype,
            "device": device,
            "draw_device": preparation.devices[0],
            "num_threads": preparation.cpu_threads * len(preparation.devices),
        },
        timeout_s=config.coordinator.start_timeout_s,
        what="job.against: transformers",
    )
    if not found["tensors"]:
        raise EmberError("job.against: no row was written that transformers could be asked for")
    return found | {"device": device}
