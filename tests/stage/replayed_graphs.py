"""CUDA graphs as far as a CPU can tell: what was computed first under a key is computed again."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor


class ReplayedGraphs:
    """Stands in for ``graphs.Graphs``: a key that stands for two computations gives wrong numbers,
    and so does a result that is read after the next replay has overwritten it."""

    is_on = True

    def __init__(self) -> None:
        self.captured: dict[Hashable, tuple[Callable[[], Tensor], Tensor]] = {}

    def run(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What the first ``compute`` of ``key`` gives now, in the memory of its first result."""
        if key not in self.captured:
            self.captured[key] = compute, compute()
        first_compute, output = self.captured[key]
        found = first_compute()
        if found.data_ptr() != output.data_ptr():
            output.copy_(found)
        return output
