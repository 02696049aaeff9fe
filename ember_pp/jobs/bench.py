"""``job=bench``: a stated workload through coordinator and client, beside what the devices allow.

In this order: check everything that can be known, measure the devices while no stage is on them,
start a coordinator, run the workload, end the coordinator, run the peer that it is compared with.
``docs/benchmarking.md`` says what each number means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ember_pp.config import BenchJob, Config
from ember_pp.coordinator.preparation import (
    BYTES_PER_ELEMENT,
    Preparation,
    check_writable,
    prepare,
)
from ember_pp.errors import EXIT_OK, CapacityError, ConfigError
from ember_pp.jobs import bench_compare, bench_handoff, bench_report
from ember_pp.jobs.bench_conditions import cards, changed_settings, conditions
from ember_pp.jobs.bench_floor import Floor, stage_floor
from ember_pp.jobs.bench_run import (
    BenchClient,
    BenchRun,
    run_once,
    settled_status,
    stage_times,
)
from ember_pp.jobs.bench_workload import BenchWorkload, make_workload
from ember_pp.jobs.child import run_child
from ember_pp.jobs.session import open_client
from ember_pp.jobs.telling import report, say

Connect = Callable[[Config], contextlib.AbstractContextManager[BenchClient]]

_POLL_S = 0.2


def run(config: Config, *, connect: Connect = open_client) -> int:
    """Run the benchmark that ``config.job`` describes; the exit code.

    Raises:
        ConfigError: a setting is wrong, or the result could not be written.
        CapacityError: the model, or a fixed batch, does not fit.
        EmberError: the model cannot run, or a request failed.
    """
    job = config.job
    assert isinstance(job, BenchJob)
    _check_settings(config, job)
    if job.workload == "handoff":
        say("timing hops ...")
        measured = bench_handoff.measure(config, job)
        say("")
        report(bench_handoff.render(measured), measured, job.output)
        return EXIT_OK
    preparation = prepare(config)
    workload = make_workload(job, preparation.model_config.vocab_size, preparation.max_model_len)
    _check_batch(config, workload)
    measured = _measure_rates(config, preparation)
    with connect(config) as client:
        runs = _run_all(client, config, job, workload, preparation)
        card_facts = cards(
            [rates["uuid"] for rates in measured["rates"].values() if "uuid" in rates]
        )
    floor = _floor_of(config, preparation, measured["rates"])
    result = _result_of(config, job, workload, floor, runs)
    result["rates"] = measured["rates"]
    result["compare"] = None
    if job.compare != "none":
        say(f"running {job.compare} ...")
        result["compare"] = bench_compare.compare(
            config,
            job,
            workload.turn(job.warmup, preparation.model_config.vocab_size),
            preparation,
            ours=result["summary"],
            first_tokens=[stream.first_token for stream in runs.counted[0].streams],
        )
    say("")
    result["conditions"] = conditions(measured["versions"]) | {"cards": card_facts}
    result["settings"] = changed_settings(config)
    report(bench_report.render(result), result, job.output)
    return EXIT_OK


# --------------------------------------------------------------------------------------
# before anything runs


def _check_settings(config: Config, job: BenchJob) -> None:
    if config.coordinator.address is not None:
        raise ConfigError(
            "coordinator.address: job=bench starts a coordinator of its own, on devices that it "
            "has measured first; leave this out"
        )
    if job.output not in (None, "-"):
        check_writable("job.output", Path(str(job.output)))
    bench_compare.check_installed(job)


def _check_batch(config: Config, workload: BenchWorkload) -> None:
    most = config.scheduler.max_sequences * config.pipeline.replicas
    if workload.name == "fixed" and workload.batch > most:
        raise ConfigError(
            f"job.batch: {workload.batch} requests cannot decode together with "
            f"scheduler.max_sequences={config.scheduler.max_sequences}; raise that to "
            f"{-(-workload.batch // config.pipeline.replicas)}"
        )


def _measure_rates(config: Config, preparation: Preparation) -> dict[str, Any]:
    """``rates`` by device and ``versions``, from a child process."""
    say("measuring the devices ...")
    return run_child(
        "ember_pp.stage.rates",
        {
            "devices": list(dict.fromkeys(preparation.devices)),
            "dtype": config.model.dtype,
            "num_threads": preparation.cpu_threads,
        },
        timeout_s=config.coordinator.start_timeout_s,
        what="measuring the devices",
    )


def _floor_of(config: Config, preparation: Preparation, rates: Mapping[str, Any]) -> Floor:
    """Replicas have the same layers; the floor is that of the first one's devices."""
    devices = preparation.devices_of(0)
    last = len(devices) - 1
    return Floor(
        stages=[
            stage_floor(
                preparation.model_config,
                layer_range,
                is_last=index == last,
                bytes_per_element=BYTES_PER_ELEMENT[config.model.dtype],
                device=device,
                read_bytes_per_s=rates[device]["read_bytes_per_s"],
                flops_per_s=rates[device]["flops_per_s"],
            )
            for index, (device, layer_range) in enumerate(
                zip(devices, preparation.layer_ranges, strict=True)
            )
        ],
        microbatches=preparation.num_microbatches,
        replicas=config.pipeline.replicas,
    )


# --------------------------------------------------------------------------------------
# running


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Runs:
    """What ran, and where the time of the stages went meanwhile."""

    counted: list[BenchRun]
    stages: list[dict[str, Any]]
    num_preemptions: int


def _run_all(
    client: BenchClient,
    config: Config,
    job: BenchJob,
    workload: BenchWorkload,
    preparation: Preparation,
) -> _Runs:
    status = _wait_until_ready(client)
    _check_cache(config, workload, int(status.get("num_blocks", 0)))
    turns = [
        workload.turn(number, preparation.model_config.vocab_size)
        for number in range(job.warmup + job.repeats)
    ]
    sampling = config.sampling.given()
    for number, turn in enumerate(turns[: job.warmup]):
        say(f"warming up ({number + 1} of {job.warmup}) ...")
        run_once(client, turn, sampling)
    before = settled_status(client)
    counted = []
    for number, turn in enumerate(turns[job.warmup :]):
        say(f"running {workload.name} ({number + 1} of {job.repeats}) ...")
        counted.append(run_once(client, turn, sampling))
    after = settled_status(client)
    return _Runs(
        counted=counted,
        stages=stage_times(before, after),
        num_preemptions=after.get("num_preemptions", 0) - before.get("num_preemptions", 0),
    )


def _wait_until_ready(client: BenchClient) -> Mapping[str, Any]:
    say("loading ...")
    while (status := client.status())["phase"] != "ready":
        time.sleep(_POLL_S)
    return status


def _check_cache(config: Config, workload: BenchWorkload, num_blocks: int) -> None:
    """A batch that does not fit would be preempted, and be no fixed batch."""
    block_size = config.cache.block_size
    blocks = sum(-(-request.length // block_size) for request in workload.requests)
    blocks = -(-blocks // config.pipeline.replicas)
    if workload.name == "fixed" and blocks > num_blocks:
        raise CapacityError(
            f"job.batch: {workload.batch} requests need {blocks * block_size:,} tokens of KV "
            f"cache, there are {num_blocks * block_size:,}; lower job.batch, or raise "
            "cache.memory_gib or pipeline.stages"
        )


# --------------------------------------------------------------------------------------
# the result


def _result_of(
    config: Config, job: BenchJob, workload: BenchWorkload, floor: Floor, runs: _Runs
) -> dict[str, Any]:
    repeats = [bench_report.measure_run(run, workload, floor) for run in runs.counted]
    kind = bench_report.floor_kind(workload)
    return {
        "benchmark": "bench",
        "workload": {
            "name": workload.name,
            "batch": workload.batch,
            "input_tokens": workload.input_tokens,
            "output_tokens": workload.output_tokens,
            "temperature": config.sampling.given().get("temperature", workload.temperature),
            "seed": job.seed,
        },
        "model": {
            "path": config.model.path,
            "dtype": config.model.dtype,
            "load": config.model.load,
        },
        "num_warmup": job.warmup,
        "repeats": repeats,
        "summary": bench_report.summarize(repeats),
        "latency": bench_report.latencies(runs.counted),
        "floor": {
            "kind": kind,
            "what": bench_report.FLOORS[kind],
            "microbatches": floor.microbatches,
            "replicas": floor.replicas,
            "stages": [dataclasses.asdict(stage) for stage in floor.stages],
        },
        "stages": runs.stages,
        "num_preemptions": runs.num_preemptions,
    }
