"""Which path each edge between stages uses: the first that both ends have and that passes a probe.

Pure: the supervisor tells what stages say, and sends the probes that this asks for. It sends each
to both ends, in the order in which they are asked for, and a stage does them one by one in that
order: so no two stages can wait for each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from ember_pp.errors import HandoffError
from ember_pp.protocol import ProbeReport


@dataclasses.dataclass(frozen=True, slots=True)
class EdgeProbe:
    """One path of one edge, to be probed by both ends."""

    sender_index: int
    receiver_index: int
    path: str

    @property
    def edge(self) -> str:
        """Its name, e.g. ``0->1``."""
        return f"{self.sender_index}->{self.receiver_index}"


class EdgeChoice:
    """The edges of a pipeline in one epoch.

    Args:
        num_stages: each sends to the next, the last one to the first. A single one has no edges.
    """

    def __init__(self, num_stages: int) -> None:
        self._num_stages = num_stages
        self._edges = [(i, (i + 1) % num_stages) for i in range(num_stages) if num_stages > 1]
        self._paths: dict[int, Mapping[str, Mapping[str, str]]] = {}
        self._awaited: dict[tuple[str, str], set[int]] = {}
        """For each edge and path that is being probed, stages that have not reported yet."""
        self._failures: dict[str, dict[str, str]] = {f"{a}->{b}": {} for a, b in self._edges}
        """For each edge, path -> why not."""
        self.chosen: dict[str, str] = {}
        """Path of each edge that passed its probe, e.g. ``{"0->1": "cuda_ipc"}``."""

    @property
    def is_done(self) -> bool:
        """Whether every edge has a path."""
        return len(self.chosen) == len(self._edges)

    @property
    def reasons(self) -> dict[str, str]:
        """For each edge with a path, why it has that one."""
        return {edge: self._explain(edge, "probe passed") for edge in self.chosen}

    @property
    def has_fallen_back(self) -> bool:
        """Whether an edge has another path than its best."""
        return any(self._failures[edge] for edge in self.chosen)

    def _explain(self, edge: str, *last: str) -> str:
        return "; ".join([*(f"{p}: {why}" for p, why in self._failures[edge].items()), *last])

    def add(self, stage_index: int, paths: Mapping[str, Mapping[str, str]]) -> list[EdgeProbe]:
        """Take ``StageStarted.paths`` of a stage; once all are there, the first probes.

        Raises:
            HandoffError: an edge has no path; names it, and why.
        """
        self._paths[stage_index] = paths
        if len(self._paths) < self._num_stages:
            return []
        return [self._next(sender, receiver) for sender, receiver in self._edges]

    def report(self, report: ProbeReport) -> list[EdgeProbe]:
        """Take what one end saw of a probe; what to probe next in place of it, if it failed.

        Raises:
            HandoffError: it failed, and the edge has no other path; names it, and why.
        """
        awaited = self._awaited.get((report.edge, report.path), set())
        if report.stage_index not in awaited:
            return []
        awaited.discard(report.stage_index)
        failures = self._failures[report.edge]
        if not report.is_ok:
            failures.setdefault(report.path, f"failed its probe: {report.text}")
        if awaited:
            return []
        if report.path in failures:
            sender, receiver = (int(index) for index in report.edge.split("->"))
            return [self._next(sender, receiver)]
        self.chosen[report.edge] = report.path
        return []

    def _next(self, sender: int, receiver: int) -> EdgeProbe:
        edge = f"{sender}->{receiver}"
        for path, reason in self._candidates(edge, sender, receiver):
            if path in self._failures[edge]:
                continue
            if not reason:
                self._awaited[edge, path] = {sender, receiver}
                return EdgeProbe(sender, receiver, path)
            self._failures[edge][path] = reason
        raise HandoffError(f"edge {edge} has no path that works: {self._explain(edge)}")

    def _candidates(self, edge: str, sender: int, receiver: int) -> Iterator[tuple[str, str]]:
        """Paths of either end, the best first, with why not; empty: both have it."""
        ends = [self._paths[index].get(edge, {}) for index in (receiver, sender)]
        longest_first = sorted(ends, key=len, reverse=True)
        for path in dict.fromkeys(path for paths in longest_first for path in paths):
            missing = [
                f"stage {index} does not have it"
                for index, paths in zip((receiver, sender), ends, strict=True)
                if path not in paths
            ]
            given = [paths[path] for paths in ends if paths.get(path)]
            yield path, (given or missing or [""])[0]
