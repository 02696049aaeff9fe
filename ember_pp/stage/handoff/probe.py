"""Test of an edge before it is used: seeded patterns through the real path, compared by byte.

Both ends know the seed, so nothing but the path itself carries the pattern. Every slot is used
twice, once full and once with a single token; the second lap also proves that ``free`` comes
back. Probe messages have negative plan numbers and leave all flags as they were.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from ember_pp.errors import TransportError
from ember_pp.stage.handoff.base import Receiver, RingShape, Sender

PROBE_TIMEOUT_S = 30.0
_NOISE_BYTES = 1_048_573
"""Drawn once and repeated: drawing gigabytes would take longer than all else at the start. A
prime, so that no two pages have the same bytes at the same place."""
_STRIDE = 7920
"""From the pattern of one message to that of the next; a multiple of the size of any element."""


@dataclasses.dataclass(frozen=True, slots=True)
class ProbeResult:
    """What one end saw."""

    is_ok: bool
    text: str


def probe_sender(
    sender: Sender, seed: int, device: torch.device, *, timeout_s: float = PROBE_TIMEOUT_S
) -> ProbeResult:
    """Send the patterns and wait until all slots have come back."""
    started = time.monotonic()
    num_bytes = 0
    try:
        sender.prepare()
        noise = _noise(sender.shape, seed)
        for plan, num_tokens in _messages(sender.shape):
            pattern = _pattern(sender.shape, noise, plan, num_tokens)
            sender.send(plan, pattern.to(device), timeout_s=timeout_s)
            num_bytes += pattern.numel() * pattern.element_size()
        sender.drain(timeout_s=timeout_s)
    except TransportError as error:
        return ProbeResult(False, str(error))
    return ProbeResult(True, _summary("sent", num_bytes, started))


def probe_receiver(
    receiver: Receiver, seed: int, *, timeout_s: float = PROBE_TIMEOUT_S
) -> ProbeResult:
    """Receive the patterns, compare every byte and give the slots back."""
    started = time.monotonic()
    num_bytes, wrong = 0, ""
    try:
        receiver.prepare()
        noise = _noise(receiver.shape, seed)
        for plan, num_tokens in _messages(receiver.shape):
            expected = _pattern(receiver.shape, noise, plan, num_tokens)
            received = receiver.receive(plan, num_tokens, timeout_s=timeout_s)
            receiver.settle(timeout_s=timeout_s)
            received = received.cpu()
            # Compared before the release: what was received may be the slot itself.
            difference = _first_difference(expected, received)
            receiver.release(plan)
            if difference and not wrong:
                wrong = f"slot {plan % receiver.shape.num_slots}: {difference}"
            num_bytes += expected.numel() * expected.element_size()
    except TransportError as error:
        return ProbeResult(False, str(error))
    if wrong:
        return ProbeResult(False, f"edge {receiver.edge}: {wrong}")
    return ProbeResult(True, _summary("compared", num_bytes, started))


def _messages(shape: RingShape) -> Iterator[tuple[int, int]]:
    """Plan number and token count of each probe message."""
    for lap, num_tokens in ((-2, shape.max_tokens), (-1, 1)):
        for slot in range(shape.num_slots):
            yield lap * shape.num_slots + slot, num_tokens


def _noise(shape: RingShape, seed: int) -> Tensor:
    """Any bits whatever, NaNs included: they are only copied. Long enough for every message."""
    drawn = random.Random(seed).randbytes(_NOISE_BYTES)
    noise = torch.frombuffer(bytearray(drawn), dtype=torch.uint8)
    num_bytes = shape.slot_bytes + 2 * shape.num_slots * _STRIDE
    return noise.repeat(-(-num_bytes // _NOISE_BYTES))


def _pattern(shape: RingShape, noise: Tensor, plan: int, num_tokens: int) -> Tensor:
    """[num_tokens, hidden_size]: the noise, from another byte on for each plan."""
    start = (plan + 2 * shape.num_slots) * _STRIDE
    end = start + num_tokens * shape.hidden_size * shape.dtype.itemsize
    return noise[start:end].view(shape.dtype).view(num_tokens, shape.hidden_size)


def _first_difference(expected: Tensor, received: Tensor) -> str:
    expected, received = (tensor.view(torch.uint8).flatten() for tensor in (expected, received))
    if torch.equal(expected, received):
        return ""
    is_different = expected != received
    index = int(is_different.int().argmax())
    return (
        f"byte {index} of {len(expected)} is {int(received[index])}, was sent as "
        f"{int(expected[index])}; {int(is_different.sum())} bytes differ"
    )


def _summary(action: str, num_bytes: int, started: float) -> str:
    return f"{action} {num_bytes} bytes in {(time.monotonic() - started) * 1e3:.1f} ms"
