"""Supervisor: how the stages of a pipeline come up, against stages that the test plays."""

import itertools

import pytest

from ember_pp import protocol
from ember_pp.coordinator.supervisor import FIRST_EPOCH, Phase
from ember_pp.errors import (
    CapacityError,
    CheckpointError,
    DeadlineExceededError,
    HandoffError,
    StageDiedError,
    StageFailedError,
)
from ember_pp.sockets import DealerSocket, PrivateDirectory, wait_readable
from tests.coordinator.played_stages import EDGE_ENDS, Play

NO_RESTARTS = {"max_restarts": 0}


@pytest.fixture
def directory():
    with PrivateDirectory() as directory:
        yield directory


@pytest.fixture
def play(directory):
    play = Play(directory, supervisor=NO_RESTARTS)
    yield play
    play.close()


def test_the_whole_start_sequence(play):
    supervisor = play.supervisor
    assert supervisor.phase is Phase.STARTING
    play.load_all(num_blocks=(10, 7, 9))
    starts = play.start_all()
    assert [start.num_blocks for start in starts] == [7, 7, 7]  # the least of all
    assert [start.next_handle["ring"] for start in starts] == [1, 2, 0]
    assert [start.previous_handle["ring"] for start in starts] == [2, 0, 1]
    probes = play.probe_all()
    # Each stage takes its edges in the order of this list, so no two can wait for each other.
    assert [[probe.edge for probe in of_stage] for of_stage in probes] == [
        [edge for index, edge in EDGE_ENDS if index == stage_index] for stage_index in range(3)
    ]
    assert probes[0][0].seed == probes[1][0].seed
    assert probes[0][1].seed == probes[2][1].seed
    assert supervisor.is_ready
    assert supervisor.edges == {"0->1": "cuda_ipc", "1->2": "cuda_ipc", "2->0": "cuda_ipc"}
    assert set(supervisor.edge_reasons.values()) == {"probe passed"}
    supervisor.check()
    assert supervisor.epoch == FIRST_EPOCH


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
    play.connect(2)
    play.ready(2)  # without a hello
    assert play.supervisor.stages[2].phase is Phase.STARTING
    stranger = DealerSocket(play.router.address, identity=b"stage-7")
    stranger.send(protocol.StageHello(1, play.process_of(0).token, 1, {}))
    play.pump(1)
    assert {stage.phase for stage in play.supervisor.stages} == {Phase.STARTING}
    stranger.close(linger_ms=0)


def test_a_token_is_good_for_one_process(play):
    play.hello(0)
    thief = DealerSocket(play.router.address, identity=b"thief")
    thief.send(protocol.StageHello(0, play.process_of(0).token, 1, {}))
    thief.send(protocol.StageReady(0, 0, 10, {}, 0, 0))
    play.pump(2)
    assert play.supervisor.stages[0].phase is Phase.LOADING
    thief.close(linger_ms=0)


def test_an_edge_whose_probe_fails_is_probed_over_its_next_path(play, caplog):
    play.load_all()
    play.start_all()
    for index in range(3):
        for _ in range(2):
            play.hear(index)

    def report(index, edge, path, text=""):
        play.say(index, protocol.ProbeReport(0, index, edge, path, not text, text))

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
    play.load_all()
    play.start_all()
    for path in ("cuda_ipc", "host_shm"):
        failed = protocol.ProbeReport(0, 1, "0->1", path, False, f"{path} lies")
        play.say(1, failed)
        passed = protocol.ProbeReport(0, 0, "0->1", path, True, "")
        if path == "cuda_ipc":
            play.say(0, passed)
    with pytest.raises(HandoffError, match=r"edge 0->1 has no path .*ipc lies; host_shm.*shm lies"):
        play.say(0, passed)


def test_a_cache_without_room_says_what_to_raise(play):
    with pytest.raises(CapacityError, match=r"stage 1 has room for 1 KV blocks.*memory_gib"):
        play.load_all(num_blocks=(10, 1, 10))


def test_a_dead_process_is_named_with_its_signal(play):
    play.process_of(2).end(-9)
    with pytest.raises(StageDiedError, match=r"stage 2 .*killed by signal 9") as failure:
        play.supervisor.check()
    assert failure.value.stage_index == 2


def test_last_words_beat_an_exit_status(play):
    play.hello(1)
    error = CheckpointError("tensor x is missing")
    wire = error.to_wire()
    failed = protocol.StageFailed(0, 1, True, 0, wire, "CheckpointError", str(error), "")
    play.stages[1].send(failed)
    wait_readable([play.router], [], 5.0)
    play.process_of(1).end(1)
    with pytest.raises(CheckpointError, match="tensor x is missing"):
        play.supervisor.check()


def test_what_the_others_had_sent_is_kept_when_a_stage_dies(play):
    """Times for a trace, which is written after the end."""
    play.load_all()
    trace = protocol.StageTrace(0, 0, b"", b"")
    play.stages[0].send(trace)
    wait_readable([play.router], [], 5.0)
    play.process_of(1).end(-9)
    with pytest.raises(StageDiedError):
        play.supervisor.check()
    assert [message for _, message in play.supervisor.unread] == [trace]


def test_a_foreign_exception_arrives_with_its_traceback(play):
    play.hello(1)
    failed = protocol.StageFailed(0, 1, True, 5, {}, "KeyError", "'w'", "Traceback: line 3")
    with pytest.raises(StageFailedError, match="line 3") as failure:
        play.say(1, failed)
    assert failure.value.remote_type == "KeyError"


def test_a_start_that_takes_too_long_names_who_is_awaited(directory):
    play = Play(directory, start_timeout_s=1e-9)
    play.hello(0)
    with pytest.raises(DeadlineExceededError, match=r"stages \[1, 2\] are still starting"):
        play.supervisor.check()
    play.close()


def test_stop_asks_then_kills(play):
    play.hello(0)
    play.hear(0)
    processes = play.launcher.processes
    processes[1].end(0)
    play.supervisor.stop("done")
    assert play.hear(0) == protocol.Shutdown("done")
    # The first would have ended; a test's process does not.
    assert [process.was_killed for process in processes] == [True, False, True]
