"""The scheduler at work in virtual time, over stages that are only cost functions.

Scheduler, block manager and in-flight book are the real ones. A stage executes plans in order,
and starts one when it is free, the plan has reached it, and its input is there: the hidden
states of the stage before, and at stage 0 the tokens that the decode rows start from. The
coordinator makes one plan after the other, and learns of tokens and arrivals between them.
Nothing here reads a clock, so the same trace always gives the same report.

What it leaves out: the time that text takes, and stages that are slower than their costs.
"""

from __future__ import annotations

import array
import dataclasses
import math
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as Ordered

from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.policy import PlanTime
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams

_PERCENTILES = (50, 90, 99)
_NEVER_S = math.inf


@dataclasses.dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace."""

    time_s: float
    num_prompt_tokens: int
    num_output_tokens: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What the pipeline costs beside the work of its stages."""

    hop_s: float = 10e-6
    """From the end of a stage to its output being at the next one, or a token at stage 0."""
    latency_s: float = 50e-6
    """Of a message between coordinator and stage, each way."""
    host_s: float = 50e-6
    """The coordinator's time for one plan: taking its tokens in and making the next."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Where one stage's time went, in seconds, while there was work."""

    busy_s: float
    wait_input_s: float
    """For hidden states, or for the tokens that decode rows start from."""
    host_gap_s: float
    """For a plan."""

    @property
    def bubble(self) -> float:
        """Share of the time that was not work."""
        total_s = self.busy_s + self.wait_input_s + self.host_gap_s
        return 1 - self.busy_s / total_s if total_s else 0.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What became of a trace. Percentiles are over requests, by their number (50, 90, 99)."""

    num_requests: int
    num_output_tokens: int
    num_prompt_tokens: int
    num_plans: int
    num_sequence_steps: int
    """Rows that drew a token, over all plans, those past a stop included."""
    num_preemptions: int
    makespan_s: float
    """From the first arrival to the last token."""
    ttft_s: dict[int, float]
    """From arrival to the first token at the coordinator."""
    tpot_s: dict[int, float]
    """Mean time between the tokens of a request that has at least two."""
    max_gap_s: dict[int, float]
    """Longest time between two tokens of such a request."""
    stages: list[StageTimes]

    @property
    def output_tokens_per_s(self) -> float:
        """Tokens of all answers, over the makespan."""
        return self.num_output_tokens / self.makespan_s if self.makespan_s else 0.0

    @property
    def bubbles(self) -> list[float]:
        """Share of the time in which each stage had nothing to do, while there was work."""
        return [stage.bubble for stage in self.stages]

    def to_plain(self) -> dict[str, object]:
        """As numbers for JSON."""
        plain = dataclasses.asdict(self)
        return plain | {"output_tokens_per_s": self.output_tokens_per_s, "bubbles": self.bubbles}


class _Answer(Sequence):
    """A sequence that knows when it will stop; the scheduler does not."""

    __slots__ = ("arrival_s", "first_s", "last_s", "longest_gap_s", "num_to_draw")

    def __init__(self, index: int, arrival: Arrival, max_tokens: int) -> None:
        # Token ids matter to the prefix cache alone, which is off.
        prompt_ids = array.array("i", bytes(4 * arrival.num_prompt_tokens))
        super().__init__(str(index), prompt_ids, SamplingParams(max_tokens=max_tokens), seed=0)
        self.arrival_s = arrival.time_s
        self.num_to_draw = arrival.num_output_tokens
        self.first_s = self.last_s = self.longest_gap_s = 0.0


class _Stage:
    """A device that works through plans in order. All times in seconds of virtual time."""

    __slots__ = ("busy_s", "free_s", "host_gap_s", "kind", "wait_input_s")

    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.free_s = self.busy_s = self.wait_input_s = self.host_gap_s = 0.0

    def run(self, time_s: float, plan_at_s: float, input_at_s: float, work_since_s: float) -> float:
        """Execute a plan of ``time_s``; when it ends.

        What passed between its last plan and ``work_since_s`` was idleness, no bubble.
        """
        free_s = max(self.free_s, work_since_s)
        start_s = max(free_s, plan_at_s, input_at_s)
        if start_s > free_s:
            host_gap_s = max(0.0, plan_at_s - free_s)
            self.host_gap_s += host_gap_s
            self.wait_input_s += start_s - free_s - host_gap_s
        self.busy_s += time_s
        self.free_s = start_s + time_s
        return self.free_s


class Simulation:
    """One scheduler over one pipeline of simulated stages.

    Args:
        scheduler: not used before; prefix caching finds nothing to share in a trace, and is
            best off.
        stage_times_s: what a plan costs at each stage.
        timing: all other times.
    """

    def __init__(
        self, scheduler: Scheduler, stage_times_s: Ordered[PlanTime], timing: Timing | None = None
    ) -> None:
        self._scheduler = scheduler
        self._timing = timing or Timing()
        self._kinds = list(dict.fromkeys(stage_times_s))
        """What stages cost, each once: many are alike."""
        self._stages = [_Stage(self._kinds.index(time_s)) for time_s in stage_times_s]
        self._returns: deque[tuple[float, Plan]] = deque()
        """Plans in flight, and when their tokens are at the coordinator."""
        self._left_s: list[float] = []
        """When each plan left the last stage, by plan number."""
        self._ttft_s: list[float] = []
        self._tpot_s: list[float] = []
        self._max_gap_s: list[float] = []
        self._num_output_tokens = self._num_prompt_tokens = 0
        self._last_s = 0.0
        self._work_since_s = 0.0
        self._num_steps = 0

    def run(self, arrivals: Iterable[Arrival]) -> Report:
        """Serve the arrivals, which are in the order of time, to the last token.

        Raises:
            InvalidRequestError: a request that could not be served even alone.
        """
        assert not self._scheduler.in_flight.next_number, "a scheduler that was used before"
        pending = deque(arrivals)
        begin_s = now_s = pending[0].time_s if pending else 0.0
        num_requests = len(pending)
        while pending or self._returns:
            return_s = self._returns[0][0] if self._returns else _NEVER_S
            arrival_s = pending[0].time_s if pending else _NEVER_S
            now_s = max(now_s, min(return_s, arrival_s))
            while self._returns and self._returns[0][0] <= now_s:
                self._take_tokens(*self._returns.popleft())
            while pending and pending[0].time_s <= now_s:
                self._add(num_requests - len(pending), pending.popleft())
            now_s = self._issue_plans(now_s)
        assert not self._scheduler.has_work, "nothing in flight, and yet something to do"
        return self._report(begin_s)

    def _add(self, index: int, arrival: Arrival) -> None:
        if not self._scheduler.has_work:
            self._work_since_s = arrival.time_s
        # More than is planned before the stop is seen: so the scheduler cannot know of it. Only
        # where the cache holds no more does the answer end where the scheduler says.
        scheduler, num_output = self._scheduler, arrival.num_output_tokens
        room = scheduler.limits.capacity_tokens - arrival.num_prompt_tokens
        max_tokens = max(num_output, min(num_output + scheduler.run_ahead + 2, room))
        scheduler.add(_Answer(index, arrival, max_tokens))

    def _take_tokens(self, now_s: float, plan: Plan) -> None:
        for sequence, _ in self._scheduler.complete(plan.number, [0] * plan.num_rows):
            assert isinstance(sequence, _Answer)
            num_drawn = len(sequence.output_ids)
            if num_drawn == 1:
                sequence.first_s = now_s
            elif now_s - sequence.last_s > sequence.longest_gap_s:
                sequence.longest_gap_s = now_s - sequence.last_s
            sequence.last_s = now_s
            is_full = sequence.num_tokens == sequence.max_total_tokens
            if num_drawn == sequence.num_to_draw or is_full:
                self._scheduler.finish(sequence)
                self._note(sequence)

    def _note(self, answer: _Answer) -> None:
        num_output = answer.num_output_tokens
        self._num_output_tokens += num_output
        self._num_prompt_tokens += answer.num_prompt_tokens
        self._last_s = answer.last_s
        self._ttft_s.append(answer.first_s - answer.arrival_s)
        if num_output > 1:
            self._tpot_s.append((answer.last_s - answer.first_s) / (num_output - 1))
            self._max_gap_s.append(answer.longest_gap_s)

    def _issue_plans(self, now_s: float) -> float:
        """Make all plans that can be made; when the coordinator is through with it."""
        while (plan := self._scheduler.next_plan()) is not None:
            now_s += self._timing.host_s
            left_s = self._execute(plan, now_s + self._timing.latency_s)
            self._left_s.append(left_s)
            self._returns.append((left_s + self._timing.latency_s, plan))
            self._num_steps += plan.num_rows
        return now_s

    def _execute(self, plan: Plan, plan_at_s: float) -> float:
        """Send a plan through the stages; when it leaves the last one.

        Stages execute plans in order, so all that decides the times of this one is known.
        """
        hop_s, work_since_s = self._timing.hop_s, self._work_since_s
        size = len(plan.decodes), plan.num_prefill_tokens, plan.num_context_tokens
        times_s = [time_s(*size) for time_s in self._kinds]
        end_s = -hop_s
        if plan.feedback >= 0 and len(self._stages) > 1:
            end_s = self._left_s[plan.feedback]
        for stage in self._stages:
            end_s = stage.run(times_s[stage.kind], plan_at_s, end_s + hop_s, work_since_s)
        return end_s

    def _report(self, begin_s: float) -> Report:
        return Report(
            num_requests=len(self._ttft_s),
            num_output_tokens=self._num_output_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            num_plans=len(self._left_s),
            num_sequence_steps=self._num_steps,
            num_preemptions=self._scheduler.stats()["num_preemptions"],
            makespan_s=self._last_s - begin_s if self._ttft_s else 0.0,
            ttft_s=percentiles(self._ttft_s),
            tpot_s=percentiles(self._tpot_s),
            max_gap_s=percentiles(self._max_gap_s),
            stages=[
                StageTimes(
                    busy_s=stage.busy_s,
                    wait_input_s=stage.wait_input_s,
                    host_gap_s=stage.host_gap_s,
                )
                for stage in self._stages
            ],
        )


def percentiles(values: Iterable[float]) -> dict[int, float]:
    """The smallest value that is not exceeded by 50, 90 and 99 in a hundred; 0 of none."""
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(_PERCENTILES, 0.0)
    return {p: ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in _PERCENTILES}
