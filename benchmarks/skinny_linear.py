"""Products of few rows, of every Qwen3 size: ``python -m benchmarks.skinny_linear``.

Each against its byte floor (weight, rows and outputs once, over the read bandwidth of this run)
and against cuBLAS through torch. Launches are captured in a graph and go through weights that
together exceed the second-level cache several times. Then all layers of a decode step of one
size, as the model calls them, in one graph.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the field's name for it
from torch import Tensor

from benchmarks.conditions import conditions, gpu_conditions
from benchmarks.kernels import CUDA, read_bandwidth, time_launches
from ember_pp.kernels import Ops, PagedRows, RopeRows, make_ops

RESULT = Path(__file__).with_name("results") / "skinny_linear.json"
ROTATED_BYTES = 256 * 2**20
GRAPH_BYTES = 3 * 2**30
"""What the launches of one graph read, at most 64 of them and at least a turn through all sets."""
VOCAB_SIZE = 151936
HEAD_DIM = 128
EPS = 1e-6
ROWS = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Size:
    """A model of the Qwen3 family."""

    name: str
    hidden: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    num_layers: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the weights of a layer, and of the head."""
        attended = self.num_heads * HEAD_DIM
        return {
            "qkv": (attended + 2 * self.num_kv_heads * HEAD_DIM, self.hidden),
            "o": (self.hidden, attended),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (VOCAB_SIZE, self.hidden),
        }


SIZES = (
    Size("0.6B", 1024, 16, 8, 3072, 28),
    Size("1.7B", 2048, 16, 8, 6144, 28),
    Size("4B", 2560, 32, 8, 9728, 36),
    Size("8B", 4096, 32, 8, 12288, 36),
    Size("14B", 5120, 40, 8, 17408, 40),
    Size("32B", 5120, 64, 8, 25600, 64),
)


def random(*shape: int) -> Tensor:
    """Normal, bf16, of the size that keeps products near 1."""
    return torch.empty(shape, device=CUDA, dtype=torch.bfloat16).normal_(0.0, shape[-1] ** -0.5)


def product(ops: Ops, num_rows: int, num_outputs: int, width: int) -> dict[str, Any]:
    """Microseconds of ``linear`` and of the norm with it, and of cuBLAS."""
    weight_bytes = 2 * num_outputs * width
    num_bytes = weight_bytes + 2 * num_rows * (num_outputs + width)
    num_sets = max(2, math.ceil(ROTATED_BYTES / weight_bytes))
    repeats = max(1, min(64, GRAPH_BYTES // weight_bytes) // num_sets)
    weights = [random(num_outputs, width) for _ in range(num_sets)] * repeats
    input, norm_weight = random(num_rows, width), random(width)

    def timed(run: Callable[[Tensor], object]) -> dict[str, float]:
        return time_launches([lambda weight=weight: run(weight) for weight in weights])

    normed = timed(lambda weight: ops.add_rms_norm_linear(input, input, norm_weight, EPS, weight))
    return {
        "bytes": num_bytes,
        **timed(lambda weight: ops.linear(input, weight)),
        "normed_us": normed["us"],
        "cublas_us": timed(lambda weight: F.linear(input, weight))["us"],
    }


def gate_up(ops: Ops, num_rows: int, num_outputs: int, width: int) -> dict[str, Any]:
    """As ``product``; the norm goes before and the activation after it."""
    result = product(ops, num_rows, num_outputs, width)
    weight_bytes = 2 * num_outputs * width
    num_sets = max(2, math.ceil(ROTATED_BYTES / weight_bytes))
    weights = [random(num_outputs, width) for _ in range(num_sets)]
    input, norm_weight = random(num_rows, width), random(width)

    def activated(weight: Tensor) -> object:
        return ops.add_rms_norm_gate_up(input, input, norm_weight, EPS, weight)

    launches = [lambda weight=weight: activated(weight) for weight in weights]
    return result | {"normed_us": time_launches(launches)["us"]}


class DecodeStep:
    """All layers of a size and its head, as the model calls them, with weights of their own."""

    def __init__(self, size: Size, num_rows: int, context_len: int, num_layers: int) -> None:
        self.size, self.num_rows = size, num_rows
        shapes = {name: shape for name, shape in size.products.items() if name != "lm_head"}
        self.layers = [
            {name: random(*shape) for name, shape in shapes.items()} for _ in range(num_layers)
        ]
        self.lm_head = random(*size.products["lm_head"])
        self.norm_weight = torch.ones(size.hidden, device=CUDA, dtype=torch.bfloat16)
        heads = size.num_heads + size.num_kv_heads
        self.qk_norm = torch.ones((heads, HEAD_DIM), device=CUDA, dtype=torch.bfloat16)
        blocks = -(-context_len // 16)
        shape = (num_layers, 2, num_rows * blocks, 16, size.num_kv_heads, HEAD_DIM)
        self.caches = torch.empty(shape, device=CUDA, dtype=torch.bfloat16).normal_()
        tables = torch.arange(num_rows * blocks, dtype=torch.int32, device=CUDA)
        self.rows = PagedRows(
            block_tables=tables.view(num_rows, blocks),
            context_lens=torch.full((num_rows,), context_len, dtype=torch.int32, device=CUDA),
            cu_seqlens_q=torch.arange(num_rows + 1, dtype=torch.int32, device=CUDA),
            num_tokens=num_rows,
            max_query_len=1,
            block_size=16,
            dtype=torch.bfloat16,
        )
        positions = torch.full((num_rows,), context_len - 1, device=CUDA)
        table = torch.randn((context_len, HEAD_DIM), device=CUDA)
        self.rope = RopeRows(table, positions)
        self.slots = torch.arange(num_rows, device=CUDA) * blocks * 16 + context_len - 1
        self.token_ids = torch.randint(0, VOCAB_SIZE, (num_rows,), device=CUDA)

    @property
    def num_bytes(self) -> int:
        """Weights and context, once."""
        weights = [self.lm_head, *(w for layer in self.layers for w in layer.values())]
        return sum(weight.nbytes for weight in weights) + self.caches.nbytes

    def run(self, ops: Ops, *, attends: bool = True) -> Tensor:
        """Logits. Without attention its place is taken by the queries."""
        size, norm = self.size, self.norm_weight
        added, residual = ops.embedding(self.token_ids, self.lm_head), None
        for layer, caches in zip(self.layers, self.caches, strict=True):
            qkv, residual = ops.add_rms_norm_linear(added, residual, norm, EPS, layer["qkv"])
            attended = qkv[:, : size.num_heads * HEAD_DIM]
            if attends:
                attended = self._attention(ops, qkv, caches)
            output = ops.linear(attended, layer["o"])
            activated, residual = ops.add_rms_norm_gate_up(
                output, residual, norm, EPS, layer["gate_up"]
            )
            added = ops.linear(activated, layer["down"])
        return ops.add_rms_norm_linear(added, residual, norm, EPS, self.lm_head)[0]

    def _attention(self, ops: Ops, qkv: Tensor, caches: Tensor) -> Tensor:
        size = self.size
        heads = {"num_heads": size.num_heads, "num_kv_heads": size.num_kv_heads}
        query = ops.qk_norm_rope_store_kv(
            qkv, None, self.qk_norm, self.rope, caches[0], caches[1], self.slots, **heads, eps=EPS
        )
        scale = HEAD_DIM**-0.5
        return ops.paged_attention(query, caches[0], caches[1], self.rows, scale=scale).flatten(1)


def decode_step(ops: Ops, size: Size, num_rows: int, bandwidth: float) -> dict[str, Any]:
    """Microseconds of a step, and of the same without attention."""
    num_layers = min(size.num_layers, int(4e9 // (2 * size.hidden * size.intermediate * 6)))
    step = DecodeStep(size, num_rows, 256, num_layers)
    row: dict[str, Any] = {"size": size.name, "rows": num_rows, "layers": num_layers}
    row |= {"bytes": step.num_bytes, "floor_us": round(step.num_bytes / bandwidth * 1e6, 1)}
    row |= time_launches([lambda: step.run(ops)])
    row["without_attention_us"] = time_launches([lambda: step.run(ops, attends=False)])["us"]
    return row | {"ratio": round(row["floor_us"] / row["us"], 3)}


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return round(math.exp(statistics.fmean(map(math.log, values))), 3)


def main() -> None:
    """Print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=[size.name for size in SIZES])
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.cuda.set_device(CUDA)
    torch.manual_seed(0)
    gc.freeze()  # every capture collects garbage first: let it have little to look through
    ops = make_ops("cuda", CUDA)
    before = read_bandwidth()
    sizes = [size for size in SIZES if size.name in options.sizes]
    rows = []
    for size in sizes:
        for name, (num_outputs, width) in size.products.items():
            for num_rows in options.rows:
                measure = gate_up if name == "gate_up" else product
                row: dict[str, Any] = {"size": size.name, "product": name, "rows": num_rows}
                row |= {"outputs": num_outputs, "width": width}
                row |= measure(ops, num_rows, num_outputs, width)
                row["ratio"] = round(row["bytes"] / before * 1e6 / row["us"], 3)
                row["against_cublas"] = round(row["cublas_us"] / row["us"], 3)
                rows.append(row)
                print(
                    f"{size.name:5} {name:8} M={num_rows:<3} {num_outputs:6} x {width:<6} "
                    f"{row['us']:8.2f} us ({row['us_min']:.2f} .. {row['us_max']:.2f}) ratio "
                    f"{row['ratio']:.3f}  x cuBLAS {row['against_cublas']:.3f}  with neighbours "
                    f"{row['normed_us']:.2f}",
                    flush=True,
                )
                torch.cuda.empty_cache()
    means = {
        str(num_rows): {
            key: geometric_mean([row[key] for row in rows if row["rows"] == num_rows])
            for key in ("ratio", "against_cublas")
        }
        for num_rows in options.rows
    }
    print(f"geometric means: {means}")
    steps = []
    for size in sizes:
        for num_rows in options.rows:
            steps.append(decode_step(ops, size, num_rows, before))
            print(f"decode step: {steps[-1]}", flush=True)
            torch.cuda.empty_cache()
    bandwidths = [round(value / 1e9, 1) for value in (before, read_bandwidth())]
    print(f"read bandwidth before and after: {bandwidths} GB/s")
    result = {
        "benchmark": "skinny_linear",
        "conditions": conditions() | gpu_conditions(),
        "read_gb_per_s": bandwidths,
        "geometric_means": means,
        "products": rows,
        "decode_steps": steps,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
