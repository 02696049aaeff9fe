"""``job=bench`` as a stranger types it, and its parts with a client that is not there."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest
from bench_requests import workload_of

from ember_pp import __main__ as entry
from ember_pp import config as configuration
from ember_pp.client import Completion, Delta
from ember_pp.errors import EXIT_CANNOT_FIT, EXIT_CONFIG, EXIT_OK, EmberError
from ember_pp.jobs import bench, bench_report
from ember_pp.jobs.bench_conditions import changed_settings
from ember_pp.jobs.bench_floor import Floor, StageFloor
from ember_pp.jobs.bench_run import BenchRun, run_once, stage_times
from ember_pp.jobs.bench_workload import Stream

SMALL = ("job.warmup=0", "job.repeats=2", "pipeline.devices=cpu", "pipeline.cpu_threads=1")


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs the command in this process: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = entry.main(["job=bench", *SMALL, *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


# --------------------------------------------------------------------------------------
# whole runs


@pytest.mark.multiproc
def test_one_stream_beside_transformers(command, tmp_path) -> None:
    code, out, err = command(
        *("job.output=r.json", "job.output_tokens=12", "job.input_tokens=20"),
        *("job.compare=transformers", "pipeline.run_ahead=1"),
    )
    assert code == EXIT_OK, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["workload"] == {
        "name": "single",
        "batch": 1,
        "input_tokens": 20,
        "output_tokens": 12,
        "temperature": 0.0,
        "seed": 0,
    }
    summary, repeats = result["summary"], result["repeats"]
    assert len(repeats) == 2
    for name in ("step_ms", "ratio", "ttft_ms", "output_tokens_per_s"):
        values = sorted(repeat[name] for repeat in repeats)
        assert values[0] > 0
        assert summary[name] == {
            "median": pytest.approx(sum(values) / 2),
            "min": values[0],
            "max": values[1],
        }
    # 11 steps from the first token to the last; the context is that of the middle of them
    assert repeats[0]["steady_steps"] == 11
    assert repeats[0]["context"] == pytest.approx(20 + (1 + 12) / 2)
    rates = result["rates"]["cpu"]
    stages = result["floor"]["stages"]
    num_bytes = sum(
        stage["weight_bytes"] + repeats[0]["context"] * stage["kv_bytes_per_token"]
        for stage in stages
    )
    assert repeats[0]["floor_ms"] == pytest.approx(num_bytes / rates["read_bytes_per_s"] * 1e3)
    assert result["compare"]["ours"] == summary["step_ms"]
    for other in result["compare"]["others"].values():
        assert other["equal_first_tokens"] == 1
        assert other["times_ours"] == pytest.approx(
            other["summary"]["median"] / summary["step_ms"]["median"]
        )
    versions = result["conditions"]["versions"]
    assert versions["torch"]
    assert versions["ember_pp"]
    assert result["settings"]["job.compare"] == "transformers"
    assert [stage["layers"] for stage in result["stages"]] == [[0, 5], [5, 10]]
    assert all(stage["busy_ms_per_plan"] > 0 for stage in result["stages"])
    assert "times ours" in out
    assert "floor / measured" in out


@pytest.mark.multiproc
def test_a_fixed_batch_on_stdout(command) -> None:
    code, out, err = command(
        *("job.workload=fixed", "job.batch=5", "job.input_tokens=9", "job.output_tokens=30"),
        *("model.load=random", "job.output=-", "pipeline.stages=1"),
    )
    assert code == EXIT_OK, err
    result = json.loads(out)
    assert result["model"] == {"path": "demo", "dtype": "float32", "load": "random"}
    assert result["num_preemptions"] == 0
    assert all(repeat["cached_tokens"] == 0 for repeat in result["repeats"])
    repeat = result["repeats"][0]
    assert repeat["steady_output_tokens_per_s"] == pytest.approx(5e3 / repeat["step_ms"])
    assert result["latency"]["tpot_ms"]["p50"] <= result["latency"]["tpot_ms"]["p99"]
    assert result["compare"] is None
    assert "decode step, ms" in err


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("arguments", "kind", "name"),
    [
        (("job.workload=mixed", "job.batch=6", "job.lengths=[5,20]"), "whole", "elapsed_s"),
        (("job.workload=prefill", "job.input_tokens=40"), "prefill", "prompt_tokens_per_s"),
    ],
)
def test_whole_workloads(command, tmp_path, arguments, kind, name) -> None:
    code, _, err = command(*arguments, "job.output=r.json", "job.repeats=1")
    assert code == EXIT_OK, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["floor"]["kind"] == kind
    repeat = result["repeats"][0]
    assert repeat[name] > 0
    assert repeat["ratio"] == pytest.approx(repeat["floor_ms"] / 1e3 / repeat["elapsed_s"])


@pytest.mark.multiproc
def test_a_batch_that_the_cache_does_not_hold_cannot_fit(command) -> None:
    code, _, err = command("job.workload=fixed", "cache.memory_gib=0.02")
    assert code == EXIT_CANNOT_FIT
    assert "job.batch: 64 requests need 49,152 tokens of KV cache, there are" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("job.workload=fixed", "job.batch=65"), "job.batch: 65 requests cannot decode together"),
        (("job.workload=single", "job.batch=2"), "job.batch: job.workload=single is one request"),
        (("job.workload=prefill", "job.output_tokens=2"), "job.output_tokens: job.workload=pre"),
        (("job.output_tokens=1",), "job.output_tokens: job.workload=single times tokens"),
        (("job.workload=mixed", "job.input_tokens=9"), "job.input_tokens: job.workload=mixed"),
        (("job.workload=mixed", "job.compare=transformers"), "job.compare: transformers has no"),
        (("job.workload=mixed", "job.lengths=[9,8]"), "job.lengths: expected [shortest, longest]"),
        (("job.lengths=[9]",), "job.lengths: expected [shortest, longest]"),
        (("job.repeats=0",), "job.repeats: expected at least 1"),
        (("job.output=nowhere/r.json",), "job.output: nowhere/r.json cannot be written"),
        (("coordinator.address=ipc:///tmp/x.sock",), "coordinator.address: job=bench starts a"),
        (("job.input_tokens=3000",), "job.input_tokens, job.output_tokens: a prompt of 3000"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    command, monkeypatch, arguments, message
) -> None:
    monkeypatch.setattr(bench, "run_child", lambda *_, **__: pytest.fail("it started"))
    code, _, err = command(*arguments)
    assert code == EXIT_CONFIG
    assert err.splitlines()[-1].startswith(f"ember-pp: {message}")


def test_a_missing_peer_is_named_with_what_to_install(command, monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "transformers" else found(name)
    )
    code, _, err = command("job.compare=transformers")
    assert code == EXIT_CONFIG
    assert "job.compare: transformers is not installed; pip install 'ember-pp[compare]'" in err


# --------------------------------------------------------------------------------------
# parts


class FakeAnswer:
    """Tokens that came one at a time."""

    def __init__(self, fields, output_tokens):
        self.fields = fields
        now_s = time.monotonic()
        self._deltas = [
            Delta(text="", token_ids=[7], logprobs=[], received_s=now_s + second)
            for second in range(output_tokens)
        ]

    def __iter__(self):
        return iter(self._deltas)

    def result(self):
        return Completion(
            request_id="r",
            text="",
            token_ids=[7] * len(self._deltas),
            logprobs=[],
            finish_reason="length",
            stop_reason=None,
            num_prompt_tokens=len(self.fields["token_ids"]),
            num_cached_tokens=0,
            num_output_tokens=len(self._deltas),
        )


class FakeClient:
    """Answers at once, ``missing`` tokens short."""

    def __init__(self, missing=0):
        self.missing = missing
        self.answers = []
        self._ended = []

    def submit(self, **fields):
        answer = FakeAnswer(fields, fields["sampling"]["max_tokens"] - self.missing)
        self.answers.append(answer)
        self._ended.append(answer)
        return answer

    def wait_any(self, timeout_s=None):
        ended, self._ended = self._ended, []
        return ended


def test_a_run_asks_for_exactly_its_tokens_and_keeps_the_settings_of_the_job() -> None:
    client = FakeClient()
    run = run_once(client, workload_of([(3, 4), (5, 2)]), {"temperature": 0.7, "top_k": 5})
    asked = [answer.fields["sampling"] for answer in client.answers]
    assert asked[0] == {"temperature": 0.7, "top_k": 5, "max_tokens": 4, "ignore_eos": True}
    assert asked[1]["max_tokens"] == 2
    assert all(answer.fields["stream"] for answer in client.answers)
    assert [stream.output_tokens for stream in run.streams] == [4, 2]
    assert run.elapsed_s == pytest.approx(3.0, abs=0.5)
    assert run.streams[0].tpot_s == pytest.approx(1.0)


def test_an_answer_that_is_too_short_does_not_count() -> None:
    with pytest.raises(EmberError, match=r"ended with 3 of 4 tokens \(length\)"):
        run_once(FakeClient(missing=1), workload_of([(3, 4)]), {})


def run_of(*arrivals: list[tuple[float, int]]) -> BenchRun:
    streams = [Stream(input_tokens=10, arrivals=times, first_token=0) for times in arrivals]
    return BenchRun(elapsed_s=max(stream.end_s for stream in streams), streams=streams)


FLOOR = Floor(
    stages=[
        StageFloor(
            device="cuda:0",
            read_bytes_per_s=1000.0,
            flops_per_s=1e9,
            weight_bytes=200,
            kv_bytes_per_token=1,
            flops_per_token=1,
            flops_per_row=1,
        )
    ],
    microbatches=1,
)


def test_a_ratio_is_the_floor_over_what_was_measured() -> None:
    run = run_of([(1.0 + second, 1) for second in range(5)])
    numbers = bench_report.measure_run(run, workload_of([(10, 5)], "single"), FLOOR)
    context = 10 + (1 + 5) / 2
    assert numbers["step_ms"] == pytest.approx(1000.0)
    assert numbers["floor_ms"] == pytest.approx(200 + context)
    assert numbers["ratio"] == pytest.approx((200 + context) / 1000)
    assert numbers["output_tokens_per_s"] == pytest.approx(5 / 5.0)


def test_a_batch_that_never_decodes_together_has_no_ratio() -> None:
    run = run_of([(1.0, 1), (2.0, 1)], [(3.0, 1), (4.0, 1)])
    workload = workload_of([(10, 2), (10, 2)])
    numbers = bench_report.measure_run(run, workload, FLOOR)
    assert numbers["ratio"] is None
    summary = bench_report.summarize([numbers, numbers])
    assert "ratio" not in summary
    lines = bench_report._ratio_lines({"summary": summary, "floor": {"kind": "step"}})
    assert lines[0].startswith("no ratio: ")


def test_percentiles_are_values_that_were_measured() -> None:
    runs = [run_of([(float(second), 1)]) for second in range(1, 101)]
    ttft = bench_report.latencies(runs)["ttft_ms"]
    assert ttft == {"min": 1e3, "p50": 50e3, "p90": 90e3, "p99": 99e3, "max": 100e3}
    assert "tpot_ms" not in bench_report.latencies(runs)


def test_times_of_stages_are_those_between_two_statuses() -> None:
    def status(busy_ns: int, plan: int) -> dict[str, object]:
        stage = {"replica": 0, "stage_index": 0, "device": "cpu", "start_layer": 0, "end_layer": 4}
        times = {"busy_ns": busy_ns, "host_gap_ns": busy_ns // 3, "plan": plan}
        return {"stages": [stage | times]}

    [times] = stage_times(status(3_000_000, 10), status(9_000_000, 14))
    assert times["plans"] == 4
    assert times["busy_ms_per_plan"] == pytest.approx(1.5)
    assert times["busy_fraction"] == pytest.approx(0.75)


def test_settings_in_a_result_are_those_that_were_changed() -> None:
    config = configuration.build(
        {
            "job": {"name": "bench", "workload": "fixed"},
            "model": {"path": "demo", "architecture": {"model_type": "qwen3"}},
            "scheduler": {"max_sequences": 256},
            "kernels": "reference",
        }
    )
    assert changed_settings(config) == {
        "job.workload": "fixed",
        "model.path": "demo",
        "scheduler.max_sequences": 256,
        "kernels": "reference",
    }
