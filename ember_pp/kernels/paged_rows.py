"""Which KV slots each row of a step attends to, worked out once for all layers.

A row is one sequence's run of new tokens (one for a decode, several for a prefill chunk). CUDA
kernels read block tables and lengths on the device. The reference attention computes rows of the
same number of new tokens and a similar context together, padded to the longest; padding reads
the row's own first slot, which is always stored, so that whatever lies in unused slots, NaN
included, is never read.

A step may be padded to a shape that others share, so that one CUDA graph serves them all: rows
with a context of 0 are padding, rows may have no new tokens, and tokens from the last row's end
on are padding. What padding gets for an output is unspecified.

Shape letters: T tokens of the step, R rows, Q new tokens of a row, L longest context of a
group, S block size, N rows of the block tables, W blocks of the longest of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_SMALLEST_BUCKET = 7
"""Contexts up to ``2**7`` tokens share a group: below that a group costs more than padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are computed in one call."""

    num_rows: int
    query_len: int
    """Q, the same for all rows of the group."""
    context_len: int
    """L."""
    token_index: Tensor | None
    """[num_rows * Q] int64 into T; None: the group is all tokens in order."""
    kv_slots: Tensor
    """[num_rows * L] int64."""
    mask: Tensor | None
    """[num_rows, 1, Q, L], 0 or -inf, to be added; None: nothing, or with ``is_causal``
    only what follows a token, is hidden."""
    is_causal: bool
    """All rows are fresh prompts of one length: token q sees the tokens 0 .. q."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedRows:
    """The rows of a step, as ``paged_attention`` takes them.

    Tensors are read on the device when a kernel runs: those of a captured step may have other
    contents when it is replayed. All else is static, the shapes and strides of tensors and which of
    them are None included: with that alone kernels and their launch shapes are chosen. Static
    numbers bound the contents: ``cu_seqlens_q`` ends at ``num_tokens`` at most, and no row has more
    than ``max_query_len`` new tokens. A context of W blocks is the longest.
    """

    block_tables: Tensor
    """[N, W] int32 block ids in order, pad -1; last dim contiguous."""
    context_lens: Tensor
    """[R] int32 tokens attended, this step's included; 0: the row is padding."""
    cu_seqlens_q: Tensor
    """[R + 1] int32 cumulative new tokens per row, first 0; the last may be less than T."""
    table_rows: Tensor | None = None
    """[R] int32: row r has the table ``block_tables[table_rows[r]]``; None: that of row r."""
    decode_lens: Tensor | None = None
    """[R] int32: ``context_lens`` of rows with one new token, 0 for all others. None: it is worked
    out where it is needed, unless ``max_query_len`` is 1."""
    num_tokens: int
    """T."""
    max_query_len: int
    """Most new tokens of a row, or more; with 1, each row has one, or is padding."""
    block_size: int
    """S."""
    dtype: torch.dtype
    """That of the queries."""

    @functools.cached_property
    def lens_of_decodes(self) -> Tensor:
        """``decode_lens``, whether or not it was given."""
        if self.decode_lens is not None:
            return self.decode_lens
        if self.max_query_len == 1:
            return self.context_lens
        return self.context_lens.where(self.cu_seqlens_q.diff() == 1, 0)

    @functools.cached_property
    def groups(self) -> tuple[RowGroup, ...]:
        """The rows by shape, no padding. Waits for the device once, to learn the lengths."""
        starts = self.cu_seqlens_q.tolist()
        contexts = self.context_lens.tolist()
        by_shape: dict[tuple[int, int], list[int]] = {}
        for row, context_len in enumerate(contexts):
            query_len = starts[row + 1] - starts[row]
            if not query_len or not context_len:
                continue
            assert query_len <= context_len, (row, query_len, context_len)
            bucket = max((context_len - 1).bit_length(), _SMALLEST_BUCKET)
            by_shape.setdefault((query_len, bucket), []).append(row)
        tables = self.block_tables
        if self.table_rows is not None:
            tables = tables.index_select(0, self.table_rows)
        tables = tables.long()
        num_tokens = self.num_tokens
        return tuple(
            _group(
                rows, query_len, starts, contexts, tables, self.block_size, num_tokens, self.dtype
            )
            for (query_len, _), rows in by_shape.items()
        )


def _group(
    rows: Sequence[int],
    query_len: int,
    starts: Sequence[int],
    contexts: Sequence[int],
    block_tables: Tensor,
    block_size: int,
    num_tokens: int,
    dtype: torch.dtype,
) -> RowGroup:
    device = block_tables.device
    has_all_rows = len(rows) == len(contexts)
    is_everything = has_all_rows and len(rows) * query_len == num_tokens
    lens = [contexts[row] for row in rows]
    context_len = max(lens)
    is_even = min(lens) == context_len
    row_index = torch.tensor(rows, device=device)
    row_lens = torch.tensor(lens, device=device)
    row_starts = torch.tensor([starts[row] for row in rows], device=device)
    tables = block_tables if has_all_rows else block_tables.index_select(0, row_index)
    is_causal = query_len == context_len and query_len > 1  # no row is shorter than Q
    needs_mask = not is_causal and not (is_even and query_len == 1)
    tokens = row_starts[:, None] + torch.arange(query_len, device=device)
    return RowGroup(
        num_rows=len(rows),
        query_len=query_len,
        context_len=context_len,
        token_index=None if is_everything else tokens.flatten(),
        kv_slots=_kv_slots(tables, row_lens, context_len, block_size).flatten(),
        mask=_mask(row_lens, query_len, context_len, dtype) if needs_mask else None,
        is_causal=is_causal,
    )


def _kv_slots(block_tables: Tensor, row_lens: Tensor, context_len: int, block_size: int) -> Tensor:
    """[num_rows, L] KV slot of every context position; beyond a row's end, of its first."""
    position = torch.arange(context_len, device=block_tables.device)
    position = torch.where(position < row_lens[:, None], position, 0)
    blocks = block_tables.gather(1, position // block_size)
    return blocks * block_size + position % block_size


def _mask(row_lens: Tensor, query_len: int, context_len: int, dtype: torch.dtype) -> Tensor:
    """[num_rows, 1, Q, L] 0 where a new token may look, -inf elsewhere."""
    key_position = torch.arange(context_len, device=row_lens.device)
    query_position = torch.arange(query_len, device=row_lens.device) - query_len
    last_seen = row_lens[:, None] + query_position  # [num_rows, Q]
    is_hidden = key_position > last_seen[:, :, None]
    mask = torch.zeros(is_hidden.shape, dtype=dtype, device=row_lens.device)
    return mask.masked_fill_(is_hidden, float("-inf"))[:, None]
