"""The architecture of a dense decoder, read from a ``config.json`` in Hugging Face layout.

``ModelConfig.from_hf`` takes both spellings of the file (``rope_theta`` and ``rope_scaling``,
or ``rope_parameters``) and refuses by name whatever the model of ``stage/model.py`` would
compute wrongly: nothing in the file that changes the numbers is ignored.

Shape letters: D hidden, H query heads, K KV heads, d head dim, I intermediate, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from ember_pp.errors import CheckpointError

MODEL_TYPES = ("qwen3", "qwen2", "llama")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"

# Fields that other architectures put into a config and that change the numbers, with the
# values under which they do not. Absent and null are always fine.
_ONLY_ALLOWED: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("hidden_act", ("silu", "swish")),
    ("quantization_config", ({},)),
    ("compression_config", ({},)),
    ("num_experts", (0,)),
    ("num_local_experts", (0,)),
    ("n_routed_experts", (0,)),
    ("partial_rotary_factor", (1, 1.0)),
    ("attn_logit_softcapping", ()),
    ("final_logit_softcapping", ()),
    ("query_pre_attn_scalar", ()),
    ("attention_multiplier", ()),
    ("embedding_multiplier", (1, 1.0)),
    ("residual_multiplier", (1, 1.0)),
    ("logits_scaling", (1, 1.0)),
    ("logit_scale", (1, 1.0)),
    ("clip_qkv", ()),
    ("no_rope_layers", ([],)),
    ("rope_interleave", (False,)),
    ("use_parallel_residual", (False,)),
    ("is_encoder_decoder", (False,)),
    ("add_cross_attention", (False,)),
)

_ROPE_KEYS_OF_ALL = frozenset(
    {
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
    }
)
_ROPE_KEYS: Mapping[str, frozenset[str]] = types.MappingProxyType(
    {
        "default": frozenset(),
        "linear": frozenset({"factor"}),
        "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
        "yarn": frozenset(
            {
                "factor",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: base wavelength and, past ``default``, how it is stretched."""

    rope_type: str
    """One of ``ROPE_TYPES``."""
    theta: float
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    """Tokens the model was trained with before stretching; 0: not used by this type."""
    attention_factor: float = 1.0
    """Multiplies cos and sin; derived from the other fields where the file does not say."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """YaRN: whole-numbered borders between the interpolated and the kept dimensions."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder: what ``config.json`` says, checked, with every default filled in."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    has_qk_norm: bool
    has_qkv_bias: bool
    has_output_bias: bool
    """Bias of ``o_proj``."""
    has_mlp_bias: bool

    @classmethod
    def from_hf(cls, config_json: Mapping[str, Any]) -> ModelConfig:
        """The architecture in a parsed ``config.json``.

        Raises:
            CheckpointError: a field is missing, of the wrong type or out of range, the
                ``model_type`` is not one of ``MODEL_TYPES``, or the file asks for something
                that would be computed wrongly (sliding window, quantised weights, experts,
                another activation or rope type, ...); the text names the field.
        """
        model_type = _model_type(config_json)
        _refuse_unsupported(config_json)
        num_layers = _count(config_json, "num_hidden_layers")
        _refuse_sliding_window(config_json, model_type, num_layers)
        hidden_size = _count(config_json, "hidden_size")
        num_heads = _count(config_json, "num_attention_heads")
        max_position_embeddings = _count(config_json, "max_position_embeddings")
        has_attention_bias = _flag(config_json, "attention_bias")
        config = cls(
            model_type=model_type,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_count(config_json, "num_key_value_heads", num_heads),
            head_dim=_count(config_json, "head_dim", _default_head_dim(config_json, model_type)),
            intermediate_size=_count(config_json, "intermediate_size"),
            vocab_size=_count(config_json, "vocab_size"),
            max_position_embeddings=max_position_embeddings,
            rms_norm_eps=_number(config_json, "rms_norm_eps", 1e-6),
            rope=_rope(config_json, max_position_embeddings),
            tie_word_embeddings=_flag(config_json, "tie_word_embeddings"),
            has_qk_norm=model_type == "qwen3",
            has_qkv_bias=model_type == "qwen2" or has_attention_bias,
            has_output_bias=model_type != "qwen2" and has_attention_bias,
            has_mlp_bias=model_type == "llama" and _flag(config_json, "mlp_bias"),
        )
        config._check_heads()
        return config

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> ModelConfig:
        """The config that ``to_plain`` described."""
        return cls(**{**plain, "rope": RopeConfig(**plain["rope"])})

    def to_plain(self) -> dict[str, Any]:
        """The fields as nested maps of plain values."""
        return dataclasses.asdict(self)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens that the checkpoint claims, YaRN's stretching included."""
        if self.rope.rope_type != "yarn":
            return self.max_position_embeddings
        stretched = int(self.rope.factor * self.rope.original_max_position_embeddings)
        return max(self.max_position_embeddings, stretched)

    @property
    def query_size(self) -> int:
        """Width of all query heads together, ``H * d``; differs from D where the file says so."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together, ``K * d``."""
        return self.num_kv_heads * self.head_dim

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by the names that follow ``model.layers.<i>.``."""
        hidden, middle = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (self.query_size, hidden),
            "self_attn.k_proj.weight": (self.kv_size, hidden),
            "self_attn.v_proj.weight": (self.kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, self.query_size),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (middle, hidden),
            "mlp.up_proj.weight": (middle, hidden),
            "mlp.down_proj.weight": (hidden, middle),
        }
        if self.has_qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        biased = ["q", "k", "v"] if self.has_qkv_bias else []
        biased += ["o"] if self.has_output_bias else []
        for part in biased:
            shapes[f"self_attn.{part}_proj.bias"] = shapes[f"self_attn.{part}_proj.weight"][:1]
        for part in ("gate", "up", "down") if self.has_mlp_bias else ():
            shapes[f"mlp.{part}_proj.bias"] = shapes[f"mlp.{part}_proj.weight"][:1]
        return shapes

    def _check_heads(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads: expected a multiple of num_key_value_heads="
                f"{self.num_kv_heads}, got {self.num_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json: head_dim: expected an even number, got {self.head_dim}"
            )


def _model_type(config_json: Mapping[str, Any]) -> str:
    model_type = config_json.get("model_type")
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"config.json: model_type: {model_type!r} is not supported; "
            f"supported are {', '.join(MODEL_TYPES)} (dense)"
        )
    architectures = config_json.get("architectures")
    if architectures is not None and not isinstance(architectures, list):
        raise _wrong("architectures", "a list", architectures)
    if architectures and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(
            f"config.json: architectures: {architectures!r} is not a language model with an "
            "lm_head (...ForCausalLM)"
        )
    return str(model_type)


def _refuse_unsupported(config_json: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY_ALLOWED:
        value = config_json.get(key)
        if value is not None and value not in allowed:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise CheckpointError(
                f"config.json: {key}: {shown!r} is not supported: it would be computed wrongly"
            )


def _refuse_sliding_window(
    config_json: Mapping[str, Any], model_type: str, num_layers: int
) -> None:
    layer_types = config_json.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            raise _wrong("layer_types", "a list", layer_types)
        other = sorted({str(name) for name in layer_types} - {"full_attention"})
        if other:
            raise CheckpointError(f"config.json: layer_types: {other[0]!r} is not supported")
        return  # the file says per layer; the fields below only fill in where it does not
    window = config_json.get("sliding_window")
    first_layer = config_json.get("max_window_layers")  # the layers from here on have a window
    is_used = model_type == "llama" or (
        _flag(config_json, "use_sliding_window")
        and (not isinstance(first_layer, int) or first_layer < num_layers)
    )
    if window is not None and is_used:
        raise CheckpointError(
            f"config.json: sliding_window: {window!r} is in use and not supported"
        )


def _default_head_dim(config_json: Mapping[str, Any], model_type: str) -> int:
    if model_type == "qwen3" and "head_dim" not in config_json:
        return 128
    return _count(config_json, "hidden_size") // _count(config_json, "num_attention_heads")


def _wrong(key: str, expected: str, value: Any) -> CheckpointError:
    got = "is missing" if value is None else f"got {value!r}"
    return CheckpointError(f"config.json: {key}: expected {expected}, {got}")


def _count(source: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = source.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _wrong(key, "a whole number above 0", value)
    return value


def _number(source: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = source.get(key)
    if value is None:
        value = default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    number = float(value) if is_number and value is not None else math.nan
    if not 0 < number < math.inf:
        raise _wrong(key, "a number above 0", value)
    return number


def _flag(source: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = source.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise _wrong(key, "true or false", value)
    return value


# --------------------------------------------------------------------------------------
# rope


def _rope_fields(config_json: Mapping[str, Any]) -> Mapping[str, Any]:
    """The one map of rope fields, whichever spelling the file uses."""
    key = "rope_scaling" if config_json.get("rope_scaling") else "rope_parameters"
    fields = config_json.get(key) or {}
    if not isinstance(fields, Mapping):
        raise _wrong(key, "a map", fields)
    if set(fields) == {"full_attention"}:  # nested by layer type, all layers being of one
        fields = fields["full_attention"]
    rope_type = _rope_type(fields)
    for name in sorted(set(fields) - _ROPE_KEYS_OF_ALL - _ROPE_KEYS[rope_type]):
        if fields[name] is not None:
            raise CheckpointError(
                f"config.json: {key}.{name}: not supported with rope_type {rope_type!r}"
            )
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: {key}.partial_rotary_factor: not supported")
    return fields


def _rope_type(fields: Mapping[str, Any]) -> str:
    rope_type = fields.get("rope_type", fields.get("type")) or "default"
    if rope_type not in ROPE_TYPES:
        raise CheckpointError(
            f"config.json: rope_type: {rope_type!r} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    return str(rope_type)


def _rope(config_json: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
    fields = _rope_fields(config_json)
    rope_type = _rope_type(fields)
    source = fields if fields.get("rope_theta") is not None else config_json
    theta = _number(source, "rope_theta", 10_000.0)
    if rope_type == "default":
        return RopeConfig(rope_type=rope_type, theta=theta)
    if rope_type == "linear":
        return RopeConfig(rope_type=rope_type, theta=theta, factor=_number(fields, "factor"))
    # A value outside the map was written by hand beside it and is the one transformers takes.
    key = "original_max_position_embeddings"
    source = config_json if config_json.get(key) is not None else fields
    trained = _count(source, key, max_position_embeddings)
    if rope_type == "llama3":
        return _llama3(fields, theta, trained)
    return _yarn(fields, theta, trained, max_position_embeddings)


def _llama3(fields: Mapping[str, Any], theta: float, trained: int) -> RopeConfig:
    low, high = _number(fields, "low_freq_factor"), _number(fields, "high_freq_factor")
    if high <= low:
        raise _wrong("high_freq_factor", f"above low_freq_factor={low}", high)
    return RopeConfig(
        rope_type="llama3",
        theta=theta,
        factor=_number(fields, "factor"),
        original_max_position_embeddings=trained,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(fields: Mapping[str, Any], theta: float, trained: int, longest: int) -> RopeConfig:
    factor = _number(fields, "factor", longest / trained)
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=_number(fields, "attention_factor", _yarn_attention(fields, factor)),
        beta_fast=_number(fields, "beta_fast", 32.0),
        beta_slow=_number(fields, "beta_slow", 1.0),
        truncate=_flag(fields, "truncate", True),
    )


def _yarn_attention(fields: Mapping[str, Any], factor: float) -> float:
    """The factor of YaRN's section 3.4, with DeepSeek's ``mscale`` pair where it is given."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
    if mscale and mscale_all_dim:
        return scale(_number(fields, "mscale")) / scale(_number(fields, "mscale_all_dim"))
    return scale(1.0)
