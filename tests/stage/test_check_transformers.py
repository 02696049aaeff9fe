"""The reference of ``job=check``: transformers' own numbers, wherever the weights lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ember_pp.model_config import ModelConfig
from ember_pp.stage import check_transformers
from ember_pp.stage.check_transformers import Reference, passes
from ember_pp.stage.transformers_run import load_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 4096, (3, 9), generator=torch.Generator().manual_seed(0))
ROWS = (torch.tensor([0, 2, 2, 1]), torch.tensor([8, 0, 5, 3]))
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def load(demo_path: Path, dtype: torch.dtype, device: torch.device = CPU) -> Any:
    architecture = json.loads((demo_path / "config.json").read_text())
    cfg = ModelConfig.from_hf(architecture)
    model = load_model(cfg, architecture, str(demo_path), dtype=dtype, device=device)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("device_name", DEVICES)
@pytest.mark.parametrize("is_roomy", [True, False])
def test_both_types_from_one_model_are_those_of_two(
    demo_path: Path, monkeypatch: pytest.MonkeyPatch, device_name: str, is_roomy: bool
) -> None:
    """bf16 weights in fp32 and in bf16, turn by turn, each as a model of that type gives them."""
    if not is_roomy:
        monkeypatch.setattr(check_transformers, "_ROOM_BYTES", 2**50)
    device = torch.device(device_name)
    reference = Reference(load(demo_path, torch.bfloat16), device)
    assert reference.weights_device == (device if is_roomy else CPU)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        whole = load(demo_path, dtype, device)
        expected = whole(TOKENS.to(device), output_hidden_states=True)
        seen: dict[int, torch.Tensor] = {}
        rows = tuple(row.to(device) for row in ROWS)
        last = reference.hidden_states(TOKENS.to(device), rows, dtype, seen.__setitem__)
        assert sorted(seen) == list(range(10))
        for index in range(9):  # the last of transformers' list is after the norm
            assert torch.equal(seen[index], expected.hidden_states[index + 1][rows])
        assert last.dtype == dtype
        assert torch.equal(last, expected.hidden_states[-1])
        logits = reference.logits(last[rows], dtype)
        # Of other rows at once, so perhaps in another order of sums.
        torch.testing.assert_close(logits, expected.logits[rows])


@torch.no_grad()
def test_what_is_behind_a_sequence_changes_nothing_before_it(demo_path: Path) -> None:
    reference = Reference(load(demo_path, torch.float32), CPU)
    rows = (torch.tensor([1, 1]), torch.tensor([0, 4]))
    padded = TOKENS.clone()
    padded[1, 5:] = 0
    first, second = (
        reference.hidden_states(tokens, rows, torch.float32, lambda *_: None)
        for tokens in (TOKENS, padded)
    )
    assert torch.equal(first[rows], second[rows])


def test_passes_hold_what_they_may_and_leave_nothing_out() -> None:
    lens = [3, 900, 5, 2000, 4, 1500, 7, 40]
    groups = list(passes([[0] * length for length in lens]))
    assert sorted(request for group in groups for request in group) == list(range(8))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lens[i] for i in group) <= 2048
    assert groups[0] == [0, 4, 2, 6, 7]


@pytest.mark.gpu
def test_random_weights_are_those_of_the_device_that_stages_draw_on(demo_path: Path) -> None:
    architecture = json.loads((demo_path / "config.json").read_text())
    cfg = ModelConfig.from_hf(architecture)
    cuda = torch.device("cuda:0")
    models = [
        load_model(cfg, architecture, None, dtype=torch.bfloat16, device=device, draw_device=drawn)
        for device, drawn in ((CPU, cuda), (cuda, None), (CPU, None))
    ]
    here, there, other = (model.lm_head.weight.cpu() for model in models)
    assert torch.equal(here, there)
    assert not torch.equal(here, other)
