"""Batch output: answers made durable as they end, and found again by the next run.

Three files: the answers, the errors, and a manifest that says what they were made with.
An answer is one line that ends with its line feed; whatever a crash leaves behind the last
line feed is cut off by the next run. Each line holds the hash of its request, so the answers
alone say what is done, and no journal can disagree with them.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TextIO

from ember_pp.errors import ConfigError, EmberError
from ember_pp.jobs.batch_answers import REQUEST_HASH_KEY
from ember_pp.jobs.batch_requests import digest

SYNC_INTERVAL_S = 0.5
SYNC_BYTES = 4 * 1024 * 1024


class LineFile:
    """Lines appended to a file, made durable in groups.

    Raises:
        EmberError: a write or fsync failed, as on a full disk; the text names the file. Lines
            before the last ``sync`` that returned are kept.
    """

    def __init__(self, name: str, fd: int, *, is_durable: bool) -> None:
        self.name = name
        self.fd = fd
        self._is_durable = is_durable
        self._num_unsynced_bytes = 0
        self._last_sync_s = 0.0
        self._failure: EmberError | None = None

    def append(self, line: bytes) -> None:
        """Write ``line``, which ends with its line feed."""
        if self._failure is not None:  # half a line may be at the end: nothing may follow it
            raise self._failure
        try:
            view = memoryview(line)
            while view:
                view = view[os.write(self.fd, view) :]
        except OSError as error:
            raise self._fail(error) from None
        self._num_unsynced_bytes += len(line)

    def is_sync_due(self, now_s: float) -> bool:
        """Whether what was appended has waited long enough, or is enough, to be synced."""
        waited_s = now_s - self._last_sync_s
        return self._num_unsynced_bytes > 0 and (
            waited_s >= SYNC_INTERVAL_S or self._num_unsynced_bytes >= SYNC_BYTES
        )

    def sync(self, now_s: float) -> None:
        """Return when all that was appended is on the disk."""
        if self._num_unsynced_bytes and self._is_durable:
            try:
                os.fsync(self.fd)
            except OSError as error:
                raise self._fail(error) from None
        self._num_unsynced_bytes = 0
        self._last_sync_s = now_s

    def truncate(self, num_bytes: int = 0) -> None:
        """Keep the first ``num_bytes``, durably."""
        os.ftruncate(self.fd, num_bytes)
        os.fsync(self.fd)

    def _fail(self, error: OSError) -> EmberError:
        if error.errno == errno.EPIPE:
            self._failure = EmberError(f"{self.name}: whoever was reading it has gone")
        else:
            self._failure = EmberError(f"{self.name}: cannot be written: {error.strerror}")
        return self._failure


class BatchOutput:
    """The output files of one job, locked against other runs while open.

    ``path`` and ``errors_path`` are None for standard streams: then nothing is locked, nothing
    can be resumed and there is no manifest.

    Raises:
        ConfigError: a folder is missing, a file cannot be written, belongs to something else
            or is in use by another run.
    """

    def __init__(self, path: Path | None, errors_path: Path | None) -> None:
        self.path = path
        self.errors_path = errors_path
        self.is_resumable = path is not None and _is_regular(path)
        self.num_torn_bytes = 0
        self._num_kept_bytes = 0
        self._created: list[Path] = []
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as on_failure:
            on_failure.push(self)
            self.answers = self._open(path, sys.stdout, "job.output")
            self.errors = self._open(errors_path, sys.stderr, "job.errors")
            on_failure.pop_all()

    def is_sync_due(self, now_s: float) -> bool:
        """As ``LineFile.is_sync_due``, of either file."""
        return self.answers.is_sync_due(now_s) or self.errors.is_sync_due(now_s)

    def sync(self, now_s: float) -> None:
        """As ``LineFile.sync``, of both files."""
        self.answers.sync(now_s)
        self.errors.sync(now_s)

    @property
    def manifest_path(self) -> Path | None:
        """Where the manifest lies; None when the output cannot be resumed."""
        if not self.is_resumable or self.path is None:
            return None
        return self.path.with_name(self.path.name + ".manifest.json")

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error_type is not None:
            self._remove_empty()
        self._stack.close()

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of the run that made the answers; None: there are no answers yet.

        Raises:
            ConfigError: the files are not those of an earlier run.
        """
        if self.manifest_path is None or self.path is None:
            return None
        manifest = _load_manifest(self.manifest_path)
        for key, path in (("job.output", self.path), ("job.errors", self.errors_path)):
            recorded = None if manifest is None else manifest.get("files", {}).get(key)
            is_ours = path is None or recorded == path.name or not _is_regular(path)
            if path is not None and not is_ours and path.stat().st_size > 0:
                raise ConfigError(
                    f"{key}: {path} is there and was not written by this job; give another name, "
                    "or job.overwrite=true to throw it away"
                )
        return manifest if self.path.stat().st_size > 0 else None

    def read_answered(self) -> dict[int, int]:
        """Digest of each answered ``custom_id`` to the digest of its request.

        What follows the last line feed is not an answer; ``start`` cuts it off.

        Raises:
            ConfigError: a line is not an answer of this job; names it.
        """
        answered: dict[int, int] = {}
        if not self.is_resumable or self.path is None:
            return answered
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                answer = _parse_answer(raw)
                if answer is None and not file.peek(1):
                    self.num_torn_bytes = len(raw)
                    break
                if answer is None or answer[0] in answered:
                    what = "no answer of this job" if answer is None else "an id answered before"
                    raise ConfigError(
                        f"job.output: {self.path}:{number} is {what}; take that line out, or "
                        "job.overwrite=true starts over"
                    )
                answered[answer[0]] = answer[1]
                self._num_kept_bytes += len(raw)
        return answered

    def start(self, manifest: Mapping[str, Any], *, keep_answers: bool) -> None:
        """Make the files ready for the first answer: torn line, old errors, manifest.

        Every request without an answer is tried again, so old errors are all superseded. The
        answers are emptied before a manifest that they do not belong to can be seen.
        """
        try:
            if self.is_resumable:
                self.answers.truncate(self._num_kept_bytes if keep_answers else 0)
            if self.errors_path is not None and _is_regular(self.errors_path):
                self.errors.truncate()
            if self.manifest_path is not None:
                text = json.dumps(manifest, indent=2, ensure_ascii=False, allow_nan=False)
                write_atomically(self.manifest_path, [text.encode("utf-8"), b"\n"])
        except OSError as error:
            raise EmberError(f"{self.path}: cannot be written: {error.strerror}") from None

    def sort(self, line_number_of: Callable[[int], int | None], num_lines: int) -> bool:
        """Bring the answers into input order; True if anything had to move.

        ``line_number_of`` maps the digest of a ``custom_id`` to its place in the input, from 1
        to ``num_lines``; answers to none of its lines go to the end. The sorted file replaces
        the old one in one step.
        """
        assert self.path is not None
        offsets = array.array("q", [-1]) * (num_lines + 1)
        others = array.array("q")
        is_sorted, latest, offset = True, 0, 0
        with self.path.open("rb") as file:
            for raw in file:
                answer = _parse_answer(raw)
                assert answer is not None  # all were read or written by this run
                number = line_number_of(answer[0])
                is_sorted &= latest <= (number or num_lines + 1)
                latest = number or num_lines + 1
                if number is None:
                    others.append(offset)
                else:
                    offsets[number] = offset
                offset += len(raw)
            if is_sorted:
                return False
            in_order = itertools.chain((o for o in offsets if o >= 0), others)
            try:
                write_atomically(self.path, _lines_at(file, in_order))
            except OSError as error:
                raise EmberError(
                    f"{self.path}: complete, but cannot be written again in the order of the "
                    f"input: {error.strerror}; the same command tries again"
                ) from None
        return True

    def _remove_empty(self) -> None:
        """A run that was refused leaves no empty files behind."""
        with contextlib.suppress(OSError):
            if any(path.stat().st_size for path in self._created):
                return
            for path in self._created:
                path.unlink()
            if self.path in self._created and self.manifest_path is not None:
                self.manifest_path.unlink(missing_ok=True)

    def _open(self, path: Path | None, standard: TextIO, key: str) -> LineFile:
        if path is None:
            standard.flush()
            name, fd = standard.name.strip("<>"), os.dup(standard.fileno())
        else:
            is_new = not path.exists()
            name, fd = str(path), _open_locked(path, key)
            if is_new:
                self._created.append(path)
        self._stack.callback(os.close, fd)
        return LineFile(name, fd, is_durable=stat.S_ISREG(os.fstat(fd).st_mode))


def write_atomically(path: Path, content: Iterable[bytes]) -> None:
    """Make ``path`` hold ``content``, durably; whatever happens it holds the old or the new."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(fd)
    finally:
        os.close(fd)


def _lines_at(file: BinaryIO, offsets: Iterable[int]) -> Iterator[bytes]:
    for offset in offsets:
        file.seek(offset)
        yield file.readline()


def _parse_answer(raw: bytes) -> tuple[int, int] | None:
    """Digests of ``custom_id`` and request; None when ``raw`` is no whole answer."""
    if not raw.endswith(b"\n"):
        return None
    try:
        answer = json.loads(raw)
        return digest(answer["custom_id"]), digest(answer[REQUEST_HASH_KEY])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _load_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ConfigError(f"{path}: damaged; job.overwrite=true starts over")
    return manifest


def _is_regular(path: Path) -> bool:
    """Whether ``path`` is, or will be, an ordinary file: no pipe or device."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _open_locked(path: Path, key: str) -> int:
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            raise ConfigError(
                f"{key}: the folder {path.parent} does not exist; make it first"
            ) from None
        except OSError as error:
            raise ConfigError(f"{key}: {path} cannot be written: {error.strerror}") from None
        try:
            _lock(fd, path, key)
            if not stat.S_ISREG(os.fstat(fd).st_mode) or _is_at(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """False when another run replaced or removed the file between our open and our lock."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _lock(fd: int, path: Path, key: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"{key}: another run is writing {path}; wait for it, or give another name"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
