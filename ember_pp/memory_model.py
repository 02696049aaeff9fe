"""What a stage will hold in memory, by kind, before anything is loaded. Pure arithmetic, no torch.

Every term has its counterpart in ``stage/``; tests compare the two. On a GPU two terms are not
arithmetic: ``CUDA_CONTEXT_BYTES`` and ``CUDA_GRAPH_BYTES``. A stage sets the latter and activations
aside before it takes its KV cache.
"""

from __future__ import annotations

import dataclasses

from ember_pp import partition
from ember_pp.config import CacheSettings
from ember_pp.model_config import ModelConfig

CUDA_CONTEXT_BYTES = 820 * 1024**2
"""CUDA context, loaded kernels, workspaces of libraries and what torch's allocator rounds up, for
one process: 0.67 GiB of context and a little more on an H100 with torch 2.11 and CUDA 13. Nearly
constant for a driver and a card; a measured profile has the true number."""

CUDA_GRAPH_BYTES = 512 * 1024**2
"""Set aside on a GPU for captured graphs: their nodes, and the memory that their tensors keep for
as long as they live, one pool for all graphs of a stage. Allotted, not measured."""

_PAGE_BYTES = 4096
_FLAGS_BYTES = 256
_ITEM_BYTES = {"int32": 4, "int64": 8, "float32": 4}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageSettings:
    """The settings that decide how large the state of a stage is."""

    bytes_per_element: int
    """Of weights, hidden states and KV cache."""
    block_size: int
    max_sequences: int
    max_tokens_per_plan: int
    max_in_flight: int
    max_model_len: int
    kv_memory_bytes: int | None = None
    """``cache.memory_gib``: KV of each stage; None: by ``memory_share``."""
    memory_share: float = CacheSettings().memory_share
    """``cache.memory_share``: of what is free beside the weights, what a GPU stage takes; the rest
    is for fragments, and for what was guessed too small."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """Bytes of one stage on its device, by kind."""

    layers: int = 0
    """Weights of its layers, and the final norm."""
    embedding: int = 0
    lm_head: int = 0
    """0 where it is the same tensor as the embedding."""
    kv: int = 0
    rope: int = 0
    """Table of cosines and sines."""
    tables: int = 0
    """Block tables, lengths and last tokens of the slots."""
    rings: int = 0
    """Slots of the edge that ends here."""
    activations: int = 0
    """Set aside for a forward pass, at most."""
    graphs: int = 0
    """Set aside on a GPU for captured graphs."""
    context: int = 0

    @property
    def weights(self) -> int:
        """All weights."""
        return self.layers + self.embedding + self.lm_head

    @property
    def loaded(self) -> int:
        """What is there before the KV cache is."""
        return self.weights + self.rope + self.rings

    @property
    def allocated(self) -> int:
        """Tensors that stay for the whole run: all but what is set aside, and the context."""
        return self.total - self.reserved - self.context

    @property
    def reserved(self) -> int:
        """Set aside for what comes and goes, or comes later."""
        return self.activations + self.graphs

    @property
    def total(self) -> int:
        """Everything."""
        return sum(dataclasses.astuple(self))

    def with_kv(self, num_bytes: int) -> StageBytes:
        """The same stage with a KV cache of ``num_bytes``."""
        return dataclasses.replace(self, kv=num_bytes)


def stage_bytes(
    cfg: ModelConfig,
    num_layers: int,
    settings: StageSettings,
    *,
    is_first: bool,
    is_last: bool,
    is_cpu: bool,
    context_bytes: int = 0,
) -> StageBytes:
    """All that a stage of ``num_layers`` layers holds, but for its KV cache.

    Slots of an edge are counted where its path is the best for the device: on a GPU ``cuda_ipc``.
    There, tables and inputs of captured steps are small, and within what is set aside for graphs.
    """
    element, vocabulary = settings.bytes_per_element, partition.head_parameters(cfg)
    is_shared = is_first and is_last and cfg.tie_word_embeddings
    norm = cfg.hidden_size if is_last else 0
    return StageBytes(
        layers=(num_layers * partition.layer_parameters(cfg) + norm) * element,
        embedding=vocabulary * element if is_first else 0,
        lm_head=vocabulary * element if is_last and not is_shared else 0,
        rope=settings.max_model_len * cfg.head_dim * _ITEM_BYTES["float32"] if num_layers else 0,
        tables=_table_bytes(settings, is_first=is_first) if is_cpu else 0,
        rings=ring_bytes(cfg, settings, is_first=is_first, is_last=is_last),
        activations=activation_bytes(
            cfg, settings.max_tokens_per_plan, settings.max_sequences if is_last else 0
        ),
        graphs=0 if is_cpu else CUDA_GRAPH_BYTES,
        context=context_bytes,
    )


def activation_bytes(cfg: ModelConfig, max_tokens: int, max_rows: int) -> int:
    """A generous guess at what a forward needs at once, in float32 where the ops upcast.

    ``max_rows`` sample; 0 on a stage without the lm_head.
    """
    widest = 4 * cfg.hidden_size + 3 * cfg.intermediate_size + 3 * cfg.query_size
    return 4 * (max_tokens * widest + 6 * max_rows * cfg.vocab_size)


def ring_bytes(cfg: ModelConfig, settings: StageSettings, *, is_first: bool, is_last: bool) -> int:
    """Memory of the edge that ends at a stage; at the first of several, of the feedback."""
    if is_first and is_last:
        return 0
    num_slots = settings.max_in_flight
    slot_bytes = settings.max_tokens_per_plan * cfg.hidden_size * settings.bytes_per_element
    if is_first:
        num_slots *= 2
        num_rows = min(settings.max_sequences, settings.max_tokens_per_plan)
        slot_bytes = num_rows * 2 * _ITEM_BYTES["int32"]
    flags = _round_to_page(_PAGE_BYTES + _FLAGS_BYTES * num_slots)
    return flags + num_slots * _round_to_page(slot_bytes)


def block_bytes(cfg: ModelConfig, num_layers: int, settings: StageSettings) -> int:
    """Bytes of one KV block on a stage of ``num_layers`` layers."""
    per_token = partition.kv_bytes_per_token(cfg, num_layers, settings.bytes_per_element)
    return settings.block_size * per_token


def kv_budget_bytes(free_bytes: int, reserved_bytes: int, memory_share: float) -> int:
    """What a GPU stage takes for its KV cache; negative where even activations do not fit.

    Args:
        free_bytes: what is free beside the context and what was loaded (``StageBytes.loaded``).
        reserved_bytes: ``StageBytes.reserved``.
        memory_share: ``cache.memory_share``.
    """
    return int(memory_share * free_bytes) - reserved_bytes


def _table_bytes(settings: StageSettings, *, is_first: bool) -> int:
    blocks_per_sequence = -(-settings.max_model_len // settings.block_size)
    per_slot = blocks_per_sequence * _ITEM_BYTES["int32"] + _ITEM_BYTES["int64"]
    if is_first:
        per_slot += _ITEM_BYTES["int64"]
    return settings.max_sequences * per_slot


def _round_to_page(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
