"""A plan: what every stage computes in one step of one micro-batch, and its message."""

from __future__ import annotations

import array
import dataclasses

from ember_pp import protocol
from ember_pp.coordinator.sequence import Sequence


@dataclasses.dataclass(slots=True)
class Chunk:
    """A run of known tokens of one sequence whose keys and values a plan computes."""

    sequence: Sequence
    slot: int
    start: int
    token_ids: array.array[int]
    samples: bool
    """True for the chunk that ends with the last known token: the next one is drawn there."""


@dataclasses.dataclass(slots=True)
class Plan:
    """One numbered plan; nothing changes it once ``Scheduler.next_plan`` has returned it.

    It names slots, not only sequences, so it packs to the same message whatever becomes of
    its sequences later.
    """

    number: int
    microbatch_id: int
    blocks: list[int]
    """Flat pairs (slot, block id)."""
    decodes: list[Sequence] = dataclasses.field(default_factory=list)
    """The roster, in row order. Shared with the micro-batch, which never changes it in place."""
    feedback: int = -1
    """Newest plan that drew an input of the decode rows; -1 without any."""
    after_idle: bool = False
    """True for the first plan after a time without any sequence."""
    leave: list[int] = dataclasses.field(default_factory=list)
    """Slots."""
    open: list[protocol.OpenSlot] = dataclasses.field(default_factory=list)
    join: list[int] = dataclasses.field(default_factory=list)
    """Slots."""
    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    num_context_tokens: int = 0
    """Tokens that the decode rows attend to, and those that the chunks do, together."""

    @property
    def rows(self) -> list[Sequence]:
        """The sequences that sample, in the order of ``Sampled.token_ids``."""
        if not self.chunks:
            return self.decodes
        return self.decodes + [chunk.sequence for chunk in self.chunks if chunk.samples]

    @property
    def num_rows(self) -> int:
        """Token ids that this plan's ``Sampled`` must carry."""
        return len(self.decodes) + sum(chunk.samples for chunk in self.chunks)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of the chunks."""
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_tokens(self) -> int:
        """Tokens that a stage computes: one per decode row, and those of the chunks."""
        return len(self.decodes) + self.num_prefill_tokens


def open_slot(sequence: Sequence) -> protocol.OpenSlot:
    """The message part that tells stages of a sequence's new slot.

    Token ids travel only where a penalty counts them.
    """
    has_counts = sequence.params.needs_token_counts
    return protocol.OpenSlot(
        slot=sequence.slot,
        seed=sequence.seed,
        sampling=sequence.params.to_mapping(),
        num_prompt_tokens=sequence.num_prompt_tokens,
        num_output_tokens=sequence.num_output_tokens,
        prompt_ids=protocol.pack_i32(sequence.prompt_ids) if has_counts else b"",
        output_ids=protocol.pack_i32(sequence.output_ids) if has_counts else b"",
    )


def plan_to_execute(plan: Plan, epoch: int, tap: str | None = None) -> protocol.Execute:
    """The message of ``plan``, to be sent to every stage, in the order of plan numbers.

    An unchanged roster costs the same whatever its length.
    """
    chunks: list[int] = []
    chunk_ids = array.array("i")
    for chunk in plan.chunks:
        length = len(chunk.token_ids)
        chunks += (chunk.slot, chunk.start, length, chunk.samples)
        chunk_ids += chunk.token_ids
    return protocol.Execute(
        epoch=epoch,
        plan=plan.number,
        microbatch=plan.microbatch_id,
        leave=protocol.pack_u32(plan.leave) if plan.leave else b"",
        open=plan.open,
        blocks=protocol.pack_u32(plan.blocks) if plan.blocks else b"",
        join=protocol.pack_u32(plan.join) if plan.join else b"",
        chunks=protocol.pack_u32(chunks) if chunks else b"",
        chunk_ids=protocol.pack_i32(chunk_ids) if chunks else b"",
        feedback=plan.feedback,
        after_idle=plan.after_idle,
        tap=tap,
    )
