"""paged_attention: every token alone, in double, over a cache that holds NaN where unused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from conftest import BLOCK_SIZE
from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import paged_attention
from ember_pp.kernels.paged_rows import PagedRows
from numeric import assert_bitwise_equal, assert_close, sum_tolerance

HEAD_DIM, NUM_BLOCKS = 16, 128
SCALE = 0.3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]

# (new tokens, context) of each row
ROWS = {
    "one-token-alone": [(1, 1)],
    "decode-at-block-ends": [(1, n) for n in (1, 15, 16, 17, 31, 32, 33)],
    "decodes-of-one-length": [(1, 40), (1, 40), (1, 40)],
    "decodes-near-and-far": [(1, 3), (1, 700), (1, 5), (1, 130), (1, 129), (1, 128), (1, 127)],
    "fresh-prompt": [(37, 37)],
    "fresh-prompts-of-one-length": [(17, 17), (17, 17), (17, 17)],
    "chunk-after-prefix": [(16, 48)],
    "chunks-of-one-length": [(7, 7), (7, 30), (7, 200), (7, 16)],
    "mixed": [(1, 20), (1, 500), (1, 33), (1, 1), (15, 15), (16, 300), (1, 18), (29, 64), (15, 40)],
}


@dataclasses.dataclass
class Case:
    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: PagedRows
    expected: Tensor


def make_case(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(len(rows) + rows[0][1])
    num_tokens = sum(query_len for query_len, _ in rows)
    query = torch.randn(num_tokens, num_heads, HEAD_DIM, generator=generator).mul(2).to(dtype)
    shape = (NUM_BLOCKS, BLOCK_SIZE, num_kv_heads, HEAD_DIM)
    k_cache = torch.full(shape, float("nan"), dtype=dtype)
    v_cache = torch.full(shape, float("nan"), dtype=dtype)
    free = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    block_tables = torch.full((len(rows), 50), -1, dtype=torch.int32)
    expected, token = torch.empty(query.shape, dtype=torch.float64), 0
    for row, (query_len, context_len) in enumerate(rows):
        key = torch.randn(context_len, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
        value = torch.randn(context_len, num_kv_heads, HEAD_DIM, generator=generator).to(dtype)
        for index in range((context_len + BLOCK_SIZE - 1) // BLOCK_SIZE):
            block_tables[row, index] = block = free.pop()
            part = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
            k_cache[block, : len(key[part])] = key[part]
            v_cache[block, : len(value[part])] = value[part]
        for position in range(context_len - query_len, context_len):
            expected[token] = attend(query[token], key[: position + 1], value[: position + 1])
            token += 1
    lens = torch.tensor([0] + [query_len for query_len, _ in rows])
    paged_rows = PagedRows.build(
        block_tables.to(device),
        torch.tensor([context_len for _, context_len in rows], dtype=torch.int32, device=device),
        lens.cumsum(0).int().to(device),
        block_size=BLOCK_SIZE,
        dtype=dtype,
    )
    return Case(query.to(device), k_cache.to(device), v_cache.to(device), paged_rows, expected)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One token [H, d] over [L, K, d]; a loop over heads that a reader can check by eye."""
    group_size = query.shape[0] // key.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        kv_head = head // group_size
        scores = key[:, kv_head].double() @ query[head].double() * SCALE
        output[head] = scores.softmax(0) @ value[:, kv_head].double()
    return output


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", ROWS)
def test_attends_to_the_context_up_to_each_token(
    rows: str, dtype: torch.dtype, device: str
) -> None:
    case = make_case(ROWS[rows], dtype=dtype, device=device)

    output = paged_attention(case.query, case.k_cache, case.v_cache, case.rows, scale=SCALE)

    assert output.shape == case.query.shape
    assert output.dtype == dtype
    longest = max(context_len for _, context_len in ROWS[rows])
    assert_close(output, case.expected, sum_tolerance(dtype, longest) * 2)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (4, 1), (12, 3)])
def test_query_heads_share_kv_heads_in_order(num_heads: int, num_kv_heads: int) -> None:
    case = make_case(ROWS["mixed"], num_heads=num_heads, num_kv_heads=num_kv_heads)
    output = paged_attention(case.query, case.k_cache, case.v_cache, case.rows, scale=SCALE)
    assert_close(output, case.expected, sum_tolerance(torch.float32, 500) * 2)


def test_non_contiguous_queries_give_the_same_bits() -> None:
    """Queries are views into the fused projection."""
    case = make_case(ROWS["mixed"])
    wide = torch.cat([case.query, torch.full_like(case.query, float("nan"))], dim=1)
    view = wide[:, : case.query.shape[1]]
    assert not view.is_contiguous()

    outputs = [
        paged_attention(query, case.k_cache, case.v_cache, case.rows, scale=SCALE)
        for query in (case.query, view)
    ]

    assert_bitwise_equal(outputs[1], outputs[0])


def test_rows_of_like_shape_are_computed_together() -> None:
    """A plan of many decodes and many equal chunks takes few calls, whatever their order."""
    rows = [(1, 100), (8, 8), (1, 20), (8, 9), (1, 90), (8, 60), (1, 300), (1, 260)]
    groups = make_case(rows).rows.groups
    assert sorted((group.query_len, group.num_rows) for group in groups) == [(1, 2), (1, 3), (8, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 96)}, r"query: expected 3 dimensions"),
        ({"query": torch.zeros(1, 5, 16)}, r"query: expected a multiple of the cache's 2 heads"),
        ({"query": torch.zeros(2, 6, 16)}, r"rows: expected 2 tokens as in query, got 1"),
        ({"k_cache": torch.zeros(8, 16, 2, 8)}, r"k_cache: expected \[8, 16, 2, 16\]"),
        ({"k_cache": torch.zeros(8, 16, 2, 16).bfloat16()}, r"k_cache: expected dtype"),
        ({"v_cache": torch.zeros(8, 16, 2, 16)}, r"v_cache: expected \[128, 16, 2, 16\]"),
    ],
    ids=["query-2d", "query-heads", "query-tokens", "k-width", "k-dtype", "v-shape"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    case = make_case(ROWS["one-token-alone"])
    args = {"query": case.query, "k_cache": case.k_cache, "v_cache": case.v_cache} | change
    with pytest.raises(KernelArgumentError, match=message):
        paged_attention(**args, rows=case.rows, scale=SCALE)
