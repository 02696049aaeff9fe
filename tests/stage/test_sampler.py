"""Sampler: the documented order against a slow oracle, rows on their own, state per slot."""

import math
import random
import warnings

import pytest
import torch
from transformers.generation import logits_process

from ember_pp import protocol
from ember_pp.errors import InvalidRequestError, ProtocolError
from ember_pp.kernels import make_ops, sampling
from ember_pp.sampling_params import SamplingParams
from ember_pp.stage.sampler import Sampler

VOCAB_SIZE = 257  # prime
EOS_IDS = (2, 5)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def open_slot(slot, *, seed=0, prompt=(1, 2, 3), output=(), **fields):
    """An ``OpenSlot`` as the coordinator sends it: ids only where a penalty counts them."""
    params = SamplingParams.from_mapping(fields)
    counts = params.needs_token_counts
    return protocol.OpenSlot(
        slot=slot,
        seed=seed,
        sampling=params.to_mapping(),
        num_prompt_tokens=len(prompt),
        num_output_tokens=len(output),
        prompt_ids=protocol.pack_i32(prompt) if counts else b"",
        output_ids=protocol.pack_i32(output) if counts else b"",
    )


def make_sampler(*opened, vocab_size=VOCAB_SIZE, device="cpu", max_slots=64):
    ops = make_ops("cuda" if device == "cuda" else "reference", torch.device(device))
    sampler = Sampler(vocab_size, max_slots, EOS_IDS, device, ops)
    for slot in opened:
        sampler.open(slot)
    return sampler


def make_logits(num_rows, *, seed=0, vocab_size=VOCAB_SIZE, grid=None):
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))
    return logits if grid is None else (logits / grid).round() * grid


def random_fields(rng):
    """Sampling fields of one request: each on or off, the rest at its default."""
    choices = {
        "temperature": lambda: rng.choice([0, 0.3, 0.7, 1.5]),
        "top_k": lambda: rng.choice([1, 5, 40, VOCAB_SIZE + 9]),
        "top_p": lambda: rng.uniform(0.1, 0.99),
        "min_p": lambda: rng.uniform(0.01, 0.3),
        "repetition_penalty": lambda: rng.choice([0.7, 1.05, 1.8]),
        "presence_penalty": lambda: rng.choice([-1.0, 0.4, 2.0]),
        "frequency_penalty": lambda: rng.choice([-0.5, 0.3, 1.5]),
        "logit_bias": lambda: {
            rng.randrange(VOCAB_SIZE): rng.uniform(-9, 9) for _ in range(rng.randrange(1, 9))
        },
        "min_tokens": lambda: rng.randrange(1, 12),
        "stop_token_ids": lambda: [rng.randrange(VOCAB_SIZE) for _ in range(3)],
        "logprobs": lambda: rng.randrange(4),
    }
    return {name: choose() for name, choose in choices.items() if rng.random() < 0.4}


def oracle(logits, params, prompt, output, seed):
    """One draw by the page (docs/sampling.md), token by token in double precision."""
    x = logits.double().tolist()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in {*EOS_IDS, *params.stop_token_ids}:
            x[token] = -math.inf
    for token in {*prompt, *output}:
        ratio = params.repetition_penalty
        x[token] = x[token] * ratio if x[token] < 0 else x[token] / ratio
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.temperature == 0:
        return order[0]
    x = [value / params.temperature for value in x]
    if params.top_k:
        kth = x[order[min(params.top_k, len(x)) - 1]]
        order = [token for token in order if x[token] >= kth]
    weights = [math.exp(x[token] - x[order[0]]) for token in order]
    if params.top_p < 1:
        total, reached, kept = sum(weights), 0.0, 0
        while reached < params.top_p * total:
            reached += weights[kept]
            kept += 1
        order, weights = order[:kept], weights[:kept]
    order = [t for t, weight in zip(order, weights, strict=True) if weight >= params.min_p]
    position = torch.tensor([len(prompt) + len(output)])
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed])
    noise = sampling.gumbel_noise(signed, position, torch.tensor([order]))[0].tolist()
    return max(zip(order, noise, strict=True), key=lambda pair: x[pair[0]] + pair[1])[0]


class Generation:
    """Requests that generate together from logits made up per request and position."""

    def __init__(self, num_requests, *, seed, device="cpu", fields=None):
        rng = random.Random(seed)
        self.fields = fields or [random_fields(rng) for _ in range(num_requests)]
        self.params = [SamplingParams.from_mapping(fields) for fields in self.fields]
        self.prompts = [
            [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
            for _ in range(num_requests)
        ]
        self.seeds = [rng.randrange(2**64) for _ in range(num_requests)]
        self.device = device

    def logits(self, request, num_outputs):
        return make_logits(1, seed=1000 * request + num_outputs)[0]

    def open(self, sampler, request, slot, output=()):
        sampler.open(
            open_slot(
                slot,
                seed=self.seeds[request],
                prompt=self.prompts[request],
                output=output,
                **self.fields[request],
            )
        )

    def step(self, sampler, slots, outputs, requests):
        """Sample one token for each of ``requests`` and append it to its output."""
        logits = torch.stack([self.logits(r, len(outputs[r])) for r in requests])
        positions = [len(self.prompts[r]) + len(outputs[r]) for r in requests]
        drawn = sampler.sample(logits.to(self.device), [slots[r] for r in requests], positions)
        for request, token in zip(requests, drawn.read(), strict=True):
            outputs[request].append(token)

    def together(self, num_steps):
        num = len(self.params)
        sampler = make_sampler(device=self.device)
        slots, outputs = list(range(num)), [[] for _ in range(num)]
        for request in range(num):
            self.open(sampler, request, request)
        for _ in range(num_steps):
            self.step(sampler, slots, outputs, range(num))
        return outputs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(8))
def test_draws_follow_the_documented_order(seed, device):
    generation = Generation(24, seed=seed, device=device)
    outputs = generation.together(14)
    for request, output in enumerate(outputs):
        for index, token in enumerate(output):
            expected = oracle(
                generation.logits(request, index),
                generation.params[request],
                generation.prompts[request],
                output[:index],
                generation.seeds[request],
            )
            assert token == expected, f"{request=} {index=} {generation.fields[request]}"


def test_the_chain_has_the_probabilities_of_transformers_processors():
    """Penalty, temperature, top_k, top_p, min_p: frequencies of draws at many positions."""
    num, prompt = 30_000, [3, 4, 5, 6, 200]
    fields = {
        "repetition_penalty": 1.3,
        "temperature": 0.8,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.02,
    }
    logits = make_logits(1) / 3
    scores = logits.double()
    for processor in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.3),
        logits_process.TemperatureLogitsWarper(0.8),
        logits_process.TopKLogitsWarper(30),
        logits_process.TopPLogitsWarper(0.95),
        logits_process.MinPLogitsWarper(0.02),
    ):
        scores = processor(torch.tensor([prompt]), scores)
    expected = scores.softmax(-1)[0] * num
    counts = torch.zeros(VOCAB_SIZE)
    for batch in range(num // 500):
        opened = [
            open_slot(slot, seed=500 * batch + slot, prompt=prompt, **fields) for slot in range(500)
        ]
        sampler = make_sampler(*opened, max_slots=500)
        drawn = sampler.sample(logits.expand(500, -1), range(500), [len(prompt)] * 500)
        counts += drawn.token_ids.bincount(minlength=VOCAB_SIZE)
    survivors = expected.nonzero()[:, 0]
    assert counts[survivors].sum() == num
    chi_square = ((counts - expected)[survivors] ** 2 / expected[survivors]).sum()
    degrees = len(survivors) - 1
    assert degrees > 10
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


@pytest.mark.parametrize("device", DEVICES)
def test_a_request_draws_the_same_in_any_company(device):
    num, num_steps = 24, 10
    generation = Generation(num, seed=99, device=device)
    expected = generation.together(num_steps)
    rng = random.Random(1)
    sampler = make_sampler(device=device)
    slots = rng.sample(range(64), num)  # other slots
    outputs = [[] for _ in range(num)]
    for request in rng.sample(range(num), num):
        generation.open(sampler, request, slots[request])
    while running := [r for r in range(num) if len(outputs[r]) < num_steps]:
        requests = rng.sample(running, rng.randrange(1, min(len(running), 7) + 1))
        generation.step(sampler, slots, outputs, requests)
    assert outputs == expected


@pytest.mark.parametrize("num_kept", [0, 1, 6])
def test_a_replayed_request_goes_on_as_if_nothing_had_happened(num_kept):
    generation = Generation(24, seed=5)
    expected = generation.together(10)
    sampler = make_sampler()
    outputs = [output[:num_kept] for output in expected]
    for request in range(24):
        generation.open(sampler, request, 40 - request, outputs[request])
    for _ in range(10 - num_kept):
        generation.step(sampler, [40 - request for request in range(24)], outputs, range(24))
    assert outputs == expected


def test_a_position_sampled_again_counts_its_token_once():
    opened = open_slot(0, temperature=0, frequency_penalty=2.0, prompt=[1])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8] = 5.0, 2.5
    sampler = make_sampler(opened)
    for _ in range(3):
        assert sampler.sample(logits, [0], [1]).read() == [7]
    assert sampler.sample(logits, [0], [2]).read() == [7]  # 5 - 2 > 2.5
    assert sampler.sample(logits, [0], [3]).read() == [8]  # 5 - 4 < 2.5


def test_prompt_and_output_count_apart():
    """Presence and frequency see the output only, repetition sees both."""
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 7], logits[0, 8] = 3.0, 2.0
    for fields, first, second in [
        ({"presence_penalty": 2.0}, 7, 8),
        ({"frequency_penalty": 2.0}, 7, 8),
        ({"repetition_penalty": 2.0}, 8, 7),  # 8 in the output: 3/2 > 2/2
    ]:
        sampler = make_sampler(open_slot(0, temperature=0, prompt=[7, 7, 7], **fields))
        assert sampler.sample(logits, [0], [3]).read() == [first], fields
        assert sampler.sample(logits, [0], [4]).read() == [second], fields


def test_min_tokens_keeps_end_of_text_and_stop_tokens_away():
    logits = torch.zeros(1, VOCAB_SIZE)
    for rank, token in enumerate((*EOS_IDS, 77, 9)):
        logits[0, token] = 9.0 - rank
    fields = {"min_tokens": 3, "stop_token_ids": [77], "logit_bias": {2: 50.0}}
    sampler = make_sampler(open_slot(4, temperature=0, **fields))
    drawn = [sampler.sample(logits, [4], [3 + index]).read()[0] for index in range(5)]
    assert drawn == [9, 9, 9, 2, 2]


def test_min_tokens_is_counted_through_a_replay():
    opened = open_slot(4, temperature=0, min_tokens=3, output=[9, 9])
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 2], logits[0, 9] = 5.0, 4.0
    sampler = make_sampler(opened)
    assert [sampler.sample(logits, [4], [at]).read()[0] for at in (5, 6)] == [9, 2]


def test_forbidding_every_token_forbids_none():
    stop = list(range(8))
    sampler = make_sampler(
        open_slot(0, temperature=0, min_tokens=2, stop_token_ids=stop), vocab_size=8
    )
    assert sampler.sample(make_logits(1, vocab_size=8), [0], [3]).read() == (
        make_logits(1, vocab_size=8).argmax(-1).tolist()
    )


def test_logits_are_left_as_they_were():
    generation = Generation(24, seed=3)
    sampler = make_sampler()
    for request in range(24):
        generation.open(sampler, request, request)
    logits = make_logits(24)
    before = logits.clone()
    sampler.sample(logits, range(24), [len(prompt) for prompt in generation.prompts])
    assert torch.equal(logits, before)


# plans that need no more than the table


def draw_by_table(sampler, logits, slots, positions):
    """As a captured step does."""
    sampler.flush()
    ops = make_ops("reference", torch.device("cpu"))
    rows = torch.tensor(slots, dtype=torch.int32), torch.tensor(positions)
    return ops.sample_tokens(logits, *rows, sampler.params).tolist()


def test_the_table_draws_plain_slots_as_the_sampler_does():
    rng = random.Random(0)
    names = ("temperature", "top_k", "top_p", "min_p")
    fields = [{k: v for k, v in random_fields(rng).items() if k in names} for _ in range(40)]
    sampler = make_sampler(
        *(open_slot(slot, seed=2**64 - slot, **fields[slot]) for slot in range(1, 40))
    )
    sampler.flush()
    sampler.open(open_slot(7, seed=3, temperature=0.5))  # the last one counts
    sampler.open(open_slot(7, seed=4, top_k=2))
    slots = list(range(39, 0, -1))
    assert sampler.is_plain(slots)
    for position in range(3, 9):
        logits = make_logits(39, seed=position)
        drawn = sampler.sample(logits, slots, [position] * 39).read()
        assert draw_by_table(sampler, logits, slots, [position] * 39) == drawn


def test_settings_go_to_the_table_once(monkeypatch):
    """A plan that opens no slot costs the sampler nothing."""
    sampler = make_sampler(open_slot(1), open_slot(2))
    written = []
    update = sampler.params.update
    monkeypatch.setattr(
        sampler.params, "update", lambda changes: (written.append(sorted(changes)), update(changes))
    )
    sampler.flush()
    sampler.flush()
    sampler.open(open_slot(2, temperature=0.5))
    sampler.flush()
    assert written == [[1, 2], [2]]


@pytest.mark.parametrize(
    "fields",
    [{"logprobs": 0}, {"logit_bias": {3: 1.0}}, {"presence_penalty": 0.1}, {"min_tokens": 1}],
    ids=str,
)
def test_a_slot_that_needs_more_is_not_plain_until_it_is_opened_again(fields):
    sampler = make_sampler(open_slot(0), open_slot(1, **fields), open_slot(2, ignore_eos=True))
    assert sampler.is_plain([0, 2])
    assert sampler.is_plain([])
    assert not sampler.is_plain([0, 1])
    sampler.open(open_slot(1, top_p=0.5))
    assert sampler.is_plain([0, 1, 2])


def test_min_tokens_is_plain_once_it_is_over():
    sampler = make_sampler(
        open_slot(0, min_tokens=2), open_slot(1, min_tokens=2, logprobs=1), open_slot(2)
    )
    for position, is_plain in ((3, False), (4, False), (5, True)):
        sampler.sample(make_logits(3), [0, 1, 2], [position] * 3)
        assert sampler.is_plain([0, 2]) == is_plain, position
        assert not sampler.is_plain([1, 2])


# log-probabilities


def test_logprobs_are_of_the_unmodified_distribution():
    changed = {"logit_bias": {3: 100.0}, "temperature": 0.5, "repetition_penalty": 1.5}
    sampler = make_sampler(
        open_slot(0), open_slot(1, logprobs=3, **changed), open_slot(2, logprobs=0)
    )
    logits = make_logits(3, grid=1.0)
    drawn = sampler.sample(logits, [0, 1, 2], [3, 3, 3])
    token_ids = drawn.read()
    nothing, three, zero = drawn.logprobs
    expected = logits.log_softmax(-1)
    assert nothing is None
    assert token_ids[1] == 3
    assert three.logprob == expected[1, 3].item()
    order = sorted(range(VOCAB_SIZE), key=lambda t: (-logits[1, t].item(), t))[:3]
    assert list(protocol.unpack_i32(three.top_ids)) == order
    assert list(protocol.unpack_f32(three.top_logprobs)) == expected[1, order].tolist()
    assert zero == protocol.TokenLogprobs(expected[2, token_ids[2]].item(), b"", b"")


def test_logprobs_are_empty_when_no_row_asks():
    sampler = make_sampler(open_slot(0), open_slot(1))
    assert sampler.sample(make_logits(2), [0, 1], [3, 3]).logprobs == []


def test_logprobs_do_not_depend_on_the_batch():
    sampler = make_sampler(*(open_slot(slot, logprobs=5) for slot in range(9)))
    logits = make_logits(9, grid=0.5)
    together = sampler.sample(logits, range(9), [3] * 9).logprobs
    alone = [sampler.sample(logits[r : r + 1], [r], [3]).logprobs[0] for r in range(9)]
    assert alone == together


# state


def test_only_slots_with_penalties_hold_a_history_and_reuse_it():
    sampler = make_sampler(*(open_slot(slot, top_k=5) for slot in range(64)))
    sampler.sample(make_logits(64), range(64), [3] * 64)
    assert sampler.history_bytes == 0
    sampler.open(open_slot(7, presence_penalty=1.0))
    held = sampler.history_bytes
    assert 0 < held <= 4 * 256 * 8
    for _ in range(50):  # a slot that is opened again gives its history back
        sampler.open(open_slot(7, presence_penalty=1.0))
        sampler.open(open_slot(9))
    assert sampler.history_bytes == held


def test_a_long_history_grows_and_keeps_what_it_had():
    fields = {"temperature": 0, "frequency_penalty": 0.01, "prompt": [1]}
    sampler = make_sampler(open_slot(0, **fields), open_slot(1, output=[3] * 300, **fields))
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, 3] = 3.995
    drawn = [sampler.sample(logits, [0], [1 + step]).read()[0] for step in range(600)]
    assert drawn[:401] == [3] * 400 + [0]  # 399 threes leave 3 ahead, 400 do not
    assert sampler.sample(logits, [1], [301]).read() == [3]
    sampler.open(open_slot(2, output=[3] * 5000, **fields))
    rest = [sampler.sample(logits, [1], [302 + step]).read()[0] for step in range(100)]
    assert rest == [3] * 99 + [0]
    assert sampler.sample(logits, [2], [5001]).read() == [0]


def test_a_gap_in_the_output_is_caught_where_a_penalty_counts_it():
    sampler = make_sampler(open_slot(0, presence_penalty=1.0), open_slot(1))
    sampler.sample(make_logits(2), [0, 1], [3, 30])  # without a penalty any position will do
    with pytest.raises(AssertionError, match="slot 0: 2 outputs, 1 of them known"):
        sampler.sample(make_logits(1), [0], [5])


def test_a_slot_opened_again_has_nothing_of_its_last_sequence():
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[:, 7], logits[:, 8] = 3.0, 2.0
    penalised = {"temperature": 0, "repetition_penalty": 2.0}
    sampler = make_sampler(
        open_slot(0, prompt=[7], **penalised), open_slot(1, prompt=[7], **penalised)
    )
    assert sampler.sample(logits, [0, 1], [1, 1]).read() == [8, 8]
    sampler.open(open_slot(0, prompt=[1], **penalised))
    assert sampler.sample(logits, [0, 1], [1, 2]).read() == [7, 7]
    sampler.open(open_slot(0, temperature=0))
    assert sampler.sample(logits, [0, 1], [3, 3]).read() == [7, 7]


def test_many_rosters_are_forgotten_in_turn():
    sampler = make_sampler(*(open_slot(slot) for slot in range(64)))
    for slot in range(64):
        sampler.sample(make_logits(1), [slot], [3])
    assert len(sampler._batches) < 64


def test_no_rows_give_no_tokens():
    drawn = make_sampler().sample(torch.empty(0, VOCAB_SIZE), [], [])
    assert drawn.read() == []
    assert drawn.logprobs == []


# errors


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "fields", [{"temperature": 0}, {}, {"top_k": 3}, {"repetition_penalty": 1.2}]
)
def test_logits_that_are_no_numbers_give_no_token_and_hurt_no_other_row(fields, broken):
    fields = fields | {"logprobs": 1}
    sampler = make_sampler(open_slot(0, **fields), open_slot(9, **fields))
    logits = make_logits(2)
    expected = sampler.sample(logits, [0, 9], [3, 3]).read()
    sampler = make_sampler(open_slot(0, **fields), open_slot(9, **fields))
    logits[1, 100] = broken
    drawn = sampler.sample(logits, [0, 9], [3, 3])
    assert drawn.read() == [expected[0], sampling.NO_TOKEN]
    assert len(drawn.logprobs) == 2


def test_a_penalty_without_its_earlier_output_is_refused():
    opened = open_slot(0, presence_penalty=1.0, output=[1, 2])
    lacking = protocol.OpenSlot(0, 0, opened.sampling, 3, 2, opened.prompt_ids, b"")
    with pytest.raises(ProtocolError, match=r"OpenSlot.output_ids: slot 0 has 2 .* 0 ids came"):
        make_sampler(lacking)


def test_a_bad_field_is_named():
    opened = protocol.OpenSlot(0, 0, {"top_kk": 1}, 3, 0, b"", b"")
    with pytest.raises(InvalidRequestError, match="top_kk"):
        make_sampler(opened)


@pytest.mark.gpu
def test_sampling_does_not_wait_for_the_device():
    generation = Generation(24, seed=2, device="cuda")
    sampler = make_sampler(device="cuda")
    for request in range(24):
        generation.open(sampler, request, request)
    logits = make_logits(24).cuda()
    positions = [len(prompt) for prompt in generation.prompts]
    sampler.sample(logits, range(24), positions).read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = sampler.sample(logits, range(24), positions)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(drawn.read()) == 24
