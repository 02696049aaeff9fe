"""``cuda_ipc``: a ring in device memory, for two processes of one host; nothing waits on the host.

Each end has an *arena*, memory of one plain ``cuMemAlloc`` that the other end's process maps: the
receiver's has flags and tags of all slots, then the slots; the sender's has flags. A line of 128
bytes per slot, so that two slots never share one:

    receiver    line s: ready flag (u32), at +16 the tag: plan and num_tokens (i64 each)
                then the slots, each a multiple of 256 bytes
    sender      line s: free flag (u32)

A flag is a number that only rises: ``flag_of(plan)`` in the ready flag of its slot once ``plan``
is there, in the free flag once it has been read. A side waits for its own flag to be *no less*
than that number, by a stream memory operation, which holds no multiprocessor. So nothing is ever
set back, a late write cannot be taken for another plan's, and ``close`` lets all waits pass,
those that are enqueued and those that are not yet, by writing a number that no plan reaches.

A hop is, in stream order: at the sender a wait and one kernel (message, tag, ready flag); at the
receiver a wait and one kernel (tag compared, message copied out, free flag). Large messages are
copied by the copy engine before the sender's kernel.

Why not torch's allocator: an IPC handle is of a whole allocation, and memory of *expandable
segments* (``PYTORCH_CUDA_ALLOC_CONF``) has none at all. What is allocated here is neither.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ember_pp.errors import (
    DeadlineExceededError,
    HandoffError,
    KernelBuildError,
    ProtocolError,
)
from ember_pp.kernels.driver import (
    IPC_HANDLE_BYTES,
    IPC_LAZY_PEER_ACCESS,
    UUID_BYTES,
    WAIT_GEQ,
    IpcHandle,
    driver,
    error_text,
)
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.stage.handoff.base import Edge, Receiver, RingShape, Sender, Wait
from ember_pp.stage.handoff.host_shm import host_id
from ember_pp.stage.handoff.side_stream import open_side_stream
from ember_pp.stage.timing import StageClock

COPY_ENGINE_BYTES = 32 * 2**20
"""From this size of a message on the copy engine moves it, which is then as fast as kernel stores
and leaves the multiprocessors alone; below it is slower (``benchmarks.handoff --parts copy``)."""
_LINE_BYTES = 128
_TAG_OFFSET = 16
_SCRATCH_OFFSET = 64
"""In the line behind those of the slots, which begins with a counter of thread blocks."""
_SLOT_ALIGNMENT = 256
ARENA_ALIGNMENT = 2 * 2**20
"""Smaller allocations share a block of this size, and a handle is of the whole block."""
_THREADS, _WORDS_PER_THREAD, _WARP = 256, 4, 32
_MAX_THREAD_BLOCKS = 264
_WORDS = {16: "uint4", 8: "uint2", 4: "u32", 2: "unsigned short"}
_FAULT_WORDS = 5
_FLAG_MASK = 0xFFFFFFFF
_NEVER = 1 << 30
"""How far beyond its last number ``close`` sets a flag: comparisons are of differences, and cover
half of all numbers."""
_POLL_S = 100e-6


def flag_of(plan: int, num_slots: int) -> int:
    """The number of ``plan`` in a flag: positive from the first plan of a probe on, in 32 bits."""
    return (plan + 2 * num_slots + 1) & _FLAG_MASK


def never_reached(newest_flag: int) -> int:
    """A number that passes all waits up to ``newest_flag``, and those of the plans to come."""
    return (newest_flag + _NEVER) & _FLAG_MASK


def why_unreachable(
    own: Mapping[str, Any], other: Mapping[str, Any], visible_gpus: list[str]
) -> str:
    """Why the memory of ``other`` cannot be mapped, by what both handles say; empty: it may.

    Args:
        own: handle of this end.
        other: handle of the other end.
        visible_gpus: UUIDs of the GPUs that this process sees.
    """
    if own["host"] != other.get("host"):
        return "cuda_ipc needs both stages on one host; the other runs on another"
    if own["pid_namespace"] != other.get("pid_namespace"):
        return (
            "the two stages are in different PID namespaces, across which CUDA IPC does not work: "
            "run them in one container, or both with the host's namespace (--pid=host)"
        )
    if own["pid"] == other.get("pid"):
        return f"both ends are in process {own['pid']}: IPC memory is for another process"
    if other.get("gpu") not in visible_gpus:
        return (
            f"the other stage's GPU {other.get('gpu')} is hidden from this one, which is on "
            f"{own['gpu']} and sees {', '.join(visible_gpus)}: CUDA_VISIBLE_DEVICES must name "
            "both GPUs in both processes"
        )
    return ""


class _End:
    """What both ends do: an arena of their own, the mapped one of the other end, and waits."""

    def __init__(self, edge: Edge, shape: RingShape, device: torch.device, size: int) -> None:
        self.edge, self.shape = edge, shape
        if device.type != "cuda":
            raise HandoffError(f"edge {edge}: cuda_ipc needs a GPU; this stage is on {device}")
        self.device = torch.device("cuda", device.index or 0)
        try:
            self.kernels = KernelSet(self.device)
        except KernelBuildError as error:
            raise HandoffError(f"edge {edge}: {error}") from None
        self._write_time = self.kernels.get("handoff.cuh", "write_time_kernel", "P", overlaps=False)
        self._driver = driver()
        self._context = ctypes.c_void_p()
        self.call("this thread's context", "cuCtxGetCurrent", ctypes.byref(self._context))
        address = ctypes.c_uint64()
        size = _round_up(size, ARENA_ALIGNMENT)
        self.call(f"{size} bytes on {self.device}", "cuMemAlloc_v2", ctypes.byref(address), size)
        self.arena = address.value
        self._free_arena = weakref.finalize(self, _free, self._context.value, self.arena)
        self._free_arena.atexit = False  # the driver cleans up after a process that ends
        stream = self.stream
        self.call("its first numbers", "cuMemsetD32Async", self.arena, 0, size // 4, stream)
        self.call("its first numbers", "cuStreamSynchronize", stream)
        self._handle = IpcHandle()
        self.call("exporting it", "cuIpcGetMemHandle", ctypes.byref(self._handle), self.arena)
        scratch = self.arena + shape.num_slots * _LINE_BYTES + _SCRATCH_OFFSET
        self._side_stream = open_side_stream(stream, scratch)
        self.other = 0
        """Address of the other end's arena here; 0: not connected."""
        self.num_slots = shape.num_slots
        self.flag_offset = flag_of(0, shape.num_slots)
        self.counter = self.arena + shape.num_slots * _LINE_BYTES
        """Of thread blocks, for the kernels of this end."""
        self._wait_value: Callable[[int, int, int, int], int] = driver().cuStreamWaitValue32_v2
        self.is_closed = False
        self._newest_flag = 0

    def call(self, what: str, name: str, *arguments: Any) -> None:
        """A driver call.

        Raises:
            HandoffError: the driver refused; says what.
        """
        status = getattr(self._driver, name)(*arguments)
        if status:
            raise HandoffError(f"edge {self.edge}: {what}: {name}: {error_text(status)}")

    @property
    def stream(self) -> int:
        """The current stream of the stage."""
        stream: int = torch._C._cuda_getCurrentRawStream(self.device.index)
        return stream

    @property
    def handle(self) -> dict[str, Any]:
        return self.shape.to_plain() | {
            "path": "cuda_ipc",
            "host": host_id(),
            "pid_namespace": os.readlink("/proc/self/ns/pid"),
            "pid": os.getpid(),
            "gpu": self._uuid(self.device.index),
            "memory": bytes(self._handle.data),
        }

    def _uuid(self, ordinal: int) -> str:
        device, uuid = ctypes.c_int(), (ctypes.c_ubyte * UUID_BYTES)()
        self.call("its GPU", "cuDeviceGet", ctypes.byref(device), ordinal)
        self.call("its GPU", "cuDeviceGetUuid_v2", ctypes.byref(uuid), device.value)
        digits = bytes(uuid).hex()
        parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
        return "GPU-" + "-".join(parts)

    def connect(self, handle: Mapping[str, Any]) -> None:
        self.shape.check_handle(handle, self.edge)
        own, visible = self.handle, [self._uuid(i) for i in range(torch.cuda.device_count())]
        reason = why_unreachable(own, handle, visible)
        if reason:
            raise HandoffError(f"edge {self.edge}: {reason}")
        if handle["gpu"] != own["gpu"]:
            self._check_peer(str(own["gpu"]), str(handle["gpu"]), visible)
        memory = bytes(handle["memory"])
        if len(memory) != IPC_HANDLE_BYTES:
            raise HandoffError(f"edge {self.edge}: memory: expected {IPC_HANDLE_BYTES} bytes")
        address = ctypes.c_uint64()
        self.call(
            f"opening memory of process {handle['pid']} on {handle['gpu']}",
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(address),
            IpcHandle.from_buffer_copy(memory),
            IPC_LAZY_PEER_ACCESS,
        )
        self.other = address.value
        self._unmap = weakref.finalize(self, _close, self._context.value, self.other)
        self._unmap.atexit = False

    def _check_peer(self, own_gpu: str, other_gpu: str, visible: list[str]) -> None:
        can_access = ctypes.c_int()
        ordinals = visible.index(own_gpu), visible.index(other_gpu)
        self.call("peers", "cuDeviceCanAccessPeer", ctypes.byref(can_access), *ordinals)
        if not can_access.value:
            raise HandoffError(
                f"edge {self.edge}: {own_gpu} cannot reach memory of {other_gpu}: no peer access "
                "between these cards on this machine"
            )

    def check_open(self) -> None:
        """Before anything is enqueued.

        Raises:
            HandoffError: closed, or not connected.
        """
        if self.is_closed or not self.other:
            state = "closed" if self.is_closed else "not connected yet"
            raise HandoffError(f"edge {self.edge}: {state}")

    def await_flag(self, slot: int, plan: int) -> int:
        """Enqueue the wait for this end's flag of ``slot`` to be that of ``plan`` or beyond.

        Returns:
            What it waits for.

        Raises:
            HandoffError: closed, not connected, or the driver refused.
        """
        self.check_open()
        flag = self._newest_flag = (plan + self.flag_offset) & _FLAG_MASK
        address = self.arena + slot * _LINE_BYTES
        status = self._wait_value(self.stream, address, flag, WAIT_GEQ)
        if status:
            raise HandoffError(f"edge {self.edge}: waiting on the device: {error_text(status)}")
        return flag

    def write_time(self, at: int) -> None:
        """Enqueue that the card writes its time there."""
        self._write_time.launch((1, 1), _WARP, (at,))

    def settle(self, timeout_s: float) -> None:
        """See ``Receiver.settle``."""
        deadline_s = time.monotonic() + timeout_s
        event = torch.cuda.current_stream(self.device).record_event()
        while not event.query():
            if time.monotonic() > deadline_s:
                raise DeadlineExceededError(
                    f"edge {self.edge}: what was enqueued was not done within {timeout_s:g} s"
                )
            time.sleep(_POLL_S)

    def close(self) -> None:
        """Let all waits of this end pass. What the driver says is not asked: a device that has
        failed waits for nothing."""
        self.is_closed = True
        if not self._free_arena.alive:
            return
        flag = never_reached(self._newest_flag)
        self._driver.cuCtxSetCurrent(self._context)
        for slot in range(self.num_slots):
            address = self.arena + slot * _LINE_BYTES
            self._driver.cuStreamWriteValue32_v2(self._side_stream, address, flag, 0)

    def disconnect(self) -> None:
        """Unmap the other end, once the device is through with what was enqueued."""
        self.close()
        while not torch.cuda.current_stream(self.device).query():
            self.close()  # a late write of the other end may have set a flag back
            time.sleep(_POLL_S)
        if self.other:
            self._unmap()
            self.other = 0

    def free(self) -> None:
        if self._free_arena():
            self._driver.cuStreamDestroy_v2(self._side_stream)


class CudaIpcReceiver(Receiver):
    """Owns the ring of one edge, on its device.

    Args:
        edge: names the edge in errors.
        shape: slots and their size.
        device: of this stage; its context is that of this thread.
        clock: sees nothing: all waits are on the device.

    Raises:
        HandoffError: no CUDA device, no compiler for its kernels, or no memory; names the edge.
    """

    path = "cuda_ipc"
    waits_on_device = True

    def __init__(
        self,
        edge: Edge,
        shape: RingShape,
        device: torch.device,
        clock: StageClock | None = None,
    ) -> None:
        super().__init__(edge, shape, clock)
        self._end = end = _End(edge, shape, device, receiver_bytes(shape))
        word, word_bytes = _word_of(shape)
        self._words_per_token = shape.hidden_size * shape.dtype.itemsize // word_bytes
        self._take = end.kernels.get(
            "handoff.cuh", f"take_slot_kernel<{word}>", "PPqPqqPIPPP", overlaps=False
        )
        self._take_pairs = end.kernels.get(
            "handoff.cuh", "take_pairs_kernel", "PPqPqqPIPP", overlaps=False
        )
        self._slots = [_slot_address(end.arena, shape, slot) for slot in range(shape.num_slots)]
        self._tags = [end.arena + _LINE_BYTES * i + _TAG_OFFSET for i in range(shape.num_slots)]
        self._fault = torch.zeros(_FAULT_WORDS, dtype=torch.int64, pin_memory=True)
        self._fault_address = self._fault.data_ptr()
        self._has_fault = ctypes.c_int64.from_address(self._fault_address + 8 * (_FAULT_WORDS - 1))

    @property
    def handle(self) -> dict[str, Any]:
        return self._end.handle

    def connect(self, handle: Mapping[str, Any]) -> None:
        self._end.connect(handle)

    @property
    def wait(self) -> Wait | None:
        return None

    def receive(self, plan: int, num_tokens: int, *, timeout_s: float = math.inf) -> Tensor:
        shape = self.shape
        size = num_tokens, shape.hidden_size
        output = torch.empty(size, dtype=shape.dtype, device=self._end.device)
        self.receive_into(plan, output)
        return output

    def release(self, plan: int) -> None:
        """Nothing to do: what was received is a copy, and the slot was given back behind it."""

    def receive_into(self, plan: int, output: Tensor, *, at: int = 0) -> None:
        end, num_tokens = self._end, output.shape[0]
        num_words = num_tokens * self._words_per_token
        slot = plan % end.num_slots
        flag = end.await_flag(slot, plan)
        arguments = (
            self._slots[slot],
            output.data_ptr(),
            num_words,
            self._tags[slot],
            plan,
            num_tokens,
            end.other + slot * _LINE_BYTES,
            flag,
            end.counter,
            at,
            self._fault_address,
        )
        self._take.launch(_grid(num_words), _THREADS, arguments)

    def receive_pairs(
        self, plan: int, num_pairs: int, target: Tensor, *, ready_at: int = 0, at: int = 0
    ) -> None:
        end = self._end
        if ready_at:
            end.write_time(ready_at)
        slot = plan % end.num_slots
        flag = end.await_flag(slot, plan)
        arguments = (
            self._slots[slot],
            target.data_ptr(),
            target.shape[0],
            self._tags[slot],
            plan,
            num_pairs,
            end.other + slot * _LINE_BYTES,
            flag,
            at,
            self._fault_address,
        )
        self._take_pairs.launch((1, 1), _THREADS, arguments)

    def settle(self, *, timeout_s: float = math.inf) -> None:
        self._end.settle(timeout_s)
        self.check()

    def check(self) -> None:
        if not self._has_fault.value:
            return
        plan, num_tokens, found_plan, found_tokens, _ = self._fault.tolist()
        raise ProtocolError(
            f"edge {self.edge}: slot {plan % self.shape.num_slots} holds plan {found_plan} with "
            f"{found_tokens} tokens; expected plan {plan} with {num_tokens}"
        )

    def close(self) -> None:
        self._end.close()

    def disconnect(self) -> None:
        self._end.disconnect()

    def free(self) -> None:
        self._end.free()


class CudaIpcSender(Sender):
    """Writes into the ring of a ``CudaIpcReceiver``. Arguments and errors as there."""

    path = "cuda_ipc"
    waits_on_device = True

    def __init__(
        self,
        edge: Edge,
        shape: RingShape,
        device: torch.device,
        clock: StageClock | None = None,
    ) -> None:
        super().__init__(edge, shape, clock)
        self._end = _End(edge, shape, device, _lines_bytes(shape))
        word, self._word_bytes = _word_of(shape)
        self._words_per_token = shape.hidden_size * shape.dtype.itemsize // self._word_bytes
        self._send = self._end.kernels.get(
            "handoff.cuh", f"send_slot_kernel<{word}>", "PPqPqqPIPPP", overlaps=False
        )
        self._slots: list[int] = []
        """Addresses of the receiver's slots here, once connected."""
        self._plan_in: list[int | None] = [None] * shape.num_slots
        """The plan sent last in each slot: it must have been read before the next."""

    @property
    def handle(self) -> dict[str, Any]:
        return self._end.handle

    def connect(self, handle: Mapping[str, Any]) -> None:
        end, shape = self._end, self.shape
        end.connect(handle)
        self._slots = [_slot_address(end.other, shape, slot) for slot in range(shape.num_slots)]

    @property
    def wait(self) -> Wait | None:
        return None

    def send(
        self, plan: int, hidden_states: Tensor, *, timeout_s: float = math.inf, at: int = 0
    ) -> None:
        end, num_tokens = self._end, self.check_message(plan, hidden_states)
        slot = plan % end.num_slots
        before = self._plan_in[slot]
        if before is None:
            end.check_open()
        else:
            end.await_flag(slot, before)
        self._plan_in[slot] = plan
        num_words = num_tokens * self._words_per_token
        if not hidden_states.is_contiguous() or hidden_states.data_ptr() % self._word_bytes:
            hidden_states = hidden_states.clone(memory_format=torch.contiguous_format)
        free_at, sent_at = at, at and at + 8
        if num_words * self._word_bytes >= COPY_ENGINE_BYTES:
            if at:
                end.write_time(at)
            self._copy(plan, slot, hidden_states)
            num_words, free_at = 0, 0
        line = end.other + slot * _LINE_BYTES
        arguments = (
            hidden_states.data_ptr(),
            self._slots[slot],
            num_words,
            line + _TAG_OFFSET,
            plan,
            num_tokens,
            line,
            (plan + end.flag_offset) & _FLAG_MASK,
            end.counter,
            free_at,
            sent_at,
        )
        self._send.launch(_grid(num_words), _THREADS, arguments)

    def _copy(self, plan: int, slot: int, message: Tensor) -> None:
        arguments = self._slots[slot], message.data_ptr(), message.nbytes, self._end.stream
        self._end.call(f"plan {plan}", "cuMemcpyDtoDAsync_v2", *arguments)

    def drain(self, *, timeout_s: float = math.inf) -> None:
        for slot, plan in enumerate(self._plan_in):
            if plan is not None:
                self._end.await_flag(slot, plan)
        self._end.settle(timeout_s)

    def settle(self, *, timeout_s: float = math.inf) -> None:
        self._end.settle(timeout_s)

    def close(self) -> None:
        self._end.close()

    def disconnect(self) -> None:
        self._end.disconnect()

    def free(self) -> None:
        self._end.free()


def receiver_bytes(shape: RingShape) -> int:
    """Device memory of a receiver's arena."""
    return _round_up(_slot_address(0, shape, shape.num_slots), ARENA_ALIGNMENT)


def _lines_bytes(shape: RingShape) -> int:
    """Flags and tags of all slots, and a line that is this end's own."""
    return _round_up((shape.num_slots + 1) * _LINE_BYTES, _SLOT_ALIGNMENT)


def _slot_address(arena: int, shape: RingShape, slot: int) -> int:
    return arena + _lines_bytes(shape) + slot * _round_up(shape.slot_bytes, _SLOT_ALIGNMENT)


def _word_of(shape: RingShape) -> tuple[str, int]:
    """The widest word that all messages are made of, and its bytes."""
    row_bytes = shape.hidden_size * shape.dtype.itemsize
    size = next(size for size in _WORDS if row_bytes % size == 0)
    return _WORDS[size], size


def _grid(num_words: int) -> tuple[int, int]:
    """Thread blocks for a message."""
    return max(1, min(-(-num_words // (_THREADS * _WORDS_PER_THREAD)), _MAX_THREAD_BLOCKS)), 1


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _free(context: int | None, address: int) -> bool:
    driver().cuCtxSetCurrent(context)
    return bool(driver().cuMemFree_v2(address) == 0)


def _close(context: int | None, address: int) -> None:
    driver().cuCtxSetCurrent(context)
    driver().cuIpcCloseMemHandle(address)
