"""LastTokens: what a decode row reads, however late the feedback, and whoever has the slot."""

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch

from ember_pp.errors import ProtocolError
from ember_pp.stage.last_tokens import LastTokens

MAX_SLOTS, MAX_IN_FLIGHT = 5, 3


@dataclasses.dataclass
class LateSource:
    """Feedback that is written only when it is waited for."""

    sent: dict[int, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)
    received: list[int] = dataclasses.field(default_factory=list)
    times: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def receive_pairs(self, plan, num_pairs, target, *, ready_at=0, at=0):
        assert plan == len(self.received), "feedback is taken in plan order, without gaps"
        assert len(self.sent[plan]) == num_pairs
        self.received.append(plan)
        self.times.append((ready_at, at))
        for slot, token in self.sent[plan]:
            target[slot] = token


def make_last_tokens(source, device="cpu"):
    last_tokens = LastTokens(MAX_SLOTS, device, max_in_flight=MAX_IN_FLIGHT)
    last_tokens.connect(source)
    return last_tokens


def make_plan(plan, decode_slots, chunk_slots=(), feedback=-1):
    """What ``fill`` reads of a plan and of its inputs; every chunk samples."""
    num_tokens = len(decode_slots) + 2 * len(chunk_slots)
    inputs = SimpleNamespace(
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        decode_slots=torch.tensor(decode_slots, dtype=torch.int64),
        num_decode_rows=len(decode_slots),
        sample_slots=[*decode_slots, *chunk_slots],
    )
    return SimpleNamespace(plan=plan, microbatch=0, feedback=feedback), inputs


def test_decode_rows_get_their_own_owners_newest_token():
    """Any plans: a slot changes owner while tokens of the old one are still on their way."""
    rng = random.Random(0)
    source = LateSource()
    last_tokens = make_last_tokens(source)
    owner = dict.fromkeys(range(MAX_SLOTS), 0)
    newest: dict[int, tuple[int, int]] = {}  # slot -> plan and token of its present owner
    next_token, num_late_owners = 1, 0
    for plan in range(3000):
        decode_slots = [s for s in range(MAX_SLOTS) if s in newest and rng.random() < 0.5]
        chunk_slots = []
        for slot in range(MAX_SLOTS):
            if slot not in decode_slots and rng.random() < 0.2:  # a new owner
                num_late_owners += slot in newest and newest[slot][0] not in source.received
                owner[slot] += 1
                chunk_slots.append(slot)
        feedback = max((newest[slot][0] for slot in decode_slots), default=-1)
        execute, inputs = make_plan(plan, decode_slots, chunk_slots, feedback)
        last_tokens.fill(execute, inputs)
        expected = [newest[slot][1] for slot in decode_slots]
        assert inputs.token_ids.tolist() == expected + [0] * (2 * len(chunk_slots))
        source.sent[plan] = []
        for slot in inputs.sample_slots:
            source.sent[plan].append((slot, next_token))
            newest[slot] = (plan, next_token)
            next_token += 1
        assert plan - len(source.received) < MAX_IN_FLIGHT, "the ring would fill up"
        assert len(source.received) - 1 <= max(
            feedback, plan - MAX_IN_FLIGHT, *source.received[-1:]
        )
    assert num_late_owners > 100


def test_feedback_is_taken_no_earlier_than_needed():
    source = LateSource({plan: [(plan % MAX_SLOTS, plan)] for plan in range(6)})
    last_tokens = make_last_tokens(source)
    counts = []
    for plan in range(6):
        last_tokens.fill(*make_plan(plan, [], [plan % MAX_SLOTS]))
        counts.append(len(source.received))
    assert counts == [0, 0, 0, 1, 2, 3]
    last_tokens.fill(*make_plan(6, [4], feedback=4))
    assert len(source.received) == 5


def test_several_plans_feedback_is_timed_as_one_wait():
    source = LateSource({plan: [(plan, plan)] for plan in range(3)})
    last_tokens = make_last_tokens(source)
    for plan in range(3):
        last_tokens.fill(*make_plan(plan, [], [plan]))
    execute, inputs = make_plan(3, [2], feedback=2)
    last_tokens.take(last_tokens.due(execute, inputs.num_decode_rows), ready_at=5, at=6)
    assert (source.received, source.times) == ([0, 1, 2], [(5, 0), (0, 0), (0, 6)])


@pytest.mark.parametrize("feedback", [-1, 1, 5])
def test_feedback_that_cannot_have_come_is_refused(feedback):
    last_tokens = make_last_tokens(LateSource({0: [(2, 3)]}))
    last_tokens.fill(*make_plan(0, [], [2]))
    with pytest.raises(ProtocolError, match=rf"plan 1, micro-batch 0: feedback: plan {feedback} "):
        last_tokens.fill(*make_plan(1, [2], feedback=feedback))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_single_stage_puts_its_own_tokens(device):
    last_tokens = make_last_tokens(None, device)
    last_tokens.fill(*make_plan(0, [], [4, 1]))
    last_tokens.put(torch.tensor([4, 1], device=device), torch.tensor([40, 10], device=device))
    execute, inputs = make_plan(1, [1, 4], feedback=0)
    inputs.token_ids = inputs.token_ids.to(device)
    inputs.decode_slots = inputs.decode_slots.to(device)
    last_tokens.fill(execute, inputs)
    assert inputs.token_ids.tolist() == [10, 40]
