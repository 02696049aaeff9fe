"""``Client`` and ``AsyncClient``: talk to a coordinator.

    with Client("ipc:///run/user/1000/ember.sock") as client:
        print(client.generate("The capital of France is", sampling={"max_tokens": 8}).text)
        for delta in client.stream("Once upon a time"):
            print(delta.text, end="", flush=True)

Every wait has a deadline: a coordinator that has said nothing for ``timeout_s`` is asked for
its status, and if it does not answer that either, ``DeadlineExceededError`` names it. Errors
of the coordinator come back as the classes of ``ember_pp.errors``.

Both clients share ``ClientSession``, which knows the protocol and no sockets. A client belongs to
one thread (or one event loop); make one per thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ember_pp import protocol
from ember_pp.client_session import (
    ClientSession,
    Completion,
    Delta,
    Messages,
    RequestState,
    Sampling,
)
from ember_pp.errors import DeadlineExceededError, EmberError, UnavailableError
from ember_pp.sockets import AsyncDealerSocket, ClientKeys, DealerSocket

__all__ = ["AsyncClient", "AsyncRequest", "Client", "Completion", "Delta", "Request"]

DEFAULT_TIMEOUT_S = 30.0
_POLL_S = 0.1  # how often a wait looks at its liveness check


class Request:
    """A submitted request of a ``Client``; iterate it to stream, or ask for its ``result``."""

    def __init__(self, client: Client, state: RequestState) -> None:
        self._client = client
        self._state = state

    @property
    def request_id(self) -> str:
        """Name of the request at the coordinator."""
        return self._state.request_id

    def result(self, timeout_s: float | None = None) -> Completion:
        """The whole answer; waits for it, at most ``timeout_s`` where given.

        Raises:
            DeadlineExceededError: the time is over, or the coordinator does not answer.
            EmberError: what the request failed with.
        """
        self._client._wait_until(
            lambda: self._state.has_ended, timeout_s, f"request {self.request_id}"
        )
        self._client._session.forget(self)
        return self._state.outcome()

    def __iter__(self) -> Iterator[Delta]:
        """Parts of the answer as they come; raises as ``result`` does."""
        while True:
            self._client._wait_until(
                lambda: bool(self._state.deltas) or self._state.has_ended,
                None,
                f"request {self.request_id}",
            )
            while self._state.deltas:
                yield self._state.deltas.popleft()
            if self._state.has_ended:
                self._client._session.forget(self)
                self._state.outcome()
                return

    def cancel(self) -> None:
        """End the request; its ``finish_reason`` is then ``abort``."""
        self._client.cancel([self.request_id])


class Client:
    """A connection to a coordinator, for one thread.

    Args:
        address: ``ipc://PATH`` or ``tcp://HOST:PORT``.
        timeout_s: silence after which the coordinator counts as gone.
        check_alive: called often while waiting; may raise to end the wait.
        keys: CURVE keys for an address that other machines can reach
            (``ember_pp.key_files.KeyFolder.client_keys``).

    Raises:
        AddressError: the address is malformed or not allowed.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        check_alive: Callable[[], None] | None = None,
        keys: ClientKeys | None = None,
    ) -> None:
        self._socket = DealerSocket(address, keys=keys)
        self._session: ClientSession[Request] = ClientSession(address, timeout_s)
        self._check_alive = check_alive

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what is open and disconnect."""
        open_ids = list(self._session.open)
        if open_ids:
            self._socket.send(protocol.Cancel(open_ids, everyone=False))
        self._socket.close()

    def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Sampling = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stream: bool = False,
        request_id: str | None = None,
        seed_key: str | None = None,
    ) -> Request:
        """Send a request and return at once.

        Args:
            prompt: text to continue; or
            messages: a chat, maps with ``role`` and ``content``; or
            token_ids: a prompt as token ids. Exactly one of the three.
            sampling: fields of ``SamplingParams``; what is not said takes the defaults of the
                checkpoint and of the coordinator.
            template_kwargs: names for the chat template, e.g. ``{"enable_thinking": False}``.
            stream: send the answer in parts as it is made.
            request_id: name for the request; made up when None.
            seed_key: requests without ``seed`` but with the same key draw the same tokens.

        Refusals arrive through ``Request.result``.
        """
        submit = self._session.submit(
            prompt,
            messages=messages,
            token_ids=token_ids,
            sampling=sampling,
            template_kwargs=template_kwargs,
            stream=stream,
            request_id=request_id,
            seed_key=seed_key,
        )
        state = RequestState(submit.request_id)
        request = Request(self, state)
        self._session.add(state, request)
        self._socket.send(submit)
        return request

    def generate(self, prompt: str | None = None, **options: Any) -> Completion:
        """Submit and wait for the whole answer; options as in ``submit``."""
        return self.submit(prompt, **options).result()

    def chat(self, messages: Messages, **options: Any) -> Completion:
        """Submit chat messages and wait for the answer; options as in ``submit``."""
        return self.submit(messages=messages, **options).result()

    def stream(self, prompt: str | None = None, **options: Any) -> Iterator[Delta]:
        """Submit and yield the answer in parts; leaving the loop early cancels the request."""
        request = self.submit(prompt, stream=True, **options)
        try:
            yield from request
        finally:
            if not request._state.has_ended:
                request.cancel()
            self._session.forget(request)

    def wait_any(self, timeout_s: float | None = None) -> list[Request]:
        """Requests that ended, well or not, since the last call; waits for the first of them.

        Returns an empty list when ``timeout_s`` is over or nothing is open.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._session.ended and self._session.open:
            remaining_s = _remaining(deadline_s)
            if remaining_s <= 0:
                break
            self._pump(remaining_s)
        self._pump(0.0)
        ended = list(self._session.ended)
        self._session.ended.clear()
        return ended

    def cancel(self, request_ids: Sequence[str] = (), *, everyone: bool = False) -> int:
        """End requests of this client, or with ``everyone`` any client's (no ids: all).

        Returns:
            How many were ended.
        """
        self._socket.send(protocol.Cancel(list(request_ids), everyone))
        ticket = self._session.ask_cancel()
        timeout_s = self._session.timeout_s
        self._wait_until(
            lambda: ticket.num_cancelled is not None, timeout_s, "the answer to cancel"
        )
        return ticket.num_cancelled or 0

    def status(self) -> dict[str, Any]:
        """State of the coordinator and its stages; keys as in ``docs/protocol.md``."""
        self._session.status = None
        self._socket.send(self._session.ask_status())
        timeout_s = self._session.timeout_s
        self._wait_until(
            lambda: self._session.status is not None,
            timeout_s,
            self._session.whereabouts,
        )
        return self._session.status or {}

    def _wait_until(
        self, is_done: Callable[[], bool], timeout_s: float | None, awaited: str
    ) -> None:
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not is_done():
            remaining_s = _remaining(deadline_s)
            if remaining_s <= 0:
                raise DeadlineExceededError(f"{awaited}: nothing came within {timeout_s:g} s")
            self._pump(remaining_s)

    def _pump(self, timeout_s: float) -> None:
        """Take what has come; if nothing has, wait a little and look at the coordinator."""
        message = self._socket.receive(min(timeout_s, _POLL_S))
        if message is None:
            if self._check_alive is not None:
                self._check_alive()
            if self._session.open and self._session.needs_sign_of_life():
                self._socket.send(self._session.ask_status())
            return
        while message is not None:
            self._session.handle(message)
            message = self._socket.receive(0.0)


class AsyncRequest:
    """A submitted request of an ``AsyncClient``; ``async for`` streams it."""

    def __init__(self, client: AsyncClient, state: RequestState) -> None:
        self._client = client
        self._state = state

    @property
    def request_id(self) -> str:
        """Name of the request at the coordinator."""
        return self._state.request_id

    async def result(self, timeout_s: float | None = None) -> Completion:
        """The whole answer; raises as ``Request.result`` does."""
        await self._client._wait_until(
            lambda: self._state.has_ended, timeout_s, f"request {self.request_id}"
        )
        return self._state.outcome()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Parts of the answer as they come."""
        while True:
            await self._client._wait_until(
                lambda: bool(self._state.deltas) or self._state.has_ended,
                None,
                f"request {self.request_id}",
            )
            while self._state.deltas:
                yield self._state.deltas.popleft()
            if self._state.has_ended:
                self._state.outcome()
                return

    async def cancel(self) -> None:
        """End the request; its ``finish_reason`` is then ``abort``."""
        await self._client.cancel([self.request_id])


class AsyncClient:
    """A connection to a coordinator for asyncio; tasks of one event loop may share it.

    Use it as ``async with AsyncClient(address) as client``. Arguments, errors and meaning are
    those of ``Client``.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        keys: ClientKeys | None = None,
    ) -> None:
        self._socket = AsyncDealerSocket(address, keys=keys)
        self._session: ClientSession[AsyncRequest] = ClientSession(address, timeout_s)
        self._news = asyncio.Condition()
        self._failure: EmberError | None = None
        self._receiver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> AsyncClient:
        self._receiver = asyncio.create_task(self._receive_all())
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is open and disconnect; who still waits for an answer gets an error."""
        self._failure = self._failure or UnavailableError("the client was closed")
        async with self._news:
            self._news.notify_all()
        if self._receiver is not None:
            self._receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._receiver
        open_ids = list(self._session.open)
        if open_ids:
            await self._socket.send(protocol.Cancel(open_ids, everyone=False))
        self._socket.close()

    async def submit(self, prompt: str | None = None, **options: Any) -> AsyncRequest:
        """Send a request and return at once; options as in ``Client.submit``."""
        if self._receiver is None:
            raise UnavailableError("use it as: async with AsyncClient(address) as client")
        submit = self._session.submit(prompt, **options)
        state = RequestState(submit.request_id)
        request = AsyncRequest(self, state)
        self._session.add(state, request)
        await self._socket.send(submit)
        return request

    async def generate(self, prompt: str | None = None, **options: Any) -> Completion:
        """Submit and wait for the whole answer."""
        return await (await self.submit(prompt, **options)).result()

    async def chat(self, messages: Messages, **options: Any) -> Completion:
        """Submit chat messages and wait for the answer."""
        return await (await self.submit(messages=messages, **options)).result()

    async def stream(self, prompt: str | None = None, **options: Any) -> AsyncIterator[Delta]:
        """Submit and yield the answer in parts; leaving the loop early cancels the request."""
        request = await self.submit(prompt, stream=True, **options)
        try:
            async for delta in request:
                yield delta
        finally:
            if not request._state.has_ended:
                await request.cancel()

    async def cancel(self, request_ids: Sequence[str] = (), *, everyone: bool = False) -> int:
        """End requests of this client, or with ``everyone`` any client's (no ids: all)."""
        ticket = self._session.ask_cancel()  # before the first await, as the answers will come
        await self._socket.send(protocol.Cancel(list(request_ids), everyone))
        await self._wait_until(
            lambda: ticket.num_cancelled is not None,
            self._session.timeout_s,
            "the answer to cancel",
        )
        return ticket.num_cancelled or 0

    async def status(self) -> dict[str, Any]:
        """State of the coordinator and its stages; keys as in ``docs/protocol.md``."""
        self._session.status = None
        await self._socket.send(self._session.ask_status())
        await self._wait_until(
            lambda: self._session.status is not None,
            self._session.timeout_s,
            self._session.whereabouts,
        )
        return self._session.status or {}

    async def _wait_until(
        self, is_done: Callable[[], bool], timeout_s: float | None, awaited: str
    ) -> None:
        def is_over() -> bool:
            return self._failure is not None or is_done()

        try:
            async with asyncio.timeout(timeout_s), self._news:
                await self._news.wait_for(is_over)
        except TimeoutError:
            raise DeadlineExceededError(f"{awaited}: nothing came within {timeout_s:g} s") from None
        if self._failure is not None and not is_done():
            raise self._failure

    async def _receive_all(self) -> None:
        """The one task that reads the socket; it wakes everyone who waits for news."""
        while self._failure is None:
            try:
                message = await self._socket.receive(1.0)
                if message is not None:
                    self._session.handle(message)
                elif self._session.open and self._session.needs_sign_of_life():
                    await self._socket.send(self._session.ask_status())
            except EmberError as error:
                self._failure = error
            self._session.ended.clear()
            async with self._news:
                self._news.notify_all()


def _remaining(deadline_s: float | None) -> float:
    return _POLL_S if deadline_s is None else deadline_s - time.monotonic()
