"""A timeline in the Trace Event Format that Perfetto and chrome://tracing read.

A process per replica; in it a row per stage with a slice per plan, below each a row with its
waits, above them the coordinator. Arrows go along the hand-offs and the feedback. Times are
microseconds of the host's monotonic clock.

Source: "Trace Event Format", Google, https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TextIO

from ember_pp.coordinator.trace import (
    HOST_GAP,
    IDLE,
    WAIT_INPUT,
    WAIT_OUTPUT,
    PlanFacts,
    PlanSlice,
    StageRow,
    Timeline,
)

_COORDINATOR_ROW = 1
_WAIT_NAMES = MappingProxyType(
    {
        WAIT_INPUT: "wait for input",
        WAIT_OUTPUT: "wait for a slot",
        HOST_GAP: "host gap",
        IDLE: "idle",
    }
)
# Names of chrome://tracing's palette; Perfetto colours by the name of the slice.
_COLOURS = MappingProxyType(
    {"decode": "thread_state_running", "prefill": "thread_state_iowait", "mixed": "yellow"}
)


def write_events(timeline: Timeline, facts: Mapping[str, Any], stream: TextIO) -> None:
    """Write ``timeline`` as one JSON object; ``facts`` about the run go along as they are."""
    stream.write('{"displayTimeUnit":"ms","otherData":')
    json.dump(dict(facts), stream)
    stream.write(',"traceEvents":[\n')
    separator = ""
    for event in _events(timeline):
        stream.write(separator + event)
        separator = ",\n"
    stream.write("\n]}\n")


def _events(timeline: Timeline) -> Iterator[str]:
    flow_ids = itertools.count(1)
    for replica, plans in enumerate(timeline.plans):
        rows = [row for row in timeline.rows if row.replica == replica]
        yield from _names(replica, rows)
        yield from _coordinator_events(replica, plans)
        for row in rows:
            yield from _stage_events(row)
        for sender, receiver in itertools.pairwise(rows):
            yield from _arrows(sender, receiver, "hand-off", flow_ids)
        if len(rows) > 1:
            yield from _arrows(rows[-1], rows[0], "feedback", flow_ids)


def _row_id(stage_index: int) -> int:
    return 2 * stage_index + 2


def _names(replica: int, rows: Iterable[StageRow]) -> Iterator[str]:
    yield _metadata(replica, 0, "process_name", name=f"ember-pp, replica {replica}")
    threads = {_COORDINATOR_ROW: "coordinator"}
    for row in rows:
        threads[_row_id(row.stage_index)] = f"stage {row.stage_index}"
        threads[_row_id(row.stage_index) + 1] = f"stage {row.stage_index} waits"
    for thread, name in threads.items():
        yield _metadata(replica, thread, "thread_name", name=name)
        yield _metadata(replica, thread, "thread_sort_index", sort_index=thread)


def _metadata(process: int, thread: int, kind: str, **values: Any) -> str:
    return json.dumps({"ph": "M", "pid": process, "tid": thread, "name": kind, "args": values})


def _coordinator_events(replica: int, plans: Iterable[PlanFacts]) -> Iterator[str]:
    moments: list[tuple[int, int, PlanFacts]] = []
    for plan in plans:
        moments.append((plan.issued_ns, 1, plan))
        if plan.returned_ns:
            moments.append((plan.returned_ns, -1, plan))
    num_in_flight = 0
    where = f'"pid":{replica},"tid":{_COORDINATOR_ROW}'
    for time_ns, step, plan in sorted(moments, key=lambda moment: moment[:2]):
        num_in_flight += step
        name = f"plan {plan.number}" if step > 0 else f"tokens of plan {plan.number}"
        category = "issue" if step > 0 else "return"
        time_us = _us(time_ns)
        yield (
            f'{{"ph":"i","s":"t","name":"{name}","cat":"{category}",{where},"ts":{time_us},'
            f'"args":{_plan_arguments(plan)}}}'
        )
        yield (
            f'{{"ph":"C","name":"plans in flight",{where},"ts":{time_us},'
            f'"args":{{"plans":{num_in_flight}}}}}'
        )


def _stage_events(row: StageRow) -> Iterator[str]:
    thread = _row_id(row.stage_index)
    for plan in row.plans:
        kind = plan.facts.kind
        yield (
            f'{{"ph":"X","name":"{kind} {plan.facts.number}","cat":"{kind}",'
            f'"cname":"{_COLOURS[kind]}","pid":{row.replica},"tid":{thread},'
            f'"ts":{_us(plan.start_ns)},"dur":{_us(plan.end_ns - plan.start_ns)},'
            f'"args":{_plan_arguments(plan.facts)}}}'
        )
        if plan.paused_ns > plan.came_ns:
            yield (
                f'{{"ph":"X","name":"inputs of {plan.facts.number}","cat":"inputs",'
                f'"pid":{row.replica},"tid":{thread},'
                f'"ts":{_us(plan.came_ns)},"dur":{_us(plan.paused_ns - plan.came_ns)}}}'
            )
    for wait in row.waits:
        yield (
            f'{{"ph":"X","name":"{_WAIT_NAMES[wait.state]}","cat":"wait",'
            f'"pid":{row.replica},"tid":{thread + 1},'
            f'"ts":{_us(wait.start_ns)},"dur":{_us(wait.end_ns - wait.start_ns)}}}'
        )


def _arrows(
    sender: StageRow, receiver: StageRow, name: str, flow_ids: Iterator[int]
) -> Iterator[str]:
    """From the moment a plan's output was handed on to the moment that its receiver had it."""
    sent = {(plan.facts.epoch, plan.facts.number): plan for plan in sender.plans if plan.sent_ns}
    for plan in receiver.plans:
        number = plan.facts.feedback if name == "feedback" else plan.facts.number
        source = sent.get((plan.facts.epoch, number))
        if source is not None:
            yield from _arrow(sender, source, receiver, plan, name, next(flow_ids))


def _arrow(
    sender: StageRow, source: PlanSlice, receiver: StageRow, plan: PlanSlice, name: str, flow: int
) -> Iterator[str]:
    common = f'"name":"{name}","cat":"{name}","id":{flow}'
    arrived_ns = max(plan.start_ns, plan.received_ns)
    yield (
        f'{{"ph":"s",{common},"pid":{sender.replica},"tid":{_row_id(sender.stage_index)},'
        f'"ts":{_us(source.sent_ns)}}}'
    )
    yield (
        f'{{"ph":"f","bp":"e",{common},"pid":{receiver.replica},'
        f'"tid":{_row_id(receiver.stage_index)},"ts":{_us(arrived_ns)}}}'
    )


def _plan_arguments(plan: PlanFacts) -> str:
    return (
        f'{{"plan":{plan.number},"micro-batch":{plan.microbatch},"decodes":{plan.num_decodes},'
        f'"prefill tokens":{plan.num_prefill_tokens},"sequences":{plan.num_sequences}}}'
    )


def _us(time_ns: int) -> str:
    """Microseconds, to the nanosecond; a float would not hold as many digits."""
    return f"{time_ns // 1000}.{time_ns % 1000:03d}"
