"""What clients wait for: submissions that are being admitted, and requests; and their bounds."""

from __future__ import annotations

from collections.abc import Iterator

from ember_pp.coordinator.admission_thread import Submission
from ember_pp.coordinator.request import Request
from ember_pp.errors import InvalidRequestError, UnavailableError


class OpenRequests:
    """All that is open, by id. A submission becomes a request, and both end in ``close``.

    Args:
        max_requests: how many may be open at once.
        max_bytes: how large their messages may be, all together.
    """

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self.requests: dict[str, Request] = {}
        """Those that were admitted."""
        self._submissions: dict[str, Submission] = {}
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[Request | Submission]:
        yield from list(self.requests.values())
        yield from list(self._submissions.values())

    def of_client(self, client: bytes) -> list[Request | Submission]:
        """Those that ``client`` waits for."""
        return [request for request in self if request.client == client]

    def clients(self) -> set[bytes]:
        """Who waits for something."""
        return {request.client for request in self}

    def find(self, request_id: str) -> Request | Submission | None:
        """The one with this id, if it is open."""
        return self.requests.get(request_id) or self._submissions.get(request_id)

    def add(self, submission: Submission) -> None:
        """Take in what a client submitted.

        Raises:
            InvalidRequestError: its id is empty, or open already.
            UnavailableError: a bound is reached; names the setting.
        """
        request_id = submission.request_id
        if request_id in self._sizes or not request_id:
            raise InvalidRequestError(f"request_id: {request_id!r} is empty or open")
        if len(self._sizes) >= self._max_requests:
            raise UnavailableError(
                f"{self._max_requests} requests are open (coordinator.max_queued_requests)"
            )
        if self._num_bytes + submission.num_bytes > self._max_bytes:
            raise UnavailableError(
                f"the open requests have {self._num_bytes} bytes, of {self._max_bytes} at most "
                "(coordinator.max_queued_bytes)"
            )
        self._submissions[request_id] = submission
        self._sizes[request_id] = submission.num_bytes
        self._num_bytes += submission.num_bytes

    def admit(self, submission: Submission, request: Request) -> None:
        """The request that ``submission`` has become."""
        del self._submissions[submission.request_id]
        self.requests[submission.request_id] = request

    def close(self, request: Request | Submission) -> bool:
        """It has ended or is given up; False if it had before."""
        if self.find(request.request_id) is not request:
            return False
        if isinstance(request, Submission):
            request.is_withdrawn = True
            del self._submissions[request.request_id]
        else:
            del self.requests[request.request_id]
        self._num_bytes -= self._sizes.pop(request.request_id)
        return True
