"""OpenRequests: ids are unique, bounds hold at any moment, whatever ends gives back its share."""

import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_pp.coordinator.admission_thread import Submission
from ember_pp.coordinator.open_requests import OpenRequests
from ember_pp.errors import InvalidRequestError, UnavailableError

MAX_REQUESTS, MAX_BYTES = 3, 100


def make_submission(request_id, num_bytes=1, client=b"c"):
    return Submission(client, types.SimpleNamespace(request_id=request_id), num_bytes)


def make_request(submission):
    """A request as far as this room looks at it."""
    return types.SimpleNamespace(request_id=submission.request_id, client=submission.client)


@given(
    st.lists(
        st.tuples(st.sampled_from(["add", "admit", "close"]), st.integers(0, 4), st.integers(1, 60))
    )
)
def test_bounds_against_a_model(actions):
    book = OpenRequests(max_requests=MAX_REQUESTS, max_bytes=MAX_BYTES)
    entries, sizes = {}, {}
    for action, number, size in actions:
        request_id = f"r{number}"
        match action:
            case "add":
                submission = make_submission(request_id, size)
                fits = len(sizes) < MAX_REQUESTS and sum(sizes.values()) + size <= MAX_BYTES
                if request_id in sizes:
                    with pytest.raises(InvalidRequestError, match="empty or open"):
                        book.add(submission)
                elif fits:
                    book.add(submission)
                    entries[request_id], sizes[request_id] = submission, size
                else:
                    with pytest.raises(UnavailableError, match=r"coordinator\.max_queued_"):
                        book.add(submission)
            case "admit" if isinstance(entries.get(request_id), Submission):
                request = make_request(entries[request_id])
                book.admit(entries[request_id], request)
                entries[request_id] = request
            case "close" if request_id in entries:
                entry = entries.pop(request_id)
                del sizes[request_id]
                assert book.close(entry)
                assert not book.close(entry)
                assert not isinstance(entry, Submission) or entry.is_withdrawn
        assert len(book) == len(entries)
        assert {entry.request_id: entry for entry in book} == entries
        assert all(book.find(f"r{n}") is entries.get(f"r{n}") for n in range(5))


def test_an_entry_of_the_past_does_not_close_its_namesake():
    book = OpenRequests(max_requests=9, max_bytes=MAX_BYTES)
    old, new = make_submission("r"), make_submission("r")
    book.add(old)
    book.close(old)
    book.add(new)
    assert not book.close(old)
    assert book.find("r") is new
    assert not new.is_withdrawn


def test_knows_whose_they_are():
    book = OpenRequests(max_requests=9, max_bytes=MAX_BYTES)
    of_a = [make_submission("1", client=b"a"), make_submission("3", client=b"a")]
    of_b = make_submission("2", client=b"b")
    for submission in (of_a[0], of_b, of_a[1]):
        book.add(submission)
    request = make_request(of_a[0])
    book.admit(of_a[0], request)
    assert book.of_client(b"a") == [request, of_a[1]]
    assert book.clients() == {b"a", b"b"}


def test_an_empty_id_is_refused():
    with pytest.raises(InvalidRequestError, match="'' is empty or open"):
        OpenRequests(max_requests=9, max_bytes=MAX_BYTES).add(make_submission(""))
