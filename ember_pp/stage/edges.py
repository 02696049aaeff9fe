"""The edges of one stage in one epoch: hidden states or feedback in, hidden states or feedback out.

Stages form a circle: each receives from the one before it and sends to the one after it, the last
one its feedback to the first. ``Edges`` are made anew for every epoch and used once, in this order:

    Edges(...)       both ends are made, on every path that may be used; ``handle`` is for the
                     neighbours
    open(...)        they are connected with the handles of the neighbours; ``paths`` says which
    probe(...)       for each of the two edges until a path passes: ``receiver`` and ``sender`` are
                     the ends of the path that was probed last
    close()          lets all waits end, for good
    disconnect()     lets go of the neighbours' memory
    free()           gives back the memory of its own, once the neighbours have disconnected: when
                     the handles of their next epoch are there, they have

A pipeline of one stage has no edges: then nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from ember_pp.errors import HandoffError, ProtocolError
from ember_pp.protocol import Probe, ProbeReport
from ember_pp.stage.handoff import (
    Edge,
    Receiver,
    RingShape,
    Sender,
    Wait,
    make_receiver,
    make_sender,
    paths_for,
)
from ember_pp.stage.handoff.probe import probe_receiver, probe_sender
from ember_pp.stage.timing import StageClock

_End = TypeVar("_End", bound=Receiver | Sender)


class Edges:
    """Both ends that a stage has.

    Args:
        stage_index: of this stage.
        num_stages: of the pipeline.
        setting: ``handoff``.
        ring_shape: of edges that carry hidden states.
        feedback_shape: of the edge from the last stage to the first.
        device: of this stage.
        clock: counts the waits of the host at both ends.
    """

    def __init__(
        self,
        stage_index: int,
        num_stages: int,
        *,
        setting: str,
        ring_shape: RingShape,
        feedback_shape: RingShape,
        device: torch.device,
        clock: StageClock,
    ) -> None:
        self._stage_index = stage_index
        self._num_stages = num_stages
        self._device = device
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, Sender] = {}
        self.paths: dict[str, dict[str, str]] = {}
        """For each edge, path -> why it cannot be used, the best path first; empty: it can."""
        self.receiver: Receiver | None = None
        """Of hidden states; on the first stage, of feedback. None before a probe."""
        self.sender: Sender | None = None
        """Of hidden states; on the last stage, of feedback. None before a probe."""
        if num_stages == 1:
            return
        self._edge_in = Edge((stage_index - 1) % num_stages, stage_index)
        self._edge_out = Edge(stage_index, (stage_index + 1) % num_stages)
        for path in paths_for(setting, device):
            for edge, make in ((self._edge_in, make_receiver), (self._edge_out, make_sender)):
                shape = feedback_shape if edge.receiver_index == 0 else ring_shape
                reasons = self.paths.setdefault(str(edge), {})
                try:
                    end = make(path, edge, shape, device, clock)
                except HandoffError as error:
                    reasons[path] = str(error)
                    continue
                reasons[path] = ""
                if isinstance(end, Receiver):
                    self._receivers[path] = end
                else:
                    self._senders[path] = end

    @property
    def handle(self) -> dict[str, Any]:
        """What the neighbours need of this stage; empty with a single stage."""
        if self._num_stages == 1:
            return {}
        return {
            "receiver": {path: end.handle for path, end in self._receivers.items()},
            "sender": {path: end.handle for path, end in self._senders.items()},
        }

    def open(self, next_handle: Mapping[str, Any], previous_handle: Mapping[str, Any]) -> None:
        """Connect both ends with those of the neighbours, by their ``handle``.

        What cannot be connected is a reason in ``paths``.
        """
        if self._num_stages == 1:
            return
        self._connect(self._edge_in, self._receivers, previous_handle.get("sender", {}))
        self._connect(self._edge_out, self._senders, next_handle.get("receiver", {}))

    def _connect(
        self, edge: Edge, ends: Mapping[str, Receiver | Sender], handles: Mapping[str, Any]
    ) -> None:
        other = sum((edge.sender_index, edge.receiver_index)) - self._stage_index
        reasons = self.paths[str(edge)]
        for path, end in ends.items():
            if path not in handles:
                reasons[path] = f"edge {edge}: stage {other} does not have it"
                continue
            try:
                end.connect(handles[path])
            except HandoffError as error:
                reasons[path] = str(error)

    def probe(self, message: Probe) -> ProbeReport:
        """Do this stage's part of a probe; from then on its end is that of the path probed.

        Raises:
            ProtocolError: the edge that it names does not end here, or has no such path.
        """
        edge, path = message.edge, message.path
        if edge not in self.paths:
            raise ProtocolError(f"stage {self._stage_index} is no end of edge {edge}")
        if self.paths[edge].get(path) != "":
            raise ProtocolError(f"edge {edge}: stage {self._stage_index} cannot use {path}")
        if edge == str(self._edge_out):
            self.sender = _only(self._senders, path)
            result = probe_sender(self.sender, message.seed, self._device)
            end: Receiver | Sender = self.sender
        else:
            self.receiver = _only(self._receivers, path)
            result = probe_receiver(self.receiver, message.seed)
            end = self.receiver
        if not result.is_ok:
            end.close()  # or what is enqueued would wait for good
        return ProbeReport(
            epoch=message.epoch,
            stage_index=self._stage_index,
            edge=edge,
            path=path,
            is_ok=result.is_ok,
            text=result.text,
        )

    @property
    def waiting_for(self) -> str:
        """What the host waits for now, in words; empty: nothing. Any thread."""
        ends = (self.receiver, self.sender)
        waits = [wait for end in ends if end is not None and (wait := end.wait) is not None]
        return str(waits[0]) if waits else ""

    def describe(self, plan: int, since_ns: int, *, is_for_input: bool) -> str:
        """A wait of the device for the message of ``plan``, or for its slot, in words."""
        end = self.receiver if is_for_input else self.sender
        if end is None:
            return ""
        return str(Wait(end.edge, plan, plan % end.shape.num_slots, is_for_input, since_ns))

    def check(self) -> None:
        """See that what came was right, as far as the device knows by now.

        Raises:
            ProtocolError: it was not; names edge, plan and slot.
        """
        if self.receiver is not None:
            self.receiver.check()

    def close(self) -> None:
        """End all waits, now. Any thread, any number of times."""
        for end in self._ends:
            end.close()

    def disconnect(self) -> None:
        """Let go of the neighbours' memory, once the device is through with it; closes first."""
        for end in self._ends:
            end.disconnect()

    def free(self) -> None:
        """Give back the memory of this stage's ends: the neighbours have disconnected."""
        for end in self._ends:
            end.free()

    @property
    def _ends(self) -> list[Receiver | Sender]:
        return [*self._receivers.values(), *self._senders.values()]


def _only(ends: dict[str, _End], path: str) -> _End:
    """The end of ``path``; the ones before it have failed, and let go of the other end."""
    for failed in ends:
        if failed == path:
            break
        ends[failed].disconnect()
    return ends[path]
