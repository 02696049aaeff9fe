"""sockets: addresses are checked, peers that are gone are noticed, nothing is left behind."""

import os
import subprocess
import sys
import threading
import time

import pytest

from ember_pp import protocol
from ember_pp.errors import AddressError, ProtocolError
from ember_pp.sockets import (
    DealerSocket,
    Heart,
    PrivateDirectory,
    RouterSocket,
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
        ("tcp://*:5600", "can be reached from other machines"),
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
    assert not router.send(b"nobody", protocol.Status())


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
