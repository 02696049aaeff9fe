"""How long a plan takes on a stage. Pure arithmetic, no torch.

By default from counts: the bytes that must be read (weights once per plan, KV once per token
attended to, logits) over the memory bandwidth, or the operations over the matrix rate, whichever
takes longer, at the device's peak rates. So these times are the least possible; ratios between
splits and layouts are what they are good for. A ``Profile``, measured on the device, replaces
them by what this engine reaches there.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ember_pp import partition
from ember_pp.devices import DeviceSpec
from ember_pp.model_config import ModelConfig

PROFILE_VERSION = 1

# Logits of a row: written and read in the model's type, then written and read as float32 when
# tokens are drawn.
_FLOAT_LOGIT_BYTES = 8


class PlanCost(Protocol):
    """What plans cost on one stage."""

    def time_s(
        self, num_decodes: float, num_prefill_tokens: float, num_context_tokens: float
    ) -> float:
        """Seconds for so many decode rows and prompt tokens, that attend to so many tokens."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CountedCost:
    """A stage by counts; see ``stage_cost``."""

    weight_bytes: int
    """Read by every plan."""
    kv_bytes_per_token: int
    bytes_per_token: int
    """Embedding rows, and hidden states from and to the neighbours."""
    bytes_per_row: int
    """Logits of a row that samples."""
    flops_per_token: int
    flops_per_row: int
    flops_per_pair: int
    """Attention, of a token and one that it attends to."""
    device: DeviceSpec

    def num_bytes(
        self, num_decodes: float, num_prefill_tokens: float, num_context_tokens: float
    ) -> float:
        """Bytes of device memory that a plan reads and writes."""
        num_tokens = num_decodes + num_prefill_tokens
        return (
            self.weight_bytes
            + self.kv_bytes_per_token * (num_context_tokens + num_tokens)
            + self.bytes_per_token * num_tokens
            + self.bytes_per_row * num_decodes
        )

    def num_flops(
        self, num_decodes: float, num_prefill_tokens: float, num_context_tokens: float
    ) -> float:
        """Operations of a plan; all rows, a chunk being one, are taken to be equally long."""
        context = num_context_tokens / (num_decodes + (num_prefill_tokens > 0) or 1)
        per_token = max(context - num_prefill_tokens / 2, num_prefill_tokens / 2)
        num_pairs = num_decodes * context + num_prefill_tokens * per_token
        return (
            self.flops_per_token * (num_decodes + num_prefill_tokens)
            + self.flops_per_row * num_decodes
            + self.flops_per_pair * num_pairs
        )

    def time_s(
        self, num_decodes: float, num_prefill_tokens: float, num_context_tokens: float
    ) -> float:
        """Bytes or operations at the device's peak rates, whichever takes longer."""
        size = num_decodes, num_prefill_tokens, num_context_tokens
        memory_s = self.num_bytes(*size) / self.device.bandwidth_bytes_per_s
        return self.device.plan_overhead_s + max(
            memory_s, self.num_flops(*size) / self.device.flops_per_s
        )


def stage_cost(
    cfg: ModelConfig,
    num_layers: int,
    *,
    is_last: bool,
    bytes_per_element: int,
    device: DeviceSpec,
    profile: Profile | None = None,
) -> PlanCost:
    """Cost of a stage of ``num_layers`` layers: measured if there is a profile, else counted."""
    if profile is not None:
        return MeasuredCost(profile=profile, num_layers=num_layers, is_last=is_last)
    layers = num_layers * partition.layer_parameters(cfg)
    head = partition.head_parameters(cfg) if is_last else 0
    hidden_bytes = cfg.hidden_size * bytes_per_element
    return CountedCost(
        weight_bytes=(layers + head + (cfg.hidden_size if is_last else 0)) * bytes_per_element,
        kv_bytes_per_token=partition.kv_bytes_per_token(cfg, num_layers, bytes_per_element),
        bytes_per_token=2 * hidden_bytes,  # from the neighbour or the embedding; to the next
        bytes_per_row=cfg.vocab_size * (2 * bytes_per_element + _FLOAT_LOGIT_BYTES)
        if is_last
        else 0,
        flops_per_token=2 * layers,
        flops_per_row=2 * head,
        flops_per_pair=4 * num_layers * cfg.query_size,
        device=device,
    )


# --------------------------------------------------------------------------------------
# workload


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSize:
    """What ``PlanCost.time_s`` asks for; averages need not be whole."""

    num_decodes: float
    num_prefill_tokens: float
    num_context_tokens: float

    def time_s(self, cost: PlanCost) -> float:
        """Seconds that this plan takes."""
        return cost.time_s(self.num_decodes, self.num_prefill_tokens, self.num_context_tokens)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one length, so many of them at once in one pipeline, each end replaced."""

    prompt_tokens: int
    output_tokens: int
    sequences: int

    @property
    def total_tokens(self) -> int:
        """Prompt and output of one request."""
        return self.prompt_tokens + self.output_tokens

    def decode_plan(self, num_microbatches: int) -> PlanSize:
        """The plan of one micro-batch while nothing but decodes is to do."""
        rows = self.sequences / num_microbatches
        context = self.prompt_tokens + self.output_tokens / 2
        return PlanSize(num_decodes=rows, num_prefill_tokens=0, num_context_tokens=rows * context)

    def steady_plan(self, num_microbatches: int, max_tokens_per_plan: int) -> PlanSize:
        """The average plan when prompts come as fast as answers end.

        Every decode row brings ``prompt_tokens / output_tokens`` prompt tokens with it. Where
        that is more than a plan may hold, fewer sequences decode at a time.
        """
        per_row = self.prompt_tokens / self.output_tokens
        rows = min(self.sequences / num_microbatches, max_tokens_per_plan / (1 + per_row))
        prefill = rows * per_row
        decode_context = rows * (self.prompt_tokens + self.output_tokens / 2)
        chunk_context = max(prefill, (self.prompt_tokens + prefill) / 2)
        return PlanSize(
            num_decodes=rows,
            num_prefill_tokens=prefill,
            num_context_tokens=decode_context + chunk_context,
        )


# --------------------------------------------------------------------------------------
# measured


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What one layer and the lm_head were measured to take on a device. Times in seconds."""

    model: str
    """``architecture_key`` of the model."""
    dtype: str
    device: str
    num_threads: int
    """Of a CPU stage; 0 on a GPU."""
    version: str
    """Of ember-pp."""
    decode_context: int
    """Tokens that each row attended to in ``layer_decode``."""
    layer_decode: tuple[tuple[int, float], ...]
    """(rows, time of one layer), rising."""
    layer_prefill: tuple[tuple[int, float], ...]
    """(tokens of one fresh prompt, time of one layer), rising."""
    context_token_s: float
    """What one more token to attend to adds to a layer."""
    head: tuple[tuple[int, float], ...]
    """(rows, time of final norm, lm_head and sampler), rising."""
    plan_overhead_s: float
    """A plan beside its layers and head: inputs and embedding."""
    context_bytes: int = 0
    """CUDA context and libraries; 0 on the CPU."""

    @property
    def most_decodes(self) -> int:
        """Decode rows of the largest plan that was measured; more are extrapolated."""
        return min(self.layer_decode[-1][0], self.head[-1][0])

    @property
    def most_tokens(self) -> int:
        """Prompt tokens of the largest plan that was measured; more are extrapolated."""
        return self.layer_prefill[-1][0]

    def to_plain(self) -> dict[str, Any]:
        """As nested maps and lists for JSON."""
        return dataclasses.asdict(self) | {"profile_version": PROFILE_VERSION}

    @classmethod
    def from_plain(cls, plain: Any) -> Profile:
        """What ``to_plain`` gave.

        Raises:
            ValueError: a field is missing, unknown or of the wrong form.
        """
        if not isinstance(plain, Mapping):
            raise ValueError(f"expected a map, got {type(plain).__name__}")
        fields = dict(plain)
        if fields.pop("profile_version", None) != PROFILE_VERSION:
            raise ValueError(f"expected profile_version {PROFILE_VERSION}")
        try:
            for name in ("layer_decode", "layer_prefill", "head"):
                fields[name] = tuple((int(size), float(time_s)) for size, time_s in fields[name])
                _check_points(name, fields[name])
            fields.setdefault("context_bytes", 0)
            for name in ("decode_context", "context_token_s", "plan_overhead_s", "context_bytes"):
                if not 0 <= fields[name] < math.inf:
                    raise ValueError(f"{name}: expected a number from 0, got {fields[name]}")
            return cls(**fields)
        except KeyError as error:
            raise ValueError(f"{error.args[0]}: missing") from None
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None


def _check_points(name: str, points: Sequence[tuple[int, float]]) -> None:
    if not points:
        raise ValueError(f"{name}: empty")
    sizes = [0, *(size for size, _ in points)]
    if any(low >= high for low, high in itertools.pairwise(sizes)):
        raise ValueError(f"{name}: sizes do not rise")
    if not all(0 <= time_s < math.inf for _, time_s in points):
        raise ValueError(f"{name}: times below 0 or not finite")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredCost:
    """A stage by a profile: straight lines between what was measured."""

    profile: Profile
    num_layers: int
    is_last: bool

    def time_s(
        self, num_decodes: float, num_prefill_tokens: float, num_context_tokens: float
    ) -> float:
        """Decode rows as measured; prompt tokens add what they add to a prompt of so many."""
        profile = self.profile
        layer_s = _interpolate(profile.layer_decode, num_decodes)
        if num_prefill_tokens:
            num_tokens = num_decodes + num_prefill_tokens
            layer_s += _interpolate(profile.layer_prefill, num_tokens)
            layer_s -= _interpolate(profile.layer_prefill, num_decodes)
        seen = num_decodes * profile.decode_context + num_prefill_tokens / 2
        layer_s += profile.context_token_s * max(0.0, num_context_tokens - seen)
        head_s = _interpolate(profile.head, num_decodes) if self.is_last else 0.0
        return profile.plan_overhead_s + self.num_layers * layer_s + head_s


def _interpolate(points: Sequence[tuple[int, float]], size: float) -> float:
    """Time at ``size``: 0 for nothing, the first point up to it, the last slope beyond the end."""
    if size <= 0:
        return 0.0
    if size <= points[0][0] or len(points) == 1:
        return points[0][1] * max(1.0, size / points[0][0])
    index = min(bisect.bisect_left(points, (size, -math.inf)), len(points) - 1)
    (low, low_s), (high, high_s) = points[index - 1], points[index]
    return max(0.0, low_s + (high_s - low_s) * (size - low) / (high - low))


def architecture_key(cfg: ModelConfig) -> str:
    """Names everything about an architecture that decides how long its layers take."""
    kinds = "".join(
        letter
        for letter, is_there in (
            ("n", cfg.has_qk_norm),
            ("q", cfg.has_qkv_bias),
            ("o", cfg.has_output_bias),
            ("m", cfg.has_mlp_bias),
        )
        if is_there
    )
    return (
        f"{cfg.model_type}-d{cfg.hidden_size}-h{cfg.num_heads}x{cfg.num_kv_heads}x{cfg.head_dim}"
        f"-i{cfg.intermediate_size}-v{cfg.vocab_size}-{kinds or 'plain'}"
    )


def profile_path(
    folder: str, cfg: ModelConfig, dtype: str, device: str, num_threads: int, version: str
) -> Path:
    """File of the profile that belongs to these."""
    parts = [architecture_key(cfg), dtype, device, f"{num_threads}t", version]
    name = "_".join(re.sub(r"[^A-Za-z0-9.-]+", "-", part) for part in parts)
    return Path(folder).expanduser() / f"{name}.json"


def read_profile(path: Path) -> Profile | None:
    """The profile in ``path``; None if there is none.

    Raises:
        ValueError: the file is damaged; names it.
    """
    try:
        return Profile.from_plain(json.loads(path.read_text(encoding="utf-8")))
    except OSError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: {error}; remove it and measure again") from None
