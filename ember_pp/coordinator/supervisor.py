"""Brings the stages up, watches them, and takes them down.

The life of one epoch, as messages (``docs/protocol.md``)::

    every stage:   start -> StageHello -> StageConfig -> StageProgress* -> StageReady
    all ready:     Start (agreed number of blocks, the neighbours' handles) -> StageStarted
    all started:   Probe to both ends of every edge, feedback last -> ProbeReport; again with the
                   next path for an edge whose probe failed (``edge_choice.py``)
    all probed:    the pipeline takes plans

The supervisor is driven by the coordinator's loop: ``handle`` for each message, ``check`` when
a process may have ended or time has passed. It owns processes and stage messages, and knows
no requests.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import secrets
import time
from typing import Any

from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.config import Config
from ember_pp.coordinator.edge_choice import EdgeChoice, EdgeProbe
from ember_pp.coordinator.launcher import Launcher, StageProcess, end_all
from ember_pp.coordinator.preparation import Preparation
from ember_pp.errors import (
    CapacityError,
    DeadlineExceededError,
    EmberError,
    ProtocolError,
    StageDiedError,
    StageFailedError,
    from_wire,
)
from ember_pp.sockets import RouterSocket

logger = logging.getLogger(__name__)

EPOCH = 0  # a pipeline that is restarted counts on from here


class Phase(enum.Enum):
    """How far a stage is; the pipeline is as far as its slowest stage."""

    STARTING = "starting"
    LOADING = "loading"
    LOADED = "loaded"
    STARTED = "started"
    READY = "ready"


_ORDER = list(Phase)


@dataclasses.dataclass(slots=True)
class StageState:
    """What the coordinator knows of one stage."""

    stage_index: int
    start_layer: int
    end_layer: int
    device: str
    token: str
    process: StageProcess
    phase: Phase = Phase.STARTING
    device_facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_done: int = 0
    num_total: int = 0
    ready: protocol.StageReady | None = None
    stats: protocol.StageStats | None = None
    started_at_s: float = 0.0

    @property
    def identity(self) -> bytes:
        """Name of the stage at the coordinator's socket."""
        return stage_identity(self.stage_index)


def stage_identity(stage_index: int) -> bytes:
    """The identity that a stage's socket announces."""
    return f"stage-{stage_index}".encode()


class Supervisor:
    """Processes and start sequence of all stages.

    Args:
        config: the whole configuration, sent to each stage.
        preparation: the checked model and layout.
        router: bound socket that the stages connect to.
        launcher: starts the processes; ``start`` is called from the caller's thread.
        replica: which copy of the model this is; it says which devices are its own.
    """

    def __init__(
        self,
        config: Config,
        preparation: Preparation,
        router: RouterSocket,
        launcher: Launcher,
        replica: int = 0,
    ) -> None:
        self._replica = replica
        self._config = config
        self._preparation = preparation
        self._router = router
        self._launcher = launcher
        self._deadline_s = time.monotonic() + config.coordinator.start_timeout_s
        self._edge_choice = EdgeChoice(0)
        self.unread: list[tuple[bytes, protocol.Message | ProtocolError]] = []
        """What stages had sent when one was found dead, and nobody has looked at yet."""
        self.num_blocks = 0
        """KV blocks that every stage holds; known once all stages are loaded."""
        self.stages: list[StageState] = []

    @property
    def is_ready(self) -> bool:
        """True once every stage takes plans."""
        return bool(self.stages) and all(stage.phase is Phase.READY for stage in self.stages)

    @property
    def edges(self) -> dict[str, str]:
        """Path of each edge that passed its probe, e.g. ``{"0->1": "cuda_ipc"}``."""
        return dict(self._edge_choice.chosen)

    @property
    def edge_reasons(self) -> dict[str, str]:
        """Why each of ``edges`` has its path: what was found of better ones."""
        return self._edge_choice.reasons

    @property
    def phase(self) -> Phase:
        """The phase of the stage that is furthest behind."""
        return min((stage.phase for stage in self.stages), key=_ORDER.index)

    @property
    def exit_descriptors(self) -> list[int]:
        """Descriptors that become readable when a stage process ends."""
        return [stage.process.exit_descriptor for stage in self.stages]

    def start(self) -> None:
        """Start all stage processes; call from the main thread."""
        devices = self._preparation.devices_of(self._replica)
        layout = zip(self._preparation.layer_ranges, devices, strict=True)
        for stage_index, ((start_layer, end_layer), device) in enumerate(layout):
            token = secrets.token_hex(16)
            process = self._launcher.start(stage_index, address=self._router.address, token=token)
            self.stages.append(
                StageState(
                    stage_index=stage_index,
                    start_layer=start_layer,
                    end_layer=end_layer,
                    device=device,
                    token=token,
                    process=process,
                )
            )

    def send_to_all(self, packed: bytes) -> None:
        """Send one encoded message to every stage.

        Raises:
            StageDiedError: a stage is gone.
        """
        for stage in self.stages:
            self._send(stage, packed)

    def handle(self, identity: bytes, message: protocol.Message) -> None:
        """Take one message of the start sequence, or news of a running stage.

        Raises:
            EmberError: a stage failed, or said what it must not say; the run ends.
        """
        stage = self._sender(identity, message)
        if stage is None:
            return
        match message:
            case protocol.StageHello():
                self._on_hello(stage, message)
            case protocol.StageProgress():
                stage.num_done, stage.num_total = message.num_done, message.num_total
            case protocol.StageReady():
                stage.ready, stage.phase = message, Phase.LOADED
                self._start_when_all_loaded()
            case protocol.StageStarted():
                stage.phase = Phase.STARTED
                self._probe(self._edge_choice.add(stage.stage_index, message.paths))
            case protocol.ProbeReport():
                self._probe(self._edge_choice.report(message))
            case protocol.StageStats():
                stage.stats = message
            case protocol.StageFailed():
                raise failure_of(stage, message)
            case _:
                raise ProtocolError(f"stage {stage.stage_index} sent {type(message).__name__}")

    def check(self) -> None:
        """Notice a stage that ended, and a start that takes too long.

        Raises:
            StageDiedError: a process ended.
            DeadlineExceededError: ``coordinator.start_timeout_s`` is over; names who is awaited.
        """
        for stage in self.stages:
            status = stage.process.exit_status()
            if status is not None:
                raise self._death_of(stage, status)
        if not self.is_ready and time.monotonic() > self._deadline_s:
            awaited = [s.stage_index for s in self.stages if s.phase is self.phase]
            raise DeadlineExceededError(
                f"stages {awaited} are still {self.phase.value} after "
                f"coordinator.start_timeout_s={self._config.coordinator.start_timeout_s:g}"
            )

    def stop(self, reason: str) -> None:
        """Ask every stage to end, wait for the grace time, kill and reap what is left."""
        packed = protocol.encode(protocol.Shutdown(reason))
        for stage in self.stages:
            if not self._router.send(stage.identity, packed):
                stage.process.kill()  # it has not connected yet, or is gone: it will not hear
        grace_s = self._config.coordinator.shutdown_grace_s
        end_all([stage.process for stage in self.stages], grace_s=grace_s)
        self.stages = []

    def _sender(self, identity: bytes, message: protocol.Message) -> StageState | None:
        for stage in self.stages:
            if stage.identity == identity:
                if isinstance(message, protocol.StageHello) and message.token != stage.token:
                    logger.warning("a process without the right token claims to be %r", identity)
                    return None
                if stage.phase is Phase.STARTING and not isinstance(
                    message, protocol.StageHello | protocol.StageFailed
                ):
                    return None
                return stage
        logger.warning("message from unknown peer %r at the stage socket", identity)
        return None

    def _send(self, stage: StageState, packed: bytes) -> None:
        if not self._router.send(stage.identity, packed):
            status = stage.process.wait(0.5)
            raise self._death_of(stage, status)

    def _on_hello(self, stage: StageState, hello: protocol.StageHello) -> None:
        stage.device_facts, stage.phase = hello.device, Phase.LOADING
        preparation = self._preparation
        plain = configuration.to_plain(self._config)
        if preparation.folder is not None:  # every stage reads the folder that was checked
            plain["model"]["path"] = str(preparation.folder)
        message = protocol.StageConfig(
            epoch=EPOCH,
            stage_index=stage.stage_index,
            num_stages=len(self.stages),
            start_layer=stage.start_layer,
            end_layer=stage.end_layer,
            device=stage.device,
            num_threads=preparation.cpu_threads,
            config=plain,
            model_config=preparation.model_config.to_plain(),
            eos_token_ids=protocol.pack_i32(preparation.eos_token_ids),
            max_slots=self._config.scheduler.max_sequences,
            max_model_len=preparation.max_model_len,
            max_in_flight=preparation.max_in_flight,
        )
        self._send(stage, protocol.encode(message))

    def _start_when_all_loaded(self) -> None:
        reports = [stage.ready for stage in self.stages if stage.ready is not None]
        if len(reports) < len(self.stages):
            return
        limiting = min(reports, key=lambda report: report.num_blocks)
        self.num_blocks = limiting.num_blocks
        self._check_capacity(limiting)
        self._edge_choice = EdgeChoice(len(self.stages))
        for index, stage in enumerate(self.stages):  # in a circle: feedback goes to stage 0
            neighbours = reports[(index + 1) % len(reports)].handle, reports[index - 1].handle
            start = protocol.Start(EPOCH, self.num_blocks, *neighbours)
            self._send(stage, protocol.encode(start))

    def _check_capacity(self, limiting: protocol.StageReady) -> None:
        block_size = self._config.cache.block_size
        if limiting.num_blocks < 2:
            raise CapacityError(
                f"stage {limiting.stage_index} has room for {limiting.num_blocks} KV blocks of "
                f"{limiting.block_bytes} bytes; raise cache.memory_gib, use more stages, or a "
                "device with more memory"
            )
        tokens = limiting.num_blocks * block_size
        if tokens < self._preparation.max_model_len:
            logger.warning(
                "the KV cache holds %d tokens (limited by stage %d): requests longer than that "
                "are refused, though the model takes %d",
                *(tokens, limiting.stage_index, self._preparation.max_model_len),
            )

    def _probe(self, probes: list[EdgeProbe]) -> None:
        for probe in probes:
            seed = secrets.randbits(32)
            packed = protocol.encode(protocol.Probe(EPOCH, probe.edge, probe.path, seed))
            for index in (probe.receiver_index, probe.sender_index):
                self._send(self.stages[index], packed)
        if self._edge_choice.is_done and self.phase is Phase.STARTED:
            for stage in self.stages:
                stage.phase = Phase.READY
            level = logging.WARNING if self._edge_choice.has_fallen_back else logging.INFO
            for edge, path in self.edges.items():
                logger.log(level, "edge %s: %s (%s)", edge, path, self.edge_reasons[edge])

    def _death_of(self, stage: StageState, status: int | None) -> EmberError:
        # Its last words may still be in the socket, and say more than an exit status.
        for identity, message in self._router.receive_all():
            if identity == stage.identity and isinstance(message, protocol.StageFailed):
                return failure_of(stage, message)
            self.unread.append((identity, message))
        if status is None:
            how = "cannot be reached"
        else:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit {status}"
        hint = " (out of memory?)" if status == -9 else ""
        return StageDiedError(
            f"stage {stage.stage_index} (pid {stage.process.pid}, layers {stage.start_layer} to "
            f"{stage.end_layer - 1}) {how}{hint}",
            stage_index=stage.stage_index,
            exit_status=status,
        )


def failure_of(stage: StageState, message: protocol.StageFailed) -> EmberError:
    """The error that a stage reported: ours as it was raised there, else with its traceback."""
    if message.error:
        return from_wire(message.error)
    return StageFailedError(
        f"stage {stage.stage_index} failed at plan {message.plan}: "
        f"{message.remote_type}: {message.text}\n{message.traceback}",
        stage_index=stage.stage_index,
        remote_type=message.remote_type,
        remote_traceback=message.traceback,
    )
