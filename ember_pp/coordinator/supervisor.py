"""Brings the stages up, watches them, replaces what failed, and takes them down.

The life of one epoch, as messages (``docs/protocol.md``; why, in ``docs/reliability.md``)::

    a new process:   start -> StageHello -> StageConfig -> StageProgress* -> StageReady
    any other:       Renew -> StageReady
    all ready:       Start (agreed number of blocks, the neighbours' handles) -> StageStarted
    all started:     Probe to both ends of every edge, feedback last -> ProbeReport; again with the
                     next path for an edge whose probe failed (``edge_choice.py``)
    all probed:      the pipeline takes plans, until ``end_epoch``

The supervisor is driven by the coordinator's loop: ``accept`` and ``handle`` for each message,
``check`` when a process may have ended, ``watch`` as time passes. It owns processes and stage
messages, and knows no requests.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable

from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.config import Config
from ember_pp.coordinator.edge_choice import EdgeChoice, EdgeProbe
from ember_pp.coordinator.launcher import Launcher, end_all
from ember_pp.coordinator.preparation import Preparation
from ember_pp.coordinator.restarts import RestartBudget
from ember_pp.coordinator.stage_state import PHASES, Phase, StageState
from ember_pp.errors import (
    CapacityError,
    DeadlineExceededError,
    EmberError,
    HandoffError,
    ProtocolError,
    StageDiedError,
    StageFailedError,
    from_wire,
)
from ember_pp.sockets import RouterSocket, wait_readable

logger = logging.getLogger(__name__)

FIRST_EPOCH = 0
_LAST_WORDS_S = 0.02  # what a process sent before it ended may be this far behind the news of it


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
        self._settings = config.supervisor
        self._preparation = preparation
        self._router = router
        self._launcher = launcher
        self._deadline_s = time.monotonic() + config.coordinator.start_timeout_s
        self._edge_choice = EdgeChoice(0)
        self._has_served = False
        self._num_beats = 0
        self._next_beat_s = 0.0
        self.budget = RestartBudget(self._settings.max_restarts, self._settings.restart_window_s)
        self.epoch = FIRST_EPOCH
        """Counts the lives of the pipeline; the scheduler has to ``forget`` when it changes."""
        self.problem = ""
        """What ended the epoch before, until this one is ready."""
        self.problem_since_s = 0.0
        self.renewal_limit_s = self._settings.overdue_min_s
        """How long a stage may be at what it was at when an epoch ends."""
        self.unread: list[tuple[bytes, protocol.Message | ProtocolError]] = []
        """What stages had sent when one was found dead, and nobody has looked at yet."""
        self.num_blocks = 0
        """KV blocks that every stage holds; known once all stages are loaded, and kept."""
        self.stages: list[StageState] = []

    @property
    def is_ready(self) -> bool:
        """True while every stage takes plans."""
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
        return min((stage.phase for stage in self.stages), key=PHASES.index)

    @property
    def exit_descriptors(self) -> list[int]:
        """Descriptors that become readable when a stage process ends."""
        return [stage.process.exit_descriptor for stage in self.stages]

    @property
    def next_watch_s(self) -> float:
        """When ``watch`` has something to do."""
        return self._next_beat_s

    def start(self) -> None:
        """Start all stage processes; call from the main thread."""
        self.stages = [
            self._start_process(index) for index in range(len(self._preparation.layer_ranges))
        ]

    def _start_process(self, stage_index: int) -> StageState:
        start_layer, end_layer = self._preparation.layer_ranges[stage_index]
        token = secrets.token_hex(16)
        process = self._launcher.start(stage_index, address=self._router.address, token=token)
        return StageState(
            stage_index=stage_index,
            start_layer=start_layer,
            end_layer=end_layer,
            device=self._preparation.devices_of(self._replica)[stage_index],
            token=token,
            process=process,
            started_at_s=time.monotonic(),
        )

    # ---------------------------------------------------------------- messages

    def send_to_all(self, packed: bytes) -> bool:
        """Send one encoded message to every stage; False if that found one to be gone.

        Raises:
            EmberError: as ``end_epoch``.
        """
        epoch = self.epoch
        return all(self._send(stage, packed) and self.epoch == epoch for stage in self.stages)

    def accept(
        self, identity: bytes, message: protocol.Message | ProtocolError
    ) -> StageState | None:
        """Which stage a message is of, if anybody has to look at it; what it says is counted.

        Heartbeats and counts end here, and so does what is no message, or of another epoch.

        Raises:
            EmberError: as ``end_epoch``.
        """
        if isinstance(message, protocol.StageHello):
            return self._introduce(identity, message)
        if isinstance(message, protocol.Heartbeat):
            for stage in self.stages:
                if stage.heart == identity:
                    stage.num_unanswered = 0
            return None
        sender = [stage for stage in self.stages if stage.identity == identity]
        if not sender:
            logger.debug("message of a peer that is not, or no longer, a stage: %r", identity)
            return None
        stage = sender[0]
        if isinstance(message, protocol.Tally):
            self._on_tally(stage, message)
            return None
        stage.num_received += 1
        if isinstance(message, ProtocolError):
            self.blame(stage, ProtocolError(f"from stage {stage.stage_index}: {message}"))
            return None
        if stage.phase is Phase.ENDING:
            return None
        epoch = getattr(message, "epoch", self.epoch)
        is_of_any = isinstance(message, protocol.StageTrace) or (
            isinstance(message, protocol.StageFailed) and (message.is_ending or epoch < 0)
        )
        return stage if epoch == self.epoch or is_of_any else None

    def handle(self, stage: StageState, message: protocol.Message) -> None:
        """Take one message of the start sequence, or news of a running stage.

        Raises:
            EmberError: as ``end_epoch``.
        """
        match message:
            case protocol.StageHello():
                self._on_hello(stage, message)
            case protocol.StageProgress():
                self._on_progress(stage, message)
            case protocol.StageReady():
                stage.ready, stage.phase = message, Phase.LOADED
                self._start_when_all_loaded()
            case protocol.StageStarted():
                stage.phase, stage.building = Phase.STARTED, ""
                self._probe(lambda: self._edge_choice.add(stage.stage_index, message.paths))
            case protocol.ProbeReport():
                self._probe(lambda: self._edge_choice.report(message))
            case protocol.StageStats():
                stage.stats = message
            case protocol.StageFailed():
                self._on_failed(stage, message)
            case _:
                error = ProtocolError(f"stage {stage.stage_index} sent {type(message).__name__}")
                self.blame(stage, error)

    def _introduce(self, identity: bytes, hello: protocol.StageHello) -> StageState | None:
        """The stage that this process was started as: it alone knows the token."""
        for stage in self.stages:
            if stage.token == hello.token and stage.stage_index == hello.stage_index:
                stage.num_received += 1
                if stage.identity is not None or stage.phase is not Phase.STARTING:
                    return None  # said twice; the count will tell
                stage.identity = identity
                return stage
        logger.warning("a process without the right token claims to be a stage: %r", identity)
        return None

    def _on_tally(self, stage: StageState, tally: protocol.Tally) -> None:
        try:
            stage.check_tally(tally)
        except ProtocolError as error:
            self.blame(stage, error)
            stage.is_count_doubtful = False  # they agree from now on

    def _on_progress(self, stage: StageState, progress: protocol.StageProgress) -> None:
        if progress.phase == "weights":
            stage.num_done, stage.num_total = progress.num_done, progress.num_total
        else:
            stage.building, stage.building_since_s = progress.phase, time.monotonic()

    def _on_failed(self, stage: StageState, failed: protocol.StageFailed) -> None:
        error = failure_of(stage, failed)
        if failed.is_ending:
            self.end_epoch(error, [stage])
        else:
            self.blame(stage, error)

    def blame(self, stage: StageState, error: EmberError) -> None:
        """A message to or from ``stage`` went wrong: the process is sound, if it has begun well.

        Raises:
            EmberError: as ``end_epoch``.
        """
        stage.is_count_doubtful = True
        self.end_epoch(error, [] if stage.has_weights else [stage])

    def _send(self, stage: StageState, packed: bytes) -> bool:
        assert stage.identity is not None, "nothing is sent to a stage before its hello"
        stage.num_sent += 1
        if self._router.send(stage.identity, packed):
            return True
        self.end_epoch(self._death_of(stage, stage.process.wait(0.1)), [stage])
        return False

    # ---------------------------------------------------------------- start of an epoch

    def _on_hello(self, stage: StageState, hello: protocol.StageHello) -> None:
        stage.device_facts, stage.phase = hello.device, Phase.LOADING
        stage.renewed_at_s = time.monotonic()  # its configuration is of this epoch
        preparation = self._preparation
        plain = configuration.to_plain(self._config)
        if preparation.folder is not None:  # every stage reads the folder that was checked
            plain["model"]["path"] = str(preparation.folder)
        message = protocol.StageConfig(
            epoch=self.epoch,
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
        if any(stage.phase is not Phase.LOADED for stage in self.stages):
            return
        reports = [stage.ready for stage in self.stages if stage.ready is not None]
        if not self.num_blocks:  # later, a process with the same layers takes the same memory
            limiting = min(reports, key=lambda report: report.num_blocks)
            self._check_capacity(limiting)
            self.num_blocks = limiting.num_blocks
        self._edge_choice = EdgeChoice(len(self.stages))
        for index, stage in enumerate(self.stages):  # in a circle: feedback goes to stage 0
            neighbours = reports[(index + 1) % len(reports)].handle, reports[index - 1].handle
            start = protocol.Start(self.epoch, self.num_blocks, *neighbours)
            if not self._send(stage, protocol.encode(start)):
                return

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

    def _probe(self, next_probes: Callable[[], list[EdgeProbe]]) -> None:
        """Send what is to be probed next; once every edge has a path, plans can be sent."""
        try:
            probes = next_probes()
        except HandoffError as error:
            self.end_epoch(error)
            return
        for probe in probes:
            seed = secrets.randbits(32)
            packed = protocol.encode(protocol.Probe(self.epoch, probe.edge, probe.path, seed))
            for index in (probe.receiver_index, probe.sender_index):
                if not self._send(self.stages[index], packed):
                    return
        if self._edge_choice.is_done and self.phase is Phase.STARTED:
            self._take_plans()

    def _take_plans(self) -> None:
        for stage in self.stages:
            stage.phase = Phase.READY
        self._has_served = True
        level = logging.WARNING if self._edge_choice.has_fallen_back else logging.INFO
        for edge, path in self.edges.items():
            logger.log(level, "edge %s: %s (%s)", edge, path, self.edge_reasons[edge])
        if self.problem:
            logger.warning("epoch %d: all stages are ready again", self.epoch)
            self.problem = ""

    # ---------------------------------------------------------------- end of an epoch

    def end_epoch(self, error: EmberError, to_replace: Iterable[StageState] = ()) -> None:
        """Begin a new epoch because of ``error``; these stages get new processes.

        Raises:
            EmberError: ``error``, if it is one that a new epoch would not get over.
        """
        now_s = time.monotonic()
        self.budget.spend(error, now_s, has_served=self._has_served)
        self.epoch += 1
        self.problem, self.problem_since_s = str(error), now_s
        self._edge_choice = EdgeChoice(len(self.stages))
        self._deadline_s = now_s + self._config.coordinator.start_timeout_s
        for stage in self._with_neighbours(to_replace):
            if stage.phase is not Phase.ENDING:
                stage.process.kill()
                stage.phase = Phase.ENDING
        for stage in self.stages:
            stage.renewed_at_s = 0.0
            if stage.has_weights:
                stage.phase, stage.building = Phase.RENEWING, ""
        replaced = [stage.stage_index for stage in self.stages if stage.phase is Phase.ENDING]
        logger.warning(
            "epoch %d begins, with new processes for stages %s: %s", self.epoch, replaced, error
        )
        self._go_on_when_reaped()

    def _with_neighbours(self, stages: Iterable[StageState]) -> list[StageState]:
        """These, and under MPS all others on their cards, which may be damaged by their end."""
        found = list(stages)
        cards = {s.device for s in found if s.device_facts.get("is_mps") and s.device != "cpu"}
        return found + [s for s in self.stages if s.device in cards and s not in found]

    def _go_on_when_reaped(self) -> None:
        """Start what is to be replaced and tell the others, once no ended process is left."""
        ended = [stage for stage in self.stages if stage.phase is Phase.ENDING]
        if any(stage.process.exit_status() is None for stage in ended):
            return
        for stage in ended:
            stage.process.kill()  # what it may have started
            stage.process.close()
            self.stages[stage.stage_index] = self._start_process(stage.stage_index)
        epoch, now_s = self.epoch, time.monotonic()
        renew = protocol.encode(protocol.Renew(epoch))
        for stage in self.stages:
            if stage.phase in (Phase.RENEWING, Phase.LOADING) and not stage.renewed_at_s:
                stage.renewed_at_s = now_s
                if not self._send(stage, renew):
                    return  # which has begun another epoch

    # ---------------------------------------------------------------- watching

    def check(self) -> None:
        """Notice processes that ended, and a start that takes too long.

        Raises:
            EmberError: as ``end_epoch``; ``DeadlineExceededError``: ``coordinator.start_timeout_s``
                is over; names who is awaited.
        """
        now_s = time.monotonic()
        dead = [
            (stage, status)
            for stage in self.stages
            if stage.phase is not Phase.ENDING
            and (status := stage.process.exit_status()) is not None
        ]
        if dead:
            self.end_epoch(self._death_of(*dead[0]), [stage for stage, _ in dead])
        elif any(stage.phase is Phase.ENDING for stage in self.stages):
            self._go_on_when_reaped()
        if not self.is_ready and now_s > self._deadline_s:
            awaited = [s.stage_index for s in self.stages if s.phase is self.phase]
            raise DeadlineExceededError(
                f"stages {awaited} are still {self.phase.value} after "
                f"coordinator.start_timeout_s={self._config.coordinator.start_timeout_s:g}"
            )

    def watch(self, now_s: float) -> None:
        """Ask every stage for a sign of life, and notice who has given none for too long.

        Does nothing before ``next_watch_s``.

        Raises:
            EmberError: as ``end_epoch``.
        """
        if now_s < self._next_beat_s:
            return
        self._next_beat_s = now_s + self._settings.heartbeat_interval_s
        late = [(stage, why) for stage in self.stages if (why := self._lateness_of(stage, now_s))]
        if late:
            stage, why = late[0]
            error = StageDiedError(f"{stage} {why}", stage_index=stage.stage_index)
            self.end_epoch(error, [stage for stage, _ in late])
        self._num_beats += 1
        beat = protocol.encode(protocol.Heartbeat(self._num_beats))
        for stage in self.stages:
            if stage.identity is not None and stage.phase is not Phase.ENDING:
                self._beat(stage, beat)

    def _lateness_of(self, stage: StageState, now_s: float) -> str:
        """Why a stage counts as gone, in words; empty: it does not."""
        settings = self._settings
        if stage.phase is Phase.STARTING and now_s - stage.started_at_s > settings.hello_timeout_s:
            return (
                f"has not said hello within supervisor.hello_timeout_s={settings.hello_timeout_s:g}"
            )
        num_misses = stage.num_unanswered or 0
        if stage.phase is not Phase.ENDING and num_misses >= settings.heartbeat_max_misses:
            waited_s = num_misses * settings.heartbeat_interval_s
            return f"is silent: {num_misses} heartbeats in {waited_s:.2g} s were not answered"
        if stage.phase is Phase.RENEWING and stage.renewed_at_s:
            limit_s = settings.build_timeout_s if stage.building else self.renewal_limit_s
            if now_s - stage.renewed_at_s > limit_s:
                return f"is still at what it did {limit_s:.1f} s ago, when its epoch ended"
        return ""

    def _beat(self, stage: StageState, beat: bytes) -> None:
        is_connected = self._router.send(stage.heart, beat)
        if is_connected or stage.num_unanswered is not None:
            stage.num_unanswered = (stage.num_unanswered or 0) + 1
        if stage.num_sent != stage.num_sent_told and stage.identity is not None:
            stage.num_sent_told = stage.num_sent
            self._router.send(stage.identity, protocol.Tally(stage.num_sent))

    def _death_of(self, stage: StageState, status: int | None) -> EmberError:
        # Its last words may still be in the socket, and say more than an exit status.
        if status is not None and status >= 0:
            wait_readable([self._router], [], _LAST_WORDS_S)
        last_words = None
        for identity, message in self._router.receive_all():
            if identity == stage.identity and isinstance(message, protocol.StageFailed):
                last_words = failure_of(stage, message)
            else:
                self.unread.append((identity, message))
        if last_words is not None:
            return last_words
        if status is None:
            how = "cannot be reached"
        else:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with exit {status}"
        hint = " (out of memory?)" if status == -9 else ""
        return StageDiedError(
            f"{stage} {how}{hint}", stage_index=stage.stage_index, exit_status=status
        )

    # ---------------------------------------------------------------- end of the run

    def stop(self, reason: str) -> None:
        """Ask every stage to end, wait for the grace time, kill and reap what is left."""
        packed = protocol.encode(protocol.Shutdown(reason))
        for stage in self.stages:
            if stage.identity is None or not self._router.send(stage.identity, packed):
                stage.process.kill()  # it has not connected yet, or is gone: it will not hear
        grace_s = self._config.coordinator.shutdown_grace_s
        end_all([stage.process for stage in self.stages], grace_s=grace_s)
        self.stages = []


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
