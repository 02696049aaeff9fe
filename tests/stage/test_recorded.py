"""Whose token a row of a recorded plan is, with chunks, prefixes, preemption and run-ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_plans import BLOCK_SIZE, MAX_MODEL_LEN, MAX_SLOTS, NUM_BLOCKS, record

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.stage.recorded import follow, num_blocks, read_plans
from ember_pp.stage.slots import Slots

SIZES = {
    "max_slots": MAX_SLOTS,
    "max_blocks_per_sequence": -(-MAX_MODEL_LEN // BLOCK_SIZE),
    "block_size": BLOCK_SIZE,
}


@pytest.fixture(scope="module")
def recording():
    """Plans, answers and sequences of a stage that draws by position and plan."""
    slots = Slots(*SIZES.values())

    def run(execute: protocol.Execute) -> protocol.Sampled:
        positions = slots.apply(execute).sample_positions
        token_ids = [(7 * position + execute.plan) % 900 + 1 for position in positions]
        return protocol.Sampled(execute.epoch, execute.plan, protocol.pack_i32(token_ids), [])

    return record(run)


def test_rows_are_the_tokens_of_their_requests(recording) -> None:
    plans, answers, sequences = recording
    known = {sequence.seed: [*sequence.prompt_ids, *sequence.output_ids] for sequence in sequences}
    followed = follow(plans, **SIZES)
    assert [plan.execute for plan in followed] == plans
    computed: dict[int, set[int]] = {request: set() for request in known}
    for plan, sampled in zip(followed, answers, strict=True):
        assert len(plan.requests) == len(plan.positions)
        ids = protocol.unpack_i32(plan.execute.chunk_ids).tolist()
        first = len(plan.requests) - len(ids)  # the roster's rows come first
        for row, token_id in enumerate(ids, first):
            assert known[plan.requests[row]][plan.positions[row]] == token_id
        drawn = protocol.unpack_i32(sampled.token_ids).tolist()
        for row, token_id in zip(plan.sample_rows, drawn, strict=True):
            sequence = known[plan.requests[row]]
            if plan.positions[row] + 1 < len(sequence):  # else drawn behind a stop
                assert sequence[plan.positions[row] + 1] == token_id
        for request, position in zip(plan.requests, plan.positions, strict=True):
            computed[request].add(position)
    # Nothing is left out but what the prefix cache had, at the beginning.
    for request, sequence in known.items():
        last = len(sequence) - 1
        assert computed[request] >= set(range(min(computed[request]), last))
    assert any(min(positions) > 0 for positions in computed.values())


def test_prompts_in_chunks_are_known(recording) -> None:
    plans, _, _ = recording
    unfinished = {request for plan in follow(plans, **SIZES) for request in plan.unfinished}
    assert 9 in unfinished  # 64 and 35 tokens, 32 of which a plan holds
    assert 0 not in unfinished  # one token


def test_blocks_are_those_that_were_used(recording) -> None:
    plans, _, _ = recording
    assert num_blocks(plans) == NUM_BLOCKS
    assert num_blocks([]) == 1


def test_a_record_is_read_as_it_was_written(recording, tmp_path: Path) -> None:
    plans, _, _ = recording
    path = tmp_path / "plans"
    with path.open("wb") as file:
        for execute in plans:
            packed = protocol.encode(execute)
            file.write(len(packed).to_bytes(4, "little") + packed)
    assert read_plans(path) == plans
    packed = protocol.encode(protocol.Shutdown("enough"))
    path.write_bytes(len(packed).to_bytes(4, "little") + packed)
    with pytest.raises(ProtocolError, match="expected plans, got a Shutdown"):
        read_plans(path)
