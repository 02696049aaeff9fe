"""CapturedSteps: which graphs a stage has. What they compute: test_invariance.py."""

from __future__ import annotations

import array
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from replayed_graphs import ReplayedGraphs

from ember_pp.kernels import make_ops
from ember_pp.protocol import OpenSlot, pack_i32
from ember_pp.stage import captured
from ember_pp.stage.captured import CapturedSteps, StepLimits
from ember_pp.stage.model import LayerOutput
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.slots import PlanRows, Roster

MAX_SLOTS, MAX_TOKENS, WIDTH, VOCAB_SIZE = 12, 200, 4, 30
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    """As ``CapturedRunner`` has it."""
    with torch.inference_mode():
        yield


class FakeModel:
    """Hidden states are token ids and one more; logits prefer the token that they name."""

    hidden_size = WIDTH

    def prepare(self, inputs, kv_cache):
        return None

    def layers(self, token_ids, hidden_states, kv_cache, prepared, on_layer):
        if hidden_states is None:
            hidden_states = token_ids[:, None].expand(-1, WIDTH).float()
        if on_layer is not None:
            on_layer(7, hidden_states)
        return LayerOutput(hidden_states, torch.ones_like(hidden_states))

    def head(self, output):
        return torch.eye(VOCAB_SIZE)[output.sum()[:, 0].long() % VOCAB_SIZE]


def make_steps(*, is_last: bool) -> tuple[CapturedSteps, ReplayedGraphs]:
    """Of a first stage, which may be the only one; slots are open and greedy."""
    sampler = Sampler(VOCAB_SIZE, MAX_SLOTS, (), CPU) if is_last else None
    for slot in range(MAX_SLOTS if sampler else 0):
        sampler.open(OpenSlot(slot, 0, {"temperature": 0.0}, 3, 0, b"", b""))
    steps = CapturedSteps(
        FakeModel(),
        SimpleNamespace(storage=torch.zeros(1), block_size=16),
        make_ops("reference", CPU),
        StepLimits(
            max_slots=MAX_SLOTS, max_tokens=MAX_TOKENS, max_blocks_per_sequence=20, max_pending=2
        ),
        sampler=sampler,
        last_tokens=torch.zeros(MAX_SLOTS, dtype=torch.int64),
        uses_graphs=True,
    )
    graphs = steps._graphs = ReplayedGraphs()
    return steps, graphs


def chunks(*lens_and_samples: tuple[int, bool]) -> PlanRows:
    """A plan of fresh chunks, of slots 0, 1, ...; its token ids count up."""
    lens = [length for length, _ in lens_and_samples]
    blocks = [
        n for slot in range(len(lens)) for column in range(13) for n in (slot, column, column)
    ]
    return PlanRows(
        roster=Roster([], []),
        num_plans=0,
        chunk_slots=list(range(len(lens))),
        chunk_starts=[0] * len(lens),
        chunk_lens=lens,
        chunk_samples=[samples for _, samples in lens_and_samples],
        chunk_ids=pack_i32(range(sum(lens))),
        new_blocks=array.array("i", blocks),
    )


def decodes(num_rows: int) -> PlanRows:
    """A plan without chunks, of slots 0, 1, ..."""
    roster = Roster(list(range(num_rows)), [3] * num_rows)
    return PlanRows(roster, 0, [], [], [], [], b"", array.array("i"))


PLANS = [
    chunks((40, False)),
    chunks((40, True)),
    chunks((20, True), (20, True)),
    chunks((10, True), (10, True), (10, True), (5, True)),
    chunks((60, True)),
]
"""Two numbers of tokens with their padding, four of rows that sample: 0, 1, 2 and 4."""


def test_a_stage_that_hands_on_has_a_graph_for_each_number_of_tokens() -> None:
    steps, graphs = make_steps(is_last=False)
    for plan, rows in enumerate(PLANS):
        hidden_states = steps.hidden_states(steps.begin(plan, rows), None)
        assert hidden_states[:, 0].tolist() == list(range(1, rows.num_tokens + 1))
    assert len(graphs.captured) == 2


def test_the_last_stage_has_graphs_by_tokens_and_by_rows_that_sample() -> None:
    steps, graphs = make_steps(is_last=True)
    for plan, rows in enumerate(PLANS):
        drawn, _ = steps.draw(steps.begin(plan, rows), None, None)
        ends = [sum(rows.chunk_lens[: i + 1]) for i in range(len(rows.chunk_lens))]
        expected = [end % VOCAB_SIZE for end, s in zip(ends, rows.chunk_samples, strict=True) if s]
        assert drawn.tolist() == expected
    assert len(graphs.captured) == 2 + 3


def test_a_step_of_many_tokens_is_neither_padded_nor_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But its head and draw are captured as those of any other."""
    monkeypatch.setattr(captured, "MAX_CAPTURED_TOKENS", 50)
    steps, graphs = make_steps(is_last=True)
    step = steps.begin(0, chunks((53, True), (8, False)))
    drawn, _ = steps.draw(step, None, None)
    assert (step.shape.num_tokens, drawn.tolist()) == (61, [53 % VOCAB_SIZE])
    assert [key.num_tokens for key in graphs.captured] == [0]


@pytest.mark.parametrize("is_last", [False, True])
def test_what_is_watched_is_seen_without_padding_and_not_captured(is_last: bool) -> None:
    steps, graphs = make_steps(is_last=is_last)
    seen: list[tuple[int, ...]] = []
    for plan, rows in enumerate((chunks((40, True), (1, True)), decodes(3))):
        step = steps.begin(plan, rows)
        assert step.shape.num_tokens > rows.num_tokens

        def on_layer(layer: int, hidden_states: torch.Tensor) -> None:
            seen.append((layer, len(hidden_states)))

        if is_last:
            steps.draw(step, on_layer, lambda logits: seen.append(tuple(logits.shape)))
        else:
            steps.hidden_states(step, on_layer)
    logits = [(2, VOCAB_SIZE)], [(3, VOCAB_SIZE)]
    assert seen == [(7, 41), *logits[0][:is_last], (7, 3), *logits[1][:is_last]]
    assert not graphs.captured


def known_sizes(graphs: ReplayedGraphs) -> list[int]:
    """Tokens of the graphs, in the order in which they were captured."""
    return [key.num_tokens for key in graphs.captured]


@pytest.mark.parametrize("is_last", [False, True])
def test_no_plan_without_chunks_waits_for_a_graph(is_last: bool) -> None:
    steps, graphs = make_steps(is_last=is_last)
    steps.warm_up()
    known = set(graphs.captured)
    assert known_sizes(graphs)[0] == MAX_TOKENS, "smaller ones then find memory"
    for num_rows in range(1, MAX_SLOTS + 1):
        step = steps.begin(num_rows, decodes(num_rows))
        output = steps.draw(step, None, None)[0] if is_last else steps.hidden_states(step, None)
        assert len(output) == num_rows
    assert set(graphs.captured) == known
