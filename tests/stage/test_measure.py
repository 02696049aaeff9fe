"""What a profile measures: the inputs that are timed, and which time goes to what."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch

from ember_pp.cost_model import Profile, architecture_key
from ember_pp.model_config import ModelConfig
from ember_pp.stage import measure

CFG = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": 97,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "tie_word_embeddings": True,
    }
)


@pytest.fixture(scope="module")
def bench() -> measure._Bench:
    return measure._Bench(CFG, torch.float32, torch.device("cpu"))


def test_enough_layers_to_leave_the_cache_and_no_more_than_there_are() -> None:
    def large(**changes: int) -> ModelConfig:
        plain = CFG.to_plain() | changes
        return ModelConfig.from_plain(plain)

    assert measure.num_layers_to_measure(CFG, 4) == 8
    assert measure.num_layers_to_measure(large(num_layers=3), 4) == 3
    # A layer of over 512 MiB: two, so that there is one beside the first
    assert measure.num_layers_to_measure(large(hidden_size=8192, intermediate_size=30_000), 2) == 2
    assert measure.num_layers_to_measure(large(num_layers=1), 2) == 1


@pytest.mark.gpu
def test_steps_are_timed_as_a_stage_runs_them() -> None:
    """Captured: eight kernels or so, each a few us, where launching one takes the host longer."""
    cfg = ModelConfig.from_plain(CFG.to_plain() | {"head_dim": 64})
    with torch.cuda.stream(torch.cuda.Stream()):
        bench = measure._Bench(cfg, torch.bfloat16, torch.device("cuda:0"))
        layer_s, rest_s = bench.layers(*bench.decode(4, 40))
    assert len(bench._graphs) == 2
    assert 2e-6 < layer_s < 60e-6
    assert 0 <= rest_s < 100e-6


def test_decode_rows_attend_to_their_own_tokens(bench) -> None:
    inputs, hidden_states = bench.decode(3, 40)
    assert hidden_states.shape == (3, CFG.hidden_size)
    assert inputs.positions.tolist() == [39] * 3
    assert inputs.context_lens.tolist() == [40] * 3
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert inputs.sample_rows.tolist() == [0, 1, 2]
    blocks = inputs.block_tables.flatten().tolist()
    assert len(set(blocks)) == len(blocks) == 3 * 3
    # The last of the 40 tokens is in the third block of its row, at 40 - 2 * 16 - 1.
    assert inputs.slot_mapping.tolist() == [16 * row[2] + 7 for row in inputs.block_tables.tolist()]


def test_a_prompt_is_one_row_from_its_beginning(bench) -> None:
    inputs, hidden_states = bench.prefill(20)
    assert hidden_states.shape == (20, CFG.hidden_size)
    assert inputs.positions.tolist() == list(range(20))
    assert inputs.cu_seqlens_q.tolist() == [0, 20]
    assert inputs.sample_rows.tolist() == [19]
    assert inputs.slot_mapping.tolist() == list(range(20))


def test_layers_are_told_from_what_is_beside_them(bench, monkeypatch) -> None:
    """On a clock by which the first layer is done after 5 s, and each other one 2 s later."""
    start, first, each = 0.0, 5.0, 2.0
    num_layers = measure.num_layers_to_measure(CFG, 4)
    marks = [start, *(first + each * layer for layer in range(num_layers))]
    clock = itertools.cycle(marks)
    monkeypatch.setattr(measure._Bench, "_repeat", lambda self, run: [run() for _ in range(3)])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    assert bench.layers(*bench.decode(1, 16)) == (each, first - each)


def test_the_child_prints_a_profile() -> None:
    wanted = {
        "model_config": CFG.to_plain(),
        "dtype": "float32",
        "device": "cpu",
        "device_name": "this one",
        "num_threads": 1,
        "version": "7",
    }
    done = subprocess.run(
        [sys.executable, "-m", "ember_pp.stage.measure"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=True,
    )
    profile = Profile.from_plain(json.loads(done.stdout))
    assert (profile.model, profile.dtype) == (architecture_key(CFG), "float32")
    assert (profile.device, profile.num_threads, profile.version) == ("this one", 1, "7")
    assert [rows for rows, _ in profile.layer_decode] == list(measure.DECODE_ROWS)
    assert [tokens for tokens, _ in profile.layer_prefill] == list(measure.PREFILL_TOKENS)
    for points in (profile.layer_decode, profile.layer_prefill, profile.head):
        assert all(time_s > 0 for _, time_s in points)
    # 512 tokens of a prompt take longer than one, whatever the machine is doing.
    assert profile.layer_prefill[-1][1] > profile.layer_prefill[0][1]
    assert profile.context_bytes == 0
