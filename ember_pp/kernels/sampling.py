"""Sampling in plain torch: counter-based noise, penalties, truncation, draw, log-probabilities.

Legend: N rows that sample, V vocabulary, W ranked tokens kept per row, M entries of a sparse list.

The draw is Gumbel-max: the token with the largest ``logit / temperature + noise``, where the
noise of a token is a pure function of (seed, position, token id). Chosen over inverting a
cumulative sum because (1) it is one pass over the row, with nothing carried from token to
token, so a kernel can give each token to any thread; (2) a last bit that differs in one logit
changes the draw only when two scores nearly tie, while in a cumulative sum it moves every
boundary after it; (3) tokens outside the truncated set need no noise at all.

Nothing here depends on the other rows of a batch: sums that decide anything are sums of
int64, which are the same in any order, and all else is elementwise, a maximum or a sort.
Functions take no decision that needs a value from the device when ``logits`` is on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

NO_TOKEN = -1
"""Drawn from a row whose largest logit is NaN or infinite; such a row has no distribution."""

_U32 = 0xFFFFFFFF
_PHILOX_M0, _PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
_PHILOX_W0, _PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
_PHILOX_ROUNDS = 10

# Probabilities relative to the row's largest, as whole numbers: their sums do not depend on
# the order of summation. 2**40 leaves room for a vocabulary of 2**22 in an int64.
_WEIGHT_SCALE = float(2**40)
_RANK_SLACK = 64  # ranked beyond top_k, for tokens equal to the k-th
_RANK_WITHOUT_TOP_K = 512  # holds the nucleus of nearly every row of real text
_RANK_MORE = 8192  # for the rows that need more than that, before they are sorted whole
_CHUNK_TOKENS = {"cpu": 2**17, "cuda": 2**24}  # a pass's working set stays in cache / in bounds


# --------------------------------------------------------------------------------------
# random numbers


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four random 32-bit words for each counter and key.

    Shapes: all six broadcast against each other; int64 that hold unsigned 32-bit values.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
    checked against the known-answer vectors of Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_PHILOX_ROUNDS):
        # The 64-bit products may wrap to negative: their bits are right, and every shift is
        # masked before it is multiplied again. c1 and c3 carry unmasked high bits until then.
        p0, p1 = c0 * _PHILOX_M0, c2 * _PHILOX_M1
        c0 = ((p1 >> 32) ^ c1 ^ k0) & _U32
        c2 = ((p0 >> 32) ^ c3 ^ k1) & _U32
        c1, c3 = p1, p0
        k0, k1 = (k0 + _PHILOX_W0) & _U32, (k1 + _PHILOX_W1) & _U32
    return c0, c1 & _U32, c2, c3 & _U32


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise of some tokens of each row; the same as in ``gumbel_noise_row``.

    Token ``t`` uses word ``t % 4`` of Philox with key ``(seed low, seed high)`` and counter
    ``(t // 4, position, 0, 0)``.

    Shapes: seeds, positions [N] int64 (seeds: the bits of a u64; positions below 2**32);
    token_ids [N, W] int64. Returns [N, W] float32.
    """
    words = _philox_words(seeds, positions, token_ids >> 2)
    word_index = token_ids & 3
    chosen = words[3]
    for index in range(3):
        chosen = torch.where(word_index == index, words[index], chosen)
    return _gumbel_from_words(chosen)


def gumbel_noise_row(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise of every token of each row, [N, V] float32; see ``gumbel_noise``."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seeds.device)[None, :]
    words = _philox_words(seeds, positions, blocks)
    noise = torch.stack([_gumbel_from_words(word) for word in words], dim=-1)
    return noise.flatten(1)[:, :vocab_size]


def _philox_words(
    seeds: Tensor, positions: Tensor, blocks: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros((), dtype=torch.int64, device=seeds.device)
    key = (seeds[:, None] & _U32, (seeds[:, None] >> 32) & _U32)
    return philox4x32((blocks, positions[:, None], zero, zero), key)


def _gumbel_from_words(words: Tensor) -> Tensor:
    # -log(-log(1 - u)): small u is large noise, and float32 resolves small u best, down to
    # 2**-33 (noise 22.9). u that would round to 1 is held below it (noise -2.8).
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


# --------------------------------------------------------------------------------------
# changes to the logits, in place, for sparse lists of (row, token)


def add_logit_bias(logits: Tensor, rows: Tensor, token_ids: Tensor, bias: Tensor) -> None:
    """``logits[rows[m], token_ids[m]] += bias[m]``, in place; pairs must be distinct.

    Shapes: logits [N, V] float32; rows, token_ids [M] int64; bias [M] float32.
    """
    logits[rows, token_ids] = logits[rows, token_ids] + bias


def forbid_tokens(logits: Tensor, rows: Tensor, token_ids: Tensor) -> None:
    """``logits[rows[m], token_ids[m]] = -inf``, in place. Shapes as in ``add_logit_bias``."""
    # A scalar of the device: a Python number would be copied there, and waited for.
    logits.index_put_((rows, token_ids), logits.new_full((), -torch.inf))


def apply_repetition_penalty(
    logits: Tensor, rows: Tensor, token_ids: Tensor, penalty: Tensor
) -> None:
    """Divide positive and multiply negative logits of the listed tokens, in place.

    A pair (row, token) may be listed many times, always with the row's penalty; it counts once.
    Shapes: logits [N, V] float32; rows, token_ids [M] int64; penalty [M] float32.

    Source: Keskar et al., "CTRL", 2019, with the sign rule of transformers.
    """
    values = logits[rows, token_ids]
    penalised = torch.where(values < 0, values * penalty, values / penalty)
    # Duplicates write the same value, since all were read before any was written.
    logits[rows, token_ids] = penalised


def apply_output_penalties(
    logits: Tensor, rows: Tensor, token_ids: Tensor, presence: Tensor, frequency: Tensor
) -> None:
    """Subtract ``presence + frequency * count`` from the listed tokens, in place.

    ``count`` is how often the pair (row, token) is listed: list each output token once per
    occurrence. Shapes: logits [N, V] float32; rows, token_ids [M] int64; presence, frequency
    [M] float32, the same for all entries of a row.

    Source: the OpenAI API's presence and frequency penalties.
    """
    pairs = rows * logits.shape[1] + token_ids
    ordered = pairs.sort().values
    count = torch.searchsorted(ordered, pairs, right=True) - torch.searchsorted(ordered, pairs)
    penalised = logits[rows, token_ids] - presence - frequency * count
    logits[rows, token_ids] = penalised


# --------------------------------------------------------------------------------------
# draws


def argmax_tokens(logits: Tensor) -> Tensor:
    """The most likely token of each row, ties to the lowest id; ``NO_TOKEN`` as in draws.

    Shapes: logits [N, V] float32. Returns [N] int64.
    """
    best, token_ids = logits.max(dim=-1)
    return torch.where(best.isfinite(), token_ids, NO_TOKEN)


def draw_tokens(logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
    """One draw per row from ``softmax(logits / temperature)``.

    Rows may hold -inf (never drawn); a row whose maximum is NaN or infinite gives ``NO_TOKEN``.

    Shapes: logits [N, V] float32; temperature [N] float32, above 0; seeds, positions [N] int64,
    see ``gumbel_noise``. Returns [N] int64.

    Cost on CPU: about 110 int64 operations per four tokens; the noise is nearly all of it.
    """
    drawn = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    for rows in _row_chunks(logits):
        scores = _scaled(logits[rows], logits[rows].amax(-1), temperature[rows])
        scores += gumbel_noise_row(seeds[rows], positions[rows], logits.shape[1])
        drawn[rows] = argmax_tokens(scores)
    return drawn


def draw_truncated_tokens(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One draw per row after temperature, top_k, top_p and min_p, in this order.

    top_k keeps the k largest logits and all equal to the k-th (0: all). top_p keeps, of what is
    left and renormalised, the fewest most likely tokens whose probability sums to at least
    top_p; of equal tokens the lower ids (1: all). min_p then drops tokens less likely than
    min_p times the most likely (0: none). The most likely token always stays.

    Shapes: logits [N, V] float32; temperature [N] float32, above 0; top_k [N] int64;
    top_p [N] float64; min_p [N] float32; seeds, positions [N] int64. Returns [N] int64.

    On CPU only the most likely few hundred tokens are ranked; a row that proves to need more
    is ranked to some thousands, and then sorted whole. On CUDA every row is sorted. The result
    is the same either way.
    """
    settings = _Settings(temperature, top_k, top_p, min_p, seeds, positions)
    if logits.device.type != "cpu":
        return _draw_sorted(logits, settings)
    drawn = torch.empty(logits.shape[0], dtype=torch.int64)
    rest = torch.arange(logits.shape[0])
    for width in _rank_widths(top_k, logits.shape[1]):
        if not len(rest):
            break
        chosen = logits if len(rest) == len(logits) else logits[rest]  # spare the usual copy
        some, is_complete = _draw_ranked(chosen, settings.of(rest), width)
        drawn[rest] = some
        rest = rest[~is_complete]
    if len(rest):
        drawn[rest] = _draw_sorted(logits[rest], settings.of(rest))
    return drawn


class _Settings(NamedTuple):
    """What ``draw_truncated_tokens`` takes beside the logits, [N] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    positions: Tensor

    def of(self, rows: Tensor | slice) -> _Settings:
        return _Settings(*(setting[rows] for setting in self))


def rank_tokens(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest logits of each row, largest first, equal ones by rising token id.

    Of tokens equal to the last listed, some may be missing in favour of others unless
    ``width`` is V. Shapes: logits [N, V]. Returns values [N, W] and token ids [N, W] int64.
    """
    if width == logits.shape[1]:
        values, token_ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, token_ids
    token_ids = logits.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, token_ids).sort(dim=-1, descending=True, stable=True)
    return values, token_ids.gather(1, order)


def count_kept(
    values: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    total_weights: Tensor | None = None,
) -> Tensor:
    """How many of each row's ranked tokens survive top_k, top_p and min_p, [N] int64.

    Survivors are a prefix, since each rule keeps the most likely. ``values`` [N, W] are ranked
    logits before temperature; ``total_weights`` [N] int64 is ``_total_weights`` of the whole
    row, used by rows without top_k; None when ``values`` has the whole row. Other shapes as in
    ``draw_truncated_tokens``.
    """
    relative = _scaled(values, values[:, 0], temperature).exp_()  # [N, W] in [0, 1]
    is_kept = (values >= _kth(values, top_k)) | (top_k == 0)[:, None]
    weights = (relative * _WEIGHT_SCALE).long() * is_kept
    sums = weights.cumsum(-1)
    total = sums[:, -1]
    if total_weights is not None:
        total = torch.where(top_k == 0, total_weights, total)
    # Kept while the tokens before it do not reach top_p: so the one that crosses is kept.
    is_kept &= ((sums - weights) < (top_p * total)[:, None]) | (top_p >= 1.0)[:, None]
    is_kept &= relative >= min_p[:, None]
    return is_kept.sum(-1)


def _scaled(logits: Tensor, row_max: Tensor, temperature: Tensor) -> Tensor:
    # The maximum is subtracted first: a tiny temperature then gives 0 and -inf, never inf - inf.
    return (logits - row_max[:, None]).div_(temperature[:, None])


def _total_weights(
    logits: Tensor, row_max: Tensor, temperature: Tensor, is_needed: Tensor
) -> Tensor:
    """Sum over each needed row of ``floor(exp((logit - max) / T) * 2**40)``; 0 elsewhere."""
    totals = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    for row in is_needed.nonzero()[:, 0].tolist():
        rows = slice(row, row + 1)
        relative = _scaled(logits[rows], row_max[rows], temperature[rows]).exp_()
        totals[rows] = relative.mul_(_WEIGHT_SCALE).long().sum(-1)
    return totals


def _rank_widths(top_k: Tensor, vocab_size: int) -> list[int]:
    if not len(top_k):
        return []
    wanted = torch.where(top_k == 0, _RANK_WITHOUT_TOP_K, top_k + _RANK_SLACK)
    widths = {min(int(wanted.max()), _RANK_MORE), _RANK_MORE}
    return sorted(width for width in widths if width * 4 <= vocab_size)


def _kth(values: Tensor, top_k: Tensor) -> Tensor:
    return values.gather(1, (top_k - 1).clamp(0, values.shape[1] - 1)[:, None])


def _is_complete(values: Tensor, num_kept: Tensor, top_k: Tensor) -> Tensor:
    """True where no token outside the ranked ones can belong to the survivors.

    With top_k, all that top_k left must be ranked, since top_p's sum is over them.
    """
    last_kept = values.gather(1, (num_kept - 1).clamp(min=0)[:, None])
    decisive = torch.where((top_k > 0)[:, None], _kth(values, top_k), last_kept)[:, 0]
    return (decisive > values[:, -1]) | (values[:, -1] == -torch.inf)


def _draw_ranked(logits: Tensor, settings: _Settings, width: int) -> tuple[Tensor, Tensor]:
    """Draws from the ``width`` most likely tokens, and in which rows these are enough."""
    temperature, top_k, top_p, min_p, seeds, positions = settings
    values, token_ids = rank_tokens(logits, width)
    total = _total_weights(logits, values[:, 0], temperature, (top_k == 0) & (top_p < 1.0))
    num_kept = count_kept(values, temperature, top_k, top_p, min_p, total)
    is_complete = _is_complete(values, num_kept, top_k)
    # Rows that are not complete are drawn again: their width must not be paid for here.
    width = max(int((num_kept * is_complete).max()), 1)
    scores = _scaled(values[:, :width], values[:, 0], temperature)
    scores += gumbel_noise(seeds, positions, token_ids[:, :width])
    is_dropped = torch.arange(width, device=values.device) >= num_kept[:, None]
    scores.masked_fill_(is_dropped, -torch.inf)
    best = scores.amax(-1, keepdim=True)
    # Equal scores: the lowest id, as in a pass over the whole row.
    is_worse = scores < best
    drawn = token_ids[:, :width].masked_fill(is_worse, torch.iinfo(torch.int64).max).amin(-1)
    return torch.where(best[:, 0].isfinite(), drawn, NO_TOKEN), is_complete


def _draw_sorted(logits: Tensor, settings: _Settings) -> Tensor:
    drawn = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    for rows in _row_chunks(logits):
        temperature, top_k, top_p, min_p, seeds, positions = settings.of(rows)
        values, token_ids = rank_tokens(logits[rows], logits.shape[1])
        num_kept = count_kept(values, temperature, top_k, top_p, min_p)
        is_dropped = torch.empty_like(values, dtype=torch.bool)
        is_dropped.scatter_(1, token_ids, ranks >= num_kept[:, None])
        kept = logits[rows].masked_fill(is_dropped, -torch.inf)
        drawn[rows] = draw_tokens(kept, temperature, seeds, positions)
    return drawn


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    num_rows, vocab_size = logits.shape
    step = max(1, _CHUNK_TOKENS.get(logits.device.type, 2**24) // vocab_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


# --------------------------------------------------------------------------------------
# log-probabilities


def top_logprobs(logits: Tensor, token_ids: Tensor, num_top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the drawn and of the most likely tokens, of ``softmax(logits)``.

    Shapes: logits [N, V] float32, unmodified; token_ids [N] int64. Returns the drawn tokens'
    log-probability [N] float32, then ids [N, num_top] int64 and log-probabilities
    [N, num_top] float32 of the most likely, most likely first, ties to the lowest id.
    """
    logprobs = logits.log_softmax(dim=-1)
    drawn = logprobs.gather(1, token_ids.clamp(min=0)[:, None])[:, 0]
    ids = _most_likely(logits, min(num_top, logits.shape[1]))
    return drawn, ids, logprobs.gather(1, ids)


def _most_likely(logits: Tensor, width: int) -> Tensor:
    """Ids of the ``width`` largest logits of each row, ties to the lowest id, [N, width]."""
    vocab_size = logits.shape[1]
    wide = width + _RANK_SLACK
    if logits.device.type != "cpu" or wide * 4 > vocab_size or width == 0:
        return rank_tokens(logits, vocab_size)[1][:, :width]
    values, ids = rank_tokens(logits, wide)
    rest = (~(values[:, width - 1] > values[:, -1])).nonzero()[:, 0]
    if len(rest):
        ids[rest] = rank_tokens(logits[rest], vocab_size)[1][:, :wide]
    return ids[:, :width]
