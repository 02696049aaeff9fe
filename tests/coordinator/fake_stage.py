"""A coordinator that runs in a thread, with a stage that is a thread too and computes nothing."""

import contextlib
import dataclasses
import os
import threading

from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.coordinator.coordinator import Coordinator, listen
from ember_pp.coordinator.pipeline import Pipeline
from ember_pp.coordinator.preparation import prepare
from ember_pp.sockets import DealerSocket, PrivateDirectory

PATIENCE_S = 20.0


class FakeStage:
    """One stage in a thread: draws ``draw(slot, step)`` for each row of each plan.

    Args:
        draw: from a slot and how many tokens it drew before, the next one.
        plans_together: answers are held back until there are as many.
        may_load: it is not ready before this event.
    """

    def __init__(self, draw=lambda slot, step: 100 + step % 50, plans_together=1, may_load=None):
        self._draw = draw
        self._may_load = may_load
        self._plans_together = plans_together
        self.exit_descriptor, self._exit_writer = os.pipe2(os.O_CLOEXEC)
        self.pid = 0
        self.stage_index = 0
        self._rosters = {}
        self._steps = {}
        self.plans = []
        """Slots of the rows of each plan."""

    def start(self, stage_index, *, address, token):
        """As a launcher: the stage, which is its own process."""
        self._thread = threading.Thread(target=self._run, args=(address, token))
        self._thread.start()
        return self

    def exit_status(self):
        return None if self._thread.is_alive() else 0

    def kill(self):
        pass

    def wait(self, timeout_s):
        self._thread.join(timeout_s)
        return self.exit_status()

    def close(self):
        os.close(self.exit_descriptor)
        os.close(self._exit_writer)

    def _run(self, address, token):
        socket = DealerSocket(address, identity=b"stage-0")
        socket.send(protocol.StageHello(0, token, 0, {}))
        held = []
        while (message := socket.receive(PATIENCE_S)) is not None:
            match message:
                case protocol.StageConfig():
                    assert self._may_load is None or self._may_load.wait(PATIENCE_S)
                    socket.send(protocol.StageReady(0, 0, 10_000, {}, 0, 1))
                case protocol.Start():
                    socket.send(protocol.StageStarted(0, 0, {}))
                case protocol.Execute():
                    held.append(protocol.Sampled(0, message.plan, self._tokens(message), []))
                    if len(held) >= self._plans_together:
                        for sampled in held:
                            socket.send(sampled)
                        held.clear()
                case protocol.Shutdown():
                    break
        socket.close()

    def _tokens(self, plan):
        for opened in plan.open:
            self._steps[opened.slot] = 0
        roster = self._rosters.setdefault(plan.microbatch, [])
        gone = set(protocol.unpack_u32(plan.leave))
        roster[:] = [slot for slot in roster if slot not in gone]
        roster += protocol.unpack_u32(plan.join)
        chunks = protocol.unpack_u32(plan.chunks)
        slots = roster + [chunks[i] for i in range(0, len(chunks), 4) if chunks[i + 3]]
        tokens = [self._draw(slot, self._steps[slot]) for slot in slots]
        for slot in slots:
            self._steps[slot] += 1
        self.plans.append(slots)
        return protocol.pack_i32(tokens)


class Stop:
    """As ``StopSignal``, without signals."""

    def __init__(self):
        self.name = None
        self.is_urgent = False
        self.num_cut_off = None
        """What the coordinator returned; None while it runs, and after an error."""
        self.descriptor, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def set(self):
        self.is_urgent = self.name is not None
        self.name = "SIGTERM"
        os.write(self._writer, b"x")

    def take(self):
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)

    def ended(self, num_cut_off):
        self.num_cut_off = num_cut_off

    def close(self):
        os.close(self.descriptor)
        os.close(self._writer)


@contextlib.contextmanager
def running_coordinator(*stages, tokenizer=None, stop=None, **groups):
    """A coordinator of the demo model's files that serves in a thread; gives its address.

    It has as many replicas as stages; ``tokenizer`` makes another one of the model's. ``stop`` lets
    the test end it; at the end of the block it is ended at once.
    """
    plain = {
        "job": {"name": "serve"},
        "model": {"path": "demo", "dtype": "float32"},
        "pipeline": {"stages": 1, "replicas": len(stages), "devices": "cpu"},
        "sampling": {"ignore_eos": True},
        "shutdown": {"grace_s": 0.0},
    }
    config = configuration.build(plain | groups)
    preparation = prepare(config)
    if tokenizer is not None:
        made = tokenizer(preparation.tokenizer)
        preparation = dataclasses.replace(preparation, tokenizer=made)
    stop = Stop() if stop is None else stop
    with PrivateDirectory() as directory:
        address = directory.address("clients.sock")
        clients = listen(config, address)
        pipelines = [
            Pipeline(replica, config, preparation, directory, stage)
            for replica, stage in enumerate(stages)
        ]
        coordinator = Coordinator(config, preparation, clients, pipelines)
        thread = threading.Thread(target=lambda: stop.ended(coordinator.run(stop)))
        thread.start()
        try:
            yield address
        finally:
            stop.set()
            stop.set()  # whatever is open
            thread.join(PATIENCE_S)
            clients.close(linger_ms=0)
            stop.close()
            assert not thread.is_alive()
