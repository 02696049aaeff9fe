"""Builds CUDA kernels with NVRTC at first use, and keeps them in a cache of the user's.

A kernel is one instantiation of a template in ``csrc/``. What it is built from decides its key:
the source and every file that it includes, the expression, flags, the compiler's version and the
architecture. The first process that needs a key builds it under a file lock and puts it in place
with one rename; others wait for the lock, look again, and find it. A file that is damaged is
built anew. Nothing is built at import, and nothing is written into the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import os
import re
import tempfile
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ember_pp.errors import KernelBuildError

SOURCES = Path(__file__).with_name("csrc")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that every kernel compiles for; 90 is tuned."""
CACHE_VARIABLE = "EMBER_KERNEL_CACHE"

_FLAGS: Mapping[str, Any] = types.MappingProxyType(
    {"std": "c++17", "ptxas_options": ("-v",), "lineinfo": True}
)
_EPILOGUE = "\nusing namespace ember;\n"  # where expressions are looked up
_MAGIC = b"ember-pp kernel 1\n"
_UNUSED_SECONDS = 90 * 24 * 3600
_INCLUDE = re.compile(r'^\s*#include\s+"([^"]+)"', re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True)
class KernelSource:
    """One kernel: ``expression`` names an instantiation in ``file``, such as
    ``rms_norm_kernel<float, 4, 1, false>``; names are looked up in the namespace ``ember``."""

    file: str
    expression: str
    folder: Path = SOURCES


@dataclasses.dataclass(frozen=True, slots=True)
class Binary:
    """A kernel in machine code."""

    symbol: str
    """Its mangled name."""
    cubin: bytes
    log: str = ""
    """What the compiler said: registers, shared memory, spills. Empty if it came from the cache."""

    def to_bytes(self) -> bytes:
        """As stored: checksum, symbol, code."""
        body = self.symbol.encode() + b"\n" + self.cubin
        return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def from_bytes(cls, stored: bytes) -> Binary | None:
        """None where these are not the bytes that ``to_bytes`` gave."""
        checksum, _, body = stored.removeprefix(_MAGIC).partition(b"\n")
        is_whole = hashlib.sha256(body).hexdigest().encode() == checksum
        if not stored.startswith(_MAGIC) or not is_whole:
            return None
        symbol, _, cubin = body.partition(b"\n")
        return cls(symbol.decode(), cubin)


def default_cache() -> Path:
    """``$EMBER_KERNEL_CACHE``, else ``ember_pp/kernels`` below ``$XDG_CACHE_HOME`` or
    ``~/.cache``."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "ember_pp" / "kernels"


def compiler_version() -> tuple[int, int]:
    """Of NVRTC.

    Raises:
        KernelBuildError: it is not installed; names the extra that brings it.
    """
    with _naming_the_extra():
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        assert int(status) == 0, status
    return int(major), int(minor)


def sources_of(kernel: KernelSource) -> dict[str, str]:
    """Name and text of the kernel's file and of all that it includes, in the order of reading."""
    texts: dict[str, str] = {}
    pending = [kernel.file]
    while pending:
        name = pending.pop()
        if name not in texts:
            texts[name] = (kernel.folder / name).read_text(encoding="ascii")
            pending += reversed(_INCLUDE.findall(texts[name]))
    return texts


def key_of(kernel: KernelSource, architecture: int, compiler: tuple[int, int]) -> str:
    """What a built kernel is found by: a digest of everything that it is built from."""
    parts = [kernel.expression, _target(architecture), repr(compiler), repr(dict(_FLAGS))]
    for name, text in sources_of(kernel).items():
        parts += [name, text]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} {part}".encode())
    return digest.hexdigest()[:32]


def compile_kernel(kernel: KernelSource, architecture: int) -> Binary:
    """Compile, whatever the cache holds.

    Raises:
        KernelBuildError: the compiler is missing or refused; names the file and the architecture
            and holds the compiler's log.
    """
    with _naming_the_extra():
        from cuda.core import Program, ProgramOptions

    log, name = io.StringIO(), kernel.expression
    options = ProgramOptions(
        name=kernel.file, arch=_target(architecture), include_path=str(kernel.folder), **_FLAGS
    )
    try:
        text = (kernel.folder / kernel.file).read_text("ascii") + _EPILOGUE
        program = Program(text, "c++", options)
        built = program.compile("cubin", name_expressions=[name], logs=log)
    except Exception as error:  # noqa: BLE001  the types of cuda.core's errors are private
        raise KernelBuildError(
            f"{kernel.file}, {kernel.expression}, sm_{architecture}: not built: {error}"
        ) from None
    return Binary(built.symbol_mapping[name].decode(), bytes(built.code), log.getvalue())


def _target(architecture: int) -> str:
    """``sm_90a`` has what the architectures after it have not: wgmma."""
    return f"sm_{architecture}{'a' if architecture == 90 else ''}"


def load_or_compile(kernel: KernelSource, architecture: int, cache: Path) -> Binary:
    """From the cache, or compiled and kept there.

    Raises:
        KernelBuildError: as ``compile_kernel``; or the cache cannot be written to.
    """
    key = key_of(kernel, architecture, compiler_version())
    path = cache / f"{Path(kernel.file).stem}-sm_{architecture}-{key}.bin"
    try:
        if (found := _read(path)) is not None:
            return found
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if (found := _read(path)) is not None:  # another process was faster
                return found
            binary = compile_kernel(kernel, architecture)
            _write(path, binary.to_bytes())
            _remove_unused(cache)
    except OSError as error:
        raise KernelBuildError(
            f"{cache}: built kernels cannot be kept there: {error}; {CACHE_VARIABLE} names "
            "another folder"
        ) from None
    return binary


def _read(path: Path) -> Binary | None:
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    return Binary.from_bytes(stored)


def _write(path: Path, stored: bytes) -> None:
    """All of it or nothing, whenever this process ends."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".building-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(stored)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The lock ends with the process that holds it, however that ends; its file stays."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_unused(cache: Path) -> None:
    """What was built long ago is most likely of an older version; if not, it is built again."""
    oldest = time.time() - _UNUSED_SECONDS
    for path in cache.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < oldest:
                path.unlink()


@contextlib.contextmanager
def _naming_the_extra() -> Iterator[None]:
    """A missing package, or a missing library of one, as an error that says what to install."""
    missing: tuple[type[Exception], ...] = (ImportError,)
    with contextlib.suppress(ImportError):
        from cuda.pathfinder import DynamicLibNotFoundError

        missing += (DynamicLibNotFoundError,)
    try:
        yield
    except missing as error:
        first_line = str(error).partition("\n")[0]
        raise KernelBuildError(
            f"CUDA kernels need the extra 'cuda' (pip install 'ember-pp[cuda]'): {first_line}"
        ) from None
