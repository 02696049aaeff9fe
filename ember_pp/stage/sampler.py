"""The sampler of the last stage: parameters and token history per slot, one call per plan.

The maths is in ``ember_pp.kernels.sampling``; here it is decided which rows need what. What a
row draws depends on its logits, its slot's parameters, its history, its seed and its position:
never on the other rows, the slot number or the number of stages.

With CUDA kernels the settings of the draw are in a table on the device, and rows of any settings
are drawn by one kernel, which a captured step can hold. Without, rows are sorted by what they
need, each kind with its own functions. What changes logits (bias, ``min_tokens``, penalties) works
on a copy of the rows that it changes.

Legend: N rows that sample, V vocabulary, M entries of a sparse list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.kernels import Ops, sampling
from ember_pp.kernels.slot_params import DrawSettings, SlotParams
from ember_pp.sampling_params import SamplingParams

_MAX_CACHED_BATCHES = 32  # one per micro-batch roster, and some with prefills beside it
_SMALLEST_TEMPERATURE = 1e-30  # float32 holds it; below, 0 / temperature would be NaN
_FIRST_LOG_CAPACITY = 256


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _TopLogprobs:
    rows: list[int]
    num_top: list[int]
    drawn: Tensor  # [R] f32
    ids: Tensor  # [R, n] int64
    logprobs: Tensor  # [R, n] f32


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SampledTokens:
    """What one plan drew. The tensors stay on the device until they are read."""

    token_ids: Tensor
    """[N] int64 on the sampler's device; see ``read`` for what a broken row holds."""
    slots: tuple[int, ...]
    positions: tuple[int, ...]
    _top: _TopLogprobs | None

    def read(self) -> list[int]:
        """The token ids on the host; waits for the device.

        ``sampling.NO_TOKEN`` where a row's logits were NaN or infinite, so that nothing could
        be drawn: that request fails, the others go on.
        """
        token_ids: list[int] = self.token_ids.tolist()
        return token_ids

    def to_host(self) -> SampledTokens:
        """The same, its log-probabilities on their way to the host: they are there once the stream
        has come this far, and reading them then waits for nothing enqueued since."""
        if self._top is None:
            return self
        top = self._top
        tensors = (top.drawn, top.ids, top.logprobs)
        moved = (tensor.to("cpu", non_blocking=True) for tensor in tensors)  # pinned
        return dataclasses.replace(self, _top=_TopLogprobs(top.rows, top.num_top, *moved))

    @property
    def logprobs(self) -> list[protocol.TokenLogprobs | None]:
        """One per row, None where not asked for; empty when no row asks. Waits for the device."""
        if self._top is None:
            return []
        packed: list[protocol.TokenLogprobs | None] = [None] * len(self.slots)
        drawn, ids, logprobs = (
            self._top.drawn.tolist(),
            self._top.ids.tolist(),
            self._top.logprobs.tolist(),
        )
        for index, (row, num_top) in enumerate(zip(self._top.rows, self._top.num_top, strict=True)):
            packed[row] = protocol.TokenLogprobs(
                logprob=drawn[index],
                top_ids=protocol.pack_i32(ids[index][:num_top]),
                top_logprobs=protocol.pack_f32(logprobs[index][:num_top]),
            )
        return packed


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _SlotState:
    """What a slot's sequence asks for, and the prompt tokens that a penalty counts."""

    slot: int
    params: SamplingParams
    seed: int
    num_prompt_tokens: int
    prompt_ids: Tensor | None  # [P] int64, each id once
    forbidden_ids: tuple[int, ...]  # until min_tokens

    @property
    def is_plain(self) -> bool:
        """True where the settings of the draw are all that it asks for, ``min_tokens`` aside."""
        params = self.params
        return self.prompt_ids is None and not params.logit_bias and params.logprobs is None

    @property
    def first_free(self) -> int:
        """Position from which every token may be drawn."""
        return self.num_prompt_tokens + self.params.min_tokens


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Draw:
    """Rows that are drawn in the same way, with their settings, each [R] on the device."""

    rows: Tensor | None  # [R] int64; None: all rows
    seeds: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Penalties:
    """Rows with a penalty, their settings per row [R], and their prompts' tokens as pairs.
    Places are of the rows among the adjusted ones."""

    rows: list[int]
    slots: list[int]
    num_prompt_tokens: list[int]
    row_index: Tensor  # [R] int64
    places: Tensor  # [R] int64
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    prompt_places: Tensor  # [M] int64
    prompt_ids: Tensor  # [M] int64
    prompt_repetition: Tensor  # [M]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Everything about a list of slots that does not change from step to step."""

    is_greedy: bool
    greedy_rows: Tensor | None  # None: no row
    plain: _Draw | None
    truncated: _Draw | None
    adjusted_rows: list[int]  # whose logits may have to be changed
    adjusted_index: Tensor | None
    bias: tuple[Tensor, Tensor, Tensor] | None  # places, ids, values, [M] each
    penalties: _Penalties | None
    delayed: list[tuple[int, int, _SlotState]]  # row and place of those with forbidden ids
    logprob_rows: list[int]
    logprob_row_index: Tensor | None
    num_top: list[int]


class _OutputLog:
    """Output token ids of the slots that a penalty counts: a pool row each, grown on demand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.empty(0, _FIRST_LOG_CAPACITY, dtype=torch.int64, device=device)
        self._pool_rows: dict[int, int] = {}
        self._num_known: dict[int, int] = {}  # by slot; what is beyond was never written
        self._free: list[int] = []

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return self._pool.numel() * self._pool.element_size()

    def open(self, slot: int, output_ids: Sequence[int]) -> None:
        """Give ``slot`` a pool row that holds ``output_ids``."""
        if not self._free:
            self._grow_rows()
        row = self._pool_rows[slot] = self._free.pop()
        self._reserve(len(output_ids))
        self._num_known[slot] = len(output_ids)
        if output_ids:
            self._pool[row, : len(output_ids)] = _int_tensor(output_ids, self._device)

    def close(self, slot: int) -> None:
        """Give the slot's pool row back, if it has one."""
        row = self._pool_rows.pop(slot, None)
        if row is not None:
            self._free.append(row)

    def append(self, slots: Sequence[int], lengths: Sequence[int], token_ids: Tensor) -> None:
        """Write one token per slot at index ``lengths`` of its output."""
        self._reserve(max(lengths) + 1)
        rows = _int_tensor([self._pool_rows[slot] for slot in slots], self._device)
        self._pool[rows, _int_tensor(lengths, self._device)] = token_ids
        self._num_known.update((slot, n + 1) for slot, n in zip(slots, lengths, strict=True))

    def read(self, slots: Sequence[int], lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The first ``lengths`` ids of each slot, end to end: index into ``slots`` [M], ids [M]."""
        for slot, length in zip(slots, lengths, strict=True):
            known = self._num_known[slot]
            assert 0 <= length <= known, f"slot {slot}: {length} outputs, {known} of them known"
        lengths_tensor = _int_tensor(lengths, self._device)
        total = sum(lengths)
        owner = torch.repeat_interleave(
            torch.arange(len(slots), device=self._device), lengths_tensor, output_size=total
        )
        starts = lengths_tensor.cumsum(0) - lengths_tensor
        columns = torch.arange(total, device=self._device) - starts[owner]
        rows = _int_tensor([self._pool_rows[slot] for slot in slots], self._device)
        return owner, self._pool[rows[owner], columns]

    def _grow_rows(self) -> None:
        held, capacity = self._pool.shape
        added = max(held, 4)
        extra = torch.empty(added, capacity, dtype=torch.int64, device=self._device)
        self._pool = torch.cat([self._pool, extra])
        self._free.extend(range(held, held + added))

    def _reserve(self, length: int) -> None:
        held, capacity = self._pool.shape
        if length <= capacity:
            return
        pool = torch.empty(held, max(length, 2 * capacity), dtype=torch.int64, device=self._device)
        pool[:, :capacity] = self._pool
        self._pool = pool


class Sampler:
    """Draws the next token of every row that samples, by its slot's parameters.

    Args:
        vocab_size: V, columns of the logits.
        max_slots: slots are in ``[0, max_slots)``.
        eos_token_ids: not drawn while a sequence has fewer than ``min_tokens`` output tokens.
        device: where the logits are.
        ops: of the device; None: the reference.
    """

    def __init__(
        self,
        vocab_size: int,
        max_slots: int,
        eos_token_ids: Iterable[int],
        device: torch.device | str,
        ops: Ops | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._device = torch.device(device)
        self._states: list[_SlotState | None] = [None] * max_slots
        self._log = _OutputLog(self._device)
        self._batches: dict[tuple[int, ...], _Batch] = {}
        self._ops = None if ops is None or ops.is_reference else ops
        self.params = SlotParams(max_slots, self._device)
        """Settings of the draw by slot, up to date in the order of the stream after ``flush``."""
        self._changes: dict[int, DrawSettings] = {}
        self._special: set[int] = set()

    @property
    def history_bytes(self) -> int:
        """Memory held for output tokens of slots with a penalty; 0 until there is one."""
        return self._log.num_bytes

    @torch.inference_mode()
    def open(self, opened: protocol.OpenSlot) -> None:
        """A sequence takes a slot; what was there before is forgotten.

        Raises:
            InvalidRequestError: ``opened.sampling`` has a bad field.
            ProtocolError: a penalty needs earlier output tokens that ``opened`` does not carry.
        """
        params = SamplingParams.from_mapping(opened.sampling)
        slot = opened.slot
        self._log.close(slot)
        prompt_ids = None
        if params.needs_token_counts:
            output_ids = protocol.unpack_i32(opened.output_ids)
            if len(output_ids) != opened.num_output_tokens:
                raise ProtocolError(
                    f"OpenSlot.output_ids: slot {slot} has {opened.num_output_tokens} output "
                    f"tokens and a penalty, but {len(output_ids)} ids came"
                )
            unique = sorted(set(protocol.unpack_i32(opened.prompt_ids)))
            prompt_ids = _int_tensor(unique, self._device)
            self._log.open(slot, output_ids)
        state = self._states[slot] = _SlotState(
            slot=slot,
            params=params,
            seed=opened.seed,
            num_prompt_tokens=opened.num_prompt_tokens,
            prompt_ids=prompt_ids,
            forbidden_ids=self._forbidden_ids(params),
        )
        self._changes[slot] = self._draw_settings(params, opened.seed)
        self._special.discard(slot)
        if not state.is_plain or state.forbidden_ids:
            self._special.add(slot)
        for slots in [slots for slots in self._batches if slot in slots]:
            del self._batches[slots]

    def is_plain(self, slots: Iterable[int]) -> bool:
        """True when ``params`` and the logits are all that the draws of these slots depend on, and
        no log-probabilities are asked for: then ``sample`` may be left out, and
        ``Ops.sample_tokens`` draws the same tokens."""
        return not self._special or self._special.isdisjoint(slots)

    def flush(self) -> None:
        """Bring ``params`` up to date, in the order of the stream; waits for nothing."""
        if self._changes:
            with torch.inference_mode():
                self.params.update(self._changes)
            self._changes.clear()

    @torch.inference_mode()
    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int]
    ) -> SampledTokens:
        """Draw one token per row and count it as output of its slot.

        Shapes: logits [N, V] float32 or bf16, left unchanged; ``slots`` and ``positions`` have N
        entries, a slot at most once. A position is the index in its sequence of the token to be
        drawn. Nothing waits for a CUDA device.
        """
        slots_key = tuple(slots)
        assert logits.shape == (len(slots_key), self._vocab_size), logits.shape
        batch = self._batch(slots_key)
        if not slots_key:
            empty = torch.empty(0, dtype=torch.int64, device=self._device)
            return SampledTokens(empty, (), (), None)
        adjusted = self._adjusted(batch, logits, positions)
        if self._ops is None:
            token_ids = self._draw(batch, _merged(logits, adjusted, batch), positions)
        else:
            self.flush()
            token_ids = self._draw_by_table(self._ops, batch, logits, adjusted, slots, positions)
        top = self._top_logprobs(batch, logits, token_ids.clamp(min=0))
        sampled = SampledTokens(token_ids, slots_key, tuple(positions), top)
        if batch.penalties is not None:
            penalties = batch.penalties
            self._log.append(
                penalties.slots,
                _output_lengths(penalties, positions),
                token_ids[penalties.row_index].clamp(min=0),
            )
        return sampled

    # what changes the logits

    def _adjusted(self, batch: _Batch, logits: Tensor, positions: Sequence[int]) -> Tensor | None:
        """The rows ``batch.adjusted_rows`` in float32 with their changes; None: there are none."""
        forbidden = [
            (place, token_id)
            for row, place, state in batch.delayed
            if positions[row] < state.first_free
            for token_id in state.forbidden_ids
        ]
        for row, _, state in batch.delayed:
            if state.is_plain and positions[row] >= state.first_free:
                self._special.discard(state.slot)
        if batch.bias is None and batch.penalties is None and not forbidden:
            return None
        assert batch.adjusted_index is not None
        adjusted = logits[batch.adjusted_index].float()
        if batch.bias is not None:
            sampling.add_logit_bias(adjusted, *batch.bias)
        if forbidden:
            places, token_ids = _int_tensor(forbidden, self._device).T
            sampling.forbid_tokens(adjusted, places, token_ids)
        if batch.penalties is not None:
            self._apply_penalties(batch.penalties, adjusted, positions)
        return adjusted

    def _apply_penalties(
        self, penalties: _Penalties, adjusted: Tensor, positions: Sequence[int]
    ) -> None:
        owner, output_ids = self._log.read(penalties.slots, _output_lengths(penalties, positions))
        output_places = penalties.places[owner]
        sampling.apply_repetition_penalty(
            adjusted,
            torch.cat([penalties.prompt_places, output_places]),
            torch.cat([penalties.prompt_ids, output_ids]),
            torch.cat([penalties.prompt_repetition, penalties.repetition[owner]]),
        )
        sampling.apply_output_penalties(
            adjusted,
            output_places,
            output_ids,
            penalties.presence[owner],
            penalties.frequency[owner],
        )

    def _forbidden_ids(self, params: SamplingParams) -> tuple[int, ...]:
        if params.min_tokens == 0:
            return ()
        forbidden = sorted({*self._eos_token_ids, *params.stop_token_ids})
        # Forbidding every token would leave nothing to draw: then none is.
        return tuple(forbidden) if len(forbidden) < self._vocab_size else ()

    # draws

    def _draw_settings(self, params: SamplingParams, seed: int) -> DrawSettings:
        temperature = max(params.temperature, _SMALLEST_TEMPERATURE)
        return DrawSettings(
            seed=seed,
            temperature=0.0 if params.is_greedy else temperature,
            top_k=min(params.top_k, self._vocab_size),
            top_p=params.top_p,
            min_p=params.min_p,
        )

    def _draw_by_table(
        self,
        ops: Ops,
        batch: _Batch,
        logits: Tensor,
        adjusted: Tensor | None,
        slots: Sequence[int],
        positions: Sequence[int],
    ) -> Tensor:
        staged = _int_tensor([*zip(slots, positions, strict=True)], self._device)
        rows = staged[:, 0].int(), staged[:, 1].contiguous()
        if adjusted is None:
            return ops.sample_tokens(logits, *rows, self.params)
        assert batch.adjusted_index is not None
        changed = rows[0][batch.adjusted_index], rows[1][batch.adjusted_index]
        drawn = ops.sample_tokens(adjusted, *changed, self.params)
        if len(adjusted) == len(logits):
            return drawn
        token_ids = ops.sample_tokens(logits, *rows, self.params)
        token_ids[batch.adjusted_index] = drawn
        return token_ids

    def _draw(self, batch: _Batch, logits: Tensor, positions: Sequence[int]) -> Tensor:
        if batch.is_greedy:
            return sampling.argmax_tokens(logits)
        token_ids = torch.empty(logits.shape[0], dtype=torch.int64, device=self._device)
        all_positions = _int_tensor(positions, self._device)
        if batch.greedy_rows is not None:
            token_ids[batch.greedy_rows] = sampling.argmax_tokens(logits[batch.greedy_rows])
        for draw in (batch.plain, batch.truncated):
            if draw is None:
                continue
            rows = slice(None) if draw.rows is None else draw.rows
            token_ids[rows] = _draw_rows(draw, logits[rows], all_positions[rows], batch)
        return token_ids

    def _top_logprobs(
        self, batch: _Batch, logits: Tensor, token_ids: Tensor
    ) -> _TopLogprobs | None:
        rows = batch.logprob_row_index
        if rows is None:
            return None
        num_top = max(batch.num_top)
        chosen, drawn_ids = logits[rows], token_ids[rows]
        if self._ops is None:
            drawn, ids, logprobs = sampling.top_logprobs(chosen.float(), drawn_ids, num_top)
        else:
            drawn, ids, logprobs = self._ops.top_logprobs(chosen, drawn_ids, num_top)
        return _TopLogprobs(batch.logprob_rows, batch.num_top, drawn, ids, logprobs)

    # what is the same from step to step

    def _batch(self, slots: tuple[int, ...]) -> _Batch:
        batch = self._batches.pop(slots, None)
        if batch is None:
            batch = self._build_batch([self._state(slot) for slot in slots], slots)
            if len(self._batches) >= _MAX_CACHED_BATCHES:
                del self._batches[next(iter(self._batches))]
        self._batches[slots] = batch  # last place: used last
        return batch

    def _state(self, slot: int) -> _SlotState:
        state = self._states[slot]
        assert state is not None, f"slot {slot} samples but was never opened"
        return state

    def _build_batch(self, states: list[_SlotState], slots: tuple[int, ...]) -> _Batch:
        logprob_rows = [row for row, s in enumerate(states) if s.params.logprobs is not None]
        adjusted_rows = [row for row, state in enumerate(states) if _may_be_adjusted(state)]
        places = {row: place for place, row in enumerate(adjusted_rows)}
        greedy: list[int] = []
        plain: list[int] = []
        truncated: list[int] = []
        if self._ops is None:  # else the device sorts them
            for row, state in enumerate(states):
                if state.params.is_greedy:
                    greedy.append(row)
                else:
                    (truncated if _is_truncated(state.params) else plain).append(row)
        return _Batch(
            is_greedy=len(greedy) == len(states),
            greedy_rows=_int_tensor(greedy, self._device) if greedy else None,
            plain=self._build_draw(states, plain),
            truncated=self._build_draw(states, truncated),
            adjusted_rows=adjusted_rows,
            adjusted_index=_int_tensor(adjusted_rows, self._device) if adjusted_rows else None,
            bias=self._build_bias(states, places),
            penalties=self._build_penalties(states, slots, places),
            delayed=[
                (row, places[row], state) for row, state in enumerate(states) if state.forbidden_ids
            ],
            logprob_rows=logprob_rows,
            logprob_row_index=_int_tensor(logprob_rows, self._device) if logprob_rows else None,
            num_top=[states[row].params.logprobs or 0 for row in logprob_rows],
        )

    def _build_draw(self, states: list[_SlotState], rows: list[int]) -> _Draw | None:
        if not rows:
            return None
        settings = [self._draw_settings(states[row].params, states[row].seed) for row in rows]
        device = self._device
        return _Draw(
            rows=None if len(rows) == len(states) else _int_tensor(rows, device),
            seeds=_int_tensor([_signed(s.seed) for s in settings], device),
            temperature=_float_tensor([s.temperature for s in settings], device),
            top_k=_int_tensor([s.top_k for s in settings], device),
            top_p=_to_device(
                torch.tensor([s.top_p for s in settings], dtype=torch.float64), device
            ),
            min_p=_float_tensor([s.min_p for s in settings], device),
        )

    def _build_bias(
        self, states: list[_SlotState], places: dict[int, int]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        entries = [
            (places[row], token_id, bias)
            for row, state in enumerate(states)
            for token_id, bias in state.params.logit_bias.items()
        ]
        if not entries:
            return None
        bias_places, token_ids, values = zip(*entries, strict=True)
        device = self._device
        return (
            _int_tensor(bias_places, device),
            _int_tensor(token_ids, device),
            _float_tensor(values, device),
        )

    def _build_penalties(
        self, states: list[_SlotState], slots: tuple[int, ...], places: dict[int, int]
    ) -> _Penalties | None:
        rows = [row for row, state in enumerate(states) if state.prompt_ids is not None]
        if not rows:
            return None
        chosen = [states[row] for row in rows]
        prompts = [state.prompt_ids for state in chosen if state.prompt_ids is not None]
        place_index = _int_tensor([places[row] for row in rows], self._device)
        repetition = _float_tensor([s.params.repetition_penalty for s in chosen], self._device)
        owner = torch.repeat_interleave(
            torch.arange(len(rows), device=self._device),
            _int_tensor([len(ids) for ids in prompts], self._device),
            output_size=sum(len(ids) for ids in prompts),
        )
        return _Penalties(
            rows=rows,
            slots=[slots[row] for row in rows],
            num_prompt_tokens=[state.num_prompt_tokens for state in chosen],
            row_index=_int_tensor(rows, self._device),
            places=place_index,
            repetition=repetition,
            presence=_float_tensor([s.params.presence_penalty for s in chosen], self._device),
            frequency=_float_tensor([s.params.frequency_penalty for s in chosen], self._device),
            prompt_places=place_index[owner],
            prompt_ids=torch.cat(prompts),
            prompt_repetition=repetition[owner],
        )


def _draw_rows(draw: _Draw, logits: Tensor, positions: Tensor, batch: _Batch) -> Tensor:
    if draw is batch.plain:
        return sampling.draw_tokens(logits, draw.temperature, draw.seeds, positions)
    return sampling.draw_truncated_tokens(
        logits, draw.temperature, draw.top_k, draw.top_p, draw.min_p, draw.seeds, positions
    )


def _merged(logits: Tensor, adjusted: Tensor | None, batch: _Batch) -> Tensor:
    """[N, V] float32: ``logits`` with the adjusted rows in their places."""
    if adjusted is not None and len(adjusted) == len(logits):
        return adjusted
    merged = logits.float()
    if adjusted is None:
        return merged
    if merged is logits:
        merged = logits.clone()
    merged[batch.adjusted_index] = adjusted
    return merged


def _may_be_adjusted(state: _SlotState) -> bool:
    return (
        state.prompt_ids is not None or bool(state.params.logit_bias) or bool(state.forbidden_ids)
    )


def _is_truncated(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _output_lengths(penalties: _Penalties, positions: Sequence[int]) -> list[int]:
    return [
        positions[row] - num_prompt_tokens
        for row, num_prompt_tokens in zip(penalties.rows, penalties.num_prompt_tokens, strict=True)
    ]


def _signed(seed: int) -> int:
    """The int64 with the bits of an unsigned 64-bit ``seed``."""
    return seed - 2**64 if seed >= 2**63 else seed


def _int_tensor(values: Sequence[int] | Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    return _to_device(torch.tensor(values, dtype=torch.int64), device)


def _float_tensor(values: Sequence[float], device: torch.device) -> Tensor:
    return _to_device(torch.tensor(values, dtype=torch.float32), device)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Made on CUDA directly, or copied from pageable memory, it would wait for the stream.
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
