"""The operations of the model on a GPU: which kernel of ``csrc/`` computes what.

Where no kernel fits a shape or dtype,
or none is better than torch's, ``reference.py`` computes it. The choice depends on shapes,
dtypes, addresses and the card, never on values or timing.

Shape letters as in ``ops.py``, which documents shapes and checks arguments.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ember_pp.kernels import reference
from ember_pp.kernels.device_sampling import DeviceSampling
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.paged_attention import PagedAttention
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.kernels.rope_rows import RopeRows
from ember_pp.kernels.skinny_linear import SkinnyLinear
from ember_pp.kernels.slot_params import SlotParams
from ember_pp.kernels.step_state import PlanWords, StepState

_ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "float"}
_WORDS = {16: "uint4", 8: "uint2", 4: "u32", 2: "unsigned short"}
_WARP = 32

_EMBEDDING_THREADS = 256
_RMS_NORM_THREADS = 512
_RMS_NORM_PACKS = 8
"""Most packs of a thread."""
_SWIGLU_THREADS = 256
_ROPE_THREADS = 128
_BEGIN_THREADS, _END_THREADS = 1024, 256
_LEAVE_THREADS = 256
_BEGIN_STEP = "Pq7i0P14P3i0P"
"""The structures ``PlanWords`` and ``StepState`` of ``step.cuh``."""


class CudaOps:
    """The kernels of one device, which is the current one whenever an operation is called.

    Args:
        device: with its index.
        cache: folder of built kernels; None: ``build.default_cache()``.

    Raises:
        KernelBuildError: what building needs is not installed; says what to install.
    """

    def __init__(self, device: torch.device, cache: Path | None = None) -> None:
        self._device = torch.device("cuda", device.index or 0)
        self._kernels = KernelSet(self._device, cache)
        self._attention = PagedAttention(self._kernels)
        self._skinny = SkinnyLinear(self._kernels)
        self._sampling = DeviceSampling(self._kernels)

    @property
    def is_building(self) -> bool:
        """True while a kernel is compiled. Any thread."""
        return self._kernels.is_building

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """A copy of rows, in the widest words that they and their addresses are multiples of."""
        row_bytes = weight.shape[1] * weight.itemsize
        output = weight.new_empty((len(token_ids), weight.shape[1]))
        size = _access_bytes(row_bytes, weight, output)
        if size < 2 or not weight.is_contiguous():
            return reference.embedding(token_ids, weight)
        words = row_bytes // size
        kernel = self._kernels.get("embedding.cuh", f"embedding_kernel<{_WORDS[size]}>", "PPPi")
        if len(token_ids):
            kernel.launch(
                (len(token_ids), -(-words // _EMBEDDING_THREADS)),
                _EMBEDDING_THREADS,
                (token_ids.contiguous().data_ptr(), weight.data_ptr(), output.data_ptr(), words),
            )
        return output

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Few rows: ``skinny_linear``. Many: cuBLAS, through torch."""
        plan = self._skinny.plan(input, weight)
        if plan is None:
            return reference.linear(input, weight, bias)
        return self._skinny.multiply(plan, input, weight, bias)[0]

    def add_rms_norm_linear(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Few elements: ``skinny_linear``, in which each thread block norms all of them."""
        plan = self._skinny.plan(input, weight, is_normed=True)
        if plan is None:
            normed, total = self._normed(input, residual, norm_weight, eps)
            return self.linear(normed, weight, bias), total
        norm = norm_weight, eps
        return self._skinny.multiply(plan, input, weight, bias, residual=residual, norm=norm)

    def add_rms_norm_gate_up(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As ``add_rms_norm_linear``; a thread block has gate and up of the same outputs."""
        plan = self._skinny.plan(input, weight, is_normed=True, is_gated=True)
        if plan is not None:
            norm = norm_weight, eps
            arguments = plan, input, weight
            return self._skinny.multiply(*arguments, residual=residual, norm=norm, is_gated=True)
        normed, total = self._normed(input, residual, norm_weight, eps)
        plan = self._skinny.plan(normed, weight, is_gated=True)
        if plan is None:
            return self.swiglu(self.linear(normed, weight)), total
        return self._skinny.multiply(plan, normed, weight, is_gated=True)[0], total

    def _normed(
        self, input: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if residual is None:
            return self.rms_norm(input, weight, eps), input
        return self.add_rms_norm(input, residual, weight, eps)

    def rms_norm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        """One thread block per token."""
        if not _fits_rms_norm(input):
            return reference.rms_norm(input, weight, eps)
        normed = torch.empty_like(input, memory_format=torch.contiguous_format)
        self._rms_norm(input, None, weight, normed, None, eps)
        return normed

    def add_rms_norm(
        self, input: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As ``rms_norm``, with the sum written on the way."""
        if not _fits_rms_norm(input):
            return reference.add_rms_norm(input, residual, weight, eps)
        normed = torch.empty_like(input, memory_format=torch.contiguous_format)
        total = torch.empty_like(normed)
        self._rms_norm(input, residual, weight, normed, total, eps)
        return normed, total

    def _rms_norm(
        self,
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        normed: Tensor,
        total: Tensor | None,
        eps: float,
    ) -> None:
        num_tokens, width = input.shape
        size = _access_bytes(width * input.itemsize)
        pack, packs = size // input.itemsize, 1
        while packs * _RMS_NORM_THREADS * pack < width:
            packs *= 2
        adds = "false" if residual is None else "true"
        expression = f"rms_norm_kernel<{_ELEMENTS[input.dtype]}, {pack}, {packs}, {adds}>"
        kernel = self._kernels.get("rms_norm.cuh", expression, "PPPPPif")
        if not num_tokens:
            return
        input, weight = _aligned(input, size), _aligned(weight, size)
        residual = None if residual is None else _aligned(residual, size)
        arguments = (
            input.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            weight.data_ptr(),
            normed.data_ptr(),
            0 if total is None else total.data_ptr(),
            width,
            eps,
        )
        block = _round_up(-(-width // (pack * packs)), _WARP)
        kernel.launch((num_tokens, 1), block, arguments)

    def qk_norm_rope_store_kv(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        rope: RopeRows,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        eps: float,
    ) -> Tensor:
        """A few lanes per head."""
        num_tokens, head_dim = len(qkv), k_cache.shape[3]
        size = _access_bytes(head_dim // 2 * qkv.itemsize)
        pack = size // qkv.itemsize
        lanes = 1 << (head_dim // 2 // pack - 1).bit_length()
        caches_fit = (k_cache.data_ptr() | v_cache.data_ptr()) % size == 0
        if qkv.dtype not in _ELEMENTS or head_dim % 4 or lanes > _WARP or not caches_fit:
            return reference.qk_norm_rope_store_kv(
                qkv,
                bias,
                norm_weight,
                rope,
                k_cache,
                v_cache,
                slot_mapping,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                eps=eps,
            )
        query = qkv.new_empty((num_tokens, num_heads, head_dim))
        qkv, table = _aligned(qkv, size), _aligned(rope.table, 16)
        positions, slots = rope.positions.contiguous(), slot_mapping.contiguous()
        bias = None if bias is None else _aligned(bias, size)
        norm_weight = None if norm_weight is None else _aligned(norm_weight, size)
        flags = ", ".join("false" if x is None else "true" for x in (norm_weight, bias))
        kernel = self._kernels.get(
            "qk_norm_rope_store_kv.cuh",
            f"qk_norm_rope_store_kv_kernel<{_ELEMENTS[qkv.dtype]}, {head_dim}, {pack}, {flags}>",
            "PPPPPPPPPiif",
        )
        if num_tokens:
            arguments = (
                qkv.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                0 if norm_weight is None else norm_weight.data_ptr(),
                table.data_ptr(),
                positions.data_ptr(),
                slots.data_ptr(),
                query.data_ptr(),
                k_cache.data_ptr(),
                v_cache.data_ptr(),
                num_heads,
                num_kv_heads,
                eps,
            )
            heads_per_block = _ROPE_THREADS // lanes
            num_blocks = -(-(num_heads + 2 * num_kv_heads) // heads_per_block)
            kernel.launch((num_tokens, num_blocks), _ROPE_THREADS, arguments)
        return query

    def captures_attention(
        self, dtype: torch.dtype, head_dim: int, group_size: int, block_size: int
    ) -> bool:
        """Wherever there is a kernel for these; block tables of any size then do."""
        return self._attention.fits(dtype, head_dim, group_size, block_size)

    def paged_attention(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, *, scale: float
    ) -> Tensor:
        """See ``PagedAttention``."""
        return self._attention(query, k_cache, v_cache, rows, scale)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """A pack of elements per thread."""
        gate_up = gate_up.contiguous()
        num_tokens, width = len(gate_up), gate_up.shape[1] // 2
        output = gate_up.new_empty((num_tokens, width))
        pack = _access_bytes(width * gate_up.itemsize, gate_up, output) // gate_up.itemsize
        element = _ELEMENTS.get(gate_up.dtype)
        if element is None:
            return reference.swiglu(gate_up)
        kernel = self._kernels.get("swiglu.cuh", f"swiglu_kernel<{element}, {pack}>", "PPi")
        if num_tokens:
            grid = (num_tokens, -(-width // (_SWIGLU_THREADS * pack)))
            kernel.launch(grid, _SWIGLU_THREADS, (gate_up.data_ptr(), output.data_ptr(), width))
        return output

    def sample_tokens(
        self, logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams
    ) -> Tensor:
        """See ``DeviceSampling``."""
        return self._sampling.sample_tokens(logits, slots, positions, params)

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``DeviceSampling``."""
        return self._sampling.top_logprobs(logits, token_ids, num_top)

    def begin_step(self, plan: PlanWords, state: StepState) -> None:
        """One thread block; nothing overlaps with it."""
        kernel = self._kernels.get("step.cuh", "begin_step_kernel", _BEGIN_STEP, overlaps=False)
        arguments = (
            plan.words.data_ptr(),
            plan.mark,
            *plan[1:8],
            *state.pointers,
            state.max_blocks_per_sequence,
            state.max_rows,
            state.block_size,
        )
        kernel.launch((1, 1), _BEGIN_THREADS, arguments)

    def end_step(self, drawn: Tensor, slots: Tensor, state: StepState) -> Tensor:
        """One thread block."""
        kernel = self._kernels.get("step.cuh", "end_step_kernel", "PPPPPPPPii")
        output = torch.empty_like(drawn, dtype=torch.int32)
        last_tokens = state.last_tokens
        arguments = (
            drawn.contiguous().data_ptr(),
            slots.contiguous().data_ptr(),
            0 if last_tokens is None else last_tokens.data_ptr(),
            output.data_ptr(),
            state.feedback.data_ptr(),
            state.turn_and_mark.data_ptr(),
            state.results.data_ptr(),
            state.records.data_ptr(),
            len(drawn),
            state.results.shape[1],
        )
        kernel.launch((1, 1), _END_THREADS, arguments)
        return output

    def leave_stage(
        self, residual: Tensor, added: Tensor | None, output: Tensor, state: StepState
    ) -> Tensor:
        """A pack of elements for each thread, up to some thread blocks per multiprocessor."""
        tensors = [residual, output] if added is None else [residual, added, output]
        count = _access_bytes(output.shape[1] * output.itemsize, *tensors) // output.itemsize
        kernel = self._kernels.get(
            "step.cuh", f"leave_stage_kernel<{_ELEMENTS[output.dtype]}, {count}>", "PPPPPq"
        )
        num_packs = output.numel() // count
        arguments = (
            residual.data_ptr(),
            0 if added is None else added.data_ptr(),
            output.data_ptr(),
            state.turn_and_mark.data_ptr(),
            state.records.data_ptr(),
            num_packs,
        )
        most = 8 * self._kernels.num_multiprocessors
        num_blocks = max(1, min(-(-num_packs // _LEAVE_THREADS), most))
        kernel.launch((num_blocks, 1), _LEAVE_THREADS, arguments)
        return output


def _access_bytes(row_bytes: int, *tensors: Tensor) -> int:
    """The most bytes, up to 16, whose multiples ``row_bytes`` and all addresses are."""
    bits = row_bytes | 16
    for tensor in tensors:
        bits |= tensor.data_ptr()
    return bits & -bits


def _aligned(tensor: Tensor, size: int) -> Tensor:
    """The same numbers, contiguous, at an address that is a multiple of ``size``. Which kernel
    sums them must not depend on where they lie."""
    if tensor.is_contiguous() and tensor.data_ptr() % size == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _fits_rms_norm(input: Tensor) -> bool:
    width_bytes = input.shape[1] * input.itemsize
    limit = _RMS_NORM_THREADS * _RMS_NORM_PACKS * _access_bytes(width_bytes)
    return input.dtype in _ELEMENTS and width_bytes <= limit


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
