"""A stream on which things still happen while the stage's stream waits.

Streams share a few queues of the hardware, and behind a wait nothing in its queue goes on: a write
that is to end the wait may be stuck behind it. Which streams share a queue nobody says; so it is
tried.
"""

from __future__ import annotations

import ctypes
import time

from ember_pp.errors import HandoffError
from ember_pp.kernels.driver import WAIT_GEQ, driver, error_text

_MAX_TRIES = 32
_PATIENCE_S = 0.02
_NON_BLOCKING, _HIGHEST_PRIORITY = 1, -5  # the driver takes the highest that there is


def open_side_stream(stage_stream: int, scratch: int) -> int:
    """A stream that does not share a queue with ``stage_stream``, which must be idle.

    Args:
        stage_stream: waits while candidates are tried.
        scratch: address of a word of device memory that is 0, and is used up.

    Raises:
        HandoffError: the driver refused, or there is no such stream.
    """
    value, candidates = 1, []
    _call("cuStreamWaitValue32_v2", stage_stream, scratch, value, WAIT_GEQ)
    for _ in range(_MAX_TRIES):
        stream = ctypes.c_void_p()
        _call("cuStreamCreateWithPriority", ctypes.byref(stream), _NON_BLOCKING, _HIGHEST_PRIORITY)
        candidates.append(stream)
        _call("cuStreamWriteValue32_v2", stream, scratch, value, 0)
        if not _is_released(stage_stream):
            continue
        value += 1  # again: it may have been another candidate's write that came late
        _call("cuStreamWaitValue32_v2", stage_stream, scratch, value, WAIT_GEQ)
        _call("cuStreamWriteValue32_v2", stream, scratch, value, 0)
        if _is_released(stage_stream):
            for other in candidates[:-1]:
                _call("cuStreamDestroy_v2", other)
            assert stream.value is not None, "made above"
            return stream.value
    raise HandoffError(
        f"none of {_MAX_TRIES} streams runs while the stage's stream waits: a wait could not be "
        "ended; raise CUDA_DEVICE_MAX_CONNECTIONS"
    )


def _is_released(stream: int) -> bool:
    deadline_s = time.monotonic() + _PATIENCE_S
    while driver().cuStreamQuery(stream):
        if time.monotonic() > deadline_s:
            return False
    return True


def _call(name: str, *arguments: object) -> None:
    status = getattr(driver(), name)(*arguments)
    if status:
        raise HandoffError(f"{name}: {error_text(status)}")
