"""A timeline as a Gantt chart: a row per stage, plans by kind, waits as pale gaps."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from types import MappingProxyType

from ember_pp.coordinator.drawing import Drawing, Line, Rectangle, Words
from ember_pp.coordinator.trace import (
    BUSY,
    HOST_GAP,
    IDLE,
    WAIT_INPUT,
    WAIT_OUTPUT,
    PlanSlice,
    StageRow,
    Timeline,
)

NUM_PLANS_SHOWN = 48

_LEFT, _RIGHT, _TOP, _BOTTOM = 150.0, 150.0, 104.0, 54.0
_PLOT_WIDTH = 1100.0
_COORDINATOR_HEIGHT = 14.0
_ROW_HEIGHT, _ROW_GAP = 34.0, 16.0
_MIN_LABEL_WIDTH = 22.0
_MIN_WIDTH = 0.5
"""Narrower slices are drawn together with their neighbours."""

_PLAN_COLOURS = MappingProxyType({"decode": "#2f6fb2", "prefill": "#e08a1e", "mixed": "#5b9a52"})
_WAIT_COLOURS = MappingProxyType(
    {WAIT_INPUT: "#e4e6ea", WAIT_OUTPUT: "#f4d9b5", HOST_GAP: "#f2b8c0", IDLE: "#f8f9fa"}
)
_WAIT_NAMES = MappingProxyType(
    {WAIT_INPUT: "no input", WAIT_OUTPUT: "no slot", HOST_GAP: "no plan", IDLE: "idle"}
)
_GREY, _DARK = "#6b7280", "#1f2937"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Captions:
    """What the picture says in words."""

    title: str
    conditions: str
    rows: list[str]
    """A second line under the name of each row."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Scale:
    start_ns: int
    end_ns: int

    def x(self, time_ns: int) -> float:
        """Horizontal place of a moment, clipped to the window."""
        share = (time_ns - self.start_ns) / (self.end_ns - self.start_ns)
        return _LEFT + _PLOT_WIDTH * min(1.0, max(0.0, share))

    def holds(self, start_ns: int, end_ns: int) -> bool:
        """Whether any of a slice is in the window."""
        return end_ns > self.start_ns and start_ns < self.end_ns


def draw(timeline: Timeline, captions: Captions, window_s: float | None) -> Drawing:
    """The picture; with a trace that holds no plan, it says so."""
    num_rows = len(timeline.rows)
    rows_height = num_rows * (_ROW_HEIGHT + _ROW_GAP) + _COORDINATOR_HEIGHT + _ROW_GAP
    drawing = Drawing(_LEFT + _PLOT_WIDTH + _RIGHT, _TOP + rows_height + _BOTTOM)
    scale = _Scale(*choose_window(timeline, window_s))
    _draw_heading(drawing, timeline, captions, scale)
    if scale.end_ns <= scale.start_ns:
        drawing.add(Words(_LEFT, _TOP + 20, "No plan was traced.", 14, _GREY))
        return drawing
    _draw_axis(drawing, scale, _TOP + rows_height)
    _draw_coordinator(drawing, timeline, scale)
    for index, row in enumerate(timeline.rows):
        _draw_row(drawing, row, scale, _row_top(index), captions.rows[index])
    for index, (sender, receiver) in enumerate(itertools.pairwise(timeline.rows)):
        if sender.replica == receiver.replica:
            _draw_handoffs(drawing, sender, receiver, scale, _row_top(index) + _ROW_HEIGHT)
    return drawing


def choose_window(timeline: Timeline, window_s: float | None) -> tuple[int, int]:
    """What is shown: all of a short run, else a stretch around its middle plan.

    Without ``window_s``, as long as ``NUM_PLANS_SHOWN`` plans take on the first stage.
    """
    start_ns, end_ns = timeline.window_ns
    plans = timeline.rows[0].plans if timeline.rows else []
    if not plans:
        return start_ns, end_ns
    middle = len(plans) // 2
    if window_s is not None:
        half_ns = round(window_s * 1e9 / 2)
        if 2 * half_ns >= end_ns - start_ns:
            return start_ns, end_ns
        middle_ns = plans[middle].start_ns
        left_ns = min(max(start_ns, middle_ns - half_ns), end_ns - 2 * half_ns)
        return left_ns, left_ns + 2 * half_ns
    if len(plans) <= NUM_PLANS_SHOWN * 5 // 4:
        return start_ns, end_ns
    shown = plans[middle - NUM_PLANS_SHOWN // 2 : middle + NUM_PLANS_SHOWN // 2]
    return shown[0].start_ns, shown[-1].end_ns


def _row_top(index: int) -> float:
    return _TOP + _COORDINATOR_HEIGHT + _ROW_GAP + index * (_ROW_HEIGHT + _ROW_GAP)


def _draw_heading(drawing: Drawing, timeline: Timeline, captions: Captions, scale: _Scale) -> None:
    drawing.add(
        Words(24, 32, captions.title, 18, _DARK, is_bold=True),
        Words(24, 52, captions.conditions, 12, _GREY),
    )
    x = _LEFT
    for name, colour in _PLAN_COLOURS.items():
        x = _draw_key(drawing, x, name, colour)
    x += 14
    for state, colour in _WAIT_COLOURS.items():
        x = _draw_key(drawing, x, _WAIT_NAMES[state], colour)
    first_ns, last_ns = timeline.window_ns
    if scale.end_ns > scale.start_ns:
        shown_s, all_s = (scale.end_ns - scale.start_ns) / 1e9, (last_ns - first_ns) / 1e9
        is_all = (scale.start_ns, scale.end_ns) == (first_ns, last_ns)
        part = "the whole run" if is_all else f"{shown_s:.3g} s of {all_s:.3g} s"
        drawing.add(Words(_LEFT + _PLOT_WIDTH, 80, f"shown: {part}", 11, _GREY, "end"))
    drawing.add(
        Words(_LEFT + _PLOT_WIDTH + 16, _TOP + 2, "bubble", 12, _DARK, is_bold=True),
        Words(_LEFT + _PLOT_WIDTH + 16, _TOP + 16, "of the time shown", 10, _GREY),
    )


def _draw_key(drawing: Drawing, x: float, name: str, colour: str) -> float:
    drawing.add(
        Rectangle(x, 70, 14, 12, colour),
        Words(x + 20, 80, name, 12, _DARK),
    )
    return x + 36 + 6.4 * len(name)


def _draw_axis(drawing: Drawing, scale: _Scale, bottom: float) -> None:
    span_ms = (scale.end_ns - scale.start_ns) / 1e6
    step_ms = _tick_step(span_ms / 10)
    digits = max(0, -math.floor(math.log10(step_ms)))
    for tick in range(math.floor(span_ms / step_ms + 1e-9) + 1):
        x = _LEFT + _PLOT_WIDTH * tick * step_ms / span_ms
        label = f"{tick * step_ms:.{digits}f}"
        drawing.add(
            Line(x, _TOP - 4, x, bottom, "#eceef1"),
            Words(x, bottom + 16, label, 11, _GREY, "middle"),
        )
    drawing.add(
        Line(_LEFT, bottom, _LEFT + _PLOT_WIDTH, bottom, "#9ca3af"),
        Words(_LEFT + _PLOT_WIDTH / 2, bottom + 36, "ms", 12, _GREY, "middle"),
    )


def _tick_step(least: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least - 1e-12)


def _draw_coordinator(drawing: Drawing, timeline: Timeline, scale: _Scale) -> None:
    top = _TOP
    drawing.add(
        Words(_LEFT - 14, top + 11, "coordinator", 13, _DARK, "end"),
        Line(_LEFT, top + 7, _LEFT + _PLOT_WIDTH, top + 7, "#d1d5db"),
    )
    for plan in itertools.chain.from_iterable(timeline.plans):
        if scale.start_ns <= plan.issued_ns <= scale.end_ns:
            x = scale.x(plan.issued_ns)
            drawing.add(Line(x, top, x, top + _COORDINATOR_HEIGHT, _PLAN_COLOURS[plan.kind], 1.5))


def _draw_row(drawing: Drawing, row: StageRow, scale: _Scale, top: float, caption: str) -> None:
    name = f"stage {row.stage_index}"
    if row.replica:
        name = f"replica {row.replica}, {name}"
    drawing.add(
        Words(_LEFT - 14, top + 15, name, 13, _DARK, "end"),
        Words(_LEFT - 14, top + 29, caption, 10, _GREY, "end"),
        Rectangle(_LEFT, top, _PLOT_WIDTH, _ROW_HEIGHT, _WAIT_COLOURS[IDLE]),
    )
    last: Rectangle | None = None
    for start_ns, end_ns, fill, plan in _slices(row, scale):
        x = scale.x(start_ns)
        width = scale.x(end_ns) - x
        if last is not None and width < _MIN_WIDTH and last.fill == fill and last.x + 1 > x:
            continue
        title = "" if plan is None else _title(plan)
        last = Rectangle(x, top, max(width, _MIN_WIDTH), _ROW_HEIGHT, fill, title)
        drawing.add(last)
        if plan is not None and width >= 3:
            drawing.add(Line(x, top, x, top + _ROW_HEIGHT, "#ffffff"))
        if plan is not None and width >= _MIN_LABEL_WIDTH:
            label = Words(x + width / 2, top + 21, str(plan.facts.number), 10, "#ffffff", "middle")
            drawing.add(label)
    _draw_shares(drawing, row, scale, top)


def _slices(row: StageRow, scale: _Scale) -> list[tuple[int, int, str, PlanSlice | None]]:
    """Plans with their preparation, and waits on top of them where a plan waited for a slot."""
    prepared = [
        (plan.came_ns, plan.paused_ns, _PLAN_COLOURS[plan.facts.kind], None)
        for plan in row.plans
        if plan.paused_ns > plan.came_ns and scale.holds(plan.came_ns, plan.paused_ns)
    ]
    plans = [
        (plan.start_ns, plan.end_ns, _PLAN_COLOURS[plan.facts.kind], plan)
        for plan in row.plans
        if scale.holds(plan.start_ns, plan.end_ns)
    ]
    waits = [
        (wait.start_ns, wait.end_ns, _WAIT_COLOURS[wait.state], None)
        for wait in row.waits
        if scale.holds(wait.start_ns, wait.end_ns)
    ]
    return [*prepared, *plans, *waits]


def _draw_shares(drawing: Drawing, row: StageRow, scale: _Scale, top: float) -> None:
    shares = row.shares(scale.start_ns, scale.end_ns)
    x = _LEFT + _PLOT_WIDTH + 16
    parts = (
        f"in {shares[WAIT_INPUT]:.1%}  slot {shares[WAIT_OUTPUT]:.1%}  host {shares[HOST_GAP]:.1%}"
    )
    drawing.add(
        Words(x, top + 16, f"{1 - shares[BUSY]:.1%}", 14, _DARK, is_bold=True),
        Words(x, top + 30, parts, 9, _GREY),
    )


def _draw_handoffs(
    drawing: Drawing, sender: StageRow, receiver: StageRow, scale: _Scale, top: float
) -> None:
    """Thin lines across the gap between two rows, one for each plan."""
    numbers = [plan.facts.number for plan in receiver.plans]
    for plan in sender.plans:
        if not scale.start_ns <= plan.sent_ns <= scale.end_ns:
            continue
        index = bisect.bisect_left(numbers, plan.facts.number)
        if index < len(numbers) and numbers[index] == plan.facts.number:
            target = receiver.plans[index]
            if target.start_ns <= scale.end_ns:
                ends = scale.x(plan.sent_ns), scale.x(max(target.start_ns, target.received_ns))
                drawing.add(Line(ends[0], top + 1, ends[1], top + _ROW_GAP - 1, "#9ca3af"))


def _title(plan: PlanSlice) -> str:
    facts = plan.facts
    return (
        f"plan {facts.number}, micro-batch {facts.microbatch}: {facts.num_decodes} decodes, "
        f"{facts.num_prefill_tokens} prompt tokens, {facts.num_sequences} sequences; "
        f"{(plan.end_ns - plan.start_ns) / 1e6:.2f} ms"
    )
