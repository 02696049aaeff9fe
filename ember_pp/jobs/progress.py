"""What a batch shows: one line of progress while it runs, a closing table at the end.

On a terminal the progress line is updated in place; elsewhere a new line comes every 10 s, so
that a log file stays readable. Neither knows where requests come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

TERMINAL_INTERVAL_S = 0.2
LOG_INTERVAL_S = 10.0


@dataclasses.dataclass(slots=True)
class Tally:
    """Counts of requests that ended, and of their tokens."""

    num_ok: int = 0
    num_failed: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0

    def add(self, other: Tally) -> None:
        """Count ``other`` in."""
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


class Progress:
    """The progress line of one run, on ``stream``.

    ``clock`` gives seconds from any start. A stream that is gone or full ends the display,
    not the job.
    """

    def __init__(
        self, stream: TextIO, *, num_total: int, clock: Callable[[], float], is_terminal: bool
    ) -> None:
        self._stream = stream
        self._num_total = num_total
        self._clock = clock
        self._is_terminal = is_terminal
        self._interval_s = TERMINAL_INTERVAL_S if is_terminal else LOG_INTERVAL_S
        self._next_s = clock()
        self._running_since_s: float | None = None
        self._is_line_open = False

    def show_loading(self, status: Mapping[str, Any]) -> None:
        """The phase of the coordinator and its stages, before the first answer."""
        if self._is_due():
            self._show(loading_line(status))

    def show_running(self, tally: Tally, *, num_open: int, is_final: bool = False) -> None:
        """How far the requests are; ``tally`` counts only what is durable."""
        if self._running_since_s is None:
            self._running_since_s = self._clock()
        if self._is_due() or is_final:
            elapsed_s = self._clock() - self._running_since_s
            self._show(running_line(tally, self._num_total, num_open, elapsed_s))

    def note(self, text: str) -> None:
        """A line that stays."""
        self._end_line()
        self._write(f"{text}\n")

    def close(self) -> None:
        """Leave the last progress line as it is."""
        self._end_line()

    def _is_due(self) -> bool:
        now_s = self._clock()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + self._interval_s
        return True

    def _show(self, text: str) -> None:
        if not self._is_terminal:
            self._write(f"{text}\n")
            return
        width = shutil.get_terminal_size().columns - 1
        self._write(f"\r{text[:width]}\x1b[K")
        self._is_line_open = True

    def _end_line(self) -> None:
        if self._is_line_open:
            self._write("\n")
            self._is_line_open = False

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def loading_line(status: Mapping[str, Any]) -> str:
    """E.g. ``loading: stage 0 weights 1.2/4.0 GB, stage 1 weights 0.9/4.1 GB``."""
    parts = []
    for stage in status.get("stages", ()):
        phase = stage.get("phase", "starting")
        done, total = stage.get("num_done", 0), stage.get("num_total", 0)
        amount = f" {_bytes_of(done, total)}" if total else ""
        parts.append(f"stage {stage.get('stage_index', '?')} {phase}{amount}")
    phase = status.get("phase", "starting")
    return f"{phase}: {', '.join(parts)}" if parts else f"{phase} ..."


def running_line(tally: Tally, num_total: int, num_open: int, elapsed_s: float) -> str:
    """E.g. ``1,203/20,000 done, 2 failed, 512 open, 1,850 tokens/s, 4 min 10 s left``."""
    num_done = tally.num_ok + tally.num_failed
    parts = [f"{num_done:,}/{num_total:,} done"]
    if tally.num_failed:
        parts.append(f"{tally.num_failed:,} failed")
    parts.append(f"{num_open:,} open")
    if num_done and elapsed_s >= 1.0:
        parts.append(f"{tally.num_output_tokens / elapsed_s:,.0f} tokens/s")
        left_s = (num_total - num_done) * elapsed_s / num_done
        parts.append(f"{duration(left_s)} left")
    return ", ".join(parts)


def counted(count: int, noun: str) -> str:
    """E.g. ``1 line``, ``1,200 lines``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """E.g. ``8.5 s``, ``4 min 10 s``, ``3 h 20 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def closing_table(
    tally: Tally,
    *,
    num_answered_before: int,
    num_left: int,
    loading_s: float,
    elapsed_s: float,
    files: Mapping[str, str],
    status: Mapping[str, Any] | None,
) -> str:
    """Requests, tokens and times of the run, where the files are, and a row per stage.

    ``elapsed_s`` is the wall time from the stages being ready, which took ``loading_s``, to the
    last durable answer; ``status`` is what the coordinator said last, None when there was none.
    """
    requests = [f"{tally.num_ok:,} answered", f"{tally.num_failed:,} failed"]
    if num_answered_before:
        requests.append(f"{num_answered_before:,} answered by an earlier run")
    if num_left:
        requests.append(f"{num_left:,} left")
    rate = tally.num_output_tokens / elapsed_s if elapsed_s > 0 else 0.0
    rows = [
        ("requests", ", ".join(requests)),
        (
            "tokens",
            f"{tally.num_prompt_tokens:,} prompt ({tally.num_cached_tokens:,} from the prefix "
            f"cache), {tally.num_output_tokens:,} output",
        ),
        (
            "time",
            f"{duration(elapsed_s)} after {duration(loading_s)} of loading, "
            f"{rate:,.1f} output tokens/s",
        ),
        *files.items(),
    ]
    lines = [f"{name:<10}{text}" for name, text in rows]
    stages = (status or {}).get("stages")
    if stages:
        lines += ["", *stage_table(stages)]
    return "\n".join(lines)


def stage_table(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row per stage: device, layers ``[start, end)``, memory in MB (10**6 bytes), and where its
    time went while there was work."""
    sizes = ("weights MB", "KV MB", "peak MB")
    header = ("stage", "device", "layers", *sizes, "busy", "no input", "no slot", "no plan")
    rows = [header, *(_stage_row(stage) for stage in stages)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def _stage_row(stage: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (
        stage.get(f"{state}_fraction")
        for state in ("busy", "wait_input", "wait_output", "host_gap")
    )
    return (
        str(stage.get("stage_index", "?")),
        str(stage.get("device", "?")),
        _layers(stage),
        *(_megabytes(stage.get(key)) for key in ("weight_bytes", "kv_bytes", "peak_bytes")),
        *("-" if share is None else f"{share:.1%}" for share in shares),
    )


def _layers(stage: Mapping[str, Any]) -> str:
    start, end = stage.get("start_layer"), stage.get("end_layer")
    if start is None or end is None:
        return "?"
    return f"{start}-{end - 1}" if end > start else "none"


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:,.1f}"


def _bytes_of(done: int, total: int) -> str:
    if total < 1_000_000:
        return f"{done:,}/{total:,}"
    unit, name = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    return f"{done / unit:.1f}/{total / unit:.1f} {name}"
