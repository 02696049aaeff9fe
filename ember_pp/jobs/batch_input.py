"""Batch input: which files there are, and their lines.

The input is read twice, as a stream: once to check every line before anything is started,
once to run what is pending. A line's *number* counts from 1 over all input files, blank lines
too; ``place`` turns it back to ``file:line``.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import glob
import gzip
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from ember_pp.errors import BatchInputError, ConfigError, EmberError, InvalidRequestError

_GZIP_MAGIC = b"\x1f\x8b"
_UTF8_BOM = b"\xef\xbb\xbf"


# --------------------------------------------------------------------------------------
# files


@dataclasses.dataclass(frozen=True, slots=True)
class InputFile:
    """One input file; what can be read only once has been copied to an unlinked ``spool``."""

    name: str
    path: Path
    spool: BinaryIO | None
    num_bytes: int
    stamp: tuple[int, ...]
    """Size, modification time and identity when the job began; empty for a spool."""

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The unpacked bytes from the beginning.

        Raises:
            BatchInputError: the file cannot be read, or changed since the job began.
        """
        if self.spool is not None:
            self.spool.seek(0)
            yield _unpacked(self.spool)
            return
        try:
            raw = self.path.open("rb")
        except OSError as error:
            raise BatchInputError(f"{self.name}: cannot be read: {error.strerror}") from None
        with raw:
            self._check_unchanged(raw)
            yield _unpacked(raw)
            self._check_unchanged(raw)

    def _check_unchanged(self, raw: BinaryIO) -> None:
        if _stamp(os.fstat(raw.fileno())) != self.stamp:
            raise BatchInputError(
                f"{self.name}: changed while the job was reading it; run the same command again"
            )


def _unpacked(raw: BinaryIO) -> BinaryIO:
    is_gzip = raw.read(2) == _GZIP_MAGIC
    raw.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if is_gzip else raw


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)


def find_files(given: Any, *, exclude: Collection[Path] = ()) -> list[InputFile]:
    """The input files that ``job.input`` names: a file, a list, a glob, or ``-`` for stdin.

    A glob's matches come in sorted order, without those in ``exclude`` (the job's own output,
    which may lie beside its input).

    Raises:
        ConfigError: nothing matches, a file is missing, a folder, unreadable or named twice.
    """
    entries = list(given) if isinstance(given, list | tuple) else [given]
    if not entries:
        raise ConfigError("job.input: an empty list; give at least one file")
    names: list[str] = []
    for entry in entries:
        names += _expand(entry, {path.resolve() for path in exclude})
    files: list[InputFile] = []
    seen: set[tuple[int, ...]] = set()
    for name in names:
        file = _spool_stdin() if name == "-" else _stat_file(name)
        identity = file.stamp[2:] or (-1,)
        if identity in seen:
            raise ConfigError(f"job.input: {name} is named twice")
        if file.spool is None or name == "-":
            seen.add(identity)
        files.append(file)
    return files


def _expand(entry: Any, exclude: set[Path]) -> list[str]:
    if not isinstance(entry, str) or not entry:
        raise ConfigError(
            f"job.input: expected a file, a list of files, a glob or -; got {entry!r}"
        )
    if entry == "-" or not glob.has_magic(entry) or os.path.exists(entry):
        return [entry]
    matches = sorted(glob.glob(entry, recursive=True))
    matches = [m for m in matches if not os.path.isdir(m) and Path(m).resolve() not in exclude]
    if not matches:
        raise ConfigError(f"job.input: no file matches {entry}")
    return matches


def _stat_file(name: str) -> InputFile:
    path = Path(name)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ConfigError(f"job.input: {name} is a folder; give files or a glob like {name}/*")
        with path.open("rb") as file:
            if not stat.S_ISREG(status.st_mode):  # a pipe, as of <(...): can be read only once
                return _spool(file, name)
    except OSError as error:
        raise ConfigError(f"job.input: {name} cannot be read: {error.strerror}") from None
    return InputFile(name, path, None, status.st_size, _stamp(status))


def _spool_stdin() -> InputFile:
    return _spool(sys.stdin.buffer, "-")


def _spool(source: BinaryIO, name: str) -> InputFile:
    spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  lives as long as the input
    try:
        shutil.copyfileobj(source, spool)
        spool.flush()
    except OSError as error:
        spool.close()
        raise EmberError(
            f"{name}: cannot be copied to {tempfile.gettempdir()}: {error.strerror}; "
            "set TMPDIR to a folder with more space"
        ) from None
    return InputFile(name, Path(name), spool, spool.tell(), ())


# --------------------------------------------------------------------------------------
# lines


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank."""

    number: int
    """From 1, over all input files, blank lines counted."""
    raw: bytes | None
    """Without its line ending; None: longer than allowed."""


class BatchInput:
    """The lines of all input files, as often as asked for.

    ``max_line_bytes`` bounds a line, since a request must fit a message to the coordinator.
    """

    def __init__(self, files: list[InputFile], *, max_line_bytes: int) -> None:
        self.files = files
        self.max_line_bytes = max_line_bytes
        self._first_numbers: list[int] = []
        """Number of each file's first line, as far as files have been read."""

    def lines(self) -> Iterator[Line]:
        """Every line that is not blank.

        Raises:
            BatchInputError: a file cannot be read or changed; names file and line.
        """
        number = 0
        for index, file in enumerate(self.files):
            if index == len(self._first_numbers):
                self._first_numbers.append(number + 1)
            with file.open() as opened:
                for raw in self._raw_lines(file, opened):
                    number += 1
                    if raw is None or not raw.isspace():
                        yield Line(number, None if raw is None else raw.rstrip(b"\r\n"))

    def place(self, number: int) -> str:
        """``file:line`` of a line that has been read."""
        index = bisect.bisect_right(self._first_numbers, number) - 1
        return f"{self.files[index].name}:{number - self._first_numbers[index] + 1}"

    def describe(self) -> list[dict[str, Any]]:
        """Names and sizes, for the manifest."""
        return [{"name": file.name, "num_bytes": file.num_bytes} for file in self.files]

    def close(self) -> None:
        """Let go of what was spooled."""
        for file in self.files:
            if file.spool is not None:
                file.spool.close()

    def _raw_lines(self, file: InputFile, opened: BinaryIO) -> Iterator[bytes | None]:
        count = 0
        try:
            while raw := self._raw_line(opened):
                if count == 0:
                    raw = raw.removeprefix(_UTF8_BOM) or b"\n"
                count += 1
                if len(raw) > self.max_line_bytes:
                    self._skip_rest(opened, raw)
                    yield None
                else:
                    yield raw
        except (OSError, EOFError, zlib.error) as error:
            raise BatchInputError(
                f"{file.name}: cannot be read past line {count}: {error}"
            ) from None

    def _raw_line(self, opened: BinaryIO) -> bytes:
        return opened.readline(self.max_line_bytes + 1)

    def _skip_rest(self, opened: BinaryIO, raw: bytes) -> None:
        while raw and not raw.endswith(b"\n"):
            raw = self._raw_line(opened)


def decode_line(raw: bytes) -> dict[str, Any]:
    """The JSON object in ``raw``.

    Stricter than ``json.loads``: what two readers would understand differently is refused
    (a key twice, ``NaN``, half of a surrogate pair), as are nested depths it cannot follow.

    Raises:
        InvalidRequestError: says what is wrong and where in the line.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"not UTF-8: byte {error.start + 1} of the line") from None
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"not JSON: {error.msg} at column {error.colno}") from None
    except UnicodeEncodeError:
        raise InvalidRequestError("not JSON: half of a surrogate pair in a string") from None
    except RecursionError:
        raise InvalidRequestError("not usable JSON: nested too deeply") from None
    except InvalidRequestError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise InvalidRequestError(f"not usable JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"expected a JSON object, got {type(value).__name__}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InvalidRequestError(f"not usable JSON: key {twice!r} is there twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"not JSON: {name}")
