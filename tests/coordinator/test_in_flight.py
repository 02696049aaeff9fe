"""Plans come back in order and complete, or nothing changes."""

import array

import pytest

from ember_pp.coordinator.in_flight import InFlight
from ember_pp.coordinator.plan import Chunk, Plan
from ember_pp.coordinator.sequence import Sequence
from ember_pp.errors import ProtocolError
from ember_pp.sampling_params import SamplingParams

NUM_ROWS = 2


def make_plan(number, num_rows=NUM_ROWS):
    rows = [Sequence(f"r{row}", [1], SamplingParams(), seed=0) for row in range(num_rows)]
    return Plan(number, microbatch_id=0, blocks=[], decodes=rows)


def make_in_flight(num_plans, num_back=0):
    """Plans ``0 .. num_plans - 1`` were sent, the first ``num_back`` came back."""
    in_flight = InFlight()
    for number in range(num_plans):
        in_flight.add(make_plan(number))
    for number in range(num_back):
        in_flight.complete(number, NUM_ROWS)
    return in_flight


def test_gives_plans_back_in_the_order_in_which_they_were_sent():
    in_flight = InFlight()
    plans = [make_plan(number) for number in range(3)]
    for plan in plans:
        assert in_flight.next_number == plan.number
        in_flight.add(plan)

    assert len(in_flight) == 3
    for plan in plans:
        assert in_flight.oldest is plan
        assert in_flight.complete(plan.number, NUM_ROWS) is plan
    assert len(in_flight) == 0
    assert in_flight.oldest is None
    assert in_flight.next_number == 3


@pytest.mark.parametrize("number", [0, 2])
def test_refuses_to_send_a_number_again_or_to_leave_one_out(number):
    in_flight = make_in_flight(1)
    with pytest.raises(AssertionError):
        in_flight.add(make_plan(number))
    assert len(in_flight) == 1


@pytest.mark.parametrize(
    ("number", "num_token_ids", "message"),
    [
        (0, NUM_ROWS, r"plan 0 came back twice; plan 1 is due"),
        (-1, NUM_ROWS, r"plan -1 came back twice; plan 1 is due"),
        (2, NUM_ROWS, r"plan 2 came back out of order; plan 1 is due"),
        (3, NUM_ROWS, r"plan 3, which is not in flight; the last plan sent is 2"),
        (1, NUM_ROWS - 1, r"plan 1: 1 token ids for 2 rows that sample"),
        (1, NUM_ROWS + 1, r"plan 1: 3 token ids for 2 rows that sample"),
        (1, 0, r"plan 1: 0 token ids for 2 rows that sample"),
    ],
)
def test_refuses_what_is_not_due_and_changes_nothing(number, num_token_ids, message):
    in_flight = make_in_flight(3, num_back=1)
    due = in_flight.oldest

    with pytest.raises(ProtocolError, match=message):
        in_flight.complete(number, num_token_ids)

    assert in_flight.oldest is due
    assert len(in_flight) == 2
    assert in_flight.next_number == 3
    assert in_flight.complete(1, NUM_ROWS) is due


def test_refuses_tokens_when_nothing_is_in_flight():
    with pytest.raises(ProtocolError, match="plan 0, which is not in flight"):
        make_in_flight(0).complete(0, NUM_ROWS)
    with pytest.raises(ProtocolError, match=r"plan 0, .* the last plan sent is 0"):
        make_in_flight(1, num_back=1).complete(0, NUM_ROWS)


def test_counts_rows_of_decodes_and_of_chunks_that_end_their_prefill():
    plan = make_plan(0)
    for samples in (True, False):
        sequence = Sequence("c", [1, 2], SamplingParams(), seed=0)
        plan.chunks.append(Chunk(sequence, 5, 0, array.array("i", [1, 2]), samples))
    in_flight = InFlight()
    in_flight.add(plan)

    with pytest.raises(ProtocolError, match="2 token ids for 3 rows"):
        in_flight.complete(0, 2)
    assert in_flight.complete(0, 3).num_tokens == NUM_ROWS + 4
