"""Brings drawn tokens to the host without waiting for them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


class PendingTokens:
    """Tokens on their way to the host.

    Args:
        tokens: [N] int32 on the host; written when ``copied`` has happened.
        copied: None: they are there.
    """

    def __init__(self, tokens: Tensor, copied: torch.cuda.Event | None) -> None:
        self._tokens = tokens
        self._copied = copied

    @property
    def is_ready(self) -> bool:
        """Whether ``read`` would not wait."""
        return self._copied is None or self._copied.query()  # type: ignore[no-untyped-call]

    def read(self) -> list[int]:
        """The tokens; waits for the device."""
        if self._copied is not None:
            self._copied.synchronize()
        token_ids: list[int] = self._tokens.tolist()
        return token_ids


class TokenReader:
    """Copies drawn tokens into pinned memory, in turn.

    Args:
        max_rows: most tokens of a plan.
        max_pending: plans whose tokens may be on their way at once.
        device: where they are drawn.
    """

    def __init__(self, max_rows: int, max_pending: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._buffers = []
        if self._is_cuda:
            for _ in range(max_pending):
                tokens = torch.empty(max_rows, dtype=torch.int32, pin_memory=True)
                self._buffers.append((tokens, torch.cuda.Event(blocking=True)))  # type: ignore[no-untyped-call]
        self._turn = itertools.cycle(self._buffers)

    def start(self, token_ids: Tensor) -> PendingTokens:
        """Enqueue the copy of [N] tokens; they may be overwritten by what is enqueued next."""
        if not self._is_cuda:
            return PendingTokens(token_ids, None)
        tokens, copied = next(self._turn)
        tokens = tokens[: len(token_ids)]
        tokens.copy_(token_ids, non_blocking=True)
        copied.record()
        return PendingTokens(tokens, copied)
