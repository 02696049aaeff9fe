"""A stage's steps at fixed addresses and padded sizes, so that CUDA graphs can replay them.

Nothing here waits for the device or copies to it. What comes from other stages and goes to them is
received and sent beside the graphs (``captured_runner.py``). A plan begins with one launch, which
expands its rows on the device; then, on the last stage, plans without chunks do layers, head and
draw in one graph. Plans with chunks have one graph by their number of tokens for the layers,
another by the number of rows that sample for head and draw, so that few sizes of each exist. Where
sampling needs more than its tables (penalties, log-probabilities), head and draw are not captured.

Shape letters: T tokens, R rows, N rows that sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from ember_pp.kernels import Ops, StepState
from ember_pp.stage.graphs import Graphs
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.model import LayerOutput, OnLayer, StageModel
from ember_pp.stage.plan_memory import PlanWriter
from ember_pp.stage.sampler import SampledTokens, Sampler
from ember_pp.stage.slots import PlanRows
from ember_pp.stage.step_shape import StepShape, decode_size, decode_sizes, mixed_size

MAX_CAPTURED_TOKENS = 2048
"""Steps with chunks are captured, and padded, up to so many tokens: beyond, the device is busy
for longer than the host needs to launch every kernel."""

MAX_CAPTURED_ROWS = 1024
"""With more rows than this at once nothing is captured: attention has no room for them."""

OnLogits = Callable[[Tensor], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step."""

    max_slots: int
    max_tokens: int
    """``scheduler.max_tokens_per_plan``."""
    max_blocks_per_sequence: int
    max_pending: int
    """Plans that may not be done at once: more than ``max_in_flight``."""

    @property
    def max_rows(self) -> int:
        """Every row has a slot and a token."""
        return min(self.max_slots, self.max_tokens)


@dataclasses.dataclass(frozen=True, slots=True)
class Step:
    """A plan that has begun on the device."""

    rows: PlanRows
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
    """Runs the steps of one stage; all but ``warm_up`` within ``torch.inference_mode``.

    Args:
        model: the stage's layers.
        kv_cache: of those layers; says the device.
        ops: as in ``model``.
        limits: of any step.
        sampler: on the last stage.
        last_tokens: [max_slots] int64 token drawn last for each slot, on the first stage, which
            embeds them.
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
        self._decode_sizes = decode_sizes(limits.max_rows)
        self._sampler = sampler
        self._is_first = last_tokens is not None
        storage = kv_cache.storage
        device, dtype, width = storage.device, storage.dtype, model.hidden_size
        self._graphs = Graphs(device, is_on=uses_graphs)
        self.state = StepState.allocate(
            max_tokens=limits.max_tokens,
            max_rows=limits.max_rows,
            max_slots=limits.max_slots,
            max_blocks_per_sequence=limits.max_blocks_per_sequence,
            block_size=kv_cache.block_size,
            max_pending=limits.max_pending,
            last_tokens=last_tokens,
            device=device,
        )
        self._writer = PlanWriter(limits.max_rows, limits.max_tokens, limits.max_pending, device)
        self._nothing_drawn = torch.zeros(0, dtype=torch.int64, device=device)
        received = 0 if self._is_first else limits.max_tokens
        self._received = torch.zeros((received, width), dtype=dtype, device=device)
        # What leaves the layers: all tokens, to be handed on, or of the rows that sample, what
        # comes out of the last layer and what it adds to.
        leaving = (2, limits.max_rows) if sampler is not None else (1, limits.max_tokens)
        self._leaving = torch.zeros((*leaving, width), dtype=dtype, device=device)

    @property
    def is_capturing(self) -> bool:
        """See ``Graphs``."""
        return self._graphs.is_capturing

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture what is known to come: the largest step with chunks, and every size of plans
        without, the largest first, so that all smaller ones find memory in the pool. Before the
        first plan: all rows are padding."""
        if not self._graphs.is_on:
            return
        max_rows, max_tokens = self._limits.max_rows, self._limits.max_tokens
        largest = mixed_size(min(max_tokens, MAX_CAPTURED_TOKENS), max_tokens, MAX_CAPTURED_TOKENS)
        self._layers_by_graph(StepShape(False, largest, max_rows, num_samples=0))
        for size in reversed(self._decode_sizes):
            shape = StepShape(is_decode=True, num_tokens=size, num_rows=size, num_samples=size)
            self._whole_step(shape)

    def begin(self, plan: int, rows: PlanRows) -> Step:
        """Expand the rows of a plan on the device; on the first stage after its feedback."""
        shape = self._shape(rows)
        self._ops.begin_step(self._writer.write(plan, rows, shape.num_tokens), self.state)
        return Step(rows, shape)

    def received(self, num_tokens: int) -> Tensor:
        """[T, D] where the step reads what the previous stage hands on."""
        return self._received[:num_tokens]

    def hidden_states(self, step: Step, on_layer: OnLayer | None) -> Tensor:
        """[T, D] to be handed to the next stage; good until the next step.

        ``on_layer`` sees each layer's output, [T, D]; then nothing is captured.
        """
        if on_layer is not None:
            hidden_states = self._hidden_states(step.shape, _unpadded(on_layer, step))
        else:
            hidden_states = self._whole_step(step.shape)
        return hidden_states[: step.rows.num_tokens]

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
            log-probabilities of them, on the host once the plan has its mark.
        """
        sampler = self._sampler
        assert sampler is not None, "not the last stage"
        rows, shape = step.rows, step.shape
        is_watched = on_layer is not None or on_logits is not None
        sample_slots = rows.sample_slots
        num_drawn = len(sample_slots)
        is_plain = sampler.is_plain(sample_slots)
        sampler.flush()
        if shape.is_decode and is_plain and not is_watched:
            return _first(num_drawn, self._whole_step(shape), shape), None
        if on_layer is not None:
            self._select(shape, self._layers(shape, _unpadded(on_layer, step)))
        else:
            self._layers_by_graph(shape)
        if not num_drawn:
            return self._end(self._nothing_drawn), None
        if is_plain and not is_watched:
            key = dataclasses.replace(shape, num_tokens=0, num_rows=0)
            drawn = self._graphs.run(key, lambda: self._draw(shape, self._head(shape)))
            return _first(num_drawn, drawn, shape), None
        logits = self._head(shape)
        if on_logits is not None:
            on_logits(logits[:num_drawn])
        if is_plain:
            return self._draw(shape, logits)[:num_drawn], None
        sampled = sampler.sample(logits[:num_drawn], sample_slots, rows.sample_positions).to_host()
        return self._end(sampled.token_ids), sampled

    # ---------------------------------------------------------------- what may be captured

    def _run(self, shape: StepShape, compute: Callable[[], Tensor]) -> Tensor:
        if shape.num_tokens > MAX_CAPTURED_TOKENS:
            return compute()
        return self._graphs.run(shape, compute)

    def _whole_step(self, shape: StepShape) -> Tensor:
        """The hidden states to hand on, or the tokens of a plan without chunks, by one graph."""
        if self._sampler is None:
            key = dataclasses.replace(shape, num_samples=0)  # here nothing depends on it
            return self._run(key, lambda: self._hidden_states(shape, None))
        return self._run(
            shape, lambda: self._draw(shape, self._model.head(self._layers(shape, None)))
        )

    def _layers_by_graph(self, shape: StepShape) -> None:
        """What of a step does not depend on how many rows sample, by one graph."""
        if self._sampler is None:
            self._whole_step(shape)
            return
        key = dataclasses.replace(shape, num_samples=0)
        self._run(key, lambda: self._select(shape, self._layers(shape, None)))

    def _hidden_states(self, shape: StepShape, on_layer: OnLayer | None) -> Tensor:
        output = self._layers(shape, on_layer)
        leaving = self._leaving[0, : shape.num_tokens]
        return self._ops.leave_stage(output.residual, output.added, leaving, self.state)

    def _layers(self, shape: StepShape, on_layer: OnLayer | None) -> LayerOutput:
        view = self._view(shape)
        received = None if self._is_first else self._received[: shape.num_tokens]
        prepared = self._model.prepare(view, self._kv_cache)
        return self._model.layers(view.token_ids, received, self._kv_cache, prepared, on_layer)

    def _select(self, shape: StepShape, output: LayerOutput) -> Tensor:
        """What comes out of the layers of the rows that sample, and of all behind them."""
        for leaving, tensor in zip(self._leaving, output, strict=True):
            if tensor is None:
                continue  # a stage without layers adds nothing: the zeros of the beginning
            if shape.is_decode:
                leaving[: shape.num_tokens] = tensor
            else:
                torch.index_select(tensor, 0, self.state.sample_rows, out=leaving)
        return self._leaving

    def _head(self, shape: StepShape) -> Tensor:
        """[N, V] logits of the rows that sample."""
        residual, added = self._leaving[:, : shape.num_samples]
        return self._model.head(LayerOutput(residual, added))

    def _draw(self, shape: StepShape, logits: Tensor) -> Tensor:
        assert self._sampler is not None, "not the last stage"
        slots = self.state.sample_slots[: shape.num_samples]
        positions = self.state.sample_positions[: shape.num_samples]
        return self._end(self._ops.sample_tokens(logits, slots, positions, self._sampler.params))

    def _end(self, drawn: Tensor) -> Tensor:
        return self._ops.end_step(drawn, self.state.sample_slots[: len(drawn)], self.state)

    # ---------------------------------------------------------------- sizes and views

    def _shape(self, rows: PlanRows) -> StepShape:
        max_rows, num_tokens = self._limits.max_rows, rows.num_tokens
        if not rows.chunk_slots:
            size = decode_size(num_tokens, self._decode_sizes)
            return StepShape(is_decode=True, num_tokens=size, num_rows=size, num_samples=size)
        num_samples = rows.num_decodes + sum(rows.chunk_samples)
        return StepShape(
            is_decode=False,
            num_tokens=mixed_size(num_tokens, self._limits.max_tokens, MAX_CAPTURED_TOKENS),
            num_rows=max_rows,
            num_samples=decode_size(num_samples, self._decode_sizes) if num_samples else 0,
        )

    def _view(self, shape: StepShape) -> _View:
        state, num_tokens, num_rows = self.state, shape.num_tokens, shape.num_rows
        return _View(
            token_ids=state.token_ids[:num_tokens],
            positions=state.positions[:num_tokens],
            slot_mapping=state.slot_mapping[:num_tokens],
            cu_seqlens_q=state.cu_seqlens_q[: num_rows + 1],
            context_lens=state.context_lens[:num_rows],
            block_tables=state.block_table,
            table_rows=state.slots[:num_rows],
            decode_lens=None if shape.is_decode else state.decode_lens[:num_rows],
            max_query_len=1 if shape.is_decode else num_tokens,
        )


def _first(num_drawn: int, drawn: Tensor, shape: StepShape) -> Tensor:
    """Without padding; a view costs the host a few microseconds, and often there is none."""
    return drawn if num_drawn == shape.num_samples else drawn[:num_drawn]


def _unpadded(on_layer: OnLayer, step: Step) -> OnLayer:
    num_tokens = step.rows.num_tokens
    return lambda layer, hidden_states: on_layer(layer, hidden_states[:num_tokens])
