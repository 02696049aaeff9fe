"""StopMatcher against a naive oracle; split_reasoning on every shape of an answer."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_pp.text_stream import StopMatcher, split_reasoning

ALPHABET = "ab\U0001f642"
texts = st.text(ALPHABET, max_size=40)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4)


def expected_cut(text, stops):
    """By the definition: look at each end position in turn, there at the longest first."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def longest_beginning(text, stops):
    """Length of the longest end of ``text`` that a stop string begins with."""
    prefixes = {stop[:n] for stop in stops for n in range(1, len(stop) + 1)}
    return max((len(p) for p in prefixes if text.endswith(p)), default=0)


def run(pieces, stops):
    matcher = StopMatcher(stops)
    emitted = ""
    for piece in pieces:
        safe, stop = matcher.push(piece)
        emitted += safe
        if stop is not None:
            return emitted, stop
    return emitted + matcher.flush(), None


@given(pieces=st.lists(texts, max_size=6), stops=stop_lists)
def test_cuts_where_the_definition_says(pieces, stops):
    assert run(pieces, stops) == expected_cut("".join(pieces), stops)


@given(
    pieces=st.lists(st.text("abcdefgh", max_size=6), max_size=8),
    stops=st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=4),
)
def test_cuts_where_the_definition_says_in_text_that_rarely_begins_a_stop(pieces, stops):
    assert run(pieces, stops) == expected_cut("".join(pieces), stops)


@given(text=texts, stops=stop_lists)
def test_pushing_characters_or_all_at_once_is_the_same(text, stops):
    assert run(list(text), stops) == run([text], stops)


@given(text=texts, stops=stop_lists)
def test_holds_back_exactly_what_may_begin_a_stop(text, stops):
    matcher, emitted = StopMatcher(stops), ""
    for i, character in enumerate(text, start=1):
        safe, stop = matcher.push(character)
        emitted += safe
        if stop is not None:
            break
        assert emitted == text[: i - longest_beginning(text[:i], stops)]


@pytest.mark.parametrize(
    ("stops", "text", "expected"),
    [
        ([], "anything", ("anything", None)),
        (["b"], "ab", ("a", "b")),
        (["\n\n"], "one\ntwo\n\nthree", ("one\ntwo", "\n\n")),
        (["abc", "b"], "xabc", ("xa", "b")),  # completed first, though begun later
        (["bc", "abc"], "xabc", ("x", "abc")),  # completed together: the longest
        (["abc", "bc"], "xabc", ("x", "abc")),
        (["aab"], "aaab", ("a", "aab")),
        (["abab"], "abaabab", ("aba", "abab")),
        (["User:"], "a User", ("a User", None)),
    ],
)
def test_examples(stops, text, expected):
    assert run([text], stops) == expected
    assert run(list(text), stops) == expected


def test_the_text_after_a_stop_is_dropped():
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", ".")
    assert matcher.push("c") == ("", ".")
    assert matcher.flush() == ""


def test_flush_gives_out_a_beginning_that_came_to_nothing():
    matcher = StopMatcher(["</s>"])
    assert matcher.push("a</") == ("a", None)
    assert matcher.flush() == "</"
    assert matcher.flush() == ""


@pytest.mark.parametrize("piece_length", [1, 7, 200_000])
def test_time_is_linear_for_stops_that_nearly_match(piece_length):
    """256 characters of near match at each position: a restart per position takes 25 s."""
    stops = ["a" * 255 + "b", "a" * 200 + "c" + "a" * 50]
    text = "a" * 200_000
    matcher, num_emitted = StopMatcher(stops), 0
    started = time.process_time()
    for start in range(0, len(text), piece_length):
        num_emitted += len(matcher.push(text[start : start + piece_length])[0])
    assert time.process_time() - started < 5
    assert num_emitted == len(text) - 255


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("just text", None, (None, "just text")),
        ("just text", False, (None, "just text")),
        ("<think>\nwhy\n</think>\n\nso", None, ("why", "so")),
        ("<think>\nwhy\n</think>\n\nso", False, ("why", "so")),
        ("<think>\nwhy\n</think>\n\nso", True, ("why", "so")),
        ("\n<think>\n\n</think>\n\nso", None, ("", "so")),
        ("<think>\ncut off", None, ("cut off", "")),
        ("why\n</think>\n\nso", None, ("why", "so")),
        ("why\n</think>\n\nso", True, ("why", "so")),
        ("cut off", True, ("cut off", "")),
        ("the tag </think> ends it", False, (None, "the tag </think> ends it")),
        ("<think>a</think>b</think>c", None, ("a", "b</think>c")),
        ("  kept as it is\n", None, (None, "  kept as it is\n")),
        ("", None, (None, "")),
        ("", True, ("", "")),
    ],
)
def test_split_reasoning(text, is_open, expected):
    assert split_reasoning(text, is_open=is_open) == expected
