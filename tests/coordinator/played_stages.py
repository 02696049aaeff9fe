"""A supervisor whose stages the test plays, message by message; no process is started."""

from __future__ import annotations

import os
import time

from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.coordinator.preparation import prepare
from ember_pp.coordinator.supervisor import Supervisor
from ember_pp.sockets import DealerSocket, Heart, RouterSocket, wait_readable

NUM_STAGES = 3
CONFIG = {
    "job": {"name": "serve"},
    "model": {"path": "demo", "dtype": "float32"},
    "pipeline": {"stages": NUM_STAGES, "devices": "cpu"},
}
EDGE_ENDS = [(0, "0->1"), (1, "0->1"), (1, "1->2"), (2, "1->2"), (2, "2->0"), (0, "2->0")]
PATIENCE_S = 10.0


def edges_of(index):
    """The edge that ends at a stage, and the one that begins there."""
    before, after = (index - 1) % NUM_STAGES, (index + 1) % NUM_STAGES
    return f"{before}->{index}", f"{index}->{after}"


class FakeProcess:
    """A process that ends when the test says so."""

    def __init__(self, stage_index, token, pid):
        self.stage_index, self.token, self.pid = stage_index, token, pid
        self.exit_descriptor, self._writer = os.pipe()
        self.status = None
        self.was_killed = False
        self.is_unkillable = False
        self.is_closed = False

    def exit_status(self):
        return self.status

    def end(self, status):
        self.status = status
        os.write(self._writer, b"x")

    def kill(self):
        self.was_killed = self.was_killed or self.status is None
        if self.status is None and not self.is_unkillable:
            self.end(-9)

    def wait(self, timeout_s):
        return self.status

    def close(self):
        self.is_closed = True
        os.close(self.exit_descriptor)
        os.close(self._writer)


class FakeLauncher:
    """Remembers what was started: ``processes``, in order."""

    def __init__(self):
        self.processes = []

    def start(self, stage_index, *, address, token):
        process = FakeProcess(stage_index, token, 1000 + len(self.processes))
        self.processes.append(process)
        return process


class Play:
    """A supervisor, and one socket per stage for the test to speak through."""

    def __init__(self, directory, *, supervisor=None, **coordinator):
        plain = CONFIG | {"coordinator": {"shutdown_grace_s": 0.01} | coordinator}
        plain["supervisor"] = {"heartbeat_interval_s": 0.01} | (supervisor or {})
        config = configuration.build(plain)
        self.router = RouterSocket(directory.address("s"), max_message_bytes=1 << 24)
        self.launcher = FakeLauncher()
        self.supervisor = Supervisor(config, prepare(config), self.router, self.launcher)
        self.supervisor.start()
        self.stages = [None] * NUM_STAGES
        self.num_sent = [0] * NUM_STAGES
        self._old = []
        self._hearts = []

    def process_of(self, index):
        """The process that stands for a stage now."""
        return [p for p in self.launcher.processes if p.stage_index == index][-1]

    def connect(self, index, *, has_heart=False):
        """A new process of a stage connects."""
        if self.stages[index] is not None:
            self._old.append(self.stages[index])
        identity = f"stage-{index}-{self.process_of(index).pid}".encode()
        self.stages[index] = DealerSocket(self.router.address, identity=identity)
        self.num_sent[index] = 0
        if has_heart:
            self._hearts.append(Heart(self.router.address, identity=identity))

    def say(self, index, message):
        self.stages[index].send(message)
        self.num_sent[index] += not isinstance(message, protocol.Tally)
        self.pump(1)

    def pump(self, count):
        while count > 0:
            wait_readable([self.router], [], PATIENCE_S)
            received = list(self.router.receive_all())
            assert received, "nothing arrived"
            for identity, message in received:
                stage = self.supervisor.accept(identity, message)
                if stage is not None:
                    self.supervisor.handle(stage, message)
            count -= len(received)

    def hear(self, index):
        return self.stages[index].receive(PATIENCE_S)

    def hello(self, index, token=None, **facts):
        self.connect(index, has_heart=facts.pop("has_heart", False))
        token = self.process_of(index).token if token is None else token
        self.say(index, protocol.StageHello(index, token, 1, {"name": "test"} | facts))

    def ready(self, index, num_blocks=10, epoch=None):
        epoch = self.supervisor.epoch if epoch is None else epoch
        handle = {"ring": index, "epoch": epoch}
        self.say(index, protocol.StageReady(epoch, index, num_blocks, handle, 100, 10))

    def load_all(self, num_blocks=(10, 7, 9), **facts):
        for index in range(NUM_STAGES):
            self.hello(index, **facts)
            assert isinstance(self.hear(index), protocol.StageConfig)
        for index in range(NUM_STAGES):
            self.ready(index, num_blocks[index])

    def start_all(self):
        """From all being ready to all being started; what each was told."""
        starts = [self.hear(index) for index in range(NUM_STAGES)]
        for index in range(NUM_STAGES):
            paths = {edge: {"cuda_ipc": "", "host_shm": ""} for edge in edges_of(index)}
            self.say(index, protocol.StageStarted(self.supervisor.epoch, index, paths))
        return starts

    def probe_all(self):
        """Until the pipeline is ready; the probes that each stage was sent."""
        probes = [[self.hear(index) for _ in range(2)] for index in range(NUM_STAGES)]
        for index, edge in EDGE_ENDS:
            assert not self.supervisor.is_ready
            report = protocol.ProbeReport(self.supervisor.epoch, index, edge, "cuda_ipc", True, "")
            self.say(index, report)
        return probes

    def serve(self, **facts):
        """Everything from hello to ready."""
        self.load_all(**facts)
        self.start_all()
        self.probe_all()
        assert self.supervisor.is_ready

    def watch_until(self, condition):
        """Let time pass, as the coordinator's loop does, until the condition is true."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline_s
            wait_readable([self.router], [], 0.005)
            for identity, message in self.router.receive_all():
                self.supervisor.accept(identity, message)
            self.supervisor.watch(time.monotonic())

    def close(self):
        self.supervisor.stop("test")
        for heart in self._hearts:
            heart.close()
        for stage in [*self.stages, *self._old]:
            if stage is not None:
                stage.close(linger_ms=0)
        self.router.close(linger_ms=0)
