"""A coordinator's client that answers at once, in memory: for tests of jobs without processes."""

from __future__ import annotations

import contextlib
import random

from ember_pp.client import Completion

READY = {
    "phase": "ready",
    "model": {"name": "fake"},
    "stages": [
        {
            "stage_index": 0,
            "device": "cpu",
            "start_layer": 0,
            "end_layer": 8,
            "weight_bytes": 4_000_000,
            "kv_bytes": 64_000_000,
            "peak_bytes": 90_000_000,
            "busy_fraction": 0.75,
        }
    ],
}


def answer_text(seed_key):
    """What the fake model says to the request with this custom_id."""
    return f"the answer to {seed_key} \u00e9\u4e2d"


class FakeRequest:
    def __init__(self, request_id, fields, outcome):
        self.request_id = request_id
        self.fields = fields
        self._outcome = outcome

    def result(self):
        if isinstance(self._outcome, Exception):
            raise self._outcome
        text = answer_text(self.fields["seed_key"])
        return Completion(
            request_id=self.request_id,
            text=text,
            token_ids=[1, 2, 3],
            logprobs=[],
            finish_reason=self._outcome,
            stop_reason=None,
            num_prompt_tokens=5,
            num_cached_tokens=0,
            num_output_tokens=3,
        )


class FakeClient:
    """Requests end ``per_wait`` at a time, in an order drawn from ``seed``.

    ``outcomes`` maps a custom_id to what its tries come to, one after the other: an exception
    or a finish reason. ``on_wait(client)`` is called before each wait and may do anything.
    """

    def __init__(self, *, outcomes=None, per_wait=3, seed=0, on_wait=None, status=READY):
        self.outcomes = {key: list(tries) for key, tries in (outcomes or {}).items()}
        self.per_wait = per_wait
        self.on_wait = on_wait
        self.status_reply = status
        self.submitted = []
        self.cancelled = []
        self.most_open = 0
        self._random = random.Random(seed)
        self._open = []

    def submit(self, **fields):
        tries = self.outcomes.get(fields["seed_key"])
        outcome = tries.pop(0) if tries else "stop"
        request = FakeRequest(f"req-{len(self.submitted)}", fields, outcome)
        self.submitted.append(fields["seed_key"])
        self._open.append(request)
        self.most_open = max(self.most_open, len(self._open))
        return request

    def wait_any(self, timeout_s=None):
        if self.on_wait is not None:
            self.on_wait(self)
        self._random.shuffle(self._open)
        ended, self._open = self._open[: self.per_wait], self._open[self.per_wait :]
        return ended

    def cancel(self, request_ids=()):
        self.cancelled += request_ids
        return len(request_ids)

    def status(self):
        return self.status_reply

    def connect(self, config):
        """To be given as ``connect`` of ``batch.run``."""
        return contextlib.nullcontext(self)
