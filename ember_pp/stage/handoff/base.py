"""What every path between two stages offers: a ``Receiver`` and a ``Sender``.

An edge is a ring of slots in the receiver's memory, each as large as the largest micro-batch.
Plan ``p`` travels in slot ``p % num_slots``. A slot has two 0/1 flags:

    ready   set by the sender once the slot is written, taken by the receiver
    free    set by the receiver once the slot is read, taken by the sender; set at the start

so each side waits on its own flag and neither needs to know how far the other is. The plan
number and token count beside the flags are checked by the receiver.

    path          slot memory                flags
    cuda_ipc      device memory by IPC       waited for on the device: no host on the path
    host_shm      anonymous shared memory    process-shared semaphores; the host thread sleeps
    collective    torch.distributed          later: for edges between hosts

An end is made, exchanges handles with the other end (``handle``, ``connect``), is probed, used,
closed and at last freed. A path that waits on the host counts its waits on the ``StageClock`` of
its stage. One that waits on the device enqueues all that it does and returns at once; it has the
card write its times where the caller says (``at``), if anywhere.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ember_pp.errors import HandoffError, ProtocolError
from ember_pp.stage.timing import StageClock


@dataclasses.dataclass(frozen=True, slots=True)
class Edge:
    """From one stage to the next."""

    sender_index: int
    receiver_index: int

    def __str__(self) -> str:
        return f"{self.sender_index}->{self.receiver_index}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RingShape:
    """What both ends of an edge must agree on."""

    num_slots: int
    max_tokens: int
    """Tokens of the largest micro-batch."""
    hidden_size: int
    dtype: torch.dtype

    @property
    def slot_bytes(self) -> int:
        """Bytes of the largest micro-batch's hidden states."""
        return self.max_tokens * self.hidden_size * self.dtype.itemsize

    def to_plain(self) -> dict[str, Any]:
        """Fields as msgpack types, for a handle."""
        return dataclasses.asdict(self) | {"dtype": str(self.dtype).removeprefix("torch.")}

    def check_handle(self, handle: Mapping[str, Any], edge: Edge) -> None:
        """Compare with the other end.

        Raises:
            HandoffError: the handle states another shape or dtype; names edge and field.
        """
        for name, expected in self.to_plain().items():
            if handle.get(name) != expected:
                raise HandoffError(
                    f"edge {edge}: {name} is {expected} at one end, {handle.get(name)} at the other"
                )


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """A wait that is going on: the answer to why a stage stands still."""

    edge: Edge
    plan: int
    slot: int
    is_for_ready: bool
    """True: for the sender to write the slot; False: for the receiver to give it back."""
    since_ns: int

    def __str__(self) -> str:
        other, action = (
            (self.edge.sender_index, "write")
            if self.is_for_ready
            else (self.edge.receiver_index, "give back")
        )
        waited_s = (time.monotonic_ns() - self.since_ns) / 1e9
        return (
            f"plan {self.plan}: stage {other} to {action} slot {self.slot} "
            f"of edge {self.edge}, for {waited_s:.1f} s"
        )


class _End(abc.ABC):
    """What both ends of an edge have in common."""

    path: ClassVar[str]
    waits_on_device: ClassVar[bool] = False
    """Whether its waits are enqueued, and happen behind the host's back."""

    def __init__(self, edge: Edge, shape: RingShape, clock: StageClock | None) -> None:
        self.edge = edge
        self.shape = shape
        self._clock = clock or StageClock()

    @property
    @abc.abstractmethod
    def handle(self) -> dict[str, Any]:
        """What the other end needs of this one: ``path``, ``RingShape.to_plain`` and its own."""

    @abc.abstractmethod
    def connect(self, handle: Mapping[str, Any]) -> None:
        """Reach the other end by its ``handle``; before anything is received or sent.

        Raises:
            HandoffError: the two ends differ in path, shape or dtype, or the other one cannot be
                reached; names the edge.
        """

    def prepare(self) -> None:  # noqa: B027  on most paths nothing
        """Take the memory that is only needed if this path is used; before its first message.

        Raises:
            HandoffError: there is too little.
        """

    @property
    @abc.abstractmethod
    def wait(self) -> Wait | None:
        """The wait of the host that is going on, if any; may be read from any thread."""

    def settle(self, *, timeout_s: float = math.inf) -> None:  # noqa: B027  as above
        """Wait until everything that was enqueued is done, and see that it was right.

        Raises:
            DeadlineExceededError: it was not done within ``timeout_s``.
            ProtocolError, HandoffError: as ``check``.
        """

    def check(self) -> None:  # noqa: B027  on most paths nothing
        """See that what the device has received so far was right, without waiting for it.

        Raises:
            ProtocolError: a slot held another plan or token count; names edge, plan, slot.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End this side's waits for good; any thread, any number of times.

        What waits on the host raises ``HandoffError``, and so does what comes later.
        """

    def disconnect(self) -> None:
        """Let go of the other end's memory, once nothing uses it any more; closes first."""
        self.close()

    def free(self) -> None:  # noqa: B027  on most paths nothing
        """Give back this end's own memory: the other end has disconnected."""


class Receiver(_End):
    """The end that owns the ring. One plan is read at a time, by one thread at a time."""

    @abc.abstractmethod
    def receive(self, plan: int, num_tokens: int, *, timeout_s: float = math.inf) -> Tensor:
        """Hidden states of ``plan``, ``[num_tokens, hidden_size]`` on this stage's device.

        The tensor may be the slot itself: it is valid until ``release(plan)``, and may be
        written to until then.

        Raises:
            ProtocolError: the slot holds another plan or token count; names edge, plan, slot.
                Where the wait is on the device: by ``check``, later.
            HandoffError: the edge was closed.
            DeadlineExceededError: nothing came within ``timeout_s``. Where the wait is on the
                device: by ``settle``.
        """

    @abc.abstractmethod
    def release(self, plan: int) -> None:
        """The hidden states of ``plan`` have been read: give the slot back to the sender."""

    def receive_into(self, plan: int, output: Tensor, *, at: int = 0) -> None:
        """Copy the hidden states of ``plan`` to ``output``, [T, hidden_size] on this device, and
        give the slot back.

        Args:
            plan: to be received.
            output: contiguous.
            at: address in pinned memory for the card's time at which the message was there, as
                i64; 0: none. Ignored where the wait is on the host.

        Raises: as ``receive``.
        """
        output.copy_(self.receive(plan, len(output)))
        self.release(plan)

    def receive_pairs(
        self, plan: int, num_pairs: int, target: Tensor, *, ready_at: int = 0, at: int = 0
    ) -> None:
        """A message of pairs (index, value), [num_pairs, 2] int32: ``target[index] = value``.

        Args:
            plan: to be received.
            num_pairs: in its message.
            target: [M] int64 on this device; indices are distinct.
            ready_at: as ``at``, for the time at which the wait began.
            at: as in ``receive_into``.

        Raises: as ``receive``.
        """
        pairs = self.receive(plan, num_pairs)
        target[pairs[:, 0].long()] = pairs[:, 1].long()
        self.release(plan)


class Sender(_End):
    """The end that writes. One plan is written at a time, by one thread at a time."""

    @abc.abstractmethod
    def send(
        self, plan: int, hidden_states: Tensor, *, timeout_s: float = math.inf, at: int = 0
    ) -> None:
        """Write ``hidden_states``, ``[T, hidden_size]`` on this stage's device, as ``plan``.

        ``hidden_states`` may be overwritten once this returns, by what the stream does next.

        Args:
            plan: its number.
            hidden_states: contiguous.
            timeout_s: for the slot to be given back, where the wait is on the host.
            at: address in pinned memory for two of the card's times, as i64: when the slot was
                free, and when the message was in it; 0: none. Ignored where the wait is on the
                host.

        Raises:
            ProtocolError: more tokens than a slot holds, or another hidden size or dtype.
            HandoffError: the edge was closed.
            DeadlineExceededError: no slot was given back within ``timeout_s``.
        """

    @abc.abstractmethod
    def drain(self, *, timeout_s: float = math.inf) -> None:
        """Wait until the receiver has given back every slot.

        Raises:
            HandoffError: the edge was closed.
            DeadlineExceededError: a slot was not given back within ``timeout_s``.
        """

    def check_message(self, plan: int, hidden_states: Tensor) -> int:
        """The number of tokens of a message that fits.

        Raises:
            ProtocolError: it does not fit.
        """
        shape, size = self.shape, hidden_states.shape
        num_tokens: int = size[0]
        if (
            len(size) != 2
            or size[1] != shape.hidden_size
            or num_tokens > shape.max_tokens
            or hidden_states.dtype != shape.dtype
        ):
            raise ProtocolError(
                f"edge {self.edge}, plan {plan}: hidden states {list(size)} "
                f"{hidden_states.dtype}; a slot takes [at most {shape.max_tokens}, "
                f"{shape.hidden_size}] {shape.dtype}"
            )
        return num_tokens
