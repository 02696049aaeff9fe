"""The book of plans that were sent and whose tokens have not come back."""

from __future__ import annotations

from collections import deque

from ember_pp.coordinator.plan import Plan
from ember_pp.errors import ProtocolError


class InFlight:
    """Plans in flight, in the order of their numbers, which start at 0 and have no gaps.

    Stages execute plans in order, so they also come back in order: anything else from the last
    stage is a ``ProtocolError``, raised before anything is changed.
    """

    def __init__(self) -> None:
        self._plans: deque[Plan] = deque()
        self.next_number = 0
        """Number of the next plan to be issued."""

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def num_returned(self) -> int:
        """Plans that came back: those with a lower number than this."""
        return self.next_number - len(self._plans)

    @property
    def oldest(self) -> Plan | None:
        """The plan that comes back next."""
        return self._plans[0] if self._plans else None

    def add(self, plan: Plan) -> None:
        """Enter a plan that is about to be sent."""
        assert plan.number == self.next_number, (plan.number, self.next_number)
        self._plans.append(plan)
        self.next_number += 1

    def complete(self, number: int, num_token_ids: int) -> Plan:
        """Take out plan ``number``, which came back with ``num_token_ids`` token ids.

        Raises:
            ProtocolError: it was never sent, came back before, is not the next one due, or has
                another number of token ids than rows that sample.
        """
        if not self._plans or number >= self.next_number:
            raise ProtocolError(
                f"tokens of plan {number}, which is not in flight; "
                f"the last plan sent is {self.next_number - 1}"
            )
        plan = self._plans[0]
        if number != plan.number:
            what = "came back twice" if number < plan.number else "came back out of order"
            raise ProtocolError(f"plan {number} {what}; plan {plan.number} is due")
        if num_token_ids != plan.num_rows:
            raise ProtocolError(
                f"plan {number}: {num_token_ids} token ids for {plan.num_rows} rows that sample"
            )
        return self._plans.popleft()
