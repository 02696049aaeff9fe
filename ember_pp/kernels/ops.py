"""The operations of the model: documented, checked by argument name, dispatched.

Today every device runs ``reference.py``. A faster kernel for a device is chosen here, by
shape and card and never by timing, so that equal plans give equal bits.

Shape letters: T tokens, D hidden, O and I widths of a projection, H query heads, K KV heads,
d head dim, B blocks, S block size, V vocabulary. "Model dtype" is bf16 or fp32, the same for
all arguments of a call unless noted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import reference
from ember_pp.kernels.paged_rows import PagedRows


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
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
    return reference.embedding(token_ids, weight)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
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
    return reference.linear(input, weight, bias)


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
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
    return reference.rms_norm(input, weight, eps)


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float
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
    return reference.add_rms_norm(input, residual, weight, eps)


def qk_norm_rope(
    qkv: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a fused projection: per-head RMSNorm, then RoPE.

    ``x * cos + swap_halves(x) * sin`` for each query and key head ``x``, normalised first
    where ``norm_weight`` is given. Values pass unchanged.

    Shapes:
        qkv:          [T, (H + 2K) * d]  query heads, key heads, value heads; model dtype
        norm_weight:  [H + K, d]         weight of each query and key head; None: no norm
        cos, sin:     [T, d] fp32        at the token's position; the first half of ``sin``
                                         is negated, so that no sign is left to apply
        returns:      query [T, H, d], key [T, K, d], value [T, K, d]; may be views of one
                      tensor, last dim contiguous

    Numerics: norm as ``rms_norm``; rotation in fp32, rounded once.

    Raises:
        KernelArgumentError: a shape, dtype or device differs from the above.

    Source: Su et al., 2021, in the two-halves layout of Hugging Face checkpoints.
    """
    _check_dims("qkv", qkv, 2)
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    if head_dim * (num_heads + 2 * num_kv_heads) != qkv.shape[1]:
        raise KernelArgumentError(
            f"qkv: expected [T, ({num_heads} + 2 * {num_kv_heads}) * d], got {list(qkv.shape)}"
        )
    if norm_weight is not None:
        shape = (num_heads + num_kv_heads, head_dim)
        _check("norm_weight", norm_weight, shape, qkv.dtype, qkv.device)
    _check("cos", cos, (qkv.shape[0], head_dim), torch.float32, qkv.device)
    _check("sin", sin, (qkv.shape[0], head_dim), torch.float32, qkv.device)
    return reference.qk_norm_rope(
        qkv, norm_weight, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps
    )


def store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store this step's keys and values in the paged KV cache, in place.

    ``k_cache.flatten(0, 1)[slot_mapping[t]] = key[t]`` for each token ``t`` whose slot is not
    negative, and likewise for values. Other slots keep their bytes.

    Shapes:
        key, value:        [T, K, d]     model dtype
        k_cache, v_cache:  [B, S, K, d]  contiguous
        slot_mapping:      [T] int64     ``block_id * S + offset``; -1 = do not store

    Numerics: exact copy. Two tokens with the same slot are a scheduler bug; the result is then
    unspecified.

    Raises:
        KernelArgumentError: a shape, dtype or device differs from the above.

    Source: the slot layout of vLLM's PagedAttention (Kwon et al., SOSP 2023).
    """
    _check_dims("key", key, 3)
    _check("value", value, key.shape, key.dtype, key.device)
    _check_caches(k_cache, v_cache, key.shape[1], key)
    _check("slot_mapping", slot_mapping, (key.shape[0],), torch.int64, key.device)
    reference.store_kv(key, value, k_cache, v_cache, slot_mapping)


def paged_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, *, scale: float
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

    Raises:
        KernelArgumentError: a shape, dtype or device differs from the above.

    Source: Kwon et al., SOSP 2023, for the layout; grouped queries: Ainslie et al., 2023.
    """
    _check_dims("query", query, 3)
    _check_dims("k_cache", k_cache, 4)
    num_kv_heads = k_cache.shape[2]
    _check_caches(k_cache, v_cache, num_kv_heads, query)
    if query.shape[1] % num_kv_heads:
        raise KernelArgumentError(
            f"query: expected a multiple of the cache's {num_kv_heads} heads, got {query.shape[1]}"
        )
    if query.shape[0] != rows.num_tokens:
        raise KernelArgumentError(
            f"rows: expected {query.shape[0]} tokens as in query, got {rows.num_tokens}"
        )
    return reference.paged_attention(query, k_cache, v_cache, rows, scale=scale)


def swiglu(gate_up: Tensor) -> Tensor:
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
    return reference.swiglu(gate_up)


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


def _check_caches(k_cache: Tensor, v_cache: Tensor, num_kv_heads: int, heads: Tensor) -> None:
    """Caches [B, S, K, d] for ``heads`` [T, H or K, d]."""
    _check_dims("k_cache", k_cache, 4)
    num_blocks, block_size = k_cache.shape[:2]
    shape = (num_blocks, block_size, num_kv_heads, heads.shape[2])
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check(name, cache, shape, heads.dtype, heads.device)
        if not cache.is_contiguous():
            raise KernelArgumentError(f"{name}: expected contiguous, got stride {cache.stride()}")
