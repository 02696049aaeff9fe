"""AdmissionThread: in order, beside the caller, and nothing that a request does ends it."""

import select
import threading

import pytest

from ember_pp.coordinator.admission_thread import AdmissionThread, Submission
from ember_pp.errors import EmberError, InvalidRequestError

PATIENCE_S = 20.0


class TokenizerPanicError(BaseException):
    """As what the tokenizer's library raises where its own code gives up."""


def take(thread, count):
    """The next ``count`` results, waiting as the loop does."""
    results = []
    while len(results) < count:
        assert select.select([thread.descriptor], [], [], PATIENCE_S)[0]
        results += thread.take()
    return results


@pytest.fixture
def start():
    threads = []

    def start_thread(admit):
        threads.append(AdmissionThread(admit))
        return threads[-1]

    yield start_thread
    for thread in threads:
        thread.close(PATIENCE_S)
        assert not thread._thread.is_alive()


def test_results_come_in_order_from_another_thread(start):
    names = []
    thread = start(lambda client, submit: names.append(threading.get_ident()) or (client, submit))
    submissions = [Submission(b"c", number, 1) for number in range(100)]
    for submission in submissions:
        thread.put(submission)
    results = take(thread, 100)
    assert results == [(submission, (b"c", submission.submit)) for submission in submissions]
    assert set(names) == {thread._thread.ident} != {threading.get_ident()}
    assert not select.select([thread.descriptor], [], [], 0)[0]  # the poll can sleep again


def test_whatever_a_request_does_the_next_one_is_admitted(start, caplog):
    failures = {"refused": InvalidRequestError("no"), "bug": KeyError("x")}
    failures["panic"] = TokenizerPanicError("index out of bounds")

    def admit(client, submit):
        if submit.request_id in failures:
            raise failures[submit.request_id]
        return "request"

    thread = start(admit)
    for name in (*failures, "good"):
        thread.put(Submission(b"c", Named(name), 1))
    outcomes = {submission.request_id: outcome for submission, outcome in take(thread, 4)}
    assert outcomes.pop("good") == "request"
    assert outcomes.pop("refused") is failures["refused"]
    for name, outcome in outcomes.items():
        assert type(outcome) is EmberError
        assert str(outcome).endswith(type(failures[name]).__name__)
        assert name in caplog.text


def test_what_was_withdrawn_is_not_worked_on(start):
    has_begun, may_end, admitted = threading.Event(), threading.Event(), []

    def admit(client, submit):
        has_begun.set()
        assert may_end.wait(PATIENCE_S)
        admitted.append(submit)

    thread = start(admit)
    submissions = [Submission(b"c", number, 1) for number in range(3)]
    for submission in submissions:
        thread.put(submission)
    assert has_begun.wait(PATIENCE_S)
    submissions[1].is_withdrawn = True
    may_end.set()
    take(thread, 2)
    assert admitted == [0, 2]


def test_close_forgets_what_waits():
    has_begun, may_end, admitted = threading.Event(), threading.Event(), []

    def admit(client, submit):
        has_begun.set()
        assert may_end.wait(PATIENCE_S)
        admitted.append(submit)

    thread = AdmissionThread(admit)
    for number in range(3):
        thread.put(Submission(b"c", number, 1))
    assert has_begun.wait(PATIENCE_S)
    thread.close(0.0)  # it cannot be interrupted, and nobody waits for it
    assert thread._thread.is_alive()
    may_end.set()
    thread.close(PATIENCE_S)
    assert not thread._thread.is_alive()
    assert admitted == [0]


class Named:
    """A submission as far as its name goes."""

    def __init__(self, request_id):
        self.request_id = request_id
