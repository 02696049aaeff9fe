"""``python -m ember_pp.stage.handoff_rates``: how long a hop from one stage to the next takes.

Started by ``job=bench job.workload=handoff``, once for each path and pair of devices. It starts a
second process like itself, the *echo*; two edges lie between them, and hidden states go back and
forth. What to measure comes as JSON on stdin, what was measured goes as JSON to stdout.

A hop is half a round trip, from the end of the sender's last kernel to the start of the
receiver's first one: both times are taken by this process on its own device, since the clocks of
two GPUs differ. The echo launches a kernel too, between what it receives and what it sends, as a
stage would. On a CPU both times are those of the host.

A path whose waits are on the device is timed with the host out of the way: a kernel that sleeps
keeps the device at the gate until both hosts have enqueued all that is to be timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Protocol

import torch
from torch import Tensor

from ember_pp.errors import EmberError, HandoffError
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.stage.__main__ import die_with_parent
from ember_pp.stage.handoff import Edge, RingShape, make_receiver, make_sender

ROW_ELEMENTS = 1024
"""Of bfloat16: a message is so many rows of 2 KiB, one row being a token of Qwen3-0.6B."""
ROW_BYTES = 2 * ROW_ELEMENTS
NUM_SLOTS = 3

_BATCH = 32
"""Round trips that are enqueued together: less than a stream takes before the host has to wait."""
_GATE_CYCLES = 20_000_000
"""About 10 ms; doubled where the hosts need longer."""
_MAX_GATES = 6
_EXIT_TIMEOUT_S = 20.0


class Ends(Protocol):
    """One process's ends of the two edges: what it receives, and what it sends."""

    @property
    def is_enqueued(self) -> bool:
        """Whether all of the below return at once, with their waits enqueued on the stream."""

    def send(self, number: int, message: Tensor) -> None:
        """Write ``message``, ``[T, ROW_ELEMENTS]``; it may be overwritten after this, in stream
        order."""

    def receive(self, number: int, num_rows: int) -> Tensor:
        """The message of that number, ``[num_rows, ROW_ELEMENTS]``, until it is released."""

    def release(self, number: int) -> None:
        """Give its slot back."""

    def close(self) -> None:
        """Nothing more is sent or received.

        Raises:
            EmberError: what was received was not in order.
        """


class EdgeEnds:
    """Ends of two edges of the pipeline's own hand-off.

    Raises:
        HandoffError: the path cannot be had between these devices.
    """

    def __init__(self, wanted: Mapping[str, Any], peer: Peer, device: torch.device) -> None:
        shape = RingShape(
            num_slots=NUM_SLOTS,
            max_tokens=max(wanted["sizes"]) // ROW_BYTES,
            hidden_size=ROW_ELEMENTS,
            dtype=torch.bfloat16,
        )
        own, other = int(peer.is_echo), int(not peer.is_echo)
        self._receiver = make_receiver(wanted["path"], Edge(other, own), shape, device)
        self._sender = make_sender(wanted["path"], Edge(own, other), shape, device)
        peer.say({end: _as_json(getattr(self, f"_{end}").handle) for end in ("sender", "receiver")})
        handles = peer.hear()
        self._receiver.connect(_from_json(handles["sender"]))
        self._sender.connect(_from_json(handles["receiver"]))
        self._receiver.prepare()
        self._sender.prepare()

    @property
    def is_enqueued(self) -> bool:
        return self._sender.waits_on_device

    def send(self, number: int, message: Tensor) -> None:
        self._sender.send(number, message)

    def receive(self, number: int, num_rows: int) -> Tensor:
        return self._receiver.receive(number, num_rows)

    def release(self, number: int) -> None:
        self._receiver.release(number)

    def close(self) -> None:
        self._receiver.check()
        self._receiver.disconnect()
        self._sender.disconnect()


def _as_json(handle: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"hex": value.hex()} if isinstance(value, bytes) else value
        for key, value in handle.items()
    }


def _from_json(handle: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: bytes.fromhex(value["hex"]) if isinstance(value, dict) else value
        for key, value in handle.items()
    }


OpenEnds = Callable[[Mapping[str, Any], "Peer", torch.device], Ends]


class Peer:
    """The other process, over pipes, a line of JSON at a time.

    Args:
        source, sink: from it and to it.
        is_echo: whether *this* process is the echo.
    """

    def __init__(self, source: IO[str], sink: IO[str], *, is_echo: bool) -> None:
        self.is_echo = is_echo
        self._source = source
        self._sink = sink

    def say(self, what: Mapping[str, Any]) -> None:
        """Send one line."""
        try:
            self._sink.write(json.dumps(what) + "\n")
            self._sink.flush()
        except BrokenPipeError:
            raise HandoffError("the other process ended") from None

    def hear(self) -> dict[str, Any]:
        """The next line.

        Raises:
            HandoffError: there is none, or it says what the other process failed with.
        """
        line = self._source.readline()
        if not line:
            raise HandoffError("the other process ended")
        said: dict[str, Any] = json.loads(line)
        if "reason" in said:
            raise HandoffError(said["reason"])
        return said


# --------------------------------------------------------------------------------------
# clocks


class HostTimes:
    """Moments on the host's clock."""

    def __init__(self) -> None:
        self._times: list[int] = []

    def mark(self) -> None:
        """Note the time now."""
        self._times.append(time.perf_counter_ns())

    def take(self) -> list[int]:
        """All that were noted, in ns; none are kept."""
        times, self._times = self._times, []
        return times


class DeviceTimes:
    """Moments on the device's clock, each noted by a kernel of its own.

    Raises:
        KernelBuildError: the kernel cannot be built; says what to install.
    """

    def __init__(self, device: torch.device) -> None:
        self._kernel = KernelSet(device).get(
            "handoff.cuh", "write_time_kernel", "P", overlaps=False
        )
        # On the device: what goes to the host's memory would make each kernel end later.
        self._times = torch.zeros(2 * _BATCH, dtype=torch.int64, device=device)
        self._count = 0

    def mark(self) -> None:
        """Note the time when the stream comes here; at most ``2 * _BATCH`` between two takes."""
        index = self._count % len(self._times)
        self._kernel.launch((1, 1), 32, (self._times.data_ptr() + 8 * index,))
        self._count += 1

    def take(self) -> list[int]:
        """All that were noted, in ns, once the device is done; none are kept."""
        count, self._count = self._count, 0
        return [int(moment) for moment in self._times[:count].tolist()]


Times = HostTimes | DeviceTimes


# --------------------------------------------------------------------------------------
# back and forth


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Lap:
    """What one visit to a size measured."""

    hops_ns: list[float]
    is_host_bound: bool
    """Whether the hosts were too slow for the gate: then times are theirs."""


class Lead:
    """The process that starts each round trip and looks at the clock."""

    def __init__(self, ends: Ends, peer: Peer, times: Times, device: torch.device) -> None:
        self._ends = ends
        self._peer = peer
        self._times = times
        self._device = device
        self._number = 0
        self._gate_cycles = _GATE_CYCLES

    def check(self, num_rows: int) -> None:
        """Send noise there and back.

        Raises:
            HandoffError: what came back is not what was sent.
        """
        noise = torch.randint(-(2**15), 2**15, (num_rows, ROW_ELEMENTS), dtype=torch.int16)
        noise = noise.to(self._device)
        self._peer.say({"rows": num_rows, "rounds": 1})
        number = self._number
        self._ends.send(number, noise.view(torch.bfloat16))
        received = self._ends.receive(number, num_rows).view(torch.int16).clone()
        self._ends.release(number)
        self._number += 1
        self._peer.hear()
        num_wrong = int((received != noise).sum())
        if num_wrong:
            raise HandoffError(
                f"{num_wrong} of {noise.numel()} values of a message of {num_rows * ROW_BYTES} "
                "bytes came back different"
            )

    def lap(self, num_rows: int, num_hops: int) -> Lap:
        """Times of so many round trips, halved."""
        message = torch.zeros(num_rows, ROW_ELEMENTS, dtype=torch.bfloat16, device=self._device)
        hops_ns: list[float] = []
        is_host_bound = False
        for start in range(0, num_hops, _BATCH):
            moments, is_late = self._batch(message, min(_BATCH, num_hops - start))
            is_host_bound |= is_late
            hops_ns += [
                (end - begin) / 2 for begin, end in zip(moments[0::2], moments[1::2], strict=True)
            ]
        return Lap(hops_ns=hops_ns, is_host_bound=is_host_bound)

    def _batch(self, message: Tensor, num_rounds: int) -> tuple[list[int], bool]:
        """Times of the begin and end of each round trip, and whether the gate opened too early
        each time that it was tried."""
        for _ in range(_MAX_GATES):
            self._peer.say({"rows": len(message), "rounds": num_rounds})
            gate = self._close_gate() if self._ends.is_enqueued else None
            for _ in range(num_rounds):
                self._round(message)
            self._peer.hear()  # the echo has enqueued its part, too
            is_late = gate is not None and bool(gate.query())
            moments = self._times.take()
            if not is_late:
                break
            self._gate_cycles *= 2
        return moments, is_late

    def _close_gate(self) -> Any:
        """An event that is over once the device goes on."""
        torch.cuda._sleep(self._gate_cycles)  # type: ignore[no-untyped-call]
        return torch.cuda.current_stream(self._device).record_event()

    def _round(self, message: Tensor) -> None:
        number = self._number
        self._times.mark()
        self._ends.send(number, message)
        self._ends.receive(number, len(message))
        self._times.mark()
        self._ends.release(number)
        self._number += 1

    def finish(self) -> None:
        """Let the echo go."""
        self._peer.say({"rows": 0, "rounds": 0})

    def clock_ns(self) -> dict[str, float]:
        """``step_ns``, what the clock counts in, and ``between_ns``, the median time between two
        kernels with nothing between them: what no hop on this device is below."""
        for _ in range(_MAX_GATES):
            gate = None if isinstance(self._times, HostTimes) else self._close_gate()
            for _ in range(2 * _BATCH):
                self._times.mark()
            is_late = gate is not None and bool(gate.query())
            moments = self._times.take()
            if not is_late:
                break
        steps_ns = [end - begin for begin, end in itertools.pairwise(moments)]
        return {
            "step_ns": float(math.gcd(*steps_ns)),
            "between_ns": float(statistics.median(steps_ns)),
        }


def echo(ends: Ends, peer: Peer, times: Times) -> None:
    """Send back what comes, until there is no more."""
    number = 0
    while (wanted := peer.hear())["rounds"]:
        for _ in range(wanted["rounds"]):
            received = ends.receive(number, wanted["rows"])
            times.mark()  # the first kernel of this stage, and its last
            ends.send(number, received)
            ends.release(number)
            number += 1
        peer.say({"enqueued": number})
        times.take()  # waits for the device


# --------------------------------------------------------------------------------------
# what a visit to every size comes to


def measure(lead: Lead, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every size: checked, then timed in laps over all of them, some to warm up.

    Returns:
        For each size ``num_bytes``; ``p50_us``, ``p99_us``, ``min_us`` of ``num_hops`` hops;
        ``p50_spread_us``, lowest and highest of the laps; ``gb_per_s`` at the median;
        ``is_host_bound``.
    """
    sizes: list[int] = wanted["sizes"]
    laps: dict[int, list[Lap]] = {num_bytes: [] for num_bytes in sizes}
    for num_bytes in sizes:
        lead.check(num_bytes // ROW_BYTES)
    for number in range(wanted["warmup"] + wanted["laps"]):
        for num_bytes in sizes:
            lap = lead.lap(num_bytes // ROW_BYTES, num_hops(num_bytes, wanted["hops"]))
            if number >= wanted["warmup"]:
                laps[num_bytes].append(lap)
    return [summarize(num_bytes, laps[num_bytes]) for num_bytes in sizes]


def num_hops(num_bytes: int, most: int) -> int:
    """Of one lap: fewer of large messages, which take long and spread less."""
    return min(most, max(most // 8, most * 2**20 // num_bytes, 1))


def summarize(num_bytes: int, laps: Sequence[Lap]) -> dict[str, Any]:
    """One size; see ``measure``."""
    hops_us = sorted(hop / 1e3 for lap in laps for hop in lap.hops_ns)
    medians_us = [statistics.median(lap.hops_ns) / 1e3 for lap in laps]
    p50_us = statistics.median(hops_us)
    return {
        "num_bytes": num_bytes,
        "num_hops": len(hops_us),
        "p50_us": round(p50_us, 3),
        "p99_us": round(hops_us[(len(hops_us) * 99 + 99) // 100 - 1], 3),
        "min_us": round(hops_us[0], 3),
        "p50_spread_us": [round(min(medians_us), 3), round(max(medians_us), 3)],
        "gb_per_s": round(num_bytes / p50_us / 1e3, 4),
        "is_host_bound": any(lap.is_host_bound for lap in laps),
    }


# --------------------------------------------------------------------------------------
# two processes


def main(module: str = "ember_pp.stage.handoff_rates", open_ends: OpenEnds = EdgeEnds) -> None:
    """Measure what stdin says, or be the echo.

    Args:
        module: what to start the echo as.
        open_ends: makes the ends of a process; another program has other ones.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--echo", action="store_true")
    is_echo = parser.parse_args().echo
    if is_echo:
        wanted = json.loads(sys.stdin.readline())
        die_with_parent(wanted["parent_pid"])
        _run_echo(wanted, Peer(sys.stdin, sys.stdout, is_echo=True), open_ends)
        return
    wanted = json.load(sys.stdin)
    die_with_parent(wanted["parent_pid"])
    command = [sys.executable, "-P", "-m", module, "--echo"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        peer = Peer(process.stdout, process.stdin, is_echo=False)
        measured = _run_lead(wanted, peer, open_ends)
        try:
            process.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
    sys.stdout.write(json.dumps(measured) + "\n")


def _run_lead(wanted: dict[str, Any], peer: Peer, open_ends: OpenEnds) -> dict[str, Any]:
    """Everything that stdout gets: ``sizes`` and how they were measured, or ``reason``."""
    said: dict[str, Any] = {"path": wanted["path"], "devices": wanted["devices"]}
    try:
        peer.say(wanted | {"parent_pid": os.getpid()})
        device = _use_device(wanted, is_echo=False)
        times = _make_times(device)
        ends = open_ends(wanted, peer, device)
        lead = Lead(ends, peer, times, device)
        said["clock"] = {"of": device.type} | lead.clock_ns()
        said["is_enqueued"] = ends.is_enqueued
        said["sizes"] = measure(lead, wanted)
        lead.finish()
        ends.close()
        peer.hear()
    except EmberError as error:
        return said | {"reason": str(error)}
    return said | {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "uuids": [_uuid(torch.device(name)) for name in wanted["devices"]],
    }


def _run_echo(wanted: Mapping[str, Any], peer: Peer, open_ends: OpenEnds) -> None:
    try:
        device = _use_device(wanted, is_echo=True)
        times = _make_times(device)
        ends = open_ends(wanted, peer, device)
        echo(ends, peer, times)
        ends.close()
        peer.say({"closed": True})
    except EmberError as error:
        peer.say({"reason": str(error)})


def _use_device(wanted: Mapping[str, Any], *, is_echo: bool) -> torch.device:
    torch.set_num_threads(wanted["num_threads"])
    device = torch.device(wanted["devices"][int(is_echo)])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return device


def _make_times(device: torch.device) -> Times:
    return HostTimes() if device.type == "cpu" else DeviceTimes(device)


def _uuid(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


if __name__ == "__main__":
    main()
