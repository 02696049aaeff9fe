"""How full a micro-batch and a plan get: what the scheduler asks before it admits or fills.

A policy decides three numbers and nothing else; order, blocks, slots and progress are the
scheduler's. It is frozen and sees only a ``Load``, so equal loads always get equal answers.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Protocol


PlanTime = Callable[[int, int, int], float]
"""Seconds that a stage takes for a plan of (decode rows, prompt tokens, context tokens)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a policy sees when a plan is being filled."""

    num_decodes: int
    """Decode rows of this plan."""
    num_context_tokens: int
    """Tokens that they attend to, together."""
    num_decoding: int
    """Sequences that decode, in all micro-batches."""
    num_decoding_context_tokens: int
    """Tokens that all of these attend to."""
    backlog_tokens: int
    """Prompt tokens that could be planned now, had plans no limit: of prompts that were begun,
    and of waiting ones about as far as there are slots and blocks for them."""
    num_begun_tokens: int
    """Tokens before those of the prompt that is next."""
    num_microbatches: int
    max_tokens_per_plan: int
    plan_time_s: PlanTime | None
    """Predicted time at the slowest stage, if there is a prediction."""


class Policy(Protocol):
    """Decides how many sequences a micro-batch takes, and how many prompt tokens a plan."""

    @property
    def max_difference(self) -> int | None:
        """Sequences are moved once a micro-batch has this many more than another; None: never."""
        ...

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """Sequences that a micro-batch takes, of ``num_wanted`` that could run at once."""
        ...

    def prefill_tokens(self, load: Load) -> int:
        """Prompt tokens of one plan; the scheduler keeps to ``max_tokens_per_plan`` itself."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Balanced:
    """Plans that cost alike: equal shares of the sequences and of the tokens that wait."""

    max_difference: int | None = 2
    smoothness: float = 2.0
    slack: float = 0.05
    """A plan may always take this share longer than one of decode rows alone."""

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """An equal share, rounded up."""
        return -(-num_wanted // num_microbatches)

    def prefill_tokens(self, load: Load) -> int:
        """What brings this plan to the cost that all of them are to have."""
        time_s = load.plan_time_s or _count_tokens
        limit_s = self._plan_limit_s(load, time_s)
        context_tokens = load.num_context_tokens + load.num_begun_tokens
        low, high = 0, min(load.backlog_tokens, load.max_tokens_per_plan)
        while low < high:
            middle = (low + high + 1) // 2
            if time_s(load.num_decodes, middle, context_tokens + middle) <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low

    def _plan_limit_s(self, load: Load, time_s: PlanTime) -> float:
        num_decodes = load.num_decoding / load.num_microbatches
        context = load.num_decoding_context_tokens / load.num_microbatches
        base_s = time_s(num_decodes, 0, context)
        context += load.num_begun_tokens
        weight = self.smoothness * load.num_microbatches
        best_s, best = math.inf, 0.0
        size = backlog = load.backlog_tokens
        while size >= 1:
            plan_s = time_s(num_decodes, size, context + size)
            cost_s = (weight + backlog / size) * plan_s
            if cost_s > best_s:
                break
            best_s, best = cost_s, plan_s
            size = size * 4 // 5
        return max(best, (1 + self.slack) * base_s)


def _count_tokens(num_decodes: float, num_prefill_tokens: int, num_context_tokens: float) -> float:
    return 64 + num_decodes + num_prefill_tokens


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
