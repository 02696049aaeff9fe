"""What every stage did when: collected while the run goes on, written once it has ended.

Stages send packed times (``StageTrace``); the coordinator adds what it knows of each plan. All
times are nanoseconds of one clock, ``time.monotonic_ns``, which the processes of a host share.
Memory is bounded: of a long run, the last ``trace.max_plans`` plans are kept.

    TraceLog     one per pipeline: takes messages and plans, forgets the oldest
    Timeline     what a log held, unpacked: rows of slices and waits, for a writer
"""

from __future__ import annotations

import array
import dataclasses
import time
from collections import deque
from collections.abc import Iterator

from ember_pp import protocol
from ember_pp.coordinator.plan import Plan

BUSY, WAIT_INPUT, WAIT_OUTPUT, HOST_GAP, IDLE = range(5)
"""States in ``StageTrace.waits``."""

_FIELDS_OF_A_PLAN = 5
_FIELDS_OF_A_WAIT = 3


@dataclasses.dataclass(frozen=True, slots=True)
class PlanFacts:
    """A plan as the coordinator saw it."""

    epoch: int
    number: int
    microbatch: int
    num_decodes: int
    num_prefill_tokens: int
    num_sequences: int
    feedback: int
    """Newest plan that drew an input of its decode rows; -1 for none."""
    issued_ns: int
    returned_ns: int = 0
    """When its tokens came back; 0: they did not."""

    @property
    def kind(self) -> str:
        """``decode``, ``prefill`` or ``mixed``."""
        if not self.num_prefill_tokens:
            return "decode"
        return "mixed" if self.num_decodes else "prefill"


@dataclasses.dataclass(frozen=True, slots=True)
class PlanSlice:
    """A plan on one stage, from its input being there to its end."""

    facts: PlanFacts
    came_ns: int
    paused_ns: int
    """When its wait for input began: before that, it was prepared. ``came_ns`` without a wait."""
    start_ns: int
    end_ns: int
    received_ns: int
    """When its input was there, which is not before ``start_ns``; 0: it needed none."""
    sent_ns: int
    """When its output was handed on, which is before ``end_ns``; 0: it had none."""


@dataclasses.dataclass(frozen=True, slots=True)
class WaitSlice:
    """Time in which a stage waited."""

    state: int
    start_ns: int
    end_ns: int


@dataclasses.dataclass(frozen=True, slots=True)
class StageRow:
    """One stage over the time of the trace, in order."""

    replica: int
    stage_index: int
    plans: list[PlanSlice]
    waits: list[WaitSlice]

    def shares(self, start_ns: int, end_ns: int) -> dict[int, float]:
        """Fraction of each state but ``IDLE`` in a window, over what was not idle.

        After the last plan of the row nothing is known: that part of the window does not count.
        """
        end_ns = min(end_ns, self.plans[-1].end_ns) if self.plans else start_ns
        times_ns = dict.fromkeys((BUSY, WAIT_INPUT, WAIT_OUTPUT, HOST_GAP, IDLE), 0)
        for wait in self.waits:
            overlap_ns = min(wait.end_ns, end_ns) - max(wait.start_ns, start_ns)
            times_ns[wait.state] += max(0, overlap_ns)
        idle_ns = times_ns.pop(IDLE)
        times_ns[BUSY] = end_ns - start_ns - idle_ns - sum(times_ns.values())
        total_ns = end_ns - start_ns - idle_ns
        return {state: ns / total_ns if total_ns > 0 else 0.0 for state, ns in times_ns.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """All replicas, their stages, and the plans that they share."""

    num_stages: int
    rows: list[StageRow]
    plans: list[list[PlanFacts]]
    """Of each replica."""

    @property
    def window_ns(self) -> tuple[int, int]:
        """From the first to the last moment that any plan has on any stage."""
        starts = [row.plans[0].start_ns for row in self.rows if row.plans]
        ends = [row.plans[-1].end_ns for row in self.rows if row.plans]
        return (min(starts), max(ends)) if starts else (0, 0)


class TraceLog:
    """Times of one pipeline.

    Args:
        replica: of the pipeline.
        num_stages: of the pipeline.
        max_plans: how many are kept.
    """

    def __init__(self, replica: int, num_stages: int, max_plans: int) -> None:
        self._replica = replica
        self._max_plans = max_plans
        self._batches: list[deque[protocol.StageTrace]] = [deque() for _ in range(num_stages)]
        self._num_plans = [0] * num_stages
        self._facts: deque[PlanFacts] = deque(maxlen=max_plans)
        self._returned_ns: dict[tuple[int, int], int] = {}

    def issue(self, plan: Plan, epoch: int) -> None:
        """A plan goes to the stages."""
        if len(self._facts) == self._max_plans:
            oldest = self._facts[0]
            self._returned_ns.pop((oldest.epoch, oldest.number), None)
        self._facts.append(
            PlanFacts(
                epoch=epoch,
                number=plan.number,
                microbatch=plan.microbatch_id,
                num_decodes=len(plan.decodes),
                num_prefill_tokens=plan.num_prefill_tokens,
                num_sequences=len(plan.decodes) + len(plan.chunks),
                feedback=plan.feedback,
                issued_ns=time.monotonic_ns(),
            )
        )

    def returned(self, number: int, epoch: int) -> None:
        """The tokens of a plan are back."""
        self._returned_ns[epoch, number] = time.monotonic_ns()

    def add(self, trace: protocol.StageTrace) -> None:
        """A batch of one stage; the oldest go when the newer ones are plans enough."""
        batches = self._batches[trace.stage_index]
        batches.append(trace)
        self._num_plans[trace.stage_index] += _num_plans(trace)
        while self._num_plans[trace.stage_index] - _num_plans(batches[0]) >= self._max_plans:
            self._num_plans[trace.stage_index] -= _num_plans(batches.popleft())

    def facts(self) -> list[PlanFacts]:
        """The plans that are kept, oldest first."""
        return [
            dataclasses.replace(
                facts, returned_ns=self._returned_ns.get((facts.epoch, facts.number), 0)
            )
            for facts in self._facts
        ]

    def rows(self) -> list[StageRow]:
        """What the stages did with these plans."""
        by_number = {(facts.epoch, facts.number): facts for facts in self.facts()}
        return [
            _row(self._replica, stage_index, batches, by_number)
            for stage_index, batches in enumerate(self._batches)
        ]


def timeline(logs: list[TraceLog]) -> Timeline:
    """What the logs of all replicas hold."""
    rows = [row for log in logs for row in log.rows()]
    return Timeline(len(rows) // len(logs), rows, [log.facts() for log in logs])


def _row(
    replica: int,
    stage_index: int,
    batches: deque[protocol.StageTrace],
    facts: dict[tuple[int, int], PlanFacts],
) -> StageRow:
    row = StageRow(replica, stage_index, [], [])
    first_ns = None
    for batch in batches:
        waits = [WaitSlice(*fields) for fields in _groups(batch.waits, _FIELDS_OF_A_WAIT)]
        row.waits.extend(waits)
        inputs = deque(wait for wait in waits if wait.state == WAIT_INPUT)
        for number, came_ns, received_ns, sent_ns, end_ns in _groups(
            batch.plans, _FIELDS_OF_A_PLAN
        ):
            known = facts.get((batch.epoch, number))
            if known is None:
                continue
            first_ns = came_ns if first_ns is None else first_ns
            paused_ns, start_ns = _pause_of(came_ns, received_ns, inputs)
            row.plans.append(
                PlanSlice(known, came_ns, paused_ns, start_ns, end_ns, received_ns, sent_ns)
            )
    # A wait of plans that were forgotten would stand alone.
    row.waits[:] = [wait for wait in row.waits if first_ns is not None and wait.end_ns >= first_ns]
    return row


def _pause_of(came_ns: int, received_ns: int, inputs: deque[WaitSlice]) -> tuple[int, int]:
    """From when to when a plan waited for its input; takes that out of ``inputs``."""
    while inputs and inputs[0].end_ns < came_ns:
        inputs.popleft()
    paused_ns = start_ns = came_ns
    while inputs and inputs[0].end_ns <= received_ns:
        wait = inputs.popleft()
        paused_ns = wait.start_ns if start_ns == came_ns else paused_ns
        start_ns = wait.end_ns
    return paused_ns, start_ns


def _num_plans(trace: protocol.StageTrace) -> int:
    return len(trace.plans) // (8 * _FIELDS_OF_A_PLAN)


def _groups(packed: bytes, size: int) -> Iterator[array.array[int]]:
    values = protocol.unpack_i64(packed)
    for start in range(0, len(values) - size + 1, size):
        yield values[start : start + size]
