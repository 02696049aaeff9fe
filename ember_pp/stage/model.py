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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ember_pp.kernels import Ops, PagedRows, RopeRows, make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.rope import rope_table
from ember_pp.stage.weights import LayerWeights, StageWeights

OnLayer = Callable[[int, Tensor], None]
"""Called after each layer with its index in the model and the hidden states [T, D]."""


class StepInputs(Protocol):
    """What a forward pass reads; of ``input_batch.BatchInputs``, which documents shapes."""

    @property
    def token_ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def cu_seqlens_q(self) -> Tensor: ...
    @property
    def context_lens(self) -> Tensor: ...
    @property
    def block_tables(self) -> Tensor: ...
    @property
    def table_rows(self) -> Tensor | None: ...
    @property
    def decode_lens(self) -> Tensor | None: ...
    @property
    def max_query_len(self) -> int: ...


class LayerOutput(NamedTuple):
    """The residual stream after some layers, [T, D] each."""

    residual: Tensor
    added: Tensor | None
    """What the last layer adds to it; not yet done, since the next norm can do it on the way."""

    def sum(self) -> Tensor:
        """The hidden states, [T, D]."""
        return self.residual if self.added is None else self.residual + self.added


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """What all layers of a step share."""

    rows: PagedRows
    rope: RopeRows
    slot_mapping: Tensor


class StageModel:
    """Embedding (first stage), layers ``[start_layer, end_layer)``, norm and head (last stage).

    Args:
        cfg: the whole model's architecture.
        weights: this stage's slice.
        ops: the operations of its device; None: the reference.
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
        ops: Ops | None = None,
    ) -> None:
        assert len(weights.layers) == end_layer - start_layer
        assert is_first == (weights.embedding is not None)
        assert is_last == (weights.lm_head is not None)
        self._cfg = cfg
        self._weights = weights
        self._ops = ops or make_ops("reference", torch.device("cpu"))
        self._start_layer = start_layer
        self._scale = cfg.head_dim**-0.5
        self._rope_table: Tensor | None = None  # [max_model_len, d]; None: the lm_head alone
        if weights.layers:
            table = rope_table(cfg.rope, cfg.head_dim, max_model_len or cfg.context_length)
            self._rope_table = table.to(weights.layers[0].qkv.device)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self._cfg.hidden_size

    @torch.inference_mode()
    def prepare(self, inputs: StepInputs, kv_cache: KVCache) -> PreparedStep | None:
        """What ``forward`` needs beside hidden states or token ids: for the time before these come.

        None of a stage without layers.
        """
        if self._rope_table is None:
            return None
        rows = PagedRows(
            block_tables=inputs.block_tables,
            table_rows=inputs.table_rows,
            decode_lens=inputs.decode_lens,
            context_lens=inputs.context_lens,
            cu_seqlens_q=inputs.cu_seqlens_q,
            num_tokens=len(inputs.positions),
            max_query_len=inputs.max_query_len,
            block_size=kv_cache.block_size,
            dtype=self._weights.layers[0].qkv.dtype,
        )
        rope = RopeRows(self._rope_table, inputs.positions)
        if not rows.block_tables.is_cuda:  # there it would wait for the device, maybe for nothing
            _ = rows.groups, rope.cos_sin
        return PreparedStep(rows=rows, rope=rope, slot_mapping=inputs.slot_mapping)

    @torch.inference_mode()
    def forward(
        self,
        inputs: StepInputs,
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
        prepared = prepared or self.prepare(inputs, kv_cache)
        output = self.layers(inputs.token_ids, hidden_states, kv_cache, prepared, on_layer)
        # What was received is given back before it is read: it must not be the result itself.
        return output.residual.clone() if output.added is None else output.sum()

    @torch.inference_mode()
    def layers(
        self,
        token_ids: Tensor,
        hidden_states: Tensor | None,
        kv_cache: KVCache,
        prepared: PreparedStep | None,
        on_layer: OnLayer | None = None,
    ) -> LayerOutput:
        """As ``forward``, with the last sum left to whoever reads it; may be what came in."""
        if self._weights.embedding is not None:
            hidden_states = self._ops.embedding(token_ids, self._weights.embedding)
        assert hidden_states is not None, "hidden states come from the previous stage"
        output = LayerOutput(hidden_states, None)
        for index, layer in enumerate(self._weights.layers):
            assert prepared is not None, "a stage with layers prepares their step"
            output = self._layer(layer, output, kv_cache.layer(index), prepared)
            if on_layer is not None:
                on_layer(self._start_layer + index, output.sum())
        return output

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, V] fp32 logits of hidden states [N, D]; on the last stage."""
        return self.head(LayerOutput(hidden_states, None)).float()

    @torch.inference_mode()
    def head(self, output: LayerOutput) -> Tensor:
        """[N, V] logits in the model's dtype of the rows that sample; on the last stage."""
        weights, eps = self._weights, self._cfg.rms_norm_eps
        assert weights.final_norm is not None, "not the last stage"
        assert weights.lm_head is not None, "not the last stage"
        logits, _ = self._ops.add_rms_norm_linear(
            *_with_residual(output), weights.final_norm, eps, weights.lm_head
        )
        return logits

    def _layer(
        self,
        layer: LayerWeights,
        output: LayerOutput,
        caches: tuple[Tensor, Tensor],
        step: PreparedStep,
    ) -> LayerOutput:
        """One layer; the norm that reads a sum makes it, in one pass."""
        ops, eps = self._ops, self._cfg.rms_norm_eps
        qkv, residual = ops.add_rms_norm_linear(
            *_with_residual(output), layer.input_norm, eps, layer.qkv, layer.qkv_bias
        )
        attended = self._attention(layer, qkv, caches, step)
        if layer.gate_up_bias is None:
            activated, residual = ops.add_rms_norm_gate_up(
                attended, residual, layer.post_attention_norm, eps, layer.gate_up
            )
        else:
            gate_up, residual = ops.add_rms_norm_linear(
                attended,
                residual,
                layer.post_attention_norm,
                eps,
                layer.gate_up,
                layer.gate_up_bias,
            )
            activated = ops.swiglu(gate_up)
        return LayerOutput(residual, ops.linear(activated, layer.down, layer.down_bias))

    def _attention(
        self, layer: LayerWeights, qkv: Tensor, caches: tuple[Tensor, Tensor], step: PreparedStep
    ) -> Tensor:
        """[T, (H + 2K) * d] -> [T, D], the residual not yet added."""
        cfg, ops = self._cfg, self._ops
        query = ops.qk_norm_rope_store_kv(
            qkv,
            None,
            layer.qk_norm,
            step.rope,
            *caches,
            step.slot_mapping,
            num_heads=cfg.num_heads,
            num_kv_heads=cfg.num_kv_heads,
            eps=cfg.rms_norm_eps,
        )
        attended = ops.paged_attention(query, *caches, step.rows, scale=self._scale)  # [T, H, d]
        return ops.linear(attended.flatten(1), layer.output, layer.output_bias)


def _with_residual(output: LayerOutput) -> tuple[Tensor, Tensor | None]:
    """As operations take a sum: what is added, and the residual if there are two."""
    if output.added is None:
        return output.residual, None
    return output.added, output.residual
