"""Every tolerance of the tests, and the comparisons that use them.

Copies, gathers and tables are compared bit by bit. Sums are compared relative to the largest
value of the row they belong to, with a bound from the dtype and the length of the reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ember_pp.kernels import sampling
from ember_pp.kernels.slot_params import DrawSettings

LOGITS_FP32 = 1e-4
"""Our fp32 logits against transformers'."""
BF16_VS_OWN_FP32 = 1.25
"""Our bf16 error against fp32, over that of transformers' bf16 against the same fp32. Both are
sums of thousands of roundings: they agree in size, not bit by bit. On the demo model and 120
tokens of English ours is 0.0085, theirs 0.0130 (worst token; means 0.0056 and 0.0061)."""

BF16_MEAN_VS_OWN_FP32 = 1.0
"""The same of the mean over positions, which hardly varies: on random models ours is 0.80 to
0.95 of theirs."""

LOGPROBS_FP32 = 1e-4
"""Absolute, of log-probabilities down to some -30, with the logarithm of a sum of up to 151,936."""

ROUNDED_ALIKE = 0.02
"""Share of bf16 results that may differ in a bit from an oracle that rounds at the same places:
those that lie so near to the middle of two numbers that fp32 decides otherwise than double. An
oracle that leaves out one rounding differs in a tenth of them or more."""

_UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}


def sum_tolerance(dtype: torch.dtype, num_terms: int) -> float:
    """Relative error allowed to a sum of ``num_terms`` rounded products.

    Random roundings add up as the root of their number; 8 roots leave room for the worst of
    many outputs. Results are rounded once more at the end.
    """
    return 2.0**-24 * 8 * num_terms**0.5 + 4 * _UNIT_ROUNDOFF[dtype]


def attention_tolerance(dtype: torch.dtype, context_len: int) -> float:
    """Relative error allowed to attention over ``context_len`` positions: a sum of products, and
    one of values weighted by them."""
    return sum_tolerance(dtype, context_len) * 2


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference of a row over the row's largest value, the worst of all rows."""
    actual, expected = _comparable(actual, expected)
    scale = expected.abs().amax(-1).clamp_min(1e-30)
    return float(((actual - expected).abs().amax(-1) / scale).max())


def mean_relative_error(actual: Tensor, expected: Tensor) -> float:
    """Length of a row's difference over the row's length, the mean of all rows."""
    actual, expected = _comparable(actual, expected)
    scale = expected.norm(dim=-1).clamp_min(1e-30)
    return float(((actual - expected).norm(dim=-1) / scale).mean())


def _comparable(actual: Tensor, expected: Tensor) -> tuple[Tensor, Tensor]:
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert bool(actual.isfinite().all()), "not finite"
    return actual.double().cpu(), expected.double().cpu()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """``relative_error`` is within ``tolerance``."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what or 'result'}: relative error {error:.3g} > {tolerance:.3g}"


def assert_as_near_as(theirs: Tensor, ours: Tensor, exact: Tensor) -> None:
    """bf16 logits [T, V]: ``ours`` are as near to ``exact`` as ``theirs``."""
    for error, limit in (
        (relative_error, BF16_VS_OWN_FP32),
        (mean_relative_error, BF16_MEAN_VS_OWN_FP32),
    ):
        our_error, their_error = error(ours, exact), error(theirs, exact)
        text = f"{error.__name__}: ours {our_error:.4f}, theirs {their_error:.4f}"
        assert 0 < our_error <= their_error * limit, text


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Same shape, dtype and bytes; names the first coordinate that differs, and both values."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (what, actual.dtype, expected.dtype)
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.dtype.itemsize]
    differs = actual.contiguous().view(integers) != expected.contiguous().view(integers)
    if bool(differs.any()):
        first = tuple(differs.nonzero()[0].tolist())
        raise AssertionError(
            f"{what or 'result'}: {int(differs.sum())} of {differs.numel()} differ, first at "
            f"{first}: {actual[first].item()!r} is not {expected[first].item()!r}"
        )


def assert_rounded_alike(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """All but ``ROUNDED_ALIKE`` of the elements are equal, of so many that chance is out."""
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert actual.numel() >= 5000, "too few to tell"
    share = float((actual != expected).double().mean())
    assert share <= ROUNDED_ALIKE, f"{what or 'result'}: {share:.1%} of the elements differ"


DRAWS_DIFFERING = 0.002
"""Share of draws that may differ between two implementations, as near ties."""
_TIED = 1e-5
"""How near: of two scores, relative to the larger; of a sum of probabilities and top_p, relative
to their total; of a probability and min_p's share, relative to it. fp32 and its exponentials are
good to some 1e-6 of these."""


def assert_nearly_tied(
    logits: Tensor, settings: DrawSettings, position: int, one: int, other: int
) -> None:
    """Two tokens that were drawn from the same row tie, in double precision: their scores are
    equal, or the one with the larger score lies at the edge of what top_p or min_p keep."""
    assert settings.temperature > 0, f"{one} is not {other}, and an argmax has no near ties"
    order = logits.sort(descending=True, stable=True).indices
    scaled = (logits.double() - logits.max().double())[order] / settings.temperature
    if settings.top_k:
        kth = logits[order[min(settings.top_k, len(order)) - 1]]
        scaled[logits[order] < kth] = -torch.inf
    relative = scaled.exp()
    before = relative.cumsum(-1) - relative
    distance = before - settings.top_p * relative.sum()
    is_edge = distance.abs() <= _TIED * relative.sum()
    is_edge |= (relative - settings.min_p).abs() <= _TIED * settings.min_p
    is_kept = (relative >= settings.min_p) & (relative > 0)
    if settings.top_p < 1:
        is_kept &= distance < 0
    seed = settings.seed - 2**64 if settings.seed >= 2**63 else settings.seed
    noise = sampling.gumbel_noise(torch.tensor([seed]), torch.tensor([position]), order[None])
    scores = scaled + noise[0].double()
    places = [int((order == token).nonzero()[0, 0]) for token in (one, other)]
    for place in places:
        assert is_kept[place] or is_edge[place], f"{order[place]} of {one}, {other}: cut away"
    high, low = sorted(places, key=lambda place: -float(scores[place]))
    gap = float(scores[high] - scores[low])
    assert is_edge[high] or gap <= _TIED * max(1.0, abs(float(scores[high]))), (
        f"{one} and {other}: scores differ by {gap}, place {high} is not at an edge: {settings}"
    )
