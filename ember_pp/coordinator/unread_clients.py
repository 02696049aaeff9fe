"""Clients that do not read what they are sent, and what they are still to be told."""

from __future__ import annotations

import collections
from collections.abc import Callable

from ember_pp import protocol
from ember_pp.errors import UnavailableError
from ember_pp.sockets import Delivery

Send = Callable[[bytes, protocol.Message], Delivery]


class UnreadClients:
    """What became of requests whose client had no room for the news.

    Such a client is told when it speaks again: its own clock makes it ask for the status when it
    has read all and hears nothing. What is kept of one that never speaks again are the ids of its
    requests, until its connection ends.

    Args:
        send: to a client.
        max_unread: messages that may wait for one client (``coordinator.max_unread_messages``).
    """

    def __init__(self, send: Send, *, max_unread: int) -> None:
        self._send = send
        self._max_unread = max_unread
        self._untold: dict[bytes, collections.deque[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._untold)

    def add(self, client: bytes, request_ids: list[str]) -> None:
        """These requests ended because ``client`` did not read."""
        self._untold.setdefault(client, collections.deque()).extend(request_ids)

    def tell(self, client: bytes) -> None:
        """It spoke: tell it as much as it has room for."""
        error = UnavailableError(
            f"{self._max_unread} messages were not read (coordinator.max_unread_messages)"
        ).to_wire()
        untold = self._untold.get(client, collections.deque())
        while untold and self._send(client, protocol.RequestFailed(untold[0], error)):
            untold.popleft()
        if not untold:
            self._untold.pop(client, None)

    def forget_the_gone(self) -> None:
        """A connection ended: let go of clients that are not there any more."""
        nothing = protocol.TokenDeltas([], [], b"", b"", [])
        for client in list(self._untold):
            if self._send(client, nothing) is Delivery.GONE:
                del self._untold[client]
