"""What the operations of ``ops.py`` ask of their arguments, by name.

Shape letters as there. All raise ``KernelArgumentError``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.kernels.rope_rows import RopeRows


def check_logits(logits: Tensor) -> None:
    """[N, V] bf16 or fp32, V not 0."""
    check_dims("logits", logits, 2)
    if logits.dtype not in (torch.bfloat16, torch.float32):
        raise KernelArgumentError(f"logits: expected bf16 or fp32, got {logits.dtype}")
    if not logits.shape[1]:
        raise KernelArgumentError(f"logits: expected [N, V], got {list(logits.shape)}")


def check_dims(name: str, tensor: Tensor, num_dims: int) -> None:
    """So many dimensions."""
    if tensor.dim() != num_dims:
        raise KernelArgumentError(
            f"{name}: expected {num_dims} dimension{'s' if num_dims > 1 else ''}, "
            f"got shape {list(tensor.shape)}"
        )


def check(
    name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Shape, dtype and device."""
    if tensor.shape != shape:
        raise KernelArgumentError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype != dtype:
        raise KernelArgumentError(f"{name}: expected dtype {dtype}, got {tensor.dtype}")
    if tensor.device != device:
        raise KernelArgumentError(f"{name}: expected device {device}, got {tensor.device}")


def check_norm(input: Tensor, residual: Tensor | None, norm_weight: Tensor) -> None:
    """Tokens [T, D], a residual like them or none, and a weight [D]."""
    check_dims("input", input, 2)
    if residual is not None:
        check("residual", residual, input.shape, input.dtype, input.device)
    check("norm_weight", norm_weight, (input.shape[1],), input.dtype, input.device)


def check_rows(tokens: Tensor, name: str, rows: PagedRows) -> None:
    """Rows of as many tokens as ``tokens``, which has the name ``name``."""
    if len(tokens) != rows.num_tokens:
        raise KernelArgumentError(
            f"rows: expected {len(tokens)} tokens as in {name}, got {rows.num_tokens}"
        )


def check_qkv(
    qkv: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    rope: RopeRows,
    caches: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> None:
    """A fused projection, what its heads are normed and turned by, and where they are stored."""
    check_dims("qkv", qkv, 2)
    num_tokens, width = qkv.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    if head_dim * (num_heads + 2 * num_kv_heads) != width:
        raise KernelArgumentError(
            f"qkv: expected [T, ({num_heads} + 2 * {num_kv_heads}) * d], got {list(qkv.shape)}"
        )
    if bias is not None:
        check("bias", bias, (width,), qkv.dtype, qkv.device)
    if norm_weight is not None:
        shape = (num_heads + num_kv_heads, head_dim)
        check("norm_weight", norm_weight, shape, qkv.dtype, qkv.device)
    check_dims("rope.table", rope.table, 2)
    table_shape = (rope.table.shape[0], head_dim)
    check("rope.table", rope.table, table_shape, torch.float32, qkv.device)
    check("rope.positions", rope.positions, (num_tokens,), torch.int64, qkv.device)
    check_caches(*caches, (num_kv_heads, head_dim), qkv)
    check("slot_mapping", slot_mapping, (num_tokens,), torch.int64, qkv.device)


def check_caches(
    k_cache: Tensor, v_cache: Tensor, heads_shape: tuple[int, int], like: Tensor
) -> None:
    """Caches [B, S, K, d] for heads [K, d] of the dtype and device of ``like``."""
    check_dims("k_cache", k_cache, 4)
    shape = (*k_cache.shape[:2], *heads_shape)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check(name, cache, shape, like.dtype, like.device)
        if not cache.is_contiguous():
            raise KernelArgumentError(f"{name}: expected contiguous, got stride {cache.stride()}")
