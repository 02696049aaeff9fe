"""PlanWriter and TokenReader: what goes to the device and comes back without a copy."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from ember_pp.kernels import StepState
from ember_pp.kernels.step_state import BEGAN, INPUT_WAIT, OUTPUT_WAIT
from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32, unpack_i32
from ember_pp.stage.plan_memory import PlanRecords, PlanWriter, TokenReader
from ember_pp.stage.slots import PlanRows, Slots
from ember_pp.stage.timing import PlanTimes

CPU = torch.device("cpu")


def apply(slots: Slots, plan: int, **fields: bytes) -> PlanRows:
    nothing = dict.fromkeys(("leave", "blocks", "join", "chunks", "chunk_ids"), b"")
    opened = [OpenSlot(slot, 0, {}, 3, 0, b"", b"") for slot in fields.pop("opened", b"")]
    return slots.apply(
        Execute(
            epoch=0,
            plan=plan,
            microbatch=0,
            open=opened,
            feedback=plan - 1,
            after_idle=False,
            tap=None,
            **(nothing | fields),
        )
    )


def test_words_are_rows_then_blocks_then_ids() -> None:
    slots, writer = Slots(6, 8, 4), PlanWriter(6, 32, 2, CPU)
    first = apply(
        slots,
        0,
        opened=bytes([5, 2]),
        blocks=pack_u32([5, 7, 5, 9, 2, 3]),
        chunks=pack_u32([5, 0, 6, 1, 2, 0, 3, 0]),
        chunk_ids=pack_i32(range(50, 59)),
    )
    words = writer.write(0, first, 16)
    expected = [5, 0, 6, 1, 2, 0, 3, 0, 5, 0, 7, 5, 1, 9, 2, 0, 3, *range(50, 59)]
    assert words.words[: words.num_words].tolist() == expected
    assert words._replace(words=words.words[:0])[1:] == (2, 0, 0, 3, 9, 16, 0, 1)

    second = apply(
        slots, 1, join=pack_u32([5]), chunks=pack_u32([2, 3, 1, 1]), chunk_ids=pack_i32([8])
    )
    words = writer.write(1, second, 16)
    assert words.words[: words.num_words].tolist() == [5, 6, 1, 1, 2, 3, 1, 1, 8]
    assert words[1:] == (2, 1, 0, 0, 2, 16, 1, 2)

    third = apply(slots, 2)
    words = writer.write(2, third, 1)
    assert words.words[: words.num_words].tolist() == [5, 6, 1, 1], "as written before"
    assert words[1:] == (1, 1, 1, 0, 1, 1, 0, 3)


def test_a_plan_with_more_new_blocks_than_usual_gets_more_memory() -> None:
    slots, writer = Slots(2, 4000, 4), PlanWriter(2, 4, 1, CPU)
    blocks = [n for block in range(3000) for n in (1, block)]
    rows = apply(
        slots,
        0,
        opened=bytes([1]),
        blocks=pack_u32(blocks),
        chunks=pack_u32([1, 9000, 1, 1]),
        chunk_ids=pack_i32([4]),
    )
    words = writer.write(0, rows, 4)
    assert words.num_new_blocks == 3000
    assert words.words[words.num_words - 1] == 4


def make_state() -> StepState:
    return StepState.allocate(
        max_tokens=4,
        max_rows=4,
        max_slots=4,
        max_blocks_per_sequence=1,
        block_size=16,
        max_pending=3,
        last_tokens=None,
        device=CPU,
    )


def write(state: StepState, plan: int, tokens: list[int]) -> None:
    row = state.results[plan % 3]
    row[2 : 2 + len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
    row[:2].view(torch.int64)[0] = plan + 1


def test_tokens_are_there_once_their_plan_has_its_mark() -> None:
    state = make_state()
    reader = TokenReader(state)
    pending = [reader.pending(plan, 2) for plan in range(3)]
    write(state, 1, [8, -1])
    assert [tokens.is_ready for tokens in pending] == [False, True, False]
    assert list(unpack_i32(pending[1].read())) == [8, -1]
    write(state, 4, [9, 9, 9])  # the same row, three plans later
    assert not pending[1].is_ready
    assert list(unpack_i32(reader.pending(4, 3).read())) == [9, 9, 9]


def test_reading_waits() -> None:
    state = make_state()
    pending = TokenReader(state).pending(0, 1)
    timer = threading.Timer(0.05, write, (state, 0, [3]))
    timer.start()
    assert list(unpack_i32(pending.read())) == [3]
    timer.join()


class Broken:
    """A stream whose device has failed."""

    def query(self) -> bool:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_failed_device_is_noticed_while_reading() -> None:
    pending = TokenReader(make_state()).pending(0, 1)
    pending._stream = Broken()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pending.read()


def test_a_failed_device_is_noticed_while_polling() -> None:
    pending = TokenReader(make_state()).pending(0, 1)
    pending._stream = Broken()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        any(pending.poll() for _ in range(10_000))


def test_a_record_is_fresh_once_opened_and_read_by_its_plan() -> None:
    state = make_state()
    records = PlanRecords(state.records)
    state.records.fill_(7)
    records.open(4)
    assert records.read(4) == PlanTimes(*[0] * 8)
    assert state.records[0].tolist() == state.records[2].tolist() == [7] * 8
    state.records[1] = torch.arange(8) + 1
    assert records.read(4) == PlanTimes(1, 2, 3, 4, 5, 6, 7, 8)


def test_kernels_write_where_the_record_is_read() -> None:
    state = make_state()
    records = PlanRecords(state.records)
    for word, name in enumerate(PlanTimes._fields):
        address = records.address(5, name)
        assert address == state.records.data_ptr() + (2 * 8 + word) * 8
        ctypes.c_int64.from_address(address).value = 50 + word
        assert getattr(records.read(5), name) == 50 + word
    steps = (BEGAN, "began"), (INPUT_WAIT, "input_wait"), (OUTPUT_WAIT, "output_wait")
    for word, name in steps:
        assert PlanTimes._fields[word] == name, "step.cuh writes these itself"


def test_a_plan_is_done_with_the_last_word_of_its_record() -> None:
    state = make_state()
    records = PlanRecords(state.records)
    for word in range(8):
        assert not records.is_done(1)
        state.records[1, word] = 3
    assert records.is_done(1)
    assert not records.is_done(0)


def test_a_failed_device_is_noticed_while_waiting_for_a_record() -> None:
    records = PlanRecords(make_state().records)
    records._stream = Broken()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        any(records.is_done(0) for _ in range(10_000))
