"""Supervisor: what ends an epoch, who is replaced, and how the next one begins."""

import time

import pytest

from ember_pp import protocol
from ember_pp.coordinator.supervisor import Phase
from ember_pp.errors import (
    CheckpointError,
    EmberError,
    HandoffError,
    ProtocolError,
    StageDiedError,
)
from ember_pp.sockets import PrivateDirectory
from tests.coordinator.played_stages import NUM_STAGES, Play


@pytest.fixture
def make_play():
    with PrivateDirectory() as directory:
        plays = []

        def make(**settings):
            plays.append(Play(directory, **settings))
            return plays[-1]

        yield make
        for play in plays:
            play.close()


@pytest.fixture
def play(make_play):
    play = make_play()
    play.serve()
    return play


def phases(play):
    return [stage.phase for stage in play.supervisor.stages]


def failure(epoch, index, *, is_ending):
    wire = ProtocolError("a gap").to_wire()
    return protocol.StageFailed(epoch, index, is_ending, 7, wire, "ProtocolError", "a gap", "")


def test_a_dead_stage_is_replaced_and_the_others_keep_their_weights(play):
    supervisor = play.supervisor
    play.process_of(1).end(-9)
    supervisor.check()
    assert supervisor.epoch == 1
    assert not supervisor.is_ready
    assert phases(play) == [Phase.RENEWING, Phase.STARTING, Phase.RENEWING]
    assert [process.stage_index for process in play.launcher.processes] == [0, 1, 2, 1]
    assert play.launcher.processes[1].is_closed
    assert "killed by signal 9" in supervisor.problem

    assert [play.hear(index) for index in (0, 2)] == [protocol.Renew(1)] * 2
    play.hello(1)
    assert play.hear(1).epoch == 1  # it is configured for this epoch: it needs no Renew
    play.ready(0)
    play.ready(2)
    play.ready(1, num_blocks=1)  # of no matter: it is what it was
    starts = play.start_all()
    assert [start.num_blocks for start in starts] == [7, 7, 7]
    handles = [{"ring": index, "epoch": 1} for index in (1, 2, 0)]
    assert [start.next_handle for start in starts] == handles
    assert [start.previous_handle for start in starts] == [handles[1], handles[2], handles[0]]
    play.probe_all()
    assert supervisor.is_ready
    assert supervisor.problem == ""
    assert supervisor.budget.num_restarts == 1


def test_nothing_begins_before_the_dead_process_is_reaped(play):
    victim = play.process_of(1)
    victim.is_unkillable = True
    play.say(1, failure(0, 1, is_ending=True))
    assert victim.was_killed
    play.supervisor.check()
    assert phases(play) == [Phase.RENEWING, Phase.ENDING, Phase.RENEWING]
    assert len(play.launcher.processes) == NUM_STAGES
    assert play.stages[0].receive(0.05) is None, "told too early"
    victim.end(-9)
    play.supervisor.check()
    assert len(play.launcher.processes) == NUM_STAGES + 1
    assert play.hear(0) == protocol.Renew(1)


def test_what_is_of_an_older_epoch_is_ignored(play):
    play.process_of(1).end(-9)
    play.supervisor.check()
    old = play.stages[1]
    old.send(protocol.StageReady(1, 1, 10, {}, 0, 0))  # whoever this is, it is no stage any more
    play.pump(1)
    play.say(0, failure(0, 0, is_ending=False))
    play.ready(0, epoch=0)
    play.say(2, protocol.ProbeReport(0, 2, "1->2", "cuda_ipc", False, "closed"))
    assert play.supervisor.epoch == 1
    assert phases(play) == [Phase.RENEWING, Phase.STARTING, Phase.RENEWING]


def test_two_that_die_together_are_one_failure(play):
    play.process_of(0).end(-9)
    play.process_of(2).end(-11)
    play.supervisor.check()
    assert play.supervisor.epoch == 1
    assert phases(play) == [Phase.STARTING, Phase.RENEWING, Phase.STARTING]


def test_a_stage_that_dies_while_another_loads_is_replaced_too(play):
    play.process_of(1).end(-9)
    play.supervisor.check()
    play.hello(1)
    play.hear(1)
    play.ready(2)
    play.process_of(0).end(-9)
    play.supervisor.check()
    assert play.supervisor.epoch == 2
    assert phases(play) == [Phase.STARTING, Phase.LOADING, Phase.RENEWING]
    # It loads for epoch 1; what it then reports is told to be anew.
    assert play.hear(1) == protocol.Renew(2)
    play.ready(1, epoch=1)
    assert phases(play)[1] is Phase.LOADING
    play.ready(1, epoch=2)
    assert phases(play)[1] is Phase.LOADED


def test_a_stage_that_is_sound_is_not_replaced(play):
    play.say(1, failure(0, 1, is_ending=False))
    assert play.supervisor.epoch == 1
    assert phases(play) == [Phase.RENEWING] * 3
    assert len(play.launcher.processes) == NUM_STAGES


def test_a_stage_that_has_not_loaded_yet_is_replaced_whatever_went_wrong(make_play):
    play = make_play()
    play.hello(1)
    play.say(1, failure(-1, 1, is_ending=False))
    assert phases(play) == [Phase.STARTING] * 3
    assert [process.stage_index for process in play.launcher.processes] == [0, 1, 2, 1]


def test_bytes_that_are_no_message_end_the_epoch(play):
    play.stages[2]._socket.send(b"\xc1")
    play.pump(1)
    assert (play.supervisor.epoch, phases(play)) == (1, [Phase.RENEWING] * 3)
    assert "from stage 2" in play.supervisor.problem


def test_a_message_out_of_place_ends_the_epoch(play):
    play.say(0, protocol.Status())
    assert play.supervisor.epoch == 1
    assert "stage 0 sent Status" in play.supervisor.problem


@pytest.mark.parametrize("difference", [1, -1])
def test_a_count_that_differs_ends_the_epoch_once(play, difference):
    play.say(1, protocol.Tally(play.num_sent[1]))
    assert play.supervisor.epoch == 0
    claimed = play.num_sent[1] + difference
    play.say(1, protocol.Tally(claimed))
    assert play.supervisor.epoch == 1
    assert f"messages came from stage 1, which has sent {claimed}" in play.supervisor.problem
    play.say(1, protocol.Tally(claimed))
    assert play.supervisor.epoch == 1


def test_stages_are_told_how_many_messages_were_sent(make_play):
    play = make_play()
    play.hello(0)
    play.hear(0)
    play.supervisor.watch(time.monotonic())
    assert play.hear(0) == protocol.Tally(1)
    play.supervisor.watch(time.monotonic() + 1.0)
    assert play.stages[0].receive(0.05) is None, "nothing was sent since"


def test_a_silent_stage_is_replaced_and_one_that_answers_is_not(make_play):
    play = make_play(supervisor={"heartbeat_max_misses": 3})
    play.serve(has_heart=True)
    frozen = play.supervisor.stages[1]
    play.watch_until(lambda: all(s.num_unanswered is not None for s in play.supervisor.stages))
    play._hearts[1].close()
    play.watch_until(lambda: play.supervisor.epoch == 1)
    assert play.supervisor.stages[1] is not frozen
    assert play.launcher.processes[1].was_killed
    assert phases(play) == [Phase.RENEWING, Phase.STARTING, Phase.RENEWING]
    assert "stage 1" in play.supervisor.problem
    assert "heartbeats" in play.supervisor.problem


def test_a_coordinator_that_stood_still_blames_nobody(make_play):
    play = make_play(supervisor={"heartbeat_interval_s": 0.05, "heartbeat_max_misses": 2})
    play.serve(has_heart=True)
    play.watch_until(lambda: all(s.num_unanswered is not None for s in play.supervisor.stages))
    time.sleep(0.5)  # ten beats were not sent
    play.watch_until(lambda: play.supervisor._num_beats > 20)
    assert play.supervisor.epoch == 0


def test_a_process_that_never_says_hello_is_replaced(make_play):
    play = make_play(supervisor={"hello_timeout_s": 0.05})
    play.hello(0)
    play.hello(2)
    play.watch_until(lambda: play.supervisor.epoch > 0)
    assert "has not said hello within supervisor.hello_timeout_s=0.05" in play.supervisor.problem
    assert [process.was_killed for process in play.launcher.processes[:3]] == [False, True, False]


def test_a_stage_that_does_not_answer_a_renewal_is_replaced(play):
    play.supervisor.renewal_limit_s = 0.05
    play.say(1, failure(0, 1, is_ending=False))
    for index in (0, 1):
        play.ready(index)
    play.watch_until(lambda: play.supervisor.epoch == 2)
    assert phases(play) == [Phase.RENEWING, Phase.RENEWING, Phase.STARTING]
    assert "still at what it did" in play.supervisor.problem


def test_a_stage_that_builds_when_its_epoch_ends_is_given_the_time(play):
    play.supervisor.renewal_limit_s = 0.01
    play.say(1, failure(0, 1, is_ending=False))
    for index in range(NUM_STAGES):
        play.say(index, protocol.StageProgress(index, "compiling", 0, 0))
    until_s = time.monotonic() + 0.1
    play.watch_until(lambda: time.monotonic() > until_s)
    assert play.supervisor.epoch == 1


def test_under_mps_all_stages_of_the_card_are_replaced(make_play):
    play = make_play()
    play.serve(is_mps=True)
    for stage, device in zip(play.supervisor.stages, ("cuda:0", "cuda:0", "cuda:1"), strict=True):
        stage.device = device
    play.process_of(0).end(-9)
    play.supervisor.check()
    play.supervisor.check()
    assert phases(play) == [Phase.STARTING, Phase.STARTING, Phase.RENEWING]
    assert [p.was_killed for p in play.launcher.processes[:3]] == [False, True, False]


def test_without_mps_stages_of_one_card_are_replaced_alone(make_play):
    play = make_play()
    play.serve(is_mps=False)
    for stage in play.supervisor.stages:
        stage.device = "cuda:0"
    play.process_of(0).end(-9)
    play.supervisor.check()
    assert phases(play) == [Phase.STARTING, Phase.RENEWING, Phase.RENEWING]


def test_one_failure_too_many_ends_the_run_with_what_the_stage_said(make_play):
    play = make_play(supervisor={"max_restarts": 2, "restart_window_s": 60.0})
    play.serve()
    for _ in range(2):
        play.say(0, failure(play.supervisor.epoch, 0, is_ending=False))
    play.process_of(2).end(-11)
    with pytest.raises(StageDiedError, match=r"(?s)signal 11.*failure 3.*max_restarts=2"):
        play.supervisor.check()


def test_failures_are_forgotten_after_the_window(make_play):
    play = make_play(supervisor={"max_restarts": 1, "restart_window_s": 0.1})
    play.serve()
    for epoch in range(3):
        play.say(0, failure(epoch, 0, is_ending=False))
        time.sleep(0.15)
    assert play.supervisor.epoch == 3


@pytest.mark.parametrize(
    "error", [CheckpointError("shard 2 is damaged"), HandoffError("edge 0->1")]
)
def test_what_would_fail_again_is_not_tried_again(make_play, error):
    play = make_play()
    play.hello(0)
    wire = error.to_wire()
    failed = protocol.StageFailed(0, 0, True, 0, wire, type(error).__name__, str(error), "")
    with pytest.raises(EmberError, match=str(error)):
        play.say(0, failed)
    assert len(play.launcher.processes) == NUM_STAGES


def test_an_edge_that_passes_no_probe_after_a_renewal_is_tried_again(play):
    play.say(0, failure(0, 0, is_ending=False))
    for index in range(NUM_STAGES):
        assert play.hear(index) == protocol.Renew(1)
        play.ready(index)
    play.start_all()
    for path in ("cuda_ipc", "host_shm"):
        for index in (0, 1):
            play.say(index, protocol.ProbeReport(1, index, "0->1", path, False, "too late"))
    assert play.supervisor.epoch == 2


def test_who_says_hello_in_an_epoch_is_not_told_of_it_again(play):
    """A stage that was configured for the epoch while another had not been reaped."""
    unkillable = play.process_of(2)
    unkillable.is_unkillable = True
    play.process_of(0).end(-9)
    play.supervisor.check()
    play.say(2, failure(1, 2, is_ending=True))
    play.hello(0)
    assert play.hear(0).epoch == 2
    unkillable.end(-9)
    play.supervisor.check()
    assert play.hear(1) == protocol.Renew(1)
    assert play.hear(1) == protocol.Renew(2)
    assert play.stages[0].receive(0.05) is None


def test_one_message_too_many_is_one_failure(play):
    """It is noticed by what it says; that the count does not fit either is no news."""
    play.stages[1]._socket.send(b"\xc1")
    play.pump(1)
    play.say(1, protocol.Tally(play.num_sent[1]))
    assert play.supervisor.epoch == 1
    play.say(1, protocol.Tally(play.num_sent[1] + 1))
    assert play.supervisor.epoch == 2
