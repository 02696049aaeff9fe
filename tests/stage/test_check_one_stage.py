"""What N stages wrote beside what one did: the order of computation, edges, and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ember_pp import protocol
from ember_pp.checkpoint import save_tensors
from ember_pp.stage.check_one_stage import _Comparison, _Tokens
from ember_pp.stage.recorded import RecordedPlan
from ember_pp.stage.tap import tap_path

LAYER_RANGES = [(0, 1), (1, 3), (3, 3)]  # the last stage has the lm_head alone


def make_plan(number: int) -> RecordedPlan:
    """Two rows, of requests 5 and 8; the second samples."""
    execute = protocol.Execute(
        epoch=0,
        plan=number,
        microbatch=0,
        leave=b"",
        open=[],
        blocks=b"",
        join=b"",
        chunks=b"",
        chunk_ids=b"",
        feedback=-1,
        after_idle=False,
        tap="taps",
    )
    return RecordedPlan(
        execute=execute, requests=[5, 8], positions=[30, 40], sample_rows=[1], unfinished=[]
    )


def write(folder: Path, number: int, fault: str | None) -> tuple[Path, Path]:
    """A plan's files of three stages and of one; ``fault`` names a tensor that is off by 1."""
    generator = torch.Generator().manual_seed(number)
    layers = list(torch.randn(3, 2, 4, generator=generator))
    own = {f"layer.{index}": layer for index, layer in enumerate(layers)}
    own |= {"logits": torch.randn(1, 6, generator=generator), "token_ids": torch.tensor([3])}
    taps = {
        0: {"layer.0": own["layer.0"]},
        1: {"input": own["layer.0"], "layer.1": own["layer.1"], "layer.2": own["layer.2"]},
        2: {"input": own["layer.2"], "logits": own["logits"], "token_ids": own["token_ids"]},
    }
    if fault is not None:
        stage, _, name = fault.partition(" ")
        tensor = taps[int(stage)][name].clone()
        tensor[-1] += 1
        taps[int(stage)][name] = tensor
    for stage_index, tensors in taps.items():
        save_tensors(tap_path(folder / "taps", number, stage_index), tensors)
    save_tensors(tap_path(folder / "own", number, 0), own)
    return folder / "taps", folder / "own"


@pytest.mark.parametrize(
    ("fault", "name", "stage", "row", "request_index"),
    [
        ("0 layer.0", "layer.0", 0, 1, 8),
        ("1 input", "edge 0->1", 1, 1, 8),
        ("1 layer.2", "layer.2", 1, 1, 8),
        ("2 input", "edge 1->2", 2, 1, 8),
        ("2 logits", "logits", 2, 0, 8),
        ("2 token_ids", "token_ids", 2, 0, 8),
    ],
)
def test_each_kind_of_fault_is_named(tmp_path, fault, name, stage, row, request_index) -> None:
    comparison = _Comparison(LAYER_RANGES)
    comparison.add(make_plan(0), *write(tmp_path, 0, None))
    assert comparison.to_plain()["first"] is None
    comparison.add(make_plan(1), *write(tmp_path, 1, fault))
    comparison.add(make_plan(2), *write(tmp_path, 2, "0 layer.0"))
    result = comparison.to_plain()
    first = result["first"]
    assert (first["name"], first["stage"], first["plan"]) == (name, stage, 1)
    assert first["request"] == request_index
    assert first["position"] == 40
    assert first["actual"] == pytest.approx(first["expected"] + 1)
    of = {tensor["name"]: tensor for tensor in result["tensors"]}
    assert of[name]["tensors"] == 3
    assert of[name]["differing"] == (2 if name == "layer.0" else 1)
    assert of[name]["drift"]["max_abs"] == pytest.approx(1)
    order = ["layer.0", "edge 0->1", "layer.1", "layer.2", "edge 1->2", "logits", "token_ids"]
    assert list(of) == order
    assert list((tmp_path / "own").iterdir()) == []  # read and gone


def test_of_several_faults_the_first_in_the_order_of_computation(tmp_path) -> None:
    comparison = _Comparison(LAYER_RANGES)
    taps, own = write(tmp_path, 0, "2 logits")
    write(tmp_path, 1, "1 layer.1")
    comparison.add(make_plan(0), taps, own)
    comparison.add(make_plan(1), taps, own)
    assert comparison.to_plain()["first"]["name"] == "logits"  # plan 0 comes first


def test_tokens_are_found_in_the_answers_by_position() -> None:
    """Request 8 has a prompt of 39 tokens; position 41 is the third of its answer."""
    tokens = _Tokens([0] * 8 + [39], [[]] * 8 + [[1, 2, 3]])
    tokens.add(make_plan(0), [3])
    assert tokens.to_plain() == {"compared": 1, "differing": 0, "first": None}
    tokens.add(make_plan(4), [9])
    first = tokens.to_plain()["first"]
    assert (first["plan"], first["request"], first["position"]) == (4, 8, 41)
    assert (first["actual"], first["expected"]) == (3, 9)
    # Drawn behind the end of an answer, and dropped.
    tokens = _Tokens([0] * 8 + [39], [[]] * 8 + [[1, 2]])
    tokens.add(make_plan(0), [9])
    assert tokens.to_plain()["compared"] == 0
