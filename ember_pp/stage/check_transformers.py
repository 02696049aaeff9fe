"""``python -m ember_pp.stage.check_transformers``: what stages computed, beside transformers.

Started by ``job=check`` when the stages are gone. The record, what the stages wrote of tapped
plans, prompts and answers come as JSON on stdin. transformers' model runs over prompt and answer
of each request in one pass, in fp32 with the weights as the stages hold them, and if these are
bf16 in bf16 as well; for every row that the stages wrote, the hidden state after each layer and the
logits are compared with its fp32, and so is every greedy token. The result goes as JSON to stdout.

The weights lie on the device in their own dtype if there is room, else in host memory; either
way each module gets them as it needs them, so that fp32 takes one layer more and no second model.

Shape letters: N requests of a pass, T tokens of the longest, R rows compared, S of these that
sample, D hidden, V vocabulary.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ember_pp.checkpoint import load_tensors
from ember_pp.errors import CapacityError, EmberError
from ember_pp.model_config import ModelConfig
from ember_pp.stage.__main__ import die_with_parent
from ember_pp.stage.drift import Drift, Place
from ember_pp.stage.rates import versions
from ember_pp.stage.recorded import RecordedPlan, from_wanted
from ember_pp.stage.tap import tap_path
from ember_pp.stage.transformers_run import load_model

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_TOKENS_PER_PASS = 2048
_LOGIT_ROWS = 256
_ROOM_BYTES = 6 * 1024**3
"""Left beside the weights for one layer and the head in fp32, hidden states, attention, logits."""

OnLayer = Callable[[int, Tensor], None]


def main() -> None:
    """Compare what stdin says."""
    wanted = json.load(sys.stdin)
    die_with_parent(wanted["parent_pid"])
    torch.set_num_threads(wanted["num_threads"])
    device = torch.device(wanted["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        result = compare(wanted, device)
    except torch.OutOfMemoryError as error:
        detail = str(error).partition("\n")[0].partition(" Including ")[0]
        result = {"error": _no_room(wanted["device"], detail).to_wire()}
    except EmberError as error:
        result = {"error": error.to_wire()}
    sys.stdout.write(json.dumps(result) + "\n")


def _no_room(device: str, detail: str) -> CapacityError:
    return CapacityError(
        f"job.against: transformers ran out of memory on {device} ({detail}); with job.device=cpu "
        "it runs in host memory, and shorter prompts in job.input take less"
    )


@torch.no_grad()
def compare(wanted: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Hold all rows that were tapped against transformers.

    Returns:
        ``tensors`` in the order of layers, then logits: each with its stage, the drift of ours
        and, of a bf16 model, that of transformers' own bf16, both against its fp32; ``tokens``:
        what was drawn beside the argmax of its fp32; ``weights``: where these were.

    Raises:
        ConfigError: this version of transformers cannot make the model.
    """
    dtype = _DTYPES[wanted["dtype"]]
    cfg = ModelConfig.from_plain(wanted["model_config"])
    model = load_model(
        cfg,
        wanted["architecture"],
        wanted["folder"],
        dtype=dtype,
        device=torch.device("cpu") if wanted["folder"] else device,
        draw_device=torch.device(wanted["draw_device"]),
        what="job.against",
    )
    model.set_attn_implementation("eager")  # the plainest of its attentions
    reference = Reference(model, device)
    comparison = _Comparison(cfg, wanted["layer_ranges"], dtype)
    plans = from_wanted(wanted)
    sequences = [
        prompt + answer for prompt, answer in zip(wanted["prompts"], wanted["answers"], strict=True)
    ]
    for requests in passes(sequences):
        known = {request: sequences[request] for request in requests}
        rows = _Rows.of(plans, known, Path(wanted["taps"]), len(wanted["layer_ranges"]))
        token_ids = torch.zeros(len(known), max(map(len, known.values())), dtype=torch.int64)
        for index, sequence in enumerate(known.values()):
            token_ids[index, : len(sequence)] = torch.tensor(sequence)
        comparison.add(reference, requests, token_ids.to(device), rows)
    return comparison.to_plain() | {
        "weights": str(reference.weights_device),
        "versions": versions() | {"transformers": version("transformers")},
    }


def passes(sequences: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """All requests, those of like length together, as many as a pass takes."""
    ordered = sorted(range(len(sequences)), key=lambda request: len(sequences[request]))
    group: list[int] = []
    for request in ordered:
        if group and (len(group) + 1) * len(sequences[request]) > _TOKENS_PER_PASS:
            yield group
            group = []
        group.append(request)
    if group:
        yield group


class Reference:
    """transformers' model on ``device``, in whatever dtype it is asked for.

    Args:
        model: in host memory or on ``device``, in the dtype of its weights; this object's from
            now on.
        device: where it computes.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._dtype = torch.float32
        self._kept: dict[nn.Parameter, Tensor] = {}
        parameters = list(model.parameters())
        self.weights_device: torch.device = parameters[0].device
        """Where the weights stay."""
        if device != self.weights_device:
            num_bytes = sum(parameter.nbytes for parameter in parameters)
            if num_bytes + _ROOM_BYTES <= torch.cuda.mem_get_info(device)[0]:
                self.weights_device = device
                for parameter in parameters:
                    parameter.data = parameter.data.to(device)
        # Their dtype stays: the angles of RoPE are fp32 in a bf16 model too.
        for module, name, buffer in _buffers(model):
            setattr(module, name, buffer.to(device))
        decoder = model.model
        for module in (decoder.embed_tokens, *decoder.layers, decoder.norm, model.lm_head):
            module.register_forward_pre_hook(self._bring)
            module.register_forward_hook(self._take_back)

    def hidden_states(
        self,
        token_ids: Tensor,
        rows: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        on_layer: OnLayer,
    ) -> Tensor:
        """[N, T, D] after the final norm; of some ``rows``, what comes after each layer.

        Args:
            token_ids: [N, T]; what is behind the end of a sequence is seen by nothing before it.
            rows: the sequence of each, as an index into the N, and its position; [R] both.
            dtype: of weights and hidden states.
            on_layer: takes the index of the layer and [R, D].
        """
        self._dtype = dtype

        def see(index: int) -> Callable[..., None]:
            return lambda module, args, output: on_layer(index, _first(output)[rows])

        handles = [
            layer.register_forward_hook(see(index))
            for index, layer in enumerate(self._model.model.layers)
        ]
        try:
            output = self._model.model(input_ids=token_ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        last: Tensor = output.last_hidden_state
        return last

    def logits(self, hidden_states: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, V] of rows of what ``hidden_states`` returned, in ``dtype``."""
        self._dtype = dtype
        logits: Tensor = self._model.lm_head(hidden_states)
        return logits

    def _bring(self, module: nn.Module, _args: Any) -> None:
        for parameter in module.parameters():
            self._kept[parameter] = parameter.data
            parameter.data = parameter.data.to(self._device, self._dtype)

    def _take_back(self, module: nn.Module, _args: Any, _output: Any) -> None:
        for parameter in module.parameters():
            parameter.data = self._kept.pop(parameter)


def _buffers(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    return [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]


def _first(output: Any) -> Tensor:
    """A layer gives its hidden states alone, or in older versions first of several."""
    hidden_states: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden_states


# --------------------------------------------------------------------------------------
# the stages' side


@dataclasses.dataclass(frozen=True, slots=True)
class _TappedPlan:
    """What stages wrote of one plan, as far as a pass looks at it."""

    tensors: Mapping[str, Tensor]
    rows: list[int]
    """Of the layers."""
    logit_rows: list[int]
    """Of the logits."""


@dataclasses.dataclass(slots=True)
class _Rows:
    """The rows of some requests, plan by plan."""

    plans: list[_TappedPlan] = dataclasses.field(default_factory=list)
    written: list[Place] = dataclasses.field(default_factory=list)
    """The R rows of tapped plans."""
    samples: list[Place] = dataclasses.field(default_factory=list)
    """The S rows of all plans that drew a token."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    """What they drew."""
    with_logits: list[int] = dataclasses.field(default_factory=list)
    """Those of the S whose logits were written."""

    @classmethod
    def of(
        cls,
        plans: Sequence[RecordedPlan],
        sequences: Mapping[int, Sequence[int]],
        taps: Path,
        num_stages: int,
    ) -> _Rows:
        """Rows of these requests, as far as their tokens are known: those of one that failed end
        early. Files are mapped, and read where rows are taken.

        Args:
            plans: of the whole run.
            sequences: prompt and answer, by request.
            taps: where stages wrote.
            num_stages: that wrote.
        """
        found = cls()
        for plan in plans:
            rows = [
                row
                for row, request in enumerate(plan.requests)
                if plan.positions[row] < len(sequences.get(request, ()))
            ]
            if rows:
                logit_rows = found._add_samples(plan, sequences)
                if plan.execute.tap is not None:
                    tensors: dict[str, Tensor] = {}
                    for stage_index in range(num_stages):
                        tensors |= load_tensors(tap_path(taps, plan.execute.plan, stage_index))
                    found.written += [_place(plan, row) for row in rows]
                    found.plans.append(_TappedPlan(tensors, rows, logit_rows))
        return found

    def _add_samples(self, plan: RecordedPlan, sequences: Mapping[int, Sequence[int]]) -> list[int]:
        logit_rows = []
        for logit_row, row in enumerate(plan.sample_rows):
            sequence = sequences.get(plan.requests[row], ())
            if plan.positions[row] + 1 < len(sequence):
                if plan.execute.tap is not None:
                    self.with_logits.append(len(self.samples))
                    logit_rows.append(logit_row)
                self.samples.append(_place(plan, row))
                self.token_ids.append(sequence[plan.positions[row] + 1])
        return logit_rows

    def of_layer(self, index: int) -> Tensor:
        """[R, D] after a layer."""
        name = f"layer.{index}"
        return torch.cat([plan.tensors[name][plan.rows] for plan in self.plans])

    def logits(self) -> Tensor:
        """[L, V] of the rows in ``with_logits``."""
        return torch.cat(
            [plan.tensors["logits"][plan.logit_rows] for plan in self.plans if plan.logit_rows]
        )


def _place(plan: RecordedPlan, row: int) -> Place:
    return Place(plan.execute.plan, row, plan.requests[row], plan.positions[row])


# --------------------------------------------------------------------------------------
# comparing


class _Comparison:
    """Drift of every layer and of the logits, over all passes."""

    def __init__(
        self, cfg: ModelConfig, layer_ranges: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        self._layer_ranges = layer_ranges
        self._num_layers = cfg.num_layers
        self._dtype = dtype
        self._ours: dict[str, Drift] = defaultdict(Drift)
        self._theirs: dict[str, Drift] = defaultdict(Drift)
        self._tokens = _Tokens()

    def add(
        self, reference: Reference, requests: Sequence[int], token_ids: Tensor, rows: _Rows
    ) -> None:
        """One pass over ``requests``, [N, T]."""

        def pick(places: Sequence[Place]) -> tuple[Tensor, Tensor]:
            index_of = {request: index for index, request in enumerate(requests)}
            pairs = [(index_of[place.request], place.position) for place in places]
            picked = torch.tensor(pairs, device=token_ids.device, dtype=torch.int64).view(-1, 2)
            return picked[:, 0], picked[:, 1]

        written, samples = pick(rows.written), pick(rows.samples)
        exact: dict[int, Tensor] = {}
        last = reference.hidden_states(token_ids, written, torch.float32, exact.__setitem__)
        last, rounded = last[samples], None
        if rows.written:
            for index, expected in exact.items():
                actual = rows.of_layer(index).to(token_ids.device)
                self._ours[f"layer.{index}"].add(actual, expected, rows.written)
        if self._dtype != torch.float32:
            rounded = reference.hidden_states(
                token_ids,
                written,
                self._dtype,
                lambda index, actual: self._theirs[f"layer.{index}"].add(
                    actual, exact[index], rows.written
                ),
            )[samples]
        exact.clear()
        self._add_samples(reference, rows, last, rounded)

    def _add_samples(
        self, reference: Reference, rows: _Rows, last: Tensor, rounded: Tensor | None
    ) -> None:
        """Logits and tokens; ``last`` and ``rounded`` [S, D] in fp32 and in the model's dtype."""
        ours = rows.logits() if rows.with_logits else None
        for start in range(0, len(rows.samples), _LOGIT_ROWS):
            part = slice(start, start + _LOGIT_ROWS)
            expected = reference.logits(last[part], torch.float32)
            theirs = None
            if rounded is not None:
                theirs = reference.logits(rounded[part], self._dtype)
            drawn = torch.tensor(rows.token_ids[part], device=last.device)
            self._tokens.add(drawn, expected, theirs, rows.samples[part])
            low = bisect.bisect_left(rows.with_logits, start)
            high = bisect.bisect_left(rows.with_logits, start + _LOGIT_ROWS)
            if ours is None or low == high:
                continue
            picked = [row - start for row in rows.with_logits[low:high]]
            places = [rows.samples[row] for row in rows.with_logits[low:high]]
            self._ours["logits"].add(ours[low:high].to(last.device), expected[picked], places)
            if theirs is not None:
                self._theirs["logits"].add(theirs[picked], expected[picked], places)

    def to_plain(self) -> dict[str, Any]:
        """``tensors`` and ``tokens`` of the result."""
        names = [f"layer.{index}" for index in range(self._num_layers)] + ["logits"]
        stage_of = {
            f"layer.{index}": stage
            for stage, (start, end) in enumerate(self._layer_ranges)
            for index in range(start, end)
        }
        last_stage = len(self._layer_ranges) - 1
        return {
            "tensors": [
                {
                    "name": name,
                    "stage": stage_of.get(name, last_stage),
                    "ours": self._ours[name].to_plain(),
                    "theirs": self._theirs[name].to_plain() if name in self._theirs else None,
                }
                for name in names
                if name in self._ours
            ],
            "tokens": self._tokens.to_plain(),
        }


class _Tokens:
    """Greedy tokens beside the argmax of transformers' fp32 logits, given the tokens before."""

    def __init__(self) -> None:
        self._num_compared = 0
        self._num_equal = 0
        self._num_equal_theirs: int | None = None
        self._gap = 0.0
        self._where: dict[str, Any] | None = None

    def add(
        self, drawn: Tensor, expected: Tensor, theirs: Tensor | None, places: Sequence[Place]
    ) -> None:
        best, best_ids = expected.max(-1)
        self._num_compared += len(drawn)
        self._num_equal += int((drawn == best_ids).sum())
        if theirs is not None:
            num_equal = int((theirs.argmax(-1) == best_ids).sum())
            self._num_equal_theirs = (self._num_equal_theirs or 0) + num_equal
        gaps = best - expected.gather(1, drawn[:, None])[:, 0]
        gaps = gaps / expected.abs().amax(-1).clamp_min(1e-30)
        row = int(gaps.argmax())
        if float(gaps[row]) > self._gap:
            self._gap = float(gaps[row])
            tokens = {"actual": int(drawn[row]), "expected": int(best_ids[row])}
            self._where = places[row].to_plain() | tokens

    def to_plain(self) -> dict[str, Any]:
        """``gap``: how far below its best logit transformers puts a drawn token, over its largest
        logit; the largest of all rows."""
        return {
            "compared": self._num_compared,
            "equal": self._num_equal,
            "equal_theirs": self._num_equal_theirs,
            "gap": self._gap,
            "where": self._where,
        }


if __name__ == "__main__":
    main()
