"""Clients that do what no client should, while others are served as if nothing were."""

import contextlib
import random
import socket as unix
import threading
import time

import pytest
import zmq

from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.config import CoordinatorSettings
from ember_pp.errors import InvalidRequestError, UnavailableError, from_wire
from ember_pp.sockets import DealerSocket
from tests.coordinator.fake_stage import PATIENCE_S, FakeStage, Stop, running_coordinator

LONG = {"max_tokens": 1500}


def submit(request_id, *, stream=True, num_prompt_tokens=1, **sampling):
    return protocol.Submit(
        request_id=request_id,
        prompt=None,
        messages=None,
        token_ids=protocol.pack_i32([7] * num_prompt_tokens),
        sampling=sampling,
        template_kwargs={},
        stream=stream,
        seed_key="",
    )


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def slow(slot, step):
    """A stage as slow as a model: or all would be over before anything can be done to it."""
    time.sleep(0.005)
    return 50


@contextlib.contextmanager
def served_meanwhile(address, max_tokens=300):
    """Another client streams all the while, and gets all of its tokens."""
    with Client(address) as other:
        request = other.submit(token_ids=[7], stream=True, sampling={"max_tokens": max_tokens})
        yield other
        assert request.result(PATIENCE_S).num_output_tokens == max_tokens


class Raw:
    """A DEALER of ZeroMQ's own, that can be told to read nothing and send anything."""

    def __init__(self, address, context=None, receive_queue=1000):
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.rcvhwm = receive_queue
        self.socket.connect(address)

    def send(self, message):
        self.socket.send(protocol.encode(message))

    def receive(self):
        assert self.socket.poll(PATIENCE_S * 1000), "nothing came"
        return protocol.decode(self.socket.recv())

    def close(self):
        self.socket.close(linger=0)


# --------------------------------------------------------------------------------------
# that go, cancel, do not read, are many


def test_a_client_that_vanishes_in_the_middle_of_its_streams():
    with running_coordinator(FakeStage(slow)) as address, served_meanwhile(address) as other:
        wait_for(lambda: other.status()["phase"] == "ready")
        num_blocks = other.status()["num_blocks"]
        gone = DealerSocket(address)
        for n in range(20):
            gone.send(submit(f"r{n}", num_prompt_tokens=40, **LONG))
        while not isinstance(gone.receive(PATIENCE_S), protocol.TokenDeltas):
            pass
        assert other.status()["open_requests"] == 21
        gone.close(linger_ms=0)
        wait_for(lambda: other.status()["open_requests"] == 1)
        assert other.status()["num_dropped_clients"] == 1
        wait_for(lambda: other.status()["num_running"] == 1)
        assert other.status()["num_free_blocks"] > num_blocks - 2000 // 16


def test_a_client_that_cancels_thousands():
    num_requests = 5000
    with running_coordinator(FakeStage(slow)) as address, served_meanwhile(address) as other:
        many = DealerSocket(address)
        ids = [f"r{n}" for n in range(num_requests)]
        for request_id in ids:
            many.send(submit(request_id, stream=False, **LONG))
        wait_for(lambda: other.status()["open_requests"] == num_requests + 1)
        many.send(protocol.Cancel(ids + ids, everyone=False))
        ended = []
        while not isinstance(message := many.receive(PATIENCE_S), protocol.CancelReply):
            if isinstance(message, protocol.Finished):
                assert message.finish_reason == "abort"
                ended.append(message.request_id)
        assert message.num_cancelled == num_requests
        assert ended == ids
        assert other.status()["open_requests"] == 1
        wait_for(lambda: other.status()["num_running"] == 1)
        assert other.status()["num_waiting"] == 0
        many.close()


def test_a_client_that_never_reads_loses_its_requests_and_is_told_when_it_speaks():
    """Sockets between the two hold some messages too: what counts is that it ends."""
    bounds = {"max_unread_messages": 20}
    num_requests = 60
    stage = FakeStage()
    with running_coordinator(stage, coordinator=bounds) as address, Client(address) as other:
        unread = Raw(address, receive_queue=1)
        for n in range(num_requests):
            unread.send(submit(f"r{n}", logprobs=None, **LONG))
        wait_for(lambda: other.status()["num_dropped_clients"] == 1)
        wait_for(lambda: other.status()["num_running"] == 0)
        assert other.status()["open_requests"] == 0
        assert other.generate(token_ids=[7], sampling={"max_tokens": 9}).num_output_tokens == 9
        unread.send(protocol.Status())
        ended = {}
        while not isinstance(message := unread.receive(), protocol.StatusReply):
            match message:
                case protocol.RequestFailed():
                    ended[message.request_id] = from_wire(message.error)
                case protocol.Finished():
                    ended[message.request_id] = None
            if len(ended) < num_requests:
                unread.send(protocol.Status())  # it has room again
        failures = [error for error in ended.values() if error is not None]
        assert failures
        assert {type(error) for error in failures} == {UnavailableError}
        assert "20 messages were not read (coordinator.max_unread_messages)" in str(failures[0])
        wait_for(lambda: other.status()["open_requests"] == 0)
        unread.close()


def test_a_thousand_clients_at_once():
    num_clients = 1000
    context = zmq.Context()
    context.max_sockets = 2 * num_clients
    with running_coordinator(FakeStage()) as address, served_meanwhile(address, 1500) as other:
        clients = [Raw(address, context) for _ in range(num_clients)]
        for n, client in enumerate(clients):
            client.send(submit(f"r{n}", max_tokens=2 + n % 3, stream=n % 2 == 0))
        for n, client in enumerate(clients):
            num_tokens = 0
            while not isinstance(message := client.receive(), protocol.Finished):
                if isinstance(message, protocol.TokenDeltas):
                    assert message.request_ids == [f"r{n}"]
                    num_tokens += len(protocol.unpack_i32(message.token_ids))
            assert message.request_id == f"r{n}"
            num_tokens += len(protocol.unpack_i32(message.token_ids))
            assert num_tokens == 2 + n % 3
        assert other.status()["finished_requests"] >= num_clients
        for client in clients:
            client.close()
    context.term()


# --------------------------------------------------------------------------------------
# that send anything


def test_messages_of_any_bytes():
    source = random.Random(4)
    good = protocol.encode(submit("r", max_tokens=3))
    not_a_clients = [
        protocol.encode(protocol.Shutdown("now")),
        protocol.encode(protocol.Sampled(0, 0, protocol.pack_i32([1]), [])),
        protocol.encode(protocol.StageHello(0, "guess", 1, {})),
    ]
    frames = [[b""], [good, good], [b"", good], [b"\x91" * 100_000], [b"\xdf\xff\xff\xff\xff"]]
    frames += [[data] for data in not_a_clients]
    frames += [[source.randbytes(source.randrange(1, 3000))] for _ in range(300)]
    frames += [[good[:n]] for n in range(1, len(good))]
    with running_coordinator(FakeStage(slow)) as address, served_meanwhile(address) as other:
        client = Raw(address)
        for message in frames:
            client.socket.send_multipart(message)
        for _ in frames:
            answer = client.receive()
            assert isinstance(answer, protocol.RequestFailed)
            assert (answer.request_id, answer.error["code"]) == ("", "protocol_error")
        assert other.status()["num_refused_messages"] == len(frames)
        client.send(submit("fine", max_tokens=3, stream=False))
        assert isinstance(client.receive(), protocol.Accepted)
        assert client.receive().num_output_tokens == 3
        client.close()


NO_GREETINGS = [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, b"\xff\0\0\0\0\0\0\0\1\x7f\3\0junk"]


@pytest.mark.parametrize("greeting", NO_GREETINGS)
def test_bytes_that_are_not_even_zeromq(greeting):
    with running_coordinator(FakeStage(slow)) as address, served_meanwhile(address) as other:
        with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM) as stranger:
            stranger.connect(address.removeprefix("ipc://"))
            stranger.sendall(greeting)
            stranger.shutdown(unix.SHUT_WR)
            stranger.settimeout(PATIENCE_S)
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):
                    pass
        wait_for(lambda: other.status()["num_refused_connections"] >= 1)


def test_a_message_that_is_too_large_is_answered_and_twice_as_much_ends_the_connection():
    bounds = {"max_message_bytes": 5000}
    with (
        running_coordinator(FakeStage(slow), coordinator=bounds) as address,
        served_meanwhile(address),
    ):
        with Client(address) as client, pytest.raises(InvalidRequestError) as refusal:
            client.submit(token_ids=[7] * 1600).result(PATIENCE_S)
        assert "at most 5000 (coordinator.max_message_bytes)" in str(refusal.value)
        with Client(address, timeout_s=1.0) as client, pytest.raises(UnavailableError):
            client.submit(token_ids=[7] * 3000).result(PATIENCE_S)


# --------------------------------------------------------------------------------------
# limits


TOO_MUCH = {
    "max_prompt_tokens": (4, {"token_ids": [7] * 5}),
    "max_prompt_characters": (20, {"prompt": "x" * 21}),
    "max_message_bytes": (1024, {"prompt": "x" * 1500}),
    "max_stop_strings": (2, {"prompt": "x", "sampling": {"stop": ["a", "b", "c"]}}),
    "max_stop_characters": (2, {"prompt": "x", "sampling": {"stop": ["abc"]}}),
    "max_stop_token_ids": (2, {"prompt": "x", "sampling": {"stop_token_ids": [1, 2, 3]}}),
    "max_logit_bias_entries": (1, {"prompt": "x", "sampling": {"logit_bias": {1: 1.0, 2: 1.0}}}),
    "max_queued_requests": (1, {"prompt": "x"}),
    "max_queued_bytes": (2048, {"prompt": "x" * 1500}),
}
ELSEWHERE = {"max_unread_messages"}  # what a client does not do cannot be refused
BIG = "x" * 900


@pytest.mark.parametrize("setting", TOO_MUCH)
def test_what_a_limit_refuses_names_its_setting(setting):
    value, request = TOO_MUCH[setting]
    bounds = {setting: value}
    if setting == "max_queued_bytes":
        bounds["max_message_bytes"] = 2048
    small = {"prompt": BIG} if setting == "max_queued_bytes" else {"token_ids": [7]}
    expected = UnavailableError if "queued" in setting else InvalidRequestError
    with (
        running_coordinator(FakeStage(slow), coordinator=bounds) as address,
        Client(address) as client,
    ):
        open_one = client.submit(sampling=LONG, **small)
        with pytest.raises(expected, match=rf"coordinator\.{setting}\b"):
            client.submit(**request).result(PATIENCE_S)
        assert not open_one._state.has_ended


def test_every_limit_is_tried_here():
    limits = {name for name in CoordinatorSettings.__dataclass_fields__ if name.startswith("max_")}
    assert limits == set(TOO_MUCH) | ELSEWHERE


# --------------------------------------------------------------------------------------
# cancel frees blocks


@pytest.mark.parametrize("num_others", [0, 3])
def test_a_cancel_frees_blocks_within_the_plans_that_are_in_flight(num_others):
    """The stage computes a plan when the test says so; blocks are counted by ``status``."""
    permits = threading.Semaphore(0)
    is_held = threading.Event()
    seen = []

    def draw(slot, step):
        if is_held.is_set() and len(stage.plans) not in seen:
            seen.append(len(stage.plans))
            assert permits.acquire(timeout=PATIENCE_S)
        return 50

    stage = FakeStage(draw)
    with running_coordinator(stage) as address, Client(address) as client:
        try:
            most = client.status()["max_in_flight"]
            for n in range(num_others):
                client.submit(token_ids=[n], sampling=LONG)
            wait_for(lambda: client.status().get("num_running") == num_others)
            request = client.submit(token_ids=[9] * 300, stream=True, sampling=LONG)
            next(iter(request))
            is_held.set()
            wait_for(lambda: client.status()["num_in_flight"] == most)
            before = client.status()
            in_use = before["num_blocks"] - before["num_free_blocks"]
            assert in_use >= 300 // 16
            assert client.cancel([request.request_id]) == 1
            assert request.result(PATIENCE_S).finish_reason == "abort"
            for _ in range(most):  # no plan more than those comes back
                permits.release()
            freed = 300 // 16 - num_others  # the others may have taken one each
            wait_for(
                lambda: client.status()["num_free_blocks"] - before["num_free_blocks"] >= freed
            )
            assert client.status()["num_running"] == num_others
        finally:
            is_held.clear()
            for _ in range(2000):
                permits.release()


# --------------------------------------------------------------------------------------
# the end


def test_at_a_signal_what_is_open_ends_and_what_is_new_is_refused():
    stop = Stop()
    grace = {"grace_s": PATIENCE_S}
    with running_coordinator(FakeStage(slow), stop=stop, shutdown=grace) as address:
        with Client(address) as client:
            requests = [
                client.submit(token_ids=[7], stream=stream, sampling={"max_tokens": 200})
                for stream in (True, False)
            ]
            wait_for(lambda: client.status().get("num_running") == 2)
            stop.set()
            wait_for(lambda: client.status()["phase"] == "draining")
            with pytest.raises(UnavailableError, match=r"is ending \(SIGTERM\)"):
                client.submit(token_ids=[7]).result(PATIENCE_S)
            assert [r.result(PATIENCE_S).num_output_tokens for r in requests] == [200, 200]
        wait_for(lambda: stop.num_cut_off is not None)
        assert stop.num_cut_off == 0


@pytest.mark.parametrize("grace_s", [0.0, 0.3])
def test_what_does_not_end_in_time_is_told(grace_s):
    stop = Stop()
    with running_coordinator(FakeStage(slow), stop=stop, shutdown={"grace_s": grace_s}) as address:
        client = Client(address)
        request = client.submit(token_ids=[7], stream=True, sampling={"max_tokens": 1900})
        next(iter(request))
        started_s = time.monotonic()
        stop.set()
        with pytest.raises(UnavailableError, match=r"was asked to end \(SIGTERM\)"):
            request.result(PATIENCE_S)
        assert grace_s <= time.monotonic() - started_s < grace_s + 3.0
        wait_for(lambda: stop.num_cut_off is not None)
        assert stop.num_cut_off == 1
        client.close()


def test_a_second_signal_does_not_wait():
    stop = Stop()
    with running_coordinator(
        FakeStage(slow), stop=stop, shutdown={"grace_s": PATIENCE_S}
    ) as address:
        client = Client(address)
        request = client.submit(token_ids=[7], stream=True, sampling={"max_tokens": 1900})
        next(iter(request))
        stop.set()
        wait_for(lambda: client.status()["phase"] == "draining")
        stop.set()
        with pytest.raises(UnavailableError, match="was asked to end"):
            request.result(3.0)
        client.close()


def test_a_signal_while_the_model_loads_ends_at_once():
    stop, may_load = Stop(), threading.Event()
    stage = FakeStage(may_load=may_load)
    with running_coordinator(stage, stop=stop, shutdown={"grace_s": PATIENCE_S}) as address:
        client = Client(address)
        request = client.submit(token_ids=[7])
        client.status()
        stop.set()
        with pytest.raises(UnavailableError, match="was asked to end"):
            request.result(5.0)
        may_load.set()
        client.close()
