"""``python -m ember_pp.stage.check_one_stage``: recorded plans once more, on a single stage.

Started by ``job=check`` when the stages that ran the plans are gone. What ran comes as JSON on
stdin: the record, what the stages wrote of tapped plans, the tokens that clients got. This stage
is a ``StageWorker`` like theirs, given the same plans one by one; what it computes for a tapped
plan is compared at once and deleted, so that it needs the disk of one plan. All comparisons are
bit by bit; the result goes as JSON to stdout.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from torch import Tensor

from ember_pp.checkpoint import load_tensors
from ember_pp.errors import EmberError, StageFailedError, from_wire
from ember_pp.protocol import (
    Execute,
    Message,
    Sampled,
    StageConfig,
    StageFailed,
    StageReady,
    StageStarted,
    Start,
    pack_i32,
    unpack_i32,
)
from ember_pp.stage.__main__ import die_with_parent
from ember_pp.stage.drift import Drift, Place, first_difference
from ember_pp.stage.rates import versions
from ember_pp.stage.recorded import RecordedPlan, from_wanted, num_blocks
from ember_pp.stage.tap import tap_path
from ember_pp.stage.worker import StageWorker

_EPOCH = 0
_MessageT = TypeVar("_MessageT", bound=Message)


def main() -> None:
    """Replay what stdin says."""
    wanted = json.load(sys.stdin)
    die_with_parent(wanted["parent_pid"])
    try:
        result = replay(wanted)
    except EmberError as error:
        result = {"error": error.to_wire()}
    sys.stdout.write(json.dumps(result) + "\n")


def replay(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Run all plans, and compare.

    Returns:
        ``tensors`` by name in the order of computation, each with its stage, how many were
        compared and differ, and the drift of those; ``tokens`` with their number and the first
        that differs; ``first``: the first tensor that differs, or None.
    """
    plans = from_wanted(wanted)
    comparison = _Comparison(wanted["layer_ranges"])
    prompt_lens = [len(prompt) for prompt in wanted["prompts"]]
    tokens = _Tokens(prompt_lens, wanted["answers"])
    stage = _OneStage(wanted, num_blocks([plan.execute for plan in plans]))
    taps = Path(wanted["taps"])
    with tempfile.TemporaryDirectory(dir=taps.parent) as own:
        for plan in plans:
            is_tapped = plan.execute.tap is not None
            sampled = stage.run(dataclasses.replace(plan.execute, tap=own if is_tapped else None))
            tokens.add(plan, unpack_i32(sampled.token_ids).tolist())
            if is_tapped:
                comparison.add(plan, taps, Path(own))
    stage.close()
    return comparison.to_plain() | {"tokens": tokens.to_plain(), "versions": versions()}


class _OneStage:
    """A worker in its thread, given a message at a time."""

    def __init__(self, wanted: Mapping[str, Any], num_blocks: int) -> None:
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._posted: SimpleQueue[Message] = SimpleQueue()
        worker = StageWorker(0, self._posted.put)
        self._thread = threading.Thread(target=worker.run, args=(self._inbox,), daemon=True)
        self._thread.start()
        self._inbox.put(
            StageConfig(
                epoch=_EPOCH,
                stage_index=0,
                num_stages=1,
                start_layer=0,
                end_layer=wanted["model_config"]["num_layers"],
                device=wanted["device"],
                num_threads=wanted["num_threads"],
                config=wanted["config"],
                model_config=wanted["model_config"],
                eos_token_ids=pack_i32(wanted["eos_token_ids"]),
                max_slots=wanted["sizes"]["max_slots"],
                max_model_len=wanted["max_model_len"],
                max_in_flight=wanted["max_in_flight"],
            )
        )
        self._await(StageReady)
        self._inbox.put(Start(_EPOCH, num_blocks, {}, {}))
        self._await(StageStarted)

    def run(self, execute: Execute) -> Sampled:
        """The tokens of a plan, once its tap is written."""
        self._inbox.put(execute)
        return self._await(Sampled)

    def close(self) -> None:
        """End the worker."""
        self._inbox.put(None)
        self._thread.join()

    def _await(self, kind: type[_MessageT]) -> _MessageT:
        while True:
            message = self._posted.get()
            if isinstance(message, kind):
                return message
            if isinstance(message, StageFailed):
                raise _error_of(message)


def _error_of(failed: StageFailed) -> EmberError:
    if failed.error:
        return from_wire(failed.error)
    return StageFailedError(
        f"the single stage failed in plan {failed.plan}: {failed.remote_type}: {failed.text}",
        stage_index=0,
        remote_type=failed.remote_type,
        remote_traceback=failed.traceback,
    )


# --------------------------------------------------------------------------------------
# comparing


@dataclasses.dataclass(slots=True)
class _Compared:
    """What was compared under one name."""

    stage: int
    num_tensors: int = 0
    num_differing: int = 0
    num_values: int = 0
    drift: Drift = dataclasses.field(default_factory=Drift)


class _Comparison:
    """Every tensor of tapped plans: what the stages computed beside what one stage did.

    Args:
        layer_ranges: half-open range of the layers of each of the stages.
    """

    def __init__(self, layer_ranges: Sequence[Sequence[int]]) -> None:
        self._layer_ranges = layer_ranges
        self._compared: dict[str, _Compared] = {}
        self._first: dict[str, Any] | None = None

    def add(self, plan: RecordedPlan, taps: Path, own_folder: Path) -> None:
        """Compare a plan; ``own_folder`` is emptied."""
        number = plan.execute.plan
        own_path = tap_path(own_folder, number, 0)
        own = load_tensors(own_path)
        for stage_index, name, actual, expected in self._pairs(number, taps, own):
            self._compare(plan, stage_index, name, actual, expected)
        own_path.unlink()

    def _pairs(
        self, number: int, taps: Path, own: Mapping[str, Tensor]
    ) -> Iterator[tuple[int, str, Tensor, Tensor]]:
        """Stage, name, and the two tensors, in the order in which stages compute them."""
        for stage_index, (start_layer, end_layer) in enumerate(self._layer_ranges):
            kept = load_tensors(tap_path(taps, number, stage_index))
            if stage_index:
                edge = f"edge {stage_index - 1}->{stage_index}"
                yield stage_index, edge, kept["input"], own[f"layer.{start_layer - 1}"]
            names = [f"layer.{index}" for index in range(start_layer, end_layer)]
            for name in [*names, "logits", "token_ids"]:
                if name in kept:
                    yield stage_index, name, kept[name], own[name]

    def _compare(
        self, plan: RecordedPlan, stage_index: int, name: str, actual: Tensor, expected: Tensor
    ) -> None:
        compared = self._compared.setdefault(name, _Compared(stage_index))
        compared.num_tensors += 1
        compared.num_values += actual.numel()
        found = first_difference(actual, expected)
        if found is None:
            return
        compared.num_differing += 1
        rows = plan.sample_rows if name in ("logits", "token_ids") else range(len(plan.requests))
        places = [
            Place(plan.execute.plan, row, plan.requests[row], plan.positions[row]) for row in rows
        ]
        if actual.shape == expected.shape:
            compared.drift.add(actual.view(len(rows), -1), expected.view(len(rows), -1), places)
        if self._first is None:
            self._first = {"name": name, "stage": stage_index} | found
            self._first |= places[found["row"]].to_plain()

    def to_plain(self) -> dict[str, Any]:
        """``tensors`` and ``first`` of the result."""
        return {
            "tensors": [
                {
                    "name": name,
                    "stage": compared.stage,
                    "tensors": compared.num_tensors,
                    "differing": compared.num_differing,
                    "values": compared.num_values,
                    "drift": compared.drift.to_plain() if compared.num_differing else None,
                }
                for name, compared in self._compared.items()
            ],
            "first": self._first,
        }


class _Tokens:
    """The drawn tokens of every plan, tapped or not, beside those that the clients got."""

    def __init__(self, prompt_lens: Sequence[int], answers: Sequence[Sequence[int]]) -> None:
        self._prompt_lens = prompt_lens
        self._answers = answers
        self._num_compared = 0
        self._num_differing = 0
        self._first: dict[str, Any] | None = None

    def add(self, plan: RecordedPlan, token_ids: Sequence[int]) -> None:
        for row, token_id in zip(plan.sample_rows, token_ids, strict=True):
            request, position = plan.requests[row], plan.positions[row] + 1
            answer = self._answers[request]
            index = position - self._prompt_lens[request]
            if index >= len(answer):
                continue  # drawn behind the end, and dropped
            self._num_compared += 1
            if answer[index] == token_id:
                continue
            self._num_differing += 1
            if self._first is None:
                place = Place(plan.execute.plan, row, request, position).to_plain()
                self._first = place | {"actual": answer[index], "expected": token_id}

    def to_plain(self) -> dict[str, Any]:
        """``tokens`` of the result."""
        return {
            "compared": self._num_compared,
            "differing": self._num_differing,
            "first": self._first,
        }


if __name__ == "__main__":
    main()
