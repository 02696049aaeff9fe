"""What every path between two stages offers: a ``Receiver`` and a ``Sender``.

An edge is a ring of slots in the receiver's memory, each as large as the largest micro-batch.
Plan ``p`` travels in slot ``p % num_slots``. A slot has two 0/1 flags:

    ready   set by the sender once the slot is written, taken by the receiver
    free    set by the receiver once the slot is read, taken by the sender; set at the start

so each side waits on its own flag and neither needs to know how far the other is. The plan
number and token count beside the flags are checked by the receiver.

    path          slot memory                flags
    host_shm      anonymous shared memory    process-shared semaphores; the host thread sleeps
    cuda_ipc      device memory by IPC       later: stream memory operations, no host on the path
    collective    torch.distributed          later: for edges between hosts

Each end counts its waits on the ``StageClock`` of its stage. A path whose waits happen on the
device enqueues them in ``receive``, ``release`` and ``send`` and returns at once; the clock then
sees host time only.
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

from ember_pp.errors import HandoffError
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
        """Compare with the receiver's end.

        Raises:
            HandoffError: the handle states another shape or dtype; names edge and field.
        """
        for name, expected in self.to_plain().items():
            if handle.get(name) != expected:
                raise HandoffError(
                    f"edge {edge}: {name} is {expected} at the sender, "
                    f"{handle.get(name)} at the receiver"
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

    def __init__(self, edge: Edge, shape: RingShape, clock: StageClock | None) -> None:
        self.edge = edge
        self.shape = shape
        self._clock = clock or StageClock()

    @property
    @abc.abstractmethod
    def wait(self) -> Wait | None:
        """The wait that is going on, if any; may be read from any thread."""

    @abc.abstractmethod
    def close(self) -> None:
        """End this side's waits with ``HandoffError``; any thread, any number of times."""


class Receiver(_End):
    """The end that owns the ring. One plan is read at a time, by one thread at a time."""

    @property
    @abc.abstractmethod
    def handle(self) -> dict[str, Any]:
        """How the sender opens this ring: ``path``, ``RingShape.to_plain`` and the path's own."""

    @abc.abstractmethod
    def receive(self, plan: int, num_tokens: int, *, timeout_s: float = math.inf) -> Tensor:
        """Hidden states of ``plan``, ``[num_tokens, hidden_size]`` on this stage's device.

        The tensor may be the slot itself: it is valid until ``release(plan)``, and may be
        written to until then.

        Raises:
            ProtocolError: the slot holds another plan or token count; names edge, plan, slot.
            HandoffError: the edge was closed.
            DeadlineExceededError: nothing came within ``timeout_s``.
        """

    @abc.abstractmethod
    def release(self, plan: int) -> None:
        """The hidden states of ``plan`` have been read: give the slot back to the sender."""


class Sender(_End):
    """The end that writes. One plan is written at a time, by one thread at a time."""

    @abc.abstractmethod
    def send(self, plan: int, hidden_states: Tensor, *, timeout_s: float = math.inf) -> None:
        """Write ``hidden_states``, ``[T, hidden_size]`` on this stage's device, as ``plan``.

        ``hidden_states`` may be overwritten once this returns.

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
