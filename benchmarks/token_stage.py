"""A stage that computes nothing: ``python -m benchmarks.token_stage``, for ``token_cpu``.

It speaks the protocol of a stage and takes a stated time per plan. The last one draws the ids
of a text, at every sequence from another place, so that what the coordinator does with them is
what it does with a model's answers. Not a line of it counts in what is measured.
"""

from __future__ import annotations

import argparse
import array
import os
import time

from ember_pp import protocol
from ember_pp.sockets import DealerSocket

NUM_BLOCKS = 400_000
STATS_INTERVAL_NS = 250_000_000
STRIDE = 7919  # between the places in the text at which two sequences begin


class Drawer:
    """The tokens of each plan: knows rosters and chunks, as far as they decide who draws."""

    def __init__(self, text_ids: array.array[int]) -> None:
        self._ids = text_ids
        self._rosters: dict[int, list[int]] = {}
        self._steps: dict[int, int] = {}

    def draw(self, plan: protocol.Execute) -> array.array[int]:
        """[N] ids: roster rows, then the chunks that sample."""
        roster = self._rosters.setdefault(plan.microbatch, [])
        if plan.leave:
            gone = set(protocol.unpack_u32(plan.leave))
            roster[:] = [slot for slot in roster if slot not in gone]
        roster += protocol.unpack_u32(plan.join)
        step = self._steps[plan.microbatch] = self._steps.get(plan.microbatch, 0) + 1
        chunks = protocol.unpack_u32(plan.chunks)
        slots = roster + [chunks[i] for i in range(0, len(chunks), 4) if chunks[i + 3]]
        ids, length = self._ids, len(self._ids)
        return array.array("i", [ids[(slot * STRIDE + step) % length] for slot in slots])


class TokenStage:
    """One stage process, from hello to shutdown."""

    def __init__(self, socket: DealerSocket, stage_index: int, stage_time_us: int) -> None:
        self._socket = socket
        self._stage_index = stage_index
        self._time_ns = stage_time_us * 1000
        self._done_ns = 0
        self._told_ns = 0

    def run(self, token: str, text_ids: array.array[int]) -> None:
        """Return when told to end, or when nothing was heard for a minute."""
        index, drawer, is_last = self._stage_index, Drawer(text_ids), False
        paths: dict[str, dict[str, str]] = {}
        self._socket.send(protocol.StageHello(index, token, os.getpid(), {}))
        while (message := self._socket.receive(60.0)) is not None:
            match message:
                case protocol.StageConfig():
                    is_last = index == message.num_stages - 1
                    paths = paths_of(index, message.num_stages)
                    self._socket.send(protocol.StageReady(0, index, NUM_BLOCKS, {}, 0, 1))
                case protocol.Start():
                    self._socket.send(protocol.StageStarted(0, index, paths))
                case protocol.Probe():
                    report = protocol.ProbeReport(0, index, message.edge, message.path, True, "")
                    self._socket.send(report)
                case protocol.Execute():
                    if is_last:
                        token_ids = drawer.draw(message)
                        self._take_time()
                        packed = protocol.pack_i32(token_ids)
                        self._socket.send(protocol.Sampled(0, message.plan, packed, []))
                    self._report(message.plan)
                case protocol.Shutdown():
                    return

    def _take_time(self) -> None:
        self._done_ns = max(self._done_ns, time.monotonic_ns() - self._time_ns) + self._time_ns
        time.sleep(max(0, self._done_ns - time.monotonic_ns()) / 1e9)

    def _report(self, plan: int) -> None:
        now_ns = time.monotonic_ns()
        if now_ns - self._told_ns > STATS_INTERVAL_NS:
            self._told_ns = now_ns
            stats = protocol.StageStats(0, self._stage_index, plan, now_ns, 0, 0, 0, 0, "", 0)
            self._socket.send(stats)


def paths_of(stage_index: int, num_stages: int) -> dict[str, dict[str, str]]:
    """Edges that carry nothing."""
    if num_stages == 1:
        return {}
    before, after = (stage_index - 1) % num_stages, (stage_index + 1) % num_stages
    return {f"{before}->{stage_index}": {"none": ""}, f"{stage_index}->{after}": {"none": ""}}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--stage-index", type=int, required=True)
    parser.add_argument("--stage-time-us", type=int, required=True)
    parser.add_argument("--ids", required=True, help="file of the text's ids, i32")
    options = parser.parse_args()
    with open(options.ids, "rb") as file:
        text_ids = protocol.unpack_i32(file.read())
    identity = f"stage-{options.stage_index}".encode()
    socket = DealerSocket(options.address, identity=identity)
    stage = TokenStage(socket, options.stage_index, options.stage_time_us)
    stage.run(os.environ["EMBER_STAGE_TOKEN"], text_ids)
    socket.close()


if __name__ == "__main__":
    main()
