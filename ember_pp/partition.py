"""Which layers each stage holds, and what a slice weighs. Pure arithmetic, no files, no torch.

The cost of a stage is the weight bytes that one decode step reads there: its layers, and on
the last stage the final norm and the lm_head, which counts as several layers in a small
model. The embedding costs nothing: a step reads a few rows of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig

LayerRange = tuple[int, int]
_CostOf = Callable[[int, int], int]


def split_layers(
    cfg: ModelConfig,
    num_stages: int,
    split: str | Sequence[int] = "auto",
    *,
    bytes_per_element: int = 2,
) -> list[LayerRange]:
    """Half-open layer ranges ``[start_layer, end_layer)``, one per stage, in order.

    ``split`` is ``auto`` (the costliest stage is as cheap as it can be, and among such splits
    the most even one), ``equal`` (counts differ by at most one, the earlier stages taking the
    remainder), or the number of layers of each stage.

    Raises:
        ConfigError: more stages than layers, or counts that do not add up.
    """
    if num_stages > cfg.num_layers:
        raise ConfigError(
            f"pipeline.stages: {num_stages} stages for a model of {cfg.num_layers} layers; "
            f"use at most {cfg.num_layers}"
        )
    if split == "auto":
        layer_bytes = _layer_parameters(cfg) * bytes_per_element
        head_bytes = (cfg.hidden_size + _head_parameters(cfg)) * bytes_per_element
        return _ranges(_cheapest_counts(cfg.num_layers, num_stages, layer_bytes, head_bytes))
    if split == "equal":
        each, extra = divmod(cfg.num_layers, num_stages)
        return _ranges([each + (stage < extra) for stage in range(num_stages)])
    return _ranges(_given_counts(cfg, num_stages, split))


def stage_weight_bytes(
    cfg: ModelConfig,
    layer_range: LayerRange,
    *,
    is_first: bool,
    is_last: bool,
    bytes_per_element: int,
) -> int:
    """Bytes of all weights that a stage holds.

    A tied embedding is held on the first and on the last stage, once if they are the same.
    """
    start_layer, end_layer = layer_range
    num_parameters = (end_layer - start_layer) * _layer_parameters(cfg)
    if is_first:
        num_parameters += _head_parameters(cfg)
    if is_last:
        num_parameters += cfg.hidden_size
        if not (is_first and cfg.tie_word_embeddings):
            num_parameters += _head_parameters(cfg)
    return num_parameters * bytes_per_element


def kv_bytes_per_token(cfg: ModelConfig, num_layers: int, bytes_per_element: int) -> int:
    """Bytes of keys and values that ``num_layers`` layers store for one token."""
    return 2 * num_layers * cfg.kv_size * bytes_per_element


def _layer_parameters(cfg: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in cfg.layer_shapes().values())


def _head_parameters(cfg: ModelConfig) -> int:
    return cfg.vocab_size * cfg.hidden_size


def _ranges(counts: Sequence[int]) -> list[LayerRange]:
    ranges, start_layer = [], 0
    for count in counts:
        ranges.append((start_layer, start_layer + count))
        start_layer += count
    return ranges


def _given_counts(cfg: ModelConfig, num_stages: int, split: str | Sequence[int]) -> list[int]:
    counts: list[object] = list(split)
    if len(counts) != num_stages:
        raise ConfigError(f"pipeline.split: {len(counts)} counts for pipeline.stages={num_stages}")
    numbers = [count for count in counts if isinstance(count, int) and count > 0]
    if len(numbers) < num_stages:
        raise ConfigError(f"pipeline.split: expected layer counts above 0, got {split!r}")
    if sum(numbers) != cfg.num_layers:
        raise ConfigError(
            f"pipeline.split: {'+'.join(map(str, numbers))} = {sum(numbers)} layers; "
            f"the model has {cfg.num_layers}"
        )
    return numbers


def _cheapest_counts(
    num_layers: int, num_stages: int, layer_bytes: int, head_bytes: int
) -> list[int]:
    """Layer counts with the least largest cost, then the least sum of squared costs.

    Two dynamic programs over (stages, layers) filled from the front: the first finds the
    least largest cost, the second, bounded by it, the most even way to reach it.
    """

    def cost(stage: int, count: int) -> int:
        return count * layer_bytes + (head_bytes if stage == num_stages - 1 else 0)

    costliest = [0] + [-1] * num_layers  # -1: cannot be reached
    for stage in range(num_stages):
        costliest = [
            min(
                (
                    max(costliest[used], cost(stage, layers - used))
                    for used in range(layers)
                    if costliest[used] >= 0
                ),
                default=-1,
            )
            for layers in range(num_layers + 1)
        ]
    return _most_even_counts(num_layers, num_stages, costliest[num_layers], cost)


def _most_even_counts(num_layers: int, num_stages: int, bound: int, cost: _CostOf) -> list[int]:
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # layers used -> (squares, counts)
    for stage in range(num_stages):
        reached: dict[int, tuple[int, list[int]]] = {}
        for used, (squares, counts) in best.items():
            for count in range(1, num_layers - used + 1):
                stage_cost = cost(stage, count)
                if stage_cost > bound:
                    break
                total = squares + stage_cost**2
                known = reached.get(used + count)
                # ties go to the larger count, so that the remainder lies on earlier stages
                if known is None or total < known[0] or (total == known[0] and counts > known[1]):
                    reached[used + count] = (total, [*counts, count])
        best = reached
    return best[num_layers][1]
