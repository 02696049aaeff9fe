"""The edge between two stages: hidden states from sender to receiver.

``open_receiver`` makes the ring of an edge in the receiver's process; its ``handle`` travels
through the coordinator to the previous stage, which gives it to ``open_sender``. Then the edge
is probed (``probe``) before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from ember_pp.errors import HandoffError
from ember_pp.stage.handoff.base import Edge, Receiver, RingShape, Sender
from ember_pp.stage.handoff.host_shm import HostShmReceiver, HostShmSender
from ember_pp.stage.timing import StageClock

__all__ = ["Edge", "Receiver", "RingShape", "Sender", "open_receiver", "open_sender"]

_RECEIVERS = MappingProxyType({"host_shm": HostShmReceiver})
_SENDERS = MappingProxyType({"host_shm": HostShmSender})
_AUTO = "host_shm"


def open_receiver(
    path: str,
    edge: Edge,
    shape: RingShape,
    device: torch.device,
    clock: StageClock | None = None,
) -> Receiver:
    """Make the receiving end of ``edge``; ``path`` is the setting ``handoff``.

    ``clock`` counts its waits; None: nobody asks for them.

    Raises:
        HandoffError: the path is not known here, or its memory cannot be had.
    """
    return _RECEIVERS[_known(_AUTO if path == "auto" else path, edge)](edge, shape, device, clock)


def open_sender(
    handle: Mapping[str, Any],
    edge: Edge,
    shape: RingShape,
    device: torch.device,
    clock: StageClock | None = None,
) -> Sender:
    """Open the ring that ``handle`` describes, by the path that its receiver chose.

    Raises:
        HandoffError: the path is not known here, the two ends differ in shape or dtype, or the
            ring cannot be opened; names the edge.
    """
    path = _known(str(handle.get("path")), edge)
    return _SENDERS[path](edge, shape, device, handle, clock)


def _known(path: str, edge: Edge) -> str:
    if path not in _RECEIVERS:
        raise HandoffError(
            f"edge {edge}: hand-off path {path!r} is not known here; known: {', '.join(_RECEIVERS)}"
        )
    return path
