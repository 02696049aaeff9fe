"""The script for several GPUs: what it runs and in which order, what it keeps, what ratios say."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import multi_gpu, multi_gpu_cases, multi_gpu_child, multi_gpu_ratios
from benchmarks.multi_gpu_cases import Case, all_cases
from benchmarks.multi_gpu_child import FOLDER, OUTPUT, Command
from benchmarks.multi_gpu_serving import silence_end
from ember_pp import __main__ as entry
from ember_pp import config as configuration

GPUS = ["cuda:0", "cuda:1"]
CPUS = ["cpu", "cpu"]
FOLDER_OF_RESULTS = Path("/results")


def cases_of(part, devices=GPUS, models=("8b", "32b")):
    return [case for case in all_cases(devices, models, FOLDER_OF_RESULTS) if case.part == part]


# --------------------------------------------------------------------------------------
# what is run


@pytest.mark.parametrize(
    "devices", [GPUS, CPUS, ["cuda:0", "cuda:0"], [f"cuda:{i}" for i in "012"]]
)
def test_parts_come_by_worth_and_no_name_twice(devices) -> None:
    cases = all_cases(devices, ("8b",), FOLDER_OF_RESULTS)
    parts = list(dict.fromkeys(case.part for case in cases))
    assert tuple(parts) == multi_gpu_cases.PARTS
    names = [(case.part, case.name) for case in cases]
    assert len(set(names)) == len(names)


def test_a_part_of_two_gpus_ends_within_its_limit_where_no_case_takes_all_of_its_own() -> None:
    """Every case has a limit, and the longest is shorter than a part."""
    for case in all_cases(GPUS, multi_gpu_cases.MODELS, FOLDER_OF_RESULTS):
        limits_s = [command.limit_s for command in case.commands.values()]
        assert sum(limits_s) <= multi_gpu.LIMIT_S, case.name
    assert multi_gpu.LIMIT_S < 9 * 60


def jobs_of(devices):
    """Of two stages with ``split=auto``; the others are spelled alike."""
    return [
        command.arguments[1:]
        for case in all_cases(devices, ("8b",), FOLDER_OF_RESULTS)
        for command in case.commands.values()
        if command.arguments[0] == "ember_pp"
        and not command.skip
        and not case.name.endswith(("1 stages, auto", "equal"))
    ]


@pytest.mark.parametrize("devices", [GPUS, CPUS], ids=str)
def test_every_job_composes(devices, monkeypatch) -> None:
    built = []
    monkeypatch.setattr(entry, "_run_job", lambda composed: built.append(composed) or 0)
    jobs = jobs_of(devices)
    for arguments in jobs:
        arguments = [one.replace(FOLDER, "/folder") for one in arguments]
        assert entry.main(arguments) == 0, arguments
    assert len(built) == len(jobs) > 10
    for composed in built:
        config = configuration.build(entry.OmegaConf.to_container(composed, resolve=True))
        batch = getattr(config.job, "batch", None) or 1
        assert batch <= config.scheduler.max_sequences or config.job.workload == "handoff"


def test_models_come_by_worth_and_equal_splits_last() -> None:
    names = [case.name for case in cases_of("models")]
    assert names[:3] == [
        "8b, decode-64, 1 stages, auto",
        "8b, decode-64, 2 stages, auto",
        "8b, single, 1 stages, auto",
    ]
    first_equal = next(i for i, name in enumerate(names) if name.endswith("equal"))
    assert all(name.endswith("equal") for name in names[first_equal:])
    assert not any("1 stages, equal" in name for name in names), "one stage has no split"


def test_every_gpu_has_the_same_tokens_in_flight() -> None:
    for case in cases_of("models"):
        arguments = case.commands["bench"].arguments
        batch = int(next(a for a in arguments if a.startswith("job.batch=")).partition("=")[2])
        for_one = multi_gpu_cases.LOADS[case.facts["load"]].batch
        if case.facts["load"] == "single":
            assert batch == 1
        else:
            assert batch == for_one * case.facts["stages"]
        assert f"scheduler.max_sequences={batch}" in arguments


def test_a_prediction_is_for_the_requests_of_the_run() -> None:
    for case in cases_of("models"):
        if case.facts["stages"] == 1:
            assert "plan" not in case.commands
            continue
        rows = case.commands["plan"].files["requests.csv"]().splitlines()[1:]
        bench = case.commands["bench"].arguments
        assert f"job.batch={len(rows)}" in bench
        if case.facts["load"] == "prefill-32k":
            assert set(rows) == {"0,32768,1"}


@pytest.mark.parametrize(
    ("num_devices", "counts"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8])]
)
def test_stage_counts_are_powers_of_two_and_all(num_devices, counts) -> None:
    assert multi_gpu_cases.stage_counts(num_devices) == counts


@pytest.mark.parametrize(
    ("devices", "count"), [(GPUS, 2), (["cuda:0"] * 2, 1), (CPUS, 2), (["cuda:0", "cpu"], 2)]
)
def test_stages_on_one_gpu_are_one_gpu(devices, count) -> None:
    assert multi_gpu_cases.num_gpus(devices) == count


@pytest.mark.parametrize("devices", [CPUS, ["cuda:0", "cuda:0"]])
def test_what_needs_two_gpus_is_skipped_with_its_reason(devices) -> None:
    [hops] = cases_of("handoff", devices)
    assert hops.commands["hops"].skip == ""
    assert hops.commands["nccl"].skip.startswith("NCCL takes one process a GPU: ")
    assert hops.commands["peer"].skip.startswith("no copy between GPUs: ")


def test_neighbours_are_timed_before_other_pairs() -> None:
    names = [case.name for case in cases_of("handoff", [f"cuda:{i}" for i in range(4)])]
    assert names == ["0-1", "1-2", "2-3", "0-2", "0-3", "1-3"]


@pytest.mark.parametrize(
    ("given", "num_gpus", "devices"),
    [
        (None, 3, ["cuda:0", "cuda:1", "cuda:2"]),
        ("0,0", 1, ["cuda:0", "cuda:0"]),
        ("cpu,cpu", 0, CPUS),
    ],
)
def test_devices_are_those_given_or_all(given, num_gpus, devices) -> None:
    assert multi_gpu.choose_devices(given, num_gpus) == devices


@pytest.mark.parametrize(("num_gpus", "hint"), [(0, "cpu,cpu"), (1, "0,0")])
def test_fewer_than_two_devices_are_refused_with_what_to_give(num_gpus, hint) -> None:
    with pytest.raises(ValueError, match=f"give --devices {hint}"):
        multi_gpu.choose_devices(None, num_gpus)


# --------------------------------------------------------------------------------------
# children


def child(code: str, **fields) -> Command:
    """A module of the standard library that runs ``code``."""
    return Command(arguments=("timeit", "-n", "1", "-r", "1", code), **({"limit_s": 20} | fields))


def test_a_child_writes_a_file_or_a_last_line() -> None:
    arguments = ("json.tool", f"{FOLDER}/in.json", OUTPUT)
    command = Command(arguments=arguments, limit_s=20, files={"in.json": lambda: '{"a": 1}'})
    said = multi_gpu_child.run(command)
    assert said["result"] == {"a": 1}
    assert 0 <= said["took_s"] < 20
    printed = json.dumps({"at": FOLDER})
    code = f"import os; print('{printed}', flush=True); os._exit(0)"
    assert multi_gpu_child.run(child(code))["result"] == {"at": FOLDER}, "the folder is gone"
    printing = Command(arguments=("json.tool", "--compact"), limit_s=20, stdin={"b": 2})
    assert multi_gpu_child.run(printing)["result"] == {"b": 2, "parent_pid": os.getpid()}


def test_a_child_that_is_over_its_limit_ends_with_what_it_started(tmp_path) -> None:
    code = (
        "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; "
        f"time.sleep(60)']); open('{tmp_path}/pid', 'w').write(str(p.pid)); p.wait()"
    )
    started_s = time.monotonic()
    said = multi_gpu_child.run(child(code, limit_s=3))
    assert said["error"] == "took more than 3 s"
    assert "cut" not in said
    assert time.monotonic() - started_s < 15
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_child_that_the_part_has_no_time_for_is_cut_off() -> None:
    said = multi_gpu_child.run(child("import time; time.sleep(60)", limit_s=50), left_s=2)
    assert (said["error"], said["cut"]) == ("took more than 2 s", True)


def test_a_child_that_fails_says_its_last_line() -> None:
    said = multi_gpu_child.run(child("raise SystemExit('no such GPU')"))
    assert said["error"] == "exit code 1: SystemExit: no such GPU"
    assert multi_gpu_child.run(child("import os; os._exit(3)"))["skipped"] == ""
    assert multi_gpu_child.run(child("print('no JSON')"))["error"].startswith("no JSON came")


def test_a_child_that_is_not_possible_is_skipped_with_the_reason() -> None:
    said = multi_gpu_child.run(Command(arguments=("no_such_module",), limit_s=1, skip="one GPU"))
    assert said == {"skipped": "one GPU"}
    code = 'print(\'{"reason": "not between these"}\'); import os; sys = os._exit(0)'
    code = (
        'import sys, os; sys.stdout.write(\'{"reason": "no"}\\n\'); sys.stdout.flush(); os._exit(0)'
    )
    assert multi_gpu_child.run(child(code))["skipped"] == "no"


# --------------------------------------------------------------------------------------
# what is kept


def case_of(name="a", part="probe", commands=("one",)) -> Case:
    return Case(
        part=part, name=name, commands={c: Command(arguments=(), limit_s=1) for c in commands}
    )


def run_of(time="t0", commit="c0", devices=("cuda:0",)):
    return {"time": time, "commit": commit, "devices": list(devices)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "r.json"


RESULT = {"one": {"result": {"x": 1}, "took_s": 1.0}}


def test_what_is_there_for_this_commit_and_these_devices_is_not_run_again(path) -> None:
    multi_gpu.Store(path, run_of()).put(case_of(), RESULT)
    assert multi_gpu.Store(path, run_of("t1")).has(case_of())
    assert not multi_gpu.Store(path, run_of("t1")).has(case_of("b"))
    assert not multi_gpu.Store(path, run_of("t1")).has(case_of(part="models"))
    assert not multi_gpu.Store(path, run_of("t1")).has(case_of(commands=("one", "two")))
    assert not multi_gpu.Store(path, run_of("t1", commit="c1")).has(case_of())
    assert not multi_gpu.Store(path, run_of("t1", devices=["cuda:1"])).has(case_of())


@pytest.mark.parametrize(
    ("said", "is_there"), [({"skipped": "no"}, True), ({"error": "it broke"}, False)]
)
def test_what_failed_is_run_again_and_what_is_not_possible_is_not(path, said, is_there) -> None:
    multi_gpu.Store(path, run_of()).put(case_of(), {"one": said})
    assert multi_gpu.Store(path, run_of("t1")).has(case_of()) is is_there


def test_results_of_several_calls_are_merged_with_the_conditions_of_each(path) -> None:
    multi_gpu.Store(path, run_of("t0")).put(case_of("a", "models"), RESULT)
    multi_gpu.Store(path, run_of("t0")).put(case_of("b"), RESULT)
    store = multi_gpu.Store(path, run_of("t1", "c1"))
    store.put(case_of("b"), {"one": {"result": {"x": 2}}})
    plain = json.loads(path.read_text())
    assert list(plain["parts"]) == ["probe", "models"]
    assert plain["parts"]["probe"]["b"]["said"]["one"]["result"] == {"x": 2}
    assert {name: run["commit"] for name, run in plain["runs"].items()} == {"t0": "c0", "t1": "c1"}
    store.put(case_of("a", "models"), RESULT)
    assert list(json.loads(path.read_text())["runs"]) == ["t1"], "nothing refers to t0 any more"


def run_part(path, cases, monkeypatch, took_s=0.0, **how):
    ran, now_s = [], [0.0]

    def run(command, *, left_s):
        ran.append(left_s)
        now_s[0] += took_s
        return {"result": {}, "took_s": took_s}

    monkeypatch.setattr(multi_gpu.multi_gpu_child, "run", run)
    monkeypatch.setattr(multi_gpu.time, "monotonic", lambda: now_s[0])
    store = multi_gpu.Store(path, run_of("t1"))
    multi_gpu.run_part(cases, store, **({"limit_s": 100.0, "again": False} | how))
    return ran, store


def test_a_part_goes_on_where_it_stopped(path, monkeypatch) -> None:
    cases = [case_of(name) for name in "abcd"]
    ran, _ = run_part(path, cases, monkeypatch, took_s=45.0)
    assert ran == [100.0, 55.0], "10 s are too little for a third"
    ran, store = run_part(path, cases, monkeypatch, took_s=1.0)
    assert len(ran) == 2
    assert all(store.has(case) for case in cases)
    ran, _ = run_part(path, cases, monkeypatch, again=True)
    assert len(ran) == 4


def test_what_the_part_cut_off_is_not_stored(path, monkeypatch) -> None:
    said = [{"result": {}, "took_s": 1.0}, {"error": "took more than 9 s", "cut": True}]
    monkeypatch.setattr(multi_gpu.multi_gpu_child, "run", lambda command, *, left_s: said.pop(0))
    store = multi_gpu.Store(path, run_of())
    case = case_of(commands=("one", "two"))
    multi_gpu.run_part([case], store, limit_s=50.0, again=False)
    assert list(store.parts["probe"]["a"]["said"]) == ["one"]
    assert not store.has(case), "it runs as a whole again"


# --------------------------------------------------------------------------------------
# ratios


def sizes(*hops_us, gb_per_s=100.0):
    """Hops of 8 KiB, 64 KiB, 1 MiB and 64 MiB."""
    return [
        {"num_bytes": num_bytes, "p50_us": us, "gb_per_s": gb_per_s}
        for num_bytes, us in zip((2**13, 2**16, 2**20, 2**26), hops_us, strict=True)
    ]


def row_of(rows, what):
    [row] = [row for row in rows if row["what"].startswith(what)]
    return row


def hop_rows(ipc, nccl, copies):
    paths = [{"path": "cuda_ipc", "sizes": ipc}, {"path": "host_shm", "reason": "no"}]
    said = {
        "hops": {"result": {"handoff": [{"devices": GPUS, "paths": paths}]}},
        "nccl": {"result": {"sizes": nccl}},
        "peer": {"result": {"pairs": [{"copies": sizes(0, 0, 0, 0, gb_per_s=r)} for r in copies]}},
    }
    return multi_gpu_ratios.summarize({"handoff": {"0-1": {"facts": {}, "said": said}}})


def test_hops_are_held_against_their_aims() -> None:
    ipc = sizes(2.0, 4.0, 9.0, 700.0, gb_per_s=90.0)
    rows = hop_rows(ipc, sizes(20.0, 11.0, 30.0, 800.0), copies=[120.0, 100.0])
    own = row_of(rows, "hop 0-1, cuda_ipc, up to 64 KiB")
    assert (own["number"], own["reaches"]) == (4.0, True)
    faster = row_of(rows, "hop 0-1, NCCL over cuda_ipc")
    assert (faster["number"], faster["reaches"]) == (11.0 / 4.0, False)
    share = row_of(rows, "hop 0-1, cuda_ipc, 64 MiB")
    assert (share["number"], share["reaches"]) == (pytest.approx(0.9), False)
    assert "aim" not in row_of(rows, "hop 0-1, NCCL, up to")


def model_case(
    stages, value, *, load="decode-64", gpus=None, workload="fixed", has_aims=True, **said
):
    metric = {"fixed": "steady_output_tokens_per_s", "single": "step_ms"}[workload]
    result = {
        "workload": {"name": workload},
        "summary": {metric: {"median": value}, "output_tokens_per_s": {"median": 1.0}},
        "stages": [{"busy_fraction": 0.9}, {"busy_fraction": 0.8}],
    }
    facts = {"model": "8b", "load": load, "stages": stages, "gpus": gpus or stages}
    facts |= {"split": "auto", "has_aims": has_aims}
    return {"facts": facts, "said": {"bench": {"result": result}} | said}


def predicted(*bubbles):
    return {"result": {"simulation": {"one_replica": {"bubbles": list(bubbles)}}}}


def model_rows(*cases):
    named = {f"{index}": case for index, case in enumerate(cases)}
    return multi_gpu_ratios.summarize({"models": named})


def test_throughput_is_that_of_each_gpu_over_one_gpu_alone() -> None:
    rows = model_rows(model_case(1, 1000.0), model_case(2, 1970.0), model_case(4, 3840.0))
    two = row_of(rows, "8b, decode-64, 2 stages, auto: throughput of a GPU over that with 1 stage")
    assert (two["number"], two["aim"], two["reaches"]) == (0.985, "0.98", True)
    four = row_of(rows, "8b, decode-64, 4 stages, auto: throughput")
    assert (four["number"], four["aim"], four["reaches"]) == (0.96, "0.96", True)


def test_stages_that_share_a_gpu_are_held_against_that_gpu_without_an_aim() -> None:
    rows = model_rows(model_case(1, 1000.0), model_case(2, 950.0, gpus=1))
    row = row_of(rows, "8b, decode-64, 2 stages, auto: throughput")
    assert row["number"] == 0.95
    assert "aim" not in row


def test_cpus_have_no_aims() -> None:
    prediction = {"plan": predicted(0.2, 0.1), "has_aims": False}
    rows = model_rows(model_case(1, 1000.0), model_case(2, 950.0, **prediction))
    assert len(rows) == 4
    assert not any("aim" in row for row in rows)


def test_what_does_not_fit_one_gpu_is_held_against_the_fewest() -> None:
    alone = {"facts": model_case(1, 1.0)["facts"], "said": {"bench": {"skipped": "too large"}}}
    rows = model_rows(alone, model_case(2, 1000.0), model_case(4, 1900.0))
    row = row_of(rows, "8b, decode-64, 4 stages, auto: throughput of a GPU over that with 2 stages")
    assert row["number"] == 0.95
    assert "aim" not in row, "the aims are over one GPU"
    assert row_of(rows, "models: 0: bench")["value"] == "too large"


def test_a_stream_is_held_against_its_time_on_one_stage() -> None:
    one, two = (
        model_case(n, ms, load="single", workload="single") for n, ms in ((1, 6.0), (2, 6.06))
    )
    row = row_of(model_rows(one, two), "8b, single, 2 stages, auto: time of a token over")
    assert (row["number"], row["reaches"]) == (pytest.approx(1.01), True)
    slow = model_case(2, 6.2, load="single", workload="single")
    assert not row_of(model_rows(one, slow), "8b, single, 2 stages, auto: time")["reaches"]


def test_a_measured_bubble_is_over_the_predicted_one() -> None:
    rows = model_rows(model_case(1, 1.0), model_case(2, 2.0, plan=predicted(0.2, 0.0)))
    row = row_of(rows, "8b, decode-64, 2 stages, auto: bubble 15.0% over 10.0% as predicted")
    assert (row["number"], row["reaches"]) == (pytest.approx(1.5), False)
    rows = model_rows(model_case(1, 1.0), model_case(2, 2.0, plan=predicted(0.0, 0.001)))
    assert row_of(rows, "8b, decode-64, 2 stages, auto: bubble")["value"] == "-"


def test_a_run_without_a_steady_part_is_compared_by_what_both_have() -> None:
    whole = model_case(2, 0.0)
    del whole["said"]["bench"]["result"]["summary"]["steady_output_tokens_per_s"]
    rows = model_rows(model_case(1, 1000.0), whole)
    assert row_of(rows, "8b, decode-64, 2 stages, auto: throughput")["number"] == 0.5


def test_a_killed_stage_is_a_time_and_the_memory_that_grew() -> None:
    found = {
        "serving_again_s": 4.25,
        "memory_before_mib": {"0": 100, "1": 200},
        "memory_after_mib": {"0": 90, "1": 230},
    }
    parts = {"failure": {"8b": {"facts": {}, "said": {"killed": {"result": found}}}}}
    rows = multi_gpu_ratios.summarize(parts)
    assert row_of(rows, "8b: until tokens")["value"] == "4.25 s"
    assert row_of(rows, "8b: most memory")["value"] == "30 MiB"


def test_serving_goes_on_at_the_end_of_the_longest_silence_after_the_kill() -> None:
    arrivals = [0.0, 5.0, 9.9, 10.1, 10.2, 14.0, 14.1, 16.0]
    assert silence_end(arrivals, 10.0) == 14.0
    assert silence_end([0.0, 9.0, 13.0, 13.1], 10.0) == 13.0


def test_the_table_says_what_was_reached() -> None:
    rows = model_rows(model_case(1, 1000.0), model_case(2, 1000.0))
    lines = multi_gpu_ratios.render(rows).splitlines()
    assert lines[0].split() == ["measured", "aim"]
    assert lines[-1].split()[-4:] == ["0.5", "0.98", "not", "reached"]


# --------------------------------------------------------------------------------------
# the command


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["multi_gpu", *arguments])
    try:
        multi_gpu.main()
    except SystemExit as ended:
        assert ended.code == 2  # noqa: PT017  said on stderr
    return capsys.readouterr()


def test_cases_can_be_listed_without_running_any(monkeypatch, capsys, path) -> None:
    listed = ("--list", "--devices", "0,1", "--models", "14b,8b", "--part", "trace,models")
    said = call(monkeypatch, capsys, *listed, "--output", str(path))
    lines = said.out.splitlines()
    assert lines[0] == "models: 8b, decode-64, 1 stages, auto"
    assert lines[-1] == "trace: 8b, 2 stages"
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "probe,prob"), "no prob; there are probe, handoff, equality"),
        (("--models", "70b"), "no 70b; there are 8b, 32b, 14b"),
        (("--devices", "0"), "two devices are needed, there are 1"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, capsys, arguments, message) -> None:
    given = ("--devices", "0,1", *arguments, "--list")
    assert message in call(monkeypatch, capsys, *given).err


@pytest.mark.multiproc
def test_two_cpu_stages_end_to_end(monkeypatch, capsys, path) -> None:
    arguments = ("--devices", "cpu,cpu", "--output", str(path), "--commit", "c")
    chosen = ("--part", "probe", "--only", "chosen")
    said = call(monkeypatch, capsys, *arguments, *chosen)
    plain = json.loads(path.read_text())
    [case] = plain["parts"]["probe"].values()
    assert case["said"]["edges"]["result"] == {
        "edges": {"0->1": "host_shm", "1->0": "host_shm"},
        "devices": ["cpu", "cpu"],
    }
    run = plain["runs"][case["run"]]
    assert (run["commit"], run["devices"]) == ("c", CPUS)
    assert run["processor"]
    assert "0->1 host_shm, 1->0 host_shm" in said.out
    again = call(monkeypatch, capsys, *arguments, *chosen)
    assert "probe: chosen paths: is there" in again.err
    assert again.out == said.out
