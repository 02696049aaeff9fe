"""How far two tensors are apart: by hand, at one place, and where there is no number."""

from __future__ import annotations

import json

import pytest
import torch

from ember_pp.stage.drift import Drift, Place, first_difference

PLACES = [Place(plan=4, row=row, request=row + 10, position=row + 20) for row in range(3)]


def test_errors_are_relative_to_the_row_and_the_worst_row_is_named() -> None:
    expected = torch.tensor([[3.0, 4.0], [0.0, 10.0], [1.0, 0.0]])
    actual = expected + torch.tensor([[0.0, 0.4], [0.0, -0.5], [0.0, 0.0]])
    drift = Drift()
    drift.add(actual, expected, PLACES)
    plain = drift.to_plain()
    assert plain["rows"] == 3
    assert plain["max_abs"] == pytest.approx(0.5)
    assert plain["worst"] == pytest.approx(0.4 / 4)  # 0.5 of 10 is less
    assert plain["mean"] == pytest.approx((0.4 / 5 + 0.5 / 10 + 0) / 3)
    assert plain["where"] == {
        "plan": 4,
        "row": 0,
        "request": 10,
        "position": 20,
        "element": 1,
        "actual": pytest.approx(4.4),
        "expected": 4.0,
    }


def test_parts_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    actual, expected = torch.randn(2, 3, 7, generator=generator)
    whole, parts = Drift(), Drift()
    whole.add(actual, expected, PLACES)
    for row in (2, 0, 1):
        parts.add(actual[row : row + 1], expected[row : row + 1], PLACES[row : row + 1])
    parts.add(actual[:0], expected[:0], [])
    assert parts.to_plain() == whole.to_plain() | {"mean": pytest.approx(whole.to_plain()["mean"])}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("is_ours", [True, False])
def test_no_number_is_worse_than_any(value: float, is_ours: bool) -> None:
    expected = torch.ones(3, 2)
    actual = expected.clone()
    (actual if is_ours else expected)[1, 1] = value
    drift = Drift()
    drift.add(actual, expected, PLACES)
    assert drift.worst > 1e99
    plain = json.loads(json.dumps(drift.to_plain(), allow_nan=False))
    assert plain["where"]["row"] == 1
    assert plain["where"]["actual" if is_ours else "expected"] == str(value)


def test_the_first_element_that_differs_is_named() -> None:
    expected = torch.arange(6.0).view(2, 3)
    actual = expected.clone()
    assert first_difference(actual, expected) is None
    actual[1, 0] = actual[1, 2] = 9.0
    assert first_difference(actual, expected) == {
        "row": 1,
        "element": 0,
        "actual": 9.0,
        "expected": 3.0,
        "num_differing": 2,
        "num_elements": 6,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_compared_not_values(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1, 2, dtype=dtype)
    assert first_difference(-zeros, zeros) is not None
    nan = torch.full((1, 2), float("nan"), dtype=dtype)
    assert first_difference(nan, nan.clone()) is None
    nearly = torch.ones(1, 2, dtype=dtype)
    nearly[0, 1] = torch.nextafter(nearly[0, 1], torch.tensor(2.0, dtype=dtype))
    assert first_difference(nearly, torch.ones(1, 2, dtype=dtype))["element"] == 1


def test_another_shape_or_type_is_a_difference() -> None:
    found = first_difference(torch.zeros(2, 3), torch.zeros(3, 3))
    assert found["actual"] == "torch.float32 [2, 3]"
    assert found["expected"] == "torch.float32 [3, 3]"
    assert first_difference(torch.zeros(2), torch.zeros(2).bfloat16()) is not None


def test_tokens_have_no_second_index() -> None:
    found = first_difference(torch.tensor([5, 6, 7]), torch.tensor([5, 6, 8]))
    assert (found["row"], found["element"], found["actual"]) == (2, 0, 7)
