"""What ``benchmarks/multi_gpu.py`` runs, in the order of its worth. Pure: nothing starts here."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks.multi_gpu_child import FOLDER, OUTPUT, Command
from ember_pp.config import JOBS, BenchJob
from ember_pp.jobs.bench_handoff import HOPS, SIZES
from ember_pp.jobs.bench_workload import make_workload

PARTS = ("probe", "handoff", "equality", "models", "failure", "trace")
"""By worth."""
MODELS = ("8b", "32b", "14b")
"""By worth; on CPUs the demo model takes their place."""
LIMITS_S = {"demo": 60.0, "8b": 120.0, "14b": 180.0, "32b": 300.0}
PLAN_LIMIT_S = 60.0
_TRACED_TOKENS = 512
_VOCABULARY = 10_000
_MAX_LENGTH = 40_960


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Something to run and to store under its name."""

    part: str
    name: str
    commands: dict[str, Command]
    """One after the other; their results are stored under these names."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What ratios need to know of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """A workload of ``job=bench`` for one stage; N stages get N times the requests.

    So every GPU has the same tokens in flight, whatever the number of stages.
    """

    workload: Literal["single", "fixed", "mixed", "prefill"]
    batch: int
    repeats: int
    input_tokens: int | None = None
    output_tokens: int | None = None
    lengths: tuple[int, int] | None = None

    def job(self, num_stages: int) -> BenchJob:
        """Its settings; a single stream stays one."""
        job = BenchJob(
            workload=self.workload,
            batch=self.batch * (1 if self.workload == "single" else num_stages),
            repeats=self.repeats,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
        )
        return job if self.lengths is None else dataclasses.replace(job, lengths=list(self.lengths))


LOADS = {
    "decode-64": Load(workload="fixed", batch=64, repeats=1, input_tokens=512, output_tokens=256),
    "single": Load(workload="single", batch=1, repeats=2, input_tokens=128, output_tokens=128),
    "mixed-256": Load(workload="mixed", batch=256, repeats=1, lengths=(100, 1024)),
    "decode-256": Load(workload="fixed", batch=256, repeats=1, input_tokens=512, output_tokens=256),
    "prefill-32k": Load(workload="prefill", batch=2, repeats=2, input_tokens=32_768),
}
"""By worth."""
SMALL_LOADS = {
    "decode-4": Load(workload="fixed", batch=4, repeats=1, input_tokens=16, output_tokens=48),
    "single": Load(workload="single", batch=1, repeats=2, input_tokens=16, output_tokens=32),
    "mixed-8": Load(workload="mixed", batch=8, repeats=1, lengths=(5, 40)),
    "prefill-500": Load(workload="prefill", batch=2, repeats=2, input_tokens=500),
}
"""For CPUs: they prove this script, not a speed."""


def all_cases(devices: Sequence[str], models: Sequence[str], folder: Path) -> list[Case]:
    """Every case for these devices, the best first within each part.

    Args:
        devices: of the stages, at least two; one may be named twice.
        models: some of ``MODELS``.
        folder: where pictures go.
    """
    models = ("demo",) if "cpu" in devices else models
    return [
        *_probe(devices),
        *_handoff(devices),
        *_equality(devices, models),
        *_models(devices, models),
        *_failure(devices, models[0]),
        *_trace(devices, models[0], folder),
    ]


def stage_counts(num_devices: int) -> list[int]:
    """1, 2, 4, ... and all of them."""
    powers = itertools.takewhile(lambda count: count <= num_devices, (2**i for i in range(16)))
    return sorted({*powers, num_devices})


# --------------------------------------------------------------------------------------
# edges


def _probe(devices: Sequence[str]) -> Iterator[Case]:
    settings = (*_pipeline(devices, len(devices), "equal"), *_model("demo"))
    yield Case(
        part="probe",
        name="chosen paths",
        commands={
            "edges": Command(
                arguments=("benchmarks.multi_gpu_serving", "edges", *settings), limit_s=90
            )
        },
    )
    yield Case(part="probe", name="peer copies", commands={"peer": _peer(devices)})
    for pair in _pairs(devices):
        yield Case(
            part="probe",
            name=f"paths of {_pair_name(pair)}",
            commands={"hops": _hops(pair, laps=1, warmup=0)},
        )


def _handoff(devices: Sequence[str]) -> Iterator[Case]:
    for pair in _pairs(devices):
        yield Case(
            part="handoff",
            name=_pair_name(pair),
            commands={
                "hops": _hops(pair, laps=3, warmup=1),
                "nccl": _nccl(pair, laps=3, warmup=1),
                "peer": _peer(pair),
            },
        )


def _pairs(devices: Sequence[str]) -> list[tuple[str, str]]:
    """Neighbours first; a device that is alone is a pair with itself."""
    distinct = list(dict.fromkeys(devices))
    if len(distinct) == 1:
        return [(distinct[0], distinct[0])]
    pairs = itertools.combinations(range(len(distinct)), 2)
    return [
        (distinct[i], distinct[j]) for i, j in sorted(pairs, key=lambda p: (p[1] - p[0] > 1, p))
    ]


def _pair_name(pair: Sequence[str]) -> str:
    return "-".join(name.removeprefix("cuda:") for name in pair)


def _hops(pair: Sequence[str], *, laps: int, warmup: int) -> Command:
    return Command(
        arguments=(
            *("ember_pp", "job=bench", "job.workload=handoff", *_pipeline(pair, 2, "equal")),
            *(f"job.repeats={laps}", f"job.warmup={warmup}", f"job.output={OUTPUT}"),
            "coordinator.start_timeout_s=60",
        ),
        limit_s=180,
    )


def _nccl(pair: Sequence[str], *, laps: int, warmup: int) -> Command:
    wanted = {
        "path": "nccl",
        "devices": list(pair),
        "sizes": list(SIZES),
        "hops": HOPS,
        "laps": laps,
        "warmup": warmup,
        "num_threads": 1,
    }
    return Command(
        arguments=("benchmarks.multi_gpu_nccl",),
        limit_s=90,
        stdin=wanted,
        skip=_needs_two(pair, "NCCL takes one process a GPU"),
    )


def _peer(devices: Sequence[str]) -> Command:
    return Command(
        arguments=("benchmarks.multi_gpu_peer", ",".join(devices)),
        limit_s=90,
        skip=_needs_two(devices, "no copy between GPUs"),
    )


def _needs_two(devices: Sequence[str], why: str) -> str:
    if "cpu" in devices:
        return f"{why}: these are CPUs"
    return "" if len(set(devices)) > 1 else f"{why}: this is one GPU"


# --------------------------------------------------------------------------------------
# models


def _pipeline(devices: Sequence[str], num_stages: int, split: str) -> tuple[str, ...]:
    return (
        f"pipeline.stages={num_stages}",
        f"pipeline.devices=[{','.join(devices[:num_stages])}]",
        f"pipeline.split={split}",
        *(("pipeline.cpu_threads=1",) if "cpu" in devices else ()),
    )


def _model(model: str) -> tuple[str, ...]:
    name = model if model == "demo" else f"qwen3-{model}"
    return (f"model={name}", "model.load=random")


def _equality(devices: Sequence[str], models: Sequence[str]) -> Iterator[Case]:
    for model in models[:1]:
        for num_stages in stage_counts(len(devices))[1:]:
            yield Case(
                part="equality",
                name=f"{model}, {num_stages} stages",
                commands={"check": _check(devices, model, num_stages)},
                facts={"model": model, "stages": num_stages},
            )


def _check(devices: Sequence[str], model: str, num_stages: int) -> Command:
    return Command(
        arguments=(
            *("ember_pp", "job=check", "job.against=one_stage", "job.requests=32"),
            *("job.output_tokens=8", "job.disk_gib=1", *_model(model)),
            *_pipeline(devices, num_stages, "auto"),
            f"job.output={OUTPUT}",
        ),
        limit_s=LIMITS_S[model],
        skip="" if "check" in JOBS else "job=check is not there yet",
    )


def _models(devices: Sequence[str], models: Sequence[str]) -> Iterator[Case]:
    loads = SMALL_LOADS if "cpu" in devices else LOADS
    counts = stage_counts(len(devices))
    for split in ("auto", "equal"):
        for model, name in itertools.product(models, loads):
            for num_stages in counts if split == "auto" else counts[1:]:
                yield _measured(devices, model, name, loads[name], num_stages, split)


def _measured(
    devices: Sequence[str], model: str, name: str, load: Load, num_stages: int, split: str
) -> Case:
    job = load.job(num_stages)
    settings = (
        *_model(model),
        *_pipeline(devices, num_stages, split),
        *_planned_for(load, int(job.batch or 1)),
        f"scheduler.max_sequences={job.batch}",
        "scheduler.max_tokens_per_plan=8192",
    )
    bench = (
        *("ember_pp", "job=bench", *settings, *_job_settings(job), f"job.output={OUTPUT}"),
        "coordinator.start_timeout_s=240",
    )
    plan = (
        *("ember_pp", "job=plan", *settings, f"plan.output={OUTPUT}"),
        f"plan.workload={FOLDER}/requests.csv",
    )
    requests = {"requests.csv": functools.partial(_as_trace, job)}
    commands = {"bench": Command(arguments=bench, limit_s=LIMITS_S[model])}
    if num_stages > 1:
        commands["plan"] = Command(arguments=plan, limit_s=PLAN_LIMIT_S, files=requests)
    return Case(
        part="models",
        name=f"{model}, {name}, {num_stages} stages, {split}",
        commands=commands,
        facts={
            "model": model,
            "load": name,
            "stages": num_stages,
            "gpus": num_gpus(devices[:num_stages]),
            "has_aims": "cpu" not in devices,
            "split": split,
        },
    )


def num_gpus(devices: Sequence[str]) -> int:
    """Devices that compute side by side: CPU stages have cores of their own."""
    return sum(name == "cpu" for name in devices) + len(set(devices) - {"cpu"})


def _planned_for(load: Load, batch: int) -> tuple[str, ...]:
    """What layers are split for: the mean request of the load."""
    mean = None if load.lengths is None else sum(load.lengths) // 2
    return (
        f"plan.prompt_tokens={load.input_tokens or mean}",
        f"plan.output_tokens={load.output_tokens or mean or 1}",
        f"plan.sequences={batch}",
        "plan.use_profile=false",
    )


def _job_settings(job: BenchJob) -> list[str]:
    given = {
        "workload": job.workload,
        "batch": job.batch,
        "repeats": job.repeats,
        "input_tokens": job.input_tokens,
        "output_tokens": job.output_tokens,
    }
    settings = [f"job.{key}={value}" for key, value in given.items() if value is not None]
    if job.workload == "mixed":
        settings.append(f"job.lengths=[{job.lengths[0]},{job.lengths[1]}]")
    return settings


def _as_trace(job: BenchJob) -> str:
    """The requests of ``job``, all at once, as ``plan.workload`` takes them."""
    requests = make_workload(job, _VOCABULARY, _MAX_LENGTH).requests
    rows = [f"0,{len(request.token_ids)},{request.output_tokens}" for request in requests]
    return "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n"


# --------------------------------------------------------------------------------------
# failure and trace


def _failure(devices: Sequence[str], model: str) -> Iterator[Case]:
    is_small = model == "demo"
    load = ("--requests", "32", "--lengths", "5", "200") if is_small else ("--requests", "256")
    yield Case(
        part="failure",
        name=f"{model}, last of {len(devices)} stages killed",
        commands={
            "killed": Command(
                arguments=(
                    *("benchmarks.multi_gpu_serving", "killed", *load, *_model(model)),
                    *_pipeline(devices, len(devices), "auto"),
                    "scheduler.max_sequences=256",
                    *(() if is_small else ("scheduler.max_tokens_per_plan=8192",)),
                ),
                limit_s=2 * LIMITS_S[model],
            )
        },
        facts={"model": model, "stages": len(devices)},
    )


def _trace(devices: Sequence[str], model: str, folder: Path) -> Iterator[Case]:
    loads = SMALL_LOADS if model == "demo" else LOADS
    # One run alone, and a long one: its middle, which is drawn, is then far from any prompt.
    load = dataclasses.replace(next(iter(loads.values())), output_tokens=_TRACED_TOKENS)
    job = load.job(len(devices))
    picture = folder / "multi_gpu_trace.svg"
    yield Case(
        part="trace",
        name=f"{model}, {len(devices)} stages",
        commands={
            "bench": Command(
                arguments=(
                    *("ember_pp", "job=bench", *_model(model)),
                    *_pipeline(devices, len(devices), "auto"),
                    *_planned_for(load, int(job.batch or 1)),
                    *(f"scheduler.max_sequences={job.batch}", *_job_settings(job), "job.warmup=0"),
                    "scheduler.max_tokens_per_plan=8192",
                    *(f"trace.picture={picture}", "trace.window_s=1", f"job.output={OUTPUT}"),
                ),
                limit_s=LIMITS_S[model],
            )
        },
        facts={"model": model, "stages": len(devices), "picture": picture.name},
    )
