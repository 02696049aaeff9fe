"""Cosines and sines of the rotary position embedding, stretched as the checkpoint asks.

Computed once, on the CPU in fp32, so that every stage on every device turns by equal bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ember_pp.model_config import RopeConfig


def rope_table(rope: RopeConfig, head_dim: int, num_positions: int) -> Tensor:
    """[num_positions, d] fp32: ``d / 2`` cosines, then ``d / 2`` sines of each position."""
    position = torch.arange(num_positions, dtype=torch.float32)
    angles = position[:, None] * inverse_frequencies(rope, head_dim)
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return table if rope.attention_factor == 1.0 else table * rope.attention_factor


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """[d / 2] fp32 radians per position of each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    kept = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return kept / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(rope, kept)
    if rope.rope_type == "yarn":
        return _yarn(rope, head_dim, kept)
    assert rope.rope_type == "default", rope.rope_type
    return kept


def _llama3(rope: RopeConfig, kept: Tensor) -> Tensor:
    """Long wavelengths divided by ``factor``, short ones kept, a blend between.

    Source: the Llama 3.1 release.
    """
    turns = rope.original_max_position_embeddings * kept / (2 * math.pi)  # in the trained length
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * kept / rope.factor + blend * kept


def _yarn(rope: RopeConfig, head_dim: int, kept: Tensor) -> Tensor:
    """Dimensions that turn often in the trained length are kept, slow ones interpolated.

    Source: Peng et al., YaRN, 2023, sections 3.2 and 3.4.
    """

    def border(num_turns: float) -> float:
        """The (fractional) pair of dimensions that turns ``num_turns`` times."""
        wavelength = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = border(rope.beta_fast), border(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / width
    interpolated = ramp.clamp(0.0, 1.0)
    return kept / rope.factor * interpolated + kept * (1 - interpolated)
