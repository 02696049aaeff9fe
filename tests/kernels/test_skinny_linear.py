"""skinny_linear: which plan a product gets."""

from __future__ import annotations

import itertools

import pytest

from ember_pp.kernels.skinny_linear import MOST_ROWS, Plan, make_plan

H100 = (132, 227 * 1024)
CARDS = [H100, (108, 163 * 1024), (84, 99 * 1024)]
SHAPES = [(1024, 4096), (2048, 1024), (3072, 1024), (4096, 24576), (12288, 4096), (25600, 5120)]
"""Width, and outputs or half of what is gated."""


def plan_of(num_rows: int, width: int, num_outputs: int, **flags: bool) -> Plan | None:
    """On an H100."""
    flags = {"is_normed": False, "is_gated": False} | flags
    return make_plan(
        num_rows,
        width,
        num_outputs,
        is_normed=flags["is_normed"],
        is_gated=flags["is_gated"],
        num_multiprocessors=H100[0],
        shared_limit=H100[1],
    )


@pytest.mark.parametrize(("num_multiprocessors", "shared_limit"), CARDS)
@pytest.mark.parametrize(("width", "num_outputs"), [*SHAPES, (32, 1), (96, 9000), (2592, 15)])
def test_what_a_plan_asks_for_is_there(
    width: int, num_outputs: int, num_multiprocessors: int, shared_limit: int
) -> None:
    found = 0
    for num_rows, is_normed, is_gated in itertools.product(
        range(1, MOST_ROWS + 1), (False, True), (False, True)
    ):
        plan = make_plan(
            num_rows,
            width,
            num_outputs,
            is_normed=is_normed,
            is_gated=is_gated,
            num_multiprocessors=num_multiprocessors,
            shared_limit=shared_limit,
        )
        if plan is None:
            continue
        found += 1
        assert num_rows <= plan.rows
        assert plan.rows <= 16 or plan.streams, "whole x is for 16 rows"
        assert not is_normed or (plan.rows == 8 and not plan.streams)
        assert not is_gated or plan.unit_tiles == 2, "gate and up"
        assert 1 <= plan.under_way <= plan.stages <= 16
        assert plan.x_stages <= 16
        assert (plan.x_stages > 0) == plan.streams
        assert plan.shared_bytes + 256 <= shared_limit
        assert plan.shared_bytes >= plan.stages * plan.unit_tiles * 8 * width_of_stage(width) * 2
        tiles = -(-num_outputs // 8)
        assert 1 <= plan.num_blocks <= min(tiles, num_multiprocessors)
        # The kernel cuts tiles evenly: no thread block has two more than another.
        assert plan.unit_tiles == 2 or plan.num_blocks == tiles
    assert found >= MOST_ROWS


def width_of_stage(width: int) -> int:
    return min(width, 1024)


@pytest.mark.parametrize(("width", "num_outputs"), SHAPES)
def test_a_single_row_is_multiplied_by_the_kernel_norm_and_all(
    width: int, num_outputs: int
) -> None:
    assert plan_of(1, width, num_outputs) is not None
    is_short = width <= 8192  # no model's hidden size is longer
    assert (plan_of(1, width, num_outputs, is_normed=True) is not None) == is_short


def test_two_small_thread_blocks_share_a_multiprocessor() -> None:
    """So that the next kernel's weights come while this one computes."""
    for width, num_outputs, is_gated in (
        (1024, 4096, False),
        (2048, 1024, False),
        (1024, 3072, True),
    ):
        plan = plan_of(1, width, num_outputs, is_gated=is_gated)
        assert plan is not None
        assert 2 * (plan.shared_bytes + 256 + 1024) <= 228 * 1024
    large = plan_of(1, 4096, 4096)
    assert large is not None
    assert large.shared_bytes > 160 * 1024, "a deep ring"


@pytest.mark.parametrize(
    ("num_rows", "width", "num_outputs"),
    [(0, 1024, 64), (MOST_ROWS + 1, 1024, 64), (1, 1040, 64), (1, 0, 64), (1, 1024, 0)],
    ids=["no-rows", "many-rows", "width", "no-width", "no-outputs"],
)
def test_what_the_kernel_cannot_compute_has_no_plan(
    num_rows: int, width: int, num_outputs: int
) -> None:
    assert plan_of(num_rows, width, num_outputs) is None
