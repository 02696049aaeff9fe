"""The manifest beside a batch's answers: what they were made with.

A later run goes on with the answers only if what decides them is the same: the model, the
sampling defaults and the seed. How the model is spread over devices may change.
"""

from __future__ import annotations

import hashlib
import json
import platform
import struct
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ember_pp import config as configuration
from ember_pp.config import BatchJob, Config
from ember_pp.errors import CheckpointError, ConfigError

MANIFEST_FORMAT = 1
_NUM_SAMPLES = 64
_SAMPLE_BYTES = 4096
_TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")


def build_manifest(
    config: Config,
    job: BatchJob,
    *,
    fingerprint: str,
    inputs: list[dict[str, Any]],
    files: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a run; ``decides`` holds what a later run must have the same."""
    return {
        "format": MANIFEST_FORMAT,
        "decides": {
            "model": fingerprint,
            "model.dtype": config.model.dtype,
            "model.load": config.model.load,
            "model.context_length": config.model.context_length,
            **{f"sampling.{name}": value for name, value in config.sampling.given().items()},
            "sampling.seed": config.sampling.seed,
        },
        "versions": {
            "ember-pp": _version("ember-pp"),
            "python": platform.python_version(),
            "torch": _version("torch"),
        },
        "input": inputs,
        "job.shard": job.shard,
        "files": dict(files),
        "config": configuration.to_plain(config),
    }


def check_same(old: Mapping[str, Any], new: Mapping[str, Any], answers: Path) -> None:
    """Check that a run with manifest ``new`` may go on with the answers of ``old``.

    Raises:
        ConfigError: names each setting that differs, with both values.
    """
    before, now = old.get("decides"), new["decides"]
    if old.get("format") != new["format"] or not isinstance(before, dict):
        raise ConfigError(
            f"job.output: {answers} was written by another version of ember-pp; finish it with "
            "that one, or job.overwrite=true starts over"
        )
    differing = [
        f"{key} was {_shown(before, key)} and is {_shown(now, key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"job.output: the answers in {answers} were made with other settings: "
            f"{'; '.join(differing)}. Change them back, give another job.output, or "
            "job.overwrite=true starts over"
        )


def _shown(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if value is None:
        return "not set"
    return f"one with fingerprint {str(value)[:12]}" if key == "model" else str(value)


def fingerprint_folder(folder: Path) -> str:
    """A hash that changes when the model in ``folder`` does, read in well under a second.

    Of configuration and tokenizer files it has every byte. Of weight files it has name, size,
    header and 64 samples of 4 KiB spread evenly: it tells models and fine-tunes of a model
    apart, but is no checksum against damage. Times do not enter: a copy is the same model.

    Raises:
        CheckpointError: a file cannot be read.
    """
    state = hashlib.sha256()
    try:
        for path in sorted(folder.iterdir()):
            for part in _parts_that_count(path):
                state.update(struct.pack("<Q", len(part)))
                state.update(part)
    except OSError as error:
        raise CheckpointError(f"model.path: {error.filename}: {error.strerror}") from None
    return state.hexdigest()


def fingerprint_plain(description: Any) -> str:
    """A hash of plain values, e.g. an architecture or what a coordinator says of its model."""
    text = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _parts_that_count(path: Path) -> Iterator[bytes]:
    if path.suffix == ".safetensors":
        yield path.name.encode()
        yield from _weight_parts(path)
    elif path.suffix in _TEXT_SUFFIXES and path.is_file():
        yield path.name.encode()
        yield path.read_bytes()


def _weight_parts(path: Path) -> Iterator[bytes]:
    num_bytes = path.stat().st_size
    yield struct.pack("<Q", num_bytes)
    with path.open("rb") as file:
        header = file.read(8)
        if len(header) == 8:
            yield file.read(min(struct.unpack("<Q", header)[0], num_bytes))
        start = file.tell()
        stride = max(_SAMPLE_BYTES, (num_bytes - start) // _NUM_SAMPLES)
        for offset in range(start, num_bytes, stride):
            file.seek(offset)
            yield file.read(_SAMPLE_BYTES)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
