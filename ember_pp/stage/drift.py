"""How far one computation is from another, tensor by tensor, and where.

``Drift`` sums up rounded computations, ``first_difference`` compares what must be equal bit by bit.
A row is a token's vector, [D] of hidden states or [V] of logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30
_NOT_A_NUMBER = 1e100  # in place of a difference that is none: larger than any other


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Which row: of which plan, and which token that is."""

    plan: int
    row: int
    request: int
    position: int

    def to_plain(self) -> dict[str, int]:
        """For JSON."""
        return dataclasses.asdict(self)


class Drift:
    """Differences of all rows of one tensor that were added.

    ``worst``: of a row, its largest difference over its largest expected value; of all rows the
    largest. ``mean``: of a row, the length of its difference over the expected length; of all
    rows the mean. The first moves with single elements, the second hardly at all.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self.worst = 0.0
        self._max_abs = 0.0
        self._sum = 0.0
        self._where: dict[str, Any] | None = None

    def add(self, actual: Tensor, expected: Tensor, places: Sequence[Place]) -> None:
        """Rows [N, ...] and where they come from."""
        if not len(places):
            return
        assert actual.shape == expected.shape, (actual.shape, expected.shape)
        expected = expected.double()
        difference = actual.double().sub_(expected).abs_()
        difference.nan_to_num_(_NOT_A_NUMBER, _NOT_A_NUMBER)
        largest, elements = difference.max(-1)
        lengths = difference.norm(dim=-1)
        size = torch.nan_to_num(expected, 1.0, 1.0, 1.0, out=difference).abs_()
        errors = largest / size.amax(-1).clamp_min_(_TINY)
        lengths /= size.norm(dim=-1).clamp_min_(_TINY)
        self._sum += float(lengths.sum())
        self._max_abs = max(self._max_abs, float(largest.max()))
        self.num_rows += len(places)
        row = int(errors.argmax())
        if self._where is None or float(errors[row]) > self.worst:
            self.worst = float(errors[row])
            element = int(elements[row])
            self._where = places[row].to_plain() | {
                "element": element,
                "actual": _plain(actual[row, element]),
                "expected": _plain(expected[row, element]),
            }

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.num_rows,
            "max_abs": self._max_abs,
            "worst": self.worst,
            "mean": self._sum / self.num_rows if self.num_rows else 0.0,
            "where": self._where,
        }


def first_difference(actual: Tensor, expected: Tensor) -> dict[str, Any] | None:
    """The first element whose bits differ, in the order of rows; None: all are equal.

    Args:
        actual, expected: [N] or [N, M], of the same shape and dtype or they differ as a whole.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        described = (f"{tensor.dtype} {list(tensor.shape)}" for tensor in (actual, expected))
        return {"row": 0, "element": 0, **dict(zip(("actual", "expected"), described, strict=True))}
    differs = bits(actual) != bits(expected)
    if not bool(differs.any()):
        return None
    first = tuple(differs.nonzero()[0].tolist())
    return {
        "row": first[0],
        "element": first[1] if len(first) > 1 else 0,
        "actual": _plain(actual[first]),
        "expected": _plain(expected[first]),
        "num_differing": int(differs.sum()),
        "num_elements": differs.numel(),
    }


def bits(tensor: Tensor) -> Tensor:
    """The same bytes as integers: NaN is then itself, and 0.0 not -0.0."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(integers)


def _plain(value: Tensor) -> float | int | str:
    number: float | int = value.item()
    return number if math.isfinite(number) else str(number)  # JSON has no NaN
