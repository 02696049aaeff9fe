"""sockets: addresses are checked, peers that are gone are noticed, nothing is left behind."""

import asyncio
import dataclasses
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
import zmq

from ember_pp import protocol
from ember_pp.client import AsyncClient, Client
from ember_pp.errors import AddressError, ProtocolError
from ember_pp.sockets import (
    ClientKeys,
    DealerSocket,
    Delivery,
    Heart,
    KeyPair,
    PrivateDirectory,
    RouterSocket,
    ServerKeys,
    can_be_reached_from_elsewhere,
    check_address,
    default_address,
    heart_of,
    wait_readable,
)

MAX_BYTES = 1 << 20


@pytest.fixture
def directory():
    with PrivateDirectory() as directory:
        yield directory


@pytest.fixture
def router(directory):
    router = RouterSocket(directory.address("r"), max_message_bytes=MAX_BYTES)
    yield router
    router.close(linger_ms=0)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://x", "expected ipc://PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1", "expected ipc://PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1:0", "expected ipc://PATH or tcp://HOST:PORT"),
        ("tcp://127.0.0.1:70000", "expected ipc://PATH or tcp://HOST:PORT"),
        ("tcp://*:5600", "can be reached from other machines: it needs CURVE"),
        ("tcp://0.0.0.0:5600", "can be reached from other machines"),
        ("tcp://example.org:5600", "can be reached from other machines"),
        ("ipc://", "1 to 107 bytes"),
        ("ipc://" + "x" * 108, "1 to 107 bytes"),
    ],
)
def test_bad_addresses_are_refused_by_name(address, message):
    with pytest.raises(AddressError, match=message):
        check_address(address)


@pytest.mark.parametrize(
    "address", ["ipc:///tmp/x", "tcp://127.0.0.1:5600", "tcp://localhost:1", "tcp://[::1]:5600"]
)
def test_good_addresses_pass(address):
    check_address(address)


@pytest.mark.parametrize("address", ["tcp://*:5600", "tcp://0.0.0.0:5600", "tcp://example.org:1"])
def test_with_keys_other_machines_may_reach_it(address):
    assert can_be_reached_from_elsewhere(address)
    check_address(address, has_keys=True)


def test_messages_go_both_ways(router):
    dealer = DealerSocket(router.address, identity=b"peer")
    dealer.send(protocol.Status())
    wait_readable([router], [], 5.0)
    assert list(router.receive_all()) == [(b"peer", protocol.Status())]
    assert router.send(b"peer", protocol.CancelReply(3))
    assert dealer.receive(5.0) == protocol.CancelReply(3)
    dealer.close()


def test_bytes_that_are_no_message_arrive_as_an_error(router):
    dealer = DealerSocket(router.address, identity=b"peer")
    dealer._socket.send(b"\xc1 nonsense")
    wait_readable([router], [], 5.0)
    ((identity, message),) = router.receive_all()
    assert identity == b"peer"
    assert isinstance(message, ProtocolError)
    dealer.close()


def test_sending_to_nobody_says_so(router):
    assert router.send(b"nobody", protocol.Status()) is Delivery.GONE
    assert not router.send(b"nobody", protocol.Status())


def test_a_peer_that_does_not_read_is_not_taken_for_gone(directory):
    router = RouterSocket(directory.address("unread"), max_message_bytes=MAX_BYTES, max_unread=5)
    peer = zmq.Context.instance().socket(zmq.DEALER)
    peer.rcvhwm, peer.identity = 1, b"peer"
    peer.connect(router.address)
    peer.send(protocol.encode(protocol.Status()))
    wait_readable([router], [], 5.0)
    assert len(list(router.receive_all())) == 1
    filler = protocol.StatusReply({"x": "y" * 100_000}, [])
    num_sent = 0
    while router.send(b"peer", filler) is Delivery.SENT:
        num_sent += 1
        assert num_sent < 1000
        time.sleep(0.01)
    assert router.send(b"peer", filler) is Delivery.UNREAD
    for _ in range(num_sent):
        assert peer.poll(5000)
        peer.recv()
    deadline_s = time.monotonic() + 5.0
    while router.send(b"peer", protocol.CancelReply(1)) is Delivery.UNREAD:  # not heard of yet
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert protocol.decode(peer.recv()) == protocol.CancelReply(1)
    peer.close(linger=0)
    router.close(linger_ms=0)


def test_receive_ends_when_time_is_over_and_when_woken(router):
    dealer = DealerSocket(router.address)
    started_s = time.monotonic()
    assert dealer.receive(0.05) is None
    assert time.monotonic() - started_s < 2.0
    waker = threading.Timer(0.05, dealer.wake)
    waker.start()
    assert dealer.receive(30.0) is None
    assert time.monotonic() - started_s < 10.0
    waker.join()
    dealer.close()


def test_wait_readable_names_descriptors(router):
    reader, writer = os.pipe()
    assert wait_readable([router], [reader], 0.0) == set()
    os.write(writer, b"x")
    assert wait_readable([router], [reader], 5.0) == {reader}
    os.close(reader)
    os.close(writer)


def test_a_peer_that_goes_wakes_the_poll_and_cannot_be_sent_to(router):
    router.watch_disconnects()
    stays, goes = (DealerSocket(router.address, identity=name) for name in (b"stays", b"goes"))
    for dealer in (stays, goes):
        dealer.send(protocol.Status())
    identities, deadline_s = set(), time.monotonic() + 5.0
    while len(identities) < 2 and time.monotonic() < deadline_s:
        wait_readable([router], [], 0.2)
        identities |= {identity for identity, _ in router.receive_all()}
    assert identities == {b"stays", b"goes"}
    assert not router.take_disconnects()
    goes.close()
    wait_readable([router], [], 30.0)
    assert time.monotonic() < deadline_s + 20.0
    assert router.take_disconnects()
    assert not router.take_disconnects()
    while router.send(b"goes", protocol.CancelReply(0)):  # it may still take a moment
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert router.send(b"stays", protocol.CancelReply(7))
    assert stays.receive(5.0) == protocol.CancelReply(7)
    stays.close()


HOLDS_THE_LOCK = """
import ctypes, sys
from ember_pp.sockets import Heart
heart = Heart(sys.argv[1], identity=b"p")
print("begins", flush=True)
ctypes.PyDLL(None).sleep(2)  # a call into C that keeps the interpreter's lock
"""


def test_heartbeats_return_while_no_python_runs(router):
    command = [sys.executable, "-c", HOLDS_THE_LOCK, router.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begins\n"
        deadline_s = time.monotonic() + 1.0
        while not router.send(heart_of(b"p"), protocol.Heartbeat(0)):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        for count in range(1, 6):
            router.send(heart_of(b"p"), protocol.Heartbeat(count))
            time.sleep(0.02)
        beats = [message for _, message in router.receive_all()]
        assert process.poll() is None, "the call was over too soon for this to mean anything"
        process.kill()
    assert beats == [protocol.Heartbeat(count) for count in range(6)]


def test_a_heart_that_is_closed_is_gone(router):
    heart = Heart(router.address, identity=b"p")
    wait_readable([router], [], 0.05)
    assert router.send(heart_of(b"p"), protocol.Heartbeat(0))
    heart.close()
    wait_readable([router], [], 0.05)
    assert not heart._thread.is_alive()
    assert not router.send(heart_of(b"p"), protocol.Heartbeat(1))


def test_an_address_in_use_is_refused(router, directory):
    with pytest.raises(AddressError, match="in use by another coordinator"):
        RouterSocket(router.address, max_message_bytes=MAX_BYTES)
    # The first listener must not have been unlinked by the attempt.
    dealer = DealerSocket(router.address, identity=b"late")
    dealer.send(protocol.Status())
    wait_readable([router], [], 5.0)
    assert [identity for identity, _ in router.receive_all()] == [b"late"]
    dealer.close()


def test_a_tcp_port_in_use_is_refused():
    first = RouterSocket("tcp://127.0.0.1:47613", max_message_bytes=MAX_BYTES)
    with pytest.raises(AddressError, match="in use"):
        RouterSocket("tcp://127.0.0.1:47613", max_message_bytes=MAX_BYTES)
    first.close(linger_ms=0)


def test_a_socket_file_left_by_a_dead_process_is_taken_over(directory):
    address = directory.address("stale")
    program = f"import socket; socket.socket(socket.AF_UNIX).bind({address[6:]!r})"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert os.path.exists(address[6:])
    RouterSocket(address, max_message_bytes=MAX_BYTES).close(linger_ms=0)


def test_a_file_at_the_address_is_refused_and_kept(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious")
    with pytest.raises(AddressError, match=r"notes\.txt is a file, no socket"):
        RouterSocket(f"ipc://{path}", max_message_bytes=MAX_BYTES)
    assert path.read_text() == "precious"


def test_an_address_in_a_missing_folder_is_refused(directory):
    with pytest.raises(AddressError, match="cannot be used"):
        RouterSocket(directory.address("missing/socket"), max_message_bytes=MAX_BYTES)


def test_too_large_messages_end_the_connection_not_the_coordinator(directory):
    router = RouterSocket(directory.address("small"), max_message_bytes=2048)
    large, small = DealerSocket(router.address), DealerSocket(router.address, identity=b"small")
    large.send(protocol.CancelReply(1))
    large.send(protocol.StatusReply({"x": "y" * 5000}, []))
    small.send(protocol.Status())
    received, deadline_s = [], time.monotonic() + 5.0
    while len(received) < 2 and time.monotonic() < deadline_s:
        wait_readable([router], [], 0.2)
        received += [message for _, message in router.receive_all()]
    assert protocol.Status() in received
    assert not any(isinstance(message, protocol.StatusReply) for message in received)
    for item in (large, small):
        item.close(linger_ms=0)
    router.close(linger_ms=0)


def test_private_directories_are_private_and_removed():
    with PrivateDirectory() as directory:
        assert directory.path.stat().st_mode & 0o777 == 0o700
    assert not directory.path.exists()


def test_directories_of_dead_processes_are_swept():
    program = "from ember_pp.sockets import PrivateDirectory; print(PrivateDirectory().path)"
    ended = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    stale = ended.stdout.decode().strip()
    assert os.path.isdir(stale)
    with PrivateDirectory():
        assert not os.path.isdir(stale)


def test_default_address_is_in_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    address = default_address()
    assert address == default_address()
    folder = os.path.dirname(address.removeprefix("ipc://"))
    os.chmod(folder, 0o755)
    with pytest.raises(AddressError, match="not a private folder"):
        default_address()


# --------------------------------------------------------------------------------------
# CURVE

SERVER, GUEST, STRANGER = KeyPair.make(), KeyPair.make(), KeyPair.make()
GUEST_KEYS = ClientKeys(GUEST, SERVER.public)


@pytest.fixture
def locked():
    """A router that only ``GUEST`` may connect to, in a thread, which counts and answers."""
    locked = LockedRouter()
    yield locked
    locked.close()


class LockedRouter:
    def __init__(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.received = []
        self.asked_for = []
        self._is_ending = False
        self._is_bound = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._is_bound.wait(5.0)

    def _is_allowed(self, public):
        self.asked_for.append(public)
        return public == GUEST.public

    def _run(self):
        keys = ServerKeys(SERVER, self._is_allowed)
        address = f"tcp://0.0.0.0:{self.port}"
        self.router = RouterSocket(address, max_message_bytes=MAX_BYTES, keys=keys)
        self.router.watch_disconnects()
        self._is_bound.set()
        while not self._is_ending:
            wait_readable([self.router], [], 0.02)
            for identity, message in self.router.receive_all():
                self.received.append(message)
                self.router.send(identity, protocol.StatusReply({"n": len(self.received)}, []))
        self.router.close(linger_ms=0)

    def wait_until_refused(self, least=1):
        deadline_s = time.monotonic() + 10.0
        while self.router.num_refused < least:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def close(self):
        self._is_ending = True
        self._thread.join()


def test_an_allowed_key_gets_in(locked):
    with Client(locked.address, keys=GUEST_KEYS, timeout_s=5.0) as client:
        assert client.status() == {"n": 1}
    assert locked.asked_for == [GUEST.public]
    assert locked.router.num_refused == 0


def test_an_allowed_key_gets_in_by_the_async_client_too(locked):
    async def ask():
        async with AsyncClient(locked.address, keys=GUEST_KEYS, timeout_s=5.0) as client:
            return await client.status()

    assert asyncio.run(ask()) == {"n": 1}


def test_a_key_that_is_not_allowed_is_refused_counted_and_told(locked):
    keys = ClientKeys(STRANGER, SERVER.public)
    with (
        Client(locked.address, keys=keys, timeout_s=10.0) as client,
        pytest.raises(AddressError, match=r"does not accept this key; there, job=keys"),
    ):
        client.status()

    async def ask():
        async with AsyncClient(locked.address, keys=keys, timeout_s=10.0) as client:
            await client.status()

    with pytest.raises(AddressError, match="does not accept this key"):
        asyncio.run(ask())
    assert STRANGER.public in locked.asked_for
    assert locked.router.num_refused >= 2
    assert locked.received == []


def test_another_servers_key_is_refused_counted_and_told(locked):
    keys = dataclasses.replace(GUEST_KEYS, server=STRANGER.public)
    with (
        Client(locked.address, keys=keys, timeout_s=20.0) as client,
        pytest.raises(AddressError, match=r"answers, but not with the key in server\.key"),
    ):
        client.status()
    assert locked.router.num_refused >= 1
    assert (locked.received, locked.asked_for) == ([], [])


def test_a_public_key_without_its_secret_half_is_refused(locked):
    """Who may connect is no secret: owning the key is what counts."""
    keys = ClientKeys(KeyPair(GUEST.public, STRANGER.secret), SERVER.public)
    dealer = DealerSocket(locked.address, keys=keys)
    dealer.send(protocol.Status())
    locked.wait_until_refused()
    assert (locked.received, locked.asked_for) == ([], [])
    dealer.close(linger_ms=0)


def test_no_key_is_refused_and_counted(locked):
    dealer = DealerSocket(locked.address)
    dealer.send(protocol.Status())
    locked.wait_until_refused()
    assert locked.received == []
    dealer.close(linger_ms=0)


@pytest.mark.parametrize("mechanism", [b"NULL", b"PLAIN", b"CURVE"])
def test_a_greeting_alone_lets_nobody_in(locked, mechanism):
    """And a plain message after it is no message."""
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\3\1" + mechanism.ljust(20, b"\0") + b"\0" * 32
    packed = protocol.encode(protocol.Status())
    with socket.create_connection(("127.0.0.1", locked.port)) as stranger:
        stranger.sendall(greeting + b"\0" + bytes([len(packed)]) + packed)
        locked.wait_until_refused()
    assert locked.received == []


def record(locked):
    """All bytes that a client sent which was let in and asked once."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def forward():
            inner, _ = listener.accept()
            outer = socket.create_connection(("127.0.0.1", locked.port))
            back = threading.Thread(target=copy, args=(outer, inner, bytearray()))
            back.start()
            copy(inner, outer, sent)
            back.join()
            inner.close()
            outer.close()

        proxy = threading.Thread(target=forward)
        proxy.start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with Client(address, keys=GUEST_KEYS, timeout_s=5.0) as client:
            assert client.status() == {"n": 1}
        proxy.join()
    return bytes(sent)


def copy(source, target, kept):
    while data := source.recv(65536):
        kept += data
        target.sendall(data)
    target.shutdown(socket.SHUT_WR)


def test_bytes_that_were_heard_once_are_refused_when_they_are_played_again(locked):
    recorded = record(locked)
    assert len(recorded) > 64 + 200  # a greeting, and a handshake at least
    assert protocol.encode(protocol.Status()) not in recorded  # and nothing in the clear
    before = locked.router.num_refused
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", locked.port)) as again:
            again.sendall(recorded)
            again.settimeout(10.0)
            while again.recv(65536):  # until it hangs up
                pass
    locked.wait_until_refused(before + 3)
    assert locked.received == [protocol.Status()]
    with Client(locked.address, keys=GUEST_KEYS, timeout_s=5.0) as client:
        assert client.status() == {"n": 2}
