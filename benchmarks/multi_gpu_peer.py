"""Copies between GPUs of one process: what no hand-off is faster than.

    python -m benchmarks.multi_gpu_peer cuda:0,cuda:1

For every pair, both directions: whether one GPU may address the other's memory, and what a copy
takes by size, alone and with one the other way at the same time. Prints JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from typing import Any

import torch

SIZES = tuple(2**power for power in (13, 16, 20, 24, 26, 28))
REPEATS = 20
_BATCH = 8
"""Copies between two looks at the clock."""


def main() -> None:
    """Measure the devices that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("devices", help="with commas between them")
    names = list(dict.fromkeys(parser.parse_args().devices.split(",")))
    pairs = itertools.permutations([torch.device(name) for name in names], 2)
    print(json.dumps({"pairs": [measure(*pair) for pair in pairs]}))


def measure(source: torch.device, target: torch.device) -> dict[str, Any]:
    """Copies from ``source`` to ``target``."""
    copies = []
    for num_bytes in SIZES:
        alone_us = _time([(source, target)], num_bytes)
        both_us = _time([(source, target), (target, source)], num_bytes)
        copies.append(
            {
                "num_bytes": num_bytes,
                "us": round(alone_us, 2),
                "gb_per_s": round(num_bytes / alone_us / 1e3, 2),
                "gb_per_s_with_one_back": round(num_bytes / both_us / 1e3, 2),
            }
        )
    return {
        "source": str(source),
        "target": str(target),
        "has_peer_access": torch.cuda.can_device_access_peer(target, source),
        "copies": copies,
    }


def _time(ways: list[tuple[torch.device, torch.device]], num_bytes: int) -> float:
    """Median us of a copy, on the first way, while all ways are copying; bytes are compared."""
    tensors = [
        (
            torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=source),
            torch.zeros(num_bytes, dtype=torch.uint8, device=target),
        )
        for source, target in ways
    ]
    streams: list[Any] = [torch.cuda.Stream(source) for source, _ in ways]  # type: ignore[no-untyped-call]
    spans_us: list[float] = []
    for _ in range(REPEATS):
        for device in ways[0]:
            torch.cuda.synchronize(device)
        marks: list[Any] = []
        for stream, (source, target) in zip(streams, tensors, strict=True):
            with torch.cuda.device(source.device), torch.cuda.stream(stream):
                marks.append(
                    [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
                )
                marks[-1][0].record(stream)
                for _ in range(_BATCH):
                    target.copy_(source, non_blocking=True)
                marks[-1][1].record(stream)
        for device in ways[0]:
            torch.cuda.synchronize(device)
        spans_us.append(marks[0][0].elapsed_time(marks[0][1]) * 1e3 / _BATCH)
    for source, target in tensors:
        if not torch.equal(source.cpu(), target.cpu()):
            raise SystemExit(f"a copy of {num_bytes} bytes from {source.device} came out different")
    return statistics.median(spans_us)


if __name__ == "__main__":
    main()
