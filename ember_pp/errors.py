"""Every error ember_pp raises on purpose.

EmberError                  base of all; ``code`` is its name on the wire
    ConfigError             a setting is missing, unknown or out of range       (also ValueError)
        CapacityError       the model cannot fit the devices or the cache it was given
    BatchInputError         lines of a batch file that cannot be used; holds all of them
    InvalidRequestError     this request can never be served                    (also ValueError)
    RequestAbortedError     the request was cancelled before it finished
    UnavailableError        the coordinator is draining, full or not yet there
    NumericalError          the model gave NaN or infinite numbers for this request
    PipelineError           the whole pipeline ended, and every open request with it
    CheckpointError         a checkpoint file or tensor is missing, extra, damaged or misshapen
    KernelArgumentError     a tensor has the wrong shape, dtype or device       (also ValueError)
    KernelBuildError        a CUDA kernel could not be built; holds the compiler's log
    KernelLaunchError       the driver refused to start a CUDA kernel
    TransportError
        ProtocolError       bytes that are no message of ours, or another version
        AddressError        an address cannot be bound, connected to, or is not allowed
        HandoffError        an edge between two stages failed its probe or was closed; names it
        DeadlineExceededError   nothing came in time; says who was awaited  (also TimeoutError)
    StageError              holds ``stage_index``
        StageFailedError    a stage raised; holds the remote type, text and traceback
        StageDiedError      a stage process ended or fell silent; holds the exit code

``exit_code`` is what ``launch.sh`` returns when the error ends a job (``docs/batch.md``).
An error crosses a process border as ``to_wire`` and comes back as the same class by
``from_wire``; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 2
EXIT_CANNOT_FIT = 3
EXIT_TOLERANCE = 4
EXIT_DRAINED = 75


class EmberError(Exception):
    """Base of every error that ember_pp raises on purpose."""

    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = EXIT_FAILED

    def details(self) -> dict[str, Any]:
        """Fields beside the text that must survive the wire; msgpack types only."""
        return {}

    def to_wire(self) -> dict[str, Any]:
        """The error as a map of plain values: ``code``, ``message`` and ``details``."""
        return {"code": self.code, "message": str(self), "details": self.details()}


class ConfigError(EmberError, ValueError):
    """A setting is missing, unknown or out of range; the text names its dotted key."""

    code = "config_error"
    exit_code = EXIT_CONFIG


class CapacityError(ConfigError):
    """The model does not fit the devices or the cache it was given; says by how much."""

    code = "cannot_fit"
    exit_code = EXIT_CANNOT_FIT


class BatchInputError(EmberError):
    """Lines of a batch input that cannot be used; ``problems`` lists each with its place."""

    code = "bad_batch_input"
    exit_code = EXIT_CONFIG

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)

    def details(self) -> dict[str, Any]:
        return {"problems": list(self.problems)}


class InvalidRequestError(EmberError, ValueError):
    """This request can never be served; the text names the field."""

    code = "invalid_request"


class RequestAbortedError(EmberError):
    """The request was cancelled, or its client went away, before it finished."""

    code = "aborted"


class UnavailableError(EmberError):
    """The coordinator takes no new requests now: it drains, is full, or has not started."""

    code = "unavailable"


class NumericalError(EmberError):
    """The model gave NaN or infinite numbers for this request, so no token could be drawn."""

    code = "numerical_error"


class PipelineError(EmberError):
    """The whole pipeline ended, and every open request with it; the text says why."""

    code = "pipeline_failed"


class CheckpointError(EmberError):
    """A checkpoint file or tensor is missing, extra, damaged or misshapen; names which."""

    code = "checkpoint_error"
    exit_code = EXIT_CONFIG


class KernelArgumentError(EmberError, ValueError):
    """A tensor argument has the wrong shape, dtype or device; names argument, wanted, given."""

    code = "kernel_argument"


class KernelBuildError(EmberError):
    """A CUDA kernel could not be built: the compiler is missing, or its log is in the text."""

    code = "kernel_build"


class KernelLaunchError(EmberError):
    """The driver refused to start a CUDA kernel; names the kernel and says why."""

    code = "kernel_launch"


class TransportError(EmberError):
    """Something between two processes failed."""

    code = "transport_error"


class ProtocolError(TransportError):
    """Bytes that are no message of ours, or of another protocol version."""

    code = "protocol_error"


class AddressError(TransportError):
    """An address cannot be bound or connected to, or is not allowed."""

    code = "address_error"
    exit_code = EXIT_CONFIG


class HandoffError(TransportError):
    """An edge between two stages failed its probe or was closed; the text names the edge."""

    code = "handoff_error"


class DeadlineExceededError(TransportError, TimeoutError):
    """Nothing came in time; the text says who was awaited and for how long."""

    code = "deadline_exceeded"


class StageError(EmberError):
    """Something happened to one stage of the pipeline."""

    code = "stage_error"

    def __init__(self, message: str, *, stage_index: int) -> None:
        super().__init__(message)
        self.stage_index = stage_index

    def details(self) -> dict[str, Any]:
        return {"stage_index": self.stage_index}


class StageFailedError(StageError):
    """A stage raised while it worked; carries what was raised there."""

    code = "stage_failed"

    def __init__(
        self,
        message: str,
        *,
        stage_index: int,
        remote_type: str = "",
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message, stage_index=stage_index)
        self.remote_type = remote_type
        self.remote_traceback = remote_traceback

    def details(self) -> dict[str, Any]:
        return super().details() | {
            "remote_type": self.remote_type,
            "remote_traceback": self.remote_traceback,
        }


class StageDiedError(StageError):
    """A stage process ended or fell silent; ``exit_status`` is negative for a signal."""

    code = "stage_died"

    def __init__(self, message: str, *, stage_index: int, exit_status: int | None = None) -> None:
        super().__init__(message, stage_index=stage_index)
        self.exit_status = exit_status

    def details(self) -> dict[str, Any]:
        return super().details() | {"exit_status": self.exit_status}


def _all_error_types() -> dict[str, type[EmberError]]:
    found: dict[str, type[EmberError]] = {}
    pending: list[type[EmberError]] = [EmberError]
    while pending:
        error_type = pending.pop()
        found[error_type.code] = error_type
        pending.extend(error_type.__subclasses__())
    return found


def from_wire(wire: Mapping[str, Any]) -> EmberError:
    """The error that ``to_wire`` described; an unknown ``code`` becomes ``EmberError``."""
    error_type = _all_error_types().get(str(wire.get("code")), EmberError)
    message = str(wire.get("message", ""))
    details = wire.get("details")
    try:
        return error_type(message, **details) if details else error_type(message)
    except TypeError:  # a newer peer sent details that this version does not know
        return EmberError(message)
