"""client: the protocol from the other side of a coordinator that the test plays."""

import asyncio
import dataclasses
import threading
import time

import pytest

from ember_pp import protocol
from ember_pp.client import AsyncClient, Client
from ember_pp.client_session import ClientSession, RequestState
from ember_pp.errors import (
    DeadlineExceededError,
    EmberError,
    InvalidRequestError,
    ProtocolError,
    StageDiedError,
    UnavailableError,
)
from ember_pp.sampling_params import SamplingParams
from ember_pp.sockets import PrivateDirectory, RouterSocket, wait_readable


def finished(request_id, text="", ids=(), reason="stop"):
    return protocol.Finished(
        request_id=request_id,
        text=text,
        token_ids=protocol.pack_i32(ids),
        logprobs=[],
        finish_reason=reason,
        stop_reason=None,
        num_prompt_tokens=3,
        num_cached_tokens=0,
        num_output_tokens=len(ids),
    )


def deltas(news):
    """The message with ``news``: triples of request id, text and token ids."""
    return protocol.TokenDeltas(
        request_ids=[request_id for request_id, _, _ in news],
        texts=[text for _, text, _ in news],
        num_token_ids=protocol.pack_u32([len(ids) for _, _, ids in news]),
        token_ids=protocol.pack_i32([token_id for _, _, ids in news for token_id in ids]),
        logprobs=[],
    )


def echo(message):
    """Answers a submission with its own prompt, a character a delta."""
    match message:
        case protocol.Submit(prompt="bad"):
            yield protocol.RequestFailed(
                message.request_id, InvalidRequestError("top_p: no").to_wire()
            )
        case protocol.Submit(prompt="silent"):
            yield protocol.Accepted(message.request_id, 3)
        case protocol.Submit():
            yield protocol.Accepted(message.request_id, 3)
            if message.stream:
                for character in message.prompt:
                    yield deltas([(message.request_id, character, [ord(character)])])
                yield finished(message.request_id)
            else:
                yield finished(message.request_id, message.prompt, [ord(c) for c in message.prompt])
        case protocol.Cancel():
            for request_id in message.request_ids:
                yield finished(request_id, reason="abort")
            yield protocol.CancelReply(len(message.request_ids))


class FakeCoordinator:
    def __init__(self, answer):
        self.directory = PrivateDirectory()
        self.address = self.directory.address("c")
        self.received = []
        self.silent_ids = set()
        self._answer = answer
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._bound = threading.Event()

    def __enter__(self):
        self._thread.start()
        self._bound.wait(5.0)
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()
        self.directory.__exit__(None, None, None)

    def _run(self):
        router = RouterSocket(self.address, max_message_bytes=1 << 20)
        self._bound.set()
        while not self._stop.is_set():
            wait_readable([router], [], 0.02)
            for identity, message in router.receive_all():
                self.received.append(message)
                if isinstance(message, protocol.Submit) and message.prompt == "silent":
                    self.silent_ids.add(message.request_id)
                if isinstance(message, protocol.Status):
                    reply = protocol.StatusReply({"phase": "ready"}, sorted(self.silent_ids))
                    router.send(identity, reply)
                for reply in self._answer(message) or ():
                    router.send(identity, reply)
        router.close()


@pytest.fixture
def coordinator():
    with FakeCoordinator(echo) as coordinator:
        yield coordinator


@pytest.fixture
def client(coordinator):
    with Client(coordinator.address, timeout_s=5.0) as client:
        yield client


def test_generate_returns_the_whole_answer(client):
    completion = client.generate("hello")
    assert completion.text == "hello"
    assert completion.token_ids == [ord(c) for c in "hello"]
    assert (completion.finish_reason, completion.num_prompt_tokens) == ("stop", 3)


def test_stream_yields_parts_that_add_up(client):
    parts = list(client.stream("hello"))
    assert [part.text for part in parts] == list("hello")


def test_a_streamed_request_also_has_a_whole_result(client):
    assert client.submit("hello", stream=True).result().text == "hello"


def test_leaving_a_stream_early_cancels(client, coordinator):
    stream = client.stream("silent")
    request = client.submit("silent", stream=True)
    request.cancel()
    assert request.result(5.0).finish_reason == "abort"
    stream.close()  # not started: nothing to cancel
    for _part in client.stream("hello"):
        break
    client.status()
    cancelled = [m for m in coordinator.received if isinstance(m, protocol.Cancel)]
    assert len(cancelled) >= 1


def test_errors_come_back_as_our_classes(client):
    with pytest.raises(InvalidRequestError, match="top_p: no"):
        client.generate("bad")
    assert client.generate("still works").text == "still works"


def test_sampling_params_and_maps_are_both_taken(client, coordinator):
    client.generate("a", sampling=SamplingParams(temperature=0.0, stop=("x",)))
    client.generate("b", sampling={"top_k": 3})
    first, second = (m for m in coordinator.received if isinstance(m, protocol.Submit))
    assert first.sampling == {"temperature": 0.0, "stop": ["x"]}
    assert second.sampling == {"top_k": 3}


def test_wait_any_returns_each_ended_request_once(client):
    requests = [client.submit(text) for text in ("a", "bad", "c")]
    seen = []
    while len(seen) < 3:
        seen += client.wait_any(5.0)
    assert {request.request_id for request in seen} == {r.request_id for r in requests}
    assert client.wait_any(0.05) == []


def test_result_has_a_deadline(client):
    with pytest.raises(DeadlineExceededError, match=r"nothing came within 0\.1 s"):
        client.submit("silent").result(0.1)


def test_a_coordinator_that_is_not_there_is_named():
    with PrivateDirectory() as directory, Client(directory.address("no"), timeout_s=0.3) as client:
        started_s = time.monotonic()
        with pytest.raises(DeadlineExceededError, match="coordinator at ipc://"):
            client.status()
        with pytest.raises(DeadlineExceededError, match="is it running"):
            client.generate("hello")
        assert time.monotonic() - started_s < 5.0


def test_a_silent_request_is_waited_for_while_the_coordinator_answers(coordinator):
    with Client(coordinator.address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceededError, match="nothing came within"):
            client.submit("silent").result(1.5)
        assert any(isinstance(m, protocol.Status) for m in coordinator.received)


def test_check_alive_ends_a_wait(coordinator):
    def check_alive():
        raise StageDiedError("stage 1 is dead", stage_index=1)

    with (
        Client(coordinator.address, check_alive=check_alive) as client,
        pytest.raises(StageDiedError, match="stage 1 is dead"),
    ):
        client.submit("silent").result(10.0)


def test_a_refusal_without_request_is_raised():
    def refuse(message):
        yield protocol.RequestFailed("", UnavailableError("it drains").to_wire())

    with (
        FakeCoordinator(refuse) as coordinator,
        Client(coordinator.address) as client,
        pytest.raises(UnavailableError, match="it drains"),
    ):
        client.generate("x")


def test_closing_cancels_what_is_open(coordinator):
    with Client(coordinator.address) as client:
        client.submit("silent", request_id="mine")
        client.status()
    deadline_s = time.monotonic() + 5.0
    while time.monotonic() < deadline_s:
        if protocol.Cancel(["mine"], everyone=False) in coordinator.received:
            return
        time.sleep(0.01)
    pytest.fail(f"no Cancel among {coordinator.received}")


def test_the_async_client_does_the_same(coordinator):
    async def talk():
        async with AsyncClient(coordinator.address, timeout_s=5.0) as client:
            answers = await asyncio.gather(*(client.generate(text) for text in ("ab", "cd")))
            parts = [delta.text async for delta in client.stream("xyz")]
            with pytest.raises(InvalidRequestError):
                await client.generate("bad")
            request = await client.submit("silent")
            with pytest.raises(DeadlineExceededError, match="nothing came within"):
                await request.result(0.1)
            await request.cancel()
            aborted = await request.result(5.0)
            status = await client.status()
        return [answer.text for answer in answers], parts, aborted.finish_reason, status

    texts, parts, finish_reason, status = asyncio.run(talk())
    assert texts == ["ab", "cd"]
    assert parts == ["x", "y", "z"]
    assert finish_reason == "abort"
    assert status == {"phase": "ready"}


def test_concurrent_cancels_get_their_own_answers(coordinator):
    async def talk():
        async with AsyncClient(coordinator.address, timeout_s=5.0) as client:
            ids = [(await client.submit("silent")).request_id for _ in range(6)]
            return await asyncio.gather(
                client.cancel(ids[:1]), client.cancel(ids[1:3]), client.cancel(ids[3:])
            )

    assert asyncio.run(talk()) == [1, 2, 3]


def test_a_cancel_that_was_given_up_does_not_answer_the_next():
    num_cancels = 0

    def answer(message):
        nonlocal num_cancels
        if isinstance(message, protocol.Cancel):
            num_cancels += 1
            if num_cancels == 2:
                yield protocol.CancelReply(11)
                yield protocol.CancelReply(22)

    with (
        FakeCoordinator(answer) as coordinator,
        Client(coordinator.address, timeout_s=0.2) as client,
    ):
        with pytest.raises(DeadlineExceededError, match="the answer to cancel"):
            client.cancel(["a"])
        assert client.cancel(["b"]) == 22


def test_news_of_many_requests_come_in_one_message():
    received = []

    def answer(message):
        if isinstance(message, protocol.Submit):
            received.append(message.request_id)
        if len(received) == 2:
            a, b = received
            yield deltas([(b, "x", [1, 2]), ("unknown", "?", [9]), (a, "", []), (b, "y", [3])])
            yield deltas([])
            yield finished(a, "z", [4])
            yield finished(b)
            received.clear()

    with (
        FakeCoordinator(answer) as coordinator,
        Client(coordinator.address, timeout_s=5.0) as client,
    ):
        requests = [client.submit(name, stream=True) for name in "ab"]
        a, b = (request.result(5.0) for request in requests)
        assert (a.text, a.token_ids) == ("z", [4])
        assert (b.text, b.token_ids) == ("xy", [1, 2, 3])
        assert [delta.text for delta in requests[1]] == ["x", "y"]


def test_log_probabilities_go_to_who_asked():
    entries = [protocol.TokenLogprobs(-float(n), b"", b"") for n in range(3)]
    session = ClientSession("ipc:///x", 1.0)
    states = {name: RequestState(name) for name in ("none", "some", "one")}
    for state in states.values():
        session.add(state, state)
    news = deltas([("none", "", [1, 2]), ("some", "", [3, 4]), ("one", "", [5])])
    logprobs = [None, None, entries[0], entries[1], entries[2]]
    session.handle(dataclasses.replace(news, logprobs=logprobs))
    assert {name: state.logprobs for name, state in states.items()} == {
        "none": [],
        "some": entries[:2],
        "one": entries[2:],
    }


@pytest.mark.parametrize(
    "wrong",
    [
        {"texts": []},
        {"num_token_ids": protocol.pack_u32([1])},
        {"num_token_ids": protocol.pack_u32([2, 2])},
        {"token_ids": protocol.pack_i32([1])},
        {"logprobs": [None]},
    ],
)
def test_columns_that_do_not_go_together_are_refused(wrong):
    session = ClientSession("ipc:///x", 1.0)
    good = deltas([("a", "x", [1]), ("b", "y", [2, 3])])
    session.handle(good)
    with pytest.raises(ProtocolError, match="TokenDeltas: columns of different lengths"):
        session.handle(dataclasses.replace(good, **wrong))


def test_the_async_client_names_a_coordinator_that_is_not_there():
    async def talk(address):
        async with AsyncClient(address, timeout_s=0.3) as client:
            await client.generate("hello")

    with PrivateDirectory() as directory, pytest.raises(EmberError, match="is it running"):
        asyncio.run(talk(directory.address("no")))


def test_requests_that_the_coordinator_forgot_fail(coordinator):
    """It was restarted, or takes the client for a new one after the connection broke."""
    with Client(coordinator.address, timeout_s=0.4) as client:
        request = client.submit("silent")
        client.status()
        coordinator.silent_ids.clear()
        with pytest.raises(UnavailableError, match="does not know this request any more"):
            request.result(10.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": [2**40]}, "token_ids: expected 32-bit whole numbers"),
        ({"token_ids": ["a"]}, "token_ids: expected 32-bit whole numbers"),
        ({"prompt": "\ud800"}, "cannot be sent"),
        ({"prompt": 5}, r"cannot be sent: Submit\.prompt: expected str"),
        ({"prompt": "x" * (16 * 1024 * 1024)}, "at most 16777216 can be sent"),
    ],
)
def test_what_cannot_travel_is_refused_here(client, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        client.submit(**options)
    assert client.generate("still works").text == "still works"


def test_an_id_that_is_open_is_refused_and_the_first_goes_on(client):
    first = client.submit("silent", request_id="dup")
    with pytest.raises(InvalidRequestError, match="'dup' is open already"):
        client.submit("x", request_id="dup")
    first.cancel()
    assert first.result(5.0).finish_reason == "abort"


def test_answers_that_were_taken_are_not_kept(client):
    for _ in range(5):
        client.generate("hello")
    list(client.stream("hello"))
    for _part in client.stream("hello"):
        break  # whose end nobody asks for
    assert not client._session.ended


def test_the_async_client_ends_waits_when_it_is_closed(coordinator):
    async def talk():
        async with AsyncClient(coordinator.address, timeout_s=5.0) as client:
            request = await client.submit("silent")
            waiting = asyncio.create_task(request.result())
            await asyncio.sleep(0.05)
        with pytest.raises(UnavailableError, match="closed"):
            await asyncio.wait_for(waiting, 5.0)

    asyncio.run(talk())


def test_the_async_client_says_how_it_is_used(coordinator):
    async def talk():
        client = AsyncClient(coordinator.address)
        with pytest.raises(UnavailableError, match="async with"):
            await client.generate("x")
        await client.close()

    asyncio.run(talk())
