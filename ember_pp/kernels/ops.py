"""The operations of the model: documented, checked by argument name, dispatched.

An ``Ops`` has one implementation for its life, which ``make_ops`` chooses for a device:
``reference.py`` in plain torch, or ``cuda_ops.py``. The latter chooses a kernel by shape and
card, never by timing, so that equal plans give equal bits.

Shape letters: T tokens, D hidden, O and I widths of a projection, H query heads, K KV heads,
d head dim, B blocks, S block size, V vocabulary. "Model dtype" is bf16 or fp32, the same for
all arguments of a call unless noted.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ember_pp.errors import ConfigError, KernelArgumentError, KernelBuildError
from ember_pp.kernels import reference
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.kernels.rope_rows import RopeRows
from ember_pp.kernels.slot_params import SlotParams
from ember_pp.kernels.step_state import PlanWords, StepState

MAX_TOP_LOGPROBS = 20
"""Most tokens that ``Ops.top_logprobs`` ranks."""

_logger = logging.getLogger(__name__)


def make_ops(kernels: Literal["auto", "cuda", "reference"], device: torch.device) -> Ops:
    """The operations for tensors on ``device``, as the setting ``kernels`` asks.

    ``auto`` is CUDA kernels on a CUDA device that has what they need, with a warning where it
    has not, and the reference elsewhere.

    Raises:
        ConfigError: ``cuda`` for a device that is none.
        KernelBuildError: ``cuda`` without what building needs; says what to install.
    """
    if kernels == "cuda" and device.type != "cuda":
        raise ConfigError(f"kernels: cuda needs a CUDA device, the stage is on {device}")
    if kernels == "reference" or device.type != "cuda":
        return Ops(reference)
    from ember_pp.kernels.cuda_ops import CudaOps

    try:
        return Ops(CudaOps(device))
    except KernelBuildError as error:
        if kernels == "cuda":
            raise
        _logger.warning("kernels: reference, far slower than CUDA kernels: %s", error)
        return Ops(reference)


class Backend(Protocol):
    """An implementation of the operations: their signatures, without the checks."""

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """See ``Ops.embedding``."""

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See ``Ops.linear``."""

    def rms_norm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``Ops.rms_norm``."""

    def add_rms_norm(
        self, input: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops.add_rms_norm``."""

    def add_rms_norm_linear(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops.add_rms_norm_linear``."""

    def add_rms_norm_gate_up(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops.add_rms_norm_gate_up``."""

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
        """See ``Ops.qk_norm_rope_store_kv``."""

    def captures_attention(
        self, dtype: torch.dtype, head_dim: int, group_size: int, block_size: int
    ) -> bool:
        """See ``Ops.captures_attention``."""

    def paged_attention(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, *, scale: float
    ) -> Tensor:
        """See ``Ops.paged_attention``."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See ``Ops.swiglu``."""

    def sample_tokens(
        self, logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams
    ) -> Tensor:
        """See ``Ops.sample_tokens``."""

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Ops.top_logprobs``."""

    def begin_step(self, plan: PlanWords, state: StepState) -> None:
        """See ``Ops.begin_step``."""

    def end_step(self, drawn: Tensor, slots: Tensor, state: StepState) -> Tensor:
        """See ``Ops.end_step``."""

    def leave_stage(
        self, residual: Tensor, added: Tensor | None, output: Tensor, state: StepState
    ) -> Tensor:
        """See ``Ops.leave_stage``."""


class Ops:
    """The operations of the model on one device; arguments are checked by name."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @property
    def is_reference(self) -> bool:
        """True where plain torch computes them, which on a GPU may launch much per call."""
        return self._backend is reference

    @property
    def is_building(self) -> bool:
        """True while a kernel is compiled, which may take long. Any thread."""
        return bool(getattr(self._backend, "is_building", False))

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """Look up the rows of a batch of tokens: ``weight[token_ids]``.

        Shapes:
            token_ids:  [T] int64  each in ``[0, V)``
            weight:     [V, D]     model dtype
            returns:    [T, D]

        Numerics: exact copy.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        _check_dims("weight", weight, 2)
        _check_dims("token_ids", token_ids, 1)
        _check("token_ids", token_ids, token_ids.shape, torch.int64, weight.device)
        return self._backend.embedding(token_ids, weight)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Project: ``input @ weight.T + bias``.

        Shapes:
            input:    [T, I]  model dtype
            weight:   [O, I]  as checkpoints store it
            bias:     [O]     or None
            returns:  [T, O]

        Numerics: fp32 accumulation, rounded once (bf16: the bias is added before rounding).

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        _check_dims("input", input, 2)
        _check_dims("weight", weight, 2)
        _check("weight", weight, (weight.shape[0], input.shape[1]), input.dtype, input.device)
        if bias is not None:
            _check("bias", bias, (weight.shape[0],), input.dtype, input.device)
        return self._backend.linear(input, weight, bias)

    def rms_norm(self, input: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalise each token: ``input / sqrt(mean(input ** 2) + eps) * weight``.

        Shapes:
            input, returns:  [T, D]  model dtype
            weight:          [D]

        Numerics: mean and root in fp32, rounded to the dtype before ``weight`` multiplies.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.

        Source: Zhang and Sennrich, NeurIPS 2019; the order of rounding is that of transformers.
        """
        _check_dims("input", input, 2)
        _check("weight", weight, (input.shape[1],), input.dtype, input.device)
        return self._backend.rms_norm(input, weight, eps)

    def add_rms_norm(
        self, input: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Add the residual, then normalise: ``(rms_norm(sum), sum)``, ``sum = input + residual``.

        Shapes:
            input, residual, both returned:  [T, D]  model dtype
            weight:                          [D]

        Numerics: the sum is rounded to the dtype *before* the norm reads it, as it is when it
        crosses an edge between stages; so results do not depend on where layers are split.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        _check_dims("input", input, 2)
        _check("residual", residual, input.shape, input.dtype, input.device)
        _check("weight", weight, (input.shape[1],), input.dtype, input.device)
        return self._backend.add_rms_norm(input, residual, weight, eps)

    def add_rms_norm_linear(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the residual, normalise, project: ``(linear(rms_norm(total)), total)``.

        ``total = input + residual``, or ``input`` itself where there is no residual.

        Shapes:
            input, residual, total:  [T, D]  model dtype; residual may be None
            norm_weight:             [D]
            weight:                  [O, D]
            bias:                    [O]     or None
            returns:                 [T, O] and total

        Numerics: ``total`` and the norm are rounded as by ``add_rms_norm``, the product as by
        ``linear``; sums of squares and products may be taken in another order.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        _check_norm(input, residual, norm_weight)
        _check_dims("weight", weight, 2)
        _check("weight", weight, (weight.shape[0], input.shape[1]), input.dtype, input.device)
        if bias is not None:
            _check("bias", bias, (weight.shape[0],), input.dtype, input.device)
        return self._backend.add_rms_norm_linear(input, residual, norm_weight, eps, weight, bias)

    def add_rms_norm_gate_up(
        self,
        input: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Add the residual, normalise, project, activate.

        ``(swiglu(linear(rms_norm(total))), total)`` with ``total = input + residual``, or
        ``input`` itself where there is no residual.

        Shapes:
            input, residual, total:  [T, D]   model dtype; residual may be None
            norm_weight:             [D]
            weight:                  [2I, D]  rows of gate, then of up
            returns:                 [T, I] and total

        Numerics: as ``add_rms_norm_linear``, then as ``swiglu``: gate and up are rounded first.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        _check_norm(input, residual, norm_weight)
        _check_dims("weight", weight, 2)
        num_rows = weight.shape[0]
        if num_rows % 2:
            raise KernelArgumentError(f"weight: expected [2I, D], got {list(weight.shape)}")
        _check("weight", weight, (num_rows, input.shape[1]), input.dtype, input.device)
        return self._backend.add_rms_norm_gate_up(input, residual, norm_weight, eps, weight)

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
        """From a fused projection to queries; keys and values go to the paged KV cache.

        ``bias`` is added where it is given. Each query and key head ``x`` is normalised where
        ``norm_weight`` is given, then turned: ``x * cos + swap_halves(x) * sin``. Token ``t``'s key
        and value go to ``cache.flatten(0, 1)[slot_mapping[t]]`` unless the slot is negative; other
        slots keep their bytes.

        Shapes:
            qkv:               [T, (H + 2K) * d]  query heads, key heads, value heads; model dtype
            bias:              [(H + 2K) * d]
            norm_weight:       [H + K, d]         weight of each query and key head; None: no norm
            rope:              of T tokens
            k_cache, v_cache:  [B, S, K, d]       contiguous, written in place
            slot_mapping:      [T] int64          ``block_id * S + offset``; -1 = do not store
            returns:           query [T, H, d]    may be a view, last dim contiguous

        Numerics: the sum with ``bias`` is rounded; norm as ``rms_norm``; rotation in fp32, rounded
        once. Two tokens with the same slot are a scheduler bug; the result is then unspecified.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.

        Source: Su et al., 2021, in the two-halves layout of Hugging Face checkpoints; the slots are
        those of vLLM's PagedAttention (Kwon et al., SOSP 2023).
        """
        _check_dims("qkv", qkv, 2)
        num_tokens, width = qkv.shape
        head_dim = width // (num_heads + 2 * num_kv_heads)
        if head_dim * (num_heads + 2 * num_kv_heads) != width:
            raise KernelArgumentError(
                f"qkv: expected [T, ({num_heads} + 2 * {num_kv_heads}) * d], got {list(qkv.shape)}"
            )
        if bias is not None:
            _check("bias", bias, (width,), qkv.dtype, qkv.device)
        if norm_weight is not None:
            shape = (num_heads + num_kv_heads, head_dim)
            _check("norm_weight", norm_weight, shape, qkv.dtype, qkv.device)
        _check_dims("rope.table", rope.table, 2)
        table_shape = (rope.table.shape[0], head_dim)
        _check("rope.table", rope.table, table_shape, torch.float32, qkv.device)
        _check("rope.positions", rope.positions, (num_tokens,), torch.int64, qkv.device)
        _check_caches(k_cache, v_cache, (num_kv_heads, head_dim), qkv)
        _check("slot_mapping", slot_mapping, (num_tokens,), torch.int64, qkv.device)
        return self._backend.qk_norm_rope_store_kv(
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

    def captures_attention(
        self, dtype: torch.dtype, head_dim: int, group_size: int, block_size: int
    ) -> bool:
        """Whether ``paged_attention`` of such tensors can be captured in a CUDA graph.

        It then waits for nothing on the host, and a replay may have other lengths and block tables
        in the same tensors: see ``PagedRows``.

        Args:
            dtype: of queries and caches.
            head_dim: d.
            group_size: H / K.
            block_size: S.
        """
        return self._backend.captures_attention(dtype, head_dim, group_size, block_size)

    def paged_attention(
        self, query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, *, scale: float
    ) -> Tensor:
        """Causal attention of each new token over its sequence's slots in the KV cache.

        ``softmax(q k^T * scale) v`` over the row's context up to and with the token itself, whose
        key and value are stored already. Query heads ``h * G .. h * G + G - 1`` share KV head
        ``h``, ``G = H / K``. Rows are decodes and prefill chunks alike.

        Shapes:
            query, returns:    [T, H, d]     model dtype
            k_cache, v_cache:  [B, S, K, d]  contiguous
            rows:              ``PagedRows.build`` of the step, T tokens in all

        Numerics: softmax and sums in fp32. A row's result depends on the other rows by rounding
        at most; slots outside its context are not read, so garbage there, NaN too, is harmless.
        Tokens that are padding get anything.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.

        Source: Kwon et al., SOSP 2023, for the layout; grouped queries: Ainslie et al., 2023.
        """
        _check_dims("query", query, 3)
        _check_dims("k_cache", k_cache, 4)
        num_kv_heads = k_cache.shape[2]
        _check_caches(k_cache, v_cache, (num_kv_heads, query.shape[2]), query)
        if query.shape[1] % num_kv_heads:
            raise KernelArgumentError(
                f"query: expected a multiple of the cache's {num_kv_heads} heads, "
                f"got {query.shape[1]}"
            )
        if query.shape[0] != rows.num_tokens:
            raise KernelArgumentError(
                f"rows: expected {query.shape[0]} tokens as in query, got {rows.num_tokens}"
            )
        return self._backend.paged_attention(query, k_cache, v_cache, rows, scale=scale)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """Gated activation: ``silu(gate) * up`` of the two halves of the last dimension.

        Shapes:
            gate_up:  [T, 2I]  gate, then up; model dtype
            returns:  [T, I]

        Numerics: silu in fp32, rounded, then multiplied.

        Raises:
            KernelArgumentError: the shape differs from the above.

        Source: Shazeer, 2020.
        """
        _check_dims("gate_up", gate_up, 2)
        if gate_up.shape[1] % 2:
            raise KernelArgumentError(f"gate_up: expected [T, 2I], got {list(gate_up.shape)}")
        return self._backend.swiglu(gate_up)

    def sample_tokens(
        self, logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams
    ) -> Tensor:
        """Draw one token per row by its slot's settings: steps 4 to 8 of ``docs/sampling.md``.

        Temperature 0 takes the largest logit, ties to the lowest id. Else the token with the
        largest ``logit / temperature + noise`` of those that top_k, top_p and min_p leave; the
        noise is a function of the slot's seed, the position and the token id.

        Shapes (N rows that sample):
            logits:     [N, V]   bf16 or fp32
            slots:      [N]      int32 index into ``params``; -1: a row of padding, of which
                                 nothing is read and whose token is any
            positions:  [N]      int64 index in its sequence of the token to be drawn
            params:     on the device of ``logits``
            returns:    [N]      int64 token ids; ``sampling.NO_TOKEN`` where the largest logit
                                 is NaN or infinite

        Numerics: as ``sampling.draw_truncated_tokens`` on the logits in fp32. A row's token does
        not depend on the other rows. Implementations differ by the last bits of scores and of
        sums of probabilities: so a draw may differ where two of them nearly tie.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.

        Source: Gumbel-max; Philox of Salmon et al., SC 2011.
        """
        _check_logits(logits)
        num_rows = logits.shape[:1]
        _check("slots", slots, num_rows, torch.int32, logits.device)
        _check("positions", positions, num_rows, torch.int64, logits.device)
        table = params.table
        _check("params", table, table.shape, torch.int64, logits.device)
        return self._backend.sample_tokens(logits, slots, positions, params)

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities of the drawn and of the most likely tokens, of ``softmax(logits)``.

        Shapes (N rows, n = ``min(num_top, V)``):
            logits:     [N, V]   bf16 or fp32
            token_ids:  [N]      int64 the drawn tokens; a negative one counts as 0
            num_top:    0 to 20
            returns:    [N] fp32, of the drawn tokens; [N, n] int64 and [N, n] fp32, ids and
                        log-probabilities of the most likely, ties to the lowest id

        Numerics: in fp32. Rows with NaN or infinite logits hold anything.

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above, or ``num_top``.
        """
        _check_logits(logits)
        _check("token_ids", token_ids, logits.shape[:1], torch.int64, logits.device)
        if not 0 <= num_top <= MAX_TOP_LOGPROBS:
            raise KernelArgumentError(f"num_top: expected 0 to {MAX_TOP_LOGPROBS}, got {num_top}")
        return self._backend.top_logprobs(logits, token_ids, num_top)

    def begin_step(self, plan: PlanWords, state: StepState) -> None:
        """Take in what a plan changes and expand its rows to the inputs of its step, in place.

        Writes all of ``state`` that belongs to a step, padding included: tokens up to
        ``plan.padded_tokens``, everything else to its end. The token of a decode row is that of
        ``state.last_tokens``, or 0 where there is none.

        Raises:
            KernelArgumentError: the plan has more rows or tokens than ``state`` has room for, or
                too few words.
        """
        for name, number, limit in (
            ("num_rows", plan.num_rows, state.max_rows),
            ("num_decodes", plan.num_decodes, plan.num_rows),
            ("padded_tokens", plan.padded_tokens, state.max_tokens),
            ("num_tokens", plan.num_tokens, plan.padded_tokens),
            ("words", plan.num_words, len(plan.words)),
            ("turn", plan.turn + 1, state.max_pending),
        ):
            if number > limit:
                raise KernelArgumentError(f"{name}: expected at most {limit}, got {number}")
        self._backend.begin_step(plan, state)

    def end_step(self, drawn: Tensor, slots: Tensor, state: StepState) -> Tensor:
        """Bring what was drawn to the host, and to the next step.

        ``state.results[turn, 2:]`` becomes ``drawn``, then the mark of the plan is written before
        it. Where there is ``state.last_tokens``, ``last_tokens[slots[n]] = max(drawn[n], 0)``.
        ``state.feedback[n]`` becomes the pair ``(slots[n], max(drawn[n], 0))``.

        Shapes:
            drawn:    [N] int64   negative where nothing could be drawn; N may be 0
            slots:    [N] int32   negative: a row of padding; otherwise distinct
            returns:  [N] int32   ``drawn``

        Raises:
            KernelArgumentError: a shape, dtype or device differs from the above.
        """
        device = state.slots.device
        _check_dims("drawn", drawn, 1)
        _check("drawn", drawn, drawn.shape, torch.int64, device)
        _check("slots", slots, drawn.shape, torch.int32, device)
        if len(drawn) > state.max_rows:
            raise KernelArgumentError(
                f"drawn: expected at most {state.max_rows} rows, got {len(drawn)}"
            )
        return self._backend.end_step(drawn, slots, state)

    def leave_stage(
        self, residual: Tensor, added: Tensor | None, output: Tensor, state: StepState
    ) -> Tensor:
        """``output = residual + added``, rounded: what a stage hands on. Notes the time.

        Shapes:
            residual:  [T, D]   contiguous, bf16 or fp32
            added:     [T, D]   contiguous; None: nothing
            output:    [T, D]   contiguous; returned

        Raises:
            KernelArgumentError: a shape, dtype, device or layout differs from the above.
        """
        _check_dims("output", output, 2)
        for name, tensor in (("residual", residual), ("added", added), ("output", output)):
            if tensor is None:
                continue
            _check(name, tensor, output.shape, output.dtype, state.slots.device)
            if not tensor.is_contiguous():
                raise KernelArgumentError(
                    f"{name}: expected contiguous, got stride {tensor.stride()}"
                )
        if output.dtype not in (torch.bfloat16, torch.float32):
            raise KernelArgumentError(f"output: expected bf16 or fp32, got {output.dtype}")
        return self._backend.leave_stage(residual, added, output, state)


def _check_logits(logits: Tensor) -> None:
    _check_dims("logits", logits, 2)
    if logits.dtype not in (torch.bfloat16, torch.float32):
        raise KernelArgumentError(f"logits: expected bf16 or fp32, got {logits.dtype}")
    if not logits.shape[1]:
        raise KernelArgumentError(f"logits: expected [N, V], got {list(logits.shape)}")


def _check_dims(name: str, tensor: Tensor, num_dims: int) -> None:
    if tensor.dim() != num_dims:
        raise KernelArgumentError(
            f"{name}: expected {num_dims} dimension{'s' if num_dims > 1 else ''}, "
            f"got shape {list(tensor.shape)}"
        )


def _check(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise KernelArgumentError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelArgumentError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise KernelArgumentError(f"{name}: expected device {device}, got {tensor.device}")


def _check_norm(input: Tensor, residual: Tensor | None, norm_weight: Tensor) -> None:
    _check_dims("input", input, 2)
    if residual is not None:
        _check("residual", residual, input.shape, input.dtype, input.device)
    _check("norm_weight", norm_weight, (input.shape[1],), input.dtype, input.device)


def _check_caches(
    k_cache: Tensor, v_cache: Tensor, heads_shape: tuple[int, int], like: Tensor
) -> None:
    """Caches [B, S, K, d] for heads [K, d] of the dtype and device of ``like``."""
    _check_dims("k_cache", k_cache, 4)
    shape = (*k_cache.shape[:2], *heads_shape)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check(name, cache, shape, like.dtype, like.device)
        if not cache.is_contiguous():
            raise KernelArgumentError(f"{name}: expected contiguous, got stride {cache.stride()}")
