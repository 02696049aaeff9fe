"""top_logprobs: log_softmax in double, and the most likely tokens in the order of a sort."""

from __future__ import annotations

import pytest
import torch

from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import LOGPROBS_FP32

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("grid", [None, 1.0], ids=["distinct", "many-equal"])
@pytest.mark.parametrize("vocab_size", [1, 7, 8, 65, 1000, 40_001, 151_936])
def test_are_those_of_the_whole_row(
    vocab_size: int, grid: float | None, num_top: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    num = 9 if vocab_size < 10_000 else 3
    g = torch.Generator().manual_seed(vocab_size)
    logits = 4 * torch.randn(num, vocab_size, generator=g)
    if grid is not None:
        logits = (logits / grid).round() * grid
        logits[0] = 1.5
    logits = logits.to(dtype)
    token_ids = torch.randint(0, vocab_size, (num,), generator=g)
    token_ids[-1] = -1
    expected = logits.double().log_softmax(-1)
    ranked = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :num_top]

    drawn, ids, values = ops.top_logprobs(logits.to(device), token_ids.to(device), num_top)

    assert drawn.dtype == values.dtype == torch.float32
    assert torch.equal(ids.cpu(), ranked)
    of_ranked = expected.gather(1, ranked)
    torch.testing.assert_close(values.cpu().double(), of_ranked, rtol=0, atol=LOGPROBS_FP32)
    of_drawn = expected.gather(1, token_ids.clamp(min=0)[:, None])[:, 0]
    assert float((drawn.cpu() - of_drawn).abs().max()) <= LOGPROBS_FP32


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_at_minus_infinity_come_last(backend: str) -> None:
    ops, device = open_backend(backend)
    logits = torch.full((2, 3000), -torch.inf)
    logits[0, [2999, 17]] = torch.tensor([1.0, 2.0])
    logits[1, 5] = -3.0
    drawn, ids, values = ops.top_logprobs(
        logits.to(device), torch.tensor([17, 5], device=device), 4
    )
    assert ids.tolist() == [[17, 2999, 0, 1], [5, 0, 1, 2]]
    assert values[:, 2:].isinf().all()
    torch.testing.assert_close(drawn.cpu(), torch.tensor([-0.31326166, 0.0]))
    torch.testing.assert_close(values[0, :2].cpu(), torch.tensor([-0.31326166, -1.3132616]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_rows_hurt_no_other(backend: str) -> None:
    ops, device = open_backend(backend)
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    expected = logits[2].log_softmax(-1)
    logits[0, 7], logits[1] = torch.nan, torch.inf
    drawn, ids, values = ops.top_logprobs(
        logits.to(device), torch.tensor([3, 3, 3], device=device), 1
    )
    torch.testing.assert_close(drawn[2].cpu(), expected[3])
    assert ids[2].tolist() == [int(expected.argmax())]
    torch.testing.assert_close(values[2, 0].cpu(), expected.max())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, r"logits: expected 2 dimensions"),
        ({"token_ids": torch.zeros(5).long()}, r"token_ids: expected \[4\], got \[5\]"),
        ({"token_ids": torch.zeros(4)}, r"token_ids: expected dtype torch.int64"),
        ({"num_top": 21}, r"num_top: expected 0 to 20, got 21"),
        ({"num_top": -1}, r"num_top: expected 0 to 20, got -1"),
    ],
)
def test_rejects_bad_arguments_by_name(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "logits": torch.zeros(4, 6),
        "token_ids": torch.zeros(4, dtype=torch.int64),
        "num_top": 2,
    }
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().top_logprobs(**arguments | change)  # type: ignore[arg-type]
