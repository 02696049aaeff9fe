"""Supervisor: the start sequence against stages that the test plays, message by message."""

import itertools
import os

import pytest

from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.coordinator.preparation import prepare
from ember_pp.coordinator.supervisor import EPOCH, Phase, Supervisor, stage_identity
from ember_pp.errors import (
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    HandoffError,
    ProtocolError,
    StageDiedError,
    StageFailedError,
)
from ember_pp.sockets import DealerSocket, PrivateDirectory, RouterSocket, wait_readable

CONFIG = {
    "job": {"name": "serve"},
    "model": {"path": "demo", "dtype": "float32"},
    "pipeline": {"stages": 3, "devices": "cpu"},
}


class FakeProcess:
    def __init__(self, stage_index, token):
        self.stage_index, self.token = stage_index, token
        self.pid = 1000 + stage_index
        self.exit_descriptor, self._writer = os.pipe()
        self.status = None
        self.was_killed = False

    def exit_status(self):
        return self.status

    def end(self, status):
        self.status = status
        os.write(self._writer, b"x")

    def kill(self):
        self.was_killed = self.was_killed or self.status is None
        self.status = -9 if self.status is None else self.status

    def wait(self, timeout_s):
        return self.status

    def close(self):
        os.close(self.exit_descriptor)
        os.close(self._writer)


class FakeLauncher:
    def __init__(self):
        self.processes = []

    def start(self, stage_index, *, address, token):
        self.processes.append(FakeProcess(stage_index, token))
        return self.processes[-1]


class Play:
    """A supervisor, and one socket per stage for the test to speak through."""

    def __init__(self, directory, **settings):
        plain = CONFIG | {"coordinator": {"shutdown_grace_s": 0.01} | settings}
        config = configuration.build(plain)
        self.router = RouterSocket(directory.address("s"), max_message_bytes=1 << 24)
        self.launcher = FakeLauncher()
        self.supervisor = Supervisor(config, prepare(config), self.router, self.launcher)
        self.supervisor.start()
        self.stages = [
            DealerSocket(self.router.address, identity=stage_identity(i)) for i in range(3)
        ]

    def say(self, index, message):
        self.stages[index].send(message)
        self.pump(1)

    def pump(self, count):
        while count > 0:
            wait_readable([self.router], [], 5.0)
            received = list(self.router.receive_all())
            assert received, "nothing arrived"
            for identity, message in received:
                self.supervisor.handle(identity, message)
            count -= len(received)

    def hear(self, index):
        return self.stages[index].receive(5.0)

    def hello(self, index, token=None):
        token = self.launcher.processes[index].token if token is None else token
        self.say(index, protocol.StageHello(index, token, 1, {"name": "test"}))

    def ready(self, index, num_blocks=10):
        handle = {"ring": index}
        self.say(index, protocol.StageReady(EPOCH, index, num_blocks, handle, 100, 10))

    def close(self):
        self.supervisor.stop("test")
        for stage in self.stages:
            stage.close(linger_ms=0)
        self.router.close(linger_ms=0)


@pytest.fixture
def directory():
    with PrivateDirectory() as directory:
        yield directory


@pytest.fixture
def play(directory):
    play = Play(directory)
    yield play
    play.close()


def start_all(play, num_blocks=(10, 7, 9)):
    for index in range(3):
        play.hello(index)
        assert isinstance(play.hear(index), protocol.StageConfig)
    for index in range(3):
        play.ready(index, num_blocks[index])
    starts = [play.hear(index) for index in range(3)]
    for index in range(3):
        paths = {edge: {"cuda_ipc": "", "host_shm": ""} for edge in edges_of(index)}
        play.say(index, protocol.StageStarted(EPOCH, index, paths))
    return starts


def edges_of(index):
    return f"{(index - 1) % 3}->{index}", f"{index}->{(index + 1) % 3}"


def test_the_whole_start_sequence(play):
    supervisor = play.supervisor
    assert supervisor.phase is Phase.STARTING
    starts = start_all(play)
    assert [start.num_blocks for start in starts] == [7, 7, 7]  # the least of all
    assert [start.next_handle for start in starts] == [{"ring": 1}, {"ring": 2}, {"ring": 0}]
    assert [start.previous_handle for start in starts] == [{"ring": 2}, {"ring": 0}, {"ring": 1}]
    probes = [[play.hear(index) for _ in range(2)] for index in range(3)]
    # Each stage takes its edges in the order of this list, so no two can wait for each other.
    ends = [(0, "0->1"), (1, "0->1"), (1, "1->2"), (2, "1->2"), (2, "2->0"), (0, "2->0")]
    assert [[probe.edge for probe in of_stage] for of_stage in probes] == [
        [edge for index, edge in ends if index == stage_index] for stage_index in range(3)
    ]
    assert probes[0][0].seed == probes[1][0].seed
    assert probes[0][1].seed == probes[2][1].seed
    for index, edge in ends:
        assert not supervisor.is_ready
        play.say(index, protocol.ProbeReport(EPOCH, index, edge, "cuda_ipc", True, ""))
    assert supervisor.is_ready
    assert supervisor.edges == {"0->1": "cuda_ipc", "1->2": "cuda_ipc", "2->0": "cuda_ipc"}
    assert set(supervisor.edge_reasons.values()) == {"probe passed"}
    supervisor.check()


def test_each_stage_gets_its_own_layers(play):
    ranges = []
    for index in range(3):
        play.hello(index)
        config = play.hear(index)
        assert (config.stage_index, config.num_stages) == (index, 3)
        ranges.append((config.start_layer, config.end_layer))
    assert ranges[0][0] == 0
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    assert ranges[-1][1] == 10


def test_only_the_started_process_is_taken_for_a_stage(play):
    play.hello(1, token="guessed")
    assert play.supervisor.stages[1].phase is Phase.STARTING
    play.ready(2)  # without a hello
    assert play.supervisor.stages[2].phase is Phase.STARTING
    stranger = DealerSocket(play.router.address, identity=b"stage-7")
    stranger.send(protocol.StageHello(0, play.launcher.processes[0].token, 1, {}))
    play.pump(1)
    assert play.supervisor.stages[0].phase is Phase.STARTING
    stranger.close(linger_ms=0)


def test_an_edge_whose_probe_fails_is_probed_over_its_next_path(play, caplog):
    start_all(play)
    for index in range(3):
        for _ in range(2):
            play.hear(index)

    def report(index, edge, path, text=""):
        play.say(index, protocol.ProbeReport(EPOCH, index, edge, path, not text, text))

    for edge, ends in (("1->2", (1, 2)), ("2->0", (2, 0))):
        for index in ends:
            report(index, edge, "cuda_ipc")
    report(1, "0->1", "cuda_ipc", "byte 3 is 1, was sent as 2")
    report(0, "0->1", "cuda_ipc")
    again = play.hear(0)
    assert (again.edge, again.path) == ("0->1", "host_shm")
    assert play.hear(1) == again
    assert not play.supervisor.is_ready
    report(0, "0->1", "host_shm")
    report(1, "0->1", "host_shm")
    assert play.supervisor.is_ready
    assert play.supervisor.edges["0->1"] == "host_shm"
    assert "edge 0->1: host_shm (cuda_ipc: failed its probe: byte 3 is 1" in caplog.text


def test_an_edge_that_passes_no_probe_ends_the_run_by_its_name(play):
    start_all(play)
    for path in ("cuda_ipc", "host_shm"):
        failed = protocol.ProbeReport(EPOCH, 1, "0->1", path, False, f"{path} lies")
        play.say(1, failed)
        passed = protocol.ProbeReport(EPOCH, 0, "0->1", path, True, "")
        if path == "cuda_ipc":
            play.say(0, passed)
    with pytest.raises(HandoffError, match=r"edge 0->1 has no path .*ipc lies; host_shm.*shm lies"):
        play.say(0, passed)


def test_a_cache_without_room_says_what_to_raise(play):
    with pytest.raises(CapacityError, match=r"stage 1 has room for 1 KV blocks.*memory_gib"):
        start_all(play, num_blocks=(10, 1, 10))


def test_a_dead_process_is_named_with_its_signal(play):
    play.launcher.processes[2].end(-9)
    with pytest.raises(StageDiedError, match=r"stage 2 .*killed by signal 9") as failure:
        play.supervisor.check()
    assert failure.value.stage_index == 2


def test_last_words_beat_an_exit_status(play):
    play.hello(1)
    error = CheckpointError("tensor x is missing")
    failed = protocol.StageFailed(EPOCH, 1, 0, error.to_wire(), "CheckpointError", str(error), "")
    play.stages[1].send(failed)
    wait_readable([play.router], [], 5.0)
    play.launcher.processes[1].end(1)
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        play.supervisor.check()


def test_what_the_others_had_sent_is_kept_when_a_stage_dies(play):
    """Times for a trace, which is written after the end."""
    start_all(play)
    trace = protocol.StageTrace(EPOCH, 0, b"", b"")
    play.stages[0].send(trace)
    wait_readable([play.router], [], 5.0)
    play.launcher.processes[1].end(-9)
    with pytest.raises(StageDiedError):
        play.supervisor.check()
    assert play.supervisor.unread == [(stage_identity(0), trace)]


def test_a_foreign_exception_arrives_with_its_traceback(play):
    play.hello(1)
    failed = protocol.StageFailed(EPOCH, 1, 5, {}, "KeyError", "'w'", "Traceback: line 3")
    with pytest.raises(StageFailedError, match="line 3") as failure:
        play.say(1, failed)
    assert failure.value.remote_type == "KeyError"


def test_a_start_that_takes_too_long_names_who_is_awaited(directory):
    play = Play(directory, start_timeout_s=1e-9)
    play.hello(0)
    with pytest.raises(DeadlineExceededError, match=r"stages \[1, 2\] are still starting"):
        play.supervisor.check()
    play.close()


def test_a_message_that_is_not_a_stages_ends_the_run(play):
    play.hello(0)
    with pytest.raises(ProtocolError, match="stage 0 sent Status"):
        play.say(0, protocol.Status())


def test_stop_asks_then_kills(play):
    play.hello(0)
    play.hear(0)
    processes = play.launcher.processes
    processes[1].end(0)
    play.supervisor.stop("done")
    assert play.hear(0) == protocol.Shutdown("done")
    assert [process.was_killed for process in processes] == [True, False, True]
