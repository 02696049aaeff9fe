"""Checkpoints: found, checked from headers alone, read by name; every damage named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ember_pp import checkpoint
from ember_pp.checkpoint import (
    INDEX_FILE,
    Checkpoint,
    expected_tensors,
    load_tensors,
    locate,
    read_config,
    read_generation_config,
    save_tensors,
)
from ember_pp.errors import CheckpointError
from ember_pp.model_config import ModelConfig

SINGLE = "model.safetensors"


@pytest.fixture(scope="module")
def single(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=True)


@pytest.fixture
def sharded_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "sharded"))


@pytest.fixture
def single_copy(single: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(single, tmp_path / "single"))


def open_and_check(folder: Path) -> Checkpoint:
    opened = Checkpoint.open(folder)
    opened.check(ModelConfig.from_hf(read_config(folder)))
    return opened


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    edit(tensors)
    save_file(tensors, folder / SINGLE)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


# --------------------------------------------------------------------------------------
# reading


def test_headers_tell_names_shapes_and_bytes(single: Path, tiny_checkpoint: Path) -> None:
    for folder in (single, tiny_checkpoint):
        opened = open_and_check(folder)
        stored: dict[str, torch.Tensor] = {}
        for path in folder.glob("*.safetensors"):
            stored |= load_file(path)
        assert {name: tensor.shape for name, tensor in opened.tensors.items()} == {
            name: tuple(tensor.shape) for name, tensor in stored.items()
        }
        assert opened.total_bytes == sum(tensor.nbytes for tensor in stored.values())
        for name, tensor in stored.items():
            assert torch.equal(read_tensor(opened, name), tensor), name


def read_tensor(opened: Checkpoint, name: str) -> torch.Tensor:
    stored = opened.tensors[name]
    buffer = bytearray(stored.num_bytes)
    opened.read_into(name, memoryview(buffer))
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[stored.dtype]
    return torch.frombuffer(buffer, dtype=dtype).view(stored.shape)


def test_reads_a_part_in_pieces(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_READ_BYTES", 7)
    opened = open_and_check(single)
    name = "model.layers.1.mlp.up_proj.weight"
    buffer = bytearray(100)

    opened.read_into(name, memoryview(buffer), start_byte=48)

    stored = load_file(single / SINGLE)[name].flatten()[12:37]
    assert torch.equal(torch.frombuffer(buffer, dtype=torch.float32), stored)


def test_disk_order_is_file_by_file_front_to_back(tiny_checkpoint: Path) -> None:
    opened = Checkpoint.open(tiny_checkpoint)
    ordered = opened.in_disk_order(sorted(opened.tensors))
    places = [(opened.tensors[name].path, opened.tensors[name].start_byte) for name in ordered]
    assert places == sorted(places)
    assert sorted(ordered) == sorted(opened.tensors)


def test_open_and_check_load_neither_torch_nor_numpy(tiny_checkpoint: Path) -> None:
    code = (
        "import sys; from ember_pp.checkpoint import *; from ember_pp.model_config import *;"
        "folder = locate(sys.argv[1]);"
        "Checkpoint.open(folder).check(ModelConfig.from_hf(read_config(folder)));"
        "print(sorted({'torch', 'numpy', 'safetensors'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tiny_checkpoint)], capture_output=True, text=True
    )
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_check_is_quick_for_a_large_index(tmp_path: Path) -> None:
    """A header of 64 layers is read and compared in far less than a process takes to start."""
    import time

    cfg = ModelConfig.from_hf(
        {
            "model_type": "qwen3",
            "hidden_size": 8,
            "num_hidden_layers": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "intermediate_size": 8,
            "vocab_size": 16,
            "max_position_embeddings": 64,
        }
    )
    shapes = expected_tensors(cfg, 0, 64, is_first=True, is_last=True)
    names = list(shapes)
    weight_map = {}
    for shard in range(17):
        file_name = f"model-{shard:05}.safetensors"
        part = {name: torch.zeros(shapes[name]) for name in names[shard::17]}
        save_file(part, tmp_path / file_name)
        weight_map |= dict.fromkeys(part, file_name)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))

    started = time.process_time()
    Checkpoint.open(tmp_path).check(cfg)
    assert time.process_time() - started < 1.0


def test_save_tensors_is_read_back(tmp_path: Path) -> None:
    tensors = {"layer.0": torch.randn(3, 4).T, "ids": torch.arange(3)}
    save_tensors(tmp_path / "new" / "tap.safetensors", tensors)
    for read in (load_file, load_tensors):
        loaded = read(tmp_path / "new" / "tap.safetensors")
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


# --------------------------------------------------------------------------------------
# accepted oddities


def test_known_buffers_and_a_stored_tied_head_are_accepted(single_copy: Path) -> None:
    def add(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["model.rotary_emb.inv_freq"] = torch.zeros(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(single_copy, add)
    open_and_check(single_copy)


def test_float16_is_accepted(single_copy: Path) -> None:
    edit_tensors(
        single_copy, lambda tensors: tensors.update({n: t.half() for n, t in tensors.items()})
    )
    open_and_check(single_copy)


def test_files_may_be_links_out_of_the_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As in the hub's cache."""
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    open_and_check(tmp_path)


# --------------------------------------------------------------------------------------
# damage


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def truncate(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def corrupt(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(bytes(data))


def rename_in_header(path: Path, old: bytes, new: bytes) -> None:
    """Same length, so that the rest of the file stays where it is."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def append(path: Path, new: bytes) -> None:
    path.write_bytes(path.read_bytes() + new)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def claim_everything_is_in(folder: Path, file_name: str) -> None:
    edit_index(folder, lambda index: index.update(weight_map={"lm_head.weight": file_name}))


SHARDED_DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (
        lambda folder: truncate(shards_of(folder)[1], shards_of(folder)[1].stat().st_size - 5),
        r"00002-of-\d+.safetensors: cut short: \d+ of \d+ bytes; copy or download it again",
    ),
    "cut in the header": (
        lambda folder: truncate(shards_of(folder)[0], 100),
        r"00001-of-\d+.safetensors: 100 bytes, its header is cut short or damaged",
    ),
    "empty file": (
        lambda folder: shards_of(folder)[0].write_bytes(b""),
        r"00001-of-\d+.safetensors: 0 bytes, its header is cut short",
    ),
    "bytes too many": (
        lambda folder: append(shards_of(folder)[0], b"x"),
        r"00001-of-\d+.safetensors: damaged: \d+ bytes, its header accounts for \d+",
    ),
    "header not JSON": (
        lambda folder: corrupt(shards_of(folder)[0], 20, b"\xff\xff"),
        r"00001-of-\d+.safetensors: its header is damaged; copy",
    ),
    "header length absurd": (
        lambda folder: corrupt(shards_of(folder)[0], 0, b"\xff" * 8),
        r"00001-of-\d+.safetensors: \d+ bytes, its header is cut short or damaged",
    ),
    "offsets do not fit the shape": (
        lambda folder: rename_in_header(shards_of(folder)[0], b'"F32"', b'"F16"'),
        r"00001-of-\d+.safetensors: its header is damaged at model",
    ),
    "git lfs pointer": (
        lambda folder: shards_of(folder)[0].write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
        ),
        r"00001-of-\d+.safetensors: is a Git LFS pointer.*git lfs pull",
    ),
    "missing shard": (
        lambda folder: shards_of(folder)[2].unlink(),
        r"00003-of-\d+.safetensors: missing, but model.safetensors.index.json names it",
    ),
    "shard is a folder": (
        lambda folder: replace_by_folder(shards_of(folder)[2]),
        r"00003-of-\d+.safetensors: cannot be read: Is a directory",
    ),
    "index not JSON": (
        lambda folder: (folder / INDEX_FILE).write_text("{"),
        r"model.safetensors.index.json: not JSON",
    ),
    "index of deep nesting": (
        lambda folder: (folder / INDEX_FILE).write_text("[" * 100_000),
        r"model.safetensors.index.json: not JSON",
    ),
    "index without a map": (
        lambda folder: (folder / INDEX_FILE).write_text("{}"),
        r"model.safetensors.index.json: weight_map: expected a map",
    ),
    "index names a number": (
        lambda folder: claim_everything_is_in(folder, 3),  # type: ignore[arg-type]
        r"index.json: lm_head.weight: expected the name of a .safetensors file, got 3",
    ),
    "index names a pickle": (
        lambda folder: claim_everything_is_in(folder, "pytorch_model.bin"),
        r"expected the name of a .safetensors file, got 'pytorch_model.bin'",
    ),
    "index leaves the folder": (
        lambda folder: claim_everything_is_in(folder, "../other/model.safetensors"),
        r"'../other/model.safetensors' leads out of the checkpoint folder",
    ),
    "index names an absolute path": (
        lambda folder: claim_everything_is_in(folder, "/etc/model.safetensors"),
        r"'/etc/model.safetensors' leads out of the checkpoint folder",
    ),
    "index leaves the folder on the way": (
        lambda folder: claim_everything_is_in(folder, "sub/../../model.safetensors"),
        r"'sub/../../model.safetensors' leads out of the checkpoint folder",
    ),
    "index names a name that rings": (
        lambda folder: edit_index(
            folder, lambda index: index["weight_map"].update({"a\x07": "model.safetensors"})
        ),
        r"weight_map: 'a\\x07' is no tensor's name",
    ),
    "shard lacks what the index says": (
        lambda folder: rename_in_header(
            shards_of(folder)[1], b"layers.0.mlp.up_proj.weight", b"layers.0.mlp.ap_proj.weight"
        ),
        r"no tensor model.layers.0.mlp.up_proj.weight, which model.safetensors.index.json says",
    ),
    "a tensor in two shards": (
        lambda folder: (
            shutil.copy(shards_of(folder)[0], folder / "model-00009.safetensors"),
            edit_index(
                folder,
                lambda index: index["weight_map"].update(
                    {"model.layers.99.x": "model-00009.safetensors"}
                ),
            ),
        ),
        r"model-00009.safetensors: \S+ is in model-00001-of-\d+.safetensors as well",
    ),
}


@pytest.mark.parametrize("damage", SHARDED_DAMAGE)
def test_damage_of_a_sharded_checkpoint_is_named(damage: str, sharded_copy: Path) -> None:
    apply, message = SHARDED_DAMAGE[damage]
    apply(sharded_copy)
    with pytest.raises(CheckpointError, match=message):
        open_and_check(sharded_copy)


# --------------------------------------------------------------------------------------
# headers


def entry(start: Any = 0, end: Any = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def write_single(folder: Path, header: bytes | dict[str, Any], num_bytes: int = 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * num_bytes)
    return path


def test_a_header_by_hand_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "b": entry(8, 8, [3, 0]),
        "a": entry(),
        "scalar": entry(8, 12, []),
    }
    write_single(tmp_path, header, 12)
    found = Checkpoint.open(tmp_path).tensors
    assert {name: (stored.shape, stored.num_bytes) for name, stored in found.items()} == {
        "b": ((3, 0), 0),
        "a": ((2,), 8),
        "scalar": ((), 4),
    }


LYING_HEADERS: dict[str, bytes | dict[str, Any]] = {
    "no map": b"[]",
    "a number": b"7",
    "nothing": b"",
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"\xff": 1}',
    "a name twice": b'{"a": %s, "a": %s}' % ((json.dumps(entry()).encode(),) * 2),
    "a key twice in a tensor": b'{"a": {"dtype":"F32","dtype":"BF16","shape":[2],'
    b'"data_offsets":[0,8]}}',
    "no name": {"": entry()},
    "a name that rings": {"a\x07": entry()},
    "a name without end": {"a" * 513: entry()},
    "half a surrogate pair": b'{"\\ud800": %s}' % json.dumps(entry()).encode(),
    "an entry that is none": {"a": 7},
    "no dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "dtype no text": {"a": entry(dtype=["F32"])},
    "shape no list": {"a": entry(shape="2")},
    "one offset": {"a": entry() | {"data_offsets": [0]}},
    "three offsets": {"a": entry() | {"data_offsets": [0, 8, 8]}},
    "sizes whose product is right": {"a": entry(shape=[-1, -2])},
    "a fraction": {"a": entry(shape=[2.0])},
    "text": {"a": entry(shape=["2"])},
    "true": {"a": entry(shape=[True, 2])},
    "infinite": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}',
    "a number of many digits": b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, 8]}}'
    % (b"9" * 5000),
    "many dimensions": {"a": entry(shape=[1] * 9 + [2])},
    "before the data": {"a": entry(-8, 0)},
    "backwards": {"a": entry(8, 0)},
    "more than its shape takes": {"a": entry(shape=[1])},
    "less than its shape takes": {"a": entry(shape=[3])},
    "another dtype than its bytes": {"a": entry(dtype="BF16")},
    "a hole before it": {"a": entry(4, 8, [1])},
    "an overlap": {"a": entry(0, 4, [1]), "b": entry(2, 6, [1]), "c": entry(6, 8, [1], "F16")},
    "the same bytes twice": {"a": entry(), "b": entry()},
}


@pytest.mark.parametrize("lie", LYING_HEADERS)
def test_a_header_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    write_single(tmp_path, LYING_HEADERS[lie])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its header is damaged"):
        Checkpoint.open(tmp_path)


def test_a_header_beyond_the_limit_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_single(tmp_path, {"a": entry()})
    monkeypatch.setattr(checkpoint, "_MAX_HEADER_BYTES", path.stat().st_size - 17)
    with pytest.raises(CheckpointError, match="its header is cut short or damaged"):
        Checkpoint.open(tmp_path)


def test_a_file_that_claims_more_than_it_has_is_refused(tmp_path: Path) -> None:
    write_single(tmp_path, {"a": entry(0, 2**62, [2**60])})
    with pytest.raises(CheckpointError, match="cut short"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pipe_is_not_waited_for(name: str, single_copy: Path) -> None:
    (single_copy / name).unlink()
    os.mkfifo(single_copy / name)
    with pytest.raises(CheckpointError, match=rf"{name}: is no regular file"):
        open_and_check(single_copy)


def test_a_huge_config_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"a": "%s"}' % ("x" * 1000))
    monkeypatch.setattr(checkpoint, "_MAX_JSON_BYTES", 1000)
    with pytest.raises(CheckpointError, match=r"config\.json: more than 1000 bytes"):
        read_config(tmp_path)


NORM = "model.layers.1.post_attention_layernorm.weight"
TENSOR_DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "one missing": (
        lambda tensors: tensors.pop(NORM),
        rf"{NORM}: tensor missing; config.json asks for 3 layers of model_type qwen3",
    ),
    "many missing": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if ".2." in name],
        r"model.layers.2.\S+, \S+, \S+ and 8 more: 11 tensors missing",
    ),
    "one extra": (
        lambda tensors: tensors.update({"model.layers.0.mlp.gate.weight": torch.zeros(1)}),
        r"model.safetensors: model.layers.0.mlp.gate.weight: tensor not part of what config.json",
    ),
    "misshapen": (
        lambda tensors: tensors.update({NORM: torch.zeros(47)}),
        rf"model.safetensors: {NORM}: config.json asks for shape \[48\], the file has \[47\]",
    ),
    "misshapen tied head": (
        lambda tensors: tensors.update({"lm_head.weight": torch.zeros(130, 48)}),
        r"lm_head.weight: config.json asks for shape \[131, 48\], the file has \[130, 48\]",
    ),
    "quantised": (
        lambda tensors: tensors.update({NORM: torch.zeros(48, dtype=torch.uint8)}),
        rf"{NORM}: dtype U8 is not supported \(quantised weights\?\)",
    ),
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE)
def test_tensors_that_do_not_fit_the_config_are_named(damage: str, single_copy: Path) -> None:
    apply, message = TENSOR_DAMAGE[damage]
    edit_tensors(single_copy, apply)
    with pytest.raises(CheckpointError, match=message):
        open_and_check(single_copy)


def test_an_untied_model_needs_its_head(single_copy: Path) -> None:
    config = read_config(single_copy) | {"tie_word_embeddings": False}
    (single_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"lm_head.weight: tensor missing"):
        open_and_check(single_copy)


def test_a_file_that_changes_while_it_is_read(single_copy: Path) -> None:
    opened = open_and_check(single_copy)
    last = opened.in_disk_order(opened.tensors)[-1]
    truncate(single_copy / SINGLE, 1000)
    with pytest.raises(CheckpointError, match=r"model.safetensors: became shorter while it was"):
        read_tensor(opened, last)
    (single_copy / SINGLE).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: No such file"):
        read_tensor(opened, last)


# --------------------------------------------------------------------------------------
# folders and small files


def test_no_weights_says_what_is_expected(single_copy: Path) -> None:
    (single_copy / SINGLE).rename(single_copy / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"no model.safetensors and .*pytorch_model.bin is an"
    ):
        Checkpoint.open(single_copy)


def test_folder_without_config_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json; expected a folder in Hugging Face"):
        read_config(tmp_path)
    with pytest.raises(CheckpointError, match=r"nowhere: no such folder; expected a folder"):
        read_config(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [("{]", "not JSON"), ("[1]", "expected a JSON map, got list"), ("\xff", "not JSON")],
)
def test_config_that_is_no_map(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
        read_config(tmp_path)


def test_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read: Is a directory"):
        read_config(tmp_path)


def test_weights_that_may_not_be_read(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:  # root, as CI may be, is refused nothing
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read: Permission"):
        Checkpoint.open(single)


def test_generation_config_is_optional(tmp_path: Path, demo_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}
    assert read_generation_config(demo_path)["eos_token_id"] is not None


# --------------------------------------------------------------------------------------
# locate


def test_demo_is_the_bundled_model_whatever_lies_here(
    tmp_path: Path, demo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert locate("demo").samefile(demo_path)
    assert locate("./demo").samefile(tmp_path / "demo")


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    assert locate("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize("path", ["/no/such/folder", "./none", "a/b/c", "~/none", ""])
def test_a_missing_folder_is_never_looked_up(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_from_hub", lambda *_: pytest.fail("asked the hub"))
    if path == "":
        assert locate(path) == Path()
        return
    with pytest.raises(CheckpointError, match=r"model.path: no folder .*; expected a folder in"):
        locate(path)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a file; give the folder that holds it"):
        locate(str(path))


class FakeHub:
    """``snapshot_download``: what the cache has, and what the network would give."""

    def __init__(self, cached: Path | None, remote: Path | Exception) -> None:
        self.cached, self.remote = cached, remote
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if options["local_files_only"]:
            if self.cached is None:
                raise FileNotFoundError("not in the cache")
            return str(self.cached)
        if isinstance(self.remote, Exception):
            raise self.remote
        return str(self.remote)


@pytest.fixture
def use_hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeHub], FakeHub]:
    import huggingface_hub

    def use(hub: FakeHub) -> FakeHub:
        monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
        return hub

    return use


def test_the_cache_is_enough(use_hub: Callable[[FakeHub], FakeHub], tiny_checkpoint: Path) -> None:
    hub = use_hub(FakeHub(tiny_checkpoint, RuntimeError("no network")))
    assert locate("Some/Model-1B", "v2") == tiny_checkpoint
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"]) == ("Some/Model-1B", "v2")
    assert "*.safetensors" in call["allow_patterns"]
    assert not any("bin" in pattern for pattern in call["allow_patterns"])


def test_for_a_plan_the_configuration_is_enough(
    use_hub: Callable[[FakeHub], FakeHub], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub = use_hub(FakeHub(tmp_path, RuntimeError("no network")))
    assert locate("Some/Model", config_only=True) == tmp_path
    hub = use_hub(FakeHub(None, tmp_path))
    assert locate("Some/Model", config_only=True) == tmp_path
    assert [call["allow_patterns"] for call in hub.calls] == [["config.json"]] * 2
    (tmp_path / "config.json").unlink()  # a cached folder without it does not do
    hub = use_hub(FakeHub(tmp_path, tmp_path))
    locate("Some/Model", config_only=True)
    assert [call["local_files_only"] for call in hub.calls] == [True, False]


def test_half_a_download_in_the_cache_is_completed(
    use_hub: Callable[[FakeHub], FakeHub], sharded_copy: Path, tiny_checkpoint: Path
) -> None:
    shards_of(sharded_copy)[0].unlink()
    hub = use_hub(FakeHub(sharded_copy, tiny_checkpoint))
    assert locate("Some/Model") == tiny_checkpoint
    assert [call["local_files_only"] for call in hub.calls] == [True, False]


def test_neither_folder_nor_model_says_why(use_hub: Callable[[FakeHub], FakeHub]) -> None:
    use_hub(FakeHub(None, ConnectionError("the network is down\nwith details")))
    with pytest.raises(
        CheckpointError,
        match=r"model.path: gpt7 is neither a folder nor a model .*: ConnectionError: the network "
        r"is down$",
    ) as failure:
        locate("gpt7")
    assert failure.value.__suppress_context__ or failure.value.__context__ is None


def test_the_real_library_fails_the_same_way_offline(tmp_path: Path) -> None:
    """HF_HUB_OFFLINE is set for all tests; the true exception types come through."""
    with pytest.raises(CheckpointError, match=r"ember-pp/no-such-model is neither a folder nor"):
        locate("ember-pp/no-such-model")
