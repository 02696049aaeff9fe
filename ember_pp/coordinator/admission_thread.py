"""Admission beside the loop: templates and tokenising never hold up a plan.

A megabyte of prompt takes most of a second to tokenise, and everybody's next token would wait
for it. So one thread admits submissions, in the order in which they came, and the loop takes
the results when its poll says that there are any. The tokenizer does its work without the
interpreter's lock.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator

from ember_pp import protocol
from ember_pp.coordinator.request import Request
from ember_pp.errors import EmberError

logger = logging.getLogger(__name__)

Admit = Callable[[bytes, protocol.Submit], Request]


@dataclasses.dataclass(slots=True, eq=False)
class Submission:
    """A client's ``Submit`` on its way to be a request."""

    client: bytes
    submit: protocol.Submit
    num_bytes: int
    """Of its message."""
    is_withdrawn: bool = False
    """Nobody waits for it any more: it need not be admitted."""

    @property
    def request_id(self) -> str:
        """The name that the client gave."""
        return self.submit.request_id


class AdmissionThread:
    """Admits submissions one after the other; ``put`` and ``take`` belong to the loop's thread.

    Args:
        admit: makes the request, or raises why not; called in the new thread alone.
    """

    def __init__(self, admit: Admit) -> None:
        self._admit = admit
        self._waiting: queue.SimpleQueue[Submission | None] = queue.SimpleQueue()
        self._admitted: collections.deque[tuple[Submission, Request | EmberError]]
        self._admitted = collections.deque()
        self._is_closed = False
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable when ``take`` has something."""
        self._thread = threading.Thread(target=self._run, name="admission", daemon=True)
        self._thread.start()

    def put(self, submission: Submission) -> None:
        """Queue a submission; the caller bounds how many wait."""
        self._waiting.put(submission)

    def take(self) -> Iterator[tuple[Submission, Request | EmberError]]:
        """What was admitted or refused since, in the order of ``put``; never waits.

        Of those that were withdrawn, some are left out.
        """
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        while self._admitted:
            yield self._admitted.popleft()

    def close(self, timeout_s: float) -> None:
        """Forget what waits, and join the thread.

        What is being tokenised cannot be interrupted. If it takes longer than ``timeout_s`` the
        thread is left behind; it does not keep the process alive.
        """
        self._is_closed = True
        self._waiting.put(None)
        self._thread.join(timeout_s)
        if not self._thread.is_alive():
            os.close(self.descriptor)

    def _run(self) -> None:
        while (submission := self._waiting.get()) is not None and not self._is_closed:
            if submission.is_withdrawn:
                continue
            self._admitted.append((submission, self._outcome(submission)))
            os.eventfd_write(self.descriptor, 1)

    def _outcome(self, submission: Submission) -> Request | EmberError:
        try:
            return self._admit(submission.client, submission.submit)
        except EmberError as error:
            return error
        except BaseException as bug:  # a panic of the tokenizer is no Exception
            # Whatever one request does to us, the others go on.
            logger.exception("request %r", submission.request_id)
            return EmberError(f"this request made the coordinator fail: {type(bug).__name__}")
