"""Launch every CUDA kernel once at small awkward sizes, for a checker to watch:

    compute-sanitizer --tool memcheck --report-api-errors no python -m scripts.sanitize_kernels

``scripts/gpu_check`` does so with all four tools. A kernel that no case launches is an error, so
that a new one cannot be forgotten. What a case computes is not looked at: the tests do that.

Every tensor is an allocation of its own, of its exact size, and inputs are made on the CPU and
copied, so that hardly any kernel but ours runs. KV slots that no kernel may read stay
uninitialised.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ember_pp.kernels import Ops, PagedRows, PlanWords, RopeRows, StepState, build, make_ops
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.launch import Kernel, capability
from ember_pp.kernels.paged_attention import PagedAttention
from ember_pp.kernels.slot_params import DrawSettings, SlotParams

DTYPES = (torch.bfloat16, torch.float32)
BLOCK_SIZE = 16
TILE = 16
"""Kernels read KV slots by so many: those behind a row's last one too, which they then hide."""
NUM_FREE_BLOCKS = 3


class Card:
    """The operations on the first CUDA device, and inputs for them."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        self.ops: Ops = make_ops("cuda", self.device)
        self.kernels = KernelSet(self.device)
        self._generator = torch.Generator().manual_seed(0)

    def put(self, tensor: Tensor) -> Tensor:
        """A copy on the card."""
        return tensor.to(self.device)

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Standard normal."""
        return self.put(torch.randn(shape, generator=self._generator).to(dtype))

    def order(self, count: int) -> Tensor:
        """[count] int64 on the CPU: the numbers below ``count`` in no order."""
        return torch.randperm(count, generator=self._generator)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Uninitialised."""
        return torch.empty(shape, dtype=dtype, device=self.device)


# ------------------------------------------------------------------------------------
# cases: one for each file of kernels


def embedding(card: Card) -> None:
    """Rows of every alignment; one of more words than a thread block has threads."""
    for width in (40, 36, 34, 33, 2056 + 8):
        weight = card.random(11, width)
        for token_ids in ([10], [0, 10, 5, 5, 0, 10, 9]):
            card.ops.embedding(card.put(torch.tensor(token_ids)), weight)


def rms_norm(card: Card) -> None:
    """Less than a pack for each thread up to several, odd widths, with and without a sum."""
    for dtype, width in itertools.product(DTYPES, (1, 8, 33, 100, 536, 2048, 4096 + 8)):
        for num_tokens in (1, 3):
            input, residual = (card.random(num_tokens, width, dtype=dtype) for _ in range(2))
            weight = card.random(width, dtype=dtype)
            card.ops.rms_norm(input, weight, 1e-6)
            card.ops.add_rms_norm(input, residual, weight, 1e-6)


def swiglu(card: Card) -> None:
    """Widths of every alignment; one of more packs than a thread block has threads."""
    for dtype, width in itertools.product(DTYPES, (1, 2, 33, 68, 264, 2048 + 40)):
        for num_tokens in (1, 3):
            card.ops.swiglu(card.random(num_tokens, 2 * width, dtype=dtype))


def qk_norm_rope_store_kv(card: Card) -> None:
    """First and last position and slot of all, and padding: no slot, position 0."""
    num_heads, num_kv_heads, num_blocks, num_positions = 6, 2, 3, 50
    shapes = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 24)]
    for (dtype, head_dim), has_norm, has_bias in itertools.product(
        shapes, (True, False), (True, False)
    ):
        width = (num_heads + 2 * num_kv_heads) * head_dim
        cache_shape = (num_blocks, BLOCK_SIZE, num_kv_heads, head_dim)
        norm_weight = card.random(num_heads + num_kv_heads, head_dim, dtype=dtype)
        for slots in ([num_blocks * BLOCK_SIZE - 1], [7, -1, 0, num_blocks * BLOCK_SIZE - 1, -1]):
            positions = [num_positions - 1, 0, 0, 17, 0][: len(slots)]
            card.ops.qk_norm_rope_store_kv(
                card.random(len(slots), width, dtype=dtype),
                card.random(width, dtype=dtype) if has_bias else None,
                norm_weight if has_norm else None,
                RopeRows(
                    card.random(num_positions, head_dim, dtype=torch.float32),
                    card.put(torch.tensor(positions)),
                ),
                card.empty(*cache_shape, dtype=dtype),
                card.empty(*cache_shape, dtype=dtype),
                card.put(torch.tensor(slots)),
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                eps=1e-6,
            )


def paged_decode(card: Card) -> None:
    """Lengths around a block, long ones that several thread blocks share, rows of padding."""
    ends, shared = [1, 15, 16, 17, 33, 0], [700, 3, 0, 1, 257, 1024]
    many = [1 + 37 * row % 300 for row in range(38)] + [0, 700]
    for head_dim in (64, 128):
        for num_heads, num_kv_heads, contexts in (
            (8, 4, [700]),
            (14, 2, ends),
            (10, 2, shared),
            (8, 1, [0, 0]),
            (8, 4, many),
            (10, 2, many),
            (12, 3, many),
            (7, 1, many),
        ):
            rows = [(1, context_len) for context_len in contexts]
            attend(card, rows, num_heads, num_kv_heads, head_dim)


def paged_prefill(card: Card, *, has_wgmma: bool = False) -> None:
    """Chunks around a tile of queries and of positions, after prefixes and without, among decodes
    and padding; a long context that several thread blocks share."""
    attention = PagedAttention(card.kernels, has_wgmma=has_wgmma)
    mixed = [(1, 20), (17, 17), (0, 0), (64, 300), (1, 1), (129, 129), (2, 700), (1, 0)]
    for head_dim in (64, 128):
        for num_heads, num_kv_heads, rows in (
            (8, 4, mixed),
            (10, 2, mixed),
            (7, 1, mixed),
            (8, 1, [(33, 1500)]),
            (4, 4, [(2, 2), (128, 130)]),
            (3, 1, [(0, 0), (43, 44)]),
        ):
            attend(card, rows, num_heads, num_kv_heads, head_dim, attention=attention)
    attend(card, mixed, 8, 2, 128, attention=attention, block_size=64)


def paged_prefill_wgmma(card: Card) -> None:
    """The same."""
    paged_prefill(card, has_wgmma=True)


def skinny_linear(card: Card) -> None:
    """Rows up to each limit, widths that fill no chunk, outputs that fill no tile; with and without
    norm, residual and bias, plain and gated; rows that stream through a ring."""
    for num_rows, width, num_outputs in (
        (1, 32, 2),
        (3, 96, 22),
        (8, 1056, 1064),
        (9, 160, 9000),
        (16, 2592, 40),
        (17, 1024, 2204),
        (24, 96, 7000),
    ):
        input, residual = (card.random(num_rows, width) for _ in range(2))
        weight, norm_weight = card.random(num_outputs, width), card.random(width)
        bias = card.random(num_outputs)
        card.ops.linear(input, weight)
        card.ops.linear(input, weight, bias)
        card.ops.add_rms_norm_linear(input, None, norm_weight, 1e-6, weight, bias)
        card.ops.add_rms_norm_linear(input, residual, norm_weight, 1e-6, weight)
        card.ops.add_rms_norm_gate_up(input, residual, norm_weight, 1e-6, weight)
    for num_rows in (2, 16, 24):
        input, weight = card.random(num_rows, 12320), card.random(24, 12320)
        card.ops.linear(input, weight)
        card.ops.add_rms_norm_gate_up(input, None, card.random(12320), 1e-6, weight)


def sampling(card: Card) -> None:
    """Every setting, and padding, over vocabularies that fill no pack and no thread block, and one
    that no thread block keeps."""
    settings = [
        DrawSettings(0, 0.0, 0, 1.0, 0.0),
        DrawSettings(2**64 - 1, 0.7, 0, 1.0, 0.0),
        DrawSettings(1, 1.3, 20, 0.95, 0.0),
        DrawSettings(2, 0.01, 1, 0.5, 0.1),
        DrawSettings(3, 5.0, 2**31 - 1, 0.999, 0.001),
    ]
    on_cpu, params = SlotParams(len(settings), "cpu"), SlotParams(len(settings), card.device)
    on_cpu.update(dict(enumerate(settings)))
    params.table.copy_(on_cpu.table)
    slots = card.put(torch.tensor([4, -1, 2, 3, 0, 1, -1], dtype=torch.int32))
    positions = card.put(torch.tensor([0, 0, 5, 2**31, 7, 1, 0]))
    for dtype, vocab_size in itertools.product(DTYPES, (1, 7, 131, 4096 + 3, 33000, 170001)):
        for num_rows in (1, 3 if vocab_size > 5000 else len(slots)):
            logits = card.random(num_rows, vocab_size, dtype=dtype)
            card.ops.sample_tokens(logits, slots[:num_rows], positions[:num_rows], params)


def top_logprobs(card: Card) -> None:
    """Of the first and the last token, and of none."""
    for dtype, vocab_size in itertools.product(DTYPES, (1, 7, 131, 4096 + 3, 33000, 170001)):
        logits = card.random(3, vocab_size, dtype=dtype)
        token_ids = card.put(torch.tensor([vocab_size - 1, -1, 0]))
        for num_top in (20,) if vocab_size > 5000 else (0, 1, 20):
            card.ops.top_logprobs(logits, token_ids, num_top)


def step(card: Card) -> None:
    """The first and the last slot, column, row and token; more of each than there are threads."""
    for num_decodes, chunk_lens, max_rows, max_tokens in (
        (1, [], 1, 1),
        (0, [1], 1, 1),
        (2, [3, 1, 17], 5, 23),
        (1100, [2] * 200, 1300, 1500),
    ):
        num_rows, ids = num_decodes + len(chunk_lens), [7] * sum(chunk_lens)
        last_tokens = card.put(torch.arange(num_rows))
        for is_first in (True, False):
            state = StepState.allocate(
                max_tokens=max_tokens,
                max_rows=max_rows,
                max_slots=num_rows,
                max_blocks_per_sequence=3,
                block_size=16,
                max_pending=2,
                last_tokens=last_tokens if is_first else None,
                device=card.device,
            )
            lens = [1] * num_decodes + chunk_lens
            rows = [n for row, length in enumerate(lens) for n in (row, 47 - length, length, 1)]
            added = [n for row in range(num_rows) for n in (row, row % 3, 5)]
            words = torch.tensor([*rows, *added, *ids], dtype=torch.int32).pin_memory()
            plan = PlanWords(
                words=words,
                num_rows=num_rows,
                num_decodes=num_decodes,
                decode_offset=1,
                num_new_blocks=num_rows,
                num_tokens=sum(lens),
                padded_tokens=max_tokens,
                turn=1,
                mark=9,
            )
            card.ops.begin_step(plan, state)
            drawn = card.put(torch.arange(num_rows) - 1)
            card.ops.end_step(drawn, state.sample_slots[:num_rows], state)
            card.ops.end_step(drawn[:0], state.sample_slots[:0], state)
            for dtype, width in itertools.product(DTYPES, (1, 33, 264)):
                residual, added = (card.random(3, width, dtype=dtype) for _ in range(2))
                output = card.empty(3, width, dtype=dtype)
                card.ops.leave_stage(residual, added, output, state)
                card.ops.leave_stage(residual, None, output, state)
            torch.cuda.synchronize()  # before the words go


def handoff(card: Card) -> None:
    """Both ends of an edge in one process: no flag is waited for. Messages of no token, of one,
    and of more words than the grid has threads; pairs whose index lies outside."""
    counter, flag = (card.put(torch.zeros(1, dtype=torch.int32)) for _ in range(2))
    tag = card.put(torch.zeros(2, dtype=torch.int64))
    fault, times = (torch.zeros(5, dtype=torch.int64).pin_memory() for _ in range(2))
    at = times.data_ptr()
    for word, size in (("uint4", 16), ("u32", 4), ("unsigned short", 2)):
        send = card.kernels.get(
            "handoff.cuh", f"send_slot_kernel<{word}>", "PPqPqqPIPPP", overlaps=False
        )
        take = card.kernels.get(
            "handoff.cuh", f"take_slot_kernel<{word}>", "PPqPqqPIPPP", overlaps=False
        )
        for num_words in (0, 1, 1025, 3 * 1024):
            message, slot, output = (
                card.put(torch.zeros(max(1, num_words) * size, dtype=torch.uint8)) for _ in range(3)
            )
            end = (tag.data_ptr(), 7, num_words, flag.data_ptr(), 9, counter.data_ptr())
            sent = (message.data_ptr(), slot.data_ptr(), num_words, *end, at, at + 8)
            taken = (slot.data_ptr(), output.data_ptr(), num_words, *end, at, fault.data_ptr())
            send.launch((2, 1), 256, sent)
            take.launch((2, 1), 256, taken)
            take.launch((1, 1), 256, (*taken[:5], -1, *taken[6:9], 0, taken[10]))
    pairs = card.put(torch.tensor([[0, 5], [-1, 6], [4, 7], [3, 8]], dtype=torch.int32))
    target = card.put(torch.zeros(4, dtype=torch.int64))
    take = card.kernels.get("handoff.cuh", "take_pairs_kernel", "PPqPqqPIPP", overlaps=False)
    ends = (tag.data_ptr(), 7, 4, flag.data_ptr(), 9, at, fault.data_ptr())
    take.launch((1, 1), 256, (pairs.data_ptr(), target.data_ptr(), 4, *ends))
    write_time = card.kernels.get("handoff.cuh", "write_time_kernel", "P", overlaps=False)
    write_time.launch((1, 1), 32, (at,))
    torch.cuda.synchronize()  # before the pinned memory goes


def read_bandwidth(card: Card) -> None:
    """Words that are no multiple of what the grid reads at once."""
    source = build.KernelSource("read_bandwidth.cuh", "read_bandwidth_kernel")
    binary = build.load_or_compile(source, capability(card.device), build.default_cache())
    kernel = Kernel(binary, "PqIP", device=card.device)
    output = card.put(torch.zeros(1, dtype=torch.int32))
    for num_words in (1, 512 * 8 * 3 + 5):
        data = card.put(torch.zeros(4 * num_words, dtype=torch.int32))
        kernel.launch((3, 1), 512, (data.data_ptr(), num_words, 77, output.data_ptr()))


CASES: dict[str, Callable[[Card], None]] = {
    "embedding.cuh": embedding,
    "handoff.cuh": handoff,
    "paged_decode.cuh": paged_decode,
    "paged_prefill.cuh": paged_prefill,
    "paged_prefill_wgmma.cuh": paged_prefill_wgmma,
    "qk_norm_rope_store_kv.cuh": qk_norm_rope_store_kv,
    "read_bandwidth.cuh": read_bandwidth,
    "rms_norm.cuh": rms_norm,
    "sampling.cuh": sampling,
    "skinny_linear.cuh": skinny_linear,
    "step.cuh": step,
    "swiglu.cuh": swiglu,
    "top_logprobs.cuh": top_logprobs,
}
"""File of ``csrc/`` -> what launches its kernels."""
ONLY_ON = {"paged_prefill_wgmma.cuh": 90}
"""Compute capability, times ten, of the only cards that have what a file's kernels need."""


def no_case(card: Card) -> None:
    """Of a file that is not among ``CASES``: none of its kernels is launched."""


def attend(
    card: Card,
    lens: Sequence[tuple[int, int]],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int = BLOCK_SIZE,
    attention: PagedAttention | None = None,
) -> None:
    """Attention of rows of so many new tokens over contexts, in blocks of no order. A context of 0
    is padding; row r has table R - 1 - r.

    Blocks that no row has are uninitialised, and so is the rest of a block behind a row's last
    tile.
    """
    query_lens, contexts = zip(*lens, strict=True)
    blocks_of = [-(-context_len // block_size) for context_len in contexts]
    order = card.order(sum(blocks_of) + NUM_FREE_BLOCKS)
    tables = torch.full((len(lens), max(1, *blocks_of)), -1, dtype=torch.int32)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    k_cache, v_cache = card.empty(*shape), card.empty(*shape)
    filling = torch.randn(shape[1:]).bfloat16()
    for row, blocks in enumerate(torch.split(order[: sum(blocks_of)], blocks_of)):
        tables[len(lens) - 1 - row, : len(blocks)] = blocks
        for index, block in enumerate(blocks.tolist()):
            used = min(block_size, -(-contexts[row] // TILE) * TILE - index * block_size)
            for cache in (k_cache, v_cache):
                cache[block, :used].copy_(filling[:used])

    def numbers(values: Iterable[int]) -> Tensor:
        return card.put(torch.tensor(list(values), dtype=torch.int32))

    num_tokens = sum(query_lens)
    rows = PagedRows(
        block_tables=card.put(tables),
        table_rows=numbers(reversed(range(len(lens)))),
        context_lens=numbers(contexts),
        decode_lens=numbers(n if query_len == 1 else 0 for query_len, n in lens),
        cu_seqlens_q=numbers([0, *itertools.accumulate(query_lens)]),
        num_tokens=num_tokens,
        max_query_len=max(query_lens),
        block_size=block_size,
        dtype=torch.bfloat16,
    )
    query = card.random(num_tokens, num_heads, head_dim)
    attention = attention or PagedAttention(card.kernels)
    attention(query, k_cache, v_cache, rows, head_dim**-0.5)


# ------------------------------------------------------------------------------------
# all of them


def kernels_in(text: str) -> list[str]:
    """Names of the kernels that a source defines; all end in ``_kernel``."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
    return re.findall(r"__global__[^;{]*?(\w+_kernel)\s*\(", text)


def kernels_by_file(folder: Path = build.SOURCES) -> dict[str, list[str]]:
    """Every file of ``folder`` that defines kernels, and their names."""
    found = {path.name: kernels_in(path.read_text("ascii")) for path in folder.glob("*.cuh")}
    return {file: names for file, names in sorted(found.items()) if names}


def not_launched(symbols: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of ``names`` that are the kernel of none of the mangled ``symbols``."""
    launched = {name for name in names for symbol in symbols if f"{len(name)}{name}" in symbol}
    return [name for name in names if name not in launched]


def launch_all(files: Sequence[str], launches: Counter[str]) -> Iterator[str]:
    """Run the cases of ``files``; yields what went wrong and goes on.

    ``launches`` is counted up by whoever watches ``Kernel.launch``.
    """
    card = Card()
    for file in files:
        if ONLY_ON.get(file, card.kernels.architecture) != card.kernels.architecture:
            continue
        try:
            CASES.get(file, no_case)(card)
            torch.cuda.synchronize()
        except Exception:  # noqa: BLE001  whatever it is, the next file has its turn
            yield f"{file}: {traceback.format_exc()}"
        for name in not_launched(list(launches), kernels_by_file()[file]):
            yield f"{file}: no case in scripts/sanitize_kernels.py launches {name}"


def count_launches() -> Counter[str]:
    """From now on, launches by mangled name."""
    launches: Counter[str] = Counter()
    launch = Kernel.launch

    def counted(self: Kernel, *arguments: Any, **options: Any) -> None:
        launches[self._name] += 1
        launch(self, *arguments, **options)

    Kernel.launch = counted  # type: ignore[method-assign]
    return launches


def main() -> int:
    """0 if every kernel was launched and nothing was raised."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="of csrc/; all if none is given")
    parser.add_argument("--report", type=Path, help="JSON with what was launched, in numbers")
    options = parser.parse_args()
    # Read at the first allocation: an access just beyond a tensor must be one beyond all memory.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    files = options.files or sorted(kernels_by_file())
    launches = count_launches()
    problems = list(launch_all(files, launches))
    for problem in problems:
        print(problem, file=sys.stderr)
    by_file = kernels_by_file()
    report = {
        "files": len(files),
        "kernels": sum(len(by_file[file]) for file in files),
        "instances": len(launches),
        "launches": launches.total(),
    }
    if options.report:
        options.report.write_text(json.dumps(report) + "\n")
    print(", ".join(f"{number} {name}" for name, number in report.items()))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
