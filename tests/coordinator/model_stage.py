"""A stage that a reader can check by eye: it obeys ``Execute`` messages over a fake KV cache.

The "key and value" of a token is a digest of the value before it, of the token and of its
position, as a real one depends on all tokens before it. A drawn token is a digest of all
values that its row attends to, of the seed, and of the counts that penalties would read. So a
block that is shared wrongly, reused too early, written twice or missing changes the tokens.
A roster row starts from the token drawn last for its slot, as on stage 0, and must have been
planned with the feedback of that draw.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from ember_pp import protocol
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams

VOCAB_SIZE = 997


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()


def _store(before: bytes, token: int, position: int) -> bytes:
    return _digest(before, token, position)


def _draw(values: list[bytes], seed: int, num_outputs: int, counts: object) -> int:
    drawn = _digest(values, seed, num_outputs, counts)
    return int.from_bytes(drawn, "little") % VOCAB_SIZE


def _counts(params: SamplingParams, prompt: list[int], output: list[int]) -> object:
    if not params.needs_token_counts:
        return None
    return sorted(set(prompt)), sorted(Counter(output).items())


def generate_alone(sequence: Sequence, num_tokens: int) -> list[int]:
    """The first ``num_tokens`` outputs of ``sequence``: the oracle, with no cache at all."""
    prompt, output = list(sequence.prompt_ids), []
    values: list[bytes] = []
    while True:
        for token in (prompt + output)[len(values) :]:
            values.append(_store(values[-1] if values else b"", token, len(values)))
        if len(output) == num_tokens:
            return output
        counts = _counts(sequence.params, prompt, output)
        output.append(_draw(values, sequence.seed, len(output), counts))


class _Slot:
    def __init__(self, opened: protocol.OpenSlot) -> None:
        self.seed = opened.seed
        self.params = SamplingParams.from_mapping(opened.sampling)
        self.num_prompt_tokens = opened.num_prompt_tokens
        self.num_output_tokens = opened.num_output_tokens
        self.prompt = list(protocol.unpack_i32(opened.prompt_ids))
        self.output = list(protocol.unpack_i32(opened.output_ids))
        if self.params.needs_token_counts:
            assert len(self.prompt) == opened.num_prompt_tokens
            assert len(self.output) == opened.num_output_tokens
        else:
            assert not self.prompt
            assert not self.output
        self.blocks: list[int] = []
        self.last_position = -1
        self.last_token = -1
        self.last_draw = -1  # the plan that drew it


class ModelStage:
    """Executes plans at once and in order; whoever drives it decides when tokens return."""

    def __init__(
        self, *, num_blocks: int, block_size: int, max_slots: int, max_tokens: int
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_slots = max_slots
        self.max_tokens = max_tokens
        self.next_plan = 0
        self.slots: dict[int, _Slot] = {}
        self.rosters: dict[int, list[int]] = {}
        self.kv: dict[tuple[int, int], bytes] = {}

    def execute(self, execute: protocol.Execute) -> list[int]:
        """The token ids that ``Sampled`` would carry."""
        assert execute.plan == self.next_plan, "plan numbers have no gaps"
        self.next_plan += 1
        roster = self._apply_changes(execute)
        drawn_by = [self.slots[slot].last_draw for slot in roster]
        assert execute.feedback == max(drawn_by, default=-1) < execute.plan
        chunks = self._read_chunks(execute)
        named = roster + [slot for slot, *_ in chunks]
        assert len(set(named)) == len(named), "a slot has two rows"
        num_tokens = len(roster) + sum(len(ids) for _, _, ids, _ in chunks)
        assert 1 <= num_tokens <= self.max_tokens, f"{num_tokens} tokens in one plan"

        rows = [(slot, None, [self.slots[slot].last_token], True) for slot in roster]
        # Draw only when all is stored, so that a row that overwrites another's place shows.
        written: set[tuple[int, int]] = set()
        drawing = []
        for slot, start, token_ids, samples in rows + chunks:
            self._write(self.slots[slot], start, token_ids, written)
            if samples:
                drawing.append(self.slots[slot])
        return [self._sample(slot, execute.plan) for slot in drawing]

    def _apply_changes(self, execute: protocol.Execute) -> list[int]:
        roster = self.rosters.setdefault(execute.microbatch, [])
        for slot in protocol.unpack_u32(execute.leave):
            roster.remove(slot)
        for opened in execute.open:
            assert 0 <= opened.slot < self.max_slots
            in_use = [slot for slots in self.rosters.values() for slot in slots]
            assert opened.slot not in in_use, "a slot is opened while a roster has it"
            self.slots[opened.slot] = _Slot(opened)
        pairs = protocol.unpack_u32(execute.blocks)
        for slot, block in zip(pairs[::2], pairs[1::2], strict=True):
            assert 0 <= block < self.num_blocks
            self.slots[slot].blocks.append(block)
        for slot in protocol.unpack_u32(execute.join):
            assert all(slot not in other for other in self.rosters.values())
            roster.append(slot)
        return list(roster)

    def _read_chunks(self, execute: protocol.Execute) -> list[tuple[int, int, list[int], bool]]:
        numbers = protocol.unpack_u32(execute.chunks)
        chunk_ids = list(protocol.unpack_i32(execute.chunk_ids))
        chunks = []
        for index in range(0, len(numbers), 4):
            slot, start, length, samples = numbers[index : index + 4]
            assert length >= 1
            chunks.append((slot, start, chunk_ids[:length], bool(samples)))
            assert len(chunks[-1][2]) == length
            chunk_ids = chunk_ids[length:]
        assert not chunk_ids
        return chunks

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        return slot.blocks[position // self.block_size], position % self.block_size

    def _write(
        self, slot: _Slot, start: int | None, token_ids: list[int], written: set[tuple[int, int]]
    ) -> None:
        if start is None:
            start = slot.last_position + 1
        elif slot.last_position >= 0:
            assert start == slot.last_position + 1, "chunks follow each other"
        if start:
            place = self._place(slot, start - 1)
            assert place not in written, "a row reads what another row of its plan stores"
        before = self.kv[place] if start else b""
        for position, token in enumerate(token_ids, start):
            place = self._place(slot, position)
            assert place not in written, "two rows store into one place"
            written.add(place)
            before = self.kv[place] = _store(before, token, position)
        slot.last_position = start + len(token_ids) - 1

    def _sample(self, slot: _Slot, plan: int) -> int:
        values = [self.kv[self._place(slot, p)] for p in range(slot.last_position + 1)]
        num_outputs = len(values) - slot.num_prompt_tokens
        assert num_outputs >= slot.num_output_tokens
        token = _draw(
            values, slot.seed, num_outputs, _counts(slot.params, slot.prompt, slot.output)
        )
        slot.output.append(token)
        slot.last_token, slot.last_draw = token, plan
        return token
