"""load_stage: each stage its slice, in its place, whatever the dtype; random weights by name."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ember_pp.checkpoint import Checkpoint, expected_tensors, read_config
from ember_pp.model_config import ModelConfig
from ember_pp.partition import stage_weight_bytes
from ember_pp.stage import weights as weights_module
from ember_pp.stage.weights import StageWeights, load_stage
from numeric import assert_bitwise_equal
from paged_model import PagedModel

BOTH_ENDS = [(True, True), (True, False), (False, True), (False, False)]


def load(
    source: Path | None,
    cfg: ModelConfig,
    layers: tuple[int, int],
    ends: tuple[bool, bool],
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int, int], None] | None = None,
    device: str = "cpu",
) -> StageWeights:
    return load_stage(
        None if source is None else Checkpoint.open(source),
        cfg,
        *layers,
        is_first=ends[0],
        is_last=ends[1],
        dtype=dtype,
        device=device,
        on_progress=on_progress,
    )


@pytest.fixture(scope="module")
def llama(make_checkpoint: Callable[..., Path]) -> Path:
    """Every bias there is, and a head of its own."""
    return make_checkpoint("llama", attention_bias=True, mlp_bias=True, dtype="bfloat16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_tensor_is_in_its_place(llama: Path, dtype: torch.dtype) -> None:
    cfg = ModelConfig.from_hf(read_config(llama))
    stored = {name: t.to(dtype) for name, t in load_file(llama / "model.safetensors").items()}

    weights = load(llama, cfg, (1, 3), (True, True), dtype)

    assert_bitwise_equal(weights.embedding, stored["model.embed_tokens.weight"])
    assert_bitwise_equal(weights.final_norm, stored["model.norm.weight"])
    assert_bitwise_equal(weights.lm_head, stored["lm_head.weight"])
    for index, layer in enumerate(weights.layers):

        def part(*names: str, prefix: str = f"model.layers.{index + 1}.") -> Tensor:
            return torch.cat([stored[prefix + name] for name in names])

        qkv = [f"self_attn.{name}_proj" for name in "qkv"]
        assert_bitwise_equal(layer.input_norm, part("input_layernorm.weight"))
        assert_bitwise_equal(layer.qkv, part(*(f"{name}.weight" for name in qkv)))
        assert_bitwise_equal(layer.qkv_bias, part(*(f"{name}.bias" for name in qkv)))
        assert_bitwise_equal(layer.output, part("self_attn.o_proj.weight"))
        assert_bitwise_equal(layer.output_bias, part("self_attn.o_proj.bias"))
        assert_bitwise_equal(layer.post_attention_norm, part("post_attention_layernorm.weight"))
        assert_bitwise_equal(layer.gate_up, part("mlp.gate_proj.weight", "mlp.up_proj.weight"))
        assert_bitwise_equal(layer.gate_up_bias, part("mlp.gate_proj.bias", "mlp.up_proj.bias"))
        assert_bitwise_equal(layer.down, part("mlp.down_proj.weight"))
        assert_bitwise_equal(layer.down_bias, part("mlp.down_proj.bias"))
        assert layer.qk_norm is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_pieces_of_a_large_tensor_make_the_whole(
    tiny_checkpoint: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    whole = load(tiny_checkpoint, cfg, (0, 8), (True, True), dtype)
    monkeypatch.setattr(weights_module, "_STAGING_BYTES", 1000)
    pieces = load(tiny_checkpoint, cfg, (0, 8), (True, True), dtype)
    for ours, theirs in zip(tensors_of(pieces), tensors_of(whole), strict=True):
        assert_bitwise_equal(ours, theirs)


@pytest.mark.gpu
def test_gpu_holds_the_same_bits(tiny_checkpoint: Path) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    cpu = load(tiny_checkpoint, cfg, (0, 8), (True, True), torch.bfloat16)
    gpu = load(tiny_checkpoint, cfg, (0, 8), (True, True), torch.bfloat16, device="cuda")
    for ours, theirs in zip(tensors_of(gpu), tensors_of(cpu), strict=True):
        assert ours.is_cuda
        assert_bitwise_equal(ours.cpu(), theirs)


def test_qk_norm_is_repeated_for_each_head(tiny_checkpoint: Path) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    name = "model.layers.7.self_attn.{}_norm.weight"
    stored = load_file(Checkpoint.open(tiny_checkpoint).tensors[name.format("q")].path)
    layer = load(tiny_checkpoint, cfg, (7, 8), (False, False)).layers[0]
    assert layer.qk_norm.shape == (cfg.num_heads + cfg.num_kv_heads, cfg.head_dim)
    for row in layer.qk_norm[: cfg.num_heads]:
        assert_bitwise_equal(row, stored[name.format("q")])
    for row in layer.qk_norm[cfg.num_heads :]:
        assert_bitwise_equal(row, stored[name.format("k")])


@pytest.mark.parametrize("ends", BOTH_ENDS)
def test_reads_the_bytes_of_its_slice_and_no_more(
    tiny_checkpoint: Path, ends: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    asked: dict[str, int] = {}
    real_read_into = Checkpoint.read_into

    def recorded(self: Checkpoint, name: str, buffer: memoryview, **start: int) -> None:
        asked[name] = asked.get(name, 0) + buffer.nbytes
        real_read_into(self, name, buffer, **start)

    monkeypatch.setattr(Checkpoint, "read_into", recorded)
    progress: list[tuple[int, int]] = []

    weights = load(
        tiny_checkpoint, cfg, (2, 4), ends, on_progress=lambda *done: progress.append(done)
    )

    wanted = expected_tensors(cfg, 2, 4, is_first=ends[0], is_last=ends[1])
    assert asked == {name: 4 * math.prod(shape) for name, shape in wanted.items()}
    num_bytes = Checkpoint.open(tiny_checkpoint).num_bytes(wanted)
    assert progress[-1] == (num_bytes, num_bytes)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    counted = stage_weight_bytes(
        cfg, (2, 4), is_first=ends[0], is_last=ends[1], bytes_per_element=4
    )
    assert num_bytes == counted
    repeated = 4 * cfg.head_dim * (cfg.num_heads + cfg.num_kv_heads - 2) * 2  # QK norm, 2 layers
    assert weights.num_bytes == counted + repeated


def test_a_tied_head_is_shared_on_one_stage_and_loaded_on_the_last_of_many(
    tiny_checkpoint: Path,
) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    one = load(tiny_checkpoint, cfg, (0, 8), (True, True))
    last = load(tiny_checkpoint, cfg, (7, 8), (False, True))
    assert one.lm_head is one.embedding
    assert last.embedding is None
    assert_bitwise_equal(last.lm_head, one.embedding)


def test_an_equal_head_stored_beside_a_tied_embedding_takes_no_memory(
    make_checkpoint: Callable[..., Path],
) -> None:
    folder = make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=False)
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(read_config(folder) | {"tie_word_embeddings": True})
    )
    cfg = ModelConfig.from_hf(read_config(folder))

    weights = load(folder, cfg, (0, 3), (True, True))

    assert weights.lm_head is weights.embedding


# --------------------------------------------------------------------------------------
# random weights


def tensors_of(weights: StageWeights) -> list[Tensor]:
    tensors = [weights.embedding, weights.final_norm, weights.lm_head]
    for layer in weights.layers:
        tensors += vars_of(layer)
    return [tensor for tensor in tensors if tensor is not None]


def vars_of(layer: object) -> list[Tensor | None]:
    return [getattr(layer, field.name) for field in dataclasses.fields(layer)]  # type: ignore[arg-type]


def test_random_weights_do_not_depend_on_the_split(llama: Path) -> None:
    cfg = ModelConfig.from_hf(read_config(llama))
    whole = load(None, cfg, (0, 3), (True, True))
    first = load(None, cfg, (0, 1), (True, False))
    last = load(None, cfg, (1, 3), (False, True))
    assert_bitwise_equal(first.embedding, whole.embedding)
    assert_bitwise_equal(last.lm_head, whole.lm_head)
    for split, one in zip([*first.layers, *last.layers], whole.layers, strict=True):
        for ours, theirs in zip(vars_of(split), vars_of(one), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert_bitwise_equal(ours, theirs)
    assert not torch.equal(whole.layers[0].qkv, whole.layers[1].qkv)


def test_random_tied_head_is_the_embedding_on_every_split(demo_path: Path) -> None:
    cfg = ModelConfig.from_hf(read_config(demo_path))
    first = load(None, cfg, (0, 1), (True, False))
    last = load(None, cfg, (9, 10), (False, True))
    assert_bitwise_equal(last.lm_head, first.embedding)


def test_random_weights_have_the_bytes_and_kinds_of_a_checkpoint(tiny_checkpoint: Path) -> None:
    cfg = ModelConfig.from_hf(read_config(tiny_checkpoint))
    progress: list[tuple[int, int]] = []
    random = load(None, cfg, (0, 8), (True, True), on_progress=lambda *done: progress.append(done))
    stored = load(tiny_checkpoint, cfg, (0, 8), (True, True))
    shapes = [tensor.shape for tensor in tensors_of(random)]
    assert shapes == [tensor.shape for tensor in tensors_of(stored)]
    assert progress[-1][0] == progress[-1][1]
    assert float(random.layers[0].input_norm.mean()) == pytest.approx(1.0, abs=0.05)


def test_activations_of_random_weights_stay_near_one_through_64_layers(
    tiny_checkpoint: Path,
) -> None:
    cfg = dataclasses.replace(
        ModelConfig.from_hf(read_config(tiny_checkpoint)), num_layers=64, vocab_size=500
    )
    model = PagedModel(None, cfg=cfg, dtype=torch.bfloat16)
    hidden: list[Tensor] = []

    logits = model.step({"a": list(range(60))}, hidden=hidden)

    deviations = [float(states.float().std()) for states in hidden]
    assert all(0.02 < deviation < 10 for deviation in deviations), deviations
    assert 0.2 < float(logits.std()) < 5
    assert len(set(logits.argmax(-1).tolist())) > 5
