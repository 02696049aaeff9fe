"""sample_tokens: the draws of ``sampling``, row by row; ties, padding, broken rows, capture."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import Ops, device_sampling, make_ops, sampling
from ember_pp.kernels.slot_params import DrawSettings, SlotParams
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import DRAWS_DIFFERING, assert_nearly_tied

DTYPES = [torch.float32, torch.bfloat16]
CUDA_ONLY = [pytest.param("cuda", marks=pytest.mark.gpu)]


def make_logits(
    num_rows: int, vocab_size: int, dtype: torch.dtype, *, seed: int = 0, spread: float = 3.0
) -> Tensor:
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return (logits * spread).to(dtype)


def random_settings(num: int, vocab_size: int, seed: int) -> list[DrawSettings]:
    """Of each kind some: greedy, plain, and every mix of the three ways to truncate."""
    g = torch.Generator().manual_seed(seed)

    def uniform() -> float:
        return float(torch.rand((), generator=g))

    def one() -> DrawSettings:
        temperature = [0.0, 1.0, 0.05 + 2 * uniform(), 0.05 + 2 * uniform()][int(4 * uniform())]
        most = [8, 64, vocab_size + 5][int(3 * uniform())]
        return DrawSettings(
            seed=int(uniform() * 2**63) * 2 + 1,
            temperature=torch.tensor(temperature).item(),
            top_k=1 + int(uniform() * most) if uniform() < 0.4 else 0,
            top_p=[0.001 + 0.998 * uniform(), 0.9, 1 - 1e-6][int(3 * uniform())]
            if uniform() < 0.6
            else 1.0,
            min_p=torch.tensor(0.3 * uniform()).item() if uniform() < 0.3 else 0.0,
        )

    return [one() for _ in range(num)]


def make_params(settings: list[DrawSettings], device: torch.device) -> SlotParams:
    params = SlotParams(len(settings), device)
    params.update(dict(enumerate(settings)))
    return params


def draw(
    ops: Ops, logits: Tensor, settings: list[DrawSettings], positions: Tensor, device: torch.device
) -> list[int]:
    """Rows of the slots in reverse order."""
    num = len(settings)
    slots = torch.arange(num - 1, -1, -1, dtype=torch.int32)
    params = make_params(settings[::-1], device)
    drawn = ops.sample_tokens(logits.to(device), slots.to(device), positions.to(device), params)
    assert drawn.dtype == torch.int64
    return drawn.tolist()


def expected_draws(logits: Tensor, settings: list[DrawSettings], positions: Tensor) -> list[int]:
    """By the functions of ``sampling``, on the CPU, each row as what it is."""
    logits = logits.float()
    expected = []
    for row, s in enumerate(settings):
        x, at = logits[row : row + 1], positions[row : row + 1]
        seed = torch.tensor([s.seed - 2**64 if s.seed >= 2**63 else s.seed])
        temperature = torch.tensor([s.temperature])
        if s.temperature == 0:
            drawn = sampling.argmax_tokens(x)
        elif s.top_k or s.top_p < 1 or s.min_p:
            top_k = torch.tensor([min(s.top_k, x.shape[1])])
            top_p = torch.tensor([s.top_p], dtype=torch.float64)
            min_p = torch.tensor([s.min_p])
            drawn = sampling.draw_truncated_tokens(x, temperature, top_k, top_p, min_p, seed, at)
        else:
            drawn = sampling.draw_tokens(x, temperature, seed, at)
        expected.append(int(drawn))
    return expected


def assert_same_draws(
    drawn: list[int],
    expected: list[int],
    logits: Tensor,
    settings: list[DrawSettings],
    positions: Tensor,
) -> None:
    """Equal but for near ties, each of which is shown to be one, and of which there are few."""
    differing = [
        row for row, pair in enumerate(zip(drawn, expected, strict=True)) if len({*pair}) > 1
    ]
    for row in differing:
        assert_nearly_tied(
            logits[row].float().cpu(), settings[row], int(positions[row]), drawn[row], expected[row]
        )
    assert len(differing) <= max(1, DRAWS_DIFFERING * len(drawn)), f"{len(differing)} differ"


# against the functions of ``sampling``


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("spread", [0.3, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 8, 9, 129, 2048, 4099, 32_003])
def test_draws_what_the_functions_draw(
    vocab_size: int, spread: float, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    num = 200 if vocab_size < 10_000 else 60
    logits = make_logits(num, vocab_size, dtype, seed=vocab_size, spread=spread)
    settings = random_settings(num, vocab_size, seed=vocab_size)
    positions = torch.arange(num) * 977
    expected = expected_draws(logits, settings, positions)
    drawn = draw(ops, logits, settings, positions, device)
    assert_same_draws(drawn, expected, logits, settings, positions)


@pytest.mark.parametrize("backend", CUDA_ONLY)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [151_936, 151_937])
def test_a_real_vocabulary_draws_what_the_reference_draws_there(
    vocab_size: int, dtype: torch.dtype, backend: str
) -> None:
    """2000 rows of random settings; slow on the CPU, so the reference runs on the device."""
    (ops, device), (reference, _) = open_backend(backend), open_backend("cuda-reference")
    for part in range(10):
        g = torch.Generator(device).manual_seed(part)
        spread = [0.5, 1.0, 2.0, 3.0, 6.0][part % 5]
        logits = torch.randn(200, vocab_size, generator=g, device=device) * spread
        if part % 2:  # a few likely tokens, as in text
            peaks = torch.randint(vocab_size, (200, 5), generator=g, device=device)
            logits.scatter_add_(1, peaks, torch.full((200, 5), 6 * spread, device=device))
        logits = logits.to(dtype)
        settings = random_settings(200, vocab_size, seed=part)
        positions = torch.arange(200) + 10_000 * part
        expected = draw(reference, logits, settings, positions, device)
        drawn = draw(ops, logits, settings, positions, device)
        assert_same_draws(drawn, expected, logits, settings, positions)


@pytest.mark.parametrize("backend", CUDA_ONLY)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [9, 129, 4099, 32_003])
def test_of_thousands_of_rows_none_is_wrong(
    vocab_size: int, dtype: torch.dtype, backend: str
) -> None:
    """A fault that one row in ten thousand shows; the reference runs on the device."""
    (ops, device), (reference, _) = open_backend(backend), open_backend("cuda-reference")
    num_slots, num = 997, 20_000 if vocab_size < 10_000 else 4000
    settings = random_settings(num_slots, vocab_size, seed=vocab_size)
    params = make_params(settings, device)
    g = torch.Generator(device).manual_seed(vocab_size)
    spread = torch.tensor([0.1, 0.3, 1.0, 3.0, 6.0], device=device)
    rows = torch.arange(num, device=device)
    logits = torch.randn(num, vocab_size, generator=g, device=device) * spread[rows % 5][:, None]
    logits, slots = logits.to(dtype), (rows % num_slots).int()
    positions = torch.randint(2**31, (num,), generator=g, device=device)
    expected = reference.sample_tokens(logits, slots, positions, params)
    drawn = ops.sample_tokens(logits, slots, positions, params)
    settings = [settings[slot] for slot in slots.tolist()]
    assert_same_draws(drawn.tolist(), expected.tolist(), logits, settings, positions.cpu())


@pytest.mark.parametrize("backend", CUDA_ONLY)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [9, 2048, 32_003])
def test_one_thread_block_draws_what_a_cluster_draws(
    vocab_size: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on cards that have no clusters."""
    (ops, device), num = open_backend(backend), 200
    monkeypatch.setattr(device_sampling, "_CLUSTERS_FROM", 10_000)
    alone = make_ops("cuda", device)
    logits = make_logits(num, vocab_size, dtype, seed=1).to(device)
    settings = random_settings(num, vocab_size, seed=4)
    positions = torch.arange(num) + 5
    expected = draw(ops, logits, settings, positions, device)
    drawn = draw(alone, logits, settings, positions, device)
    assert_same_draws(drawn, expected, logits, settings, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_equal_logits_are_told_apart_by_their_ids(dtype: torch.dtype, backend: str) -> None:
    """All-equal rows, and rows of few different values: which of the equal stay is exact."""
    ops, device = open_backend(backend)
    num, vocab_size = 300, 5003
    logits = make_logits(num, vocab_size, torch.float32, seed=2, spread=1.0).round()
    logits[::3] = torch.arange(num)[::3, None].float() - 100
    logits[1::3] *= torch.tensor([0.0, -0.0, 1.0]).repeat(vocab_size)[:vocab_size]  # zeros: signed
    logits = logits.to(dtype)
    settings = random_settings(num, vocab_size, seed=3)
    positions = torch.arange(num)
    expected = expected_draws(logits, settings, positions)
    drawn = draw(ops, logits, settings, positions, device)
    assert_same_draws(drawn, expected, logits, settings, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changed",
    [
        {"top_k": 2**31 - 1},
        {"top_k": 1},
        {"top_k": 3000, "top_p": 0.99},
        {"top_k": 2047, "min_p": 0.001},
        {"top_k": 150, "top_p": 0.9},
        {"top_k": 700},
        {"top_p": 0.03},
        {"top_p": 0.4, "min_p": 0.01},
        {"top_p": 1e-300},
        {"top_p": 1 - 2**-53},
        {"min_p": 1.0},
        {"temperature": 1e-30},
        {"temperature": 1e-30, "top_p": 0.5},
        {"temperature": 100.0, "top_p": 0.99},
        {"temperature": 100.0, "top_k": 2500, "top_p": 0.999},
        {"temperature": 0.01, "top_p": 0.9, "min_p": 1e-30},
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_settings_at_their_ends(scale: float, changed: dict[str, float], backend: str) -> None:
    ops, device = open_backend(backend)
    num, vocab_size = 24, 4099
    plain = {"seed": 0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    for dtype in DTYPES:
        logits = make_logits(num, vocab_size, dtype, seed=5, spread=scale)
        settings = [
            DrawSettings(**(plain | {"seed": 2**64 - 1 - row} | changed)) for row in range(num)
        ]
        positions = torch.arange(num) + 2**32 - num
        expected = expected_draws(logits, settings, positions)
        drawn = draw(ops, logits, settings, positions, device)
        assert_same_draws(drawn, expected, logits, settings, positions)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [50, 3000, 40_001])
def test_a_row_without_a_distribution_gives_no_token_and_hurts_no_other(
    vocab_size: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    logits = make_logits(40, vocab_size, dtype)
    settings = random_settings(40, vocab_size, seed=1)
    positions = torch.arange(40)
    expected = expected_draws(logits, settings, positions)
    logits[1, 7], logits[2, 3], logits[4], logits[5, -1] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        -torch.nan,
    )
    logits[6, : vocab_size - 1] = -torch.inf  # one token left: that one
    logits[7, 3:] = -torch.inf
    for row in (1, 2, 4, 5):
        expected[row] = sampling.NO_TOKEN
    drawn = draw(ops, logits, settings, positions, device)
    assert drawn[6] == vocab_size - 1
    assert drawn[7] in (0, 1, 2)
    drawn[6:8] = expected[6:8]
    assert drawn == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_draw_has_the_probabilities_that_are_left(backend: str) -> None:
    ops, device = open_backend(backend)
    num, vocab_size = 20_000, 60
    logits = make_logits(1, vocab_size, torch.bfloat16, seed=4, spread=1.5)
    settings = DrawSettings(seed=99, temperature=1.25, top_k=30, top_p=0.9, min_p=0.02)
    probabilities = (logits[0].double() / 1.25).softmax(-1)
    ranked, order = probabilities.sort(descending=True, stable=True)
    ranked[30:] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(-1) - ranked >= 0.9] = 0
    ranked[ranked < 0.02 * ranked[0]] = 0
    expected = torch.zeros_like(ranked).scatter(0, order, ranked / ranked.sum()) * num
    params = make_params([settings], device)
    drawn = ops.sample_tokens(
        logits.expand(num, -1).to(device),
        torch.zeros(num, dtype=torch.int32, device=device),
        torch.arange(num, device=device),
        params,
    )
    counts = drawn.cpu().bincount(minlength=vocab_size)
    survivors = expected.nonzero()[:, 0]
    degrees = len(survivors) - 1
    assert 5 < degrees < 29
    assert counts[survivors].sum() == num, "a token that was cut away was drawn"
    chi_square = ((counts - expected)[survivors] ** 2 / expected[survivors]).sum()
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


# rows on their own


@pytest.mark.parametrize("backend", CUDA_ONLY)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab_size", [999, 151_936])
def test_a_row_does_not_see_its_batch(vocab_size: int, dtype: torch.dtype, backend: str) -> None:
    ops, device = open_backend(backend)
    num = 120
    logits = make_logits(num, vocab_size, dtype, seed=1).to(device)
    params = make_params(random_settings(num, vocab_size, seed=2), device)
    slots = torch.arange(num, dtype=torch.int32, device=device)
    positions = torch.arange(num, device=device)
    together = ops.sample_tokens(logits, slots, positions, params)
    for _ in range(3):
        assert torch.equal(ops.sample_tokens(logits, slots, positions, params), together)
    g = torch.Generator().manual_seed(0)
    for size in (1, 1, 1, 3, 17):
        rows = torch.randperm(num, generator=g)[:size].to(device)
        some = ops.sample_tokens(logits[rows], slots[rows], positions[rows], params)
        assert torch.equal(some, together[rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_not_read(backend: str) -> None:
    ops, device = open_backend(backend)
    settings = random_settings(9, 300, seed=0)
    logits = make_logits(9, 300, torch.bfloat16)
    positions = torch.arange(9)
    expected = expected_draws(logits, settings, positions)
    params = make_params(settings, device)
    slots = torch.arange(9, dtype=torch.int32)
    for row in (0, 4, 8):
        slots[row], positions[row], logits[row] = -1, -(2**62), torch.nan
    drawn = ops.sample_tokens(logits.to(device), slots.to(device), positions.to(device), params)
    for row in (1, 2, 3, 5, 6, 7):
        assert int(drawn[row]) == expected[row]


def test_no_rows_give_no_tokens() -> None:
    params = SlotParams(1, "cpu")
    none = torch.empty(0, dtype=torch.int64)
    assert cpu_ops().sample_tokens(torch.empty(0, 9), none.int(), none, params).shape == (0,)


@pytest.mark.gpu
def test_a_captured_draw_follows_its_inputs() -> None:
    """Settings, slots, positions and logits are read when the graph runs."""
    ops, device = open_backend("cuda")
    num, vocab_size = 16, 40_000
    settings = random_settings(2 * num, vocab_size, seed=6)
    params = make_params(settings, device)
    logits = make_logits(num, vocab_size, torch.bfloat16, seed=1).to(device)
    slots = torch.arange(num, dtype=torch.int32, device=device)
    positions = torch.zeros(num, dtype=torch.int64, device=device)
    ops.sample_tokens(logits, slots, positions, params)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample_tokens(logits, slots, positions, params)
    for step in range(4):
        logits.copy_(make_logits(num, vocab_size, torch.bfloat16, seed=step))
        positions.fill_(step)
        slots.copy_(torch.randperm(2 * num)[:num])
        params.update({step: settings[-1 - step]})
        graph.replay()
        assert torch.equal(captured, ops.sample_tokens(logits, slots, positions, params))


# the table


def test_a_slot_holds_what_it_was_last_given() -> None:
    params = SlotParams(5, "cpu")
    first = DrawSettings(2**64 - 1, 0.5, 7, 1 / 3, 0.25)
    params.update({3: first, 1: DrawSettings(5, 0.0, 0, 1.0, 0.0)})
    params.update({1: DrawSettings(2**63, 2.0, 2**31 - 1, 0.9, 1.0)})
    params.update({})
    assert params.seed.tolist() == [0, -(2**63), 0, -1, 0]
    assert params.temperature.tolist() == [0.0, 2.0, 0.0, 0.5, 0.0]
    assert params.top_k.tolist() == [0, 2**31 - 1, 0, 7, 0]
    assert params.top_p.tolist() == [0.0, 0.9, 0.0, 1 / 3, 0.0]
    assert params.min_p.tolist() == [0.0, 1.0, 0.0, 0.25, 0.0]


@pytest.mark.gpu
def test_the_table_changes_without_waiting_for_the_device() -> None:
    params = SlotParams(64, "cuda")
    changes = {slot: DrawSettings(slot, 1.0, slot, 0.5, 0.0) for slot in range(64)}
    params.update(changes)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        params.update({slot: s._replace(top_k=7) for slot, s in changes.items()})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert params.top_k.tolist() == [7] * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(6)}, r"logits: expected 2 dimensions, got shape \[6\]"),
        ({"logits": torch.zeros(4, 6).double()}, r"logits: expected bf16 or fp32, got .*float64"),
        ({"logits": torch.zeros(4, 0)}, r"logits: expected \[N, V\], got \[4, 0\]"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, r"slots: expected \[4\], got \[3\]"),
        ({"slots": torch.zeros(4, dtype=torch.int64)}, r"slots: expected dtype torch.int32"),
        ({"positions": torch.zeros(4, 1).long()}, r"positions: expected \[4\], got \[4, 1\]"),
        ({"positions": torch.zeros(4)}, r"positions: expected dtype torch.int64"),
        ({"params": SlotParams(3, "meta")}, r"params: expected device cpu, got meta"),
    ],
)
def test_rejects_bad_arguments_by_name(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(4, 6),
        "slots": torch.zeros(4, dtype=torch.int32),
        "positions": torch.zeros(4, dtype=torch.int64),
        "params": SlotParams(3, "cpu"),
    }
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().sample_tokens(**arguments | change)  # type: ignore[arg-type]
