"""Which layers each stage holds, and what a slice weighs. Pure arithmetic, no files, no torch.

``best_counts`` places layers by a table of costs, exactly. Where the table comes from is not its
business: ``layout.py`` fills it from devices, memory and a workload.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig

LayerRange = tuple[int, int]
CostTable = Sequence[Sequence[int | None]]
"""``table[stage][count]``: cost of ``count`` layers, 0 to all, on a stage; None: not possible.
Whole numbers of any unit, so that ties are exact."""


def split_layers(
    cfg: ModelConfig, num_stages: int, split: str | Sequence[int] = "equal"
) -> list[LayerRange]:
    """Half-open layer ranges ``[start_layer, end_layer)``, one per stage, in order.

    ``split`` is ``equal`` (counts differ by at most one, the earlier stages taking the
    remainder), or the number of layers of each stage. The last of several stages may have no
    layers: it then has the lm_head alone. For ``auto``, see ``layout.choose_split``.

    Raises:
        ConfigError: more stages than layers, or counts that do not add up.
    """
    check_num_stages(cfg, num_stages)
    if split == "equal":
        each, extra = divmod(cfg.num_layers, num_stages)
        return layer_ranges([each + (stage < extra) for stage in range(num_stages)])
    return layer_ranges(_given_counts(cfg, num_stages, split))


def check_num_stages(cfg: ModelConfig, num_stages: int) -> None:
    """
    Raises:
        ConfigError: more stages than layers.
    """
    if num_stages > cfg.num_layers:
        raise ConfigError(
            f"pipeline.stages: {num_stages} stages for a model of {cfg.num_layers} layers; "
            f"use at most {cfg.num_layers}"
        )


def least_count(stage: int, num_stages: int) -> int:
    """Layers that a stage must have: the last of several has the lm_head to do."""
    return 0 if 0 < stage == num_stages - 1 else 1


def layer_ranges(counts: Sequence[int]) -> list[LayerRange]:
    """Half-open ranges of so many layers each, in order."""
    ranges, start_layer = [], 0
    for count in counts:
        ranges.append((start_layer, start_layer + count))
        start_layer += count
    return ranges


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
    num_parameters = (end_layer - start_layer) * layer_parameters(cfg)
    if is_first:
        num_parameters += head_parameters(cfg)
    if is_last:
        num_parameters += cfg.hidden_size
        if not (is_first and cfg.tie_word_embeddings):
            num_parameters += head_parameters(cfg)
    return num_parameters * bytes_per_element


def kv_bytes_per_token(cfg: ModelConfig, num_layers: int, bytes_per_element: int) -> int:
    """Bytes of keys and values that ``num_layers`` layers store for one token."""
    return 2 * num_layers * cfg.kv_size * bytes_per_element


def layer_parameters(cfg: ModelConfig) -> int:
    """Weights of one layer."""
    return sum(math.prod(shape) for shape in cfg.layer_shapes().values())


def head_parameters(cfg: ModelConfig) -> int:
    """Weights of the lm_head, and of the embedding."""
    return cfg.vocab_size * cfg.hidden_size


def _given_counts(cfg: ModelConfig, num_stages: int, split: str | Sequence[int]) -> list[int]:
    counts: list[object] = list(split)
    if len(counts) != num_stages:
        raise ConfigError(f"pipeline.split: {len(counts)} counts for pipeline.stages={num_stages}")
    numbers = [
        count
        for stage, count in enumerate(counts)
        if isinstance(count, int) and count >= least_count(stage, num_stages)
    ]
    if len(numbers) < num_stages:
        raise ConfigError(
            "pipeline.split: expected layer counts above 0 (the last of several stages may have "
            f"none), got {split!r}"
        )
    if sum(numbers) != cfg.num_layers:
        raise ConfigError(
            f"pipeline.split: {'+'.join(map(str, numbers))} = {sum(numbers)} layers; "
            f"the model has {cfg.num_layers}"
        )
    return numbers


# --------------------------------------------------------------------------------------
# the best split of all


def best_counts(costs: CostTable, pressures: CostTable | None = None) -> list[int] | None:
    """Layer counts of the best split; None if no split is possible.

    The best has the least largest cost; of these, the least largest pressure (what a second
    table says, such as how little memory is left); of these, the least sum of squared costs,
    which is the most even one; of these, the remainder lies on earlier stages.

    Three dynamic programs over (stages, layers), each bounded by what the one before found.
    """
    slowest = _least_maximum(costs)
    if slowest is None:
        return None
    costs = _limited(costs, costs, slowest)
    if pressures is not None:
        pressures = _limited(pressures, costs, slowest)
        fullest = _least_maximum(pressures)
        if fullest is None:
            return None
        costs = _limited(costs, pressures, fullest)
    return _most_even(costs)


def _limited(table: CostTable, by: CostTable, bound: int) -> CostTable:
    """``table`` where ``by`` has an entry of at most ``bound``; None elsewhere."""
    return [
        [
            cost if other is not None and other <= bound else None
            for cost, other in zip(row, by_row, strict=True)
        ]
        for row, by_row in zip(table, by, strict=True)
    ]


def _entries(row: Sequence[int | None], num_left: int) -> Iterator[tuple[int, int]]:
    """(count, cost) of what is possible with at most ``num_left`` layers."""
    for count in range(num_left + 1):
        cost = row[count]
        if cost is not None:
            yield count, cost


def _least_maximum(table: CostTable) -> int | None:
    """The least largest cost of all splits; None if no split is possible."""
    num_layers = len(table[0]) - 1
    best = {0: 0}  # layers used -> largest cost
    for row in table:
        reached: dict[int, int] = {}
        for used, largest in best.items():
            for count, cost in _entries(row, num_layers - used):
                known = reached.get(used + count)
                if known is None or max(largest, cost) < known:
                    reached[used + count] = max(largest, cost)
        best = reached
    return best.get(num_layers)


def _most_even(table: CostTable) -> list[int]:
    """The split with the least sum of squared costs; one is known to be possible."""
    num_layers = len(table[0]) - 1
    best: dict[int, tuple[int, list[int]]] = {0: (0, [])}  # layers used -> (squares, counts)
    for row in table:
        reached: dict[int, tuple[int, list[int]]] = {}
        for used, (squares, counts) in best.items():
            for count, cost in _entries(row, num_layers - used):
                total = squares + cost**2
                known = reached.get(used + count)
                # ties go to the larger count, so that the remainder lies on earlier stages
                if known is None or total < known[0] or (total == known[0] and counts > known[1]):
                    reached[used + count] = (total, [*counts, count])
        best = reached
    return best[num_layers][1]
