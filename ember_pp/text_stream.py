"""What is done with generated text: ending it at a stop string, splitting off the thinking.

Pure functions of text; nothing here knows tokens. ``tokenizer.py`` makes the text.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

THINK_START = "<think>"
THINK_END = "</think>"


class _StopNode:
    """A prefix of one or more stop strings; an Aho-Corasick automaton is made of these."""

    __slots__ = ("children", "completed", "depth", "fallback")

    def __init__(self, depth: int) -> None:
        self.children: dict[str, _StopNode] = {}
        self.fallback: _StopNode | None = None
        """The longest proper suffix of this prefix that is itself a prefix of a stop string."""
        self.completed: str | None = None
        """The longest stop string that this prefix ends with."""
        self.depth = depth


def _build_automaton(stops: Iterable[str]) -> _StopNode:
    root = _StopNode(0)
    for stop in stops:
        node = root
        for depth, character in enumerate(stop, start=1):
            node = node.children.setdefault(character, _StopNode(depth))
        node.completed = stop
    pending = deque([root])
    while pending:  # by depth, so that a fallback is complete before it is used
        parent = pending.popleft()
        for character, node in parent.children.items():
            node.fallback = root if parent is root else _advance(parent.fallback, character)
            # The longer string wins a tie; the fallback's is the longest of the others.
            node.completed = node.completed or node.fallback.completed
            pending.append(node)
    return root


def _advance(node: _StopNode | None, character: str) -> _StopNode:
    """The longest prefix of a stop string that ends ``node``'s text plus ``character``."""
    assert node is not None  # only the root has no fallback, and the root is handled below
    while character not in node.children:
        if node.fallback is None:
            return node
        node = node.fallback
    return node.children[character]


class StopMatcher:
    """Cuts streamed text before the first stop string, and never shows a part of one.

    The stop string that is *completed* first wins, by the position of its last character,
    wherever the pushes were cut; of several that end there, the longest. Text is held back
    only while it is the beginning of a stop string. Time is linear in the text for any stop
    strings (Aho and Corasick, 1975).
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._root = _build_automaton(stops)
        self._first_characters = frozenset(self._root.children)
        self._node = self._root
        self._held = ""
        """The last ``self._node.depth`` characters: not emitted, a stop may begin there."""
        self._stop: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take more text; return what is safe to emit, and the stop string if one completed.

        Once a stop string completed, everything after it is dropped: more pushes return
        ``("", stop)``.
        """
        if self._stop is not None:
            return "", self._stop
        if self._node is self._root and self._first_characters.isdisjoint(text):
            return text, None  # nearly always: no stop string begins here
        node, text_start = self._node, len(self._held)
        for index, character in enumerate(text, start=1):
            node = _advance(node, character)
            if node.completed is not None:
                self._stop = node.completed
                end = text_start + index - len(node.completed)
                return self._release(text, end, self._root), self._stop
        return self._release(text, text_start + len(text) - node.depth, node), None

    def flush(self) -> str:
        """The text held back, once no more will come; empty after a stop string."""
        return self._release("", len(self._held), self._root)

    def _release(self, text: str, end: int, node: _StopNode) -> str:
        """The first ``end`` characters not emitted yet; the rest is held, or gone if stopped."""
        held = self._held + text
        self._node = node
        self._held = "" if self._stop is not None else held[end:]
        return held[:end]


def split_reasoning(text: str, *, is_open: bool | None = None) -> tuple[str | None, str]:
    """Split an answer into its thinking, if it has any, and what it says.

    ``<think>reasoning</think>content``, as Qwen3 writes it. ``is_open`` says whether the
    prompt already ended with ``<think>``, so that the answer has only the closing tag, or,
    cut off while thinking, no tag at all. ``None`` means not known: a closing tag without
    an opening one then counts as thinking, a text without tags does not.

    Returns:
        ``(reasoning, content)``: ``reasoning`` is None when there was no thinking; line
        breaks around the tags belong to neither. Thinking that did not end leaves no content.
    """
    body = text.lstrip()
    if body.startswith(THINK_START):
        body = body[len(THINK_START) :]
    elif is_open is False or (is_open is None and THINK_END not in text):
        return None, text
    else:
        body = text
    reasoning, _, content = body.partition(THINK_END)
    return reasoning.strip("\n"), content.lstrip("\n")
