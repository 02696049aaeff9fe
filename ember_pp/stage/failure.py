"""The last words of a stage: an exception as ``StageFailed``. Torch-free."""

from __future__ import annotations

import traceback

from ember_pp.errors import CapacityError, EmberError
from ember_pp.protocol import StageFailed

# torch raises plain RuntimeErrors for host memory; this is what its allocator writes.
_HOST_ALLOCATION_FAILED = "can't allocate memory"

_MEMORY_ADVICE = (
    "; lower cache.memory_gib or scheduler.max_tokens_per_plan, or raise pipeline.stages"
)


def failure_of(
    error: BaseException,
    *,
    epoch: int,
    stage_index: int,
    plan: int,
    is_ending: bool = True,
    memory_advice: str = _MEMORY_ADVICE,
) -> StageFailed:
    """``error`` as a message: ours by its fields, any other by type, text and traceback.

    ``is_ending``: the process ends because of it.
    Running out of memory becomes a ``CapacityError`` with ``memory_advice``, which says what was
    being done and what to lower.
    """
    reported = error
    if _is_out_of_memory(error):
        reported = CapacityError(
            f"stage {stage_index} ran out of memory ({_detail_of(error)}){memory_advice}"
        )
    return StageFailed(
        epoch=epoch,
        stage_index=stage_index,
        is_ending=is_ending,
        plan=plan,
        error=reported.to_wire() if isinstance(reported, EmberError) else {},
        remote_type=type(error).__name__,
        text=str(error),
        traceback="".join(traceback.format_exception(error)),
    )


def _is_out_of_memory(error: BaseException) -> bool:
    # By name: this must work when torch could not even be imported.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and _HOST_ALLOCATION_FAILED in str(error))
    )


def _detail_of(error: BaseException) -> str:
    """What was asked for and what was left, without torch's advice on its allocator."""
    detail = str(error).strip().partition("\n")[0].partition(" Including ")[0]
    return detail.rstrip(".") or type(error).__name__
