"""Every CUDA kernel against what it must move or compute: ``python -m benchmarks.kernels``.

The floor of a kernel is its bytes over the read bandwidth that this run measures, or the operations
of its products over the rate of a large product of matrices by torch, whichever takes longer.
Launches are captured in a graph, and go through sets of inputs that together exceed the
second-level cache several times, so none finds its inputs there. Plain torch is timed the same way
beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.conditions import conditions, gpu_conditions
from ember_pp.kernels import Ops, PagedRows, RopeRows, build, make_ops
from ember_pp.kernels.launch import Kernel, capability
from ember_pp.kernels.slot_params import DrawSettings, SlotParams

RESULT = Path(__file__).with_name("results") / "kernels.json"
CUDA = torch.device("cuda", 0)
ROTATED_BYTES = 256 * 2**20
MOST_SETS = 64
LAUNCHES = 64
"""Of one graph, at least a turn through all sets."""
REPEATS = 25

Run = Callable[[Ops], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    name: str
    shape: str
    num_bytes: int
    """Inputs read once and outputs written once, in all."""
    make: Callable[[], Run]
    """Fresh inputs, and a call on them."""
    has_torch: bool = True
    num_operations: int = 0
    """Of matrix products, a multiplication and an addition each."""
    make_torch: Callable[[], Callable[[], object]] | None = None
    """A call of torch's own to compare with, where the reference is not it."""


def random(*shape: int) -> Tensor:
    """Standard normal, bf16."""
    return torch.randn(shape, device=CUDA, dtype=torch.bfloat16)


def embedding(num_tokens: int, width: int = 4096, vocab_size: int = 151936) -> Case:
    """The table is shared by all sets: other rows of it each time."""
    table = torch.empty((vocab_size, width), device=CUDA, dtype=torch.bfloat16).normal_()

    def make() -> Run:
        token_ids = torch.randint(0, vocab_size, (num_tokens,), device=CUDA)
        return lambda ops: ops.embedding(token_ids, table)

    num_bytes = num_tokens * (4 * width + 8)
    return Case("embedding", f"T={num_tokens} D={width}", num_bytes, make)


def rms_norm(num_tokens: int, width: int = 4096) -> Case:
    """Weights are read once per launch."""

    def make() -> Run:
        input, weight = random(num_tokens, width), random(width)
        return lambda ops: ops.rms_norm(input, weight, 1e-6)

    num_bytes = 4 * num_tokens * width + 2 * width
    return Case("rms_norm", f"T={num_tokens} D={width}", num_bytes, make)


def add_rms_norm(num_tokens: int, width: int = 4096) -> Case:
    """Two inputs, two outputs."""

    def make() -> Run:
        input, residual, weight = (
            random(num_tokens, width),
            random(num_tokens, width),
            random(width),
        )
        return lambda ops: ops.add_rms_norm(input, residual, weight, 1e-6)

    num_bytes = 8 * num_tokens * width + 2 * width
    return Case("add_rms_norm", f"T={num_tokens} D={width}", num_bytes, make)


def swiglu(num_tokens: int, width: int = 12288) -> Case:
    """Two halves in, one out."""

    def make() -> Run:
        gate_up = random(num_tokens, 2 * width)
        return lambda ops: ops.swiglu(gate_up)

    return Case("swiglu", f"T={num_tokens} I={width}", 6 * num_tokens * width, make)


def qk_norm_rope_store_kv(num_tokens: int, num_heads: int = 32, num_kv_heads: int = 8) -> Case:
    """All heads in and out; the angles of each token."""
    head_dim, block_size = 128, 16
    table = torch.randn((4096, head_dim), device=CUDA)

    def make() -> Run:
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv, norm_weight = random(num_tokens, width), random(num_heads + num_kv_heads, head_dim)
        rope = RopeRows(table, torch.randint(0, 4096, (num_tokens,), device=CUDA))
        num_blocks = -(-num_tokens // block_size)
        caches = random(2, num_blocks, block_size, num_kv_heads, head_dim)
        slots = torch.randperm(num_blocks * block_size, device=CUDA)[:num_tokens]
        heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": 1e-6}
        return lambda ops: ops.qk_norm_rope_store_kv(
            qkv, None, norm_weight, rope, caches[0], caches[1], slots, **heads
        )

    num_bytes = num_tokens * ((num_heads + 2 * num_kv_heads) * head_dim * 4 + head_dim * 4 + 16)
    shape = f"T={num_tokens} H={num_heads} K={num_kv_heads} d={head_dim}"
    return Case("qk_norm_rope_store_kv", shape, num_bytes, make, has_torch=False)


def paged_attention(
    lens: Sequence[tuple[int, int]],
    shape: str,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    block_size: int = 16,
) -> Case:
    """Rows of (new tokens, context) over blocks in random order. Fresh prompts of one length are
    compared with torch's FlashAttention, which has keys of all query heads side by side."""
    query_lens, contexts = zip(*lens, strict=True)
    num_tokens = sum(query_lens)

    def make() -> Run:
        blocks_of = [-(-context_len // block_size) for context_len in contexts]
        order = torch.randperm(sum(blocks_of)).int()
        tables = torch.full((len(contexts), max(blocks_of)), -1, dtype=torch.int32)
        for row, ids in enumerate(order.split(blocks_of)):
            tables[row, : len(ids)] = ids
        caches = torch.empty(
            (2, sum(blocks_of), block_size, num_kv_heads, head_dim),
            device=CUDA,
            dtype=torch.bfloat16,
        ).normal_()
        starts = torch.tensor([0, *query_lens]).cumsum(0)
        rows = PagedRows(
            block_tables=tables.to(CUDA),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=CUDA),
            cu_seqlens_q=starts.int().to(CUDA),
            num_tokens=num_tokens,
            max_query_len=max(query_lens),
            block_size=block_size,
            dtype=torch.bfloat16,
        )
        _ = rows.lens_of_decodes
        query = random(num_tokens, num_heads, head_dim)
        scale = head_dim**-0.5
        return lambda ops: ops.paged_attention(query, caches[0], caches[1], rows, scale=scale)

    def make_torch() -> Callable[[], object]:
        qkv = random(3, len(lens), num_heads, query_lens[0], head_dim)

        def run() -> object:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return scaled_dot_product_attention(*qkv, is_causal=True)

        return run

    num_bytes = 2 * num_kv_heads * head_dim * 2 * sum(contexts)
    num_bytes += 4 * num_tokens * num_heads * head_dim
    pairs = sum(n * context - n * (n - 1) // 2 for n, context in lens if n > 1)
    is_fresh = len(set(lens)) == 1 and query_lens[0] == contexts[0]
    return Case(
        "paged_attention",
        f"{shape} H={num_heads} K={num_kv_heads} d={head_dim} S={block_size}",
        num_bytes,
        make,
        has_torch=False,
        num_operations=4 * num_heads * head_dim * pairs,
        make_torch=make_torch if is_fresh else None,
    )


def decodes(contexts: Sequence[int], shape: str, **heads: int) -> Case:
    """One new token of each row."""
    return paged_attention([(1, context_len) for context_len in contexts], shape, **heads)


def sampling_logits(kind: str, num_rows: int, vocab_size: int) -> Tensor:
    """[N, V] bf16. ``zipf``: probabilities fall with the rank to the power of 1.5, as in text;
    ``gauss``: spread 3; ``flat``: spread 0.3."""
    if kind == "zipf":
        ranks = torch.rand((num_rows, vocab_size), device=CUDA).argsort(-1) + 1
        return (20 - 1.5 * ranks.float().log()).to(torch.bfloat16)
    return random(num_rows, vocab_size) * (3.0 if kind == "gauss" else 0.3)


def sample_tokens(
    kind: str,
    num_rows: int,
    what: str,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    vocab_size: int = 151936,
) -> Case:
    """One read of the logits; ratio 0.5 is two reads."""
    params = SlotParams(num_rows, CUDA)
    settings = DrawSettings(0, temperature, top_k, top_p, min_p)
    params.update({slot: settings._replace(seed=slot) for slot in range(num_rows)})
    slots = torch.arange(num_rows, dtype=torch.int32, device=CUDA)

    def make() -> Run:
        logits = sampling_logits(kind, num_rows, vocab_size)
        positions = torch.randint(0, 4096, (num_rows,), device=CUDA)
        return lambda ops: ops.sample_tokens(logits, slots, positions, params)

    num_bytes = num_rows * (2 * vocab_size + 20)
    text = f"{num_rows} x {vocab_size} {kind}, {what}"
    return Case("sample_tokens", text, num_bytes, make, has_torch=False)


def top_logprobs(num_rows: int, num_top: int, vocab_size: int = 151936) -> Case:
    """One read of the logits."""

    def make() -> Run:
        logits = sampling_logits("zipf", num_rows, vocab_size)
        token_ids = torch.randint(0, vocab_size, (num_rows,), device=CUDA)
        return lambda ops: ops.top_logprobs(logits, token_ids, num_top)

    num_bytes = num_rows * (2 * vocab_size + 12 + 12 * num_top)
    text = f"{num_rows} x {vocab_size} zipf, n={num_top}"
    return Case("top_logprobs", text, num_bytes, make, has_torch=num_rows < 64)


def sampling_cases() -> list[Case]:
    """Ways to draw at batch 1, 64 and 256, on logits as of text; and on others at 256."""
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0.0},
        "temperature 1": {},
        "top_p 0.9": {"top_p": 0.9},
        "top_k 50, top_p 0.9": {"top_k": 50, "top_p": 0.9},
        "min_p 0.05": {"min_p": 0.05},
    }
    cases = [
        sample_tokens("zipf", num_rows, what, **settings)
        for num_rows in (1, 64, 256)
        for what, settings in ways.items()
    ]
    cases += [
        sample_tokens(kind, 256, what, **settings)
        for kind in ("gauss", "flat")
        for what, settings in ways.items()
    ]
    cases += [
        sample_tokens("gauss", 256, "top_k 100", top_k=100),
        sample_tokens("gauss", 256, "top_k 2000, top_p 0.9", top_k=2000, top_p=0.9),
        sample_tokens("gauss", 256, "top_k 10000", top_k=10000),
        sample_tokens("gauss", 256, "T 2, top_p 0.99", temperature=2.0, top_p=0.99),
        top_logprobs(1, 5),
        top_logprobs(256, 20),
    ]
    return cases


def cases() -> list[Case]:
    """Sizes of a decode step at batch 1, 64 and 256, and of a prefill."""
    small = {"num_heads": 16, "num_kv_heads": 8}
    mixed = [1 + 37 * row * row % 2048 for row in range(256)]
    return [
        *(embedding(num_tokens) for num_tokens in (1, 256, 8192)),
        *(rms_norm(num_tokens) for num_tokens in (1, 256, 8192)),
        *(add_rms_norm(num_tokens) for num_tokens in (1, 64, 256, 8192)),
        *(swiglu(num_tokens) for num_tokens in (1, 64, 256, 8192)),
        *(qk_norm_rope_store_kv(num_tokens) for num_tokens in (1, 64, 256, 8192)),
        decodes([640] * 256, "256 x 640"),
        decodes([640] * 256, "256 x 640", block_size=256),
        decodes([640] * 64, "64 x 640"),
        decodes(mixed, "256 x 1..2048"),
        decodes([2048] * 256, "256 x 2048"),
        decodes([8192] * 8, "8 x 8192"),
        decodes([32768], "1 x 32768"),
        decodes([32768, *[200] * 63], "1 x 32768 + 63 x 200"),
        decodes([256], "1 x 256"),
        decodes([256], "1 x 256", **small),
        decodes([640] * 256, "256 x 640", **small),
        decodes([640] * 256, "256 x 640", num_heads=8, num_kv_heads=4, head_dim=64),
        paged_attention([(2048, 2048)] * 8, "prefill 8 x 2048"),
        paged_attention([(16384, 16384)], "prefill 1 x 16384"),
        paged_attention([(2048, 2048)], "prefill 1 x 2048"),
        paged_attention([(512, 16896)], "prefill 512 after 16384"),
        paged_attention([(64, 30064)], "prefill 64 after 30000"),
        paged_attention([(1, 640)] * 64 + [(2048, 2048)] * 2, "64 x 640, prefill 2 x 2048"),
        paged_attention([(2048, 2048)] * 8, "prefill 8 x 2048", **small),
        *sampling_cases(),
    ]


def time_launches(launches: Sequence[Callable[[], object]]) -> dict[str, float]:
    """Microseconds of one launch: median, fastest and slowest replay of a graph of all."""
    for launch in launches:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    graph.replay()
    spans = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) * 1000 / len(launches))
    return {
        "us": round(statistics.median(spans), 2),
        "us_min": round(min(spans), 2),
        "us_max": round(max(spans), 2),
    }


def read_bandwidth() -> float:
    """Bytes per second that a kernel which only reads gets from memory."""
    source = build.KernelSource("read_bandwidth.cuh", "read_bandwidth_kernel")
    binary = build.load_or_compile(source, capability(CUDA), build.default_cache())
    kernel = Kernel(binary, "PqIP", device=CUDA, overlaps=False)
    data = torch.randint(0, 2**31, (2**29,), device=CUDA, dtype=torch.int32)  # 2 GiB
    output = torch.zeros(1, device=CUDA, dtype=torch.int32)
    num_blocks = torch.cuda.get_device_properties(CUDA).multi_processor_count * 4
    arguments = (data.data_ptr(), data.nbytes // 16, 0xFFFFFFFF, output.data_ptr())

    def launch() -> None:
        kernel.launch((num_blocks, 1), 512, arguments)

    return data.nbytes / (time_launches([launch] * 4)["us"] * 1e-6)


def matrix_rate() -> float:
    """Operations per second of a large product of matrices by torch."""
    size = 8192
    left, right = random(size, size), random(size, size)
    return 2 * size**3 / (time_launches([lambda: left @ right] * 4)["us"] * 1e-6)


def measure(case: Case, bandwidth: float, rate: float) -> dict[str, Any]:
    """The row of one case."""
    torch.manual_seed(0)
    num_sets = min(
        MOST_SETS if case.num_operations < 1e11 else 2,
        max(2, math.ceil(ROTATED_BYTES / case.num_bytes)),
    )
    sets = [case.make() for _ in range(num_sets)]
    work = max(case.num_bytes, case.num_operations // 200)  # at 200 operations a byte
    sets *= max(1, min(LAUNCHES, 2**32 // work) // num_sets)

    def timed(kernels: str) -> dict[str, float]:
        ops = make_ops(kernels, CUDA)
        return time_launches([lambda run=run: run(ops) for run in sets])

    floor_us = max(case.num_bytes / bandwidth, case.num_operations / rate) * 1e6
    result = timed("cuda")
    row: dict[str, Any] = {"kernel": case.name, "shape": case.shape, "bytes": case.num_bytes}
    if case.num_operations:
        row["operations"] = case.num_operations
    row |= {"floor_us": round(floor_us, 2), **result, "ratio": round(floor_us / result["us"], 3)}
    if case.has_torch:
        row["torch_us"] = timed("reference")["us"]
    elif case.make_torch:
        row["torch_us"] = time_launches([case.make_torch()] * 4)["us"]
    return row


def main() -> None:
    """Print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.cuda.set_device(CUDA)
    before, rate = read_bandwidth(), matrix_rate()
    rows = []
    for case in cases():
        if options.only in case.name:
            rows.append(measure(case, before, rate))
            row = rows[-1]
            torch.cuda.empty_cache()
            print(
                f"{row['kernel']:22} {row['shape']:44} {row['us']:9.2f} us "
                f"({row['us_min']:.2f} .. {row['us_max']:.2f})  floor {row['floor_us']:8.2f}  "
                f"ratio {row['ratio']:.3f}  torch {row.get('torch_us', '-')}",
                flush=True,
            )
    bandwidths = [round(value / 1e9, 1) for value in (before, read_bandwidth())]
    rates = [round(value / 1e12, 1) for value in (rate, matrix_rate())]
    print(f"read bandwidth before and after: {bandwidths} GB/s, matrix rate {rates} TFLOP/s")
    result = {
        "benchmark": "kernels",
        "conditions": conditions() | gpu_conditions(),
        "read_gb_per_s": bandwidths,
        "matrix_tflop_per_s": rates,
        "repeats": REPEATS,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
