"""What the coordinator knows of one stage process, from its start to its end."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from ember_pp import protocol
from ember_pp.coordinator.launcher import StageProcess
from ember_pp.errors import ProtocolError
from ember_pp.sockets import heart_of


class Phase(enum.Enum):
    """How far a stage is in this epoch; the pipeline is as far as its slowest stage."""

    ENDING = "ending"
    """Killed; the kernel has not given it back yet."""
    STARTING = "starting"
    LOADING = "loading"
    RENEWING = "renewing"
    """It has its weights and was told to forget the rest, or will be."""
    LOADED = "loaded"
    STARTED = "started"
    READY = "ready"


PHASES = tuple(Phase)
_BEFORE_WEIGHTS = (Phase.STARTING, Phase.LOADING)


@dataclasses.dataclass(slots=True, eq=False)
class StageState:
    """One stage process. A new process of the same stage has a new one of these."""

    stage_index: int
    start_layer: int
    end_layer: int
    device: str
    token: str
    process: StageProcess
    started_at_s: float
    phase: Phase = Phase.STARTING
    identity: bytes | None = None
    """Of its socket; None until it has said hello."""
    device_facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    num_done: int = 0
    num_total: int = 0
    building: str = ""
    """What it announced that it is at: ``compiling``, ``capturing``; empty: nothing."""
    building_since_s: float = 0.0
    renewed_at_s: float = 0.0
    """When it was told of the epoch that it is to answer for."""
    ready: protocol.StageReady | None = None
    stats: protocol.StageStats | None = None
    num_sent: int = 0
    num_received: int = 0
    num_sent_told: int = 0
    is_count_doubtful: bool = False
    """A message to or from it is known to be wrong: a count that differs is no news."""
    num_unanswered: int | None = None
    """Heartbeats since the last answer; None: its heart has not connected yet."""

    @property
    def heart(self) -> bytes:
        """Identity of its heart's socket."""
        return heart_of(self.identity or b"")

    @property
    def has_weights(self) -> bool:
        """True if there is something to keep over an epoch."""
        return self.phase not in (*_BEFORE_WEIGHTS, Phase.ENDING)

    def last_finished_plan(self, epoch: int) -> int:
        """As far as it has told in this epoch; -1 for none."""
        return self.stats.plan if self.stats is not None and self.stats.epoch == epoch else -1

    def waiting_for(self, epoch: int) -> str:
        """What it waits for in this epoch, in words, as it told last; empty: nothing."""
        is_of_now = self.stats is not None and self.stats.epoch == epoch
        return self.stats.waiting_for if is_of_now and self.stats is not None else ""

    def check_tally(self, tally: protocol.Tally) -> None:
        """Compare with what came from it; the two agree from now on.

        Raises:
            ProtocolError: a message was lost, or came twice.
        """
        num_received, self.num_received = self.num_received, tally.num_messages
        is_doubtful, self.is_count_doubtful = self.is_count_doubtful, False
        if num_received != tally.num_messages and not is_doubtful:
            raise ProtocolError(
                f"{num_received} messages came from stage {self.stage_index}, which has sent "
                f"{tally.num_messages}"
            )

    def __str__(self) -> str:
        return (
            f"stage {self.stage_index} (pid {self.process.pid}, layers {self.start_layer} to "
            f"{self.end_layer - 1})"
        )
