"""``host_shm``: a ring in anonymous shared memory, for two processes of one host.

The memory is a memfd of the receiver. The sender opens it through ``/proc/<pid>/fd/<fd>``, so
there is no name in ``/dev/shm`` and no socket: when both processes are gone, so is the memory,
however they ended. Layout, in bytes:

    0                      magic and a random nonce: proof that this is the ring of the handle
    4096 + 256 * slot      ready semaphore, at +64 free semaphore, at +128 plan and num_tokens
    then page by page      the slots' hidden states

A CPU stage reads the slot in place and gives it back after its forward: no copy on the
receiving side, one on the sending side. A CUDA stage has the memory registered as pinned; it
copies in and out asynchronously and waits for the copy before it touches a flag.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import math
import mmap
import os
import secrets
import struct
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ember_pp.errors import DeadlineExceededError, HandoffError, ProtocolError
from ember_pp.stage.capacity import available_bytes
from ember_pp.stage.handoff.base import Edge, Receiver, RingShape, Sender, Wait
from ember_pp.stage.handoff.semaphore import SEMAPHORE_BYTES, SharedSemaphore
from ember_pp.stage.timing import WAIT_INPUT, WAIT_OUTPUT, StageClock

_MAGIC = b"emberR01"
_NONCE_BYTES = 16
_PAGE_BYTES = 4096
_FLAGS_BYTES = 256
_FREE_OFFSET = 64  # own cache line: the two sides do not disturb each other
assert SEMAPHORE_BYTES <= _FREE_OFFSET
_TAG_OFFSET = 128
_TAG = struct.Struct("<qq")  # plan, num_tokens
_BOOT_ID_FILE = Path("/proc/sys/kernel/random/boot_id")

_logger = logging.getLogger(__name__)


class _Ring:
    """The mapped memory of one edge, seen from one side."""

    def __init__(self, fd: int, shape: RingShape) -> None:
        self.shape = shape
        self.memory = mmap.mmap(fd, ring_bytes(shape))
        self._anchor = ctypes.c_char.from_buffer(self.memory)
        address = self._address = ctypes.addressof(self._anchor)
        flags = [address + _PAGE_BYTES + _FLAGS_BYTES * slot for slot in range(shape.num_slots)]
        self.ready = [SharedSemaphore(flag) for flag in flags]
        self.free = [SharedSemaphore(flag + _FREE_OFFSET) for flag in flags]
        self.slots = [self._slot_tensor(slot) for slot in range(shape.num_slots)]
        self._is_pinned = False

    def pin(self) -> None:
        """Register the mapping with CUDA, once, so that copies run without a staging buffer."""
        if not self._is_pinned:
            self._is_pinned = True
            _pin(self, self._address, ring_bytes(self.shape))

    def _slot_tensor(self, slot: int) -> Tensor:
        shape = self.shape
        offset = _data_offset(shape) + slot * _round_to_page(shape.slot_bytes)
        count = shape.max_tokens * shape.hidden_size
        flat = torch.frombuffer(self.memory, dtype=shape.dtype, count=count, offset=offset)
        return flat.view(shape.max_tokens, shape.hidden_size)

    def write_tag(self, slot: int, plan: int, num_tokens: int) -> None:
        _TAG.pack_into(self.memory, self._tag_offset(slot), plan, num_tokens)

    def read_tag(self, slot: int) -> tuple[int, int]:
        plan, num_tokens = _TAG.unpack_from(self.memory, self._tag_offset(slot))
        return plan, num_tokens

    def _tag_offset(self, slot: int) -> int:
        return _PAGE_BYTES + _FLAGS_BYTES * slot + _TAG_OFFSET


class _Flags:
    """One side's waits on its own flags: counted, explainable, ended by ``close``."""

    def __init__(
        self,
        edge: Edge,
        semaphores: list[SharedSemaphore],
        clock: StageClock,
        *,
        is_for_ready: bool,
    ) -> None:
        self._edge = edge
        self._clock = clock
        self._semaphores = semaphores
        self._is_for_ready = is_for_ready
        self._is_closed = False
        self.current: Wait | None = None

    def take(self, plan: int, slot: int, timeout_s: float) -> None:
        """Sleep until the flag of ``slot`` is set, and take it."""
        is_taken = self._semaphores[slot].try_wait() or self._sleep(plan, slot, timeout_s)
        if self._is_closed:
            raise HandoffError(f"edge {self._edge}: closed while waiting for plan {plan}")
        if not is_taken:
            other = self._edge.sender_index if self._is_for_ready else self._edge.receiver_index
            raise DeadlineExceededError(
                f"edge {self._edge}: stage {other} did not "
                f"{'write' if self._is_for_ready else 'give back'} slot {slot} for plan {plan} "
                f"within {timeout_s:g} s"
            )

    def _sleep(self, plan: int, slot: int, timeout_s: float) -> bool:
        state_before = self._clock.enter(WAIT_INPUT if self._is_for_ready else WAIT_OUTPUT)
        self.current = Wait(self._edge, plan, slot, self._is_for_ready, time.monotonic_ns())
        # Read after ``current`` is set and before sleeping; ``close`` sets it before it posts.
        is_taken = self._is_closed or self._semaphores[slot].wait(timeout_s)
        self.current = None
        self._clock.enter(state_before)
        return is_taken

    def close(self) -> None:
        """Let every wait return; the flags mean nothing from here on."""
        self._is_closed = True
        for semaphore in self._semaphores:
            semaphore.post()


class HostShmReceiver(Receiver):
    """Owns the shared memory of one edge.

    Args:
        edge: names the edge in errors.
        shape: slots and their size.
        device: where ``receive`` puts hidden states; a CPU stage gets the slot itself.
        clock: counts waits; None: nobody asks for them.

    Raises:
        HandoffError: the memory cannot be had.
    """

    path = "host_shm"

    def __init__(
        self,
        edge: Edge,
        shape: RingShape,
        device: torch.device,
        clock: StageClock | None = None,
    ) -> None:
        super().__init__(edge, shape, clock)
        self._device = device
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._fd = _create_memory(edge, ring_bytes(shape))
        weakref.finalize(self, os.close, self._fd)
        self._ring = _Ring(self._fd, shape)
        for ready, free in zip(self._ring.ready, self._ring.free, strict=True):
            ready.initialise(0)
            free.initialise(1)
        self._ring.memory[: len(_MAGIC) + _NONCE_BYTES] = _MAGIC + self._nonce
        self._flags = _Flags(edge, self._ring.ready, self._clock, is_for_ready=True)
        self._copied: torch.cuda.Event | None = None

    @property
    def handle(self) -> dict[str, Any]:
        return self.shape.to_plain() | {
            "path": self.path,
            "host": host_id(),
            "pid": os.getpid(),
            "fd": self._fd,
            "nonce": self._nonce.hex(),
        }

    def connect(self, handle: Mapping[str, Any]) -> None:
        self.shape.check_handle(handle, self.edge)

    def prepare(self) -> None:
        _allocate(self.edge, self._fd, ring_bytes(self.shape))
        if self._device.type == "cuda":
            self._ring.pin()

    @property
    def wait(self) -> Wait | None:
        return self._flags.current

    def receive(self, plan: int, num_tokens: int, *, timeout_s: float = math.inf) -> Tensor:
        slot = plan % self.shape.num_slots
        self._flags.take(plan, slot, timeout_s)
        self._clock.mark_received()
        if (found := self._ring.read_tag(slot)) != (plan, num_tokens):
            raise ProtocolError(
                f"edge {self.edge}: slot {slot} holds plan {found[0]} with {found[1]} tokens; "
                f"expected plan {plan} with {num_tokens}"
            )
        hidden_states = self._ring.slots[slot][:num_tokens]
        return hidden_states if self._device.type == "cpu" else self._to_device(hidden_states)

    def _to_device(self, hidden_states: Tensor) -> Tensor:
        moved = hidden_states.to(self._device, non_blocking=True)
        self._copied = torch.cuda.current_stream(self._device).record_event()
        return moved

    def release(self, plan: int) -> None:
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        self._ring.free[plan % self.shape.num_slots].post()

    def close(self) -> None:
        self._flags.close()


class HostShmSender(Sender):
    """Writes into the ring of a ``HostShmReceiver``.

    Args: as of ``HostShmReceiver``.
    """

    path = "host_shm"

    def __init__(
        self,
        edge: Edge,
        shape: RingShape,
        device: torch.device,
        clock: StageClock | None = None,
    ) -> None:
        super().__init__(edge, shape, clock)
        self._device = device
        self._connected: _Connected | None = None
        self._is_closed = False

    @property
    def handle(self) -> dict[str, Any]:
        return self.shape.to_plain() | {"path": self.path}

    def connect(self, handle: Mapping[str, Any]) -> None:
        self.shape.check_handle(handle, self.edge)
        self._connected = _Connected(self.edge, self.shape, handle, self._clock)

    @property
    def _other(self) -> _Connected:
        if self._connected is None or self._is_closed:
            raise HandoffError(f"edge {self.edge}: closed, or not connected yet")
        return self._connected

    def prepare(self) -> None:
        _allocate(self.edge, self._other.fd, ring_bytes(self.shape))
        if self._device.type == "cuda":
            self._other.ring.pin()

    @property
    def wait(self) -> Wait | None:
        return None if self._connected is None else self._connected.flags.current

    def send(
        self, plan: int, hidden_states: Tensor, *, timeout_s: float = math.inf, at: int = 0
    ) -> None:
        num_tokens = self.check_message(plan, hidden_states)
        slot = plan % self.shape.num_slots
        self._other.flags.take(plan, slot, timeout_s)
        ring = self._other.ring
        is_cuda = self._device.type == "cuda"
        ring.slots[slot][:num_tokens].copy_(hidden_states, non_blocking=is_cuda)
        ring.write_tag(slot, plan, num_tokens)
        if is_cuda:
            torch.cuda.current_stream(self._device).synchronize()
        self._clock.mark_sent()
        ring.ready[slot].post()

    def drain(self, *, timeout_s: float = math.inf) -> None:
        for slot, free in enumerate(self._other.ring.free):
            self._other.flags.take(slot, slot, timeout_s)
            free.post()

    def close(self) -> None:
        self._is_closed = True
        if self._connected is not None:
            self._connected.flags.close()


class _Connected:
    """The sender's view of the ring that ``handle`` describes.

    Raises:
        HandoffError: another host, or the memory cannot be opened; names the edge.
    """

    def __init__(
        self, edge: Edge, shape: RingShape, handle: Mapping[str, Any], clock: StageClock
    ) -> None:
        self.fd = _open_memory(edge, handle)
        weakref.finalize(self, os.close, self.fd)
        try:
            self.ring = _Ring(self.fd, shape)
        except (OSError, ValueError) as error:  # mmap: the file is not as long as it must be
            raise HandoffError(f"edge {edge}: {_foreign(handle)}: {error}") from None
        proof = _MAGIC + bytes.fromhex(str(handle["nonce"]))
        if self.ring.memory[: len(proof)] != proof:
            raise HandoffError(f"edge {edge}: {_foreign(handle)}: not the ring of this handle")
        self.flags = _Flags(edge, self.ring.free, clock, is_for_ready=False)


def ring_bytes(shape: RingShape) -> int:
    """Shared memory of one edge."""
    return _data_offset(shape) + shape.num_slots * _round_to_page(shape.slot_bytes)


def _data_offset(shape: RingShape) -> int:
    return _round_to_page(_PAGE_BYTES + _FLAGS_BYTES * shape.num_slots)


def _round_to_page(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES


def host_id() -> str:
    """The same for all processes of a host until it starts anew."""
    return _BOOT_ID_FILE.read_text().strip()


def _create_memory(edge: Edge, size: int) -> int:
    # A memfd has no limit of its own: asked for too much, the kernel would end some process
    # of this machine to find it. So compare first.
    if size > (available := available_bytes()):
        raise HandoffError(
            f"edge {edge}: needs {size} bytes of shared memory, {available} are free; lower "
            "scheduler.max_tokens_per_plan or pipeline.max_in_flight"
        )
    fd = os.memfd_create(f"ember-pp ring {edge}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)  # no page is there before it is needed: see _allocate
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _allocate(edge: Edge, fd: int, size: int) -> None:
    """Before it is used: memory that runs out later would end both processes with SIGBUS."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        raise HandoffError(
            f"edge {edge}: {size} bytes of shared memory: {error.strerror}"
        ) from None


def _foreign(handle: Mapping[str, Any]) -> str:
    return f"shared memory {handle.get('fd')} of process {handle.get('pid')}"


def _open_memory(edge: Edge, handle: Mapping[str, Any]) -> int:
    if handle.get("host") != host_id():
        raise HandoffError(
            f"edge {edge}: host_shm needs both stages on one host; the receiver runs on another"
        )
    try:
        return os.open(f"/proc/{handle['pid']:d}/fd/{handle['fd']:d}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise HandoffError(
            f"edge {edge}: {_foreign(handle)}: {error.strerror}; both stages must be processes "
            "of one user in one container"
        ) from None


def _pin(ring: _Ring, address: int, size: int) -> None:
    """Register the mapping with CUDA, so that copies run without a staging buffer."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(address, size, 0)
    if int(result) != 0:  # copies then go through pageable memory: slower, still right
        _logger.warning("cudaHostRegister of %d bytes failed with %s", size, result)
        return
    finalizer = weakref.finalize(ring, _unpin, runtime, address, ring.memory)
    finalizer.atexit = False  # the driver cleans up after a process that ends


def _unpin(runtime: Any, address: int, _memory: mmap.mmap) -> None:
    """``_memory`` keeps the mapping alive until it is unregistered."""
    runtime.cudaHostUnregister(address)
