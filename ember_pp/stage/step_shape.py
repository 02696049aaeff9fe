"""To which sizes a step is padded, so that few sizes of steps exist.

The size follows from the plan alone: it is the same on every stage, however layers are split,
and the same whether a step is captured in a CUDA graph or not. So equal plans give equal bits.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

_SMALLEST_CHUNKS = 16
"""Fewest tokens of a step with chunks."""
_SIZES_PER_OCTAVE = 16
"""From 256 tokens on, padding is at most one part in so many."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes of a step with its padding."""

    is_decode: bool
    """Every row has one token and samples."""
    num_tokens: int
    num_rows: int
    num_samples: int
    """Rows that sample; 0: none does."""


def decode_sizes(max_rows: int) -> list[int]:
    """Numbers of rows that steps without chunks are padded to, rising, the last ``max_rows``."""
    sizes, size = [], 1
    while size < max_rows:
        sizes.append(size)
        if size < 8:
            size *= 2
        elif size < 64:
            size += 8
        else:
            size += 16 if size < 256 else 32
    return [*sizes, max_rows]


def decode_size(num_rows: int, sizes: Sequence[int]) -> int:
    """The first of ``sizes``, which are ``decode_sizes``, that is no less than ``num_rows``."""
    return sizes[bisect.bisect_left(sizes, num_rows)]


def mixed_size(num_tokens: int, max_tokens: int, max_padded: int) -> int:
    """Tokens that a step with chunks is padded to; beyond ``max_padded`` it is not padded."""
    if num_tokens > max_padded:
        return num_tokens
    if num_tokens <= _SMALLEST_CHUNKS:
        return min(_SMALLEST_CHUNKS, max_tokens)
    step = max(_SMALLEST_CHUNKS, (1 << (num_tokens - 1).bit_length()) // 2 // _SIZES_PER_OCTAVE)
    return min(-(-num_tokens // step) * step, max_tokens)
