"""qkv_attention: from projections to attention, with the newest keys and values stored; all else in
the caches that a step must not read is NaN.

Heads are normed and turned by complex numbers in double, and each row attends alone, in double.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import Ops, PagedRows, RopeRows, reference
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import (
    assert_bitwise_equal,
    assert_close,
    attention_tolerance,
    sum_tolerance,
)

EPS, SCALE = 1e-6, 0.2
NUM_FREE_BLOCKS = 3
"""Blocks of the cache that no row has."""

# (new tokens, context) of each row; a context of 0 is padding
DECODES = {
    "first-token-alone": [(1, 1)],
    "around-a-tile": [(1, n) for n in (1, 2, 15, 16, 17, 31, 32, 33)],
    "no-row-but-padding": [(1, 0), (1, 5), (1, 0), (1, 0), (1, 40), (1, 0)],
    "near-and-far": [(1, 3), (1, 700), (1, 5), (1, 130), (1, 129), (1, 128), (1, 127)],
    "more-than-few": [(1, 1 + 7 * row) for row in range(40)],
}
LARGE = {
    "one-of-256": [(1, 256)],
    "one-of-2048": [(1, 2048)],
    "one-long": [(1, 32768)],
    "sixteen-alike": [(1, 640)] * 16,
    "long-among-short": [(1, 17), (1, 9000), (1, 1), (1, 16), (1, 20000), (1, 3)],
    "twenty-of-any-length": [(1, 1 + 397 * row * row % 5000) for row in range(20)],
    "many": [(1, 1 + 37 * row % 701) for row in range(300)],
}
"""Rows that many thread blocks share, and rows that do without."""
MIXED = {
    "chunks-and-decodes": [(1, 20), (15, 15), (1, 300), (16, 80), (1, 1)],
    "a-prompt": [(37, 37)],
}


@dataclasses.dataclass
class Case:
    arguments: dict[str, Any]
    lens: list[tuple[int, int]]
    expected: Tensor  # [T, H, d] float64
    key: Tensor  # [T, K, d] float64
    value: Tensor  # [T, K, d]

    def run(self, ops: Ops) -> Tensor:
        return ops.qkv_attention(**self.arguments)

    def caches(self) -> tuple[Tensor, Tensor]:
        return self.arguments["k_cache"], self.arguments["v_cache"]

    def tokens(self) -> Tensor:
        """[T] whether a token belongs to a row with a context."""
        return torch.tensor([n > 0 for count, n in self.lens for _ in range(count)])


def turned(heads: Tensor, weight: Tensor | None, angles: Tensor) -> Tensor:
    """[T, heads, d] in double, of the dtype's numbers: norm, then dimension i and i + d / 2 as one
    complex number by [T, d / 2] angles."""
    exact = heads.double()
    if weight is not None:
        normed = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
        exact = (normed.to(heads.dtype) * weight).double()
    real, imaginary = exact.chunk(2, dim=-1)
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([product.real, product.imag], dim=-1).to(heads.dtype).double()


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The last tokens [Q, H, d] of a context [L, K, d], a head at a time."""
    output = torch.empty_like(query)
    position = torch.arange(len(key), device=query.device)
    is_hidden = position > position[len(key) - len(query) :, None]
    for head in range(query.shape[1]):
        kv_head = head * key.shape[1] // query.shape[1]
        scores = query[:, head] @ key[:, kv_head].T * SCALE
        output[:, head] = scores.masked_fill(is_hidden, -torch.inf).softmax(-1) @ value[:, kv_head]
    return output


def make_case(
    lens: list[tuple[int, int]],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    has_norm: bool = True,
    has_bias: bool = False,
) -> Case:
    generator = torch.Generator().manual_seed(len(lens) + lens[0][1])

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    num_tokens, longest = sum(count for count, _ in lens), max(n for _, n in lens)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv, bias = draw(num_tokens, width), draw(width) if has_bias else None
    weight = draw(num_heads + num_kv_heads, head_dim) if has_norm else None
    angles = torch.rand(longest + 3, head_dim // 2, generator=generator).double() * 6
    positions = torch.tensor([max(n - count, 0) + i for count, n in lens for i in range(count)])
    heads = (qkv if bias is None else (qkv.double() + bias.double()).to(dtype)).view(
        num_tokens, num_heads + 2 * num_kv_heads, head_dim
    )
    query_key, value = heads.split([num_heads + num_kv_heads, num_kv_heads], 1)
    query, key = turned(query_key, weight, angles[positions]).split([num_heads, num_kv_heads], 1)

    blocks_of = [-(-n // block_size) for _, n in lens]
    num_blocks = sum(blocks_of) + NUM_FREE_BLOCKS
    k_cache = torch.full((num_blocks, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    free = torch.randperm(num_blocks, generator=generator).tolist()
    tables = torch.full((len(lens), max(blocks_of) + 2), -1, dtype=torch.int32)
    slots, expected = torch.full((num_tokens,), -1), torch.zeros_like(query)
    first = 0
    for row, (count, n) in enumerate(lens):
        tables[row, : blocks_of[row]] = torch.tensor(free[: blocks_of[row]], dtype=torch.int32)
        free = free[blocks_of[row] :]
        tokens = slice(first, first + count)
        first += count
        if not n:
            continue
        place = torch.arange(n)
        slot = tables[row].long()[place // block_size] * block_size + place % block_size
        old = slot[: n - count]
        for cache in (k_cache, v_cache):
            cache.flatten(0, 1)[old] = draw(len(old), num_kv_heads, head_dim)
        slots[tokens] = slot[n - count :]
        rows = (
            torch.cat([cache.flatten(0, 1)[old].double(), new[tokens].double()]).to(device)
            for cache, new in ((k_cache, key), (v_cache, value))
        )
        expected[tokens] = attend(query[tokens].to(device), *rows).cpu()

    def put(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    starts = torch.tensor([0] + [count for count, _ in lens]).cumsum(0)
    arguments = {
        "qkv": put(qkv),
        "bias": put(bias),
        "norm_weight": put(weight),
        "rope": RopeRows(
            torch.cat([angles.cos(), angles.sin()], -1).float().to(device), positions.to(device)
        ),
        "k_cache": put(k_cache),
        "v_cache": put(v_cache),
        "slot_mapping": put(slots),
        "rows": PagedRows(
            block_tables=tables.to(device),
            context_lens=torch.tensor([n for _, n in lens], dtype=torch.int32, device=device),
            cu_seqlens_q=starts.int().to(device),
            num_tokens=num_tokens,
            max_query_len=max(count for count, _ in lens),
            block_size=block_size,
            dtype=dtype,
        ),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "eps": EPS,
        "scale": SCALE,
    }
    return Case(arguments, lens, expected, key, value)


def assert_right(case: Case, output: Tensor, before: tuple[Tensor, Tensor]) -> None:
    """``before``: copies of the caches."""
    is_row = case.tokens()
    longest = max(n for _, n in case.lens)
    dtype, head_dim = output.dtype, output.shape[2]
    assert output.shape == case.expected.shape
    tolerance = attention_tolerance(dtype, longest)
    assert_close(output.cpu()[is_row], case.expected[is_row], tolerance)
    slots = case.arguments["slot_mapping"].cpu()[is_row]
    new = [cache.flatten(0, 1).cpu()[slots] for cache in case.caches()]
    assert_close(new[0], case.key[is_row], sum_tolerance(dtype, head_dim), "key")
    assert_bitwise_equal(new[1], case.value[is_row], "value")
    for name, cache, old in zip(("k_cache", "v_cache"), case.caches(), before, strict=True):
        old = old.flatten(0, 1).cpu()
        old[slots] = cache.flatten(0, 1).cpu()[slots]
        assert_bitwise_equal(cache.flatten(0, 1).cpu(), old, f"{name}: other slots")


def check(ops: Ops, case: Case, *, repeats: int = 0) -> None:
    before = tuple(cache.clone() for cache in case.caches())
    first = case.run(ops)
    assert_right(case, first, before)
    stored = tuple(cache.clone() for cache in case.caches())
    is_row = case.tokens().to(first.device)
    for _ in range(repeats):  # whichever block comes last, and with counters used before
        assert_bitwise_equal(case.run(ops)[is_row], first[is_row], "the same again")
    for cache, expected in zip(case.caches(), stored, strict=True):
        assert_bitwise_equal(cache, expected, "what was stored, again")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", DECODES)
def test_decodes(rows: str, head_dim: int, has_norm: bool, has_bias: bool, backend: str) -> None:
    ops, device = open_backend(backend)
    case = make_case(
        DECODES[rows], head_dim=head_dim, device=device, has_norm=has_norm, has_bias=has_bias
    )
    check(ops, case)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("rows", LARGE)
def test_decodes_that_blocks_share(rows: str, head_dim: int) -> None:
    ops, device = open_backend("cuda")
    check(ops, make_case(LARGE[rows], head_dim=head_dim, device=device), repeats=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", MIXED)
def test_chunks_of_prompts(rows: str, backend: str) -> None:
    ops, device = open_backend(backend)
    check(ops, make_case(MIXED[rows], device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"),
    [(torch.float32, 64, 16), (torch.bfloat16, 96, 16), (torch.bfloat16, 64, 24)],
    ids=["fp32", "other-head-size", "other-block-size"],
)
def test_what_no_single_kernel_fits(
    dtype: torch.dtype, head_dim: int, block_size: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    lens = [(1, 20), (1, 1), (1, 100)]
    case = make_case(lens, dtype=dtype, head_dim=head_dim, block_size=block_size, device=device)
    check(ops, case)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_rows", [3, 40], ids=["few", "many"])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"),
    [(4, 4), (4, 1), (12, 3), (16, 8), (40, 8), (64, 8), (32, 16), (10, 2), (7, 1), (22, 11)],
)
def test_query_heads_share_kv_heads_in_order(
    num_heads: int, num_kv_heads: int, num_rows: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    lens = [(1, 20 + 9 * row) for row in range(num_rows)]
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    check(ops, make_case(lens, **heads, head_dim=128, device=device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_blocks_may_have_any_size(block_size: int, backend: str) -> None:
    ops, device = open_backend(backend)
    lens = [(1, 20), (1, 700), (1, 256), (1, 257), (1, 1)]
    check(ops, make_case(lens, block_size=block_size, head_dim=128, device=device))


@pytest.mark.gpu
def test_decodes_take_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """And never the reference."""
    from ember_pp.kernels.launch import Kernel

    ops, device = open_backend("cuda")
    case = make_case(DECODES["near-and-far"], device=device)
    case.run(ops)
    launched = []
    launch = Kernel.launch

    def counted(self: Kernel, *arguments: Any, **options: Any) -> None:
        launched.append(self._name)
        launch(self, *arguments, **options)

    monkeypatch.setattr(Kernel, "launch", counted)
    monkeypatch.setattr(reference, "paged_attention", None)
    case.run(ops)
    assert len(launched) == 1
    assert "paged_decode_kernel" in launched[0]


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [5, 48], ids=["few", "many"])
def test_a_captured_step_takes_what_its_tensors_hold(num_rows: int) -> None:
    """One graph, for rows of other lengths with other tables, padded."""
    ops, device = open_backend("cuda")
    shapes = [
        [(1, 1 + 13 * row) for row in range(num_rows - 1)],
        [(1, 5)] * num_rows,
        [(1, 9000), (1, 3)],
        [(1, 1)],
        [(1, 300)] * 4,
    ]
    cases = [make_case(lens, head_dim=128, device=device) for lens in shapes]
    padded = [
        make_case(lens + [(1, 0)] * (num_rows - len(lens)), head_dim=128, device=device)
        for lens in shapes
    ]
    names = ("block_tables", "context_lens", "cu_seqlens_q")
    width = max(case.arguments["rows"].block_tables.shape[1] for case in padded)
    positions = max(len(case.arguments["rope"].table) for case in padded)
    num_blocks = max(len(case.caches()[0]) for case in padded)
    first = padded[0].arguments
    static = dict(first)
    static["qkv"] = torch.zeros_like(first["qkv"])
    static["norm_weight"] = torch.zeros_like(first["norm_weight"])
    static["rope"] = RopeRows(
        torch.zeros((positions, 128), device=device), first["rope"].positions.clone()
    )
    for name in ("k_cache", "v_cache"):
        static[name] = torch.zeros((num_blocks, *first[name].shape[1:]), device=device).bfloat16()
    static["rows"] = dataclasses.replace(
        first["rows"],
        block_tables=torch.zeros((num_rows + 3, width), dtype=torch.int32, device=device),
        table_rows=torch.arange(num_rows - 1, -1, -1, dtype=torch.int32, device=device),
        context_lens=torch.zeros_like(first["rows"].context_lens),
        cu_seqlens_q=torch.zeros_like(first["rows"].cu_seqlens_q),
    )
    ops.qkv_attention(**static)  # of padding alone
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.qkv_attention(**static)
    del cases
    for case in [*padded, *reversed(padded)]:
        taken = case.arguments
        static["qkv"].copy_(taken["qkv"])
        static["norm_weight"].copy_(taken["norm_weight"])
        static["rope"].table[: len(taken["rope"].table)] = taken["rope"].table
        for name in ("k_cache", "v_cache"):
            static[name].fill_(torch.nan)
            static[name][: len(taken[name])] = taken[name]
        for name in names:
            target, source = getattr(static["rows"], name), getattr(taken["rows"], name)
            if name == "block_tables":
                target.fill_(2**30)
                target[:num_rows, : source.shape[1]] = source.flip(0)
            else:
                target.copy_(source)
        output.fill_(torch.nan)
        graph.replay()
        is_row = case.tokens()
        tolerance = attention_tolerance(torch.bfloat16, max(n for _, n in case.lens))
        assert_close(output.cpu()[is_row], case.expected[is_row], tolerance, str(case.lens[:3]))
        assert bool(output.cpu()[~is_row].isnan().all()), "padding was written"
        slots = taken["slot_mapping"].cpu()[is_row]
        value = static["v_cache"].flatten(0, 1).cpu()[slots]
        assert_bitwise_equal(value, case.value[is_row], "value")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(1, 639).bfloat16()}, r"qkv: expected \[T, \(6 \+ 2 \* 2\) \* d\]"),
        ({"qkv": torch.zeros(2, 640).bfloat16()}, r"rope.positions: expected \[2\], got \[1\]"),
        ({"slot_mapping": torch.zeros(1)}, r"slot_mapping: .*int64, got .*float32"),
        ({"v_cache": torch.zeros(8, 16, 2, 32).bfloat16()}, r"v_cache: expected"),
        ({"bias": torch.zeros(3).bfloat16()}, r"bias: expected \[640\], got \[3\]"),
    ],
    ids=["width", "tokens", "slots", "cache", "bias"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    case = make_case(DECODES["first-token-alone"])
    case.arguments |= change
    with pytest.raises(KernelArgumentError, match=message):
        case.run(cpu_ops())


def test_rejects_rows_of_another_step() -> None:
    case = make_case(DECODES["first-token-alone"])
    case.arguments["rows"] = dataclasses.replace(case.arguments["rows"], num_tokens=2)
    with pytest.raises(KernelArgumentError, match=r"rows: expected 1 tokens as in qkv, got 2"):
        case.run(cpu_ops())
