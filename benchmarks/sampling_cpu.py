"""CPU time of one sampling call, by kind of request: ``python benchmarks/sampling_cpu.py``.

Logits fall off like those of a language model: log-probability about -1.2 * log(rank), with
noise, ids shuffled. That is a broad nucleus: top_p 0.9 alone keeps thousands of tokens.
Times are CPU time of the process, which other load disturbs less than wall time.
Prints one JSON line with all conditions, and a table to stderr.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time

import torch

from ember_pp import protocol
from ember_pp.stage.sampler import Sampler

KINDS = {
    "greedy": {"temperature": 0},
    "top_k 20, top_p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "no truncation": {},
    "top_k 20, three penalties": {
        "top_k": 20,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
    },
    "top_k 20, logprobs 5": {"top_k": 20, "logprobs": 5},
}
NUM_PROMPT_TOKENS = 512


def make_logits(num_rows: int, vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    by_rank = -1.2 * torch.arange(1, vocab_size + 1).log() + 20
    noise = torch.randn(num_rows, vocab_size, generator=generator)
    rows = [torch.randperm(vocab_size, generator=generator) for _ in range(num_rows)]
    return by_rank[torch.stack(rows)] + 0.3 * noise


def measure(fields: dict, logits: torch.Tensor, repeats: int) -> list[float]:
    """Milliseconds of CPU time of each call, after two that warm up."""
    num_rows, vocab_size = logits.shape
    sampler = Sampler(vocab_size, num_rows, [0], "cpu")
    prompt_ids = protocol.pack_i32(range(NUM_PROMPT_TOKENS))
    for slot in range(num_rows):
        sampler.open(protocol.OpenSlot(slot, slot, fields, NUM_PROMPT_TOKENS, 0, prompt_ids, b""))
    times_ms = []
    for step in range(repeats + 2):
        start = time.process_time()
        drawn = sampler.sample(logits, range(num_rows), [NUM_PROMPT_TOKENS + step] * num_rows)
        drawn.read(), drawn.logprobs
        times_ms.append(1e3 * (time.process_time() - start))
    return times_ms[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 151_936])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    for vocab_size in arguments.vocab:
        logits = make_logits(arguments.rows, vocab_size)
        for kind, fields in KINDS.items():
            times_ms = measure(fields, logits, arguments.repeats)
            median, worst = statistics.median(times_ms), max(times_ms)
            results.append(
                {"vocab_size": vocab_size, "kind": kind, "median_ms": median, "worst_ms": worst}
            )
            line = f"[{arguments.rows}, {vocab_size}]  {kind:27} {median:9.2f} ms"
            print(f"{line}  (worst {worst:.2f})", file=sys.stderr)
    conditions = vars(arguments) | {
        "torch": torch.__version__,
        "cpu": platform.machine(),
        "load_1min": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "sampling_cpu", "conditions": conditions, "results": results}))


if __name__ == "__main__":
    main()
