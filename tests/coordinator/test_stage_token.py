"""Nobody but a process that was started as a stage is taken for one, whatever it sends."""

import random
import threading
import time

import pytest

from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.coordinator.supervisor import Phase
from ember_pp.sockets import DealerSocket, PrivateDirectory
from tests.coordinator.fake_stage import PATIENCE_S, FakeStage, running_coordinator
from tests.coordinator.played_stages import Play

NUM_TOKENS = 400


class SeenStage(FakeStage):
    """Tells where the stages' socket is, and what the stage said to get in."""

    def start(self, stage_index, *, address, token):
        self.address, self.token = address, token
        return super().start(stage_index, address=address, token=token)


def forged(stage, source):
    """What a stage may say, from somebody who is none."""
    i32 = protocol.pack_i32
    return [
        protocol.StageHello(0, "guessed", 1, {}),
        protocol.StageHello(0, "", 1, {}),
        protocol.StageHello(0, stage.token, 1, {}),  # overheard, and used once already
        protocol.Sampled(0, source.randrange(50), i32([99]), []),
        protocol.StageReady(0, 0, 1, {}, 0, 1),
        protocol.StageStarted(0, 0, {}),
        protocol.StageStats(0, 0, 10**6, *[0] * 5, "", 0),
        protocol.Shutdown("forged"),
        protocol.Status(),
    ]


@pytest.mark.parametrize("identity", [b"", b"stage-0", b"stage-1"])
def test_strangers_at_the_stages_socket_change_nothing(identity):
    """The tokens of a stream are those of the stage, and the run goes on."""
    source = random.Random(9)
    stage = SeenStage(lambda slot, step: time.sleep(0.002) or 100 + step % 50)
    has_ended = threading.Event()

    def disturb():
        while not has_ended.is_set():
            stranger = DealerSocket(stage.address, identity=identity)
            for message in forged(stage, source):
                stranger.send(message)
                stranger._socket.send(source.randbytes(source.randrange(200)))
            heard = stranger.receive(
                0.05
            )  # it is told nothing either, but that a heart is looked for
            assert heard is None or isinstance(heard, protocol.Heartbeat)
            stranger.close(linger_ms=0)

    with running_coordinator(stage) as address, Client(address) as client:
        sampling = {"max_tokens": NUM_TOKENS}
        request = client.submit(token_ids=[7], stream=True, sampling=sampling)
        next(iter(request))
        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            completion = request.result(PATIENCE_S)
        finally:
            has_ended.set()
            thread.join()
        assert completion.token_ids == [100 + step % 50 for step in range(NUM_TOKENS)]
        assert client.generate(token_ids=[7], sampling={"max_tokens": 3}).num_output_tokens == 3
        status = client.status()
        assert status["phase"] == "ready"
        assert status["stages"][0]["pid"] == stage.pid


def test_after_a_restart_the_old_token_and_the_old_connection_are_worth_nothing():
    with PrivateDirectory() as directory:
        play = Play(directory)
        play.serve()
        old_token, old_socket = play.process_of(1).token, play.stages[1]
        play.process_of(1).end(-9)
        play.supervisor.check()
        assert play.process_of(1).token != old_token
        thief = DealerSocket(play.router.address, identity=b"thief")
        for socket in (thief, old_socket):
            socket.send(protocol.StageHello(1, old_token, 1, {}))
            socket.send(protocol.StageReady(1, 1, 10, {}, 0, 0))
            play.pump(2)
            assert play.supervisor.stages[1].phase is Phase.STARTING
        play.hello(1)
        assert play.supervisor.stages[1].phase is Phase.LOADING
        thief.close(linger_ms=0)
        play.close()
