"""Steps of one stage that has the whole model: ``python -m benchmarks.steps``.

Real plans go through the stage's runner, without coordinator or sockets: random weights, one GPU.
For each kind of step:

    host_us     what the host needs to enqueue a plan while the device is idle
    step_us     one plan after the other, as the device gets through them
    floor_us    weights once, and keys and values of all contexts, over the read bandwidth that
                this run measures; with chunks of prompts, two operations per parameter and token
                over the measured matrix rate, if that is longer

"ratio" is floor over step. Steps are not waited for in between, so that a host that is slower than
the device shows in ``step_us``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.conditions import conditions, gpu_conditions
from benchmarks.kernels import read_bandwidth, time_launches
from ember_pp import partition
from ember_pp.kernels import make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32
from ember_pp.sampling_params import SamplingParams
from ember_pp.stage.captured import CapturedSteps, StepLimits
from ember_pp.stage.captured_runner import CapturedRunner
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.model import StageModel
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.slots import Slots
from ember_pp.stage.weights import load_stage

RESULT = Path(__file__).with_name("results") / "steps.json"
CUDA = torch.device("cuda", 0)
BLOCK_SIZE = 16
STEPS = 30
"""Of one measurement: contexts grow by as much."""
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of step."""

    model: str
    rows: int
    context: int
    chunk: int = 0
    """Prompt tokens beside the decodes, of a fresh prompt."""
    sampling: str = "greedy"


SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {"temperature": 0.8, "top_p": 0.9},
}
CASES = (
    *(Case("qwen3-0.6b", rows, 256) for rows in (1, 16)),
    Case("qwen3-0.6b", 64, 640),
    Case("qwen3-0.6b", 64, 640, sampling="top_p"),
    Case("qwen3-0.6b", 256, 640),
    Case("qwen3-0.6b", 64, 640, chunk=64),
    Case("qwen3-0.6b", 64, 640, chunk=448),
    Case("qwen3-0.6b", 64, 640, chunk=1984),
    Case("qwen3-8b", 1, 256),
    Case("qwen3-8b", 16, 640),
    Case("qwen3-8b", 64, 640),
    Case("qwen3-8b", 256, 640),
    Case("qwen3-8b", 0, 0, chunk=2048),
)


class Stage:
    """A runner, and plans that keep its slots busy."""

    def __init__(self, model: str, max_slots: int, *, uses_graphs: bool) -> None:
        folder = Path(__file__).parents[1] / "conf" / "model"
        architecture = yaml.safe_load((folder / f"{model}.yaml").read_text())["architecture"]
        self.cfg = ModelConfig.from_hf(architecture)
        layers, ends = (0, self.cfg.num_layers), {"is_first": True, "is_last": True}
        weights = load_stage(None, self.cfg, *layers, **ends, dtype=torch.bfloat16, device=CUDA)
        ops = make_ops("cuda", CUDA)
        model_len = 4096
        self.model = StageModel(
            self.cfg, weights, *layers, **ends, ops=ops, max_model_len=model_len
        )
        self.weight_bytes = weights.num_bytes
        num_blocks = max_slots * 48 + 256
        cache = KVCache.allocate(
            self.cfg, self.cfg.num_layers, num_blocks, BLOCK_SIZE, torch.bfloat16, CUDA
        )
        cache.storage.normal_(std=0.5) if cache.num_bytes < 2**33 else cache.storage.zero_()
        sampler = Sampler(self.cfg.vocab_size, max_slots + 1, (), CUDA, ops)
        last_tokens = LastTokens(max_slots + 1, CUDA, max_in_flight=2)
        self.steps = CapturedSteps(
            self.model,
            cache,
            ops,
            StepLimits(
                max_slots=max_slots + 1,
                max_tokens=4096,
                max_blocks_per_sequence=model_len // BLOCK_SIZE,
                max_pending=STEPS + 4,
            ),
            sampler=sampler,
            last_tokens=last_tokens.tokens,
            uses_graphs=uses_graphs,
        )
        self.runner = CapturedRunner(
            0,
            self.steps,
            Slots(max_slots + 1, model_len // BLOCK_SIZE, BLOCK_SIZE, vocab_size=10**6),
            sampler=sampler,
            last_tokens=last_tokens,
        )
        self.plan = 0
        self.roster: list[int] = []
        self.leaving: list[int] = []
        self.joining: list[int] = []

    def begin(self, case: Case) -> None:
        """Open the slots of ``case``, with their contexts as if they had been computed."""
        opened, blocks, chunks = [], [], []
        params = SamplingParams(**SAMPLING[case.sampling]).to_mapping()
        width = -(-(case.context + 2 * STEPS) // BLOCK_SIZE)
        for slot in range(case.rows):
            opened.append(OpenSlot(slot, slot, params, case.context, 0, b"", b""))
            for column in range(width):
                blocks += [slot, slot * 47 + column]
            chunks += [slot, case.context - 1, 1, 1]
        if case.rows:
            self.execute(
                leave=pack_u32(self.roster),
                open=opened,
                blocks=pack_u32(blocks),
                chunks=pack_u32(chunks),
                chunk_ids=pack_i32([1] * case.rows),
            ).finish()
            self.roster = []
        self.leaving, self.joining = self.roster, list(range(case.rows))
        self.roster = list(range(case.rows))

    def step(self, case: Case) -> Any:
        """One plan: every slot decodes, and a chunk of a prompt that is always the same."""
        fields: dict[str, Any] = {
            "leave": pack_u32(self.leaving),
            "join": pack_u32(self.joining),
        }
        self.leaving, self.joining = [], []
        if case.chunk:
            slot = case.rows
            params = SamplingParams(**SAMPLING[case.sampling]).to_mapping()
            count = -(-case.chunk // BLOCK_SIZE)
            first = case.rows * 47
            fields |= {
                "open": [OpenSlot(slot, slot, params, case.chunk, 0, b"", b"")],
                "blocks": pack_u32([n for i in range(count) for n in (slot, first + i)]),
                "chunks": pack_u32([slot, 0, case.chunk, 1]),
                "chunk_ids": pack_i32([7] * case.chunk),
            }
        return self.execute(**fields)

    def execute(self, **fields: Any) -> Any:
        """Enqueue a plan of micro-batch 0."""
        nothing: dict[str, Any] = dict.fromkeys(
            ("leave", "blocks", "join", "chunks", "chunk_ids"), b""
        )
        execute = Execute(
            epoch=0,
            plan=self.plan,
            microbatch=0,
            feedback=self.plan - 1,
            after_idle=False,
            tap=None,
            **({"open": []} | nothing | fields),
        )
        self.plan += 1
        return self.runner.start(execute)


def measure(stage: Stage, case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    """The row of one case."""
    host_us, step_us = [], []
    for _ in range(REPEATS):
        stage.begin(case)
        for _ in range(4):
            stage.step(case).finish()
        for _ in range(10):
            torch.cuda.synchronize()
            started = time.perf_counter()
            stage.step(case)
            host_us.append((time.perf_counter() - started) * 1e6)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            last = stage.step(case)
        last.finish()
        step_us.append((time.perf_counter() - started) / STEPS * 1e6)
    cfg = stage.cfg
    context = case.rows * (case.context + 4 + 10 + STEPS // 2)
    kv_bytes = context * partition.kv_bytes_per_token(cfg, cfg.num_layers, 2)
    read_bytes = stage.weight_bytes + kv_bytes
    if not cfg.tie_word_embeddings:
        read_bytes -= partition.head_parameters(cfg) * 2  # of the embedding, only some rows
    operations = 0
    if case.chunk:
        parameters = cfg.num_layers * partition.layer_parameters(cfg)
        operations = 2 * parameters * (case.rows + case.chunk)
        operations += 2 * partition.head_parameters(cfg) * (case.rows + 1)
    floor_us = max(read_bytes / bandwidth, operations / rate) * 1e6
    median = statistics.median(step_us)
    return dataclasses.asdict(case) | {
        "host_us": round(statistics.median(host_us), 1),
        "step_us": round(median, 1),
        "step_us_min": round(min(step_us), 1),
        "step_us_max": round(max(step_us), 1),
        "floor_us": round(floor_us, 1),
        "ratio": round(floor_us / median, 3),
    }


def matrix_rate() -> float:
    """Operations per second of a large bf16 product."""
    size = 8192
    a, b = (torch.randn(size, size, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / (time_launches([lambda: a @ b] * 8)["us"] * 1e-6)


def main() -> None:
    """Print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="models that contain this")
    parser.add_argument("--decode", action="store_true", help="only steps without chunks")
    parser.add_argument("--no-graphs", action="store_true", help="launch each kernel by itself")
    parser.add_argument("--profile", type=Path, help="a file for the kernels' times, one case")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.cuda.set_device(CUDA)
    torch.cuda.set_stream(torch.cuda.Stream())
    bandwidth, rate = read_bandwidth(), matrix_rate()
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s, matrix rate {rate / 1e12:.0f} TFLOP/s")
    rows = []
    for model in dict.fromkeys(case.model for case in CASES if options.model in case.model):
        cases = [case for case in CASES if case.model == model]
        stage = Stage(model, max(case.rows for case in cases), uses_graphs=not options.no_graphs)
        started = time.perf_counter()
        stage.runner.warm_up()
        print(f"{model}: captured in {time.perf_counter() - started:.2f} s", flush=True)
        for case in cases:
            if options.decode and case.chunk:
                continue
            rows.append(measure(stage, case, bandwidth, rate))
            print(rows[-1], flush=True)
            if options.profile:
                profile(stage, case, options.profile)
        del stage
        torch.cuda.empty_cache()
    result = {
        "benchmark": "steps",
        "conditions": conditions() | gpu_conditions(),
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "matrix_tflop_per_s": round(rate / 1e12, 1),
        "repeats": REPEATS,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.output}", file=sys.stderr)


def profile(stage: Stage, case: Case, path: Path) -> None:
    """Times of the kernels of ten steps, by name, appended to ``path``."""
    stage.begin(case)
    for _ in range(3):
        stage.step(case).finish()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(10):
            last = stage.step(case)
        last.finish()
    table = profiler.key_averages().table(sort_by="cuda_time_total", row_limit=16)
    with path.open("a") as file:
        file.write(f"{case}\n{table}\n")


if __name__ == "__main__":
    main()
