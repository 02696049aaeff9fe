"""Which requests can be served at all, and how long they may grow."""

from __future__ import annotations

import dataclasses

from ember_pp.errors import InvalidRequestError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LengthLimits:
    """What bounds the length of one sequence, whatever else runs."""

    num_blocks: int
    block_size: int
    max_model_len: int
    """Longest sequence, prompt and output, in tokens."""
    max_prompt_tokens: int | None
    """Longest prompt; None: what ``max_model_len`` allows."""

    @property
    def capacity_tokens(self) -> int:
        """Longest sequence that fits the KV cache alone; its last token is never an input."""
        return self.num_blocks * self.block_size + 1

    def max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Length, prompt and output, at which a sequence must end.

        Without ``max_tokens`` that is the context length, or what the whole cache holds if
        that is less.
        """
        if max_tokens is None:
            return min(self.max_model_len, self.capacity_tokens)
        return min(num_prompt_tokens + max_tokens, self.max_model_len)

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse a request that could not be served even alone.

        Raises:
            InvalidRequestError: the text names the setting to change.
        """
        if num_prompt_tokens < 1:
            raise InvalidRequestError("prompt: no tokens; expected at least 1")
        if self.max_prompt_tokens is not None and num_prompt_tokens > self.max_prompt_tokens:
            raise InvalidRequestError(
                f"prompt: {num_prompt_tokens} tokens; at most {self.max_prompt_tokens} are "
                "allowed (coordinator.max_prompt_tokens)"
            )
        if num_prompt_tokens >= self.max_model_len:
            raise InvalidRequestError(
                f"prompt: {num_prompt_tokens} tokens leave no room for an answer in the "
                f"context of {self.max_model_len} (model.context_length)"
            )
        total = max(self.max_total_tokens(num_prompt_tokens, max_tokens), num_prompt_tokens + 1)
        if total > self.capacity_tokens:
            raise InvalidRequestError(
                f"max_tokens: prompt and answer of {total} tokens do not fit the KV cache of "
                f"{self.num_blocks * self.block_size} tokens; lower max_tokens or raise "
                "cache.memory_gib"
            )
