"""SlotTable: the tensors of a plan equal those of a plain loop; nonsense is refused by name."""

import pytest
import torch

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32
from ember_pp.stage.input_batch import SlotTable, _copy_in_one

BLOCK_SIZE, MAX_SLOTS, MAX_BLOCKS, NUM_BLOCKS = 4, 6, 5, 40


def make_execute(plan=0, microbatch=0, **fields):
    """An ``Execute`` from plain lists; chunks are (slot, start, ids, samples)."""
    chunks = fields.get("chunks", [])
    return Execute(
        epoch=0,
        plan=plan,
        microbatch=microbatch,
        leave=pack_u32(fields.get("leave", [])),
        open=[OpenSlot(slot, 0, {}, 1, 0, b"", b"") for slot in fields.get("open", [])],
        blocks=pack_u32(number for pair in fields.get("blocks", []) for number in pair),
        join=pack_u32(fields.get("join", [])),
        chunks=pack_u32(n for s, start, ids, f in chunks for n in (s, start, len(ids), f)),
        chunk_ids=pack_i32(token for _, _, ids, _ in chunks for token in ids),
        feedback=plan - 1,
        after_idle=False,
        tap=None,
    )


class Model:
    """The same state as plain lists and loops: the oracle."""

    def __init__(self):
        self.tables = {slot: [] for slot in range(MAX_SLOTS)}
        self.computed = dict.fromkeys(range(MAX_SLOTS), 0)
        self.rosters = {}

    def rows(self, microbatch, **fields):
        """[(slot, start, ids, samples)] of the plan, the state moved on."""
        roster = self.rosters.setdefault(microbatch, [])
        for slot in fields.get("leave", []):
            roster.remove(slot)
        for slot in fields.get("open", []):
            self.tables[slot] = []
        for slot, block in fields.get("blocks", []):
            self.tables[slot].append(block)
        roster += fields.get("join", [])
        rows = [(slot, self.computed[slot], [0], True) for slot in roster]
        rows += fields.get("chunks", [])
        for slot, start, ids, _ in rows:
            self.computed[slot] = start + len(ids)
        return rows

    def check(self, inputs, rows):
        tokens = [(slot, start + i, t) for slot, start, ids, _ in rows for i, t in enumerate(ids)]
        kv_slot = [
            self.tables[slot][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for slot, position, _ in tokens
        ]
        ends = torch.tensor([len(ids) for _, _, ids, _ in rows]).cumsum(0).tolist()
        contexts = [start + len(ids) for _, start, ids, _ in rows]
        width = -(-max(contexts) // BLOCK_SIZE)
        tables = [(self.tables[slot] + [-1] * width)[:width] for slot, *_ in rows]
        sampling = [row for row, (*_, samples) in enumerate(rows) if samples]
        expected = {
            "token_ids": (torch.int64, [token for *_, token in tokens]),
            "positions": (torch.int64, [position for _, position, _ in tokens]),
            "slot_mapping": (torch.int64, kv_slot),
            "cu_seqlens_q": (torch.int32, [0, *ends]),
            "context_lens": (torch.int32, contexts),
            "block_tables": (torch.int32, tables),
            "sample_rows": (torch.int64, [ends[row] - 1 for row in sampling]),
        }
        for name, (dtype, values) in expected.items():
            tensor = getattr(inputs, name)
            assert (tensor.dtype, tensor.tolist()) == (dtype, values), name
        assert inputs.sample_slots == [rows[row][0] for row in sampling]
        assert inputs.sample_positions == [contexts[row] for row in sampling]
        assert inputs.max_query_len == max(len(ids) for _, _, ids, _ in rows)


def make_table(**options):
    return SlotTable(MAX_SLOTS, MAX_BLOCKS, BLOCK_SIZE, num_blocks=NUM_BLOCKS, **options)


# A history with every kind of change: chunks that do and do not sample and straddle blocks, a
# start behind a cached prefix, two micro-batches, leave and join in one plan, a reused slot.
HISTORY = [
    (0, {"open": [2, 0], "blocks": [(2, 7), (2, 3), (0, 9)],
         "chunks": [(2, 0, [1, 2, 3, 4, 5], 0), (0, 0, [6, 7, 8], 1)]}),
    (1, {"open": [5], "blocks": [(5, 7), (5, 11)], "chunks": [(5, 4, [9, 10], 1)]}),
    (0, {"join": [0], "chunks": [(2, 5, [11], 1)]}),
    (0, {"join": [2], "blocks": [(0, 1)]}),
    (1, {"join": [5]}),
    (0, {}),
    (0, {"leave": [0], "open": [0], "blocks": [(0, 30), (2, 31)],
         "chunks": [(0, 0, [19, 20, 21, 22], 1)]}),
    (0, {"leave": [2], "join": [0], "blocks": [(0, 32)]}),
    (1, {}),
    # Steps that follow from the one before, up to a row's last token in its block, and past it.
    (0, {}),
    (0, {"blocks": [(0, 33)]}),
    (0, {}),
    (0, {"open": [3], "blocks": [(3, 2)], "chunks": [(3, 0, [23], 1)]}),
    (0, {}),
    (0, {"blocks": [(0, 34)]}),
    (0, {"join": [3]}),
    (0, {}),
    (0, {"blocks": [(3, 35)]}),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_history_equals_plain_loop(device):
    table, model = make_table(vocab_size=32, device=device), Model()
    for plan, (microbatch, fields) in enumerate(HISTORY):
        inputs = table.apply(make_execute(plan, microbatch, **fields))
        rows = model.rows(microbatch, **fields)
        model.check(inputs, rows)
        assert inputs.block_tables.device == inputs.token_ids.device == torch.device(device)
        assert inputs.decode_slots.tolist() == model.rosters[microbatch]
        assert inputs.num_decode_rows == len(model.rosters[microbatch])


@pytest.fixture
def table():
    """Slot 0 decodes in micro-batch 0 with 4 tokens computed and one block; slot 1 is open."""
    table = make_table(vocab_size=100)
    table.apply(make_execute(open=[0, 1], blocks=[(0, 5), (1, 6)], chunks=[(0, 0, [1, 2, 3], 1)]))
    table.apply(make_execute(1, join=[0]))
    return table


NEXT = {"blocks": [(0, 8)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"open": [6]}, r"open: slot 6 of 6"),
        ({"open": [0]}, r"open: slot 0 is still in the roster of micro-batch 0"),
        ({"leave": [1]}, r"leave: not in the roster: \[1\]"),
        ({"leave": [0, 0]}, r"leave: not in the roster: a slot twice"),
        ({"join": [0]}, r"join: slot 0 is already in the roster"),
        ({"join": [1]}, r"join: nothing is computed yet in slots \[1\]"),
        ({"join": [3]}, r"join: nothing is computed yet in slots \[3\]"),
        ({"blocks": [(9, 1)]}, r"blocks: slot 9 of 6"),
        ({"blocks": [(0, 40)]}, r"blocks: slot 0 gets block 40 of 40"),
        ({"blocks": [(0, b) for b in range(5)]}, r"blocks: slot 0 would have more than 5 blocks"),
        ({"blocks": []}, r"slot 0 has no block for position 4"),
        ({"chunks": [(1, 0, [100], 0)]}, r"chunk_ids: token ids 100 .. 100 are outside"),
        ({"chunks": [(1, 0, [-1], 0)]}, r"chunk_ids: token ids -1 .. -1 are outside"),
        ({"chunks": [(0, 4, [1], 0)]}, r"chunks: slot 0 is in the roster of micro-batch 0"),
        ({"chunks": [(3, 0, [1], 0)]}, r"chunks: slot 3 was never opened"),
        ({"chunks": [(1, 0, [], 0)]}, r"chunks: slot 1 has no tokens"),
        ({"chunks": [(1, 0, [1], 0), (1, 1, [1], 0)]}, r"chunks: a slot is named twice"),
        ({"chunks": [(1, 0, [1] * 5, 0)]}, r"slot 1 has no block for position 4"),
        ({"chunks": [(1, 17, [1] * 4, 0)]}, r"a row of 21 tokens; block tables hold 5 blocks of 4"),
        ({"leave": [0]}, r"the plan has no rows"),
    ],
)  # fmt: skip
def test_refuses_nonsense_by_name(table, change, message):
    with pytest.raises(ProtocolError, match=r"plan 2, micro-batch 0: " + message):
        table.apply(make_execute(2, **(NEXT | change)))


def test_refuses_a_chunk_that_does_not_follow(table):
    table.apply(make_execute(2, 1, chunks=[(1, 1, [1, 2], 0)]))
    with pytest.raises(ProtocolError, match="slot 1 starts at 2, but 3 tokens are computed"):
        table.apply(make_execute(3, 1, chunks=[(1, 2, [1], 0)]))


@pytest.mark.parametrize("field", ["chunks", "blocks", "chunk_ids"])
def test_refuses_arrays_of_odd_length(table, field):
    fields = {name: getattr(make_execute(2, **NEXT), name) for name in Execute.__slots__}
    with pytest.raises(ProtocolError, match=field):
        table.apply(Execute(**(fields | {field: pack_u32([1, 2, 3])})))


def test_refused_nonsense_is_otherwise_fine(table):
    inputs = table.apply(make_execute(2, **NEXT))
    assert inputs.slot_mapping.tolist() == [8 * BLOCK_SIZE]


def test_one_copy_keeps_every_tensor():
    tensors = [
        torch.tensor([3, -1, 2**40]),
        torch.tensor([[1, 2, 3], [4, -5, 6]], dtype=torch.int32),
        torch.empty(0, dtype=torch.int64),
        torch.tensor([7], dtype=torch.int32),
        torch.arange(5),
    ]
    for before, after in zip(
        tensors, _copy_in_one(tensors, torch.device("cpu"), pin=False), strict=True
    ):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
