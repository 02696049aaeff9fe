"""Time of one hand-off over ``host_shm`` between two processes on the CPU.

    python -m benchmarks.handoff_cpu [--repeats 300] [--output FILE]

Two processes send hidden states back and forth over two edges; a hop is half a round trip:
write into the slot, flag, wake-up of the other process, its read. ``in_place`` reads the slot
where it is, as a stage does; ``copied`` makes a copy of it first, the alternative. Prints a
table and writes one JSON file with all conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.conditions import conditions
from ember_pp.stage.handoff import Edge, Receiver, RingShape, Sender, make_receiver, make_sender

CPU = torch.device("cpu")
HIDDEN_SIZE = 1024  # of Qwen3-0.6B: a row is 2 KiB
TOKEN_COUNTS = (1, 8, 64, 512, 2048, 8192)  # 2 KiB to 16 MiB
NUM_SLOTS = 3
WARM_UP = 20
SHAPE = RingShape(
    num_slots=NUM_SLOTS, max_tokens=TOKEN_COUNTS[-1], hidden_size=HIDDEN_SIZE, dtype=torch.bfloat16
)
OUT, BACK = Edge(0, 1), Edge(1, 0)
MODES = ("in_place", "copied")


def read(receiver: Receiver, plan: int, num_tokens: int, mode: str) -> torch.Tensor:
    """Receive one plan as ``mode`` says; the caller releases it."""
    received = receiver.receive(plan, num_tokens)
    return received.clone() if mode == "copied" else received


def bounce(receiver: Receiver, sender: Sender, num_tokens: int, mode: str, count: int) -> list[int]:
    """Round trip times in ns, as the process that starts each one sees them."""
    hidden_states = torch.randn(num_tokens, HIDDEN_SIZE).to(torch.bfloat16)
    times = []
    for plan in range(count):
        started_ns = time.perf_counter_ns()
        sender.send(plan, hidden_states)
        read(receiver, plan, num_tokens, mode)
        receiver.release(plan)
        times.append(time.perf_counter_ns() - started_ns)
    return times


def echo(receiver: Receiver, sender: Sender, num_tokens: int, mode: str, count: int) -> None:
    """The other process: send back what comes."""
    for plan in range(count):
        sender.send(plan, read(receiver, plan, num_tokens, mode))
        receiver.release(plan)


def run_child(repeats: int) -> None:
    """Second process: handles come and go as lines of JSON."""
    receiver = make_receiver("host_shm", OUT, SHAPE, CPU)
    print(json.dumps(receiver.handle), flush=True)
    sender = make_sender("host_shm", BACK, SHAPE, CPU)
    sender.connect(json.loads(sys.stdin.readline()))
    for num_tokens in TOKEN_COUNTS:
        for mode in MODES:
            echo(receiver, sender, num_tokens, mode, repeats + WARM_UP)


def summarise(num_tokens: int, mode: str, times: list[int]) -> dict[str, object]:
    """Hop latency of one size, in microseconds."""
    hops_us = sorted(round_trip_ns / 2e3 for round_trip_ns in times[WARM_UP:])
    return {
        "num_bytes": num_tokens * HIDDEN_SIZE * 2,
        "mode": mode,
        "p50_us": round(hops_us[len(hops_us) // 2], 1),
        "p99_us": round(hops_us[len(hops_us) * 99 // 100], 1),
        "min_us": round(hops_us[0], 1),
    }


def all_conditions(repeats: int) -> dict[str, object]:
    """What a reader must know to compare the numbers."""
    return conditions() | {
        "load_average_1min": round(os.getloadavg()[0], 2),
        "nice": os.nice(0),
        "kernel": platform.release(),
        "torch_threads": 1,
        "warm_up": WARM_UP,
        "repeats": repeats,
        "hop": "half a round trip between two processes, bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--output", default="benchmarks/results/handoff_cpu.json")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.child:
        run_child(options.repeats)
        return
    command = [sys.executable, "-m", "benchmarks.handoff_cpu", "--child"]
    command += ["--repeats", str(options.repeats)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        sender = make_sender("host_shm", OUT, SHAPE, CPU)
        sender.connect(json.loads(child.stdout.readline()))
        receiver = make_receiver("host_shm", BACK, SHAPE, CPU)
        print(json.dumps(receiver.handle), file=child.stdin, flush=True)
        results = []
        for num_tokens in TOKEN_COUNTS:
            for mode in MODES:
                count = options.repeats + WARM_UP
                times = bounce(receiver, sender, num_tokens, mode, count)
                results.append(summarise(num_tokens, mode, times))
                print("{num_bytes:>10} B  {mode:<9} p50 {p50_us:>8} us".format(**results[-1]))
    report = {"conditions": all_conditions(options.repeats), "results": results}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
