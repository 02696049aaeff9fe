"""paged_attention: every token alone, in double, over a cache that holds NaN where unused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import Ops, PagedRows
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.paged_attention import PagedAttention
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal, assert_close, attention_tolerance

NUM_FREE_BLOCKS = 3
"""Blocks of the cache that no row has."""
SCALE = 0.3

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


DECODES = {
    "no-row-but-padding": [(1, 0), (1, 5), (1, 0), (1, 0), (1, 40), (1, 0)],
    "one-long": [(1, 32768)],
    "long-among-short": [(1, 17), (1, 9000), (1, 1), (1, 16), (1, 20000), (1, 3)],
    "many": [(1, 1 + 37 * row % 701) for row in range(300)],
}
"""Steps that only a kernel for decodes must take: padding, and rows that many blocks share."""


PREFIXES = (0, 1, 15, 16, 17, 511)
CHUNKS = {
    "of-every-length": [
        (query_len, query_len + PREFIXES[index % len(PREFIXES)])
        for index, query_len in enumerate(
            (2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 2, 65)
        )
    ],
    "after-every-prefix": [(33, 33 + prefix) for prefix in PREFIXES],
    "two-tokens-far-on": [(2, 30002)],
    "a-few-tokens-far-on": [(64, 30064)],
    "many-tokens-far-on": [(1000, 31000), (1, 700)],
    "short-beside-long": [(1, 20), (700, 9000), (2, 2), (1, 1), (3, 500), (1, 5000), (17, 17)],
    "more-tiles-than-can-be-shared": [(1000 + row, 1000 + 2 * row) for row in range(40)],
}
"""Steps with chunks of prompts. Where tiles are few, thread blocks share them."""


@dataclasses.dataclass
class Case:
    query: Tensor
    k_cache: Tensor
    v_cache: Tensor
    rows: PagedRows
    expected: Tensor

    def run(self, ops: Ops) -> Tensor:
        return ops.paged_attention(self.query, self.k_cache, self.v_cache, self.rows, scale=SCALE)


def make_case(
    rows: list[tuple[int, int]],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Case:
    generator = torch.Generator().manual_seed(len(rows) + rows[0][1])
    num_tokens = sum(query_len for query_len, _ in rows)
    query = torch.randn(num_tokens, num_heads, head_dim, generator=generator)
    query = query.mul(8 * head_dim**-0.5).to(dtype)
    blocks_of = [-(-context_len // block_size) for _, context_len in rows]
    num_blocks = sum(blocks_of) + NUM_FREE_BLOCKS
    shape = (num_blocks, block_size, num_kv_heads, head_dim)
    k_cache = torch.full(shape, float("nan"), dtype=dtype)
    v_cache = torch.full(shape, float("nan"), dtype=dtype)
    free = torch.randperm(num_blocks, generator=generator).tolist()
    block_tables = torch.full((len(rows), max(blocks_of) + 2), -1, dtype=torch.int32)
    expected, token = torch.zeros(query.shape, dtype=torch.float64), 0
    for row, (query_len, context_len) in enumerate(rows):
        key = torch.randn(context_len, num_kv_heads, head_dim, generator=generator).to(dtype)
        value = torch.randn(context_len, num_kv_heads, head_dim, generator=generator).to(dtype)
        for index in range(blocks_of[row]):
            block_tables[row, index] = block = free.pop()
            part = slice(index * block_size, (index + 1) * block_size)
            k_cache[block, : len(key[part])] = key[part]
            v_cache[block, : len(value[part])] = value[part]
        tokens = slice(token, token + query_len)
        if context_len:
            expected[tokens] = attend(*(x.to(device) for x in (query[tokens], key, value))).cpu()
        token += query_len
    lens = torch.tensor([0] + [query_len for query_len, _ in rows])
    paged_rows = PagedRows(
        block_tables=block_tables.to(device),
        context_lens=torch.tensor([n for _, n in rows], dtype=torch.int32, device=device),
        cu_seqlens_q=lens.cumsum(0).int().to(device),
        num_tokens=num_tokens,
        max_query_len=int(lens.max()),
        block_size=block_size,
        dtype=dtype,
    )
    return Case(query.to(device), k_cache.to(device), v_cache.to(device), paged_rows, expected)


def as_in_a_graph(case: Case, *, num_rows: int, num_tokens: int) -> Case:
    """The same step padded to a shape: rows have tables of slots, in any order, among others that
    hold nonsense."""
    rows, device = case.rows, case.query.device
    count = len(rows.context_lens)
    tables = rows.block_tables.cpu()
    num_slots = num_rows + 3
    slots = torch.randperm(num_slots, generator=torch.Generator().manual_seed(count))[:num_rows]
    all_tables = torch.full((num_slots, tables.shape[1] + 5), 2**30, dtype=torch.int32)
    all_tables[slots[:count], : tables.shape[1]] = tables

    def padded(tensor: Tensor, length: int, value: int) -> Tensor:
        return torch.cat(
            [tensor.cpu(), tensor.new_full((length - len(tensor),), value, device="cpu")]
        )

    query_lens = rows.cu_seqlens_q.diff()
    query = case.query.new_full((num_tokens, *case.query.shape[1:]), float("nan"))
    query[: len(case.query)] = case.query
    expected = case.expected.new_zeros(query.shape)
    expected[: len(case.query)] = case.expected
    return dataclasses.replace(
        case,
        query=query,
        expected=expected,
        rows=dataclasses.replace(
            rows,
            block_tables=all_tables.to(device),
            table_rows=slots.int().to(device),
            context_lens=padded(rows.context_lens, num_rows, 0).to(device),
            decode_lens=padded(torch.where(query_lens == 1, rows.context_lens, 0), num_rows, 0).to(
                device
            ),
            cu_seqlens_q=padded(rows.cu_seqlens_q, num_rows + 1, int(rows.cu_seqlens_q[-1])).to(
                device
            ),
            num_tokens=num_tokens,
            max_query_len=num_tokens,
        ),
    )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last tokens [Q, H, d] of a context [L, K, d]; a loop over heads that a reader can check
    by eye."""
    group_size = query.shape[1] // key.shape[1]
    output = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    position = torch.arange(len(key), device=query.device)
    is_hidden = position > position[len(key) - len(query) :, None]  # [Q, L]
    for head in range(query.shape[1]):
        kv_head = head // group_size
        scores = query[:, head].double() @ key[:, kv_head].double().T * SCALE
        scores = scores.masked_fill(is_hidden, -float("inf"))
        output[:, head] = scores.softmax(-1) @ value[:, kv_head].double()
    return output


def assert_attends(output: Tensor, case: Case, rows: list[tuple[int, int]]) -> None:
    assert output.shape == case.query.shape
    assert output.dtype == case.query.dtype
    longest = max(context_len for _, context_len in rows)
    is_row = torch.tensor([n > 0 for query_len, n in rows for _ in range(query_len)])
    tolerance = attention_tolerance(output.dtype, longest)
    assert_close(output.cpu()[is_row], case.expected[is_row], tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("rows", ROWS)
def test_attends_to_the_context_up_to_each_token(
    rows: str, head_dim: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    case = make_case(ROWS[rows], head_dim=head_dim, dtype=dtype, device=device)
    assert_attends(case.run(ops), case, ROWS[rows])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", DECODES)
def test_decodes_of_any_mix_of_lengths(rows: str, head_dim: int) -> None:
    ops, device = open_backend("cuda")
    case = make_case(DECODES[rows], head_dim=head_dim, dtype=torch.bfloat16, device=device)
    first = case.run(ops)
    assert_attends(first, case, DECODES[rows])
    is_row = case.rows.context_lens > 0
    for _ in range(20):  # whichever block comes last, and with counters used before
        assert_bitwise_equal(case.run(ops)[is_row], first[is_row], "the same again")


def prefill_kernels(monkeypatch: pytest.MonkeyPatch, *, has_wgmma: bool) -> Ops:
    """CUDA kernels, of which that for chunks is the one of cards that have wgmma, or the other."""
    from ember_pp.kernels.cuda_ops import CudaOps

    device = torch.device("cuda", 0)
    backend = CudaOps(device)
    if has_wgmma and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("not on this card")
    attention = PagedAttention(KernelSet(device), has_wgmma=has_wgmma)
    monkeypatch.setattr(backend, "_attention", attention)
    monkeypatch.setattr("ember_pp.kernels.reference.paged_attention", None)  # is not to be asked
    return Ops(backend)


@pytest.mark.gpu
@pytest.mark.parametrize("has_wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", CHUNKS)
def test_chunks_of_any_length_after_any_prefix(
    rows: str, head_dim: int, has_wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = prefill_kernels(monkeypatch, has_wgmma=has_wgmma)
    case = make_case(CHUNKS[rows], head_dim=head_dim, dtype=torch.bfloat16, device="cuda:0")
    first = case.run(ops)
    assert_attends(first, case, CHUNKS[rows])
    for _ in range(10):  # whichever block comes last, and with counters used before
        assert_bitwise_equal(case.run(ops), first, "the same again")


@pytest.mark.gpu
@pytest.mark.parametrize("has_wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 6, 7, 8])
def test_query_heads_of_a_chunk_share_kv_heads_in_order(
    group_size: int, has_wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = prefill_kernels(monkeypatch, has_wgmma=has_wgmma)
    rows, heads = [(130, 130), (70, 300), (5, 40)], {"num_heads": 3 * group_size, "num_kv_heads": 3}
    case = make_case(rows, **heads, head_dim=128, dtype=torch.bfloat16, device="cuda:0")
    assert_attends(case.run(ops), case, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("has_wgmma", [False, True], ids=["mma", "wgmma"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_chunks_lie_in_blocks_of_any_size_that_has_a_kernel(
    block_size: int, has_wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = prefill_kernels(monkeypatch, has_wgmma=has_wgmma)
    rows = [(100, 700), (256, 256), (257, 513), (1, 90)]
    case = make_case(
        rows, block_size=block_size, head_dim=128, dtype=torch.bfloat16, device="cuda:0"
    )
    assert_attends(case.run(ops), case, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("has_wgmma", [False, True], ids=["mma", "wgmma"])
def test_a_captured_step_takes_what_its_tensors_hold(
    has_wgmma: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One graph for steps of other lengths, tables and rows, with padding of both kinds."""
    ops = prefill_kernels(monkeypatch, has_wgmma=has_wgmma)
    num_rows, num_tokens = 12, 1200
    steps = [
        [(1, 600), (1, 20), (1000, 1500)],
        [(1, 5)] * 12,
        [(2, 2), (3, 1003), (100, 100)],
        [(100 - row, 101) for row in range(12)],
        [(1, 1)],
        [(300, 300)] * 4,
    ]
    cases = [
        as_in_a_graph(
            make_case(rows, head_dim=128, dtype=torch.bfloat16, device="cuda:0"),
            num_rows=num_rows,
            num_tokens=num_tokens,
        )
        for rows in steps
    ]
    num_blocks = max(len(case.k_cache) for case in cases)
    width = max(case.rows.block_tables.shape[1] for case in cases)
    names = ("table_rows", "context_lens", "decode_lens", "cu_seqlens_q")
    static = dataclasses.replace(
        cases[0],
        query=torch.zeros_like(cases[0].query),
        k_cache=cases[0].k_cache.new_zeros((num_blocks, *cases[0].k_cache.shape[1:])),
        v_cache=cases[0].v_cache.new_zeros((num_blocks, *cases[0].v_cache.shape[1:])),
        rows=dataclasses.replace(
            cases[0].rows,
            block_tables=cases[0].rows.block_tables.new_zeros((num_rows + 3, width)),
            **{name: torch.zeros_like(getattr(cases[0].rows, name)) for name in names},
        ),
    )

    def load(case: Case) -> None:
        static.query.copy_(case.query)
        static.k_cache[: len(case.k_cache)] = case.k_cache
        static.v_cache[: len(case.v_cache)] = case.v_cache
        static.rows.block_tables[:, : case.rows.block_tables.shape[1]] = case.rows.block_tables
        for name in names:
            getattr(static.rows, name).copy_(getattr(case.rows, name))

    load(cases[0])
    static.run(ops)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = static.run(ops)
    for case, rows in zip([*cases, *reversed(cases)], [*steps, *reversed(steps)], strict=True):
        load(case)
        output.fill_(float("nan"))
        graph.replay()
        count = sum(query_len for query_len, _ in rows)
        tolerance = attention_tolerance(torch.bfloat16, max(n for _, n in rows))
        assert_close(output[:count], case.expected[:count], tolerance, str(rows))
        assert bool(output[count:].isnan().all()), "padding was written"


@pytest.mark.gpu
def test_a_graph_is_possible_where_there_are_kernels() -> None:
    ops = open_backend("cuda")[0]
    assert ops.captures_attention(torch.bfloat16, 128, 4, 16)
    assert not ops.captures_attention(torch.float32, 128, 4, 16)
    assert not ops.captures_attention(torch.bfloat16, 96, 4, 16)
    assert not ops.captures_attention(torch.bfloat16, 128, 16, 16)
    assert not ops.captures_attention(torch.bfloat16, 128, 4, 48)
    assert not cpu_ops().captures_attention(torch.bfloat16, 128, 4, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(4, 4), (4, 1), (12, 3), (16, 8), (40, 8), (64, 8), (32, 16), (10, 2), (7, 1), (22, 11)],
)
def test_query_heads_share_kv_heads_in_order(
    num_heads: int, num_kv_heads: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    rows = [(1, 20), (1, 500), (1, 33), (1, 1)]
    case = make_case(
        rows,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=64,
        dtype=torch.bfloat16,
        device=device,
    )
    assert_attends(case.run(ops), case, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48, 64, 128, 256])
def test_blocks_may_have_any_size(block_size: int, backend: str) -> None:
    ops, device = open_backend(backend)
    rows = [(1, 20), (1, 700), (1, 256), (1, 257), (1, 1)]
    case = make_case(rows, block_size=block_size, head_dim=128, dtype=torch.bfloat16, device=device)
    assert_attends(case.run(ops), case, rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_queries_give_the_same_bits(backend: str) -> None:
    """Queries may be views into the fused projection."""
    ops, device = open_backend(backend)
    case = make_case(ROWS["mixed"], device=device)
    wide = torch.cat([case.query, torch.full_like(case.query, float("nan"))], dim=1)
    view = wide[:, : case.query.shape[1]]
    assert not view.is_contiguous()
    assert_bitwise_equal(dataclasses.replace(case, query=view).run(ops), case.run(ops))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_and_lengths_may_lie_apart(backend: str) -> None:
    ops, device = open_backend(backend)
    rows = [(1, 20), (1, 300), (1, 33)]
    case = make_case(rows, head_dim=64, dtype=torch.bfloat16, device=device)
    apart = dataclasses.replace(
        case.rows,
        context_lens=torch.stack([case.rows.context_lens] * 2, 1)[:, 0],
        block_tables=case.rows.block_tables.t().contiguous().t(),
    )
    assert not apart.block_tables.is_contiguous()
    assert_bitwise_equal(dataclasses.replace(case, rows=apart).run(ops), case.run(ops))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize(
    "rows", ["one-token-alone", "fresh-prompt", "decodes-of-one-length", "mixed"]
)
def test_a_padded_step_gives_its_rows_the_same(rows: str, head_dim: int, backend: str) -> None:
    ops, device = open_backend(backend)
    case = make_case(ROWS[rows], head_dim=head_dim, dtype=torch.bfloat16, device=device)
    num_tokens = len(case.query)
    padded = as_in_a_graph(case, num_rows=len(ROWS[rows]) + 5, num_tokens=num_tokens + 40)
    tolerance = attention_tolerance(torch.bfloat16, max(n for _, n in ROWS[rows]))
    assert_close(padded.run(ops)[:num_tokens], case.expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_padding_alone_reads_nothing(backend: str) -> None:
    ops, device = open_backend(backend)
    case = make_case([(1, 1)], head_dim=128, dtype=torch.bfloat16, device=device)
    empty = dataclasses.replace(
        case.rows,
        context_lens=torch.zeros_like(case.rows.context_lens),
        cu_seqlens_q=torch.zeros_like(case.rows.cu_seqlens_q),
    )
    padded = as_in_a_graph(dataclasses.replace(case, rows=empty), num_rows=3, num_tokens=7)
    assert padded.run(ops).shape == (7, 6, 128)


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
        ({"v_cache": torch.zeros(8, 16, 2, 16)}, r"v_cache: expected \[4, 16, 2, 16\]"),
    ],
    ids=["query-2d", "query-heads", "query-tokens", "k-width", "k-dtype", "v-shape"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    case = dataclasses.replace(make_case(ROWS["one-token-alone"]), **change)
    with pytest.raises(KernelArgumentError, match=message):
        case.run(cpu_ops())
