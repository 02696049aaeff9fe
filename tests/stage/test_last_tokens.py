"""LastTokens: what a decode row reads, however late the feedback, and whoever has the slot."""

import dataclasses
import random
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from ember_pp.errors import ProtocolError
from ember_pp.stage.last_tokens import LastTokens

MAX_SLOTS, MAX_IN_FLIGHT = 5, 3


@dataclasses.dataclass
class LateSource:
    """Feedback that is written only when it is waited for; a ring of reused memory."""

    sent: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    received: list[int] = dataclasses.field(default_factory=list)
    is_held: bool = False

    def receive(self, plan, num_tokens):
        assert not self.is_held, "the slot of the plan before was not given back"
        self.is_held = True
        assert plan == len(self.received), "feedback is taken in plan order, without gaps"
        assert len(self.sent[plan]) == num_tokens
        self.received.append(plan)
        self.slot = torch.tensor(self.sent[plan], dtype=torch.int32).view(-1, 1)
        return self.slot

    def release(self, plan):
        assert plan == self.received[-1]
        self.slot.fill_(-1)
        self.is_held = False


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
    last_tokens = LastTokens(MAX_SLOTS, source=source, max_in_flight=MAX_IN_FLIGHT)
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
            source.sent[plan].append(next_token)
            newest[slot] = (plan, next_token)
            next_token += 1
        assert plan - len(source.received) < MAX_IN_FLIGHT, "the ring would fill up"
        assert len(source.received) - 1 <= max(
            feedback, plan - MAX_IN_FLIGHT, *source.received[-1:]
        )
    assert num_late_owners > 100


def test_feedback_is_taken_no_earlier_than_needed():
    source = LateSource({plan: [plan] for plan in range(6)})
    last_tokens = LastTokens(MAX_SLOTS, source=source, max_in_flight=MAX_IN_FLIGHT)
    counts = []
    for plan in range(6):
        last_tokens.fill(*make_plan(plan, [], [plan % MAX_SLOTS]))
        counts.append(len(source.received))
    assert counts == [0, 0, 0, 1, 2, 3]
    last_tokens.fill(*make_plan(6, [4], feedback=4))
    assert len(source.received) == 5


@pytest.mark.parametrize("feedback", [-1, 1, 5])
def test_feedback_that_cannot_have_come_is_refused(feedback):
    last_tokens = LastTokens(MAX_SLOTS, source=LateSource({0: [3]}), max_in_flight=MAX_IN_FLIGHT)
    last_tokens.fill(*make_plan(0, [], [2]))
    with pytest.raises(ProtocolError, match=rf"plan 1, micro-batch 0: feedback: plan {feedback} "):
        last_tokens.fill(*make_plan(1, [2], feedback=feedback))


@pytest.mark.parametrize(("plan", "token_ids"), [(1, [5]), (0, [5, 6]), (0, [])])
def test_tokens_of_another_plan_are_refused(plan, token_ids):
    last_tokens = LastTokens(MAX_SLOTS, source=None, max_in_flight=1)
    last_tokens.fill(*make_plan(0, [], [2]))
    with pytest.raises(ProtocolError, match=r"due are \(plan, token ids\) \(0, 1\)"):
        last_tokens.put(plan, torch.tensor(token_ids, dtype=torch.int64))
    last_tokens.put(0, torch.tensor([5]))
    with pytest.raises(ProtocolError, match="None"):
        last_tokens.put(0, torch.tensor([5]))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_single_stage_puts_its_own_tokens(device):
    last_tokens = LastTokens(MAX_SLOTS, device, source=None, max_in_flight=2)
    due = deque([[4, 1]])
    last_tokens.fill(*make_plan(0, [], due[0]))
    last_tokens.put(0, torch.tensor([40, 10], device=device))
    execute, inputs = make_plan(1, [1, 4], feedback=0)
    inputs.token_ids = inputs.token_ids.to(device)
    inputs.decode_slots = inputs.decode_slots.to(device)
    last_tokens.fill(execute, inputs)
    assert inputs.token_ids.tolist() == [10, 40]
