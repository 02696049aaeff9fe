"""CUDA graphs of a stage's steps: captured when a size first comes up, replayed ever after.

A graph is the launches of one computation, with their addresses: replaying it costs the host as
little as one launch does. What is captured must read its inputs at fixed addresses and never
wait for the device.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


class Graphs:
    """The graphs of one device, all replayed on one stream.

    They share one pool of memory for what is between their inputs and their output.

    Args:
        device: of the stage; the current one, with a stream of the stage's own as the current.
        is_on: False computes everything anew, without graphs: on a CPU, or to see each kernel.
    """

    def __init__(self, device: torch.device, *, is_on: bool) -> None:
        self._is_on = is_on and device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if self._is_on else None
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.is_capturing = False
        """True while a graph is made, which takes many times what running it does. Any thread."""

    @property
    def is_on(self) -> bool:
        """Whether anything is captured."""
        return self._is_on

    def __len__(self) -> int:
        """Graphs captured so far."""
        return len(self._captured)

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What ``compute`` returns, by the graph of ``key``; captured if there is none.

        The tensor returned is the same each time, and its memory is held for good: it should be
        small, or a buffer of the caller's. The first time ``compute`` runs once more, as it is, so
        that kernels are built and libraries choose their algorithms: it must give the same when it
        runs again on the same inputs.
        """
        if not self._is_on:
            return compute()
        captured = self._captured.get(key)
        if captured is None:
            self.is_capturing = True
            try:
                captured = self._captured[key] = self._capture(compute)
            finally:
                self.is_capturing = False
        graph, output = captured
        graph.replay()
        return output

    def _capture(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        compute()
        graph = torch.cuda.CUDAGraph()
        # Other threads may ask the driver for this and that meanwhile.
        gc.disable()  # a pinned tensor that went meanwhile would leave its event in the graph
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            output = compute()
        finally:
            graph.capture_end()
            gc.enable()
        return graph, output
