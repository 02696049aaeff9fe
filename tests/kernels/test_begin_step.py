"""begin_step: rows of a plan become the inputs of a step, with padding behind them."""

from __future__ import annotations

import random

import pytest
import torch

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import PlanWords, StepState
from ember_pp.kernels.step_state import BEGAN, INPUT_WAIT
from kernel_backends import BACKENDS, cpu_ops, open_backend

BLOCK_SIZE = 16


def make_state(
    device: torch.device, *, max_rows: int = 40, max_tokens: int = 600, is_first: bool = True
) -> StepState:
    """Full of what an earlier step may have left."""
    max_slots = max_rows + 7
    generator = torch.Generator().manual_seed(1)
    last_tokens = torch.randint(0, 2**40, (max_slots,), generator=generator)
    state = StepState.allocate(
        max_tokens=max_tokens,
        max_rows=max_rows,
        max_slots=max_slots,
        max_blocks_per_sequence=64,
        block_size=BLOCK_SIZE,
        max_pending=3,
        last_tokens=last_tokens.to(device) if is_first else None,
        device=device,
    )
    for tensor in state.expanded:
        tensor.fill_(77)
    state.block_table.copy_(torch.randint(0, 5000, (max_slots, 64), generator=generator))
    return state


def make_plan(
    state: StepState,
    num_decodes: int,
    chunk_lens: list[int],
    *,
    num_new: int,
    seed: int = 0,
    padding: int = 9,
) -> PlanWords:
    """Rows of any slots, some of which get new blocks."""
    rng = random.Random(seed)
    num_slots = len(state.block_table)
    slots = rng.sample(range(num_slots), num_decodes + len(chunk_lens))
    rows = [(slot, rng.randrange(900), 1, 1) for slot in slots[:num_decodes]]
    rows += [
        (slot, rng.randrange(400), length, rng.randrange(2))
        for slot, length in zip(slots[num_decodes:], chunk_lens, strict=True)
    ]
    places = rng.sample(range(num_slots * 64), num_new)
    blocks = [(place // 64, place % 64, 6000 + i) for i, place in enumerate(places)]
    ids = [rng.randrange(2**17) for _ in range(sum(chunk_lens))]
    words = [n for row in rows for n in row] + [n for new in blocks for n in new] + ids
    num_tokens = num_decodes + len(ids)
    is_pinned = state.slots.is_cuda
    return PlanWords(
        words=torch.tensor([*words, 123], dtype=torch.int32, pin_memory=is_pinned),
        num_rows=len(rows),
        num_decodes=num_decodes,
        decode_offset=rng.randrange(100),
        num_new_blocks=num_new,
        num_tokens=num_tokens,
        padded_tokens=min(num_tokens + padding, len(state.token_ids)),
        turn=1,
        mark=2**33 + 5,
    )


def expand(plan: PlanWords, state: StepState) -> dict[str, list[int]]:
    """The definition, by loops over ``state`` as it was before."""
    words = plan.words.tolist()
    table = state.block_table.tolist()
    at = 4 * plan.num_rows
    for i in range(plan.num_new_blocks):
        slot, column, block = words[at + 3 * i : at + 3 * i + 3]
        table[slot][column] = block
    ids = iter(words[at + 3 * plan.num_new_blocks :])
    names = (
        "token_ids positions slot_mapping slots context_lens decode_lens cu_seqlens_q sample_rows "
        "sample_slots sample_positions"
    )
    found: dict[str, list[int]] = {name: [] for name in names.split()}
    found["cu_seqlens_q"].append(0)
    last_tokens = None if state.last_tokens is None else state.last_tokens.tolist()
    for row in range(plan.num_rows):
        slot, start, length, samples = words[4 * row : 4 * row + 4]
        is_decode = row < plan.num_decodes
        start += plan.decode_offset if is_decode else 0
        for position in range(start, start + length):
            token = next(ids) if not is_decode else last_tokens[slot] if last_tokens else 0
            found["token_ids"].append(token)
            found["positions"].append(position)
            block = table[slot][position // BLOCK_SIZE]
            found["slot_mapping"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
        found["slots"].append(slot)
        found["context_lens"].append(start + length)
        found["decode_lens"].append(start + 1 if length == 1 else 0)
        found["cu_seqlens_q"].append(len(found["token_ids"]))
        if samples:
            found["sample_rows"].append(len(found["token_ids"]) - 1)
            found["sample_slots"].append(slot)
            found["sample_positions"].append(start + length)
    tokens, rows = plan.padded_tokens, len(state.slots)
    for name, padding, size in (
        ("token_ids", 0, tokens),
        ("positions", 0, tokens),
        ("slot_mapping", -1, tokens),
        ("slots", 0, rows),
        ("context_lens", 0, rows),
        ("decode_lens", 0, rows),
        ("cu_seqlens_q", plan.num_tokens, rows + 1),
        ("sample_rows", 0, rows),
        ("sample_slots", -1, rows),
        ("sample_positions", 0, rows),
    ):
        found[name] += [padding] * (size - len(found[name]))
    found["block_table"] = [block for row in table for block in row]
    found["turn_and_mark"] = [plan.turn, plan.mark]
    return found


def check(plan: PlanWords, state: StepState, expected: dict[str, list[int]]) -> None:
    for name, values in expected.items():
        found = getattr(state, name).flatten().tolist()
        assert found[: len(values)] == values, name
        # Tokens behind the padding are not of this step.
        assert all(value == 77 for value in found[len(values) :]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_decodes", "chunk_lens", "num_new"),
    [
        (1, [], 0),
        (40, [], 7),
        (0, [1], 1),
        (0, [600], 40),
        (3, [1, 17, 2], 0),
        (31, [33, 1, 1, 64, 5], 100),
        (20, [20] * 20, 900),
    ],
)
def test_expands_every_row(
    num_decodes: int, chunk_lens: list[int], num_new: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    state = make_state(device)
    plan = make_plan(state, num_decodes, chunk_lens, num_new=num_new)
    expected = expand(plan, state)
    ops.begin_step(plan, state)
    check(plan, state, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_threads(backend: str) -> None:
    ops, device = open_backend(backend)
    state = make_state(device, max_rows=2500, max_tokens=4000)
    plan = make_plan(state, 1500, [1, 2, 3] * 300, num_new=2000, padding=100)
    expected = expand(plan, state)
    ops.begin_step(plan, state)
    check(plan, state, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_notes_when_it_began_and_when_the_step_is_ready_for_its_input(backend: str) -> None:
    ops, device = open_backend(backend)
    state = make_state(device)
    plan = make_plan(state, 3, [2], num_new=0)
    before = state.records.clone()
    ops.begin_step(plan, state)
    if device.type == "cuda":
        torch.cuda.synchronize()
    changed = (state.records != before).nonzero().tolist()
    assert changed == [[plan.turn, BEGAN], [plan.turn, INPUT_WAIT]]
    assert 0 < state.records[plan.turn, BEGAN] <= state.records[plan.turn, INPUT_WAIT]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_stage_has_no_tokens_for_decodes(backend: str) -> None:
    ops, device = open_backend(backend)
    state = make_state(device, is_first=False)
    plan = make_plan(state, 5, [3], num_new=2)
    expected = expand(plan, state)
    ops.begin_step(plan, state)
    check(plan, state, expected)


@pytest.mark.gpu
def test_reads_what_the_host_wrote_last() -> None:
    """The same words at the same address, changed between launches."""
    ops, device = open_backend("cuda")
    state = make_state(device)
    plan = make_plan(state, 4, [7], num_new=3)
    for seed in range(200):
        other = make_plan(state, 4, [7], num_new=3, seed=seed)
        plan.words.copy_(other.words)
        plan = plan._replace(decode_offset=other.decode_offset)
        expected = expand(plan, state)
        ops.begin_step(plan, state)
        torch.cuda.synchronize()
        check(plan, state, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_rows": 41}, "num_rows: expected at most 40, got 41"),
        ({"num_decodes": 9}, "num_decodes: expected at most 6, got 9"),
        ({"padded_tokens": 601}, "padded_tokens: expected at most 600, got 601"),
        ({"num_tokens": 30}, "num_tokens: expected at most 17, got 30"),
        ({"num_new_blocks": 4}, "words: expected at most"),
        ({"turn": 3}, "turn: expected at most 3, got 4"),
    ],
)
def test_rejects_bad_arguments_by_name(change: dict[str, int], message: str) -> None:
    state = make_state(torch.device("cpu"))
    plan = make_plan(state, 5, [3], num_new=2)
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().begin_step(plan._replace(**change), state)
