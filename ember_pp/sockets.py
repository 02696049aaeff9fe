"""The only file that opens ZeroMQ sockets.

The coordinator binds, everyone else connects in. Every socket here has ``LINGER`` set, never
blocks on send, and belongs to the thread that made it; the exceptions are ``wake`` methods.
Addresses are ``ipc://PATH`` or ``tcp://HOST:PORT``; a host that other machines can reach needs
CURVE keys: every byte is then encrypted, and only clients whose keys are allowed get in.

    RouterSocket        coordinator side: many peers, each with an identity
    DealerSocket        client and stage side: one peer
    AsyncDealerSocket   the same for asyncio
    Heart               stage side: returns heartbeats without running Python
    PrivateDirectory    a 0700 folder for ``ipc://`` sockets that leaves nothing behind
    ServerKeys          what a router with CURVE needs
    ClientKeys          what a dealer with CURVE needs
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import ipaddress
import math
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq
import zmq.asyncio
import zmq.utils.z85

from ember_pp import protocol
from ember_pp.errors import AddressError, ProtocolError

_LINGER_MS = 1000  # long enough for a last message to a live peer, never for ever
_SEND_QUEUE = 100_000  # messages to a stage that wait to be read before it counts as gone
_RECEIVE_QUEUE = 1000  # messages of one peer that wait to be looked at; then it has to wait
_BACKLOG = 4096  # connections that arrive at once
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 10_000, 30_000  # a machine that is gone closes nothing
_RECONNECT_MS, _MAX_RECONNECT_MS = 100, 5_000
_MAX_FAILED_HANDSHAKES = 5  # in a row; one may fail because the coordinator just ends
_ZAP_ADDRESS = "inproc://zeromq.zap.01"
_ZAP_DOMAIN = b"ember-pp"
_MAX_IPC_PATH_BYTES = 107  # sockaddr_un on Linux
_DIRECTORY_PREFIX = "ember-pp-"
# As plain numbers: the library's flags are an enum, whose arithmetic takes as long as a send.
_AT_ONCE = int(zmq.NOBLOCK)
_MORE_FOLLOWS = int(zmq.NOBLOCK | zmq.SNDMORE)


@dataclasses.dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key, both halves in Z85 (40 characters)."""

    public: bytes
    secret: bytes = dataclasses.field(repr=False)

    @classmethod
    def make(cls) -> KeyPair:
        """A new one."""
        return cls(*zmq.curve_keypair())


@dataclasses.dataclass(frozen=True, slots=True)
class ServerKeys:
    """With what a router with CURVE listens."""

    pair: KeyPair
    is_allowed: Callable[[bytes], bool]
    """Whether a client with this public key (Z85) may connect; asked for each connection."""


@dataclasses.dataclass(frozen=True, slots=True)
class ClientKeys:
    """With what a dealer with CURVE connects."""

    pair: KeyPair
    server: bytes
    """Public key of the server."""


class Delivery(enum.Enum):
    """What became of a message that was to be sent; true if it is on its way."""

    SENT = enum.auto()
    UNREAD = enum.auto()
    """The peer is there and does not read: its queue is full."""
    GONE = enum.auto()

    def __bool__(self) -> bool:
        return self is Delivery.SENT


def check_address(address: str, *, has_keys: bool = False) -> None:
    """Refuse an address that cannot or must not be used.

    Raises:
        AddressError: not ``ipc://PATH`` or ``tcp://HOST:PORT``, a path that is too long for a
            Unix socket, or a TCP host that other machines can reach without ``has_keys``.
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
    if not has_keys and can_be_reached_from_elsewhere(address):
        raise AddressError(
            f"coordinator.address: {address!r} can be reached from other machines: it needs CURVE "
            "keys (docs/trust.md); or use ipc://PATH or tcp://127.0.0.1:PORT (and a tunnel)"
        )


def can_be_reached_from_elsewhere(address: str) -> bool:
    """Whether other machines can connect to ``address``."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return address.startswith("tcp://") and not _is_loopback(host)


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


class _Gatekeeper:
    """Says who may connect to the sockets of its context: ZeroMQ asks it (RFC 27) for each client
    that has proved to own its key.

    One context has at most one, so a router with keys has a context of its own.
    """

    def __init__(self, context: Any, is_allowed: Callable[[bytes], bool]) -> None:
        self._is_allowed = is_allowed
        self.socket = _make_socket(context, zmq.ROUTER)
        self.socket.bind(_ZAP_ADDRESS)

    def answer_all(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                self._answer(self.socket.recv_multipart(_AT_ONCE))

    def _answer(self, frames: list[bytes]) -> None:
        # route, "", version, request id, domain, address, identity, mechanism, key
        route, request_id, mechanism, key = frames[0], frames[3], frames[7], frames[8:]
        is_allowed = mechanism == b"CURVE" and self._is_allowed(zmq.utils.z85.encode(key[0]))
        code, text = (b"200", b"OK") if is_allowed else (b"400", b"this key is not allowed")
        self.socket.send_multipart([route, b"", b"1.0", request_id, code, text, b"", b""])


class RouterSocket:
    """A bound socket that talks to many peers, each named by its identity.

    Args:
        address: where to listen.
        max_message_bytes: larger messages end the sender's connection.
        max_unread: messages to one peer that wait to be read by it.
        keys: CURVE keys; None: peers are not asked for any.

    Raises:
        AddressError: the address is malformed, not allowed, taken or cannot be bound.
    """

    def __init__(
        self,
        address: str,
        *,
        max_message_bytes: int,
        max_unread: int = _SEND_QUEUE,
        keys: ServerKeys | None = None,
    ) -> None:
        check_address(address, has_keys=keys is not None)
        _refuse_occupied(address)
        self.address = address
        self._own_context = None if keys is None else zmq.Context()
        context = self._own_context or zmq.Context.instance()
        self._gatekeeper = None if keys is None else _Gatekeeper(context, keys.is_allowed)
        self._socket = _make_socket(context, zmq.ROUTER)
        if keys is not None:
            self._socket.curve_server = True
            self._socket.curve_secretkey = keys.pair.secret
            self._socket.zap_domain = _ZAP_DOMAIN
        self._socket.sndhwm = max_unread
        self._socket.rcvhwm = _RECEIVE_QUEUE
        self._socket.backlog = _BACKLOG
        self._socket.maxmsgsize = max_message_bytes
        self._socket.router_mandatory = True
        _prepare_tcp(self._socket, address)
        self._monitor: Any = None
        self._has_disconnects = False
        self.num_refused = 0
        """Connections that ended before their peer was known, as far as they are watched."""
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self._close_sockets(linger_ms=0)
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error}"
            raise AddressError(f"coordinator.address: {address} {reason}") from None

    def watch_disconnects(self) -> None:
        """From now on ``wait_readable`` notices connections that end, or are refused."""
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | _FAILED_HANDSHAKES)

    def take_disconnects(self) -> bool:
        """Whether ``wait_readable`` saw a connection end since the last call.

        Whose it was, ZeroMQ does not tell; ``send`` to that peer may still work for a moment.
        """
        has_disconnects, self._has_disconnects = self._has_disconnects, False
        return has_disconnects

    def _drain_monitor(self) -> None:
        for event in _take_events(self._monitor):
            self._has_disconnects |= event == zmq.EVENT_DISCONNECTED
            self.num_refused += bool(event & _FAILED_HANDSHAKES)

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

    def send(self, identity: bytes, message: protocol.Message | bytes) -> Delivery:
        """Send to one peer; false when it is gone or does not read what it was sent.

        ``message`` may be encoded already, to send the same to several peers.
        """
        packed = message if isinstance(message, bytes) else protocol.encode(message)
        try:
            self._socket.send(identity, _MORE_FOLLOWS)
            self._socket.send(packed, _AT_ONCE)
        except zmq.ZMQError as error:
            if error.errno == errno.EAGAIN:
                return Delivery.UNREAD
            if error.errno == errno.EHOSTUNREACH:
                return Delivery.GONE
            raise
        return Delivery.SENT

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Stop listening; what is queued goes out within ``linger_ms``."""
        if self._monitor is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
        self._close_sockets(linger_ms=linger_ms)
        if self.address.startswith("ipc://"):
            with contextlib.suppress(OSError):
                os.unlink(self.address.removeprefix("ipc://"))

    def _close_sockets(self, *, linger_ms: int) -> None:
        self._socket.close(linger=linger_ms)
        if self._gatekeeper is not None:
            self._gatekeeper.socket.close(linger=0)
        if self._own_context is not None:
            self._own_context.term()


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
        if router._gatekeeper is not None:
            poller.register(router._gatekeeper.socket, zmq.POLLIN)
    wanted = set(file_descriptors)
    for descriptor in wanted:
        poller.register(descriptor, zmq.POLLIN)
    timeout_ms = None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))
    ready = {item for item, _ in poller.poll(timeout_ms)}
    for router in routers:
        if router._monitor in ready:
            router._drain_monitor()
        if router._gatekeeper is not None and router._gatekeeper.socket in ready:
            router._gatekeeper.answer_all()
    return wanted & ready


class DealerSocket:
    """A connected socket with one peer: the coordinator.

    Args:
        address: where the coordinator listens (or will soon).
        identity: how the coordinator names this peer; random when empty.
        keys: CURVE keys; None: the coordinator does not ask for any.

    Raises:
        AddressError: the address is malformed or not allowed.
    """

    def __init__(
        self, address: str, *, identity: bytes = b"", keys: ClientKeys | None = None
    ) -> None:
        check_address(address, has_keys=keys is not None)
        self.address = address
        self._socket = _connect_dealer(zmq.Context.instance(), address, identity, keys)
        self._watch = None if keys is None else _HandshakeWatch(self._socket, address)
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
            AddressError: the coordinator does not accept our key, or has another one.
        """
        packed = self._receive_now()
        if self._watch is not None:
            self._watch.check(_take_events(self._watch.monitor), has_message=packed is not None)
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
        if self._watch is not None:
            self._watch.close()
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
        dealer = _connect_dealer(self._context, address, heart_of(identity), keys=None)
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

    def __init__(self, address: str, *, keys: ClientKeys | None = None) -> None:
        check_address(address, has_keys=keys is not None)
        self.address = address
        self._context = zmq.asyncio.Context()
        self._socket = _connect_dealer(self._context, address, b"", keys)
        self._watch = None if keys is None else _HandshakeWatch(self._socket, address)

    async def send(self, message: protocol.Message) -> None:
        """Queue a message; it goes out when the peer is there."""
        await self._socket.send(protocol.encode(message))

    async def receive(self, timeout_s: float) -> protocol.Message | None:
        """The next message, or None when the time is over; raises as ``DealerSocket.receive``."""
        if not await self._socket.poll(max(0, round(timeout_s * 1000))):
            while self._watch is not None and await self._watch.monitor.poll(0):
                self._watch.check([_event_of(await self._watch.monitor.recv_multipart())])
            return None
        if self._watch is not None:
            self._watch.check([], has_message=True)
        return protocol.decode(await self._socket.recv())

    def close(self, *, linger_ms: int = _LINGER_MS) -> None:
        """Close; what is queued goes out within ``linger_ms``."""
        if self._watch is not None:
            self._watch.close()
        self._socket.close(linger=linger_ms)
        self._context.term()


_AUTH_FAILED = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
_FAILED_HANDSHAKES = (
    _AUTH_FAILED
    | int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL)
    | int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
)


def _take_events(monitor: Any) -> list[int]:
    """The events that a monitor has, without waiting."""
    events: list[int] = []
    with contextlib.suppress(zmq.Again):
        while True:
            events.append(_event_of(monitor.recv_multipart(_AT_ONCE)))
    return events


def _event_of(frames: list[bytes]) -> int:
    return int.from_bytes(frames[0][:2], sys.byteorder)


class _HandshakeWatch:
    """Says why a dealer with keys does not get through; without it, it would only hear nothing."""

    def __init__(self, dealer: Any, address: str) -> None:
        self.monitor = dealer.get_monitor_socket(_FAILED_HANDSHAKES)
        self._dealer = dealer
        self._address = address
        self._num_failed = 0

    def check(self, events: Iterable[int], *, has_message: bool = False) -> None:
        """Raise ``AddressError`` if the coordinator refuses us; a message says that it does not."""
        if has_message:
            self._num_failed = 0
            return
        for event in events:
            self._num_failed += 1
            if event == _AUTH_FAILED:
                raise AddressError(
                    f"coordinator.address: the coordinator at {self._address} does not accept this "
                    "key; there, job=keys job.allow=[FILE] with a copy of our client.key lets it in"
                )
        if self._num_failed >= _MAX_FAILED_HANDSHAKES:
            raise AddressError(
                f"coordinator.address: {self._address} answers, but not with the key in server.key "
                "(coordinator.keys); copy the file of the coordinator that runs there"
            )

    def close(self) -> None:
        self._dealer.disable_monitor()
        self.monitor.close(linger=0)


def _make_socket(context: Any, kind: int) -> Any:  # Any: pyzmq's option attributes are dynamic
    new_socket = context.socket(kind)
    new_socket.linger = _LINGER_MS
    return new_socket


def _connect_dealer(context: Any, address: str, identity: bytes, keys: ClientKeys | None) -> Any:
    dealer = _make_socket(context, zmq.DEALER)
    dealer.sndhwm = 0  # a client bounds itself by its open requests, a stage by plans in flight
    dealer.rcvhwm = 0
    if identity:
        dealer.identity = identity
    if keys is not None:
        dealer.curve_serverkey = keys.server
        dealer.curve_publickey = keys.pair.public
        dealer.curve_secretkey = keys.pair.secret
        dealer.reconnect_ivl, dealer.reconnect_ivl_max = _RECONNECT_MS, _MAX_RECONNECT_MS
    _prepare_tcp(dealer, address)
    dealer.connect(address)
    return dealer


def _prepare_tcp(new_socket: Any, address: str) -> None:
    if address.startswith("tcp://"):
        new_socket.ipv6 = "[" in address
        new_socket.heartbeat_ivl = _HEARTBEAT_MS
        new_socket.heartbeat_timeout = _HEARTBEAT_TIMEOUT_MS


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
