"""Batch requests: what the lines of the input ask for, and which of it is left to do.

``check`` is the first pass: it parses every line and fills a ``Ledger``, about 130 bytes per
line, with which the second pass (``pending``) knows duplicates and what was answered before.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ember_pp.errors import BatchInputError, InvalidRequestError
from ember_pp.jobs import openai
from ember_pp.jobs.batch_input import BatchInput, Line, decode_line
from ember_pp.jobs.progress import counted
from ember_pp.sampling_params import SamplingSizes

MAX_LISTED_PROBLEMS = 50
_MAX_LISTED_RANGES = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Shard:
    """Part ``index`` (from 1) of ``total``: every ``total``-th line."""

    index: int = 1
    total: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """From ``I/N`` as ``job.shard`` has it (checked there); None is the whole input."""
        if text is None:
            return cls()
        index, _, total = text.partition("/")
        return cls(int(index), int(total))

    def owns(self, number: int) -> bool:
        """Whether the line of this number belongs to this part."""
        return (number - 1) % self.total == self.index - 1

    def name_file(self, path: Path) -> Path:
        """``answers.jsonl`` as ``answers.03-of-16.jsonl``; unchanged when there is one part."""
        if self.total == 1:
            return path
        index = str(self.index).zfill(len(str(self.total)))
        return path.with_name(f"{path.stem}.{index}-of-{self.total}{path.suffix}")


def digest(text: str) -> int:
    """128 bits of ``text``: enough to tell any two ids of a job apart."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest(), "big")


class Ledger:
    """Which requests of the input are pending and which were answered by an earlier run.

    ``answered`` maps the digest of a ``custom_id`` to the digest of its request; its entries
    are taken out as their lines are met. Built by ``add`` in the first pass, asked by
    ``is_pending`` in the second.
    """

    def __init__(self, answered: dict[int, int]) -> None:
        self._answered = answered
        self._line_numbers: dict[int, int] = {}
        """Of each id; negative: answered."""
        self.num_pending = 0
        self.num_answered = 0

    def add(self, number: int, custom_id: str, request_hash: str, *, is_mine: bool) -> bool:
        """Note a line with a new id; False: an earlier run answered another request under it."""
        key = digest(custom_id)
        assert key not in self._line_numbers
        answered_hash = self._answered.pop(key, None) if is_mine else None
        self._line_numbers[key] = number if answered_hash is None else -number
        if answered_hash is not None:
            self.num_answered += 1
            return answered_hash == digest(request_hash)
        self.num_pending += is_mine
        return True

    def line_number(self, custom_id: str) -> int | None:
        """Number of the line with this id; None: no such line."""
        return self.line_number_of(digest(custom_id))

    def line_number_of(self, key: int) -> int | None:
        """As ``line_number``, by the digest of the id."""
        number = self._line_numbers.get(key)
        return None if number is None else abs(number)

    def is_answered(self, custom_id: str) -> bool:
        """Whether an earlier run answered this id."""
        return self._line_numbers.get(digest(custom_id), 0) < 0

    @property
    def num_foreign(self) -> int:
        """Answers in the output whose ids the input does not have."""
        return len(self._answered)


class Problems:
    """Lines that cannot be used: the first ones in words, the others by number."""

    def __init__(self, place: Callable[[int], str]) -> None:
        self._place = place
        self._texts: list[str] = []
        self._other_numbers = array.array("Q")

    def __len__(self) -> int:
        return len(self._texts) + len(self._other_numbers)

    def add(self, number: int, text: str) -> None:
        """Note that the line of this number cannot be used, and why."""
        if len(self._texts) < MAX_LISTED_PROBLEMS:
            self._texts.append(f"{self._place(number)}: {text}")
        else:
            self._other_numbers.append(number)

    def listed(self) -> list[str]:
        """One text per line, then the places of those that are left, joined to ranges."""
        if not self._other_numbers:
            return list(self._texts)
        ranges = self._ranges()
        shown = ", ".join(ranges[:_MAX_LISTED_RANGES])
        more = ", ..." if len(ranges) > _MAX_LISTED_RANGES else ""
        return [*self._texts, f"and {len(self._other_numbers)} more: {shown}{more}"]

    def _ranges(self) -> list[str]:
        spans: list[list[int]] = []
        for number in self._other_numbers:
            if spans and spans[-1][1] == number - 1 and not self._place(number).endswith(":1"):
                spans[-1][1] = number
            elif len(spans) <= _MAX_LISTED_RANGES:
                spans.append([number, number])
        return [
            self._place(first)
            + (f"-{self._place(last).rpartition(':')[2]}" if last > first else "")
            for first, last in spans
        ]


# --------------------------------------------------------------------------------------
# the two passes


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A line that is a request."""

    number: int
    request: openai.BatchRequest
    request_hash: str

    @property
    def custom_id(self) -> str:
        """The name of the request in the input and the output."""
        return self.request.custom_id


@dataclasses.dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is none."""

    number: int
    custom_id: str
    """What the line says, or ``line-<number>``."""
    error: InvalidRequestError


def parse(line: Line, max_line_bytes: int, sizes: SamplingSizes | None = None) -> Item | BadLine:
    """What ``line`` asks for, or what is wrong with it; ``sizes`` as ``Requests`` has them."""
    custom_id = f"line-{line.number}"
    try:
        if line.raw is None:
            raise InvalidRequestError(
                f"longer than {max_line_bytes:,} bytes (coordinator.max_message_bytes)"
            )
        value = decode_line(line.raw)
        if isinstance(value.get("custom_id"), str):
            custom_id = value["custom_id"]
        request = openai.parse_line(value, line.number)
        if sizes is not None:
            sizes.check(request.sampling)
    except InvalidRequestError as error:
        return BadLine(line.number, custom_id, error)
    return Item(line.number, request, openai.request_hash(request))


class Requests:
    """The requests of a batch: all lines checked, then those of ``shard`` one by one.

    ``sizes`` bounds their sampling fields; None: only the coordinator knows.
    """

    def __init__(
        self,
        source: BatchInput,
        answered: dict[int, int],
        shard: Shard,
        sizes: SamplingSizes | None = None,
    ) -> None:
        self._source = source
        self._sizes = sizes
        self._shard = shard
        self.ledger = Ledger(answered)
        self._bad_ids: dict[int, int] = {}
        """Line of each id that a bad line has taken, by digest: a later one is a duplicate."""
        self.num_bad = 0
        """Bad lines of this shard."""
        self.num_lines = 0
        """Number of the last line."""

    def check(self, *, skip_bad_lines: bool) -> None:
        """Check every line, of other shards too, so that all shards fail alike.

        Raises:
            BatchInputError: lines cannot be used and are not to be skipped, or ask for
                something else than what was answered under their id; lists them all.
        """
        problems, changed = Problems(self._source.place), Problems(self._source.place)
        for line in self._source.lines():
            self.num_lines = line.number
            parsed = parse(line, self._source.max_line_bytes, self._sizes)
            if isinstance(parsed, BadLine):
                error: InvalidRequestError | None = parsed.error
                self._bad_ids.setdefault(digest(parsed.custom_id), line.number)
            else:
                error = self._note(parsed, changed)
            if error is not None:
                self.num_bad += self._shard.owns(line.number)
                problems.add(line.number, str(error))
        if problems and not skip_bad_lines:
            raise _refusal(
                f"job.input: cannot use {counted(len(problems), 'line')}; nothing was started "
                "(job.on_bad_line=skip runs the others)",
                problems,
            )
        if changed:
            raise _refusal(
                f"job.input: {counted(len(changed), 'request')} changed since an answer was "
                "written under the same custom_id; give new ids, or job.overwrite=true starts over",
                changed,
            )

    def pending(self) -> Iterator[Item | BadLine]:
        """The requests without an answer, and the bad lines, of this shard, in input order.

        Raises:
            BatchInputError: the input is not what ``check`` saw.
        """
        for line in self._source.lines():
            if not self._shard.owns(line.number):
                continue
            parsed = parse(line, self._source.max_line_bytes, self._sizes)
            if isinstance(parsed, BadLine):
                yield parsed
                continue
            number = self._line_of(parsed.custom_id, line.number)
            if number is None or number > line.number:
                raise BatchInputError(
                    f"{self._source.place(line.number)}: changed while the job was reading it; "
                    "run the same command again"
                )
            if number < line.number:
                yield BadLine(line.number, parsed.custom_id, self._duplicate(parsed, number))
            elif not self.ledger.is_answered(parsed.custom_id):
                yield parsed

    def _line_of(self, custom_id: str, number: int) -> int | None:
        """The line that has this id, looked at from line ``number``."""
        bad = self._bad_ids.get(digest(custom_id))
        return bad if bad is not None and bad < number else self.ledger.line_number(custom_id)

    def _note(self, item: Item, changed: Problems) -> InvalidRequestError | None:
        earlier = self._line_of(item.custom_id, item.number)
        if earlier is not None:
            return self._duplicate(item, earlier)
        is_mine = self._shard.owns(item.number)
        if not self.ledger.add(item.number, item.custom_id, item.request_hash, is_mine=is_mine):
            changed.add(item.number, f"custom_id {item.custom_id!r}")
        return None

    def _duplicate(self, item: Item, earlier: int) -> InvalidRequestError:
        return InvalidRequestError(
            f"custom_id: {item.custom_id!r} is also at {self._source.place(earlier)}"
        )


def _refusal(headline: str, problems: Problems) -> BatchInputError:
    listed = problems.listed()
    return BatchInputError("\n  ".join([headline, *listed]), listed)
