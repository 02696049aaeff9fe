"""scripts/gpu_check: every step has its turn, and its outcome is what the command said."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from scripts import gpu_check
from scripts.gpu_check import Step

GOOD = "print('fine')"
JUNIT = """<testsuites><testsuite>
<testcase classname="a" name="good" time="1.0"><properties>
<property name="error" value="0.5"/><property name="error" value="0.25"/></properties></testcase>
<testcase classname="a" name="odd[1]"><failure message="no"/></testcase>
<testcase classname="a" name="odd[1]"><error message="teardown"/></testcase>
<testcase classname="b" name="broken"><error message="setup"/></testcase>
<testcase classname="b" name="away"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def step(name: str, code: str, *, passed: int = 3, limit_s: float = 60.0, **more) -> Step:
    command = [sys.executable, "-c", code]
    return Step(name, command, lambda output: {"passed": passed}, limit_s=limit_s, **more)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """``run(steps, *arguments)``: exit code, and the result that was written to ``--output``."""

    def run(steps: Sequence[Step], *arguments: str) -> tuple[int, dict]:
        monkeypatch.setattr(gpu_check, "make_steps", lambda *arguments: steps)
        monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
        output = tmp_path / "result.json"
        code = gpu_check.main([*arguments, "--output", str(output)])
        return code, json.loads(output.read_text())

    return run


def test_all_steps_have_their_turn_and_one_failure_is_the_outcome(run) -> None:
    steps = [
        step("first", GOOD),
        step("bad", "print('oh'); raise SystemExit(3)"),
        step("empty", GOOD, passed=0),
        step("lost", GOOD, needs=("no_such_package",)),
        step("last", GOOD),
        step("dear", GOOD, must_be_named=True),
    ]
    code, result = run(steps)
    assert code == 1
    assert not result["passed"]
    outcomes = {row["name"]: (row["outcome"], row.get("reason")) for row in result["steps"]}
    assert outcomes == {
        "first": ("passed", None),
        "bad": ("failed", "exit code 3"),
        "empty": ("failed", "nothing was checked"),
        "lost": ("not run", "missing: the Python package no_such_package"),
        "last": ("passed", None),
    }
    assert result["left_out"] == ["dear"]
    assert result["is_whole"]
    assert result["steps"][0]["counts"] == {"passed": 3}
    assert result["steps"][0]["command"] == "python -c 'print('\"'\"'fine'\"'\"')'"
    assert result["seconds"] >= sum(row["seconds"] for row in result["steps"]) - 0.5
    assert {"commit", "torch", "versions"} <= result["conditions"].keys()


def test_what_is_missing_may_be_allowed(run) -> None:
    steps = [step("first", GOOD), step("lost", GOOD, needs=("no_such_package",))]
    assert run(steps)[0] == 1
    assert run(steps, "--allow-missing")[0] == 0
    assert run(steps, "first")[0] == 0


def test_steps_are_chosen_by_name(run, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [step("first", GOOD), step("bad", "1 / 0"), step("benchmark", GOOD, must_be_named=True)]
    assert [row["name"] for row in run(steps, "first")[1]["steps"]] == ["first"]
    assert [row["name"] for row in run(steps, "benchmark", "first")[1]["steps"]] == [
        "first",
        "benchmark",
    ]
    assert len(run(steps, "--benchmark")[1]["steps"]) == 3
    with pytest.raises(SystemExit) as refused:
        run(steps, "fist")
    assert refused.value.code == 2
    assert "no such step: fist; there are first bad benchmark" in capsys.readouterr().err


def test_a_step_ends_at_its_limit_with_all_that_it_started(run, tmp_path: Path) -> None:
    child = "import time; time.sleep(60)"
    code = (
        "import subprocess, sys, pathlib\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "child.wait()\n"
    )
    exit_code, result = run([step("slow", code, limit_s=1.5), step("last", GOOD)])
    assert exit_code == 1
    assert result["steps"][0]["reason"] == "not done after 2 s"
    assert result["steps"][0]["seconds"] < 30
    assert result["steps"][1]["outcome"] == "passed"
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_neighbours_run_at_the_same_time_where_there_are_cores(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waits for the file that the other makes."""

    def meeting(own: str, other: str) -> str:
        return (
            f"import pathlib, time\n(pathlib.Path({str(tmp_path)!r}) / {own!r}).write_text('')\n"
            f"while not (pathlib.Path({str(tmp_path)!r}) / {other!r}).exists(): time.sleep(0.01)\n"
        )

    pair = [
        step("a", meeting("a", "b"), together="pair", limit_s=30.0),
        step("b", meeting("b", "a"), together="pair", limit_s=30.0),
    ]
    monkeypatch.setattr(gpu_check, "CORES_FOR_SEVERAL", 1)
    code, result = run([*pair, step("c", GOOD)])
    assert code == 0
    assert [row["name"] for row in result["steps"]] == ["a", "b", "c"]
    for name in ("a", "b"):
        (tmp_path / name).unlink()
    monkeypatch.setattr(gpu_check, "CORES_FOR_SEVERAL", 10**6)
    pair = [dataclasses.replace(one, limit_s=1.5) for one in pair]
    outcomes = [row["outcome"] for row in run(pair)[1]["steps"]]
    assert outcomes == ["failed", "passed"], "the first waits in vain; the second finds its file"


def test_without_a_gpu_nothing_is_run_and_nothing_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    assert gpu_check.main(["--output", str(tmp_path / "result.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_a_part_is_no_record_of_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "make_steps", lambda *arguments: [step("one", GOOD)])
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu_check, "RESULT", tmp_path / "whole.json")
    assert gpu_check.main(["one"]) == 0
    assert not (tmp_path / "whole.json").exists()
    assert gpu_check.main([]) == 0
    assert (tmp_path / "whole.json").exists()


def test_what_is_known_is_on_the_disk_after_each_step(run, tmp_path: Path) -> None:
    look = (
        f"import json; result = json.load(open({str(tmp_path / 'result.json')!r}))\n"
        "assert not result['is_whole'] and len(result['steps']) == 1"
    )
    assert run([step("first", GOOD), step("looks", look)])[0] == 0


def test_tests_are_counted_with_failures_by_name(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(JUNIT)
    assert gpu_check.count_tests(tmp_path / "report.xml") == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["a::odd[1]", "b::broken"],
        "skip_reasons": ["no CUDA device"],
        "worst": {"error": 0.5},
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", {"errors": 0}),
        ("========= ERROR SUMMARY: 12 errors", {"errors": 12}),
        (
            "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)",
            {"errors": 1, "warnings": 2},
        ),
        ("nothing of it", {}),
    ],
)
def test_findings_are_read_from_the_last_line(line: str, expected: dict[str, int]) -> None:
    assert gpu_check.count_findings(f"some output\n{line}\n") == expected


def test_every_test_for_a_gpu_is_in_a_step_and_every_tool_watches_every_kernel(
    tmp_path: Path,
) -> None:
    all_steps = gpu_check.make_steps(tmp_path, "/cuda/compute-sanitizer", 6)
    steps = {step.name: step for step in all_steps}
    tools = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert list(steps) == ["kernels", "tests", "oracle", "engine", *tools, "alone", "benchmark"]
    assert not steps["alone"].together, "alone on the card"
    for tool in tools:
        command = list(steps[tool].command)
        assert command[:3] == ["/cuda/compute-sanitizer", "--tool", tool]
        assert command[command.index("scripts.sanitize_kernels") + 1] == "--report"
    folder = {"tests/gpu"}
    ran = {word for step in steps.values() for word in step.command if word.startswith("tests")}
    left_out = {
        word.removeprefix("--ignore=")
        for step in steps.values()
        for word in step.command
        if word.startswith("--ignore=")
    }
    assert left_out <= ran | folder
    assert "tests" in ran


def test_a_missing_tool_is_named_with_where_it_is_from(tmp_path: Path) -> None:
    by_name = {step.name: step for step in gpu_check.make_steps(tmp_path, "", 1)}
    assert "CUDA toolkit" in gpu_check.missing(by_name["racecheck"], "")[0]
    assert gpu_check.missing(by_name["racecheck"], "/cuda/compute-sanitizer") == []


def test_command_lines_hold_no_folders_of_a_machine(tmp_path: Path) -> None:
    command = ["/opt/cuda/bin/compute-sanitizer", sys.executable, "-m", "x", str(tmp_path / "a b")]
    assert gpu_check.readable(command) == "compute-sanitizer python -m x 'a b'"
    assert os.sep not in gpu_check.readable(command)
