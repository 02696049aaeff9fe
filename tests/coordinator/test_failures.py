"""Stages that hang, are slow, or lose messages: requests go on, and the right one is blamed.

The stages are threads that draw the tokens that seed and place in the answer say, so that a
request whose counts a replay got wrong has other tokens.
"""

import os
import threading
import time

import pytest

from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.errors import EmberError, StageDiedError
from ember_pp.sockets import DealerSocket, Heart
from tests.coordinator.fake_stage import PATIENCE_S, running_coordinator

NUM_TOKENS = 60
SEEDS = range(8)
ENDS_WITH_AN_ERROR = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # the coordinator's thread
)


def token_of(seed, place):
    return 100 + (seed * 31 + place * 7) % 997


class ScriptedStage(threading.Thread):
    """A process that is a thread: one stage, the only one, of a pipeline.

    ``script(stage, plan)`` may sleep, return messages to send instead of the answer, or wait for
    ``is_killed``.
    """

    def __init__(self, life, address, token, script):
        super().__init__(daemon=True)
        self.life = life
        self.stage_index, self.pid = 0, life
        self.exit_descriptor, self._exit_writer = os.pipe2(os.O_CLOEXEC)
        self.is_killed = threading.Event()
        self.epoch = -1
        self.hello = protocol.StageHello(0, token, life, {})
        self._address, self._script = address, script
        identity = f"stage-0-{life}".encode()
        self._heart = Heart(address, identity=identity)
        self._identity = identity
        self.start()

    def exit_status(self):
        return None if self.is_alive() else -9

    def kill(self):
        self.is_killed.set()

    def wait(self, timeout_s):
        self.join(timeout_s)
        return self.exit_status()

    def close(self):
        self._heart.close()
        os.close(self.exit_descriptor)
        os.close(self._exit_writer)

    def run(self):
        self.socket = DealerSocket(self._address, identity=self._identity)
        self.num_sent = 0
        self.send(self.hello)
        while not self.is_killed.is_set():
            message = self.socket.receive(0.02)
            if isinstance(message, protocol.Shutdown):
                break
            if message is not None:
                self.take(message)
        self.socket.close(linger_ms=100)
        os.write(self._exit_writer, b"x")

    def send(self, message):
        self.num_sent += 1
        self.socket.send(message)

    def take(self, message):
        match message:
            case protocol.StageConfig() | protocol.Renew():
                self.epoch, self.plan = message.epoch, -1
                self.rosters, self.seeds, self.places = {}, {}, {}
                self.send(protocol.StageReady(self.epoch, 0, 10_000, {}, 0, 1))
            case protocol.Start():
                self.send(protocol.StageStarted(self.epoch, 0, {}))
            case protocol.Execute():
                if message.epoch == self.epoch:
                    sampled = self.draw(message)
                    instead = self._script(self, message)
                    for answer in [sampled] if instead is None else instead(sampled):
                        self.send(answer)

    def draw(self, plan):
        for opened in plan.open:
            self.seeds[opened.slot] = opened.seed
            self.places[opened.slot] = opened.num_output_tokens
        gone = set(protocol.unpack_u32(plan.leave))
        roster = [slot for slot in self.rosters.get(plan.microbatch, []) if slot not in gone]
        self.rosters[plan.microbatch] = roster = roster + list(protocol.unpack_u32(plan.join))
        chunks = protocol.unpack_u32(plan.chunks)
        slots = roster + [chunks[i] for i in range(0, len(chunks), 4) if chunks[i + 3]]
        tokens = [token_of(self.seeds[slot], self.places[slot]) for slot in slots]
        for slot in slots:
            self.places[slot] += 1
        return protocol.Sampled(self.epoch, plan.plan, protocol.pack_i32(tokens), [])

    def tell(self, plan, waiting_for=""):
        times = dict.fromkeys(("busy", "wait_input", "wait_output", "host_gap", "idle"), 0)
        stats = protocol.StageStats(
            epoch=self.epoch,
            stage_index=0,
            plan=plan,
            **{f"{name}_ns": value for name, value in times.items()},
            waiting_for=waiting_for,
            peak_bytes=0,
        )
        self.send(stats)


class ScriptedStages:
    """As a launcher: a stage for each life."""

    def __init__(self, script):
        self.lives = []
        self._script = script

    def start(self, stage_index, *, address, token):
        self.lives.append(ScriptedStage(len(self.lives), address, token, self._script))
        return self.lives[-1]


def run(script, **supervisor):
    """All requests through stages that follow ``script``; the launcher and the last status."""
    settings = {"overdue_min_s": 0.3, "overdue_factor": 1e-3, "heartbeat_interval_s": 0.05}
    settings["heartbeat_max_misses"] = 40  # the machine may be busy; silence is not what is tested
    stages = ScriptedStages(script)
    with (
        running_coordinator(stages, supervisor=settings | supervisor) as address,
        Client(address) as client,
    ):
        requests = [
            client.submit(
                token_ids=range(1, 20 + seed),
                sampling={"temperature": 1.0, "seed": seed, "max_tokens": NUM_TOKENS},
            )
            for seed in SEEDS
        ]
        answers = [list(request.result(60.0).token_ids) for request in requests]
        status = client.status()
    expected = [[token_of(seed, place) for place in range(NUM_TOKENS)] for seed in SEEDS]
    assert answers == expected
    return stages, status


def once(plan_number, act):
    """A script that does ``act`` at one plan of the first epoch."""

    def script(stage, plan):
        if stage.epoch == 0 and plan.plan == plan_number:
            return act(stage, plan)
        return None

    return script


def test_nothing_happens_to_stages_that_work():
    stages, status = run(lambda stage, plan: None)
    assert (len(stages.lives), status["num_restarts"], status["problems"]) == (1, 0, [])


@pytest.mark.parametrize("plan", [0, 1, 17])
def test_a_stage_that_hangs_in_a_plan_is_replaced(plan, caplog):
    stages, status = run(once(plan, lambda stage, _: stage.is_killed.wait(PATIENCE_S) and None))
    assert (len(stages.lives), status["num_restarts"]) == (2, 1)
    assert f"plan {plan} is overdue after" in caplog.text
    assert "stage 0 (pid 0, layers 0 to 9) has its input and has not finished" in caplog.text


def test_a_stage_that_waits_is_not_killed_and_the_log_says_what_for(caplog):
    def wait(stage, plan):
        if stage.epoch > 0 or plan.plan < 9:
            return None
        stage.tell(8, "plan 9: stage 0 to write slot 1 of edge 0->0, for 0.1 s")
        return lambda sampled: []

    stages, status = run(wait)
    assert (len(stages.lives), status["num_restarts"]) == (1, 1)
    assert "no stage works at it; stage 0 waits for plan 9: stage 0 to write slot 1" in caplog.text


def test_a_slow_plan_that_is_not_overdue_is_left_alone():
    stages, status = run(
        once(9, lambda *_: time.sleep(1.0)), overdue_min_s=0.05, overdue_factor=50_000.0
    )
    assert (len(stages.lives), status["num_restarts"]) == (1, 0)


@pytest.mark.slow
def test_a_plan_of_30_s_that_is_predicted_to_be_slow_is_left_alone():
    """By default settings but for the factor: plans here take some microseconds, not seconds."""
    stages, status = run(
        once(9, lambda *_: time.sleep(30.0)), overdue_min_s=5.0, overdue_factor=1e7
    )
    assert (len(stages.lives), status["num_restarts"]) == (1, 0)


@pytest.mark.parametrize("phase", ["compiling", "capturing"])
def test_a_stage_that_builds_is_left_alone_for_as_long_as_that_may_take(phase):
    def build(stage, plan):
        stage.send(protocol.StageProgress(0, phase, 0, 0))
        time.sleep(1.0)
        stage.send(protocol.StageProgress(0, "", 0, 0))

    stages, status = run(once(9, build))
    assert (len(stages.lives), status["num_restarts"]) == (1, 0)
    stages, status = run(once(9, build), build_timeout_s=0.4)
    assert (len(stages.lives), status["num_restarts"]) == (2, 1)


@pytest.mark.parametrize(
    "instead",
    [
        lambda sampled: [sampled, sampled],
        lambda sampled: [protocol.Sampled(0, sampled.plan + 1, sampled.token_ids, [])],
        lambda sampled: [protocol.Sampled(0, sampled.plan, sampled.token_ids[4:], [])],
        lambda sampled: [protocol.Sampled(0, sampled.plan, b"abc", [])],
    ],
    ids=["repeated", "a-gap", "too-few-tokens", "no-tokens"],
)
def test_answers_that_are_wrong_end_the_epoch_and_no_process(instead):
    stages, status = run(once(9, lambda *_: instead))
    assert (len(stages.lives), status["num_restarts"]) == (1, 1)


def test_an_answer_that_was_lost_is_missed_by_the_count():
    """The one that was the last: nothing that comes after it shows a gap."""

    def lose(stage, plan):
        stage.socket.send(protocol.Tally(stage.num_sent + 1))
        return lambda sampled: []

    began_s = time.monotonic()
    stages, status = run(once(9, lose), overdue_min_s=PATIENCE_S)
    assert (len(stages.lives), status["num_restarts"]) == (1, 1)
    assert time.monotonic() - began_s < PATIENCE_S / 2


@ENDS_WITH_AN_ERROR
def test_failure_after_failure_ends_in_the_error_of_the_last():
    def always(stage, plan):
        if plan.plan == 5:
            stage.is_killed.wait(PATIENCE_S)

    with pytest.raises(StageDiedError, match=r"(?s)plan 5 is overdue.*max_restarts=2"):
        run(always, max_restarts=2)


@ENDS_WITH_AN_ERROR
def test_a_stage_that_ends_by_itself_says_why():
    def fail(stage, plan):
        if plan.plan == 5:
            wire = {}
            stage.send(
                protocol.StageFailed(stage.epoch, 0, True, 5, wire, "KeyError", "'w'", "line 3")
            )

    with pytest.raises(EmberError, match=r"(?s)stage 0 failed at plan 5: KeyError: 'w'.*line 3"):
        run(fail, max_restarts=1)
