"""The coordinator's loop between clients and a stage: nobody waits for somebody else's request."""

import contextlib
import subprocess
import sys
import threading
import time

import pytest

from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.errors import (
    EmberError,
    InvalidRequestError,
    NumericalError,
    UnavailableError,
)
from ember_pp.sockets import DealerSocket
from tests.coordinator.fake_stage import PATIENCE_S, FakeStage, running_coordinator

HUGE = "huge prompt"
PAGE = "the " * 1000
LONG = {"max_tokens": 1500}


class HeldTokenizer:
    """Takes as long for ``HUGE`` as the test wants; any other text as the real one."""

    def __init__(self, real):
        self._real = real
        self.has_begun = threading.Event()
        self.may_end = threading.Event()

        self.is_left_behind = False
        """True: ``may_end`` is set only once the coordinator has ended."""

    def __getattr__(self, name):
        return getattr(self._real, name)

    def encode(self, text, **options):
        if text == HUGE:
            self.has_begun.set()
            assert self.may_end.wait(PATIENCE_S)
        if text == "bug":
            raise ZeroDivisionError
        return self._real.encode(text, **options)


@contextlib.contextmanager
def held_coordinator(stage=None, **groups):
    """Address of a coordinator and its tokenizer, which has begun nothing."""
    made = []

    def make(real):
        made.append(HeldTokenizer(real))
        return made[0]

    try:
        with running_coordinator(stage or FakeStage(), tokenizer=make, **groups) as address:
            try:
                yield address, made[0]
            finally:
                if not made[0].is_left_behind:
                    made[0].may_end.set()
    finally:
        made[0].may_end.set()


def wait_for(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_plans_go_on_while_a_huge_prompt_is_tokenised():
    may_go_on = threading.Event()

    def draw(slot, step):
        assert step != 10 or may_go_on.wait(PATIENCE_S)
        return 50

    stage = FakeStage(draw)
    with held_coordinator(stage) as (address, tokenizer), Client(address) as client:
        stream = client.submit("short", sampling=LONG, stream=True)
        huge = client.submit(HUGE, sampling={"max_tokens": 3})
        assert tokenizer.has_begun.wait(PATIENCE_S)
        assert len(stage.plans) <= 10
        may_go_on.set()
        assert stream.result(PATIENCE_S).num_output_tokens == LONG["max_tokens"]
        assert client.status()["open_requests"] == 1
        tokenizer.may_end.set()
        assert huge.result(PATIENCE_S).num_output_tokens == 3


def test_requests_of_a_client_are_admitted_in_their_order():
    stage = FakeStage()
    with held_coordinator(stage) as (address, tokenizer), Client(address) as client:
        first = client.submit(HUGE, sampling={"max_tokens": 1})
        assert tokenizer.has_begun.wait(PATIENCE_S)
        others = [client.submit(f"{n}", sampling={"max_tokens": 1}) for n in range(5)]
        client.status()
        assert stage.plans == []  # the short ones wait behind it
        tokenizer.may_end.set()
        order = []
        while len(order) < 6:
            order += [request.request_id for request in client.wait_any(PATIENCE_S)]
        assert order == [request.request_id for request in [first, *others]]


def test_what_waits_for_a_late_replica_can_be_cancelled():
    """The first replica has a scheduler by then, which has never seen the request."""
    may_load = threading.Event()
    stages = FakeStage(), FakeStage(may_load=may_load)
    with running_coordinator(*stages) as address, Client(address) as client:
        try:
            wait_for(lambda: client.status()["stages"][0]["phase"] == "ready")
            waiting = client.submit("short", sampling={"max_tokens": 1})
            other = client.submit("short", sampling={"max_tokens": 1})
            with pytest.raises(InvalidRequestError):  # admission keeps the order: it is past both
                client.submit(token_ids=[10**6]).result(PATIENCE_S)
            assert client.cancel([waiting.request_id]) == 1
            assert waiting.result(PATIENCE_S).finish_reason == "abort"
        finally:
            may_load.set()
        assert other.result(PATIENCE_S).num_output_tokens == 1


def test_a_request_that_is_being_tokenised_can_be_cancelled():
    with held_coordinator() as (address, tokenizer), Client(address) as client:
        first = client.submit(HUGE, request_id="r")
        waiting = client.submit("short", request_id="w")
        assert tokenizer.has_begun.wait(PATIENCE_S)
        assert client.cancel(["r", "w", "w", "unknown"]) == 2
        assert first.result(PATIENCE_S).finish_reason == "abort"
        assert waiting.result(PATIENCE_S).finish_reason == "abort"
        assert client.status()["open_requests"] == 0
        again = client.submit("short", request_id="r", sampling={"max_tokens": 2})
        tokenizer.may_end.set()
        assert again.result(PATIENCE_S).num_output_tokens == 2
        status = client.status()
        assert (status["num_output_tokens"], status["finished_requests"]) == (2, 3)


def test_what_is_wrong_with_a_request_comes_back_to_its_client():
    with held_coordinator() as (address, _), Client(address) as client:
        with pytest.raises(InvalidRequestError, match="prompt: empty"):
            client.generate("")
        with pytest.raises(EmberError, match="made the coordinator fail: ZeroDivisionError"):
            client.generate("bug")
        with pytest.raises(InvalidRequestError, match="token_ids: expected ids"):
            client.generate(token_ids=[-1])
        assert client.generate("fine", sampling={"max_tokens": 1}).num_output_tokens == 1


def test_bounds_hold_for_what_is_being_tokenised_and_are_named():
    bounds = {"max_queued_requests": 3, "max_queued_bytes": 6000, "max_message_bytes": 5000}
    one = {"max_tokens": 1}
    with held_coordinator(coordinator=bounds) as (address, tokenizer), Client(address) as client:
        client.submit(HUGE, request_id="r", sampling=one)
        assert tokenizer.has_begun.wait(PATIENCE_S)
        with (
            Client(address) as other,
            pytest.raises(InvalidRequestError, match="'r' is empty or open"),
        ):
            other.generate("x", request_id="r")
        large = client.submit(PAGE, sampling=one)
        with pytest.raises(UnavailableError, match=r"coordinator\.max_queued_bytes"):
            client.generate(PAGE)
        small = client.submit("x", sampling=one)
        with pytest.raises(UnavailableError, match=r"coordinator\.max_queued_requests"):
            client.generate("x")
        tokenizer.may_end.set()
        for request in (large, small):
            assert request.result(PATIENCE_S).num_output_tokens == 1
        assert client.generate(PAGE, sampling=one).num_output_tokens == 1


def test_the_end_does_not_wait_for_a_huge_prompt():
    with held_coordinator(coordinator={"shutdown_grace_s": 0.2}) as (address, tokenizer):
        client = Client(address)
        request = client.submit(HUGE)
        assert tokenizer.has_begun.wait(PATIENCE_S)
        tokenizer.is_left_behind = True
    with pytest.raises(UnavailableError, match="asked to end"):
        request.result(PATIENCE_S)
    client.close()


# --------------------------------------------------------------------------------------
# streams


def submit(request_id, *, stream=True, **sampling):
    return protocol.Submit(
        request_id=request_id,
        prompt=None,
        messages=None,
        token_ids=protocol.pack_i32([7]),
        sampling=sampling,
        template_kwargs={},
        stream=stream,
        seed_key="",
    )


@pytest.mark.parametrize("plans_together", [1, 2])
def test_a_client_gets_one_message_for_all_that_a_turn_brought(plans_together):
    """And nothing of a request comes after its end, also where both are of one turn."""
    num_requests = 8
    num_tokens = {f"r{n}": 20 + n % 2 for n in range(num_requests)}  # to end in either plan
    stage = FakeStage(lambda slot, step: 200 + 10 * slot + step % 10, plans_together)
    with running_coordinator(stage) as address:
        socket = DealerSocket(address)
        socket.send(submit("goes on", **LONG))
        for request_id, max_tokens in num_tokens.items():
            socket.send(submit(request_id, max_tokens=max_tokens))
        ids = {request_id: [] for request_id in num_tokens}
        num_messages, has_ended = 0, set()
        while len(has_ended) < num_requests or "goes on" not in has_ended:
            message = socket.receive(PATIENCE_S)
            match message:
                case protocol.TokenDeltas():
                    num_messages += 1
                    assert not has_ended & set(message.request_ids)
                    counts = protocol.unpack_u32(message.num_token_ids)
                    new_ids = list(protocol.unpack_i32(message.token_ids))
                    for request_id, count in zip(message.request_ids, counts, strict=True):
                        ids.setdefault(request_id, []).extend(new_ids[:count])
                        del new_ids[:count]
                    assert new_ids == []
                case protocol.Finished():
                    has_ended.add(message.request_id)
                    ids[message.request_id] += protocol.unpack_i32(message.token_ids)
                    if len(has_ended) == num_requests:
                        socket.send(protocol.Cancel(["goes on"], everyone=False))
        socket.close()
    del ids["goes on"]
    for request_id, drawn in ids.items():
        assert drawn == [drawn[0] + step % 10 for step in range(num_tokens[request_id])]
    assert len({drawn[0] for drawn in ids.values()}) == num_requests  # a slot each
    assert num_messages <= len(stage.plans)


def test_tokens_before_a_failure_are_sent_before_it():
    """Two plans come back together, and the second one's logits are not finite."""
    stage = FakeStage(lambda slot, step: -1 if step == 3 else 50 + step, plans_together=2)
    with running_coordinator(stage) as address, Client(address) as client:
        request = client.submit(token_ids=[7], sampling=LONG, stream=True)
        with pytest.raises(NumericalError):
            request.result(PATIENCE_S)
    assert request._state.token_ids == [50, 51, 52]


@pytest.mark.multiproc
def test_requests_of_a_killed_client_leave_the_pipeline():
    """Also where nothing is sent to it that could come back."""
    code = (
        "import sys, time\n"
        "from ember_pp.client import Client\n"
        "client = Client(sys.argv[1])\n"
        "for n in range(3):\n"
        "    client.submit(token_ids=[7], sampling={'max_tokens': 1900})\n"
        "client.status()\n"
        "print('sent', flush=True)\n"
        "time.sleep(60)\n"
    )
    # As slow as a model, or the answers would be there before the client is gone.
    stage = FakeStage(lambda slot, step: time.sleep(0.02) or 50)
    with running_coordinator(stage) as address, Client(address) as client:
        other = client.submit(token_ids=[7], sampling=LONG)
        command = [sys.executable, "-c", code, address]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"sent\n"
            assert client.status()["open_requests"] == 4
            process.kill()
        wait_for(lambda: client.status()["open_requests"] == 1)
        assert not other._state.has_ended
        other.cancel()
        assert other.result(PATIENCE_S).finish_reason == "abort"
