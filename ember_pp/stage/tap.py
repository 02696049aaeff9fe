"""What a stage computes for a plan, written to a file: how ``job=check`` sees inside."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ember_pp import checkpoint
from ember_pp.protocol import Execute


def tap_path(folder: Path, plan: int, stage_index: int) -> Path:
    """The file of a plan and a stage."""
    return folder / f"plan-{plan}.stage-{stage_index}.safetensors"


class Tap:
    """Copies of what a plan computes on this stage, for one safetensors file.

    Names: ``input`` (all but the first stage), ``layer.<i>`` after each layer, ``logits`` and
    ``token_ids`` of the rows that sample (last stage).
    """

    def __init__(self, folder: str, plan: int, stage_index: int) -> None:
        self._path = tap_path(Path(folder), plan, stage_index)
        self._tensors: dict[str, Tensor] = {}

    @classmethod
    def of(cls, execute: Execute, stage_index: int) -> Tap | None:
        """As ``execute.tap`` asks; None where it does not."""
        return None if execute.tap is None else cls(execute.tap, execute.plan, stage_index)

    def keep(self, name: str, tensor: Tensor) -> None:
        """Remember ``tensor`` as it is now."""
        self._tensors[name] = tensor.clone()  # layers may go on in place

    def keep_layer(self, layer_index: int, hidden_states: Tensor) -> None:
        """Remember what comes out of a layer, by its index in the model."""
        self.keep(f"layer.{layer_index}", hidden_states)

    def write(self) -> None:
        """Write the file; waits for the device."""
        checkpoint.save_tensors(self._path, self._tensors)
