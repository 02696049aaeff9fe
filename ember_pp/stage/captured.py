"""A stage's steps at fixed addresses and padded sizes, so that CUDA graphs can replay them.

Nothing here waits for the device. A plan begins with one copy of its inputs and one launch, for
the new blocks and the tokens of the decode rows; then, on the last stage, plans without chunks
do layers, head and draw in one graph. Plans with chunks have one graph by their number of tokens
for the layers, another by the number of rows that sample for head and draw, so that few sizes of
each exist. Where sampling needs more than its tables (penalties, log-probabilities), head and
draw are not captured.

Shape letters: T tokens, R rows, N rows that sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ember_pp.kernels import Ops
from ember_pp.stage.graphs import Graphs
from ember_pp.stage.input_batch import BatchInputs
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.model import LayerOutput, OnLayer, StageModel
from ember_pp.stage.sampler import SampledTokens, Sampler
from ember_pp.stage.step_buffers import StepBuffers
from ember_pp.stage.step_shape import StepShape, decode_size, decode_sizes, mixed_size

MAX_CAPTURED_TOKENS = 2048
"""Steps with chunks are captured, and padded, up to so many tokens: beyond, the device is busy
for longer than the host needs to launch every kernel."""

OnLogits = Callable[[Tensor], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step."""

    max_slots: int
    max_tokens: int
    """``scheduler.max_tokens_per_plan``."""
    max_blocks_per_sequence: int

    @property
    def max_rows(self) -> int:
        """Every row has a slot and a token."""
        return min(self.max_slots, self.max_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A plan whose inputs are on the device."""

    inputs: BatchInputs
    """On the host."""
    shape: StepShape


@dataclasses.dataclass(frozen=True, slots=True)
class _View:
    """Inputs of a padded step on the device: ``model.StepInputs``."""

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    block_tables: Tensor
    table_rows: Tensor | None
    decode_lens: Tensor | None
    max_query_len: int


class CapturedSteps:
    """Runs the steps of one stage.

    Args:
        model: the stage's layers.
        kv_cache: of those layers; says the device.
        ops: as in ``model``.
        limits: of any step.
        is_first: embeds tokens.
        sampler: on the last stage.
        last_tokens: [max_slots] int64 token drawn last for each slot, on the first stage.
        uses_graphs: False: the same steps, padded alike, without graphs.
    """

    def __init__(
        self,
        model: StageModel,
        kv_cache: KVCache,
        ops: Ops,
        limits: StepLimits,
        *,
        sampler: Sampler | None,
        last_tokens: Tensor | None,
        uses_graphs: bool,
    ) -> None:
        self._model, self._kv_cache, self._ops = model, kv_cache, ops
        self._limits = limits
        self._sampler = sampler
        self._last_tokens = last_tokens
        storage = kv_cache.storage
        device, dtype, width = storage.device, storage.dtype, model.hidden_size
        self._graphs = Graphs(device, is_on=uses_graphs)
        self._buffers = {
            is_decode: _make_buffers(limits, kv_cache.block_size, device, is_decode=is_decode)
            for is_decode in (True, False)
        }
        self._no_tokens = torch.zeros(0, dtype=torch.int64, device=device)
        self._block_table = torch.zeros(
            (limits.max_slots, limits.max_blocks_per_sequence), dtype=torch.int32, device=device
        )
        received = limits.max_tokens if last_tokens is None else 0
        self._received = torch.zeros((received, width), dtype=dtype, device=device)
        # What leaves the layers: all tokens, to be handed on, or of the rows that sample, what
        # comes out of the last layer and what it adds to.
        leaving = (2, limits.max_rows) if sampler is not None else (1, limits.max_tokens)
        self._leaving = torch.zeros((*leaving, width), dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        """Device memory of all inputs and outputs."""
        own = (self._block_table, self._received, self._leaving)
        buffers = sum(buffers.num_bytes for buffers in self._buffers.values())
        return buffers + sum(tensor.nbytes for tensor in own)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture what is known to come: every size of plans without chunks, the largest first,
        so that the smaller ones find memory. Before the first plan; nothing is stored."""
        if not self._graphs.is_on:
            return
        for size in reversed(decode_sizes(self._limits.max_rows)):
            shape = StepShape(is_decode=True, num_tokens=size, num_rows=size, num_samples=size)
            self._graphs.run(shape, self._whole_step(shape))

    @torch.inference_mode()
    def begin(self, inputs: BatchInputs) -> Step:
        """Bring the inputs of a plan to the device; on the first stage after its feedback."""
        shape = self._shape(inputs)
        buffers = self._buffers[shape.is_decode]
        new_blocks = buffers.fill(inputs)
        num_decodes = 0 if self._last_tokens is None else inputs.num_decode_rows
        self._ops.begin_step(
            self._block_table,
            new_blocks,
            self._no_tokens if self._last_tokens is None else self._last_tokens,
            buffers["slots"][:num_decodes],
            buffers["token_ids"],
        )
        return Step(inputs, shape)

    @torch.inference_mode()
    def receive(self, hidden_states: Tensor) -> None:
        """Take in what the previous stage handed on, [T, D]; it may then be given back."""
        self._received[: len(hidden_states)] = hidden_states

    @torch.inference_mode()
    def hidden_states(self, step: Step, on_layer: OnLayer | None) -> Tensor:
        """[T, D] to be handed to the next stage; good until the next step.

        ``on_layer`` sees each layer's output, [T, D]; then nothing is captured.
        """
        if on_layer is not None:
            hidden_states = self._hidden_states(step.shape, _unpadded(on_layer, step))
        else:
            hidden_states = self._run(step.shape, self._whole_step(step.shape))
        return hidden_states[: len(step.inputs.positions)]

    @torch.inference_mode()
    def draw(
        self, step: Step, on_layer: OnLayer | None, on_logits: OnLogits | None
    ) -> tuple[Tensor, SampledTokens | None]:
        """The tokens of the rows that sample, on the last stage.

        Args:
            step: of the plan.
            on_layer: as in ``hidden_states``.
            on_logits: sees the logits, [N, V] in the model's dtype.

        Returns:
            [N] int32 on the device, good until the next step; and where they were asked for,
            log-probabilities of them.
        """
        sampler = self._sampler
        assert sampler is not None, "not the last stage"
        inputs, shape = step.inputs, step.shape
        is_watched = on_layer is not None or on_logits is not None
        is_plain = sampler.is_plain(inputs.sample_slots)
        sampler.flush()
        num_drawn = len(inputs.sample_slots)
        if shape.is_decode and is_plain and not is_watched:
            return self._run(shape, self._whole_step(shape))[:num_drawn], None
        if on_layer is not None:
            self._select(shape, self._layers(shape, _unpadded(on_layer, step)))
        else:
            key = dataclasses.replace(shape, num_samples=0)
            self._run(key, lambda: self._select(shape, self._layers(shape, None)))
        if not num_drawn:
            return self._leaving.new_empty(0, dtype=torch.int32), None
        if is_plain and not is_watched:
            key = dataclasses.replace(shape, num_tokens=0, num_rows=0)
            drawn = self._graphs.run(key, lambda: self._draw(shape, self._head(shape)))
            return drawn[:num_drawn], None
        logits = self._head(shape)
        if on_logits is not None:
            on_logits(logits[:num_drawn])
        if is_plain:
            return self._draw(shape, logits)[:num_drawn], None
        sampled = sampler.sample(logits[:num_drawn], inputs.sample_slots, inputs.sample_positions)
        slots = self._buffers[shape.is_decode]["sample_slots"]
        return self._end(sampled.token_ids, slots[:num_drawn]), sampled

    # ---------------------------------------------------------------- what may be captured

    def _run(self, shape: StepShape, compute: Callable[[], Tensor]) -> Tensor:
        if shape.num_tokens > MAX_CAPTURED_TOKENS:
            return compute()
        return self._graphs.run(shape, compute)

    def _whole_step(self, shape: StepShape) -> Callable[[], Tensor]:
        """What gives the hidden states to hand on, or the tokens of a plan without chunks."""
        if self._sampler is None:
            return lambda: self._hidden_states(shape, None)
        return lambda: self._draw(shape, self._model.head(self._layers(shape, None)))

    def _hidden_states(self, shape: StepShape, on_layer: OnLayer | None) -> Tensor:
        output = self._layers(shape, on_layer)
        leaving = self._leaving[0, : shape.num_tokens]
        if output.added is None:
            return leaving.copy_(output.residual)
        return torch.add(output.residual, output.added, out=leaving)

    def _layers(self, shape: StepShape, on_layer: OnLayer | None) -> LayerOutput:
        view = self._view(shape)
        received = self._received[: shape.num_tokens] if self._last_tokens is None else None
        prepared = self._model.prepare(view, self._kv_cache)
        return self._model.layers(view.token_ids, received, self._kv_cache, prepared, on_layer)

    def _select(self, shape: StepShape, output: LayerOutput) -> Tensor:
        """What comes out of the layers of the rows that sample, and of all behind them."""
        rows = None if shape.is_decode else self._buffers[False]["sample_rows"]
        for leaving, tensor in zip(self._leaving, output, strict=True):
            if tensor is None:
                leaving.zero_()
            elif rows is None:
                leaving[: shape.num_tokens] = tensor
            else:
                torch.index_select(tensor, 0, rows, out=leaving)
        return self._leaving

    def _head(self, shape: StepShape) -> Tensor:
        """[N, V] logits of the rows that sample."""
        residual, added = self._leaving[:, : shape.num_samples]
        return self._model.head(LayerOutput(residual, added))

    def _draw(self, shape: StepShape, logits: Tensor) -> Tensor:
        sampler, buffers = self._sampler, self._buffers[shape.is_decode]
        assert sampler is not None, "not the last stage"
        slots = buffers["sample_slots"][: shape.num_samples]
        positions = buffers["sample_positions"][: shape.num_samples]
        drawn = self._ops.sample_tokens(logits, slots, positions, sampler.params)
        return self._end(drawn, slots)

    def _end(self, drawn: Tensor, slots: Tensor) -> Tensor:
        # With several stages the first one is elsewhere: a feedback edge leads there.
        return self._ops.end_step(drawn, slots, self._last_tokens)

    # ---------------------------------------------------------------- sizes and views

    def _shape(self, inputs: BatchInputs) -> StepShape:
        num_tokens, num_samples = len(inputs.positions), len(inputs.sample_slots)
        max_rows = self._limits.max_rows
        if inputs.max_query_len == 1 and num_samples == inputs.num_decode_rows == num_tokens:
            size = decode_size(num_tokens, max_rows)
            return StepShape(is_decode=True, num_tokens=size, num_rows=size, num_samples=size)
        return StepShape(
            is_decode=False,
            num_tokens=mixed_size(num_tokens, self._limits.max_tokens, MAX_CAPTURED_TOKENS),
            num_rows=max_rows,
            num_samples=decode_size(num_samples, max_rows) if num_samples else 0,
        )

    def _view(self, shape: StepShape) -> _View:
        buffers, num_tokens, num_rows = (
            self._buffers[shape.is_decode],
            shape.num_tokens,
            shape.num_rows,
        )
        return _View(
            token_ids=buffers["token_ids"][:num_tokens],
            positions=buffers["positions"][:num_tokens],
            slot_mapping=buffers["slot_mapping"][:num_tokens],
            cu_seqlens_q=buffers["cu_seqlens_q"][: num_rows + 1],
            context_lens=buffers["context_lens"][:num_rows],
            block_tables=self._block_table,
            table_rows=buffers["slots"][:num_rows],
            decode_lens=None if shape.is_decode else buffers["decode_lens"][:num_rows],
            max_query_len=1 if shape.is_decode else num_tokens,
        )


def _make_buffers(
    limits: StepLimits, block_size: int, device: torch.device, *, is_decode: bool
) -> StepBuffers:
    max_tokens = limits.max_rows if is_decode else limits.max_tokens
    return StepBuffers(
        max_tokens=max_tokens,
        max_rows=limits.max_rows,
        max_new_blocks=limits.max_rows + (0 if is_decode else -(-max_tokens // block_size)),
        is_decode=is_decode,
        device=device,
    )


def _unpadded(on_layer: OnLayer, step: Step) -> OnLayer:
    num_tokens = len(step.inputs.positions)
    return lambda layer, hidden_states: on_layer(layer, hidden_states[:num_tokens])
