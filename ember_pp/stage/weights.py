"""The weights of one stage: read from a checkpoint by name, or random.

Projections that read the same input are stored as one matrix: Q, K and V, and gate and up. A
tensor is read from the file straight into its place there, or converted on the way.

Shape letters: D hidden, H query heads, K KV heads, d head dim, I intermediate, V vocabulary.
"""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import math
import types
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ember_pp.checkpoint import Checkpoint, expected_tensors
from ember_pp.model_config import EMBEDDING, FINAL_NORM, LM_HEAD, ModelConfig

_STAGING_BYTES = 16 * 1024 * 1024
_STORED_DTYPES = types.MappingProxyType(
    {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
)

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are done and the bytes in all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One decoder layer; biases and QK norm are None where the model has none."""

    input_norm: Tensor  # [D]
    qkv: Tensor  # [(H + 2K) * d, D]
    qkv_bias: Tensor | None  # [(H + 2K) * d]
    qk_norm: Tensor | None  # [H + K, d], the query heads' weight H times, then the keys' K times
    output: Tensor  # [D, H * d]
    output_bias: Tensor | None  # [D]
    post_attention_norm: Tensor  # [D]
    gate_up: Tensor  # [2I, D]
    gate_up_bias: Tensor | None  # [2I]
    down: Tensor  # [D, I]
    down_bias: Tensor | None  # [D]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageWeights:
    """A stage's slice of the model."""

    embedding: Tensor | None
    """[V, D] on the first stage."""
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor | None
    """[D] on the last stage."""
    lm_head: Tensor | None
    """[V, D] on the last stage; the same tensor as ``embedding`` where both are here and tied."""

    @property
    def num_bytes(self) -> int:
        """Device bytes, a shared embedding counted once."""
        tensors = [self.embedding, self.final_norm, self.lm_head]
        for layer in self.layers:
            tensors += [getattr(layer, field.name) for field in dataclasses.fields(layer)]
        return sum({id(t): t.nbytes for t in tensors if t is not None}.values())


def load_stage(
    checkpoint: Checkpoint | None,
    cfg: ModelConfig,
    start_layer: int,
    end_layer: int,
    *,
    is_first: bool,
    is_last: bool,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: OnProgress | None = None,
) -> StageWeights:
    """The weights of ``[start_layer, end_layer)``, and of embedding and head where they belong.

    Of the checkpoint (checked against ``cfg`` before) only these tensors are read. Without one
    weights are random, seeded by each tensor's name: the same for every split (but not the
    same numbers on a GPU as on the CPU).

    Raises:
        CheckpointError: a file has gone or changed since it was checked.
    """
    names = expected_tensors(cfg, start_layer, end_layer, is_first=is_first, is_last=is_last)
    head_name = EMBEDDING if cfg.tie_word_embeddings else LM_HEAD
    if cfg.tie_word_embeddings and is_last and checkpoint and LM_HEAD in checkpoint.tensors:
        # The file has a head although it is tied. What it says counts, as in transformers.
        head_name = LM_HEAD
        names[LM_HEAD] = names[EMBEDDING]
        if not is_first:
            del names[EMBEDDING]
    places = _Places(cfg, dtype, device)
    weights = places.stage(
        start_layer, end_layer, EMBEDDING if is_first else None, head_name if is_last else None
    )
    assert set(places.by_name) == set(names), "a tensor without a place, or the other way round"
    if checkpoint:
        _read(checkpoint, places.by_name, on_progress)
    else:
        _draw(cfg, names, places.by_name, on_progress)
    return _share_equal_head(weights) if cfg.tie_word_embeddings else weights


def _share_equal_head(weights: StageWeights) -> StageWeights:
    embedding, lm_head = weights.embedding, weights.lm_head
    if embedding is None or lm_head is None or not torch.equal(embedding, lm_head):
        return weights
    return dataclasses.replace(weights, lm_head=embedding)


class _Places:
    """Empty tensors of a stage, and the place in them of each tensor of a checkpoint."""

    def __init__(self, cfg: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        self._cfg = cfg
        self._dtype = dtype
        self._device = device
        self.by_name: dict[str, Tensor] = {}

    def stage(
        self, start_layer: int, end_layer: int, embedding_name: str | None, head_name: str | None
    ) -> StageWeights:
        matrix, vector = (self._cfg.vocab_size, self._cfg.hidden_size), (self._cfg.hidden_size,)
        embedding = self._stacked({embedding_name: matrix}) if embedding_name else None
        layers = tuple(self._layer(index) for index in range(start_layer, end_layer))
        final_norm = self._stacked({FINAL_NORM: vector}) if head_name else None
        lm_head = None
        if head_name is not None:
            is_shared = head_name == embedding_name
            lm_head = embedding if is_shared else self._stacked({head_name: matrix})
        return StageWeights(
            embedding=embedding, layers=layers, final_norm=final_norm, lm_head=lm_head
        )

    def _layer(self, layer_index: int) -> LayerWeights:
        shapes = self._cfg.layer_shapes()

        def place(*names: str) -> Tensor:
            prefix = f"model.layers.{layer_index}."
            return self._stacked({prefix + name: shapes[name] for name in names})

        def place_bias(*names: str) -> Tensor | None:
            return place(*names) if names[0] in shapes else None

        qkv = [f"self_attn.{part}_proj" for part in "qkv"]
        gate_up = ["mlp.gate_proj", "mlp.up_proj"]
        return LayerWeights(
            input_norm=place("input_layernorm.weight"),
            qkv=place(*(f"{name}.weight" for name in qkv)),
            qkv_bias=place_bias(*(f"{name}.bias" for name in qkv)),
            qk_norm=self._qk_norm(layer_index) if self._cfg.has_qk_norm else None,
            output=place("self_attn.o_proj.weight"),
            output_bias=place_bias("self_attn.o_proj.bias"),
            post_attention_norm=place("post_attention_layernorm.weight"),
            gate_up=place(*(f"{name}.weight" for name in gate_up)),
            gate_up_bias=place_bias(*(f"{name}.bias" for name in gate_up)),
            down=place("mlp.down_proj.weight"),
            down_bias=place_bias("mlp.down_proj.bias"),
        )

    def _stacked(self, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
        """One tensor for tensors that differ in their first size at most, in order."""
        rows = [shape[0] for shape in shapes.values()]
        rest = next(iter(shapes.values()))[1:]
        stacked = torch.empty((sum(rows), *rest), dtype=self._dtype, device=self._device)
        self.by_name.update(zip(shapes, torch.split(stacked, rows), strict=True))
        return stacked

    def _qk_norm(self, layer_index: int) -> Tensor:
        num_heads, num_kv_heads = self._cfg.num_heads, self._cfg.num_kv_heads
        shape = (num_heads + num_kv_heads, self._cfg.head_dim)
        weight = torch.empty(shape, dtype=self._dtype, device=self._device)
        prefix = f"model.layers.{layer_index}.self_attn."
        self.by_name[prefix + "q_norm.weight"] = weight[:num_heads]  # a copy to each head
        self.by_name[prefix + "k_norm.weight"] = weight[num_heads:]
        return weight


# --------------------------------------------------------------------------------------
# weights of a checkpoint


def _read(
    checkpoint: Checkpoint, places: Mapping[str, Tensor], on_progress: OnProgress | None
) -> None:
    num_done, num_total = 0, checkpoint.num_bytes(places)
    staging = _Staging(checkpoint, next(iter(places.values())).device)
    for name in checkpoint.in_disk_order(places):
        for num_bytes in staging.read(name, places[name]):
            num_done += num_bytes
            if on_progress is not None:
                on_progress(num_done, num_total)


class _Staging:
    """Reads tensors to where they belong: straight into their place where that is the same
    bytes in host memory, else in pieces through one buffer, pinned if they go to a GPU."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint = checkpoint
        is_pinned = device.type == "cuda"
        self._buffer = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=is_pinned)

    def read(self, name: str, place: Tensor) -> Iterator[int]:
        """Fill ``place``; yields the number of bytes after each piece."""
        stored = self._checkpoint.tensors[name]
        dtype = _STORED_DTYPES[stored.dtype]
        is_same = place.device.type == "cpu" and place.dtype == dtype
        if is_same and place.shape == stored.shape:
            self._checkpoint.read_into(name, _bytes_of(place))
            yield stored.num_bytes
            return
        num_rows = stored.shape[0]
        row_bytes = stored.num_bytes // num_rows
        rows_at_once = num_rows if len(stored.shape) == 1 else max(1, _STAGING_BYTES // row_bytes)
        for start in range(0, num_rows, rows_at_once):
            rows = min(rows_at_once, num_rows - start)
            piece = self._buffer[: rows * row_bytes]
            self._checkpoint.read_into(name, _bytes_of(piece), start_byte=start * row_bytes)
            target = place if rows == num_rows else place[start : start + rows]
            target.copy_(piece.view(dtype).view(rows, *stored.shape[1:]))
            yield rows * row_bytes


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, to be written while the tensor lives. By address:
    torch gives its memory to Python through numpy only, which need not be there."""
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


# --------------------------------------------------------------------------------------
# random weights


def _draw(
    cfg: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    places: Mapping[str, Tensor],
    on_progress: OnProgress | None,
) -> None:
    num_done, num_total = 0, sum(math.prod(shape) for shape in shapes.values())
    for name, shape in shapes.items():
        drawn = draw_random(cfg, name, shape, places[name])
        places[name].copy_(drawn)
        num_done += math.prod(shape)
        if on_progress is not None:
            itemsize = drawn.dtype.itemsize
            on_progress(num_done * itemsize, num_total * itemsize)


def draw_random(cfg: ModelConfig, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The random weights of the tensor ``name``, of this shape, with dtype and device of ``like``.

    The same numbers on every device of a kind, whoever asks.
    """
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    generator = torch.Generator(like.device)
    generator.manual_seed(int.from_bytes(digest, "little") >> 1)  # a positive int64
    mean, deviation = _distribution(cfg, name, shape)
    return like.new_empty(shape).normal_(mean, deviation, generator=generator)


def _distribution(cfg: ModelConfig, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation that keep activations near 1 through any depth.

    A projection keeps the size of what it reads; the two of each layer that write to the
    residual stream are smaller by the root of their number, so that their sum stays near 1.
    """
    if "norm" in name:
        return 1.0, 0.02
    if name.endswith(".bias"):
        return 0.0, 0.02
    deviation = shape[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        deviation *= (2 * cfg.num_layers) ** -0.5
    return 0.0, deviation
