"""The only file that opens ZeroMQ sockets.

The coordinator binds, everyone else connects in. Every socket here has ``LINGER`` set, never
blocks on send, and belongs to the thread that made it; the exceptions are ``wake`` methods.
Addresses are ``ipc://PATH`` or ``tcp://HOST:PORT`` with a loopback host.

    RouterSocket        coordinator side: many peers, each with an identity
    DealerSocket        client and stage side: one peer
    AsyncDealerSocket   the same for asyncio
    Heart               stage side: returns heartbeats without running Python
    PrivateDirectory    a 0700 folder for ``ipc://`` sockets that leaves nothing behind
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import math
import os
import re
import shutil
import socket
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio

from ember_pp import protocol
from ember_pp.errors import AddressError, ProtocolError

_LINGER_MS = 1000  # long enough for a last message to a live peer, never for ever
_SEND_QUEUE = 100_000  # messages queued to one peer before it counts as gone
_MAX_IPC_PATH_BYTES = 107  # sockaddr_un on Linux
_DIRECTORY_PREFIX = "ember-pp-"
# As plain numbers: the library's flags are an enum, whose arithmetic takes as long as a send.
_AT_ONCE = int(zmq.NOBLOCK)
_MORE_FOLLOWS = int(zmq.NOBLOCK | zmq.SNDMORE)


def check_address(address: str) -> None:
    """Refuse an address that cannot or must not be used.

    Raises:
        AddressError: not ``ipc://PATH`` or ``tcp://HOST:PORT``, a path that is too long for a
            Unix socket, or a TCP host that other machines can reach.
    """
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        if not path or len(os.fsencode(path)) > _MAX_IPC_PATH_BYTES:
            raise AddressError(
                f"coordinator.address: {address!r}: a Unix socket path has 1 to "
                f"{_MAX_IPC_PATH_BYTES} bytes; choose a shorter folder"
            )
        return
    match = re.fullmatch(r"tcp://(\[[^\]]+\]|[^:/]+):(\d{1,5})", address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise AddressError(
            f"coordinator.address: expected ipc://PATH or tcp://HOST:PORT, got {address!r}"
        )
    if not _is_loopback(match[1].strip("[]")):
        raise AddressError(
            f"coordinator.address: {address!r} can be reached from other machines, and this "
            "version has no encryption; use ipc://PATH or tcp://127.0.0.1:PORT (and a tunnel)"
        )


def default_address() -> str:
    """Where ``job=serve`` listens and ``job=status`` asks when no address is given.

    The socket lies in a folder of this user, mode 0700, the same for each run.

    Raises:
        AddressError: the folder belongs to somebody else.
    """
    folder = Path(tempfile.gettempdir()) / f"{_DIRECTORY_PREFIX}user-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) != 0o700:
        raise AddressError(
            f"{folder} is not a private folder of this user; remove it or give "
            "coordinator.address=ipc://PATH"
        )
    return f"ipc://{folder / 'coordinator.sock'}"


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_occupied(address: str) -> None:
    # libzmq unlinks a socket file that another process listens on and binds anew: the other
    # coordinator would go deaf without a word. So ask first.
    path = address.removeprefix("ipc://")
    if not address.startswith("ipc://") or not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise AddressError(f"coordinator.address: {path} is a file, no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return  # left by a process that is gone
        except OSError as error:
            raise AddressError(
                f"coordinator.address: {address}: {error.strerror}; choose another path"
            ) from None
    raise AddressError(f"coordinator.address: {address} is in use by another coordinator")


class RouterSocket:
    """A bound socket that talks to many peers, each named by its identity.

    Args:
        address: where to listen.
        max_message_bytes: larger messages end the sender's connection.

    Raises:
        AddressError: the address is malformed, not allowed, taken or cannot be bound.
    """

    def __init__(self, address: str, *, max_message_bytes: int) -> None:
        check_address(address)
        _refuse_occupied(address)
        self.address = address
        self._socket = _make_socket(zmq.Context.instance(), zmq.ROUTER)
        self._socket.sndhwm = _SEND_QUEUE
        self._socket.rcvhwm = _SEND_QUEUE
        self._socket.maxmsgsize = max_message_bytes
        self._socket.router_mandatory = True
        self._monitor: Any = None
        self._has_disconnects = False
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._socket.close(linger=0)
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
            raise AddressError(f"coordinator.address: {address} {reason}") from None

    def watch_disconnects(self) -> None:
        """From now on ``wait_readable`` notices connections that end."""
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)

    def take_disconnects(self) -> bool:
        """Whether ``wait_readable`` saw a connection end since the last call.

        Whose it was, ZeroMQ does not tell; ``send`` to that peer may still work for a moment.
        """
        has_disconnects, self._has_disconnects = self._has_disconnects, False
        return has_disconnects

    def _drain_monitor(self) -> None:
        self._has_disconnects = True
        with contextlib.suppress(zmq.Again):
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)

    def receive_all(
        self, max_messages: int = 1000
    ) -> Iterator[tuple[bytes, protocol.Message | ProtocolError]]:
        """What has arrived, without waiting: identity, and the message or why it is none."""
        for identity, message, _ in self.receive_sized(max_messages):
            yield identity, message

    def receive_sized(
        self, max_messages: int
    ) -> Iterator[tuple[bytes, protocol.Message | ProtocolError, int]]:
        """As ``receive_all``, and the bytes of each message."""
        for _ in range(max_messages):
            try:
                frames = self._socket.recv_multipart(_AT_ONCE)
            except zmq.Again:
                return
            identity, payload = frames[0], frames[-1]
            if len(frames) != 2:
                error = ProtocolError(f"expected one frame, got {len(frames) - 1}")
                yield identity, error, len(payload)
                continue
            try:
                yield identity, protocol.decode(payload), len(payload)
            except ProtocolError as error:
                yield identity, error, len(payload)

    def send(self, identity: bytes, message: protocol.Message | bytes) -> bool:
        """Send to one peer; False when it is gone or does not read what it was sent.

        ``message`` may be encoded already, to send the same to several peers.
        """
        packed = message if isinstance(message, bytes) else protocol.encode(message)
        try:
            self._socket.send(identity, _MORE_FOLLOWS)
            self._socket.send(packed, _AT_ONCE)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Stop listening; what is queued goes out within ``linger_ms``."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._socket.close(linger=linger_ms)
        if self.address.startswith("ipc://"):
            with contextlib.suppress(OSError):
                os.unlink(self.address.removeprefix("ipc://"))


def wait_readable(
    routers: Sequence[RouterSocket], file_descriptors: Iterable[int], timeout_s: float | None
) -> set[int]:
    """Sleep until a router has a message or a descriptor is readable, or the time is over.

    Returns:
        The descriptors that are readable; routers are simply asked with ``receive_all``.
    """
    poller = zmq.Poller()
    for router in routers:
        poller.register(router._socket, zmq.POLLIN)
        if router._monitor is not None:
            poller.register(router._monitor, zmq.POLLIN)
    wanted = set(file_descriptors)
    for descriptor in wanted:
        poller.register(descriptor, zmq.POLLIN)
    timeout_ms = None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))
    ready = {item for item, _ in poller.poll(timeout_ms)}
    for router in routers:
        if router._monitor in ready:
            router._drain_monitor()
    return wanted & ready


class DealerSocket:
    """A connected socket with one peer: the coordinator.

    Args:
        address: where the coordinator listens (or will soon).
        identity: how the coordinator names this peer; random when empty.
    """

    def __init__(self, address: str, *, identity: bytes = b"") -> None:
        check_address(address)
        self.address = address
        self._socket = _connect_dealer(zmq.Context.instance(), address, identity)
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_reader, zmq.POLLIN)

    def send(self, message: protocol.Message) -> None:
        """Queue a message; it goes out when the peer is there."""
        self._socket.send(protocol.encode(message), zmq.NOBLOCK)

    def receive(self, timeout_s: float | None) -> protocol.Message | None:
        """The next message, or None when the time is over or ``wake`` was called.

        Raises:
            ProtocolError: what came is no message.
        """
        packed = self._receive_now()
        if packed is None:
            self._poller.poll(None if timeout_s is None else max(0, round(timeout_s * 1000)))
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
            packed = self._receive_now()
        return None if packed is None else protocol.decode(packed)

    def _receive_now(self) -> bytes | None:
        try:
            packed: bytes = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return packed

    def wake(self) -> None:
        """End the current or next ``receive`` early; may be called from any thread."""
        with contextlib.suppress(BlockingIOError):  # full: it will wake anyway
            os.write(self._wake_writer, b"\0")

    def flush(self) -> None:
        """Close, and wait until what was sent is with the peer; the last call of a process."""
        self.close()
        zmq.Context.instance().term()

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Close; what is queued goes out within ``linger_ms``."""
        if self._socket.closed:
            return
        self._socket.close(linger=linger_ms)
        os.close(self._wake_reader)
        os.close(self._wake_writer)


def heart_of(identity: bytes) -> bytes:
    """Identity of the ``Heart`` of the process whose other socket has ``identity``."""
    return b"heart-" + identity


class Heart:
    """Sends back to the coordinator whatever it sends here, for as long as the process runs.

    A thread that stays inside libzmq does it, with an I/O thread of its own: it needs neither
    the interpreter's lock nor anything that the other threads hold. So what comes back says
    that the process is there and gets time to run, and no more than that.

    Args:
        address: where the coordinator listens.
        identity: of the process's other socket; the coordinator names this one ``heart_of`` it.
    """

    def __init__(self, address: str, *, identity: bytes) -> None:
        check_address(address)
        self._context = zmq.Context()
        dealer = _connect_dealer(self._context, address, heart_of(identity))
        self._thread = threading.Thread(target=_echo, args=(dealer,), name="heart", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._context.term()
        self._thread.join()


def _echo(dealer: Any) -> None:
    with contextlib.suppress(zmq.ContextTerminated):
        zmq.proxy(dealer, dealer)
    dealer.close(linger=0)


class AsyncDealerSocket:
    """``DealerSocket`` for asyncio; belongs to the event loop that runs when it is made."""

    def __init__(self, address: str) -> None:
        check_address(address)
        self.address = address
        self._context = zmq.asyncio.Context()
        self._socket = _connect_dealer(self._context, address, b"")

    async def send(self, message: protocol.Message) -> None:
        """Queue a message; it goes out when the peer is there."""
        await self._socket.send(protocol.encode(message))

    async def receive(self, timeout_s: float) -> protocol.Message | None:
        """The next message, or None when the time is over."""
        if not await self._socket.poll(max(0, round(timeout_s * 1000))):
            return None
        return protocol.decode(await self._socket.recv())

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Close; what is queued goes out within ``linger_ms``."""
        self._socket.close(linger=linger_ms)
        self._context.term()


def _make_socket(context: Any, kind: int) -> Any:  # Any: pyzmq's option attributes are dynamic
    new_socket = context.socket(kind)
    new_socket.linger = _LINGER_MS
    return new_socket


def _connect_dealer(context: Any, address: str, identity: bytes) -> Any:
    dealer = _make_socket(context, zmq.DEALER)
    dealer.sndhwm = 0  # a client bounds itself by its open requests, a stage by plans in flight
    dealer.rcvhwm = 0
    if identity:
        dealer.identity = identity
    dealer.connect(address)
    return dealer


class PrivateDirectory:
    """A folder with mode 0700 for ``ipc://`` sockets, removed on exit.

    Its name carries the pid of its owner, so that the folders of processes that were killed
    are swept when the next one is made.
    """

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        _sweep_stale(parent)
        self.path = Path(tempfile.mkdtemp(prefix=f"{_DIRECTORY_PREFIX}{os.getpid()}-", dir=parent))

    def address(self, name: str) -> str:
        """``ipc://`` address of a socket in this folder."""
        return f"ipc://{self.path / name}"

    def __enter__(self) -> PrivateDirectory:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep_stale(parent: Path) -> None:
    for folder in parent.glob(f"{_DIRECTORY_PREFIX}*-*"):
        pid = folder.name.removeprefix(_DIRECTORY_PREFIX).partition("-")[0]
        if not pid.isdecimal():
            continue
        with contextlib.suppress(OSError):
            is_mine = folder.stat().st_uid == os.getuid()
            if is_mine and not os.path.exists(f"/proc/{pid}"):
                shutil.rmtree(folder, ignore_errors=True)
