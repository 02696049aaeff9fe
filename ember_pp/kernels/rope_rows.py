"""By which angles each token of a step is turned, looked up once for all layers."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class RopeRows:
    """A table of angles and the position of each token in it.

    Shapes:
        table:      [P, d] fp32   ``d / 2`` cosines, then ``d / 2`` sines of each position
        positions:  [T] int64     below P
    """

    table: Tensor
    positions: Tensor

    @functools.cached_property
    def cos_sin(self) -> tuple[Tensor, Tensor]:
        """[T, d] fp32 each, for both halves of a head; the first half of the sines is negated,
        so that no sign is left to apply."""
        cos, sin = self.table.index_select(0, self.positions).chunk(2, dim=-1)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
