"""A stage from hello to end: phases, plan numbers, failures, and that it ends with its parent.

``StageWorker`` is tested in this process; the ``multiproc`` tests start real stages and play
the coordinator.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from recorded_plans import (
    BLOCK_SIZE,
    MAX_IN_FLIGHT,
    MAX_MODEL_LEN,
    MAX_SLOTS,
    MAX_TOKENS_PER_PLAN,
    NUM_BLOCKS,
    record,
)

from ember_pp import config as configuration
from ember_pp import memory_model, partition, protocol
from ember_pp.checkpoint import read_config
from ember_pp.coordinator.launcher import LocalLauncher, end_all
from ember_pp.errors import from_wire
from ember_pp.model_config import ModelConfig
from ember_pp.sockets import PrivateDirectory, RouterSocket, heart_of, wait_readable
from ember_pp.stage import capacity
from ember_pp.stage import worker as worker_module
from ember_pp.stage.failure import failure_of
from ember_pp.stage.worker import StageWorker

EPOCH = 3
START_S = 60.0
END_S = 10.0


def make_config(demo_path, stage_index, num_stages, **groups):
    plain = {
        "job": {"name": "serve"},
        "model": {"path": str(demo_path), "dtype": "float32"},
        "pipeline": {"stages": num_stages, "devices": "cpu"},
        "cache": {"block_size": BLOCK_SIZE},
        "scheduler": {"max_tokens_per_plan": MAX_TOKENS_PER_PLAN},
    }
    for group, values in groups.items():
        plain[group] = plain.get(group, {}) | values
    cfg = ModelConfig.from_hf(read_config(demo_path))
    start_layer, end_layer = partition.split_layers(cfg, num_stages)[stage_index]
    return protocol.StageConfig(
        epoch=EPOCH,
        stage_index=stage_index,
        num_stages=num_stages,
        start_layer=start_layer,
        end_layer=end_layer,
        device="cpu",
        num_threads=1,
        config=configuration.to_plain(configuration.build(plain)),
        model_config=cfg.to_plain(),
        eos_token_ids=protocol.pack_i32([4089]),
        max_slots=MAX_SLOTS,
        max_model_len=MAX_MODEL_LEN,
        max_in_flight=MAX_IN_FLIGHT,
    )


class Stage:
    """A ``StageWorker`` in this thread, with what it posted."""

    def __init__(self, demo_path, stage_index=0, num_stages=1, **groups):
        self.posted = []
        self.worker = StageWorker(stage_index, self.posted.append)
        self.config = make_config(demo_path, stage_index, num_stages, **groups)

    def load(self):
        self.worker.handle(self.config)
        return self.posted[-1]

    def start(self, next_handle=None):
        """With two stages, the other one's handle."""
        handle = next_handle or {}
        self.worker.handle(protocol.Start(EPOCH, NUM_BLOCKS, handle, handle))
        return self.posted[-1]

    def execute(self, execute):
        """What the last stage drew for a plan."""
        self.worker.handle(execute)
        return self.posted[-1]

    def run(self, *messages):
        """Let the worker's own loop take ``messages``; what it posted meanwhile."""
        inbox = SimpleQueue()
        for message in (*messages, None):
            inbox.put(message)
        num_before = len(self.posted)
        self.worker.run(inbox)
        return self.posted[num_before:]


@pytest.fixture
def stage(demo_path):
    stage = Stage(demo_path)
    stage.load()
    stage.start()
    return stage


@pytest.fixture(scope="module")
def recorded(demo_path):
    """Plans and answers of a single stage."""
    stage = Stage(demo_path)
    stage.load()
    stage.start()
    plans, answers, _ = record(stage.execute, epoch=EPOCH)
    return plans, answers


def test_loading_reports_progress_then_what_fits(demo_path):
    stage = Stage(demo_path, 1, 2)
    ready = stage.load()
    progress = stage.posted[:-1]
    assert progress[-1].num_done == progress[-1].num_total > 0
    assert {message.phase for message in progress} == {"weights"}
    cfg = ModelConfig.from_plain(stage.config.model_config)
    layer_range = stage.config.start_layer, stage.config.end_layer
    file_bytes = partition.stage_weight_bytes(
        cfg, layer_range, is_first=False, is_last=True, bytes_per_element=4
    )
    # QK norms are held once per head, and are small.
    assert file_bytes <= ready.weight_bytes < 1.001 * file_bytes
    num_layers = layer_range[1] - layer_range[0]
    assert ready.block_bytes == BLOCK_SIZE * partition.kv_bytes_per_token(cfg, num_layers, 4)
    assert ready.num_blocks == MAX_SLOTS * MAX_MODEL_LEN // BLOCK_SIZE
    assert list(ready.handle["receiver"]) == list(ready.handle["sender"]) == ["host_shm"]
    assert protocol.decode(protocol.encode(ready)) == ready


def test_memory_gib_is_taken_at_its_word(demo_path):
    ready = Stage(demo_path, cache={"memory_gib": 0.01}).load()
    assert ready.num_blocks == int(0.01 * 2**30) // ready.block_bytes


def test_two_stages_probe_their_edge_and_serve(demo_path, recorded):
    plans, answers = recorded
    stages = [Stage(demo_path, index, 2) for index in range(2)]
    handles = [stage.load().handle for stage in stages]
    for stage, next_handle in zip(stages, reversed(handles), strict=True):
        stage.start(next_handle)
        paths = {edge: {"host_shm": ""} for edge in ("0->1", "1->0")}
        assert stage.posted[-1] == protocol.StageStarted(EPOCH, stage.config.stage_index, paths)
    edges = ["0->1", "1->0"]
    messages = [*(protocol.Probe(EPOCH, edge, "host_shm", 99) for edge in edges), *plans]
    first = threading.Thread(target=stages[0].run, args=messages, daemon=True)
    first.start()
    *reports, drawn = stages[1].run(*messages[:2]), stages[1].run(*plans)
    first.join(END_S)
    for index, found in enumerate((stages[0].posted[-2:], *reports)):
        assert [report.edge for report in found] == edges
        for report in found:
            assert (report.stage_index, report.path) == (index, "host_shm")
            assert report.is_ok, report.text
    assert drawn == answers
    for stage in stages:
        stats = stage.worker.stats()
        assert (stats.epoch, stats.plan, stats.waiting_for) == (EPOCH, plans[-1].plan, "")
        assert stats.busy_ns > 0
        assert stats.peak_bytes > 2**20
    assert stages[1].worker.stats().wait_input_ns > 0


def test_waits_of_the_probe_are_not_counted(demo_path, recorded):
    """Stage 1 waits half a second in its probe; from its first plan on, every wait counts."""
    plans, _ = recorded
    stages = [Stage(demo_path, index, 2) for index in range(2)]
    handles = [stage.load().handle for stage in stages]
    for stage, next_handle in zip(stages, reversed(handles), strict=True):
        stage.start(next_handle)
    probes = [protocol.Probe(EPOCH, edge, "host_shm", 99) for edge in ("0->1", "1->0")]
    second = threading.Thread(target=stages[1].run, args=probes, daemon=True)
    second.start()
    time.sleep(0.5)
    stages[0].run(*probes)
    second.join(END_S)
    first = threading.Thread(target=stages[0].run, args=plans, daemon=True)
    began_ns = time.monotonic_ns()
    first.start()
    stages[1].run(*plans)
    passed_ns = time.monotonic_ns() - began_ns
    first.join(END_S)
    stats = stages[1].worker.stats()
    assert plans[0].after_idle
    assert stats.idle_ns >= 500_000_000
    parts_ns = (stats.busy_ns, stats.wait_input_ns, stats.wait_output_ns, stats.host_gap_ns)
    assert min(parts_ns[:2]) > 0
    assert sum(parts_ns) <= passed_ns


def test_a_stage_that_waits_for_feedback_says_so_and_ends_when_closed(demo_path, recorded):
    """Stage 1 does nothing: its tokens never come."""
    plans, _ = recorded
    stages = [Stage(demo_path, index, 2) for index in range(2)]
    connect(stages)
    first_decode = next(execute.plan for execute in plans if execute.feedback >= 0)
    thread = threading.Thread(target=stages[0].run, args=plans[: first_decode + 1], daemon=True)
    thread.start()
    deadline = time.monotonic() + END_S
    while not (waiting_for := stages[0].worker.stats().waiting_for):
        assert time.monotonic() < deadline
        assert thread.is_alive()
        time.sleep(0.001)
    assert waiting_for.startswith("plan 0: stage 1 to write slot 0 of edge 1->0, for ")
    assert stages[0].worker.stats().plan == first_decode - 1
    stages[0].worker.close()
    thread.join(END_S)
    assert not thread.is_alive()
    assert not [m for m in stages[0].posted if isinstance(m, protocol.StageFailed)]


def test_a_stage_that_waits_goes_on_in_the_next_epoch(demo_path, recorded):
    """The wait ends without a word; the plans that follow it in the inbox are not begun."""
    plans, _ = recorded
    stages = [Stage(demo_path, index, 2) for index in range(2)]
    connect(stages)
    waiting = stages[1]  # stage 0 does nothing
    inbox = SimpleQueue()
    for message in plans[:3]:
        inbox.put(message)
    thread = threading.Thread(target=waiting.worker.run, args=(inbox,), daemon=True)
    thread.start()
    deadline = time.monotonic() + END_S
    while not waiting.worker.stats().waiting_for:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    num_before = len(waiting.posted)
    waiting.worker.end_waits(EPOCH + 1)
    for message in (protocol.Renew(EPOCH + 1), None):
        inbox.put(message)
    thread.join(END_S)
    assert not thread.is_alive()
    [ready] = waiting.posted[num_before:]
    assert (type(ready), ready.epoch) == (protocol.StageReady, EPOCH + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": 1}, "stage 0 got plan 1 after plan -1"),
        ({"epoch": EPOCH - 1}, f"stage 0 is in epoch {EPOCH}; Execute is of epoch {EPOCH - 1}"),
        ({"chunk_ids": b""}, "plan 0, micro-batch 0: chunk_ids: expected"),
    ],
    ids=["gap", "epoch", "nonsense"],
)
def test_a_bad_plan_ends_the_epoch_and_not_the_stage(stage, recorded, changes, message):
    [failed] = stage.run(replace(recorded[0][0], **changes), recorded[0][0])
    assert isinstance(failed, protocol.StageFailed)
    assert (failed.stage_index, failed.plan, failed.epoch) == (0, 0, EPOCH)
    assert not failed.is_ending
    assert failed.remote_type == "ProtocolError"
    assert failed.error["code"] == "protocol_error"
    assert message in str(from_wire(failed.error))
    assert "Traceback" in failed.traceback


def test_a_repeated_plan_is_refused(stage, recorded):
    first = recorded[0][0]
    sampled, failed = stage.run(first, first)
    assert sampled.plan == 0
    assert "got plan 0 after plan 0" in failed.text
    assert failed.plan == 1


def connect(stages):
    """Both stages started and their edges probed."""
    handles = [stage.load().handle for stage in stages]
    for stage, handle in zip(stages, reversed(handles), strict=True):
        stage.start(handle)
    probes = [protocol.Probe(EPOCH, edge, "host_shm", 99) for edge in ("0->1", "1->0")]
    first = threading.Thread(target=stages[0].run, args=probes, daemon=True)
    first.start()
    stages[1].run(*probes)
    first.join(END_S)


def replace(execute, **changes):
    fields = {name: getattr(execute, name) for name in protocol.Execute.__slots__}
    return protocol.Execute(**(fields | changes))


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (protocol.Start(EPOCH, 8, {}, {}), "got Start before its configuration"),
        (protocol.Probe(EPOCH, "0->1", "host_shm", 0), "got Probe before its configuration"),
        (protocol.Status(), "cannot take Status"),
    ],
)
def test_messages_out_of_order_are_refused(demo_path, message, text):
    [failed] = Stage(demo_path).run(message)
    assert failed.remote_type == "ProtocolError"
    assert text in failed.text


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (None, "got the configuration of stage 0 a second time"),
        (protocol.Start(EPOCH, 8, {}, {}), "got Start a second time"),
        (protocol.Probe(EPOCH, "0->1", "host_shm", 0), "no end of edge 0->1"),
        (protocol.Renew(EPOCH), f"is in epoch {EPOCH}; it got Renew to {EPOCH}"),
    ],
)
def test_phases_come_once(stage, message, text):
    [failed] = stage.run(message or stage.config)
    assert text in failed.text
    assert not failed.is_ending


def test_after_a_renewal_a_stage_computes_as_a_new_one(stage, recorded):
    """Weights stay; what the plans before have left does not show."""
    plans, answers = recorded
    for plan in plans[:5]:
        stage.execute(plan)
    [failed] = stage.run(plans[2])  # a repeat: the epoch is over
    assert stage.run(plans[5]) == [], "ignored until it is renewed"
    model = stage.worker._slice._model
    [ready] = stage.run(protocol.Renew(EPOCH + 1))
    assert (failed.is_ending, ready.epoch) == (False, EPOCH + 1)
    assert stage.worker.stats() is None
    assert stage.worker._slice._model is model
    late = [plans[5], protocol.Start(EPOCH, NUM_BLOCKS, {}, {})]  # of the epoch before
    again = [protocol.Start(EPOCH + 1, NUM_BLOCKS, {}, {})]
    again += [replace(plan, epoch=EPOCH + 1) for plan in plans]
    started, *drawn = stage.run(*late, *again)
    assert started == protocol.StageStarted(EPOCH + 1, 0, {})
    assert [sampled.token_ids for sampled in drawn] == [sampled.token_ids for sampled in answers]
    assert {sampled.epoch for sampled in drawn} == {EPOCH + 1}
    stats = stage.worker.stats()
    assert (stats.epoch, stats.plan) == (EPOCH + 1, plans[-1].plan)


def test_times_go_on_over_a_renewal(stage, recorded):
    for plan in recorded[0][:3]:
        stage.execute(plan)
    busy_ns = stage.worker.stats().busy_ns
    stage.run(protocol.Renew(EPOCH + 1), protocol.Start(EPOCH + 1, NUM_BLOCKS, {}, {}))
    stats = stage.worker.stats()
    assert stats.busy_ns >= busy_ns > 0
    assert (stats.epoch, stats.plan) == (EPOCH + 1, -1), "plans of the epoch before are over"


def test_a_missing_checkpoint_keeps_its_class(demo_path, tmp_path):
    stage = Stage(demo_path, model={"path": str(tmp_path / "nowhere")})
    [failed] = stage.run(stage.config)
    assert failed.error["code"] in ("checkpoint_error", "config_error")
    assert "nowhere" in failed.text


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["python", "cuda", "host"],
)
def test_out_of_memory_says_what_to_lower(error):
    failed = failure_of(error, epoch=0, stage_index=2, plan=7)
    rebuilt = from_wire(failed.error)
    assert type(rebuilt).__name__ == "CapacityError"
    for words in ("stage 2", "cache.memory_gib", "max_tokens_per_plan", "pipeline.stages"):
        assert words in str(rebuilt)
    assert failed.remote_type == type(error).__name__


CUDA_OUT_OF_MEMORY = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of "
    "which 1.06 GiB is free. Including non-PyTorch memory, this process has 22 GiB in use. See\n"
    "documentation for Memory Management"
)


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError(CUDA_OUT_OF_MEMORY)


def lost_memory(failed):
    """The text of a ``CapacityError``, whose job ends with exit code 3."""
    rebuilt = from_wire(failed.error)
    assert type(rebuilt).__name__ == "CapacityError"
    assert rebuilt.exit_code == 3
    assert failed.remote_type == "OutOfMemoryError"
    text = str(rebuilt)
    assert "GPU 0 has a total capacity of 23.64 GiB of which 1.06 GiB is free)" in text
    assert "non-PyTorch" not in text
    return text


def test_weights_that_do_not_fit_ask_for_more_stages(demo_path, monkeypatch):
    monkeypatch.setattr("ember_pp.stage.worker.load_stage", out_of_memory)
    stage = Stage(demo_path)
    [failed] = stage.run(stage.config)
    text = lost_memory(failed)
    assert (
        "while loading: 10 layers and what belongs to them are 0.02 GiB of weights on cpu" in text
    )
    assert text.endswith("raise pipeline.stages, or use other devices (pipeline.devices)")


def test_state_that_does_not_fit_beside_the_weights_asks_for_less_of_it(demo_path, monkeypatch):
    stage = Stage(demo_path)
    stage.load()
    monkeypatch.setattr("ember_pp.stage.worker.Sampler", out_of_memory)
    [failed] = stage.run(protocol.Start(EPOCH, NUM_BLOCKS, {}, {}))
    assert "; lower cache.memory_gib or scheduler.max_tokens_per_plan" in lost_memory(failed)


@pytest.mark.parametrize(
    ("cache", "words"),
    [
        ({}, "or cache.memory_share=0.9, or set cache.memory_gib"),
        ({"memory_gib": 0.25}, "or cache.memory_gib=0.25"),
    ],
)
def test_a_plan_that_does_not_fit_asks_for_smaller_ones(
    demo_path, recorded, monkeypatch, cache, words
):
    stage = Stage(demo_path, cache=cache)
    stage.load()
    stage.start()
    monkeypatch.setattr("ember_pp.stage.model.StageModel.forward", out_of_memory)
    [failed] = stage.run(recorded[0][0])
    text = lost_memory(failed)
    assert "in plan 0: beside 0.02 GiB of weights and 0.0" in text
    assert text.endswith(f"lower scheduler.max_tokens_per_plan={MAX_TOKENS_PER_PLAN} {words}")


def test_any_other_exception_travels_with_its_traceback():
    try:
        raise KeyError("boom")
    except KeyError as error:
        failed = failure_of(error, epoch=0, stage_index=2, plan=7)
    assert failed.error == {}
    assert failed.remote_type == "KeyError"
    assert "boom" in failed.text
    assert "test_worker.py" in failed.traceback


# ---------------------------------------------------------------- capacity


def test_cpu_blocks_are_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(capacity, "available_bytes", lambda: 800)
    sizes = {"num_stages": 2, "most_blocks": 50}
    assert capacity.num_cpu_blocks(10, memory_gib=None, **sizes) == 10
    assert capacity.num_cpu_blocks(1, memory_gib=None, **sizes) == 50
    assert capacity.num_cpu_blocks(2**20, memory_gib=1.0, **sizes) == 1024


@pytest.mark.parametrize(
    ("changes", "num_blocks"),
    [
        ({}, 80),  # 90% of 900 free, less 10 for activations
        ({"memory_share": 0.5}, 44),
        ({"num_stages_on_device": 2}, 35),  # its half of 1000, less its weights
        ({"reserved_bytes": 5000}, 0),
        ({"memory_gib": 1.0}, 2**30 // 10),
    ],
)
def test_cuda_blocks_leave_room_for_weights_and_neighbours(changes, num_blocks):
    sizes = {
        "memory_gib": None,
        "free_bytes": 900,
        "total_bytes": 1000,
        "weight_bytes": 100,
        "memory_share": 0.9,
        "reserved_bytes": 10,
        "num_stages_on_device": 1,
    }
    assert capacity.num_cuda_blocks(10, **(sizes | changes)) == num_blocks


def test_host_facts_describe_this_machine():
    facts = capacity.host_facts()
    assert facts["kind"] == "cpu"
    assert facts["name"]
    assert 0 < facts["free_bytes"] < facts["total_bytes"]


# ---------------------------------------------------------------- real processes


class Coordinator:
    """A bound socket, the stages it started, and what they said."""

    def __init__(self, address, num_stages):
        self.router = RouterSocket(address, max_message_bytes=2**24)
        launcher = LocalLauncher()
        self.processes = [
            launcher.start(index, address=address, token=f"secret-{index}")
            for index in range(num_stages)
        ]
        self.heard = []
        self.identities = {}

    def expect(self, kind, count=1, timeout_s=START_S, where=lambda message: True):
        """The first ``count`` messages of a kind that have not been taken yet."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = [message for message in self.heard if isinstance(message, kind)]
            found = [message for message in found if where(message)]
            if len(found) >= count:
                self.heard = [message for message in self.heard if message not in found[:count]]
                return found[:count]
            assert time.monotonic() < deadline, f"no {kind.__name__}; heard {self.heard}"
            wait_readable([self.router], [], 0.1)
            for identity, message in self.router.receive_all():
                if isinstance(message, protocol.StageHello):
                    self.identities[message.stage_index] = identity
                self.heard.append(message)

    def send(self, stage_index, message):
        assert self.router.send(self.identities[stage_index], message)

    def close(self):
        end_all(self.processes, grace_s=0.0)
        self.router.close()


@pytest.fixture
def coordinate():
    """``coordinate(num_stages)``: a ``Coordinator`` whose stages have said hello."""
    with PrivateDirectory() as directory:
        coordinators = []

        def start(num_stages):
            coordinator = Coordinator(directory.address("stages"), num_stages)
            coordinators.append(coordinator)
            hellos = coordinator.expect(protocol.StageHello, num_stages)
            for hello in hellos:
                assert hello.token == f"secret-{hello.stage_index}"
                assert hello.pid == coordinator.processes[hello.stage_index].pid
                assert hello.device["kind"] == "cpu"
            return coordinator

        yield start
        for coordinator in coordinators:
            coordinator.close()


@pytest.mark.multiproc
def test_two_stage_processes_serve_explain_a_wait_and_end_when_told(
    coordinate, demo_path, recorded
):
    plans, answers = recorded
    names_before = sorted(path.name for path in Path("/dev/shm").iterdir())
    coordinator = coordinate(2)
    for index in range(2):
        coordinator.send(index, make_config(demo_path, index, 2))
    ready = sorted(coordinator.expect(protocol.StageReady, 2), key=lambda r: r.stage_index)
    for index, handle in enumerate((ready[1].handle, ready[0].handle)):
        coordinator.send(index, protocol.Start(EPOCH, NUM_BLOCKS, handle, handle))
    coordinator.expect(protocol.StageStarted, 2)
    for edge in ("0->1", "1->0"):
        for index in range(2):
            coordinator.send(index, protocol.Probe(EPOCH, edge, "host_shm", 4))
    assert all(report.is_ok for report in coordinator.expect(protocol.ProbeReport, 4))

    for process in coordinator.processes:  # a Ctrl-C goes to the whole terminal
        os.kill(process.pid, signal.SIGINT)
    for execute in plans[:-1]:
        for index in range(2):
            coordinator.send(index, execute)
    assert coordinator.expect(protocol.Sampled, len(plans) - 1) == answers[:-1]

    coordinator.send(1, plans[-1])  # and not to stage 0
    waiting = f"plan {plans[-1].plan}: stage 0 to write slot {plans[-1].plan % MAX_IN_FLIGHT} "
    [stats] = coordinator.expect(
        protocol.StageStats, where=lambda stats: stats.waiting_for.startswith(waiting)
    )
    assert stats.stage_index == 1
    assert stats.plan == plans[-2].plan

    for index in range(2):
        coordinator.send(index, protocol.Shutdown("the test is over"))
    assert [process.wait(END_S) for process in coordinator.processes] == [0, 0]
    assert not [m for m in coordinator.heard if isinstance(m, protocol.StageFailed)]
    assert sorted(path.name for path in Path("/dev/shm").iterdir()) == names_before


@pytest.mark.multiproc
def test_what_goes_wrong_between_processes_ends_no_process(coordinate, demo_path):
    """Bytes that are no message; one out of place; one that was lost."""
    coordinator = coordinate(3)
    coordinator.send(0, b"\xc1 no message")
    coordinator.send(1, protocol.Start(EPOCH, 1, {}, {}))
    coordinator.send(2, protocol.Tally(1))
    failed = sorted(coordinator.expect(protocol.StageFailed, 3), key=lambda f: f.stage_index)
    assert [message.stage_index for message in failed] == [0, 1, 2]
    assert "not a message" in failed[0].text
    assert "got Start before its configuration" in failed[1].text
    assert "stage 2 got 0 messages of 1 that were sent" in failed[2].text
    assert [message.is_ending for message in failed] == [False] * 3
    assert [process.wait(0.2) for process in coordinator.processes] == [None] * 3
    coordinator.send(0, protocol.Tally(1))  # the bytes were counted
    coordinator.send(2, protocol.Tally(1))  # and the difference was noticed once
    for index in range(3):
        coordinator.send(index, protocol.Shutdown("the test is over"))
    assert [process.wait(END_S) for process in coordinator.processes] == [0] * 3
    assert not [m for m in coordinator.heard if isinstance(m, protocol.StageFailed)]


@pytest.mark.multiproc
def test_last_words_arrive_before_exit_1(coordinate, demo_path, tmp_path):
    coordinator = coordinate(1)
    config = make_config(demo_path, 0, 1, model={"path": str(tmp_path / "nowhere")})
    coordinator.send(0, config)
    [failed] = coordinator.expect(protocol.StageFailed)
    assert failed.is_ending
    assert "nowhere" in failed.text
    assert coordinator.processes[0].wait(END_S) == 1


@pytest.mark.multiproc
def test_a_stage_counts_what_it_sends_and_returns_heartbeats(coordinate):
    coordinator = coordinate(1)
    [tally] = coordinator.expect(protocol.Tally)
    assert tally == protocol.Tally(1)  # its hello
    heart = heart_of(coordinator.identities[0])
    assert coordinator.router.send(heart, protocol.Heartbeat(7))
    assert coordinator.expect(protocol.Heartbeat) == [protocol.Heartbeat(7)]


@pytest.mark.multiproc
def test_a_signal_ends_no_stage_and_a_shutdown_does(coordinate):
    """Slurm signals every process of a step; what that means is the coordinator's to say."""
    coordinator = coordinate(1)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(coordinator.processes[0].pid, number)
    assert coordinator.processes[0].wait(0.2) is None
    coordinator.send(0, protocol.Shutdown("the test is over"))
    assert coordinator.processes[0].wait(END_S) == 0


PARENT = """
import sys
from ember_pp.coordinator.launcher import LocalLauncher
process = LocalLauncher().start(0, address=sys.argv[1], token="secret-0")
print(process.pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.multiproc
def test_a_stage_dies_with_its_parent():
    with PrivateDirectory() as directory:
        router = RouterSocket(directory.address("stages"), max_message_bytes=2**20)
        command = [sys.executable, "-c", PARENT, router.address]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
            stage_pid = int(parent.stdout.readline())
            descriptor = os.pidfd_open(stage_pid)
            deadline = time.monotonic() + START_S
            while not list(router.receive_all()):  # its hello: it is set up
                assert time.monotonic() < deadline
                wait_readable([router], [], 0.1)
            parent.kill()
            assert wait_readable([], [descriptor], END_S) == {descriptor}
        os.close(descriptor)
        router.close()


@pytest.mark.multiproc
def test_a_stage_that_starts_as_an_orphan_ends():
    command = [sys.executable, "-m", "ember_pp.stage", "--address", "ipc:///tmp/nobody"]
    command += ["--stage-index", "0", "--parent-pid", "1"]
    assert subprocess.run(command, check=False, timeout=START_S).returncode == 1


def test_a_cuda_stage_takes_what_is_planned_for_it(demo_path, monkeypatch):
    """The stage and ``job=plan`` do the same arithmetic, with the same settings."""
    message = make_config(
        demo_path, 0, 1, cache={"memory_share": 0.7}, pipeline={"devices": "auto"}
    )
    message = dataclasses.replace(message, device="cuda:0")
    total, free = 24 * 2**30, 20 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    loaded = worker_module._Slice(message)
    cfg = ModelConfig.from_plain(message.model_config)
    reserved = 512 * 2**20 + memory_model.activation_bytes(cfg, MAX_TOKENS_PER_PLAN, MAX_SLOTS)
    block_bytes = BLOCK_SIZE * partition.kv_bytes_per_token(cfg, cfg.num_layers, 4)
    assert loaded.num_blocks_that_fit() == (int(0.7 * free) - reserved) // block_bytes
