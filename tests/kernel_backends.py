"""The implementations of the operations, each on its device, as tests go through them."""

from __future__ import annotations

import functools

import pytest
import torch

from ember_pp.kernels import Ops, make_ops

BACKENDS = [
    "cpu",
    pytest.param("cuda-reference", marks=pytest.mark.gpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@functools.cache
def open_backend(name: str) -> tuple[Ops, torch.device]:
    """The operations and the device of one of ``BACKENDS``."""
    if name == "cpu":
        device = torch.device("cpu")
        return make_ops("reference", device), device
    device = torch.device("cuda", 0)
    return make_ops("cuda" if name == "cuda" else "reference", device), device


def cpu_ops() -> Ops:
    """For what does not depend on the implementation: the checks of arguments."""
    return open_backend("cpu")[0]
