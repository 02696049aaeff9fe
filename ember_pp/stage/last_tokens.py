"""Newest token of each slot on stage 0: where the inputs of decode rows come from.

The last stage sends the tokens that each plan drew back to stage 0 (*feedback*), in plan order, as
pairs (slot, token). Stage 0 knows how many: it has executed the plan itself.

Why a late feedback never reaches a new owner of its slot: let ``p`` be a plan that sampled for
the old owner, and ``q`` the plan that opens the slot again, so ``p < q``. The new owner's first
token is drawn by a plan ``r >= q``, and its first decode row is in a plan ``t > r`` with
``Execute.feedback >= r``. Feedback is applied in plan order without gaps, so at ``t`` that of
``p`` has been applied, and that of ``r`` after it: what ``t`` reads was drawn for the new owner.
Nothing reads the slot's token before ``t``, whatever is in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute
from ember_pp.stage.input_batch import BatchInputs


class TokenSource(Protocol):
    """What is needed of the feedback edge's ``handoff.Receiver``."""

    def receive_pairs(
        self, plan: int, num_pairs: int, target: Tensor, *, ready_at: int = 0, at: int = 0
    ) -> None:
        """``target[slot] = token`` for all pairs of ``plan``; the others: see ``Receiver``."""


class LastTokens:
    """The token drawn last for each slot, and the plans whose tokens are still to come.

    Args:
        max_slots: slots are ``0 .. max_slots - 1``.
        device: of stage 0.
        max_in_flight: plans in the pipeline at once. The feedback of plan ``p - max_in_flight``
            was sent before plan ``p`` was made. It is taken at ``p`` even if nothing needs it
            yet, so at most ``max_in_flight`` are ever left in the ring of twice as many slots,
            and the last stage never waits for a free one.
    """

    def __init__(
        self, max_slots: int, device: torch.device | str = "cpu", *, max_in_flight: int
    ) -> None:
        self._token_ids = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._source: TokenSource | None = None
        self._max_in_flight = max_in_flight
        self._expected: deque[tuple[int, int]] = deque()

    def connect(self, source: TokenSource | None) -> None:
        """Take feedback from ``source`` from now on. None: a single stage, which calls ``put``
        itself, or whose captured steps write ``tokens``. What was expected of another is not."""
        self._source = source
        self._expected.clear()

    @property
    def tokens(self) -> Tensor:
        """[max_slots] int64 on the device. A captured step reads it and, with a single stage,
        writes it."""
        return self._token_ids

    def fill(self, execute: Execute, inputs: BatchInputs) -> None:
        """Write the tokens of the decode rows into ``inputs.token_ids``.

        Waits for the feedback that they need. Called once for each plan, in order.

        Raises: as ``due``, and as ``take``.
        """
        self.take(self.due(execute, inputs.num_decode_rows))
        if inputs.num_decode_rows:
            inputs.token_ids[: inputs.num_decode_rows] = self._token_ids[inputs.decode_slots]
        self.expect(execute.plan, len(inputs.sample_slots))

    def due(self, execute: Execute, num_decode_rows: int) -> list[tuple[int, int]]:
        """The feedback to be taken before a plan, as (plan, number of tokens).

        Raises:
            ProtocolError: the plan needs feedback that cannot have come before it.
        """
        if num_decode_rows and not 0 <= execute.feedback < execute.plan:
            raise ProtocolError(
                f"plan {execute.plan}, micro-batch {execute.microbatch}: feedback: plan "
                f"{execute.feedback} cannot have drawn the inputs of decode rows"
            )
        newest = max(execute.feedback, execute.plan - self._max_in_flight)
        due = []
        while self._expected and self._expected[0][0] <= newest:
            due.append(self._expected.popleft())
        return due

    def take(self, due: Sequence[tuple[int, int]], *, ready_at: int = 0, at: int = 0) -> None:
        """Take what is ``due``; waits for it.

        Args:
            due: as it was returned.
            ready_at, at: of all together, as in ``Receiver.receive_pairs``.

        Raises:
            ProtocolError: the last stage has sent something else.
            HandoffError: the edge was closed.
        """
        for index, (plan, num_tokens) in enumerate(due):
            assert self._source is not None, "it says what is due"
            times = {"ready_at": 0 if index else ready_at, "at": 0 if due[index + 1 :] else at}
            self._source.receive_pairs(plan, num_tokens, self._token_ids, **times)

    def expect(self, plan: int, num_tokens: int) -> None:
        """The last stage will send so many tokens of ``plan``; with a single one, nothing."""
        if self._source is not None:
            self._expected.append((plan, num_tokens))

    def put(self, slots: Tensor, token_ids: Tensor) -> None:
        """What a single stage drew itself, [N] int64 each."""
        self._token_ids[slots] = token_ids
