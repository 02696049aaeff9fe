"""How full a micro-batch and a plan get: what the scheduler asks before it admits or fills.

A policy decides three numbers and nothing else; order, blocks, slots and progress are the
scheduler's. It is frozen and sees only a ``Load``, so equal loads always get equal answers.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a policy sees when a plan is being filled."""

    num_running: int
    """Sequences that have a slot."""
    num_waiting: int
    num_prompts: int
    """Sequences with known tokens still to compute, running or waiting."""
    backlog_tokens: int
    """Known tokens still to compute, of all sequences."""
    burst_tokens: int
    """``backlog_tokens`` as it was when the last sequence had arrived."""
    num_microbatches: int
    max_tokens_per_plan: int
    num_decodes: int
    """Decode rows of the plan that is being filled."""


class Policy(Protocol):
    """Decides how many sequences a micro-batch takes, and how many prompt tokens a plan."""

    @property
    def max_difference(self) -> int | None:
        """Sequences are moved once a micro-batch has this many more than another; None: never."""
        ...

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """Sequences up to which a micro-batch admits, of ``num_wanted`` that could run at once."""
        ...

    def prefill_tokens(self, load: Load) -> int:
        """Prompt tokens of one plan; the scheduler keeps to ``max_tokens_per_plan`` itself."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Balanced:
    """Plans that cost alike: equal shares of the sequences and of the tokens that wait."""

    max_difference: int | None = 2

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """An equal share, rounded up."""
        return -(-num_wanted // num_microbatches)

    def prefill_tokens(self, load: Load) -> int:
        """The backlog's share of one plan, if as many plans as can work on it do.

        It is that of the backlog at the last arrival, and kept while that shrinks: the last
        plans of a burst are as large as the first.
        """
        if load.num_prompts < load.num_microbatches:
            return -(-load.backlog_tokens // load.num_prompts)
        return -(-load.burst_tokens // load.num_microbatches)


@dataclasses.dataclass(frozen=True, slots=True)
class Greedy:
    """The plan at hand takes all that its token budget holds; the others get what is left."""

    max_difference: int | None = None

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """All of them."""
        return num_wanted

    def prefill_tokens(self, load: Load) -> int:
        """Up to the token budget."""
        return load.max_tokens_per_plan


@dataclasses.dataclass(frozen=True, slots=True)
class Fixed:
    """Equal shares of the sequences, and the same token budget for every plan.

    Source: chunked prefill as in Sarathi-Serve.
    """

    max_difference: int | None = 2

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """An equal share, rounded up."""
        return -(-num_wanted // num_microbatches)

    def prefill_tokens(self, load: Load) -> int:
        """What the decode rows leave of the token budget, whatever waits."""
        return load.max_tokens_per_plan - load.num_decodes


POLICIES: Mapping[str, Policy] = types.MappingProxyType(
    {"balanced": Balanced(), "greedy": Greedy(), "fixed": Fixed()}
)
"""By the name that ``scheduler.policy`` gives."""
