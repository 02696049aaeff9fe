"""Products of few rows with a weight, and what is fused with them: ``csrc/skinny_linear.cuh``.

A decode step multiplies few rows with every weight of the model, so that reading weights is what
it takes time for. Which instance of the kernel computes a product follows from the shape and the
card alone.

Shape letters: M rows of the product, K columns of the weight, O its rows, I half of these where
they are gate and up.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ember_pp.kernels.kernel_set import KernelSet

MOST_ROWS = 24
"""Of a product. On an H100 cuBLAS is about as fast at so many, and faster at 32."""

_MULTIPLYING_WARPS = 8
_WARP = 32
_TILE_ROWS = 8
_HELD = 2
"""Units of a thread block that go through the columns side by side."""
_CHUNK = 1024
_PITCH_BYTES = (_CHUNK + 32) * 2
"""Of a row of a stage."""
_MOST_STAGES = 16
_UNDER_WAY = 3
"""Stages that are asked for and not there yet, at most: more of them only wait in line, and what
the kernels read of each other then waits behind them."""
_BARRIER_BYTES = 512
_STATIC_BYTES = 256
"""Shared memory that the kernel declares by itself."""
_ROOMS = (8, 16, 24)
_MOST_NORMED_ROWS = 8
_MOST_WHOLE_ROWS = 16
_MOST_WHOLE = 8192
"""Elements of x that each thread block puts in shared memory, and norms, by itself: more of them
have a kernel of their own for the norm, and stream through a ring, unless they and the whole share
of the weight fit."""
_X_RING_BYTES = 32 * 1024
"""Of x under way, where it streams and two stages are not more."""
_SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""Most shared memory of a thread block by compute capability; 99 elsewhere."""
_RESERVED_BYTES = 1024
"""Shared memory that every thread block takes beside its own."""
_ARGUMENTS = "7P9if0P"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How one shape is computed."""

    rows: int
    """The kernel has room for so many."""
    streams: bool
    """x goes through a ring; else it lies whole in shared memory."""
    unit_tiles: int
    """Tiles of 8 rows of the weight that a stage has."""
    stages: int
    """Of the ring."""
    under_way: int
    """Stages that were asked for and are not there yet, at most."""
    x_stages: int
    """Of the ring of x."""
    copy_columns: int
    """Of a row of the weight, that one bulk copy brings."""
    num_blocks: int
    shared_bytes: int

    @property
    def num_threads(self) -> int:
        """A warp fills the ring, and one the ring of x."""
        return (_MULTIPLYING_WARPS + (2 if self.streams else 1)) * _WARP


def make_plan(
    num_rows: int,
    width: int,
    num_outputs: int,
    *,
    is_normed: bool,
    is_gated: bool,
    num_multiprocessors: int,
    shared_limit: int,
) -> Plan | None:
    """The plan of a shape on a card; None where the kernel cannot compute it, or others do better.

    Args:
        num_rows: M.
        width: K.
        num_outputs: O, or I.
        is_normed: a norm goes before the product.
        is_gated: swiglu comes after it.
        num_multiprocessors: of the card.
        shared_limit: bytes of shared memory that a thread block can have.
    """
    if not 0 < num_rows <= MOST_ROWS or width % 32 or not width or not num_outputs:
        return None
    is_short = num_rows * width <= _MOST_WHOLE
    if is_normed and (num_rows > _MOST_NORMED_ROWS or not is_short):
        return None
    num_tiles = -(-num_outputs // _TILE_ROWS)
    tiles_of_block = -(-num_tiles // num_multiprocessors)
    unit_tiles = 2 if is_gated or tiles_of_block > 1 else 1
    num_units = tiles_of_block if is_gated else -(-tiles_of_block // unit_tiles)
    num_chunks = -(-width // _CHUNK)
    share = num_units * num_chunks
    stage_bytes = unit_tiles * _TILE_ROWS * _PITCH_BYTES
    limit = shared_limit - _STATIC_BYTES

    used = _BARRIER_BYTES + _MULTIPLYING_WARPS * num_rows * (_HELD * 2 * _TILE_ROWS + 4) * 4
    used += 2 * width if is_normed else 0
    x_bytes, x_stages = num_rows * (width + (64 if width % 64 else 32)) * 2, 0
    fits = used + x_bytes + share * stage_bytes <= limit
    streams = num_rows > _MOST_WHOLE_ROWS or not (is_short or fits)
    if streams:
        x_bytes = num_rows * _PITCH_BYTES
        x_stages = min(max(2, _X_RING_BYTES // x_bytes), num_chunks * -(-num_units // _HELD))
        x_stages = min(x_stages, _MOST_STAGES)
        if used + 2 * x_bytes + stage_bytes > limit:
            x_stages = 1
    used += x_bytes * max(1, x_stages)
    # Half of a multiprocessor, so that the next kernel fits beside this one, if all fits there.
    is_small = used + share * stage_bytes <= shared_limit // 2 - _RESERVED_BYTES - _STATIC_BYTES
    stages = min(share, _MOST_STAGES, (limit - used) // stage_bytes)
    if stages < 1:
        return None
    return Plan(
        rows=next(room for room in _ROOMS if room >= num_rows),
        streams=streams,
        unit_tiles=unit_tiles,
        stages=stages,
        under_way=min(stages, _UNDER_WAY),
        x_stages=x_stages,
        copy_columns=_CHUNK // 2 if is_small else _CHUNK,
        num_blocks=-(-num_tiles // tiles_of_block),
        shared_bytes=used + stages * stage_bytes,
    )


class SkinnyLinear:
    """The products of one device.

    Args:
        kernels: of the device, which is the current one whenever a product is computed.
    """

    def __init__(self, kernels: KernelSet) -> None:
        self._kernels = kernels
        self._shared_limit = _SHARED_KIB.get(kernels.architecture, 99) * 1024
        self._plans: dict[tuple[int, int, int, bool, bool], Plan | None] = {}

    def plan(
        self, input: Tensor, weight: Tensor, *, is_normed: bool = False, is_gated: bool = False
    ) -> Plan | None:
        """How ``input [M, K]`` is multiplied with ``weight``; None: not by this kernel."""
        if input.dtype != torch.bfloat16 or not _is_aligned(weight):
            return None
        num_outputs = weight.shape[0] // (2 if is_gated else 1)
        key = (*input.shape, num_outputs, is_normed, is_gated)
        if key not in self._plans:
            self._plans[key] = make_plan(
                input.shape[0],
                input.shape[1],
                num_outputs,
                is_normed=is_normed,
                is_gated=is_gated,
                num_multiprocessors=self._kernels.num_multiprocessors,
                shared_limit=self._shared_limit,
            )
        return self._plans[key]

    def multiply(
        self,
        plan: Plan,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        norm: tuple[Tensor, float] | None = None,
        is_gated: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The product, and the total that was multiplied: ``input`` where there is no residual.

        Args:
            plan: of the same shapes.
            input: [M, K].
            weight: [O, K], or [2I, K] with ``is_gated``.
            bias: [O].
            residual: [M, K], added to ``input``; only with ``norm``.
            norm: its weight [K] and its epsilon.
            is_gated: swiglu follows.
        """
        num_rows, width = input.shape
        num_outputs = weight.shape[0] // (2 if is_gated else 1)
        kernel = self._kernels.get(
            "skinny_linear.cuh",
            f"skinny_linear_kernel<{plan.rows}, {str(plan.streams).lower()}>",
            _ARGUMENTS,
        )
        output = input.new_empty((num_rows, num_outputs))
        total = input if residual is None else torch.empty_like(input, memory_format=_CONTIGUOUS)
        norm_weight, eps = (None, 0.0) if norm is None else norm
        read = [None if x is None else _aligned(x) for x in (input, residual, norm_weight)]
        bias = None if bias is None else bias.contiguous()
        arguments = (
            *(0 if x is None else x.data_ptr() for x in read),
            weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            output.data_ptr(),
            0 if residual is None else total.data_ptr(),
            num_rows,
            width,
            num_outputs,
            is_gated,
            plan.unit_tiles,
            plan.stages,
            plan.under_way,
            plan.x_stages,
            plan.copy_columns,
            eps,
        )
        kernel.launch(
            (plan.num_blocks, 1), plan.num_threads, arguments, shared_bytes=plan.shared_bytes
        )
        return output, total


_CONTIGUOUS = torch.contiguous_format


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    """The same numbers where the kernel can read them."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=_CONTIGUOUS)
