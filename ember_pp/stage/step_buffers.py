"""Inputs of a step at addresses that never change, brought there by one copy from pinned memory.

A step that is captured in a CUDA graph reads its inputs where they were when it was captured.
So there is one set of tensors on the device, as large as the largest step; a step of any size
uses the beginning of each. What lies behind a step's own entries, up to its padded size, is
padding: rows without tokens or context, tokens without a KV slot.

Shape letters: T tokens, R rows, N rows that sample, U new blocks.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from ember_pp.stage.input_batch import BatchInputs

_ALIGNMENT = 16
_NUM_HOST_BUFFERS = 4
"""So many steps may be on their way to the device before the host waits."""
_NO_SLOT = -1


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    """A tensor of the buffers: how long it may get, and what its padding holds."""

    capacity: int
    dtype: torch.dtype
    padding: int
    columns: int = 0
    """0: one dimension."""

    @property
    def num_bytes(self) -> int:
        return self.capacity * max(1, self.columns) * self.dtype.itemsize

    @property
    def aligned_bytes(self) -> int:
        return -(-self.num_bytes // _ALIGNMENT) * _ALIGNMENT


class _HostBuffer:
    """One packed buffer of the host, its tensors, and when the device has read it."""

    def __init__(self, fields: Mapping[str, _Field], *, is_pinned: bool) -> None:
        num_bytes = sum(field.aligned_bytes for field in fields.values())
        self.packed = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)
        self.tensors = _views(self.packed, fields)
        self.fields = fields
        self.used = dict.fromkeys(fields, 0)
        self.copied = torch.cuda.Event() if is_pinned else None  # type: ignore[no-untyped-call]
        for name, tensor in self.tensors.items():
            tensor.fill_(fields[name].padding)

    def write(self, name: str, values: Tensor) -> None:
        """``values`` at the beginning, padding behind."""
        count, tensor = len(values), self.tensors[name]
        tensor[:count] = values
        if count < self.used[name]:
            tensor[count : self.used[name]] = self.fields[name].padding
        self.used[name] = count


class StepBuffers:
    """The inputs of steps of one kind.

    Args:
        max_tokens: most tokens of a step.
        max_rows: most rows of a step, and most that sample.
        max_new_blocks: most new blocks that ``fill`` takes at once.
        is_decode: every row has one token and samples: then nothing is kept apart for tokens and
            rows that sample, and ``cu_seqlens_q`` counts up.
        device: of the stage.
    """

    def __init__(
        self,
        *,
        max_tokens: int,
        max_rows: int,
        max_new_blocks: int,
        is_decode: bool,
        device: torch.device,
    ) -> None:
        long, short = torch.int64, torch.int32
        fields = {
            "positions": _Field(max_tokens, long, 0),
            "slot_mapping": _Field(max_tokens, long, -1),
            "sample_positions": _Field(max_rows, long, 0),
            "context_lens": _Field(max_rows, short, 0),
            "slots": _Field(max_rows, short, 0),
            "sample_slots": _Field(max_rows, short, _NO_SLOT),
            "new_blocks": _Field(max_new_blocks, short, 0, 3),
        }
        if not is_decode:
            fields["token_ids"] = _Field(max_tokens, long, 0)
            fields["sample_rows"] = _Field(max_rows, long, 0)
            fields["cu_seqlens_q"] = _Field(max_rows + 1, short, 0)
            fields["decode_lens"] = _Field(max_rows, short, 0)
        self._is_decode = is_decode
        self._max_new_blocks = max_new_blocks
        self._device = device
        is_pinned = device.type == "cuda"
        count = _NUM_HOST_BUFFERS if is_pinned else 1
        self._hosts = [_HostBuffer(fields, is_pinned=is_pinned) for _ in range(count)]
        self._turn = itertools.cycle(self._hosts)
        self._packed = torch.empty_like(self._hosts[0].packed, device=device, pin_memory=False)
        self._packed.copy_(self._hosts[0].packed)
        self._tensors = _views(self._packed, fields)
        if is_decode:
            self._tensors["token_ids"] = torch.zeros(max_tokens, dtype=long, device=device)
            self._tensors["cu_seqlens_q"] = torch.arange(max_rows + 1, dtype=short, device=device)

    @property
    def num_bytes(self) -> int:
        """Memory of the device."""
        return self._packed.nbytes

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor on the device; see ``BatchInputs`` for what it holds.

        ``slots`` and ``sample_slots`` are int32, the latter -1 for padding; ``decode_lens`` is
        that of ``PagedRows``.
        """
        return self._tensors[name]

    def fill(self, inputs: BatchInputs) -> Tensor:
        """Bring the inputs of a step, on the host, to the device; nothing waits for it.

        Returns:
            [U, 3] int32 on the device: ``inputs.new_blocks``.
        """
        host = next(self._turn)
        if host.copied is not None:
            host.copied.synchronize()
        host.write("positions", inputs.positions)
        host.write("slot_mapping", inputs.slot_mapping)
        host.write("context_lens", inputs.context_lens)
        host.write("slots", inputs.slots)
        if self._is_decode:
            host.write("sample_slots", inputs.slots)
            host.write("sample_positions", inputs.context_lens)
        else:
            self._write_mixed(host, inputs)
        num_new = len(inputs.new_blocks)
        if num_new > self._max_new_blocks:
            num_new = 0
        if num_new:
            host.write("new_blocks", inputs.new_blocks)
        self._packed.copy_(host.packed, non_blocking=True)
        if host.copied is not None:
            host.copied.record()
        if len(inputs.new_blocks) > num_new:  # prefixes found in the cache, of many sequences
            return _to_device(inputs.new_blocks, self._device)
        return self._tensors["new_blocks"][:num_new]

    def _write_mixed(self, host: _HostBuffer, inputs: BatchInputs) -> None:
        num_rows, num_tokens = len(inputs.slots), len(inputs.positions)
        host.write("token_ids", inputs.token_ids)
        assert inputs.decode_lens is not None, "plans with chunks say which rows are decodes"
        host.write("decode_lens", inputs.decode_lens)
        host.write("sample_rows", inputs.sample_rows)
        host.write("sample_slots", torch.tensor(inputs.sample_slots, dtype=torch.int32))
        host.write("sample_positions", torch.tensor(inputs.sample_positions, dtype=torch.int64))
        ends = host.tensors["cu_seqlens_q"]
        ends[: num_rows + 1] = inputs.cu_seqlens_q
        ends[num_rows + 1 :] = num_tokens  # rows of padding have no tokens


def _views(packed: Tensor, fields: Mapping[str, _Field]) -> dict[str, Tensor]:
    views, offset = {}, 0
    for name, field in fields.items():
        view = packed[offset : offset + field.num_bytes].view(field.dtype)
        views[name] = view.view(-1, field.columns) if field.columns else view
        offset += field.aligned_bytes
    return views


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    # Copied from pageable memory it would wait for the stream.
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
