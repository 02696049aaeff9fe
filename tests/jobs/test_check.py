"""``job=check``: what it says of a sound pipeline, and of faults that were planted in one."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import cast

import pytest
from safetensors.torch import load_file, save_file

from ember_pp import __main__ as entry
from ember_pp import config as configuration
from ember_pp.coordinator.preparation import prepare
from ember_pp.errors import (
    EXIT_CANNOT_FIT,
    EXIT_CONFIG,
    EXIT_OK,
    EXIT_TOLERANCE,
    BatchInputError,
    CapacityError,
)
from ember_pp.jobs import check, check_report, check_verdict
from ember_pp.jobs.check_workload import make_prompts
from ember_pp.jobs.session import open_client
from ember_pp.protocol import Execute
from ember_pp.stage.recorded import RecordedPlan
from numeric import LOGITS_FP32

SMALL = (
    *("pipeline.devices=cpu", "pipeline.cpu_threads=1", "cache.memory_gib=0.1"),
    *("job.output_tokens=4", "scheduler.max_tokens_per_plan=32", "scheduler.max_sequences=8"),
)


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs the command in this process: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        given = {argument.partition("=")[0]: argument for argument in (*SMALL, *arguments)}
        code = entry.main(["job=check", *given.values()])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --------------------------------------------------------------------------------------
# a sound pipeline


@pytest.mark.multiproc
def test_two_stages_of_the_demo_model(command, tmp_path) -> None:
    """A tied head, a prompt in chunks, company: nothing is off, and every tensor was looked at."""
    code, out, err = command("job.requests=9", "job.output=r.json")
    assert code == EXIT_OK, (out, err)
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["model"]["is_tied"]
    assert result["workload"]["chunked_prompts"] >= 1
    assert result["plans"]["tapped"] == result["plans"]["plans"] > 5
    assert result["plans"]["most_rows"] > 2
    num_tokens = result["workload"]["prompt_tokens"] + 9 * 3

    layers = [f"layer.{index}" for index in range(10)]
    names = [tensor["name"] for tensor in result["one_stage"]["tensors"]]
    # Logits come after the layers of the last stage; plans whose chunks go on have none.
    assert sorted(names) == sorted([*layers, "edge 0->1", "logits", "token_ids"])
    of = {tensor["name"]: tensor for tensor in result["one_stage"]["tensors"]}
    assert [of[name]["stage"] for name in layers] == [0] * 5 + [1] * 5
    for name in (*layers, "edge 0->1"):
        assert of[name]["tensors"] == result["plans"]["plans"]
        assert of[name]["values"] == num_tokens * 192
    assert of["logits"]["values"] == 9 * 4 * 4096
    assert all(tensor["differing"] == 0 for tensor in result["one_stage"]["tensors"])
    assert result["one_stage"]["tokens"] == {"compared": 36, "differing": 0, "first": None}

    drifts = {tensor["name"]: tensor["ours"] for tensor in result["transformers"]["tensors"]}
    assert list(drifts) == [*layers, "logits"]
    assert all(drifts[name]["rows"] == num_tokens for name in layers)
    assert drifts["logits"]["rows"] == 36
    # Not zero: another computation, not the same one twice.
    assert all(0 < drift["worst"] < 1e-4 for drift in drifts.values())
    assert all(0 < drift["mean"] <= drift["worst"] for drift in drifts.values())
    tokens = result["transformers"]["tokens"]
    assert (tokens["compared"], tokens["equal"]) == (36, 36)
    assert result["faults"] == []
    assert result["seconds"].keys() == {"pipeline", "one_stage", "transformers"}
    assert "all equal" in out
    assert "within tolerance" in out
    assert result["conditions"]["versions"]["transformers"]


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("llama", {"tie_word_embeddings": False}),
    ],
)
def test_other_models_in_bf16(command, make_checkpoint, demo_path, model_type, options) -> None:
    """As near to transformers' fp32 as its own bf16, with lm_heads of their own and tied."""
    folder = make_checkpoint(model_type, dtype="bfloat16", vocab_size=4096, **options)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo_path / name, folder / name)
    code, out, err = command(f"model.path={folder}", "job.requests=12", "job.output=-")
    assert code == EXIT_OK, (out, err)
    result = json.loads(out)
    assert result["model"]["is_tied"] == options["tie_word_embeddings"]
    for tensor in result["transformers"]["tensors"]:
        assert 0 < tensor["theirs"]["mean"] < 0.05
        assert tensor["ours"]["rows"] == tensor["theirs"]["rows"]
    assert result["transformers"]["tokens"]["equal_theirs"] > 40
    assert "within tolerance" in err


@pytest.mark.multiproc
@pytest.mark.slow
def test_256_requests_at_once(command) -> None:
    """With random weights of this process's making, and little disk: a part of the plans."""
    code, out, err = command(
        *("model.load=random", "pipeline.stages=1", "job.requests=256", "job.output=-"),
        *("scheduler.max_tokens_per_plan=2048", "scheduler.policy=greedy", "job.disk_gib=0.05"),
    )
    assert code == EXIT_OK, (out, err)
    result = json.loads(out)
    plans = result["plans"]
    assert plans["most_rows"] > 64  # most are in before the first end
    assert 1 < plans["tapped"] < plans["plans"]
    assert plans["tapped"] == -(-plans["plans"] // plans["tap_every"])
    # The tokens of all plans, also of those that nobody looked into.
    assert result["one_stage"]["tokens"]["compared"] == 256 * 4
    assert 0 < result["transformers"]["tensors"][0]["ours"]["rows"] < 5_000
    assert result["transformers"]["tensors"][-1]["ours"]["rows"] < 256 * 4
    assert result["transformers"]["tokens"]["compared"] == 256 * 4
    assert f"1 of {plans['tap_every']}" in err


def test_the_workload_says_what_was_covered() -> None:
    """Request 1 finds 16 of its 20 tokens computed; request 0 is computed in two chunks."""
    execute = cast(Execute, None)
    plans = [
        RecordedPlan(
            execute=execute,
            requests=[0] * 15,
            positions=[*range(15)],
            sample_rows=[],
            unfinished=[0],
        ),
        RecordedPlan(
            execute=execute,
            requests=[0] * 3 + [1] * 4,
            positions=[15, 16, 17, 16, 17, 18, 19],
            sample_rows=[2, 6],
            unfinished=[],
        ),
        RecordedPlan(
            execute=execute, requests=[0, 1], positions=[18, 20], sample_rows=[0, 1], unfinished=[]
        ),
    ]
    workload = check._describe_workload(configuration.CheckJob(), plans, [[5] * 18, [5] * 20])
    assert workload == {
        "requests": 2,
        "prompt_tokens": 38,
        "output_tokens": 16,
        "chunked_prompts": 1,
        "cached_tokens": 16,
    }


@pytest.mark.parametrize(
    ("settings", "every"),
    [
        ({}, 1),
        ({"pipeline": {"stages": 2, "devices": "cpu"}, "job": {"disk_gib": 0.1}}, 3),
        ({"pipeline": {"devices": "cpu"}, "job": {"disk_gib": 0.1}}, 2),
        ({"job": {"tap_every": 7}}, 7),
        ({"cuda": True}, 2),
        ({"cuda": True, "cuda_graphs": False}, 1),
    ],
)
def test_what_is_written_fits_and_leaves_plans_to_graphs(tmp_path, settings, every) -> None:
    """The demo model writes 0.16 GiB for a hundred prompts of ten tokens and 64 more each."""
    is_cuda = settings.pop("cuda", False)
    job = {"name": "check", "output_tokens": 64} | settings.pop("job", {})
    plain = {"job": job, "model": {"path": "demo", "dtype": "float32"}} | settings
    config = configuration.build({"pipeline": {"devices": "cpu"}} | plain)
    preparation = prepare(config)
    if is_cuda:
        preparation = dataclasses.replace(preparation, devices=["cuda:0"])
    prompts = [[5] * 10] * 100
    assert check._choose_tap_every(config, config.job, preparation, prompts, tmp_path) == every


@pytest.mark.multiproc
def test_prompts_from_a_file_and_one_comparison_alone(command, tmp_path, monkeypatch) -> None:
    """Without transformers; a common beginning may come from the prefix cache."""
    hide_transformers(monkeypatch)
    text = "The same beginning of every prompt, which is longer than a block of the cache. " * 2
    lines = [{"prompt": f"{text}{number}", "temperature": 1.5} for number in range(3)]
    lines.append({"messages": [{"role": "user", "content": "hello"}]})
    lines.append({"prompt": [5, 6, 7]})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = command(
        *("job.input=p.jsonl", "job.against=one_stage", "job.output=-", "pipeline.stages=3"),
        "job.requests=5",
    )
    assert code == EXIT_OK, (out, err)
    result = json.loads(out)
    assert result["transformers"] is None
    assert result["workload"]["requests"] == 5
    assert result["workload"]["chunked_prompts"] >= 1
    assert {"edge 0->1", "edge 1->2"} < {t["name"] for t in result["one_stage"]["tensors"]}


# --------------------------------------------------------------------------------------
# faults


def with_fault(demo_path: Path, folder: Path, name: str, value: float) -> Path:
    """A copy of the demo model with another value in one place of one weight."""
    shutil.copytree(demo_path, folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name].view(-1)[7] = value
    save_file(tensors, path)
    return folder


def check_with_stages_of(folder: Path, tmp_path: Path, dtype: str, **job) -> tuple[int, dict]:
    """The stages run the checkpoint in ``folder``, what they are held against the demo model's."""
    config = configuration.build(
        {
            "job": {
                "name": "check",
                "requests": 6,
                "output_tokens": 4,
                "output": str(tmp_path / "r.json"),
            }
            | job,
            "model": {"path": "demo", "dtype": dtype},
            "pipeline": {"stages": 2, "devices": "cpu", "cpu_threads": 1, "split": [4, 6]},
            "cache": {"memory_gib": 0.1},
            "scheduler": {"max_tokens_per_plan": 64},
        }
    )

    def connect(changed: configuration.Config):
        model = dataclasses.replace(changed.model, path=str(folder))
        return open_client(dataclasses.replace(changed, model=model))

    code = check.run(config, connect=connect)
    return code, json.loads((tmp_path / "r.json").read_text())


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("name", "tensor", "stage", "dtype"),
    [
        ("model.layers.6.mlp.down_proj.weight", "layer.6", 1, "float32"),
        ("model.layers.3.self_attn.k_norm.weight", "layer.3", 0, "bfloat16"),
    ],
)
def test_a_fault_in_one_layer_of_one_stage_is_named(
    demo_path, tmp_path, capsys, name, tensor, stage, dtype
) -> None:
    folder = with_fault(demo_path, tmp_path / "faulty", name, 9.0)
    code, result = check_with_stages_of(folder, tmp_path, dtype)
    assert code == EXIT_TOLERANCE
    faults = {fault["against"]: fault for fault in result["faults"]}
    assert faults.keys() == {"one stage", "transformers"}
    for fault in faults.values():
        assert (fault["name"], fault["stage"]) == (tensor, stage)
    # In the very first plan, and the values that were compared are those in the message.
    where = faults["one stage"]["where"]
    assert where["plan"] == 0
    assert where["actual"] != where["expected"]
    out = capsys.readouterr().out
    assert "within tolerance" not in out
    assert f"OUTSIDE TOLERANCE  against one stage: {tensor} of stage {stage} on cpu: " in out
    assert f"plan 0 row {where['row']} (request {where['request']} token " in out
    assert repr(where["actual"]) in out
    assert f"off by {abs(where['actual'] - where['expected']):.3g}" in out
    # What comes before it differs only where it reads other tokens: not in the first plan.
    differing = {t["name"]: t["differing"] for t in result["one_stage"]["tensors"]}
    assert differing["layer.0"] < differing[tensor]


@pytest.mark.multiproc
def test_not_a_number_is_a_fault_and_no_failure_of_the_job(demo_path, tmp_path, capsys) -> None:
    name = "model.layers.5.post_attention_layernorm.weight"
    folder = with_fault(demo_path, tmp_path / "faulty", name, float("nan"))
    code, result = check_with_stages_of(folder, tmp_path, "float32")
    assert code == EXIT_TOLERANCE
    assert len(result["failed_requests"]) == 6
    by_name = {fault["against"]: fault for fault in result["faults"]}
    assert by_name["one stage"]["name"] == by_name["transformers"]["name"] == "layer.5"
    assert by_name["one stage"]["where"]["actual"] == "nan"
    assert "not finite" in capsys.readouterr().out


@pytest.fixture
def short_folder():
    """Sockets have their place in it, and their addresses may not be long."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.multiproc
def test_sigterm_leaves_no_gigabytes_behind(short_folder) -> None:
    started = subprocess.Popen(
        [sys.executable, "-m", "ember_pp", "job=check", "pipeline.devices=cpu"],
        env=os.environ | {"TMPDIR": str(short_folder)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    deadline_s = time.monotonic() + 60
    while not list(short_folder.glob("ember-pp-check-*/taps/*")):
        assert time.monotonic() < deadline_s
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=30)
    assert started.returncode != EXIT_OK
    assert list(short_folder.glob("ember-pp-check-*")) == []


# --------------------------------------------------------------------------------------
# refusals


def hide_transformers(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coordinator.address=ipc:///tmp/x.sock",), "coordinator.address: job=check starts a"),
        (("debug.tap=taps",), "debug: job=check taps and records by itself"),
        (("debug.record=plans",), "debug: job=check taps and records by itself"),
        (("debug.tap_every=0",), "debug.tap_every: expected at least 1, got 0"),
        (("pipeline.replicas=2",), "pipeline.replicas: job=check looks at one replica"),
        (("job.output=nowhere/r.json",), "job.output: nowhere/r.json cannot be written"),
        (("job.device=tpu",), "job.device: expected cpu or cuda:N, got 'tpu'"),
        (("job.device=cuda:77",), "pipeline.devices: cuda:77 is not there"),
        (("job.tap_every=0",), "job.tap_every: expected at least 1, got 0"),
        (("job.disk_gib=0",), "job.disk_gib: expected above 0, got 0"),
        (("job.against=vllm",), "job.against: expected one of all, transformers, one_stage"),
        (("job.input=nowhere.jsonl",), "job.input: nowhere.jsonl cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    command, monkeypatch, arguments, message
) -> None:
    monkeypatch.setattr(check, "run_child", lambda *_, **__: pytest.fail("it started"))
    code, _, err = command(*arguments)
    assert code == EXIT_CONFIG
    assert err.splitlines()[-1].startswith(f"ember-pp: {message}")


def test_a_missing_extra_is_named(command, monkeypatch) -> None:
    hide_transformers(monkeypatch)
    code, _, err = command()
    assert code == EXIT_CONFIG
    assert "job.against: transformers is not installed; pip install 'ember-pp[compare]'" in err
    assert "job.against=one_stage" in err


def test_one_stage_that_cannot_fit_is_known_at_once(command, monkeypatch) -> None:
    found = check.find_devices
    monkeypatch.setattr(
        check,
        "find_devices",
        lambda names: [dataclasses.replace(d, memory_bytes=2**20) for d in found(names)],
    )
    code, _, err = command()
    assert code == EXIT_CANNOT_FIT
    assert "one stage with all 10 layers needs" in err
    assert "job.against=transformers leaves that comparison out" in err


def test_devices_that_round_differently_are_no_pair(command, monkeypatch) -> None:
    found = check.find_devices
    monkeypatch.setattr(
        check,
        "find_devices",
        lambda names: [
            dataclasses.replace(d, name=f"card {index}") for index, d in enumerate(found(names))
        ],
    )
    code, _, err = command()
    assert code == EXIT_CONFIG
    assert "job.against: stages on card 0 and card 1 round differently" in err


# --------------------------------------------------------------------------------------
# prompts


def prompts_of(**job) -> tuple[list[list[int]], configuration.Config]:
    config = configuration.build(
        {
            "job": {"name": "check"} | job,
            "model": {"path": "demo", "dtype": "float32"},
            "pipeline": {"devices": "cpu"},
            "scheduler": {"max_tokens_per_plan": 100},
        }
    )
    return make_prompts(config, config.job, prepare(config)), config


def test_the_built_in_prompts_have_chunks_and_many_short_ones() -> None:
    prompts, config = prompts_of()
    assert len(prompts) == 256
    lens = sorted(len(prompt) for prompt in prompts)
    assert lens[-2:] == [150] * 2
    assert config.scheduler.max_tokens_per_plan < 150
    assert 3 <= lens[0] < lens[-3] <= 24
    # None is found in the prefix cache by way of another.
    assert len({tuple(prompt[:3]) for prompt in prompts}) > 200


def test_prompts_that_do_not_fit_are_named(tmp_path) -> None:
    with pytest.raises(CapacityError, match=r"job\.output_tokens: 2048 do not fit the context"):
        prompts_of(output_tokens=2048)
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": [1]}\n' + json.dumps({"prompt": [5] * 2040}) + "\n")
    with pytest.raises(CapacityError, match=r"job\.input: prompt 2 has 2040 tokens; .* holds 2032"):
        prompts_of(input=str(path))
    path.write_text('{"prompt": [1]}\n{"prompt": [99999]}\n')
    with pytest.raises(BatchInputError, match=r"long\.jsonl:2: prompt: expected token ids in"):
        prompts_of(input=str(path))
    path.write_text('{"prompt": "x", "tools": 3}\n')
    with pytest.raises(BatchInputError, match=r"long\.jsonl:1: "):
        prompts_of(input=str(path))
    path.write_text('{"prompt": [1, 2]}\n{"prompt": 3}\n')
    assert prompts_of(input=str(tmp_path / "l*"), requests=1)[0] == [[1, 2]]


# --------------------------------------------------------------------------------------
# the verdict


def drift(worst: float, mean: float) -> dict:
    where = {"plan": 3, "row": 2, "request": 1, "position": 9, "element": 5}
    where |= {"actual": 1.5, "expected": 1.0}
    return {"rows": 4, "max_abs": 0.5, "worst": worst, "mean": mean, "where": where}


def result_of(*tensors: tuple[dict, dict | None], gap: float = 0.0) -> dict:
    """Layers 0, 1, ... and logits with these drifts of ours and theirs."""
    names = [*(f"layer.{index}" for index in range(len(tensors) - 1)), "logits"]
    return {
        "failed_requests": [],
        "one_stage": None,
        "transformers": {
            "tensors": [
                {"name": name, "stage": 0, "ours": ours, "theirs": theirs}
                for name, (ours, theirs) in zip(names, tensors, strict=True)
            ],
            "tokens": {"gap": gap, "where": {"actual": 1, "expected": 2}},
        },
    }


def test_the_bound_of_fp32_is_that_of_the_tests() -> None:
    assert check_verdict.FP32 == LOGITS_FP32
    within, beyond = (drift(check_verdict.FP32 * factor, 0.0) for factor in (0.99, 1.01))
    assert check_verdict.judge(result_of((within, None), (within, None))) == []
    [fault] = check_verdict.judge(result_of((within, None), (beyond, None), (beyond, None)))
    assert fault["name"] == "layer.1"
    assert fault["text"] == "relative error 0.000101, allowed 0.0001"


def test_the_bound_of_bf16_is_what_transformers_is_off() -> None:
    theirs = drift(0.02, 0.01)
    assert check_verdict.judge(result_of((drift(0.029, 0.0109), theirs))) == []
    [fault] = check_verdict.judge(result_of((drift(0.031, 0.0109), theirs)))
    assert fault["text"] == "relative error 0.031, allowed 0.03"
    [fault] = check_verdict.judge(result_of((drift(0.02, 0.0111), theirs)))
    assert fault["text"] == "mean relative error 0.0111, allowed 0.011"


def test_a_token_far_below_the_best_is_a_fault() -> None:
    sound = drift(1e-6, 1e-6)
    assert check_verdict.judge(result_of((sound, None), gap=1.9e-4)) == []
    [fault] = check_verdict.judge(result_of((sound, None), gap=2.1e-4))
    assert (fault["name"], fault["where"]) == ("tokens", {"actual": 1, "expected": 2})


def test_not_a_number_is_beyond_every_bound() -> None:
    [fault] = check_verdict.judge(result_of((drift(1e100, 1e100), None)))
    assert fault["text"] == "relative error not finite, allowed 0.0001"


def test_tokens_that_differ_where_no_tensor_was_looked_at_are_a_fault() -> None:
    result = result_of((drift(0, 0), None))
    first = {"plan": 7, "row": 0, "request": 3, "position": 12, "actual": 5, "expected": 6}
    result["one_stage"] = {
        "first": None,
        "tokens": {"compared": 90, "differing": 2, "first": first},
        "tensors": [],
    }
    [fault] = check_verdict.judge(copy.deepcopy(result))
    assert fault["text"] == "2 of 90 tokens differ"
    line = check_report._describe_fault(fault, ["cpu"])
    assert line == (
        "against one stage: tokens: 2 of 90 tokens differ; plan 7 row 0 (request 3 token 12): "
        "5, expected 6"
    )
