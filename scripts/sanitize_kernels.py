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

from ember_pp.kernels import Ops, PagedRows, RopeRows, build, make_ops
from ember_pp.kernels.launch import Kernel, capability

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
            attend(card, [1] * len(contexts), contexts, num_heads, num_kv_heads, head_dim)


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
    "paged_decode.cuh": paged_decode,
    "qk_norm_rope_store_kv.cuh": qk_norm_rope_store_kv,
    "read_bandwidth.cuh": read_bandwidth,
    "rms_norm.cuh": rms_norm,
    "swiglu.cuh": swiglu,
}
"""File of ``csrc/`` -> what launches its kernels."""


def no_case(card: Card) -> None:
    """Of a file that is not among ``CASES``: none of its kernels is launched."""


def attend(
    card: Card,
    query_lens: Sequence[int],
    contexts: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int = BLOCK_SIZE,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Attention of rows of new tokens over contexts, 0 for padding, in blocks of no order.

    Blocks that no row has are uninitialised, and so is the rest of a block behind a row's last
    tile.
    """
    blocks_of = [-(-context_len // block_size) for context_len in contexts]
    order = card.order(sum(blocks_of) + NUM_FREE_BLOCKS)
    tables = torch.full((len(contexts), max(1, *blocks_of)), -1, dtype=torch.int32)
    shape = (len(order), block_size, num_kv_heads, head_dim)
    caches = card.empty(*shape, dtype=dtype), card.empty(*shape, dtype=dtype)
    filling = torch.randn(shape[1:]).to(dtype)
    for row, blocks in enumerate(torch.split(order[: sum(blocks_of)], blocks_of)):
        tables[row, : len(blocks)] = blocks
        for index, block in enumerate(blocks.tolist()):
            used = min(block_size, -(-contexts[row] // TILE) * TILE - index * block_size)
            for cache in caches:
                cache[block, :used].copy_(filling[:used])
    num_tokens = sum(query_lens)
    rows = PagedRows(
        block_tables=card.put(tables),
        context_lens=card.put(torch.tensor(contexts, dtype=torch.int32)),
        cu_seqlens_q=card.put(torch.tensor([0, *itertools.accumulate(query_lens)]).int()),
        num_tokens=num_tokens,
        max_query_len=max(query_lens),
        block_size=block_size,
        dtype=dtype,
    )
    query = card.random(num_tokens, num_heads, head_dim, dtype=dtype)
    card.ops.paged_attention(query, *caches, rows, scale=head_dim**-0.5)


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
