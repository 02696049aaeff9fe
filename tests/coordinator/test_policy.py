"""Policies by numbers: how many prompt tokens they put beside how many decode rows."""

import math

import pytest

from ember_pp.coordinator.policy import POLICIES, Balanced, Load


def load(num_decodes=0, backlog_tokens=1000, **fields):
    """A plan as the average one, with context that costs nothing unless it is given."""
    num_microbatches = fields.pop("num_microbatches", 4)
    return Load(
        **{
            "num_decodes": num_decodes,
            "num_context_tokens": 0,
            "num_decoding": num_decodes * num_microbatches,
            "num_decoding_context_tokens": 0,
            "backlog_tokens": backlog_tokens,
            "num_begun_tokens": 0,
            "num_microbatches": num_microbatches,
            "max_tokens_per_plan": 2048,
            "plan_time_s": None,
        }
        | fields
    )


def roofline(num_decodes, num_prefill_tokens, num_context_tokens):
    """Up to 100 tokens for the time of reading the weights."""
    return max(100.0, num_decodes + num_prefill_tokens)


def linear(num_decodes, num_prefill_tokens, num_context_tokens):
    return 64.0 + num_decodes + num_prefill_tokens


tokens_of = POLICIES["balanced"].prefill_tokens


# ------------------------------------------------------------------------ balanced


@pytest.mark.parametrize("num_decodes", [0, 10, 60])
def test_takes_the_tokens_that_are_nearly_free(num_decodes):
    """5% longer than without any."""
    assert tokens_of(load(num_decodes, plan_time_s=roofline)) == 105 - num_decodes


@pytest.mark.parametrize(("num_decodes", "num_tokens"), [(0, 105), (10, 95), (30, 75), (200, 0)])
def test_brings_every_plan_to_the_time_of_the_average_one(num_decodes, num_tokens):
    unequal = load(num_decodes, num_decoding=40, plan_time_s=roofline)
    assert tokens_of(unequal) == num_tokens


@pytest.mark.parametrize("plan_time_s", [linear, None])
@pytest.mark.parametrize("num_microbatches", [2, 4, 8])
@pytest.mark.parametrize("backlog_tokens", [100, 1000, 10_000, 100_000])
def test_where_no_tokens_are_free_takes_the_root_of_the_backlog(
    backlog_tokens, num_microbatches, plan_time_s
):
    """Of ``(B / n + w) * (64 + n)`` the least is at ``n = sqrt(64 * B / w)``."""
    found = tokens_of(
        load(
            backlog_tokens=backlog_tokens,
            num_microbatches=num_microbatches,
            plan_time_s=plan_time_s,
        )
    )
    weight = Balanced().patience * (num_microbatches - 1)
    best = math.sqrt(64 * backlog_tokens / weight)
    assert best / 1.3 <= found <= best * 1.3


def test_a_larger_backlog_makes_a_roofline_plan_longer_at_last():
    sizes = [
        tokens_of(load(30, backlog_tokens=10**k, num_microbatches=2, plan_time_s=roofline))
        for k in range(2, 7)
    ]
    assert sizes[:2] == [75, 75]
    assert sizes == sorted(sizes)
    assert sizes[-1] > 500


@pytest.mark.parametrize("plan_time_s", [linear, roofline, None])
def test_a_single_micro_batch_takes_all_that_it_may(plan_time_s):
    one = {"num_microbatches": 1, "plan_time_s": plan_time_s}
    assert tokens_of(load(8, backlog_tokens=700, **one)) == 700
    assert tokens_of(load(8, backlog_tokens=5000, **one)) == 2048


@pytest.mark.parametrize("backlog_tokens", [1, 2, 3, 50])
def test_takes_a_small_backlog_at_once_where_that_is_free(backlog_tokens):
    assert tokens_of(load(8, backlog_tokens=backlog_tokens, plan_time_s=roofline)) == backlog_tokens


def test_takes_less_where_tokens_attend_to_more():
    """Far inside a long prompt, and beside rows that are longer than the average."""

    def plan_time_s(num_decodes, num_prefill_tokens, num_context_tokens):
        return roofline(num_decodes, num_prefill_tokens, 0) + num_context_tokens / 1000

    near = tokens_of(load(10, plan_time_s=plan_time_s))
    beside = tokens_of(load(10, num_context_tokens=2000, plan_time_s=plan_time_s))
    assert near == 94  # as many tokens of context as are computed
    assert beside == 92


@pytest.mark.parametrize("backlog_tokens", [1, 10**3, 10**6, 10**9])
@pytest.mark.parametrize("num_microbatches", [1, 2, 64])
def test_asks_for_few_predictions(backlog_tokens, num_microbatches):
    asked = []

    def plan_time_s(*size):
        asked.append(size)
        return linear(*size)

    tokens_of(
        load(
            backlog_tokens=backlog_tokens,
            num_microbatches=num_microbatches,
            max_tokens_per_plan=16_384,
            plan_time_s=plan_time_s,
        )
    )
    assert len(asked) <= 70


# ------------------------------------------------------------------------ all


@pytest.mark.parametrize("policy", ["balanced", "fixed"])
def test_shares_of_sequences_are_equal_and_hold_all(policy):
    shares = [POLICIES[policy].sequence_share(num_wanted, 4) for num_wanted in (0, 1, 4, 5, 8)]
    assert shares == [0, 1, 1, 2, 2]


def test_greedy_takes_all_sequences_and_all_tokens():
    greedy = POLICIES["greedy"]
    assert greedy.sequence_share(9, 4) == 9
    assert greedy.prefill_tokens(load(100)) == 2048
    assert greedy.max_difference is None


def test_fixed_takes_what_decode_rows_leave_of_the_budget():
    assert POLICIES["fixed"].prefill_tokens(load(100)) == 1948


def test_a_single_micro_batch_takes_all_even_where_long_chunks_look_dear() -> None:
    """Also where longer chunks are predicted to take longer per token."""

    def plan_s(decodes: float, prefill: float, context: float) -> float:
        return 1e-3 + 1e-5 * (decodes + prefill) + 1e-8 * prefill * prefill

    for backlog in (1, 100, 5000, 100_000):
        load = Load(
            num_decodes=3,
            num_context_tokens=300,
            num_decoding=3,
            num_decoding_context_tokens=300,
            backlog_tokens=backlog,
            num_begun_tokens=0,
            num_microbatches=1,
            max_tokens_per_plan=8192,
            plan_time_s=plan_s,
        )
        assert Balanced().prefill_tokens(load) == min(backlog, 8192)
