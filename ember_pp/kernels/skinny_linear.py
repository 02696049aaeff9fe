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

MOST_ROWS = 32
"""Of a product; the kernel has room for no more."""

_THREADS = 256
_WARPS = 8
_TILE_ROWS = 8
_CHUNK = 1024
_STAGE_BYTES = _TILE_ROWS * (_CHUNK + 32) * 2
_MOST_STAGES = 16
_FEWEST_STAGES = 4
_BARRIER_BYTES = 256
_STATIC_BYTES = 1024
"""Shared memory that the kernel declares by itself."""
_ROOMS = (8, 16, 32)
_HELD = 2
"""Pairs of tiles that share what is read of x, where that is not in shared memory."""
_PARTS_TILES = 64
"""Rows times tiles of a pass: what the parts of sums of a pass take of shared memory."""
_SHARED_KIB = {80: 163, 90: 227, 100: 227}
"""Most shared memory of a thread block by compute capability; 99 elsewhere."""
_NUM_LEFT = 3
"""Stages that a thread block has still to ask for when the next kernel may start."""
_ARGUMENTS = "7P6if0P"


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How one shape is computed."""

    rows: int
    """The kernel has room for so many."""
    held: int
    """Pairs of tiles that go through the columns side by side."""
    is_shared: bool
    """Whether the rows are put in shared memory first."""
    stages: int
    """Of the ring."""
    pass_tiles: int
    """Of 8 rows of the weight, whose sums are added up together."""
    num_blocks: int
    shared_bytes: int


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
    """The plan of a shape on a card; None where the kernel cannot compute it.

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
    rows = next(room for room in _ROOMS if room >= num_rows)
    num_groups, unit = -(-num_outputs // _TILE_ROWS), 2 if is_gated else 1
    groups_of_block = -(-num_groups // num_multiprocessors)
    num_tiles = groups_of_block * unit
    num_stages = min(num_tiles * -(-width // _CHUNK), _MOST_STAGES)
    x_bytes = num_rows * (width + (64 if width % 64 else 32)) * 2
    for is_shared in (True,) if is_normed else (True, False):
        held = 1 if is_shared else _HELD
        passed = max(1, _PARTS_TILES // num_rows // (2 * held)) * 2 * held
        pass_tiles = min(num_tiles, passed)
        parts_bytes = _WARPS * num_rows * (pass_tiles * _TILE_ROWS + 4) * 4
        used = _BARRIER_BYTES + parts_bytes
        used += (x_bytes if is_shared else 0) + (2 * width if is_normed else 0)
        # Half of a multiprocessor, so that the next kernel fits beside this one, if that will do.
        for limit in (shared_limit // 2, shared_limit):
            stages = min(num_stages, (limit - _STATIC_BYTES - used) // _STAGE_BYTES)
            if stages >= min(num_stages, _FEWEST_STAGES):
                blocks = -(-num_groups // groups_of_block)
                shared_bytes = used + stages * _STAGE_BYTES
                return Plan(rows, held, is_shared, stages, pass_tiles, blocks, shared_bytes)
    return None


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
        flags = ", ".join(
            "true" if flag else "false" for flag in (norm is not None, is_gated, plan.is_shared)
        )
        kernel = self._kernels.get(
            "skinny_linear.cuh",
            f"skinny_linear_kernel<{plan.rows}, {plan.held}, {flags}>",
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
            plan.stages,
            plan.pass_tiles,
            _NUM_LEFT,
            eps,
        )
        kernel.launch((plan.num_blocks, 1), _THREADS, arguments, shared_bytes=plan.shared_bytes)
        return output, total


_CONTIGUOUS = torch.contiguous_format


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    """The same numbers where the kernel can read them."""
    return tensor if _is_aligned(tensor) else tensor.clone(memory_format=_CONTIGUOUS)
