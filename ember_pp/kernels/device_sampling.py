"""Host side of ``csrc/sampling.cuh`` and ``csrc/top_logprobs.cuh``: shapes of their launches.

Shape letters: N rows that sample, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.slot_params import SlotParams

_ELEMENTS = {torch.bfloat16: "bf16", torch.float32: "float"}
_PACK = 8
"""Tokens that a thread takes at once."""
_CLUSTERS_FROM = 90
"""Compute capability, times ten, from which thread blocks can share a row."""
_CLUSTER, _THREADS = 8, 256
_MOST_SLICE_BYTES = 40 * 1024
"""Of a row that a thread block keeps in shared memory: with the rest, four thread blocks fit on a
multiprocessor of an H100."""


class DeviceSampling:
    """Draws and log-probabilities on the device of ``kernels``."""

    def __init__(self, kernels: KernelSet) -> None:
        self._kernels = kernels
        self._blocks = _CLUSTER if kernels.architecture >= _CLUSTERS_FROM else 1

    def sample_tokens(
        self, logits: Tensor, slots: Tensor, positions: Tensor, params: SlotParams
    ) -> Tensor:
        """A cluster of thread blocks per row; one thread block where there are no clusters."""
        logits = logits.contiguous()
        num_rows, vocab_size = logits.shape
        token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
        template, shared_bytes = self._template(logits)
        kernel = self._kernels.get("sampling.cuh", f"sample_tokens_kernel<{template}>", "PPPPPi")
        if num_rows:
            arguments = (
                logits.data_ptr(),
                slots.contiguous().data_ptr(),
                positions.contiguous().data_ptr(),
                params.table.data_ptr(),
                token_ids.data_ptr(),
                vocab_size,
            )
            grid = (num_rows * self._blocks, 1)
            kernel.launch(grid, _THREADS, arguments, shared_bytes=shared_bytes)
        return token_ids

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, num_top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``sample_tokens``; every thread block ranks its part, then one ranks theirs."""
        logits = logits.contiguous()
        num_rows, vocab_size = logits.shape
        num_top = min(num_top, vocab_size)
        drawn = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        ids = torch.empty((num_rows, num_top), dtype=torch.int64, device=logits.device)
        logprobs = torch.empty((num_rows, num_top), dtype=torch.float32, device=logits.device)
        template, shared_bytes = self._template(logits)
        kernel = self._kernels.get(
            "top_logprobs.cuh", f"top_logprobs_kernel<{template}>", "PPPPPii"
        )
        if num_rows:
            arguments = (
                logits.data_ptr(),
                token_ids.contiguous().data_ptr(),
                drawn.data_ptr(),
                ids.data_ptr(),
                logprobs.data_ptr(),
                vocab_size,
                num_top,
            )
            grid = (num_rows * self._blocks, 1)
            kernel.launch(grid, _THREADS, arguments, shared_bytes=shared_bytes)
        return drawn, ids, logprobs

    def _template(self, logits: Tensor) -> tuple[str, int]:
        """Template arguments, and bytes of a slice that is kept in shared memory (0: none is)."""
        num_packs = -(-logits.shape[1] // _PACK)
        slice_bytes = -(-num_packs // self._blocks) * _PACK * logits.itemsize
        is_kept = slice_bytes <= _MOST_SLICE_BYTES
        element = _ELEMENTS[logits.dtype]
        template = f"{element}, {self._blocks}, {str(is_kept).lower()}"
        return template, slice_bytes if is_kept else 0
