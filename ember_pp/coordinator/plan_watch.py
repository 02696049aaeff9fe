"""Whether plans take longer than they should, and which stage is to blame. Pure; times are given.

The oldest plan in flight is *overdue* once ``limit_s`` has gone by since it was issued, or since
the plan before it came back, if that was later. The limit is ``max(min_s, factor * predicted)``.

Predicted is what the cost model says of the slowest stage, for each stage of the pipeline,
times a correction: how much longer than that plans took lately, the worst of the last few. The
model knows no host, no other process on the card, and CPUs only where they were measured. So
before the first plan is back, it is assumed to be wrong by a factor of ten.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable

from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.policy import PlanTime
from ember_pp.coordinator.stage_state import StageState

_FIRST_CORRECTION = 10.0
_FORGETTING = 0.9  # of a correction, by each plan that needed less
_ROUGH_S_PER_TOKEN = 0.01  # of a stage nobody has measured: a slow CPU's


@dataclasses.dataclass(slots=True)
class _Watched:
    number: int
    predicted_s: float
    """Without the correction."""
    issued_at_s: float


class PlanWatch:
    """The plans in flight, and how long each may take.

    Args:
        min_s, factor: of the limit, see above.
        num_stages: that a plan goes through.
        plan_time_s: predicted seconds on the slowest stage, from (decode rows, prompt tokens,
            context tokens); None: nobody knows, and a rough time per token is taken.
    """

    def __init__(
        self, *, min_s: float, factor: float, num_stages: int, plan_time_s: PlanTime | None
    ) -> None:
        self._min_s = min_s
        self._factor = factor
        self._num_stages = num_stages
        self._plan_time_s = plan_time_s
        self._correction = _FIRST_CORRECTION
        self._in_flight: deque[_Watched] = deque()
        self._returned_at_s = 0.0

    def forget(self) -> None:
        """A new epoch: nothing is in flight, and first plans take long again."""
        self._in_flight.clear()
        self._correction = max(self._correction, _FIRST_CORRECTION)

    def issue(self, plan: Plan, now_s: float) -> None:
        """A plan goes to the stages."""
        self._in_flight.append(_Watched(plan.number, self._predict_s(plan), now_s))

    def complete(self, now_s: float) -> None:
        """The oldest plan is back."""
        plan = self._in_flight.popleft()
        took_s = now_s - self._began_at_s(plan)
        self._correction = max(took_s / plan.predicted_s, self._correction * _FORGETTING)
        self._returned_at_s = now_s

    @property
    def oldest(self) -> int | None:
        """Number of the plan that is due."""
        return self._in_flight[0].number if self._in_flight else None

    @property
    def overdue_at_s(self) -> float | None:
        """From when on the oldest plan is overdue; None: nothing is in flight."""
        if not self._in_flight:
            return None
        oldest = self._in_flight[0]
        return self._began_at_s(oldest) + self._limit_s(oldest)

    def waited_s(self, now_s: float) -> float:
        """How long the oldest plan has been at work."""
        return now_s - self._began_at_s(self._in_flight[0]) if self._in_flight else 0.0

    @property
    def longest_limit_s(self) -> float:
        """What any plan in flight may take: a stage may have begun with any of them."""
        return max(map(self._limit_s, self._in_flight), default=self._min_s)

    def _began_at_s(self, plan: _Watched) -> float:
        return max(plan.issued_at_s, self._returned_at_s)

    def _limit_s(self, plan: _Watched) -> float:
        return max(self._min_s, self._factor * self._correction * plan.predicted_s)

    def _predict_s(self, plan: Plan) -> float:
        sizes = len(plan.decodes), plan.num_prefill_tokens, plan.num_context_tokens
        if self._plan_time_s is None:
            return self._num_stages * _ROUGH_S_PER_TOKEN * (sizes[0] + sizes[1])
        return self._num_stages * self._plan_time_s(*sizes)


def who_is_late(stages: Iterable[StageState], epoch: int, plan: int) -> StageState | None:
    """The first stage that has not finished ``plan`` though all before it have.

    None if it says that it waits for an edge, or if all have finished: then what failed lies
    between processes. ``stages`` are in the order of the pipeline.
    """
    for stage in stages:
        if stage.last_finished_plan(epoch) < plan:
            return None if stage.waiting_for(epoch) else stage
    return None
