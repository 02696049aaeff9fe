"""Padded sizes: rising, no smaller than the step, few, and not wasteful."""

from __future__ import annotations

import pytest

from ember_pp.stage.step_shape import decode_size, decode_sizes, mixed_size


@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 8, 9, 63, 64, 100, 256, 300, 1024])
def test_every_number_of_rows_has_the_next_size(max_rows: int) -> None:
    sizes = decode_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_rows
    for num_rows in range(1, max_rows + 1):
        assert decode_size(num_rows, sizes) == min(s for s in sizes if s >= num_rows)


def test_there_are_few_sizes_and_little_padding() -> None:
    sizes = decode_sizes(256)
    assert len(sizes) < 32
    for num_rows in range(9, 257):
        assert decode_size(num_rows, sizes) - num_rows < 16


@pytest.mark.parametrize("max_tokens", [1, 5, 16, 100, 512, 8192])
def test_tokens_are_padded_by_a_sixteenth_at_most(max_tokens: int) -> None:
    for num_tokens in range(1, max_tokens + 1):
        padded = mixed_size(num_tokens, max_tokens, 2048)
        assert num_tokens <= padded <= max_tokens
        assert padded - num_tokens < max(16, num_tokens / 8)
        if num_tokens > 2048:
            assert padded == num_tokens
    assert len({mixed_size(n, max_tokens, 2048) for n in range(1, min(max_tokens, 2048) + 1)}) < 90
