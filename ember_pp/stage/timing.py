"""Where the time of a stage goes: every nanosecond of the working thread, in exactly one state.

    busy         computing, copying, packing: whatever is not one of the below
    wait_input   for hidden states of the previous stage, or for feedback of the last one
    wait_output  for the next stage to give a slot of its ring back
    host_gap     for a plan, while the coordinator had sequences
    idle         for a plan, while it had none

The clock is in one state at a time and each switch closes the one before, so nothing is counted
twice and the parts add up to the time since the start. Whether a wait for a plan was a gap or
idleness is known when the plan comes (``Execute.after_idle``); until then it is *open*, in no
total. A switch costs well under a microsecond, so it is always on.

The worker thread alone switches; ``totals`` may be asked for by any thread. Where both edges of a
stage wait on the host, times are those of its thread. Where both wait on the device, kernels write
the card's time on both sides of each wait; once a plan is done, ``count`` goes through the same
states with those times, in place of the host's switches.
"""

from __future__ import annotations

import array
import dataclasses
import enum
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ember_pp import protocol

_MAX_BUFFERED_PLANS = 512
_MAX_BUFFERED_NS = 250_000_000


class StageState(enum.IntEnum):
    """What the working thread does; the numbers are those of ``StageTrace.waits``."""

    BUSY = 0
    WAIT_INPUT = 1
    WAIT_OUTPUT = 2
    HOST_GAP = 3
    IDLE = 4


_AWAIT_PLAN = 5  # HOST_GAP or IDLE, not known yet which
BUSY, WAIT_INPUT, WAIT_OUTPUT = (
    int(StageState.BUSY),
    int(StageState.WAIT_INPUT),
    int(StageState.WAIT_OUTPUT),
)  # plain numbers: a switch is on the path of every plan


_LAUNCH_GAP_NS = 10_000
"""From one plan to the next a device needs this long at most if both are enqueued: that is no wait
for a plan."""


class PlanTimes(NamedTuple):
    """When a device did what of a plan, in ns; 0: it had nothing of the kind to do.

    In this order, but that feedback comes before ``began`` on the first stage.
    """

    feedback_wait: int
    """Ready for feedback; on the first stage."""
    feedback_there: int
    began: int
    input_wait: int
    """Ready for the hidden states of the previous stage; not on the first."""
    input_there: int
    output_wait: int
    """The layers, and what follows them, are done: ready for a free slot of the next stage."""
    output_there: int
    """The slot was free."""
    done: int
    """What is handed on is in the slot."""

    def later_by(self, offset_ns: int) -> PlanTimes:
        """By another clock, which shows ``offset_ns`` more."""
        return PlanTimes(*(time_ns and time_ns + offset_ns for time_ns in self))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """Totals since the start of the clock, at one moment."""

    busy_ns: int
    wait_input_ns: int
    wait_output_ns: int
    host_gap_ns: int
    idle_ns: int
    open_ns: int
    """The wait for a plan that is going on."""
    elapsed_ns: int
    """All of the above together."""


class StageClock:
    """Time of one working thread, partitioned.

    Args:
        now_ns: the clock; ``time.monotonic_ns`` is one for all processes of a host.
    """

    __slots__ = (
        "_now_ns",
        "_num_open",
        "_since_ns",
        "_state",
        "_totals_ns",
        "_version",
        "recorder",
    )

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.recorder: PlanRecorder | None = None
        """Takes the times of every plan and wait, for a trace; None: totals only."""
        self._now_ns = now_ns
        self._totals_ns = [0] * (_AWAIT_PLAN + 1)
        self._state = _AWAIT_PLAN
        self._num_open = 0  # plans that have begun and not ended
        self._version = 0  # odd while the fields above and below do not fit each other
        self._since_ns = now_ns()

    def start(self, recorder: PlanRecorder | None = None) -> None:
        """Count from now on: the stage waits for its first plan."""
        self.recorder = recorder
        self._version += 1
        self._totals_ns = [0] * (_AWAIT_PLAN + 1)
        self._state = _AWAIT_PLAN
        self._num_open = 0
        self._since_ns = self._now_ns()
        self._version += 1

    def break_off(self) -> None:
        """What was begun will not end: the stage waits for its first plan again; totals go on."""
        if self._state != _AWAIT_PLAN:
            self._switch(self._state, _AWAIT_PLAN, self._now_ns())
        self._num_open = 0
        self.recorder = None

    def begin_plan(self, *, after_idle: bool) -> None:
        """A plan has come: close the wait for it, unless the device is still at one before."""
        began_ns = None
        if self._state == _AWAIT_PLAN:
            waited_in = StageState.IDLE if after_idle else StageState.HOST_GAP
            self._switch(int(waited_in), BUSY, self._now_ns())
            began_ns = self._since_ns
        self._num_open += 1
        if self.recorder is not None:
            self.recorder.begin(self._now_ns() if began_ns is None else began_ns)

    def end_plan(self, plan: int) -> None:
        """The plan is done: what comes now is the wait for the next, unless one has begun."""
        self._num_open -= 1
        self._switch(self._state, BUSY if self._num_open else _AWAIT_PLAN, self._now_ns())
        if self.recorder is not None:
            self.recorder.end(plan, self._since_ns)

    def enter(self, state: int) -> int:
        """Go to ``BUSY``, ``WAIT_INPUT`` or ``WAIT_OUTPUT``; returns the state before.

        Between plans there is nothing to tell apart (a probe waits, too): then it does nothing.
        """
        before = self._state
        if before != _AWAIT_PLAN:
            self._switch(before, state, self._now_ns())
        return before

    def count(self, plan: int, times: PlanTimes, *, after_idle: bool) -> None:
        """A plan that the device is done with: in place of all switches of the host for it.

        ``times`` are by the clock of the host; what was before the last plan's end counts as then.
        """
        began_ns = times.feedback_wait or times.began
        waited_in = StageState.IDLE if after_idle else StageState.HOST_GAP
        if began_ns - self._since_ns < _LAUNCH_GAP_NS and not after_idle:
            waited_in = StageState.BUSY
        self._switch(int(waited_in), BUSY, began_ns)
        began_ns = self._since_ns
        for state, since_ns, until_ns in (
            (WAIT_INPUT, times.feedback_wait, times.feedback_there),
            (WAIT_INPUT, times.input_wait, times.input_there),
            (WAIT_OUTPUT, times.output_wait, times.output_there),
        ):
            if since_ns and until_ns:
                self._switch(BUSY, state, since_ns)
                self._switch(state, BUSY, until_ns)
        self._switch(BUSY, _AWAIT_PLAN, times.done)
        if self.recorder is not None:
            self.recorder.begin(began_ns)
            self.recorder.received_ns = times.input_there or times.feedback_there
            self.recorder.sent_ns = times.done
            self.recorder.end(plan, self._since_ns)

    def mark_received(self) -> None:
        """The input of the plan is there; the last mark of a plan counts. For the trace only."""
        if self.recorder is not None:
            self.recorder.received_ns = self._now_ns()

    def mark_sent(self) -> None:
        """The output of the plan is about to be seen by the next stage. For the trace only."""
        if self.recorder is not None:
            self.recorder.sent_ns = self._now_ns()

    def totals(self) -> StageTimes:
        """All parts now. Any thread."""
        while True:
            version = self._version
            totals_ns, state, since_ns = self._totals_ns.copy(), self._state, self._since_ns
            now_ns = self._now_ns()
            if version % 2 == 0 and version == self._version:
                break
            time.sleep(0)  # let the worker finish its switch
        totals_ns[state] += now_ns - since_ns
        return StageTimes(
            busy_ns=totals_ns[StageState.BUSY],
            wait_input_ns=totals_ns[StageState.WAIT_INPUT],
            wait_output_ns=totals_ns[StageState.WAIT_OUTPUT],
            host_gap_ns=totals_ns[StageState.HOST_GAP],
            idle_ns=totals_ns[StageState.IDLE],
            open_ns=totals_ns[_AWAIT_PLAN],
            elapsed_ns=sum(totals_ns),
        )

    def _switch(self, closed_as: int, state: int, now_ns: int) -> None:
        self._version += 1
        since_ns = self._since_ns
        now_ns = max(now_ns, since_ns)  # two clocks are related to some microseconds only
        self._totals_ns[closed_as] += now_ns - since_ns
        self._state = state
        self._since_ns = now_ns
        self._version += 1
        if self.recorder is not None and closed_as != BUSY:
            self.recorder.wait(closed_as, since_ns, now_ns)


class PlanRecorder:
    """Times of plans and waits, in packed batches of bounded size.

    Args:
        stage_index: of this stage.
        epoch: of its plans.
        post: takes a batch, from the worker thread, at the end of a plan.
    """

    def __init__(
        self, stage_index: int, epoch: int, post: Callable[[protocol.StageTrace], None]
    ) -> None:
        self._stage_index = stage_index
        self._epoch = epoch
        self._post = post
        self._plans = array.array("q")
        self._waits = array.array("q")
        self._num_plans = 0
        self._posted_ns = 0
        self._began_ns: deque[int] = deque()  # of the plans that have not ended
        self._ended_ns = 0
        self.received_ns = 0
        self.sent_ns = 0

    def begin(self, now_ns: int) -> None:
        """A plan has come."""
        self._began_ns.append(now_ns)
        self.received_ns = self.sent_ns = 0

    def wait(self, state: int, start_ns: int, end_ns: int) -> None:
        """A wait is over."""
        self._waits.extend((state, start_ns, end_ns))

    def end(self, plan: int, now_ns: int) -> None:
        """The plan is done; every now and then this posts a batch."""
        began_ns = max(self._began_ns.popleft(), self._ended_ns)  # plans are done one by one
        self._ended_ns = now_ns
        self._plans.extend((plan, began_ns, self.received_ns, self.sent_ns, now_ns))
        self._num_plans += 1
        if self._num_plans >= _MAX_BUFFERED_PLANS or now_ns - self._posted_ns > _MAX_BUFFERED_NS:
            self._posted_ns = now_ns
            self._post(self.take())

    def take(self) -> protocol.StageTrace:
        """What has not been posted; only while the worker thread is not in a plan."""
        plans, waits = self._plans, self._waits
        self._plans, self._waits, self._num_plans = array.array("q"), array.array("q"), 0
        return protocol.StageTrace(
            epoch=self._epoch,
            stage_index=self._stage_index,
            plans=protocol.pack_i64(plans),
            waits=protocol.pack_i64(waits),
        )
