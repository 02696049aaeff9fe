"""The edge between two stages: hidden states from sender to receiver.

Each side makes its end of an edge (``make_receiver``, ``make_sender``); the ``handle`` of each
travels through the coordinator to the other, which ``connect``s to it. Then the edge is probed
(``probe``) before anything relies on it.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from ember_pp.errors import HandoffError
from ember_pp.stage.handoff.base import Edge, Receiver, RingShape, Sender, Wait
from ember_pp.stage.handoff.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from ember_pp.stage.handoff.host_shm import HostShmReceiver, HostShmSender
from ember_pp.stage.timing import StageClock

__all__ = [
    "Edge",
    "Receiver",
    "RingShape",
    "Sender",
    "Wait",
    "make_receiver",
    "make_sender",
    "paths_for",
]

_RECEIVERS = MappingProxyType({"cuda_ipc": CudaIpcReceiver, "host_shm": HostShmReceiver})
_SENDERS = MappingProxyType({"cuda_ipc": CudaIpcSender, "host_shm": HostShmSender})


def paths_for(setting: str, device: torch.device) -> list[str]:
    """Paths that a stage on ``device`` may try, the best first; ``setting`` is ``handoff``.

    A path that is asked for by name is the only one, whether it works or not.
    """
    if setting != "auto":
        return [setting]
    return ["cuda_ipc", "host_shm"] if device.type == "cuda" else ["host_shm"]


def make_receiver(
    path: str,
    edge: Edge,
    shape: RingShape,
    device: torch.device,
    clock: StageClock | None = None,
) -> Receiver:
    """Make the receiving end of ``edge``, with its ring.

    ``clock`` counts what the host waits; None: nobody asks for it.

    Raises:
        HandoffError: the path is not known here, does not exist on ``device``, or its memory
            cannot be had; names the edge.
    """
    return _RECEIVERS[_known(path, edge)](edge, shape, device, clock)


def make_sender(
    path: str,
    edge: Edge,
    shape: RingShape,
    device: torch.device,
    clock: StageClock | None = None,
) -> Sender:
    """Make the sending end of ``edge``. Arguments and errors as of ``make_receiver``."""
    return _SENDERS[_known(path, edge)](edge, shape, device, clock)


def _known(path: str, edge: Edge) -> str:
    if path not in _RECEIVERS:
        raise HandoffError(
            f"edge {edge}: hand-off path {path!r} is not known here; known: {', '.join(_RECEIVERS)}"
        )
    return path
