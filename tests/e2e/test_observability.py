"""What a run tells of itself: times that add up, a trace, counters, and silence when idle."""

import collections
import itertools
import json
import os
import re
import signal
import socket
import statistics
import time
import urllib.request
from pathlib import Path

import pytest

from ember_pp import config as configuration
from ember_pp.errors import ConfigError, StageDiedError
from ember_pp.jobs.session import open_client

pytestmark = pytest.mark.multiproc

GREEDY = {"temperature": 0.0, "max_tokens": 16, "ignore_eos": True}
STATES = ("busy", "wait_input", "wait_output", "host_gap", "idle")
IDLE_S = 5.0


def make_config(**groups):
    plain = {
        "job": {"name": "serve"},
        "model": {"path": "demo", "dtype": "float32"},
        "pipeline": {"stages": 2, "devices": "cpu", "cpu_threads": 1},
        "cache": {"memory_gib": 0.05},
        "scheduler": {"max_tokens_per_plan": 32},
    }
    return configuration.build(plain | groups)


def run_some(client, num_requests=6):
    prompts = [list(range(5 + i, 45 + i)) for i in range(num_requests)]
    submitted = [client.submit(token_ids=prompt, sampling=GREEDY) for prompt in prompts]
    for request in submitted:
        request.result(120.0)


def settled_status(client):
    """Once every stage has reported its last plan."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        status = client.status()
        if all(stage.get("plan", -1) == status["num_plans"] - 1 for stage in status["stages"]):
            return status
        time.sleep(0.05)
    raise AssertionError(f"the stages do not report their last plan: {status}")


# ------------------------------------------------------------------ trace


class Trace:
    """The JSON of a trace, by row."""

    def __init__(self, path):
        self.document = json.loads(path.read_text())
        self.events = self.document["traceEvents"]
        names = {
            event["tid"]: event["args"]["name"]
            for event in self.events
            if event["name"] == "thread_name"
        }
        self.slices = collections.defaultdict(list)
        self.inputs = collections.defaultdict(list)
        self.flows = collections.defaultdict(dict)
        for event in self.events:
            if event["ph"] == "X":
                slices = self.inputs if event["cat"] == "inputs" else self.slices
                slices[names[event["tid"]]].append(event)
            elif event["ph"] in "sf":
                self.flows[event["id"]][event["ph"]] = event | {"row": names[event["tid"]]}

    def slice_at(self, row, time_us):
        """The one slice of a row that holds a moment."""
        found = [s for s in self.slices[row] if s["ts"] <= time_us <= s["ts"] + s["dur"]]
        assert len(found) == 1, (row, time_us, found)
        return found[0]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run over three stages, and its last status."""
    folder = tmp_path_factory.mktemp("trace")
    files = {"output": str(folder / "run.json"), "picture": str(folder / "run.svg")}
    pipeline = {"stages": 3, "devices": "cpu", "cpu_threads": 1}
    with open_client(make_config(trace=files, pipeline=pipeline)) as client:
        run_some(client)
        status = settled_status(client)
    assert sorted(path.name for path in folder.iterdir()) == ["run.json", "run.svg"]
    return Trace(folder / "run.json"), status, (folder / "run.svg").read_text()


STAGES = ("stage 0", "stage 1", "stage 2")


def test_every_plan_is_one_slice_on_every_stage_in_order(traced):
    trace, status, _ = traced
    assert status["num_plans"] > 16
    for row in STAGES:
        slices = trace.slices[row]
        assert [s["args"]["plan"] for s in slices] == list(range(status["num_plans"]))
        assert all(s["dur"] > 0 for s in slices)
        for before, after in itertools.pairwise(slices):
            assert before["ts"] + before["dur"] <= after["ts"] + 0.002
    kinds = {s["cat"] for s in trace.slices["stage 0"]}
    assert {"prefill", "decode"} <= kinds <= {"prefill", "decode", "mixed"}
    num_rows = [s["args"]["sequences"] for s in trace.slices["stage 0"] if s["cat"] == "decode"]
    assert max(num_rows) >= 2


def test_waits_and_plans_do_not_overlap(traced):
    """But for waits for a slot, which are in the middle of a plan."""
    trace, _, _ = traced
    for row in STAGES:
        waits = [w for w in trace.slices[f"{row} waits"] if w["name"] != "wait for a slot"]
        assert waits
        shown = [*trace.slices[row], *trace.inputs[row], *waits]
        spans = sorted((s["ts"], s["ts"] + s["dur"]) for s in shown)
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start + 0.002  # microseconds, as floats


def test_arrows_join_the_end_of_a_sender_and_the_start_of_its_receiver(traced):
    trace, status, _ = traced
    found = collections.Counter()
    late, early = [], []
    for ends in trace.flows.values():
        source, target = ends["s"], ends["f"]
        assert source["ts"] <= target["ts"]
        sender = trace.slice_at(source["row"], source["ts"])
        receiver = trace.slice_at(target["row"], target["ts"])
        found[source["name"], source["row"], target["row"]] += 1
        if source["name"] == "hand-off":
            assert sender["args"]["plan"] == receiver["args"]["plan"]
            late.append((source["ts"] - sender["ts"]) / sender["dur"])
            early.append((target["ts"] - receiver["ts"]) / receiver["dur"])
        else:
            assert sender["args"]["plan"] < receiver["args"]["plan"]
    # The machine may stop a process at any moment: so of most plans, not of all.
    assert statistics.median(late) > 0.8
    assert statistics.median(early) < 0.2
    num_plans = status["num_plans"]
    num_fed = sum(s["args"]["decodes"] > 0 for s in trace.slices["stage 0"])
    assert found == {
        ("hand-off", "stage 0", "stage 1"): num_plans,
        ("hand-off", "stage 1", "stage 2"): num_plans,
        ("feedback", "stage 2", "stage 0"): num_fed,
    }


def test_the_coordinator_issues_before_the_first_stage_starts(traced):
    trace, _, _ = traced
    issued, returned = (
        {e["args"]["plan"]: e["ts"] for e in trace.events if e.get("cat") == kind}
        for kind in ("issue", "return")
    )
    for first, last in zip(trace.slices["stage 0"], trace.slices["stage 2"], strict=True):
        plan = first["args"]["plan"]
        assert issued[plan] < first["ts"] + first["dur"]
        assert last["ts"] < returned[plan]


def test_the_trace_and_the_totals_tell_the_same(traced):
    """Two ways of counting: slices of the trace, and the totals that are always on."""
    trace, status, _ = traced
    for row, stage in zip(STAGES, status["stages"], strict=True):
        waits = collections.Counter()
        for wait in trace.slices[f"{row} waits"]:
            waits[wait["name"]] += wait["dur"]
        for name, state in [
            ("wait for input", "wait_input"),
            ("wait for a slot", "wait_output"),
            ("host gap", "host_gap"),
            ("idle", "idle"),
        ]:
            assert waits[name] == pytest.approx(stage[f"{state}_ns"] / 1e3, abs=1.0), name
        shown = trace.slices[row] + trace.inputs[row]
        shown_us = sum(s["dur"] for s in shown) - waits["wait for a slot"]
        # Between two waits of one plan there is a moment that no slice shows.
        busy_us = stage["busy_ns"] / 1e3
        assert 0.95 * busy_us <= shown_us <= busy_us + 1
        shares = [stage[f"{state}_fraction"] for state in STATES[:4]]
        assert sum(shares) == pytest.approx(1)


def test_the_picture_shows_every_stage(traced):
    _, _, svg = traced
    for index in range(3):
        assert f">stage {index}<" in svg
    assert "demo on 3 stages" in svg
    assert re.search(r">\d+\.\d%<", svg)


def test_a_trace_is_whole_after_the_death_of_a_stage(tmp_path):
    path = tmp_path / "run.json"
    settings = {"trace": {"output": str(path)}, "supervisor": {"max_restarts": 0}}
    with open_client(make_config(**settings)) as client:
        run_some(client)
        num_plans = settled_status(client)["num_plans"]
        endless = client.submit(token_ids=[5, 6], sampling=GREEDY | {"max_tokens": 400})
        os.kill(client.status()["stages"][1]["pid"], signal.SIGKILL)
        with pytest.raises(StageDiedError):
            endless.result(60.0)
    trace = Trace(path)
    assert len(trace.slices["stage 0"]) >= num_plans  # it lived on and sent its last times
    assert trace.slices["stage 1"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_a_trace_goes_on_over_a_failure(tmp_path):
    path = tmp_path / "run.json"
    with open_client(make_config(trace={"output": str(path)})) as client:
        run_some(client)
        num_plans = settled_status(client)["num_plans"]
        request = client.submit(token_ids=[5, 6], sampling=GREEDY | {"max_tokens": 100})
        os.kill(client.status()["stages"][1]["pid"], signal.SIGKILL)
        assert request.result(60.0).num_output_tokens == 100
        settled_s = time.monotonic() + 60.0
        while client.status()["stages"][0]["plan"] < 1 and time.monotonic() < settled_s:
            time.sleep(0.05)
    trace = Trace(path)
    for row in ("stage 0", "stage 1"):  # plan numbers begin again, times go on
        plans = [piece["args"]["plan"] for piece in trace.slices[row]]
        assert plans.count(0) == 2
        assert len(plans) > (num_plans if row == "stage 0" else 0) + 90
        starts = [piece["ts"] for piece in trace.slices[row]]
        assert starts == sorted(starts)


def test_a_long_trace_keeps_the_last_plans(tmp_path):
    path = tmp_path / "run.json"
    with open_client(make_config(trace={"output": str(path), "max_plans": 5})) as client:
        run_some(client)
        num_plans = settled_status(client)["num_plans"]
    trace = Trace(path)
    for row in ("stage 0", "stage 1"):
        plans = [s["args"]["plan"] for s in trace.slices[row]]
        assert plans == list(range(num_plans - 5, num_plans))


def test_a_trace_that_cannot_be_written_ends_the_run_before_it_starts(tmp_path):
    missing = str(tmp_path / "no" / "run.json")
    with (
        pytest.raises(ConfigError, match=r"trace\.output"),
        open_client(make_config(trace={"output": missing})) as client,
    ):
        client.status()


# ------------------------------------------------------------------ counters


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    samples = (line.rpartition(" ") for line in page.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


@pytest.fixture(scope="module")
def served():
    """A running engine with counters: client and port."""
    port = free_port()
    with open_client(make_config(metrics={"port": port})) as client:
        run_some(client)
        yield client, port


def test_counters_and_status_agree(served):
    client, port = served
    status = settled_status(client)
    samples = scrape(port)
    assert samples["ember_pp_ready"] == 1
    for name, key in [
        ("requests_finished_total", "finished_requests"),
        ("plans_total", "num_plans"),
        ("prompt_tokens_total", "num_prompt_tokens"),
        ("output_tokens_total", "num_output_tokens"),
        ("blocks", "num_blocks"),
        ("blocks_cached", "num_cached_blocks"),
    ]:
        assert samples[f"ember_pp_{name}"] == status[key] > 0, name
    for stage in status["stages"]:
        for state in STATES:
            labels = f'{{replica="0",stage="{stage["stage_index"]}",state="{state}"}}'
            seconds = samples[f"ember_pp_stage_seconds_total{labels}"]
            assert seconds == pytest.approx(stage[f"{state}_ns"] / 1e9, abs=1e-9)


def test_counters_never_go_down(served):
    client, port = served
    before = scrape(port)
    run_some(client)
    settled_status(client)
    after = scrape(port)
    assert set(before) == set(after)
    counters = [name for name in before if "_total" in name]
    assert all(after[name] >= before[name] for name in counters)
    assert after["ember_pp_output_tokens_total"] == before["ember_pp_output_tokens_total"] + 6 * 16


def test_every_moment_of_a_stage_is_in_one_part(served):
    """Between two last plans, the parts grow by the time that passed on the wall."""
    client, _ = served

    def run_and_count():
        run_some(client)
        ended_s = time.monotonic()
        return ended_s, settled_status(client)["stages"]

    first_s, before = run_and_count()
    time.sleep(0.5)
    last_s, after = run_and_count()
    for old, new in zip(before, after, strict=True):
        parts = {state: (new[f"{state}_ns"] - old[f"{state}_ns"]) / 1e9 for state in STATES}
        assert sum(parts.values()) == pytest.approx(last_s - first_s, abs=0.1)
        assert parts["idle"] >= 0.5
        assert parts["idle"] == pytest.approx(0.5, abs=0.6), "a gap was taken for idleness"


def test_a_port_in_use_is_refused_by_name(served):
    _, port = served
    with (
        pytest.raises(ConfigError, match=rf"metrics\.port: 127\.0\.0\.1:{port}"),
        open_client(make_config(metrics={"port": port})) as client,
    ):
        client.status()


# ------------------------------------------------------------------ idle


def cpu_s(pid):
    """CPU time that a process has used, in the kernel and out of it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.mark.slow
def test_nobody_uses_the_cpu_with_nothing_to_do(served):
    """Under 1 % of a core each: coordinator, with its endpoint, and stages.

    In one window of three: on a machine with other work a wake costs several times as much, and
    what spins shows in every window.
    """
    client, _ = served
    stages = [stage["pid"] for stage in settled_status(client)["stages"]]
    pids = [parent_of(stages[0]), *stages]
    time.sleep(0.6)  # the last counters are on their way
    windows = []
    while len(windows) < 3:
        before = [cpu_s(pid) for pid in pids]
        time.sleep(IDLE_S)
        windows.append([cpu_s(pid) - start for pid, start in zip(pids, before, strict=True)])
        if max(windows[-1]) < 0.01 * IDLE_S:
            return
    pytest.fail(f"CPU seconds in windows of {IDLE_S:g} s: {windows}")
