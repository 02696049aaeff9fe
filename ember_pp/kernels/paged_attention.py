"""Paged attention on a GPU: which kernel takes which rows of a step, and in what shape.

Rows with one new token are decodes and go to ``paged_decode``, whatever else is in the step;
rows with more are chunks of prompts. Both kernels write into one output. What is launched
depends on the static fields of ``PagedRows`` alone, never on lengths, so that a step can be
captured.

Shape letters: T tokens, R rows, H query heads, K KV heads, G = H / K, d head dim, S block size.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from ember_pp.kernels import reference
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.paged_rows import PagedRows

_WARP = 32
_LOG2_E = 1.4426950408889634

_TILE = 16
"""Positions of a tile of ``paged_decode``."""
_DECODE_WARPS = 16
"""Warps of ``paged_decode`` on a multiprocessor: as many as registers allow."""
_DECODE_MIN_SHARE = 1
"""Fewest tiles of a warp: below that, adding parts costs more than it saves."""
_DECODE_FEW_ROWS = 32
"""Up to so many rows all warps of a thread block take tiles of one KV head: parts that meet in
memory are fewer. Beyond, up to four neighbouring heads are read side by side."""
_DECODE_MOST_ROWS = 3072
"""A thread block keeps four bytes for each in shared memory."""
_FAN_IN = 16
_DECODE_COUNTERS = 1 << 16

_PREFILL_TILE = 128
"""Rows of a product of ``paged_prefill``: tokens times G."""
_PREFILL_MOST_DIMS = 128
_PREFILL_NEAR_BYTES = 16 * 2**20
"""Keys and values that stay in the second-level cache while all heads read them in turn."""
_PREFILL_MIN_SHARE = 256
"""Fewest positions of a thread block: below that, adding parts costs more than it saves."""


@dataclasses.dataclass(frozen=True, slots=True)
class _PrefillKernel:
    """One that computes chunks, and how it is launched."""

    file: str
    name: str
    step: int
    """Positions that it computes at a time; it has two buffers of them."""
    query_buffers: int
    threads: int
    blocks: int
    """Of a multiprocessor, as far as registers go."""

    def shared_bytes(self, head_dim: int) -> int:
        """Dynamic shared memory: queries, keys and values in bf16."""
        return 2 * head_dim * (self.query_buffers * _PREFILL_TILE + 2 * 2 * self.step)


_PREFILL = _PrefillKernel("paged_prefill.cuh", "paged_prefill_kernel", 64, 1, 128, 2)
_PREFILL_WGMMA = _PrefillKernel(
    "paged_prefill_wgmma.cuh", "paged_prefill_wgmma_kernel", 128, 2, 384, 1
)
_PREFILL_STATIC_SHARED = 4096
"""Bytes beside these: static ones, and what the driver takes."""


class PagedAttention:
    """The attention kernels of one device, and the memory that they share.

    Args:
        kernels: those of the device.
        has_wgmma: groups of warps can multiply what lies in shared memory; None: as the card says.
    """

    def __init__(self, kernels: KernelSet, *, has_wgmma: bool | None = None) -> None:
        self._kernels = kernels
        if has_wgmma is None:
            has_wgmma = kernels.architecture == 90
        self._prefill_kernel = _PREFILL_WGMMA if has_wgmma else _PREFILL
        self._decode_parts: dict[tuple[int, int, int], _DecodeParts] = {}
        self._prefill_parts: _PrefillParts | None = None

    def fits(self, dtype: torch.dtype, head_dim: int, group_size: int, block_size: int) -> bool:
        """Whether there are kernels for queries and caches like these."""
        return (
            dtype == torch.bfloat16
            and head_dim in (64, 128)
            and group_size <= 8
            and block_size in (16, 32, 64, 128, 256)
        )

    def __call__(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, scale: float
    ) -> Tensor:
        """See ``Ops.paged_attention``. What no kernel fits is computed by the reference."""
        block_size, num_kv_heads, head_dim = k_cache.shape[1:]
        group_size = query.shape[1] // num_kv_heads
        fits = (
            self.fits(query.dtype, head_dim, group_size, block_size)
            and len(rows.context_lens) <= _DECODE_MOST_ROWS
            and (k_cache.data_ptr() | v_cache.data_ptr()) % 16 == 0
        )
        if not fits:
            return reference.paged_attention(query, k_cache, v_cache, rows, scale=scale)
        query = query.contiguous()
        output = torch.empty_like(query)
        if query.shape[0] and len(rows.context_lens):
            if rows.max_query_len > 1:
                self._prefill(query, k_cache, v_cache, rows, scale, output)
            self._decode(query, k_cache, v_cache, rows, scale, output)
        return output

    def _decode(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        output: Tensor,
    ) -> None:
        """Into ``output``: rows with one new token."""
        block_size, num_kv_heads, head_dim = k_cache.shape[1:]
        num_heads = query.shape[1]
        group_size = num_heads // num_kv_heads
        lens = rows.lens_of_decodes.contiguous()
        starts = rows.cu_seqlens_q.contiguous()
        tables, table_rows = _tables(rows)
        num_rows = len(lens)
        heads, splits, group = _decode_shape(num_rows, num_kv_heads, group_size)
        warps, grid_y = heads * splits, num_kv_heads // heads
        grid_x = max(1, self._kernels.num_multiprocessors * (_DECODE_WARPS // warps) // grid_y)
        parts = self._parts(grid_x, num_heads, head_dim)
        assert (num_rows + 2 * (grid_x // _FAN_IN + 1)) * num_kv_heads <= _DECODE_COUNTERS
        kernel = self._kernels.get(
            "paged_decode.cuh",
            f"paged_decode_kernel<{head_dim}, {heads}, {splits}, {group}>",
            "11P6if0P",
        )
        arguments = (
            query.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            tables.data_ptr(),
            0 if table_rows is None else table_rows.data_ptr(),
            lens.data_ptr(),
            starts.data_ptr(),
            output.data_ptr(),
            *parts.pointers,
            num_rows,
            tables.stride(0),
            num_kv_heads,
            group_size,
            (block_size // _TILE).bit_length() - 1,
            _DECODE_MIN_SHARE * splits,
            scale * _LOG2_E,
        )
        shared_bytes = 4 * (num_rows + 1)
        kernel.launch((grid_x, grid_y), warps * _WARP, arguments, shared_bytes=shared_bytes)

    def _prefill(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: PagedRows,
        scale: float,
        output: Tensor,
    ) -> None:
        """Into ``output``: rows with more new tokens than one."""
        block_size, num_kv_heads, head_dim = k_cache.shape[1:]
        group_size = query.shape[1] // num_kv_heads
        lens, starts = rows.context_lens.contiguous(), rows.cu_seqlens_q.contiguous()
        tables, table_rows = _tables(rows)
        shape = self._prefill_kernel
        if self._prefill_parts is None:
            self._prefill_parts = _PrefillParts(shape, self._kernels.device)
        expression = f"{shape.name}<{head_dim}>"
        kernel = self._kernels.get(shape.file, expression, "11P9if0P")
        arguments = (
            query.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            tables.data_ptr(),
            0 if table_rows is None else table_rows.data_ptr(),
            lens.data_ptr(),
            starts.data_ptr(),
            output.data_ptr(),
            *self._prefill_parts.pointers,
            len(lens),
            tables.stride(0),
            num_kv_heads,
            group_size,
            (block_size // _TILE).bit_length() - 1,
            _PREFILL_MIN_SHARE,
            _PREFILL_NEAR_BYTES // (2 * num_kv_heads * head_dim * k_cache.itemsize),
            _PREFILL_TILE // group_size,
            65536 // group_size + 1,
            scale * _LOG2_E,
        )
        grid = self._prefill_parts.num_blocks, 1
        shared_bytes = shape.shared_bytes(head_dim)
        kernel.launch(grid, shape.threads, arguments, shared_bytes=shared_bytes)

    def _parts(self, num_blocks: int, num_heads: int, head_dim: int) -> _DecodeParts:
        """Kept for ever: captured graphs hold its addresses."""
        key = (num_blocks, num_heads, head_dim)
        parts = self._decode_parts.get(key)
        if parts is None:
            parts = self._decode_parts[key] = _DecodeParts(*key, self._kernels.device)
        return parts


class _DecodeParts:
    """Memory of ``paged_decode`` beside its output; see there. Launches follow one another on
    one stream, so they share it."""

    def __init__(
        self, num_blocks: int, num_heads: int, head_dim: int, device: torch.device
    ) -> None:
        self._parts = torch.empty((2 * num_blocks, num_heads, head_dim), device=device)
        self._sums = torch.empty((2 * num_blocks, num_heads, 2), device=device)
        self._counters = torch.zeros(_DECODE_COUNTERS, dtype=torch.int32, device=device)

    @functools.cached_property
    def pointers(self) -> tuple[int, int, int]:
        """Addresses of parts, their sums, and counters."""
        return self._parts.data_ptr(), self._sums.data_ptr(), self._counters.data_ptr()


class _PrefillParts:
    """Memory of ``paged_prefill`` beside its output, as ``_DecodeParts``."""

    def __init__(self, kernel: _PrefillKernel, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        shared_bytes = kernel.shared_bytes(_PREFILL_MOST_DIMS) + _PREFILL_STATIC_SHARED
        fitting = properties.shared_memory_per_multiprocessor // shared_bytes
        blocks = properties.multi_processor_count * max(1, min(kernel.blocks, fitting))
        self.num_blocks = blocks
        """Of a launch: as many as the card has at a time."""
        slots = (2 * blocks, _PREFILL_TILE)
        self._parts = torch.empty((*slots, _PREFILL_MOST_DIMS), device=device)
        self._sums = torch.empty((*slots, 2), device=device)
        num_counters = 1 + blocks + 2 * (blocks // _FAN_IN + 1)
        self._counters = torch.zeros(num_counters, dtype=torch.int32, device=device)

    @functools.cached_property
    def pointers(self) -> tuple[int, int, int]:
        """Addresses of parts, their sums, and counters."""
        return self._parts.data_ptr(), self._sums.data_ptr(), self._counters.data_ptr()


def _decode_shape(num_rows: int, num_kv_heads: int, group_size: int) -> tuple[int, int, int]:
    """KV heads of a thread block, warps that share each, query heads that there is room for."""
    group = 4 if group_size <= 4 else 8
    if num_rows <= _DECODE_FEW_ROWS:
        # 16 warps where there is shared memory for them; for 2 to 7 rows 8 were faster.
        return 1, 8 if group == 8 or 1 < num_rows < 8 else 16, group
    heads = max(heads for heads in range(1, 5) if num_kv_heads % heads == 0)
    return heads, 8 // heads, group


def _tables(rows: PagedRows) -> tuple[Tensor, Tensor | None]:
    """Block tables whose ids lie side by side, and which of them each row has."""
    tables, table_rows = rows.block_tables, rows.table_rows
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    return tables, None if table_rows is None else table_rows.contiguous()
