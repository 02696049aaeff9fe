"""The paged KV cache of one stage: one tensor for all its layers."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ember_pp.errors import CapacityError
from ember_pp.model_config import ModelConfig


@dataclasses.dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values by layer, block and offset; made by ``allocate``.

    Slots that were never stored hold whatever the memory held: attention reads none of them.
    """

    storage: Tensor
    """[num_layers, 2, B, S, K, d]: B blocks of S tokens, keys then values."""

    @classmethod
    def allocate(
        cls,
        cfg: ModelConfig,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> KVCache:
        """Memory for ``num_layers`` layers of this stage.

        Raises:
            CapacityError: the device does not have that much; says how much and which key.
        """
        shape = (num_layers, 2, num_blocks, block_size, cfg.num_kv_heads, cfg.head_dim)
        try:
            return cls(torch.empty(shape, dtype=dtype, device=device))
        except RuntimeError as error:  # torch has no type of its own for the CPU's failure
            num_bytes = dtype.itemsize * torch.Size(shape).numel()
            detail = str(error).partition("\n")[0].partition(" Including ")[0].rstrip(".")
            raise CapacityError(
                f"cache.memory_gib: {num_bytes / 2**30:.2f} GiB of KV cache do not fit on "
                f"{device}: {detail}; lower it, or cache.memory_share where it is not set"
            ) from None

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.storage.shape[2]

    @property
    def block_size(self) -> int:
        """S, in tokens."""
        return self.storage.shape[3]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.storage.nbytes

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """``(k_cache, v_cache)``, each [B, S, K, d], of the stage's layer ``index`` from 0."""
        both = self.storage[index]
        return both[0], both[1]
