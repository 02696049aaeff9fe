"""Hops over NCCL, timed as those of the pipeline's own paths; for ``benchmarks/multi_gpu.py``.

Two processes send and receive with torch.distributed, as a pipeline over NCCL would. What to
measure comes as JSON on stdin, what was measured goes as JSON to stdout; see
``ember_pp/stage/handoff_rates.py``, whose loop and clock these are.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ember_pp.errors import HandoffError
from ember_pp.stage.handoff_rates import NUM_SLOTS, ROW_BYTES, ROW_ELEMENTS, Peer, main

_TIMEOUT = datetime.timedelta(seconds=60)


class NcclEnds:
    """Ends of both edges, in one communicator of two processes.

    Raises:
        HandoffError: NCCL cannot be had between these devices.
    """

    is_enqueued = True

    def __init__(self, wanted: Mapping[str, Any], peer: Peer, device: torch.device) -> None:
        self._other = int(not peer.is_echo)
        try:
            _initialise(peer, device)
        except (RuntimeError, ValueError) as error:
            raise HandoffError(f"NCCL: {str(error).splitlines()[0]}") from None
        num_rows = max(wanted["sizes"]) // ROW_BYTES
        self._slots = torch.empty(
            NUM_SLOTS, num_rows, ROW_ELEMENTS, dtype=torch.bfloat16, device=device
        )

    def send(self, number: int, message: Tensor) -> None:
        dist.send(message, self._other)

    def receive(self, number: int, num_rows: int) -> Tensor:
        received = self._slots[number % NUM_SLOTS, :num_rows]
        dist.recv(received, self._other)
        return received

    def release(self, number: int) -> None:
        """Nothing: the next message of this slot is received in stream order."""

    def close(self) -> None:
        torch.cuda.synchronize()
        dist.destroy_process_group()


def _initialise(peer: Peer, device: torch.device) -> None:
    if peer.is_echo:
        address = peer.hear()["address"]
    else:
        address = f"file://{Path(tempfile.mkdtemp()) / 'rendezvous'}"
        peer.say({"address": address})
    dist.init_process_group(
        "nccl",
        init_method=address,
        rank=int(peer.is_echo),
        world_size=2,
        timeout=_TIMEOUT,
        device_id=device,
    )


if __name__ == "__main__":
    main("benchmarks.multi_gpu_nccl", NcclEnds)
