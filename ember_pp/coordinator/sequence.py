"""A sequence: the state of one request inside the engine.

The scheduler moves it through ``WAITING -> PREFILLING -> DECODING -> DRAINING -> FINISHED``;
preemption leads back to ``WAITING``, and a stop ends it from anywhere. Nothing here decides
anything.
"""

from __future__ import annotations

import array
import enum
from collections.abc import Iterable

from ember_pp.sampling_params import SamplingParams


class SequenceStatus(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    DRAINING = "draining"
    """All its tokens are planned; the last of them have not come back."""
    FINISHED = "finished"


class Sequence:
    """One request in the engine: its tokens, and what it holds of slots and blocks.

    ``prompt_ids`` and ``output_ids`` are ``array("i")``. The outside reads tokens, counts and
    ``max_total_tokens``; every other attribute belongs to the scheduler.
    """

    __slots__ = (
        "arrival",
        "block_digests",
        "block_table",
        "is_dropped",
        "joins_after",
        "last_plan",
        "max_total_tokens",
        "microbatch_id",
        "needs_host",
        "num_admissions",
        "num_cached_tokens",
        "num_prefilled_tokens",
        "num_published_blocks",
        "output_ids",
        "params",
        "prompt_ids",
        "request_id",
        "roster_id",
        "seed",
        "slot",
        "status",
        "step_offset",
    )

    def __init__(
        self, request_id: str, prompt_ids: Iterable[int], params: SamplingParams, seed: int
    ) -> None:
        self.request_id = request_id
        self.prompt_ids: array.array[int] = array.array("i", prompt_ids)
        self.output_ids: array.array[int] = array.array("i")
        self.params = params
        self.seed = seed
        """Key of the random numbers, unsigned 64 bit."""
        self.status = SequenceStatus.WAITING
        self.arrival = -1
        """Place in the order of arrival; kept over preemptions."""
        self.max_total_tokens = 0
        """Prompt and output together never grow past this; set by ``Scheduler.add``."""
        self.num_cached_tokens = 0
        """Prompt tokens that the prefix cache gave when the sequence was first admitted."""
        self.num_admissions = 0
        """Times that it was given a slot; above 1 when it was preempted or replayed."""

        self.needs_host = False
        """Its next step waits until the host has seen its last token: no run-ahead. Nothing asks
        for it yet; masking logits by a grammar would."""

        self.slot = -1
        self.microbatch_id = -1
        """Micro-batch that plans it; -1 while it waits."""
        self.roster_id = -1
        """Micro-batch whose roster, as the stages know it, has its slot; -1 if none."""
        self.last_plan = -1
        """Newest plan with a row of it. Not kept while it is in a roster: there it is the
        newest plan of the micro-batch."""
        self.joins_after = -1
        """It may not join a roster before this plan has come back."""
        self.is_dropped = False
        """It ended while in flight: the return of its last plan releases it."""
        self.num_prefilled_tokens = 0
        """Leading tokens whose keys and values issued plans store. Not kept while it is in a
        roster: see ``step_offset``."""
        self.step_offset = 0
        """In a roster: what ``num_prefilled_tokens`` would be, less ``Microbatch.step``."""
        self.block_table: list[int] = []
        self.block_digests: list[bytes] = []
        """Prefix-cache key of each full block of known tokens, as far as one was asked for."""
        self.num_published_blocks = 0
        """Leading blocks of ``block_table`` that the prefix cache has been told of."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that are known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def is_finished(self) -> bool:
        """True once it ended, for whatever reason; nothing plans it any more."""
        return self.status is SequenceStatus.FINISHED or self.is_dropped

    def token_ids(self, start: int, end: int) -> array.array[int]:
        """Known tokens ``[start, end)`` of prompt and output together, as ``array("i")``."""
        num_prompt = len(self.prompt_ids)
        if end <= num_prompt:
            return self.prompt_ids[start:end]
        if start >= num_prompt:
            return self.output_ids[start - num_prompt : end - num_prompt]
        return self.prompt_ids[start:] + self.output_ids[: end - num_prompt]

    def leave_engine(self) -> None:
        """Hold nothing but the tokens any more: the state of one that waits."""
        self.status = SequenceStatus.WAITING
        self.slot = self.microbatch_id = self.roster_id = -1
        self.last_plan = self.joins_after = -1
        self.num_prefilled_tokens = 0
        self.block_table = []
        self.num_published_blocks = 0

    def end(self) -> None:
        """Nothing is planned for it any more, and it holds nothing."""
        self.is_dropped = False
        self.status = SequenceStatus.FINISHED
        self.block_digests = []

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request_id!r}, {self.status.value}, arrival={self.arrival}, "
            f"slot={self.slot}, {self.num_prompt_tokens}+{self.num_output_tokens} tokens)"
        )
