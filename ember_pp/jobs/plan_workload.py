"""A workload replayed through the real scheduler, over the stages of a plan, in virtual time."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import gzip
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from ember_pp.config import Config
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Report, Simulation, Timing
from ember_pp.cost_model import PlanCost
from ember_pp.errors import ConfigError, InvalidRequestError
from ember_pp.jobs.plan_prediction import HOP_S, Prediction

SYNTHETIC = "synthetic"
COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SYNTHETIC_ROUNDS = 4
"""Requests of the synthetic workload, for each that is open at once."""
_MAX_SHOWN = 60
"""Characters of a wrong value in a message."""
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What became of the requests of one replica."""

    workload: str
    num_replicas: int
    has_equal_replicas: bool
    """Otherwise the one that is simulated has the slowest device of each stage."""
    num_skipped: int
    """Requests that can never fit."""
    report: Report

    @property
    def output_tokens_per_s(self) -> float:
        """Of all replicas, if all were like this one."""
        return self.num_replicas * self.report.output_tokens_per_s

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": self.workload,
            "num_replicas": self.num_replicas,
            "num_skipped": self.num_skipped,
            "output_tokens_per_s": self.output_tokens_per_s,
            "one_replica": self.report.to_plain(),
        }


def simulate(config: Config, prediction: Prediction) -> Simulated:
    """Serve ``plan.workload``; of several replicas one is simulated, with its share of requests.

    Raises:
        ConfigError: the file cannot be read or has other columns, or no request in it fits.
    """
    name = str(config.plan.workload)
    arrivals = _synthetic(config) if name == SYNTHETIC else read_trace(Path(name))
    arrivals = arrivals[: config.plan.max_requests][:: prediction.num_replicas]
    scheduler = make_scheduler(config, prediction)
    fitting = [arrival for arrival in arrivals if _fits(scheduler, arrival)]
    if not fitting:
        raise ConfigError(f"plan.workload: {name}: none of {len(arrivals)} requests fits")
    return Simulated(
        workload=name,
        num_replicas=prediction.num_replicas,
        has_equal_replicas=not prediction.has_unequal_replicas,
        num_skipped=len(arrivals) - len(fitting),
        report=make_simulation(scheduler, prediction).run(fitting),
    )


def make_simulation(scheduler: Scheduler, prediction: Prediction) -> Simulation:
    """The stages of one replica in virtual time."""
    costs: dict[PlanCost, PlanCost] = {}
    for stage in prediction.stages:
        costs.setdefault(stage.cost, stage.cost)
    # Equal stages are given the same function, whose result the simulation can use again.
    times_s = [costs[stage.cost].time_s for stage in prediction.stages]
    return Simulation(scheduler, times_s, Timing(hop_s=HOP_S))


def make_scheduler(config: Config, prediction: Prediction) -> Scheduler:
    """The scheduler of one replica, as a run with this layout would have it."""
    settings = prediction.layout.settings
    ranges = [stage.layers for stage in prediction.stages]
    cost = prediction.layout.scheduler_cost(ranges, prediction.steady)
    return Scheduler(
        num_blocks=prediction.num_kv_tokens // settings.block_size,
        block_size=settings.block_size,
        max_in_flight=prediction.max_in_flight,
        num_microbatches=prediction.num_microbatches,
        run_ahead=config.pipeline.run_ahead,
        max_sequences=settings.max_sequences,
        max_tokens_per_plan=settings.max_tokens_per_plan,
        max_model_len=settings.max_model_len,
        prefix_caching=False,  # a trace says nothing about what prompts have in common
        policy=POLICIES[config.scheduler.policy],
        plan_time_s=None if cost is None else cost.time_s,
    )


def _fits(scheduler: Scheduler, arrival: Arrival) -> bool:
    try:
        scheduler.check_fits(arrival.num_prompt_tokens, arrival.num_output_tokens)
    except InvalidRequestError:
        return False
    limit = scheduler.limits.max_model_len
    return arrival.num_prompt_tokens + arrival.num_output_tokens <= limit


def _synthetic(config: Config) -> list[Arrival]:
    plan = config.plan
    arrival = Arrival(0.0, plan.prompt_tokens, plan.output_tokens)
    return [arrival] * (_SYNTHETIC_ROUNDS * plan.sequences)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals of a CSV file with the columns of Azure's LLM traces, ``.xz`` and ``.gz`` too.

    Times count from the first arrival. Rows without a prompt or an answer are left out.

    Raises:
        ConfigError: the file cannot be read, or a row is not as it should be; names the line.
    """
    try:
        with _open(path) as file:
            return list(_read_rows(path, file))
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error, UnicodeError) as error:
        raise ConfigError(f"plan.workload: {path}: {error}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8", newline="")


def _read_rows(path: Path, file: IO[str]) -> Iterator[Arrival]:
    reader = csv.DictReader(file)
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise ConfigError(f"plan.workload: {path}: no column {missing[0]}; expected {COLUMNS}")
    rows = []
    for row in reader:
        where = f"plan.workload: {path}: line {reader.line_num}"
        time_s = _parse(where, row, "TIMESTAMP", _seconds, "seconds, or a date and time")
        prompt = _parse(where, row, "ContextTokens", int, "a whole number")
        output = _parse(where, row, "GeneratedTokens", int, "a whole number")
        if prompt > 0 and output > 0:
            rows.append((time_s, prompt, output))
    rows.sort()
    for time_s, prompt, output in rows:
        yield Arrival(time_s - rows[0][0], prompt, output)


def _parse(
    where: str, row: Mapping[str, str | None], column: str, parse: Callable[[str], _T], kind: str
) -> _T:
    text = row[column]
    if text is None:
        raise ConfigError(f"{where}: {column}: missing")
    try:
        return parse(text)
    except (ValueError, OverflowError):
        shown = repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "...")
        raise ConfigError(f"{where}: {column}: expected {kind}, got {shown}") from None


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time."""
    try:
        seconds = float(text)
    except ValueError:
        date, _, fraction = text.partition(".")  # the trace has seven digits, Python takes six
        at = datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)
        seconds = at.timestamp() + float(f"0.{fraction or 0}")
    if not math.isfinite(seconds):
        raise ValueError(text)
    return seconds
