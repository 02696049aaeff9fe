"""``job=bench job.workload=handoff``: which edges and paths are timed, and what the table says."""

from __future__ import annotations

import json

import pytest

from ember_pp import __main__ as entry
from ember_pp import config as configuration
from ember_pp.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_OK, ConfigError, EmberError
from ember_pp.jobs import bench_handoff


@pytest.fixture
def command(capsys, tmp_path, monkeypatch):
    """Runs the command in this process: (exit code, output, errors)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = entry.main(["job=bench", "job.workload=handoff", *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def config_of(**groups):
    plain = {"job": {"name": "bench", "workload": "handoff"}, "model": {"path": "demo"}}
    return configuration.build(plain | groups)


@pytest.fixture
def child(monkeypatch):
    """What was asked of child processes; ``answers`` by path, an error being raised."""
    asked, answers = [], {}

    def run_child(module, wanted, *, timeout_s, what):
        assert module == "ember_pp.stage.handoff_rates"
        asked.append(wanted)
        answer = answers.get(wanted["path"], {})
        if isinstance(answer, Exception):
            raise answer
        sizes = [size_of(num_bytes) for num_bytes in wanted["sizes"]]
        plain = {"path": wanted["path"], "devices": wanted["devices"], "sizes": sizes}
        return plain | {"versions": {"torch": "2"}, "uuids": [None, None]} | answer

    monkeypatch.setattr(bench_handoff, "run_child", run_child)
    return asked, answers


def size_of(num_bytes, **changes):
    return {
        "num_bytes": num_bytes,
        "p50_us": 1234.5,
        "p99_us": 2000.0,
        "min_us": 9.87,
        "gb_per_s": 0.5,
        "is_host_bound": False,
    } | changes


@pytest.mark.multiproc
def test_every_size_over_shared_memory(command, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(bench_handoff, "SIZES", (2048, 2**20))
    monkeypatch.setattr(bench_handoff, "HOPS", 8)
    code, out, err = command("pipeline.devices=cpu", "job.output=r.json", "job.repeats=2")
    assert code == EXIT_OK, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["workload"]["name"] == "handoff"
    [pair] = result["handoff"]
    assert pair["devices"] == ["cpu", "cpu"]
    timed = {path["path"]: path for path in pair["paths"]}["host_shm"]
    assert [size["num_bytes"] for size in timed["sizes"]] == [2048, 2**20]
    assert all(size["num_hops"] == 16 and size["p50_us"] > 0 for size in timed["sizes"])
    assert result["conditions"]["versions"]["torch"]
    assert result["conditions"]["processor"]
    assert result["settings"]["job.workload"] == "handoff"
    assert "host_shm p50, us" in out
    assert "2 KiB" in out
    assert "1 MiB" in out


@pytest.mark.parametrize(
    ("pipeline", "pairs"),
    [
        ({"stages": 2, "devices": "cpu"}, [("cpu", "cpu")]),
        ({"stages": 2, "devices": ["cuda:0", "cuda:1"]}, [("cuda:0", "cuda:1")]),
        (
            {"stages": 3, "devices": ["cuda:0", "cuda:1", "cuda:2"]},
            [("cuda:0", "cuda:1"), ("cuda:1", "cuda:2"), ("cuda:2", "cuda:0")],
        ),
        (
            {"stages": 2, "replicas": 2, "devices": ["cuda:0", "cuda:1", "cuda:2", "cuda:2"]},
            [("cuda:0", "cuda:1"), ("cuda:2", "cuda:2")],
        ),
    ],
)
def test_devices_that_hand_on_to_each_other_are_a_pair_once(monkeypatch, pipeline, pairs) -> None:
    monkeypatch.setattr(bench_handoff, "count_gpus", lambda: 3)
    assert bench_handoff.find_pairs(config_of(pipeline=pipeline)) == pairs


def test_a_single_stage_hands_nothing_on() -> None:
    with pytest.raises(ConfigError, match=r"^pipeline\.stages: job\.workload=handoff times"):
        bench_handoff.find_pairs(config_of(pipeline={"stages": 1}))


def test_every_path_that_can_be_forced_is_tried_unless_one_is() -> None:
    assert bench_handoff.find_paths(config_of(handoff="host_shm")) == ["host_shm"]
    for path in (every := bench_handoff.find_paths(config_of())):
        assert config_of(handoff=path).handoff == path
    assert "host_shm" in every
    assert "auto" not in every


def test_a_path_that_is_not_possible_is_in_the_table_with_its_reason(child, monkeypatch) -> None:
    asked, answers = child
    monkeypatch.setattr(bench_handoff, "find_paths", lambda config: ["cuda_ipc", "slow", "shm"])
    answers |= {
        "cuda_ipc": {"reason": "edge 0->1: no GPU"},
        "slow": EmberError("the hand-off slow took more than 9"),
        "shm": {"sizes": [size_of(2048), size_of(2**20, is_host_bound=True)]},
    }
    config = config_of(pipeline={"stages": 2, "devices": "cpu"})
    result = bench_handoff.measure(config, config.job)
    assert [wanted["path"] for wanted in asked] == ["cuda_ipc", "slow", "shm"]
    assert {wanted["laps"] for wanted in asked} == {config.job.repeats}
    lines = bench_handoff.render(result).splitlines()
    assert "  cuda_ipc: not possible: edge 0->1: no GPU" in lines
    assert "  slow: not possible: the hand-off slow took more than 9" in lines
    assert "  shm: bound by the hosts for 1 MiB" in lines
    [row] = [line for line in lines if line.lstrip().startswith("2 KiB")]
    assert row.split() == ["2", "KiB", "1,234.5", "2,000.0", "9.9", "0.5"]


def test_no_path_at_all_is_a_failure(child, command) -> None:
    _, answers = child
    answers |= {path: {"reason": "no"} for path in bench_handoff.find_paths(config_of())}
    code, _, err = command("pipeline.devices=cpu")
    assert code == EXIT_FAILED
    assert "no hand-off between cpu and cpu: " in err
    assert "host_shm: no" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("job.batch=2",), "job.batch: job.workload=handoff sends no requests"),
        (("job.input_tokens=2",), "job.input_tokens: job.workload=handoff sends no requests"),
        (("job.compare=transformers",), "job.compare: transformers hands nothing on"),
        (("job.output=nowhere/r.json",), "job.output: nowhere/r.json cannot be written"),
        (("pipeline.stages=1",), "pipeline.stages: job.workload=handoff times the hop"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    command, monkeypatch, arguments, message
) -> None:
    monkeypatch.setattr(bench_handoff, "run_child", lambda *_, **__: pytest.fail("it started"))
    code, _, err = command(*arguments)
    assert code == EXIT_CONFIG
    assert err.splitlines()[-1].startswith(f"ember-pp: {message}")
