"""StageRunner: the order of a plan, what a tap writes. The rest is faked."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from ember_pp.errors import ProtocolError
from ember_pp.kernels.sampling import NO_TOKEN
from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32, unpack_i32
from ember_pp.stage.input_batch import SlotTable
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.runner import StageRunner
from ember_pp.stage.sampler import SampledTokens, Sampler

HIDDEN_SIZE, VOCAB_SIZE = 3, 11


class FakeModel:
    """Adds its layer's number; logits prefer the token that the last hidden value names."""

    def __init__(self, log):
        self._log = log

    def prepare(self, inputs, kv_cache):
        self._log.append("prepare")
        return inputs

    def forward(self, inputs, hidden_states, kv_cache, on_layer=None, *, prepared):
        assert prepared is inputs
        if hidden_states is None:
            hidden_states = inputs.token_ids[:, None].expand(-1, HIDDEN_SIZE).float()
        self._log.append("forward")
        for layer_index in (4, 5):
            hidden_states = hidden_states + layer_index
            if on_layer is not None:
                on_layer(layer_index, hidden_states)
        return hidden_states

    def logits(self, hidden_states):
        return torch.eye(VOCAB_SIZE)[hidden_states[:, 0].long() % VOCAB_SIZE]


@dataclasses.dataclass
class FakeSource:
    """Hidden states that count up; cleared on release as a next plan would."""

    log: list

    def receive(self, plan, num_tokens):
        self.log.append("receive")
        self.slot = torch.arange(num_tokens * HIDDEN_SIZE).view(-1, HIDDEN_SIZE).float()
        return self.slot

    def release(self, plan):
        self.log.append("release")
        self.slot.fill_(-1)


@dataclasses.dataclass
class FakeSink:
    """Keeps what was sent."""

    log: list
    sent: list = dataclasses.field(default_factory=list)
    waits_on_device: bool = False

    def send(self, plan, hidden_states):
        self.log.append("send")
        self.sent.append((plan, hidden_states.clone()))


def make_runner(log, *, source=None, sink=None, feedback=None, feedback_source=None):
    if source is not None and sink is None:
        feedback = feedback or FakeSink([])
    sampler = Sampler(VOCAB_SIZE, 4, (), "cpu") if sink is None else None
    last_tokens = None
    if source is None:
        last_tokens = LastTokens(4, max_in_flight=2)
    runner = StageRunner(
        1,
        FakeModel(log),
        None,
        SlotTable(4, 8, 16),
        sampler=sampler,
        last_tokens=last_tokens,
    )
    runner.connect(source or feedback_source, sink or feedback)
    return runner


def make_decode(plan, *, join=(), feedback=None):
    """A plan of micro-batch 0 in which slot 0 decodes."""
    return dataclasses.replace(
        make_execute(plan, start=1),
        join=pack_u32(join),
        chunks=b"",
        chunk_ids=b"",
        feedback=plan - 1 if feedback is None else feedback,
    )


def make_execute(plan=0, *, tokens=(1, 2, 3), samples=True, start=0, tap=None):
    opened = [OpenSlot(0, 0, {"temperature": 0.0}, 3, 0, b"", b"")] if start == 0 else []
    return Execute(
        epoch=6,
        plan=plan,
        microbatch=0,
        leave=b"",
        open=opened,
        blocks=pack_u32([0, 5]) if start == 0 else b"",
        join=b"",
        chunks=pack_u32([0, start, len(tokens), int(samples)]),
        chunk_ids=pack_i32(tokens),
        feedback=-1,
        after_idle=False,
        tap=tap,
    )


def test_a_middle_stage_receives_computes_sends_then_releases():
    log = []
    source, sink = FakeSource(log), FakeSink(log)
    assert make_runner(log, source=source, sink=sink).run(make_execute(9)) is None
    assert log == ["prepare", "receive", "forward", "send", "release"]
    [(plan, hidden_states)] = sink.sent
    assert plan == 9
    assert torch.equal(hidden_states, torch.arange(9.0).view(3, 3) + 9)


@dataclasses.dataclass
class FakeFeedback:
    """Token 7 for each row that is due."""

    log: list

    def receive_pairs(self, plan, num_pairs, target, *, ready_at=0, at=0):
        self.log.append("tokens")
        assert num_pairs == 1
        target[0] = 7


def test_the_first_stage_prepares_before_it_waits_for_tokens():
    log = []
    sink = FakeSink(log)
    runner = make_runner(log, sink=sink, feedback_source=FakeFeedback(log))
    runner.run(make_execute(0))
    log.clear()
    runner.run(make_decode(1, join=[0]))
    assert log == ["prepare", "tokens", "forward", "send"]
    assert torch.equal(sink.sent[1][1], torch.full((1, HIDDEN_SIZE), 7.0 + 9.0))


def test_the_last_stage_draws_what_the_logits_say():
    log = []
    runner = make_runner(log, source=FakeSource(log))
    sampled = runner.run(make_execute(3))
    # Row 2 is the last token: it starts with 2 * HIDDEN_SIZE, and the layers add 9.
    assert (sampled.epoch, sampled.plan) == (6, 3)
    assert unpack_i32(sampled.token_ids).tolist() == [(6 + 9) % VOCAB_SIZE]
    assert sampled.logprobs == []


def test_a_plan_that_samples_nothing_still_comes_back():
    runner = make_runner([])
    sampled = runner.run(make_execute(samples=False))
    assert (sampled.plan, sampled.token_ids, sampled.logprobs) == (0, b"", [])
    sampled = runner.run(make_execute(1, start=3, tokens=[4]))
    assert unpack_i32(sampled.token_ids).tolist() == [(4 + 9) % VOCAB_SIZE]


def test_the_last_stage_feeds_its_tokens_back_before_it_reports_them():
    feedback = FakeSink([])
    runner = make_runner([], source=FakeSource([]), feedback=feedback)
    drawn = [runner.run(make_execute(0, samples=False)), runner.run(make_execute(1))]
    assert [plan for plan, _ in feedback.sent] == [0, 1]
    for (_, token_ids), sampled in zip(feedback.sent, drawn, strict=True):
        assert token_ids.dtype == torch.int32
        assert token_ids.tolist() == [[0, token] for token in unpack_i32(sampled.token_ids)]
        assert token_ids.shape == (len(unpack_i32(sampled.token_ids)), 2)


def test_a_single_stage_decodes_from_what_it_drew():
    runner = make_runner([])
    token = (3 + 9) % VOCAB_SIZE
    assert unpack_i32(runner.run(make_execute(0)).token_ids).tolist() == [token]
    for plan in range(1, 6):
        token = (token + 9) % VOCAB_SIZE
        sampled = runner.run(make_decode(plan, join=[0] if plan == 1 else []))
        assert unpack_i32(sampled.token_ids).tolist() == [token]


def test_a_row_without_a_token_is_told_to_the_host_alone():
    """Stage 0 gets some token in its place: what it computes for that row is thrown away."""
    feedback = FakeSink([])
    runner = make_runner([], source=FakeSource([]), feedback=feedback)
    broken = SampledTokens(torch.tensor([NO_TOKEN]), (0,), (3,), None)
    runner._sampler.sample = lambda logits, slots, positions: broken
    sampled = runner.run(make_execute(0))
    assert list(unpack_i32(sampled.token_ids)) == [NO_TOKEN]
    [(_, token_ids)] = feedback.sent
    assert token_ids.tolist() == [[0, 0]]


def test_a_tap_writes_what_went_in_and_came_out(tmp_path):
    log = []
    runner = make_runner(log, source=FakeSource(log))
    folder = tmp_path / "new"
    sampled = runner.run(make_execute(7, tap=str(folder)))
    [path] = folder.iterdir()
    assert path.name == "plan-7.stage-1.safetensors"
    kept = load_file(path)
    given = torch.arange(9.0).view(3, 3)
    expected = {"input": given, "layer.4": given + 4, "layer.5": given + 9}
    for name, tensor in expected.items():
        assert torch.equal(kept.pop(name), tensor), name
    assert kept.pop("logits").shape == (1, VOCAB_SIZE)
    assert kept.pop("token_ids").tolist() == unpack_i32(sampled.token_ids).tolist()
    assert not kept


def test_nonsense_is_refused_before_anything_is_received():
    log = []
    runner = make_runner(log, source=FakeSource(log))
    with pytest.raises(ProtocolError, match="plan 0"):
        runner.run(make_execute(tokens=[1] * 17))
    assert log == []
