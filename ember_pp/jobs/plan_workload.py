"""A workload replayed through the real scheduler, over the stages of a plan, in virtual time."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import gzip
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ember_pp.config import Config
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.preparation import choose_num_microbatches
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Simulation
from ember_pp.errors import ConfigError, InvalidRequestError
from ember_pp.jobs.plan_layout import LayoutPlan

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_SYNTHETIC_ROUNDS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What became of the requests; percentiles by their number."""

    workload: str
    num_requests: int
    """Of one replica."""
    num_skipped: int
    """That can never fit."""
    num_replicas: int
    makespan_s: float
    output_tokens_per_s: float
    """Of all replicas."""
    ttft_s: dict[int, float]
    tpot_s: dict[int, float]
    bubbles: list[float]


def simulate(config: Config, plan: LayoutPlan) -> Simulated:
    """Serve ``plan.workload``; of several replicas one is simulated, with its share of requests.

    Raises:
        ConfigError: the file cannot be read or has other columns, or no request in it fits.
    """
    name = str(config.plan.workload)
    arrivals = _synthetic(config) if name == "synthetic" else read_trace(Path(name))
    arrivals = arrivals[: config.plan.max_requests][:: plan.num_replicas]
    scheduler = _scheduler(config, plan)
    fitting = [arrival for arrival in arrivals if _fits(scheduler, arrival)]
    if not fitting:
        raise ConfigError(f"plan.workload: {name}: none of {len(arrivals)} requests fits")
    costs = [stage.cost for stage in plan.stages]
    report = Simulation(scheduler, [cost.time_s for cost in costs]).run(fitting)
    return Simulated(
        workload=name,
        num_requests=report.num_requests,
        num_skipped=len(arrivals) - len(fitting),
        num_replicas=plan.num_replicas,
        makespan_s=report.makespan_s,
        output_tokens_per_s=plan.num_replicas * report.output_tokens_per_s,
        ttft_s=report.ttft_s,
        tpot_s=report.tpot_s,
        bubbles=report.bubbles,
    )


def _scheduler(config: Config, plan: LayoutPlan) -> Scheduler:
    settings = plan.pipelines.settings
    costs = [stage.cost for stage in plan.stages]
    slowest = max(costs, key=plan.steady.time_s)
    return Scheduler(
        num_blocks=plan.num_kv_tokens // settings.block_size,
        block_size=settings.block_size,
        max_in_flight=plan.max_in_flight,
        num_microbatches=choose_num_microbatches(
            len(costs), plan.max_in_flight, config.pipeline.run_ahead
        ),
        run_ahead=config.pipeline.run_ahead,
        max_sequences=settings.max_sequences,
        max_tokens_per_plan=settings.max_tokens_per_plan,
        max_model_len=settings.max_model_len,
        prefix_caching=False,  # a trace says nothing about what prompts have in common
        policy=POLICIES[config.scheduler.policy],
        plan_time_s=slowest.time_s,
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
    one = Arrival(0.0, plan.prompt_tokens, plan.output_tokens)
    return [one] * (_SYNTHETIC_ROUNDS * plan.sequences)


def read_trace(path: Path) -> list[Arrival]:
    """Arrivals of a CSV file with the columns of Azure's LLM traces, ``.xz`` and ``.gz`` too.

    Times count from the first arrival. Rows without a prompt or an answer are left out.

    Raises:
        ConfigError: the file cannot be read, or a row is not as it should be; names the line.
    """
    try:
        with _open(path) as file:
            return list(_read_rows(path, file))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
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
        try:
            time_s = _seconds(row["TIMESTAMP"])
            prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
        except (TypeError, ValueError):
            raise ConfigError(f"plan.workload: {path}: line {reader.line_num}: {row}") from None
        if prompt > 0 and output > 0:
            rows.append((time_s, prompt, output))
    rows.sort()
    for time_s, prompt, output in rows:
        yield Arrival(time_s - rows[0][0], prompt, output)


def _seconds(text: str) -> float:
    """A number of seconds, or a date and time."""
    try:
        return float(text)
    except ValueError:
        date, _, fraction = text.partition(".")  # the trace has seven digits, Python takes six
        at = datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)
        return at.timestamp() + float(f"0.{fraction or 0}")
