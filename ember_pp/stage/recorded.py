"""The plans of a run as ``debug.record`` writes them, and whose tokens their rows were.

Torch-free. For ``job=check``, which replays plans and lays what stages computed for a row
(``tap.py``) beside what another model computes for the same token of the same request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute
from ember_pp.stage.slots import PlanRows, Slots

_LENGTH_BYTES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedPlan:
    """One plan; a request is known by its seed, which ``job=check`` makes its index."""

    execute: Execute
    requests: list[int]
    """Of each of the T tokens."""
    positions: list[int]
    """Of each token, in its sequence."""
    sample_rows: list[int]
    """The tokens whose logits are computed, as indices into the T."""
    unfinished: list[int]
    """Requests whose tokens are not all known to the cache after this plan: a later one goes on."""


def read_plans(path: Path) -> list[Execute]:
    """Every plan in the file, in order: each after its length as four little-endian bytes.

    Raises:
        ProtocolError: these are no plans.
    """
    plans = []
    data = memoryview(path.read_bytes())
    while data:
        end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        message = protocol.decode(bytes(data[_LENGTH_BYTES:end]))
        if not isinstance(message, Execute):
            raise ProtocolError(f"{path}: expected plans, got a {type(message).__name__}")
        plans.append(message)
        data = data[end:]
    return plans


def follow(
    plans: list[Execute], *, max_slots: int, max_blocks_per_sequence: int, block_size: int
) -> list[RecordedPlan]:
    """The plans with the tokens that their rows stand for; sizes as the stages had them."""
    slots = Slots(max_slots, max_blocks_per_sequence, block_size)
    request_of: dict[int, int] = {}
    followed = []
    for execute in plans:
        rows = slots.apply(execute)
        request_of |= {opened.slot: opened.seed for opened in execute.open}
        followed.append(_follow_one(execute, rows, request_of))
    return followed


def _follow_one(execute: Execute, rows: PlanRows, request_of: Mapping[int, int]) -> RecordedPlan:
    requests = [request_of[slot] for slot in rows.roster.slots]
    positions = rows.decode_positions
    sample_rows = list(range(rows.num_decodes))
    unfinished = []
    for slot, start, length, is_sampling in zip(
        rows.chunk_slots, rows.chunk_starts, rows.chunk_lens, rows.chunk_samples, strict=True
    ):
        requests += [request_of[slot]] * length
        positions += range(start, start + length)
        if is_sampling:
            sample_rows.append(len(requests) - 1)
        else:
            unfinished.append(request_of[slot])
    return RecordedPlan(
        execute=execute,
        requests=requests,
        positions=positions,
        sample_rows=sample_rows,
        unfinished=unfinished,
    )


def num_blocks(plans: list[Execute]) -> int:
    """The least number of KV blocks with which all plans can run."""
    return 1 + max(
        (block for execute in plans for block in protocol.unpack_u32(execute.blocks)[1::2]),
        default=0,
    )


def from_wanted(wanted: Mapping[str, Any]) -> list[RecordedPlan]:
    """The plans that a child of ``job=check`` is given: ``record`` and ``sizes``."""
    return follow(read_plans(Path(wanted["record"])), **wanted["sizes"])
