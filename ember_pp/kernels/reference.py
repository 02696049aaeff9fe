"""Every operation of the model in plain torch: what it means, and how it is computed on CPU.

Same signatures as ``ops.py``, which documents shapes and checks arguments. Intermediate
results are rounded to the dtype of the inputs where transformers rounds them, so that the
two agree bit by bit as far as the products do.

Shape letters: T tokens, D hidden, H query heads, K KV heads, G = H / K, d head dim, B blocks,
S block size, V vocabulary, I intermediate, Q new tokens of a row, L context.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ember_pp.kernels.paged_rows import PagedRows, RowGroup
from ember_pp.kernels.rope_rows import RopeRows

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """``weight[token_ids]``; exact."""
    return weight.index_select(0, token_ids)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``input @ weight.T + bias``, accumulated and rounded as torch does it."""
    return F.linear(input, weight, bias)


def rms_norm(input: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``input / sqrt(mean(input ** 2) + eps)`` in fp32, rounded, then times ``weight``."""
    return F.rms_norm(input, input.shape[-1:], None, eps) * weight


def add_rms_norm(
    input: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(sum), sum)`` with ``sum = input + residual`` rounded to the dtype first."""
    total = input + residual
    return rms_norm(total, weight, eps), total


def add_rms_norm_linear(
    input: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(linear(rms_norm(total)), total)``, ``total = input + residual`` rounded first."""
    total = input if residual is None else input + residual
    return linear(rms_norm(total, norm_weight, eps), weight, bias), total


def add_rms_norm_gate_up(
    input: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """``(swiglu(linear(rms_norm(total))), total)``, ``total = input + residual`` rounded first."""
    gate_up, total = add_rms_norm_linear(input, residual, norm_weight, eps, weight)
    return swiglu(gate_up), total


def qk_norm_rope_store_kv(
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
    """Add ``bias``, split heads, norm each query and key head and turn both by position.

    ``x * cos + swap_halves(x) * sin`` in fp32, rounded once; the sign of ``rotate_half`` is
    in ``sin``. Then ``k_cache.flatten(0, 1)[slot_mapping[t]] = key[t]`` where the slot is not
    negative, and likewise for values.
    """
    if bias is not None:
        qkv = qkv + bias
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
    turned, value = torch.split(heads, [num_heads + num_kv_heads, num_kv_heads], 1)
    if norm_weight is not None:
        turned = F.rms_norm(turned, turned.shape[-1:], None, eps) * norm_weight
    swapped = turned.roll(turned.shape[-1] // 2, -1)
    cos, sin = rope.cos_sin
    turned = torch.addcmul(turned * cos[:, None], swapped, sin[:, None]).to(qkv.dtype)
    query, key = torch.split(turned, [num_heads, num_kv_heads], 1)
    _store_kv(key, value, k_cache, v_cache, slot_mapping)
    return query


def _store_kv(
    key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    is_stored = slot_mapping >= 0
    if not bool(is_stored.all()):
        slot_mapping, key, value = slot_mapping[is_stored], key[is_stored], value[is_stored]
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, key)
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, value)


def captures_attention(dtype: torch.dtype, head_dim: int, group_size: int, block_size: int) -> bool:
    """Never: the host works out groups of rows from their lengths."""
    return False


def paged_attention(
    query: Tensor, k_cache: Tensor, v_cache: Tensor, rows: PagedRows, *, scale: float
) -> Tensor:
    """``softmax(q k^T * scale) v`` of each token over its row's context up to itself."""
    k_slots, v_slots = k_cache.flatten(0, 1), v_cache.flatten(0, 1)  # [B * S, K, d]
    if len(rows.groups) == 1 and rows.groups[0].token_index is None:
        return _attend(query, k_slots, v_slots, rows.groups[0], scale)
    output = torch.zeros_like(query, memory_format=torch.contiguous_format)  # of padding, too
    for group in rows.groups:
        assert group.token_index is not None, "a group of all tokens is alone"
        selected = query.index_select(0, group.token_index)
        attended = _attend(selected, k_slots, v_slots, group, scale)
        output.index_copy_(0, group.token_index, attended)
    return output


def _attend(
    query: Tensor, k_slots: Tensor, v_slots: Tensor, group: RowGroup, scale: float
) -> Tensor:
    """[R * Q, H, d] -> the same. The G query heads of a KV head ride along without copies of
    its keys where Q is 1, as more queries."""
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = k_slots.shape[1]
    gathered = (group.num_rows, group.context_len, num_kv_heads, head_dim)
    key = k_slots.index_select(0, group.kv_slots).view(gathered).transpose(1, 2)  # [R, K, L, d]
    value = v_slots.index_select(0, group.kv_slots).view(gathered).transpose(1, 2)
    if group.query_len == 1:
        folded = query.reshape(group.num_rows, num_kv_heads, -1, head_dim)  # [R, K, G, d]
        attended = _softmax_attention(folded, key, value, group, scale)
        return attended.reshape(group.num_rows, num_heads, head_dim)
    by_row = query.reshape(group.num_rows, group.query_len, num_heads, head_dim).transpose(1, 2)
    key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
    attended = _softmax_attention(by_row, key, value, group, scale)
    return attended.transpose(1, 2).reshape(query.shape)


def _softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, group: RowGroup, scale: float
) -> Tensor:
    # cuDNN plans anew for every context length: on an H100 the 36 layers of an 8B model took
    # 155 ms per decode step with it and 31 ms without.
    with sdpa_kernel(_WITHOUT_CUDNN) if query.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=group.mask, is_causal=group.is_causal, scale=scale
        )


def _repeat_heads(heads: Tensor, num_heads: int) -> Tensor:
    """[R, K, L, d] -> [R, H, L, d], each KV head G times."""
    num_rows, num_kv_heads, context_len, head_dim = heads.shape
    if num_kv_heads == num_heads:
        return heads
    repeated = heads[:, :, None].expand(-1, -1, num_heads // num_kv_heads, -1, -1)
    # A copy where there is one KV head, too: with a mask and heads at a stride of 0, torch 2.11's
    # memory-efficient attention is wrong at the last query of 65, 129, 193, ...
    return repeated.reshape(num_rows, num_heads, context_len, head_dim).contiguous()


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of the two halves of ``gate_up``; silu is rounded first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def begin_step(
    block_table: Tensor, new_blocks: Tensor, last_tokens: Tensor, slots: Tensor, token_ids: Tensor
) -> None:
    """``block_table[slot, column] = block``; ``token_ids[r] = last_tokens[slots[r]]``."""
    slot, column, block = new_blocks.unbind(1)
    block_table[slot.long(), column.long()] = block
    token_ids[: len(slots)] = last_tokens[slots.long()]


def end_step(drawn: Tensor, slots: Tensor, last_tokens: Tensor | None) -> Tensor:
    """``last_tokens[slots[n]] = max(drawn[n], 0)`` of the rows that have a slot."""
    if last_tokens is not None:
        is_row = slots >= 0
        last_tokens[slots[is_row].long()] = drawn[is_row].clamp(min=0)
    return drawn.to(torch.int32)
