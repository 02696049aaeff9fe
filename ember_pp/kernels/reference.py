"""Every operation of the model in plain torch: what it means, and how it is computed on CPU.

Same signatures as ``ops.py``, which documents shapes and checks arguments. Intermediate
results are rounded to the dtype of the inputs where transformers rounds them, so that the
two agree bit by bit as far as the products do.

Shape letters: T tokens, D hidden, H query heads, K KV heads, G = H / K, d head dim, B blocks,
S block size, V vocabulary, I intermediate, Q new tokens of a row, L context.
"""

from __future__ import annotations

import contextlib
import time

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ember_pp.kernels import sampling
from ember_pp.kernels.paged_rows import PagedRows, RowGroup
from ember_pp.kernels.rope_rows import RopeRows
from ember_pp.kernels.slot_params import SlotParams
from ember_pp.kernels.step_state import BEGAN, INPUT_WAIT, OUTPUT_WAIT, PlanWords, StepState

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


def sample_tokens(logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams) -> Tensor:
    """``sampling.argmax_tokens`` and ``draw_truncated_tokens`` on fp32 logits; all rows by both,
    since which of them a row needs is not known to the host."""
    logits, index = logits.float(), slots.long().clamp(min=0)
    temperature = params.temperature[index]
    is_greedy = temperature == 0
    drawn = sampling.draw_truncated_tokens(
        logits,
        torch.where(is_greedy, 1.0, temperature),
        params.top_k[index].long().clamp(max=logits.shape[1]),
        params.top_p[index],
        params.min_p[index],
        params.seed[index],
        positions,
    )
    return torch.where(is_greedy, sampling.argmax_tokens(logits), drawn)


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """``sampling.top_logprobs``, by ``log_softmax`` and a sort."""
    return sampling.top_logprobs(logits.float(), token_ids, num_top)


def begin_step(plan: PlanWords, state: StepState) -> None:
    """A loop over the rows of the plan."""
    state.records[plan.turn, BEGAN] = time.monotonic_ns()
    words = plan.words.tolist()
    blocks_at, ids_at = 4 * plan.num_rows, 4 * plan.num_rows + 3 * plan.num_new_blocks
    for i in range(plan.num_new_blocks):
        slot, column, block = words[blocks_at + 3 * i : blocks_at + 3 * i + 3]
        state.block_table[slot, column] = block
    state.turn_and_mark[0], state.turn_and_mark[1] = plan.turn, plan.mark
    for tensor in state.expanded[3:10]:
        tensor.zero_()
    state.slot_mapping[: plan.padded_tokens] = -1
    state.sample_slots[:] = -1
    for tensor in (state.token_ids, state.positions):
        tensor[: plan.padded_tokens] = 0
    begin, num_samples = 0, 0
    for row in range(plan.num_rows):
        slot, start, length, samples = words[4 * row : 4 * row + 4]
        is_decode = row < plan.num_decodes
        start += plan.decode_offset if is_decode else 0
        end = begin + length
        state.slots[row] = slot
        state.context_lens[row] = start + length
        state.decode_lens[row] = start + 1 if length == 1 else 0
        state.cu_seqlens_q[row + 1 :] = end
        if samples:
            state.sample_rows[num_samples] = end - 1
            state.sample_slots[num_samples] = slot
            state.sample_positions[num_samples] = start + length
            num_samples += 1
        positions = torch.arange(start, start + length, device=state.positions.device)
        blocks = state.block_table[slot].index_select(0, positions // state.block_size)
        state.positions[begin:end] = positions
        state.slot_mapping[begin:end] = blocks * state.block_size + positions % state.block_size
        if not is_decode:
            ids = words[ids_at + begin - plan.num_decodes : ids_at + end - plan.num_decodes]
            state.token_ids[begin:end] = torch.tensor(ids, device=state.token_ids.device)
        elif state.last_tokens is not None:
            state.token_ids[begin] = state.last_tokens[slot]
        begin = end
    state.records[plan.turn, INPUT_WAIT] = time.monotonic_ns()


def end_step(drawn: Tensor, slots: Tensor, state: StepState) -> Tensor:
    """``results[turn, 2:] = drawn``; ``last_tokens[slots[n]] = max(drawn[n], 0)``."""
    if state.last_tokens is not None:
        is_row = slots >= 0
        state.last_tokens[slots[is_row].long()] = drawn[is_row].clamp(min=0)
    state.feedback[: len(drawn), 0] = slots
    state.feedback[: len(drawn), 1] = drawn.clamp(min=0).to(torch.int32)
    turn, mark = state.turn_and_mark.tolist()
    state.records[turn, OUTPUT_WAIT] = time.monotonic_ns()
    state.results[turn, 2 : 2 + len(drawn)] = drawn.to(torch.int32)
    state.results[turn, :2].view(torch.int64)[0] = mark
    return drawn.to(torch.int32)


def leave_stage(residual: Tensor, added: Tensor | None, output: Tensor, state: StepState) -> Tensor:
    """``residual + added``, as torch adds."""
    output.copy_(residual) if added is None else torch.add(residual, added, out=output)
    state.records[int(state.turn_and_mark[0]), OUTPUT_WAIT] = time.monotonic_ns()
    return output
