"""How full a micro-batch and a plan get: what the scheduler asks before it admits or fills.

A policy decides three numbers and nothing else; order, blocks, slots and progress are the
scheduler's. It is frozen and sees only a ``Load``, so equal loads always get equal answers.
"""

from __future__ import annotations

import bisect
import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Protocol

PlanTime = Callable[[float, float, float], float]
"""Seconds of a plan of (decode rows, prompt tokens, context tokens); averages too."""


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
    """Plans that cost alike: equal shares of the sequences, and prompt tokens by predicted time.

    A plan reads the weights whatever it computes, so up to some size prompt tokens are nearly
    free. An average plan takes these, and more only while that is worth it: a backlog of ``B``
    tokens takes ``B / size`` plans, each of which keeps the ``M - 1`` other micro-batches
    waiting. Of the sizes from the free one on, it takes the one with the least

        (B / size + patience * (M - 1)) * time(size)

    So it grows with the square root of the backlog. A single micro-batch, which keeps nobody
    waiting, takes all that it may: the pairs of attention, which make a longer chunk look dear, are
    there in shorter ones as well. Every plan then takes what brings it to the time of this
    average plan: less beside more decode rows, or far inside a long prompt.
    """

    max_difference: int | None = 2
    patience: float = 16.0
    """How much the waiting of others counts. Chosen by ``benchmarks/schedule_replay.py``: with
    less, TPOT grows at high load; with much more, prompts wait where no tokens are free."""
    slack: float = 0.05
    """Prompt tokens that make a plan longer by less than this share are free."""

    def sequence_share(self, num_wanted: int, num_microbatches: int) -> int:
        """An equal share, rounded up."""
        return -(-num_wanted // num_microbatches)

    def prefill_tokens(self, load: Load) -> int:
        """What brings this plan to the time of the average one."""
        time_s = load.plan_time_s or count_tokens
        sizes = range(1, min(load.backlog_tokens, load.max_tokens_per_plan) + 1)
        limit_s = self._average_plan_s(load, time_s, sizes)
        context = load.num_context_tokens + load.num_begun_tokens
        return bisect.bisect_right(
            sizes, limit_s, key=lambda size: time_s(load.num_decodes, size, context + size)
        )

    def _average_plan_s(self, load: Load, time_s: PlanTime, sizes: range) -> float:
        decodes = load.num_decoding / load.num_microbatches
        context = load.num_decoding_context_tokens / load.num_microbatches + load.num_begun_tokens
        free_s = (1 + self.slack) * time_s(decodes, 0, context)

        def plan_s(size: int) -> float:
            return time_s(decodes, size, context + size)

        if load.num_microbatches == 1:
            return max(free_s, plan_s(len(sizes)))
        size = max(1, bisect.bisect_right(sizes, free_s, key=plan_s))
        size_s = plan_s(size)
        weight, backlog = self.patience * (load.num_microbatches - 1), load.backlog_tokens
        while size < len(sizes):
            larger = min(len(sizes), size * 5 // 4 + 1)
            larger_s = plan_s(larger)
            if (weight + backlog / larger) * larger_s >= (weight + backlog / size) * size_s:
                break
            size, size_s = larger, larger_s
        return max(free_s, size_s)


_TOKENS_BESIDE = 64


def count_tokens(num_decodes: float, num_prefill_tokens: float, num_context_tokens: float) -> float:
    """Stands in for a prediction: the tokens of a plan, and as many as it costs to start one."""
    return _TOKENS_BESIDE + num_decodes + num_prefill_tokens


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
