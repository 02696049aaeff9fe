"""Checkpoints in Hugging Face layout: found, checked from their headers, read by name.

The only file that imports ``safetensors`` and ``huggingface_hub``, both where they are used:
finding and checking a checkpoint loads neither them nor torch, so that a bad one is reported
before any process starts. Files are read here and not by ``safetensors``: its reader wants numpy
or torch even for the header, and maps the file, which loads at a third of the disk's speed.

The format, per file: u64 little-endian length of the header, the header as JSON (name ->
``dtype``, ``shape``, ``data_offsets`` from the end of the header), the tensors without gaps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ember_pp.errors import CheckpointError
from ember_pp.model_config import EMBEDDING, FINAL_NORM, LM_HEAD, ModelConfig

BUNDLED_MODEL = "demo"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LAYOUT = (
    f"expected a folder in Hugging Face layout: config.json, {SINGLE_FILE} (or {INDEX_FILE} "
    "and the shards it names), tokenizer.json"
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "vocab*", "merges.txt")
_HUB_SKIPPED = ("*/*", "consolidated*")

_ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4}
_FOREIGN_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
_MAX_JSON_BYTES = 100_000_000  # of the other files; the index of 405 billion parameters has 0.1 MB
_MAX_DIMENSIONS = 8
_MAX_NAME_CHARS = 512
_READ_BYTES = 16 * 1024 * 1024
_GIT_LFS_POINTER = b"version https://git-lfs"

# Buffers that older writers stored among the parameters; they follow from config.json.
_IGNORED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")


# --------------------------------------------------------------------------------------
# finding


def locate(path: str, revision: str | None = None, *, config_only: bool = False) -> Path:
    """The folder that ``model.path`` means.

    ``demo`` is the bundled model, whatever lies in the working directory (``./demo`` is the
    folder); an existing folder is taken as it is; anything else that looks like one is a hub
    id: first from the local cache, then downloaded (``config_only``: ``config.json`` alone).

    Raises:
        CheckpointError: no such folder, or neither a folder nor downloadable, and why.
    """
    if path == BUNDLED_MODEL:
        return Path(__file__).parent / "demo"
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"model.path: {path} is a file; give the folder that holds it")
    if not _HUB_ID.fullmatch(path):
        raise CheckpointError(f"model.path: no folder {path}; {LAYOUT}")
    return _from_hub(path, revision, config_only=config_only)


def _from_hub(repo_id: str, revision: str | None, *, config_only: bool) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, rarely needed

    reason = ""
    for is_local in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    repo_id,
                    revision=revision,
                    allow_patterns=["config.json"] if config_only else list(_HUB_FILES),
                    ignore_patterns=list(_HUB_SKIPPED),
                    local_files_only=is_local,
                )
            )
        except Exception as error:  # noqa: BLE001  the library, http and the disk raise many types
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if not is_local or (config_only and _exists(folder / "config.json")):
            return folder
        if _is_complete(folder):
            return folder
    raise CheckpointError(
        f"model.path: {repo_id} is neither a folder nor a model that the Hugging Face hub or its "
        f"local cache could give: {reason}"
    )


def _is_complete(folder: Path) -> bool:
    """Whether a cached snapshot has its weights: an interrupted download leaves a part."""
    try:
        read_config(folder)
        return all(path.is_file() for path in _shard_paths(folder))
    except CheckpointError:
        return False


# --------------------------------------------------------------------------------------
# configuration files


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint.

    Raises:
        CheckpointError: the folder or the file is missing, unreadable or not a JSON map.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; {LAYOUT}")
    if not _exists(folder / "config.json"):
        raise CheckpointError(f"{folder}: no config.json; {LAYOUT}")
    return _read_json(folder / "config.json")


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json``, ``{}`` where there is none; errors as ``read_config``."""
    path = folder / "generation_config.json"
    return _read_json(path) if _exists(path) else {}


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error) from None
    return True


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def _refuse_other_kinds(path: Path) -> None:
    """A pipe would keep us waiting for its writer; a folder fails by itself when it is read."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise CheckpointError(f"{path}: is no regular file; copy or download it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        _refuse_other_kinds(path)
        with path.open("rb") as file:
            text = file.read(_MAX_JSON_BYTES + 1)
        if len(text) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: more than {_MAX_JSON_BYTES} bytes; is it that file?")
        value = json.loads(text)
    except OSError as error:
        raise _unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); copy or download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON map, got {type(value).__name__}")
    return value


# --------------------------------------------------------------------------------------
# tensors


def expected_tensors(
    cfg: ModelConfig, start_layer: int, end_layer: int, *, is_first: bool, is_last: bool
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a slice ``[start_layer, end_layer)``.

    A tied lm_head is the embedding: its name is then in the first and in the last slice.
    """
    matrix = (cfg.vocab_size, cfg.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: matrix} if is_first else {}
    for layer_index in range(start_layer, end_layer):
        for name, shape in cfg.layer_shapes().items():
            shapes[f"model.layers.{layer_index}.{name}"] = shape
    if is_last:
        shapes[FINAL_NORM] = (cfg.hidden_size,)
        shapes[EMBEDDING if cfg.tie_word_embeddings else LM_HEAD] = matrix
    return shapes


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: ``path[start_byte:end_byte]``."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start_byte: int
    end_byte: int

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return self.end_byte - self.start_byte


@dataclasses.dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a checkpoint folder, by name; made by ``open``."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all weight files, and nothing else of them.

        Raises:
            CheckpointError: no weights, an index that is damaged or leaves the folder, a shard
                that is missing, unreadable, cut short or damaged, or lacks a tensor that the
                index says it has; the text names the file.
        """
        folder = Path(folder)
        tensors: dict[str, StoredTensor] = {}
        for path in _shard_paths(folder):
            for name, stored in _read_header(path).items():
                if name in tensors:
                    raise CheckpointError(
                        f"{path}: {name} is in {tensors[name].path.name} as well; remove the file "
                        "that does not belong to this checkpoint"
                    )
                tensors[name] = stored
        _check_index(folder, tensors)
        return cls(folder, tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def num_bytes(self, names: Iterable[str]) -> int:
        """Bytes on disk of these tensors."""
        return sum(self.tensors[name].num_bytes for name in names)

    def check(self, cfg: ModelConfig) -> None:
        """Compare the headers with what ``cfg`` asks for.

        A tied model may store its ``lm_head.weight`` as well; ``rotary_emb.inv_freq`` and
        the like, which follow from the configuration, may be there.

        Raises:
            CheckpointError: a tensor is missing, extra, misshapen, or of a type that is not
                bfloat16, float16 or float32; the text names it and its file.
        """
        expected = expected_tensors(cfg, 0, cfg.num_layers, is_first=True, is_last=True)
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {_listed(missing)} missing; config.json asks for "
                f"{cfg.num_layers} layers of model_type {cfg.model_type}"
            )
        if cfg.tie_word_embeddings and LM_HEAD in self.tensors:
            expected[LM_HEAD] = expected[EMBEDDING]
        extra = [
            name for name in self.tensors if name not in expected and not _IGNORED.fullmatch(name)
        ]
        if extra:
            raise CheckpointError(
                f"{self.tensors[extra[0]].path}: {_listed(extra)} not part of what config.json "
                f"describes ({cfg.num_layers} layers of model_type {cfg.model_type}); "
                "the two belong to different models"
            )
        for name, shape in expected.items():
            _check_tensor(name, self.tensors[name], shape)

    def in_disk_order(self, names: Iterable[str]) -> list[str]:
        """``names`` in the order in which a disk reads them best: file by file, front to back."""

        def place(name: str) -> tuple[Path, int]:
            return self.tensors[name].path, self.tensors[name].start_byte

        return sorted(names, key=place)

    def read_into(self, name: str, buffer: memoryview, *, start_byte: int = 0) -> None:
        """Fill ``buffer`` with the stored bytes of a tensor from its ``start_byte`` on.

        Plain reads into the caller's memory: on a mapped file every page would fault, which
        is slower than the disk.

        Raises:
            CheckpointError: the file has gone or changed since ``open``.
        """
        stored = self.tensors[name]
        assert start_byte + buffer.nbytes <= stored.num_bytes, (name, start_byte, buffer.nbytes)
        num_done = 0
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.start_byte + start_byte)
                while num_done < buffer.nbytes:
                    num_read = file.readinto(buffer[num_done : num_done + _READ_BYTES])
                    if not num_read:
                        raise CheckpointError(f"{stored.path}: became shorter while it was read")
                    num_done += num_read
        except OSError as error:
            raise _unreadable(stored.path, error) from None


def save_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors as one safetensors file; the folder is made if it is missing."""
    from safetensors.torch import save_file  # brings in torch

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Any]:
    """What ``save_tensors`` wrote, on the CPU; the file is mapped, and read where it is used."""
    from safetensors.torch import load_file

    return load_file(path)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown}: {'tensor' if len(names) == 1 else f'{len(names)} tensors'}"


def _check_tensor(name: str, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    if stored.dtype not in _ITEM_BYTES:
        raise CheckpointError(
            f"{stored.path}: {name}: dtype {stored.dtype} is not supported (quantised weights?); "
            f"expected one of {', '.join(_ITEM_BYTES)}"
        )
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.path}: {name}: config.json asks for shape {list(shape)}, "
            f"the file has {list(stored.shape)}"
        )


def _shard_paths(folder: Path) -> list[Path]:
    """The weight files, in order. The single file wins over an index, as in transformers."""
    if _exists(folder / SINGLE_FILE):
        return [folder / SINGLE_FILE]
    index_path = folder / INDEX_FILE
    if not _exists(index_path):
        found = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".gguf"))
        hint = f"; {found[0]} is another format: convert it to safetensors" if found else ""
        raise CheckpointError(f"{folder}: no {SINGLE_FILE} and no {INDEX_FILE}{hint}; {LAYOUT}")
    return [folder / name for name in sorted(set(_read_weight_map(index_path).values()))]


def _read_weight_map(index_path: Path) -> dict[str, str]:
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index_path}: weight_map: expected a map from tensors to files")
    for name, file_name in weight_map.items():
        if not _is_name(name):
            raise CheckpointError(f"{index_path}: weight_map: {name[:80]!r} is no tensor's name")
        if not isinstance(file_name, str) or not file_name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path}: {name}: expected the name of a .safetensors file, got {file_name!r}"
            )
        pure = PurePosixPath(file_name)
        # By the name alone: in the hub's cache every file is a link that leads elsewhere.
        if pure.is_absolute() or ".." in pure.parts or "\\" in file_name or "\0" in file_name:
            raise CheckpointError(
                f"{index_path}: {name}: {file_name!r} leads out of the checkpoint folder"
            )
    return weight_map


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if _exists(folder / SINGLE_FILE):
        return
    for name, file_name in _read_weight_map(folder / INDEX_FILE).items():
        if name not in tensors or tensors[name].path != folder / file_name:
            raise CheckpointError(
                f"{folder / file_name}: no tensor {name}, which {INDEX_FILE} says is in it; "
                "copy or download the checkpoint again"
            )


# --------------------------------------------------------------------------------------
# headers


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        _refuse_other_kinds(path)
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            start = file.read(len(_GIT_LFS_POINTER))
            if start == _GIT_LFS_POINTER:
                raise CheckpointError(
                    f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` there"
                )
            header_bytes = int.from_bytes(start[:8], "little")
            if len(start) < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
                raise _damaged(path, f"{file_bytes} bytes, its header is cut short or damaged")
            file.seek(8)
            header = file.read(header_bytes)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: missing, but {INDEX_FILE} names it; copy or download it"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    return _parse_header(path, header, file_bytes)


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}; copy or download it again")


def _parse_header(path: Path, header: bytes, file_bytes: int) -> dict[str, StoredTensor]:
    data_start = 8 + len(header)
    try:
        entries = json.loads(header, object_pairs_hook=_unique_keys)
        entries.pop("__metadata__", None)
        tensors = {
            _checked_name(name): _stored_tensor(path, entry, data_start)
            for name, entry in entries.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(path, "its header is damaged") from None
    _check_ranges(path, tensors, data_start, file_bytes)
    return tensors


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that is there twice, two readers might each take another tensor."""
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key is there twice")
    return value


def _is_name(name: str) -> bool:
    """Names are shown to people: no terminal is to obey one."""
    return name.isprintable() and 0 < len(name) <= _MAX_NAME_CHARS


def _checked_name(name: str) -> str:
    if not _is_name(name):
        raise ValueError("no tensor's name")
    return name


def _stored_tensor(path: Path, entry: Any, data_start: int) -> StoredTensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    # By type: int() would take true, 1.5 and "7", and two negative sizes have a fine product.
    numbers_are_sizes = all(type(number) is int and number >= 0 for number in (*shape, start, end))
    if not isinstance(dtype, str) or not isinstance(shape, list) or not numbers_are_sizes:
        raise TypeError("not a tensor")
    if len(shape) > _MAX_DIMENSIONS or not dtype.isprintable():
        raise ValueError("not a tensor")
    return StoredTensor(path, dtype, tuple(shape), data_start + start, data_start + end)


def _check_ranges(
    path: Path, tensors: Mapping[str, StoredTensor], data_start: int, file_bytes: int
) -> None:
    """Every byte belongs to one tensor, and each has as many as its shape and dtype take."""
    end_byte = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: _byte_range(item[1])):
        item_bytes = (_ITEM_BYTES | _FOREIGN_ITEM_BYTES).get(stored.dtype)
        is_sized = item_bytes is None or stored.num_bytes == math.prod(stored.shape) * item_bytes
        if stored.start_byte != end_byte or stored.num_bytes < 0 or not is_sized:
            raise _damaged(path, f"its header is damaged at {name}")
        end_byte = stored.end_byte
    if end_byte > file_bytes:
        raise _damaged(path, f"cut short: {file_bytes} of {end_byte} bytes")
    if end_byte < file_bytes:
        raise _damaged(path, f"damaged: {file_bytes} bytes, its header accounts for {end_byte}")


def _byte_range(stored: StoredTensor) -> tuple[int, int]:
    return stored.start_byte, stored.end_byte  # an empty tensor before the one that begins there
