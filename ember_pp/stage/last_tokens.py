"""Newest token of each slot on stage 0: where the inputs of decode rows come from.

The last stage sends the token ids that each plan drew back to stage 0 (*feedback*), in plan
order. Which slots they belong to is not sent: stage 0 has executed the plan itself and
remembers, here, which of its slots sampled.

Why a late feedback never reaches a new owner of its slot: let ``p`` be a plan that sampled for
the old owner, and ``q`` the plan that opens the slot again, so ``p < q``. The new owner's first
token is drawn by a plan ``r >= q``, and its first decode row is in a plan ``t > r`` with
``Execute.feedback >= r``. Feedback is applied in plan order without gaps, so at ``t`` that of
``p`` has been applied, and that of ``r`` after it: what ``t`` reads was drawn for the new owner.
Nothing reads the slot's token before ``t``, whatever is in it.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute
from ember_pp.stage.input_batch import BatchInputs


class TokenSource(Protocol):
    """What is needed of the feedback edge's ``handoff.Receiver``."""

    def receive(self, plan: int, num_tokens: int) -> Tensor:
        """[num_tokens, 1] int32, valid until ``release``."""

    def release(self, plan: int) -> None:
        """The tokens of ``plan`` have been read."""


class LastTokens:
    """The token drawn last for each slot, and the plans whose tokens are still to come.

    Args:
        max_slots: slots are ``0 .. max_slots - 1``.
        device: of stage 0.
        source: the feedback edge; None with a single stage, which calls ``put`` itself, or whose
            captured steps write ``tokens``.
        max_in_flight: plans in the pipeline at once. The feedback of plan ``p - max_in_flight``
            was sent before plan ``p`` was made. It is taken at ``p`` even if nothing needs it
            yet, so at most ``max_in_flight`` are ever left in the ring of twice as many slots,
            and the last stage never waits for a free one.
    """

    def __init__(
        self,
        max_slots: int,
        device: torch.device | str = "cpu",
        *,
        source: TokenSource | None,
        max_in_flight: int,
    ) -> None:
        self._token_ids = torch.zeros(max_slots, dtype=torch.int64, device=device)
        self._device = torch.device(device)
        self._source = source
        self._max_in_flight = max_in_flight
        self._expected: deque[tuple[int, Tensor]] = deque()

    @property
    def tokens(self) -> Tensor:
        """[max_slots] int64 on the device. A captured step reads it and, with a single stage,
        writes it."""
        return self._token_ids

    def fill(self, execute: Execute, inputs: BatchInputs) -> None:
        """Write the tokens of the decode rows into ``inputs.token_ids``.

        Waits for the feedback that they need. Called once for each plan, in order.

        Raises: as ``await_feedback``.
        """
        self.await_feedback(execute, inputs.num_decode_rows)
        if inputs.num_decode_rows:
            inputs.token_ids[: inputs.num_decode_rows] = self._token_ids[inputs.decode_slots]
        if len(inputs.sample_slots) == inputs.num_decode_rows:
            self.expect(execute.plan, inputs.decode_slots)
        else:
            self.expect(execute.plan, torch.tensor(inputs.sample_slots, dtype=torch.int64))

    def await_feedback(self, execute: Execute, num_decode_rows: int) -> None:
        """Take the feedback that a plan's decode rows need, and wait for it.

        Raises:
            ProtocolError: the plan needs feedback that cannot have come before it, or the last
                stage has sent something else than what is due.
            HandoffError: the edge was closed.
        """
        if num_decode_rows and not 0 <= execute.feedback < execute.plan:
            raise ProtocolError(
                f"plan {execute.plan}, micro-batch {execute.microbatch}: feedback: plan "
                f"{execute.feedback} cannot have drawn the inputs of decode rows"
            )
        self._receive(max(execute.feedback, execute.plan - self._max_in_flight))

    def expect(self, plan: int, slots: Tensor) -> None:
        """``put`` will bring the tokens that ``plan`` draws for ``slots``, [N] int64."""
        if slots.device != self._device:
            slots = slots.pin_memory().to(self._device, non_blocking=True)
        self._expected.append((plan, slots))

    def put(self, plan: int, token_ids: Tensor) -> None:
        """The tokens that ``plan`` drew, [N] of any integer dtype, in the order of its rows.

        Raises:
            ProtocolError: not the plan that is due, or not its number of tokens.
        """
        due = (self._expected[0][0], len(self._expected[0][1])) if self._expected else None
        if due != (plan, len(token_ids)):
            raise ProtocolError(
                f"feedback: {len(token_ids)} token ids of plan {plan}; due are (plan, token ids) "
                f"{due}"
            )
        _, slots = self._expected.popleft()
        self._token_ids[slots] = token_ids.to(torch.int64)

    def _receive(self, newest: int) -> None:
        """Take the feedback of all plans up to ``newest``."""
        while self._source is not None and self._expected and self._expected[0][0] <= newest:
            plan, slots = self._expected[0]
            self.put(plan, self._source.receive(plan, len(slots))[:, 0])
            self._source.release(plan)
