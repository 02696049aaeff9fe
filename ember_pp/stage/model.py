"""The layers of one stage: ``qwen3``, ``qwen2`` and ``llama`` in one file with two switches.

A step is: embedding -> per layer: input RMSNorm, QKV projection, QK norm, RoPE, KV write,
attention, O projection + residual, post-attention RMSNorm, MLP + residual -> final RMSNorm ->
lm_head. QK norm and biases are there where the weights have them. Nothing here depends on
which stage runs a layer, so hidden states are equal bit by bit however layers are split.

Shape letters: T tokens of the step, N tokens that sample, D hidden, V vocabulary, d head dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ember_pp import kernels
from ember_pp.kernels.paged_rows import PagedRows
from ember_pp.model_config import ModelConfig
from ember_pp.stage.input_batch import BatchInputs
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.rope import rope_rows, rope_table
from ember_pp.stage.weights import LayerWeights, StageWeights

OnLayer = Callable[[int, Tensor], None]
"""Called after each layer with its index in the model and the hidden states [T, D]."""


@dataclasses.dataclass(frozen=True, slots=True)
class PreparedStep:
    """What all layers of a step share."""

    rows: PagedRows
    rope: tuple[Tensor, Tensor]  # cos and sin, as ``rope_rows`` gives them


class StageModel:
    """Embedding (first stage), layers ``[start_layer, end_layer)``, norm and head (last stage).

    Args:
        cfg: the whole model's architecture.
        weights: this stage's slice.
        max_model_len: positions to prepare; None: ``cfg.context_length``.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        weights: StageWeights,
        start_layer: int,
        end_layer: int,
        is_first: bool,
        is_last: bool,
        *,
        max_model_len: int | None = None,
    ) -> None:
        assert len(weights.layers) == end_layer - start_layer
        assert is_first == (weights.embedding is not None)
        assert is_last == (weights.lm_head is not None)
        self._cfg = cfg
        self._weights = weights
        self._start_layer = start_layer
        self._scale = cfg.head_dim**-0.5
        self._rope_table: Tensor | None = None  # [max_model_len, d]; None: the lm_head alone
        if weights.layers:
            table = rope_table(cfg.rope, cfg.head_dim, max_model_len or cfg.context_length)
            self._rope_table = table.to(weights.layers[0].qkv.device)

    @torch.inference_mode()
    def prepare(self, inputs: BatchInputs, kv_cache: KVCache) -> PreparedStep | None:
        """What ``forward`` needs beside hidden states or token ids: for the time before these come.

        None of a stage without layers.
        """
        if self._rope_table is None:
            return None
        rows = PagedRows.build(
            inputs.block_tables,
            inputs.context_lens,
            inputs.cu_seqlens_q,
            block_size=kv_cache.block_size,
            dtype=self._weights.layers[0].qkv.dtype,
        )
        return PreparedStep(rows, rope_rows(self._rope_table, inputs.positions))

    @torch.inference_mode()
    def forward(
        self,
        inputs: BatchInputs,
        hidden_states: Tensor | None,
        kv_cache: KVCache,
        on_layer: OnLayer | None = None,
        *,
        prepared: PreparedStep | None = None,
    ) -> Tensor:
        """Hidden states after this stage's layers, residual added.

        Args:
            inputs: what the step computes; T tokens.
            hidden_states: [T, D] model dtype from the previous stage, not written to; None on
                the first stage.
            kv_cache: of this stage's layers; takes the keys and values of the T tokens.
            on_layer: sees each layer's output.
            prepared: of the same inputs; None: they are prepared here.

        Returns:
            [T, D] in the model's dtype.
        """
        if self._weights.embedding is not None:
            hidden_states = kernels.embedding(inputs.token_ids, self._weights.embedding)
        assert hidden_states is not None, "hidden states come from the previous stage"
        prepared = prepared or self.prepare(inputs, kv_cache)
        if prepared is None:
            return hidden_states.clone()  # what was received is given back before it is read
        for index, layer in enumerate(self._weights.layers):
            attended = self._attention(
                layer, hidden_states, kv_cache.layer(index), inputs.slot_mapping, prepared
            )
            hidden_states = self._mlp(layer, attended, hidden_states)
            if on_layer is not None:
                on_layer(self._start_layer + index, hidden_states)
        return hidden_states

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, V] fp32 logits of hidden states [N, D]; on the last stage."""
        weights = self._weights
        assert weights.final_norm is not None, "not the last stage"
        assert weights.lm_head is not None, "not the last stage"
        normed = kernels.rms_norm(hidden_states, weights.final_norm, self._cfg.rms_norm_eps)
        return kernels.linear(normed, weights.lm_head).float()

    def _attention(
        self,
        layer: LayerWeights,
        hidden_states: Tensor,
        caches: tuple[Tensor, Tensor],
        slot_mapping: Tensor,
        prepared: PreparedStep,
    ) -> Tensor:
        """[T, D] -> [T, D], the residual not yet added."""
        cfg = self._cfg
        normed = kernels.rms_norm(hidden_states, layer.input_norm, cfg.rms_norm_eps)
        query, key, value = kernels.qk_norm_rope(
            kernels.linear(normed, layer.qkv, layer.qkv_bias),
            layer.qk_norm,
            *prepared.rope,
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
            eps=cfg.rms_norm_eps,
        )
        kernels.store_kv(key, value, *caches, slot_mapping)
        rows = prepared.rows
        attended = kernels.paged_attention(query, *caches, rows, scale=self._scale)  # [T, H, d]
        return kernels.linear(attended.flatten(1), layer.output, layer.output_bias)

    def _mlp(self, layer: LayerWeights, attended: Tensor, residual: Tensor) -> Tensor:
        """Adds the attention's output to the residual, and the MLP's to that; [T, D]."""
        normed, residual = kernels.add_rms_norm(
            attended, residual, layer.post_attention_norm, self._cfg.rms_norm_eps
        )
        gate_up = kernels.linear(normed, layer.gate_up, layer.gate_up_bias)
        return residual + kernels.linear(kernels.swiglu(gate_up), layer.down, layer.down_bias)
