"""Sampling maths: Philox words, Gumbel noise, truncation against transformers, exact draws."""

import math

import pytest
import torch
from transformers.generation import logits_process

from ember_pp.kernels import sampling

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
U32 = 0xFFFFFFFF

# Random123 1.14, tests/kat_vectors, the three philox4x32 lines with 10 rounds.
PHILOX_KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((U32, U32, U32, U32), (U32, U32), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox_in_python(counter, key):
    """The published round function on Python's whole numbers, one counter at a time."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & U32, (p0 >> 32) ^ c3 ^ k1, p0 & U32
        k0, k1 = (k0 + 0x9E3779B9) & U32, (k1 + 0xBB67AE85) & U32
    return c0, c1, c2, c3


def noise_in_python(seed, position, token_id):
    """The documented layout of key and counter, in double precision."""
    words = philox_in_python((token_id // 4, position, 0, 0), (seed & U32, seed >> 32))
    return -math.log(-math.log1p(-(words[token_id % 4] + 0.5) / 2**32))


def i64(*values):
    """int64 tensor of the bits of unsigned 64-bit ``values``."""
    return torch.tensor([value - 2**64 if value >= 2**63 else value for value in values])


def make_logits(num_rows, vocab_size, *, seed=0, spread=3.0, grid=None):
    """Random logits; ``grid`` rounds them so that many are equal, as bfloat16 products are."""
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    logits = logits * spread
    return logits if grid is None else (logits / grid).round() * grid


def make_settings(num_rows, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=7):
    return {
        "temperature": torch.full((num_rows,), temperature),
        "top_k": torch.full((num_rows,), top_k),
        "top_p": torch.full((num_rows,), top_p, dtype=torch.float64),
        "min_p": torch.full((num_rows,), min_p),
        "seeds": torch.full((num_rows,), seed),
        "positions": torch.arange(num_rows),
    }


def random_settings(num_rows, vocab_size, seed):
    """Every row its own mix of temperature, top_k, top_p and min_p, some of them off."""
    g = torch.Generator().manual_seed(seed)
    uniform = lambda: torch.rand(num_rows, generator=g)  # noqa: E731
    is_on = lambda: uniform() < 0.6  # noqa: E731
    top_k = torch.randint(1, min(vocab_size, 100), (num_rows,), generator=g)
    return {
        "temperature": 0.1 + 2 * uniform(),
        "top_k": torch.where(is_on(), top_k, 0),
        "top_p": torch.where(is_on(), uniform(), 1.0).double().clamp(min=0.01),
        "min_p": torch.where(is_on(), 0.3 * uniform(), 0.0),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_rows,), generator=g),
        "positions": torch.randint(0, 5000, (num_rows,), generator=g),
    }


# random numbers


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX_KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter, key, words):
    drawn = sampling.philox4x32(i64(*counter).unbind(), i64(*key).unbind())
    assert tuple(word.item() for word in drawn) == words
    assert philox_in_python(counter, key) == words  # the oracle of the tests below


@pytest.mark.parametrize("device", DEVICES)
def test_noise_is_a_function_of_seed_position_and_token(device):
    seeds = (0, 1, 2**31, 2**32, 2**63, 2**64 - 1)
    positions = (0, 1, 4095, 2**31 - 1, 7, 2**20)
    noise = sampling.gumbel_noise_row(i64(*seeds).to(device), i64(*positions).to(device), 203)
    assert noise.shape == (6, 203)
    assert noise.dtype == torch.float32
    expected = torch.tensor(
        [
            [noise_in_python(seed, position, token_id) for token_id in range(203)]
            for seed, position in zip(seeds, positions, strict=True)
        ]
    )
    torch.testing.assert_close(noise.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_noise_of_some_tokens_is_that_of_the_row(num_rows, device):
    seeds, positions = (
        i64(*range(11, 11 + num_rows)).to(device),
        torch.full((num_rows,), 99, device=device),
    )
    row = sampling.gumbel_noise_row(seeds, positions, 1003)
    for width in (1, 2, 15, 16, 17, 100, 1003):
        g = torch.Generator().manual_seed(width)
        token_ids = torch.stack([torch.randperm(1003, generator=g)[:width]] * num_rows).to(device)
        some = sampling.gumbel_noise(seeds, positions, token_ids)
        assert torch.equal(some, row.gather(1, token_ids)), f"{width=}"


def test_noise_at_the_ends_of_the_word_range_is_finite():
    noise = sampling._gumbel_from_words(torch.tensor([0, 1, 2**31, U32 - 1, U32]))
    assert noise.isfinite().all()
    assert noise.tolist() == sorted(noise.tolist(), reverse=True)
    assert noise[0].item() == pytest.approx(33 * math.log(2))
    assert noise[2].item() == pytest.approx(-math.log(math.log(2)))


def test_noise_has_the_gumbel_distribution_and_no_correlation():
    num = 2**18
    zero = torch.zeros(1, dtype=torch.int64)
    along_tokens = sampling.gumbel_noise_row(zero, zero, num)[0]
    counts = torch.arange(num)
    first_token = torch.zeros(num, 1, dtype=torch.int64)
    along_positions = sampling.gumbel_noise(zero.expand(num), counts, first_token)[:, 0]
    along_seeds = sampling.gumbel_noise(counts, zero.expand(num), first_token)[:, 0]
    for noise in (along_tokens, along_positions, along_seeds):
        ordered = torch.exp(-torch.exp(-noise.double())).sort().values  # uniform if Gumbel
        steps = torch.arange(1, num + 1).double() / num
        kolmogorov = (ordered - steps).abs().max().item() * math.sqrt(num)
        assert kolmogorov < 1.95  # 0.1% point of the Kolmogorov distribution
        for lag in (1, 2, 3, 4, 5):
            pair = torch.stack([noise[:-lag], noise[lag:]])
            assert abs(torch.corrcoef(pair)[0, 1].item()) * math.sqrt(num) < 4
    across = torch.corrcoef(torch.stack([along_tokens, along_positions, along_seeds]))
    assert (across - torch.eye(3)).abs().max().item() * math.sqrt(num) < 4


# draws against probabilities


def chi_square(counts, expected):
    assert expected.min() >= 5, "too few expected for a chi-square test"
    return ((counts - expected) ** 2 / expected).sum().item()


def chi_square_limit(degrees):
    """0.01% point, by Wilson and Hilferty's cube; 3.719 is that point of the normal."""
    spread = 2 / (9 * degrees)
    return degrees * (1 - spread + 3.719 * math.sqrt(spread)) ** 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_plain_draws_have_the_probabilities_of_the_softmax(temperature):
    num, logits = 40_000, make_logits(1, 23, spread=1.0)
    settings = make_settings(num, temperature=temperature)
    drawn = sampling.draw_tokens(
        logits.expand(num, -1), settings["temperature"], settings["seeds"], settings["positions"]
    )
    expected = (logits[0].double() / temperature).softmax(-1) * num
    assert chi_square(drawn.bincount(minlength=23), expected) < chi_square_limit(22)


@pytest.mark.parametrize("vocab_size", [23, 1999])  # sorted whole; ranked in part
def test_truncated_draws_have_the_renormalised_probabilities(vocab_size):
    num = 20_000
    logits = make_logits(1, 23, spread=1.0)
    if vocab_size > 23:  # the rest is far below and must be cut away
        logits = torch.cat([logits, torch.full((1, vocab_size - 23), -9.0)], dim=1)
    settings = make_settings(num, temperature=1.3, top_k=17, top_p=0.9, min_p=0.08)
    drawn = sampling.draw_truncated_tokens(logits.expand(num, -1), **settings)
    probabilities = transformers_probabilities(logits, 1.3, 17, 0.9, 0.08)[0]
    survivors = probabilities.nonzero()[:, 0]
    counts = drawn.bincount(minlength=vocab_size)
    assert 5 < len(survivors) < 17
    assert counts[survivors].sum() == num, "a token that was cut away was drawn"
    limit = chi_square_limit(len(survivors) - 1)
    assert chi_square(counts[survivors], probabilities[survivors] * num) < limit


@pytest.mark.parametrize("step", ["seeds", "positions"])
def test_neighbouring_draws_are_independent(step):
    num, logits = 40_000, make_logits(1, 6, spread=0.5)
    settings = make_settings(num)
    if step == "seeds":
        settings |= {"seeds": torch.arange(num), "positions": torch.full((num,), 12)}
    drawn = sampling.draw_tokens(
        logits.expand(num, -1), settings["temperature"], settings["seeds"], settings["positions"]
    )
    probabilities = logits[0].double().softmax(-1)
    pairs = (drawn[0::2] * 6 + drawn[1::2]).bincount(minlength=36)
    expected = torch.outer(probabilities, probabilities).flatten() * (num // 2)
    assert chi_square(pairs, expected) < chi_square_limit(35)


# survivors against transformers


def transformers_probabilities(logits, temperature, top_k, top_p, min_p):
    """Probabilities after transformers' own warpers, in float64."""
    scores = logits.double()
    warpers = [logits_process.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(logits_process.MinPLogitsWarper(min_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1)


def survivors_and_probabilities(logits, settings, width=None):
    """By the code under test: ids that survive and their probabilities, for one row."""
    names = ("temperature", "top_k", "top_p", "min_p")
    values, ids = sampling.rank_tokens(logits, width or logits.shape[1])
    kept = sampling.count_kept(values, *(settings[name] for name in names)).item()
    scaled = values[0, :kept].double() / settings["temperature"].double()
    return ids[0, :kept], scaled.softmax(-1)


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 300])
def test_survivors_and_probabilities_are_those_of_transformers(vocab_size):
    for case in range(150):
        logits = make_logits(1, vocab_size, seed=case, spread=1.0 + case % 4)
        settings = random_settings(1, vocab_size + 1, seed=case)
        plain = [settings[n].item() for n in ("temperature", "top_k", "top_p", "min_p")]
        expected = transformers_probabilities(logits, *plain)[0]
        ids, probabilities = survivors_and_probabilities(logits, settings)
        assert sorted(ids.tolist()) == expected.nonzero()[:, 0].tolist(), f"{case=} {plain=}"
        torch.testing.assert_close(probabilities, expected[ids])


def test_tokens_equal_to_the_kth_are_kept_as_in_transformers():
    for case in range(100):
        logits = make_logits(1, 60, seed=case, grid=0.5)
        top_k = 1 + case % 40
        expected = transformers_probabilities(logits, 1.0, top_k, 1.0, 0.0)[0]
        ids, probabilities = survivors_and_probabilities(logits, make_settings(1, top_k=top_k))
        assert sorted(ids.tolist()) == expected.nonzero()[:, 0].tolist(), f"{case=}"
        torch.testing.assert_close(probabilities, expected[ids])


def test_top_p_among_equals_keeps_the_lowest_ids_and_transformers_count():
    for case in range(100):
        logits = make_logits(1, 60, seed=case, grid=0.5)
        top_p = 0.005 + 0.0099 * case
        expected = transformers_probabilities(logits, 1.0, 0, top_p, 0.0)[0]
        ids, _ = survivors_and_probabilities(logits, make_settings(1, top_p=top_p))
        assert len(ids) == expected.count_nonzero(), f"{case=}"
        order = sorted(range(60), key=lambda token: (-logits[0, token].item(), token))
        assert ids.tolist() == order[: len(ids)]


@pytest.mark.parametrize(
    ("weights", "top_p", "kept"),
    [
        ([4, 2, 1, 1], 0.5, [0]),  # the first alone reaches it exactly
        ([4, 2, 1, 1], 0.5001, [0, 1]),  # the token that crosses is kept
        ([4, 2, 1, 1], 0.75, [0, 1]),
        ([1, 1, 4, 2], 0.8, [2, 3, 0]),  # of equal tokens the lower id
        ([1, 1, 1, 1], 0.5, [0, 1]),
        ([1, 1, 1, 1], 1e-9, [0]),  # never none
        ([1, 1, 1, 1], 1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(weights, top_p, kept):
    logits = torch.tensor([weights]).log2().float() * math.log(2)
    ids, _ = survivors_and_probabilities(logits, make_settings(1, top_p=top_p))
    assert ids.tolist() == kept


def test_top_p_is_of_what_top_k_left():
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    # Of {4, 2} the first has 2/3; of all four it has 1/2.
    assert survivors_and_probabilities(logits, make_settings(1, top_p=0.6))[0].tolist() == [0, 1]
    settings = make_settings(1, top_k=2, top_p=0.6)
    assert survivors_and_probabilities(logits, settings)[0].tolist() == [0]


@pytest.mark.parametrize(
    ("min_p", "num_kept"), [(0.0, 4), (0.24, 4), (0.26, 2), (0.6, 1), (1.0, 1)]
)
def test_min_p_is_relative_to_the_most_likely(min_p, num_kept):
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log()
    assert len(survivors_and_probabilities(logits, make_settings(1, min_p=min_p))[0]) == num_kept


def test_min_p_of_one_keeps_all_that_equal_the_most_likely():
    logits = torch.tensor([[2.0, 5.0, 5.0, 1.0]])
    ids, _ = survivors_and_probabilities(logits, make_settings(1, min_p=1.0))
    assert ids.tolist() == [1, 2]


# the ranked shortcut, and rows on their own


@pytest.mark.parametrize("grid", [None, 0.25], ids=["distinct", "many-equal"])
@pytest.mark.parametrize("vocab_size", [2500, 4099])
def test_ranking_a_part_draws_as_sorting_the_whole(vocab_size, grid, monkeypatch):
    logits = make_logits(64, vocab_size, seed=3, grid=grid, spread=2.0)
    settings = random_settings(64, vocab_size, seed=5)
    settings["top_k"][:4] = torch.tensor([700, 2400, vocab_size, vocab_size - 1])
    monkeypatch.setattr(sampling, "_rank_widths", lambda *_: [])
    expected = sampling.draw_truncated_tokens(logits, **settings)
    num_sorted = []
    draw_sorted = sampling._draw_sorted
    monkeypatch.setattr(
        sampling,
        "_draw_sorted",
        lambda x, *rest: num_sorted.append(len(x)) or draw_sorted(x, *rest),
    )
    for widths in ([2], [9], [64], [576], [2, 64, 576]):
        monkeypatch.setattr(sampling, "_rank_widths", lambda *_, widths=widths: widths)
        assert torch.equal(sampling.draw_truncated_tokens(logits, **settings), expected), widths
    # Both ways were taken, also at the last widths, and the middle ones took rows off the sort.
    assert 0 < num_sorted[3] < num_sorted[2] < num_sorted[0] < 64
    assert num_sorted[4] == num_sorted[3]


@pytest.mark.parametrize("vocab_size", [5, 2303, 2304, 32_767, 32_768, 151_936])
def test_ranked_widths_are_worth_less_than_a_sort(vocab_size):
    for top_k in (0, 1, 20, 5000, vocab_size):
        widths = sampling._rank_widths(torch.tensor([1, top_k]), vocab_size)
        assert widths == sorted(set(widths))
        assert all(4 * width <= vocab_size for width in widths)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [1, 3, 333, 4099])
def test_a_row_does_not_see_its_batch(vocab_size, device):
    logits = make_logits(37, vocab_size, seed=1).to(device)
    settings = {k: v.to(device) for k, v in random_settings(37, vocab_size + 1, seed=2).items()}
    plain = [settings[name] for name in ("temperature", "seeds", "positions")]
    truncated = sampling.draw_truncated_tokens(logits, **settings)
    drawn = sampling.draw_tokens(logits, *plain)
    g = torch.Generator().manual_seed(0)
    for size in (1, 2, 5, 36):
        rows = torch.randperm(37, generator=g)[:size].to(device)
        some = {name: values[rows] for name, values in settings.items()}
        assert torch.equal(sampling.draw_truncated_tokens(logits[rows], **some), truncated[rows]), (
            f"{size=}"
        )
        again = sampling.draw_tokens(logits[rows], *(setting[rows] for setting in plain))
        assert torch.equal(again, drawn[rows]), f"{size=}"


def test_draws_do_not_depend_on_the_number_of_threads():
    logits, settings = make_logits(1, 60_000), random_settings(1, 60_000, seed=8)
    settings["top_p"][:] = 0.97
    num_threads = torch.get_num_threads()
    drawn = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append(
                [
                    sampling.draw_truncated_tokens(
                        logits, **(settings | {"positions": torch.tensor([position])})
                    ).item()
                    for position in range(5)
                ]
            )
    finally:
        torch.set_num_threads(num_threads)
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("chunk_tokens", [1, 100, 1000])
def test_chunks_of_rows_do_not_show(chunk_tokens, monkeypatch):
    logits, settings = make_logits(13, 97), random_settings(13, 97, seed=9)
    expected = sampling.draw_truncated_tokens(logits, **settings)
    monkeypatch.setattr(sampling, "_CHUNK_TOKENS", {"cpu": chunk_tokens})
    assert torch.equal(sampling.draw_truncated_tokens(logits, **settings), expected)


def test_truncation_that_drops_nothing_draws_as_none():
    logits, settings = make_logits(50, 700), make_settings(50, top_k=700, top_p=1.0)
    plain = [settings[name] for name in ("temperature", "seeds", "positions")]
    assert torch.equal(
        sampling.draw_truncated_tokens(logits, **settings), sampling.draw_tokens(logits, *plain)
    )


@pytest.mark.parametrize("device", DEVICES)
def test_a_tiny_temperature_draws_the_argmax(device):
    logits = make_logits(40, 999).to(device)
    settings = {k: v.to(device) for k, v in make_settings(40, temperature=1e-30).items()}
    plain = [settings[name] for name in ("temperature", "seeds", "positions")]
    assert torch.equal(sampling.draw_tokens(logits, *plain), logits.argmax(-1))
    settings["top_p"][:] = 0.9
    assert torch.equal(sampling.draw_truncated_tokens(logits, **settings), logits.argmax(-1))


@pytest.mark.parametrize("device", DEVICES)
def test_argmax_ties_go_to_the_lowest_id(device):
    logits = make_logits(200, 1000, grid=4.0).to(device)
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sampling.argmax_tokens(logits).tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_a_row_without_a_distribution_gives_no_token_and_leaves_the_others(vocab_size, device):
    logits = make_logits(6, vocab_size).to(device)
    logits[1, 7], logits[2, 3], logits[4] = torch.nan, torch.inf, -torch.inf
    logits[5, 1:] = -torch.inf  # one token left: that one
    settings = make_settings(6, top_k=5, top_p=0.9, min_p=0.01)
    settings = {name: values.to(device) for name, values in settings.items()}
    plain = [settings[name] for name in ("temperature", "seeds", "positions")]
    for drawn in (
        sampling.argmax_tokens(logits),
        sampling.draw_tokens(logits, *plain),
        sampling.draw_truncated_tokens(logits, **settings),
    ):
        is_broken = (drawn == sampling.NO_TOKEN).tolist()
        assert is_broken == [False, True, True, False, True, False]
        assert drawn[5] == 0


@pytest.mark.parametrize("vocab_size", [40, 3000])
def test_tokens_at_minus_infinity_are_never_drawn(vocab_size):
    logits = make_logits(300, vocab_size, spread=0.1)
    logits[:, 3:] = -torch.inf
    settings = make_settings(300, top_k=10)
    plain = [settings[name] for name in ("temperature", "seeds", "positions")]
    for drawn in (
        sampling.draw_tokens(logits, *plain),
        sampling.draw_truncated_tokens(logits, **settings),
        sampling.draw_truncated_tokens(logits, **make_settings(300, top_p=0.99999)),
    ):
        assert set(drawn.tolist()) == {0, 1, 2}


# penalties


def pairs(rows):
    """Sparse (row, token) lists from one list of token ids per row."""
    flat = [(row, token) for row, token_ids in enumerate(rows) for token in token_ids]
    return torch.tensor(flat, dtype=torch.int64).reshape(-1, 2).T


@pytest.mark.parametrize("penalty", [0.01, 0.5, 1.0, 1.1, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits, token_ids = make_logits(3, 40), [[0, 5, 5, 5, 39], [7] * 5, [1, 2, 3, 4, 5]]
    expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor(token_ids), logits.clone()
    )
    rows, ids = pairs(token_ids)
    sampling.apply_repetition_penalty(logits, rows, ids, torch.full(rows.shape, penalty))
    assert torch.equal(logits, expected)


def test_output_penalties_count_occurrences_per_row():
    logits, outputs = make_logits(4, 30), [[3, 3, 3, 9], [], [3], [29, 0, 29]]
    presence, frequency = [0.5, 1.0, -2.0, 0.0], [0.25, 2.0, 0.0, -1.5]
    expected = logits.clone()
    for row, token_ids in enumerate(outputs):
        for token in set(token_ids):
            expected[row, token] -= presence[row] + frequency[row] * token_ids.count(token)
    rows, ids = pairs(outputs)
    sampling.apply_output_penalties(
        logits, rows, ids, torch.tensor(presence)[rows], torch.tensor(frequency)[rows]
    )
    torch.testing.assert_close(logits, expected)
    untouched = torch.ones_like(logits, dtype=torch.bool).index_put(
        (rows, ids), torch.tensor(False)
    )
    assert torch.equal(logits[untouched], make_logits(4, 30)[untouched])


def test_bias_and_forbidding_touch_their_tokens_only():
    logits, before = make_logits(3, 10), make_logits(3, 10)
    sampling.add_logit_bias(
        logits, torch.tensor([0, 2]), torch.tensor([9, 0]), torch.tensor([1.5, -100.0])
    )
    sampling.forbid_tokens(logits, torch.tensor([1, 1]), torch.tensor([4, 5]))
    before[0, 9] += 1.5
    before[2, 0] -= 100
    before[1, 4:6] = -torch.inf
    assert torch.equal(logits, before)


# log-probabilities


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab_size", [7, 1000])
@pytest.mark.parametrize("num_top", [0, 1, 5, 20])
@pytest.mark.parametrize("grid", [None, 1.0], ids=["distinct", "many-equal"])
def test_top_logprobs_are_of_the_whole_distribution(vocab_size, num_top, grid, device):
    logits = make_logits(9, vocab_size, grid=grid)
    token_ids = torch.arange(9) % vocab_size
    expected = logits.log_softmax(-1)
    drawn, ids, values = sampling.top_logprobs(logits.to(device), token_ids.to(device), num_top)
    torch.testing.assert_close(drawn.cpu(), expected.gather(1, token_ids[:, None])[:, 0])
    order = [sorted(range(vocab_size), key=lambda t: (-row[t], t)) for row in logits.tolist()]
    assert ids.tolist() == [ranked[:num_top] for ranked in order]
    torch.testing.assert_close(values.cpu(), expected.gather(1, ids.cpu()))
