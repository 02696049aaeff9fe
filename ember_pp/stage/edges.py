"""The edges of one stage in one epoch: hidden states or feedback in, hidden states or feedback out.

Stages form a circle: each receives from the one before it and sends to the one after it, the last
one its feedback to the first. ``Edges`` are made anew for every epoch and used once, in this order:

    Edges(...)       the receiving end is made; ``handle`` is for the stage before
    open_next(...)   the sending end is opened with the handle of the stage after
    probe(...)       once for each of the two edges
    close()          ends all waits for good

A pipeline of one stage has no edges: then both ends are None and nothing else does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Probe, ProbeReport
from ember_pp.stage.handoff import Edge, Receiver, RingShape, Sender, open_receiver, open_sender
from ember_pp.stage.handoff.probe import probe_receiver, probe_sender
from ember_pp.stage.timing import StageClock


class Edges:
    """Both ends that a stage has.

    Args:
        stage_index: of this stage.
        num_stages: of the pipeline.
        path: the setting ``handoff``.
        ring_shape: of edges that carry hidden states.
        feedback_shape: of the edge from the last stage to the first.
        device: of this stage.
        clock: counts the waits of both ends.

    Raises:
        HandoffError: the path is not known here, or its memory cannot be had.
    """

    def __init__(
        self,
        stage_index: int,
        num_stages: int,
        *,
        path: str,
        ring_shape: RingShape,
        feedback_shape: RingShape,
        device: torch.device,
        clock: StageClock,
    ) -> None:
        self._stage_index = stage_index
        self._num_stages = num_stages
        self._ring_shape, self._feedback_shape = ring_shape, feedback_shape
        self._device = device
        self._clock = clock
        self.receiver: Receiver | None = None
        """Of hidden states; on the first stage, of feedback."""
        self.sender: Sender | None = None
        """Of hidden states; on the last stage, of feedback. None before ``open_next``."""
        if num_stages > 1:
            edge = Edge((stage_index - 1) % num_stages, stage_index)
            self.receiver = open_receiver(path, edge, self._shape(edge), device, clock)

    def _shape(self, edge: Edge) -> RingShape:
        return self._feedback_shape if edge.receiver_index == 0 else self._ring_shape

    @property
    def handle(self) -> dict[str, Any]:
        """How the stage before opens the incoming ring; empty with a single stage."""
        return {} if self.receiver is None else self.receiver.handle

    def open_next(self, next_handle: Mapping[str, Any]) -> None:
        """Open the ring of the stage after this one, by its ``handle``.

        Raises:
            HandoffError: it cannot be opened; names the edge.
        """
        if self._num_stages == 1:
            return
        edge = Edge(self._stage_index, (self._stage_index + 1) % self._num_stages)
        shape = self._shape(edge)
        self.sender = open_sender(next_handle, edge, shape, self._device, self._clock)

    def probe(self, message: Probe) -> ProbeReport:
        """Do this stage's part of a probe.

        Raises:
            ProtocolError: the edge that it names does not end here.
        """
        if self.sender is not None and message.edge == str(self.sender.edge):
            path = self.sender.path
            result = probe_sender(self.sender, message.seed, self._device)
        elif self.receiver is not None and message.edge == str(self.receiver.edge):
            path = self.receiver.path
            result = probe_receiver(self.receiver, message.seed)
        else:
            raise ProtocolError(f"stage {self._stage_index} is no end of edge {message.edge}")
        return ProbeReport(
            epoch=message.epoch,
            stage_index=self._stage_index,
            edge=message.edge,
            path=path,
            is_ok=result.is_ok,
            text=result.text,
        )

    @property
    def waiting_for(self) -> str:
        """What is waited for now, in words; empty: nothing. Any thread."""
        ends = (self.receiver, self.sender)
        waits = [wait for end in ends if end is not None and (wait := end.wait) is not None]
        return str(waits[0]) if waits else ""

    def close(self) -> None:
        """End all waits, now, with ``HandoffError``. Any thread, any number of times."""
        for end in (self.receiver, self.sender):
            if end is not None:
                end.close()
