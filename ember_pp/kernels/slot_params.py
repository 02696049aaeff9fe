"""What each slot asks of the draw, in one table on the device that a captured step reads."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_RECORD = struct.Struct("<qdffii")
"""seed, top_p, temperature, min_p, top_k, unused: 32 bytes, which the kernels read as they are."""
_WORDS = _RECORD.size // 8


class DrawSettings(NamedTuple):
    """Of one slot: steps 4 to 8 of ``docs/sampling.md``."""

    seed: int
    """The bits of an unsigned 64-bit number."""
    temperature: float
    """0: the most likely token; else at least 1e-30."""
    top_k: int
    """0: all; below 2**31."""
    top_p: float
    min_p: float

    def to_bytes(self) -> bytes:
        """The record of the table."""
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        return _RECORD.pack(seed, self.top_p, self.temperature, self.min_p, self.top_k, 0)


class SlotParams:
    """Settings of the draw by slot; tensors [max_slots] that are columns of one table.

    Args:
        max_slots: slots are in ``[0, max_slots)``; unset ones hold zeros, which draw the most
            likely token.
        device: where the logits are.
    """

    def __init__(self, max_slots: int, device: torch.device | str) -> None:
        self.table = torch.zeros(max_slots, _WORDS, dtype=torch.int64, device=device)
        """[max_slots, 4] int64, the records; stays at its address."""

    @property
    def seed(self) -> Tensor:
        """[max_slots] int64, the bits of an unsigned number."""
        return self.table[:, 0]

    @property
    def top_p(self) -> Tensor:
        """[max_slots] float64; 1: all."""
        return self.table.view(torch.float64)[:, 1]

    @property
    def temperature(self) -> Tensor:
        """[max_slots] float32; 0: the most likely token."""
        return self.table.view(torch.float32)[:, 4]

    @property
    def min_p(self) -> Tensor:
        """[max_slots] float32; 0: all."""
        return self.table.view(torch.float32)[:, 5]

    @property
    def top_k(self) -> Tensor:
        """[max_slots] int32; 0: all."""
        return self.table.view(torch.int32)[:, 6]

    def update(self, changes: Mapping[int, DrawSettings]) -> None:
        """Set the records of some slots, in the order of the stream; waits for nothing."""
        if not changes:
            return
        rows = b"".join(
            struct.pack("<q", slot) + settings.to_bytes() for slot, settings in changes.items()
        )
        staged = torch.frombuffer(bytearray(rows), dtype=torch.int64).view(-1, 1 + _WORDS)
        if self.table.is_cuda:  # from pageable memory it would wait for the stream
            staged = staged.pin_memory().to(self.table.device, non_blocking=True)
        self.table.index_copy_(0, staged[:, 0], staged[:, 1:])
