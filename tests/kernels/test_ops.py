"""The set of operations: an entry point, a reference and a test file for each."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from ember_pp import kernels
from ember_pp.errors import ConfigError
from ember_pp.kernels import Ops, make_ops, reference
from ember_pp.kernels.cuda_ops import CudaOps
from ember_pp.kernels.ops import Backend

QUESTIONS = {"captures_attention"}
"""Of ``Ops``, what computes nothing."""


def public_functions(owner: object) -> dict[str, object]:
    module = getattr(owner, "__module__", None) or owner.__name__
    return {
        name: value
        for name, value in inspect.getmembers(owner, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == module
    }


def arguments_of(function: object) -> list[inspect.Parameter]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.name != "self"]


@pytest.mark.parametrize("implementation", [reference, CudaOps, Backend])
def test_every_implementation_has_every_op_with_its_signature(implementation: object) -> None:
    entry_points, implemented = public_functions(Ops), public_functions(implementation)
    assert set(entry_points) == set(implemented)
    for name, function in entry_points.items():
        assert arguments_of(function) == arguments_of(implemented[name]), name
        assert inspect.getdoc(implemented[name]), f"{name}: give the formula"


def test_every_op_says_what_it_raises() -> None:
    for name, function in public_functions(Ops).items():
        if name in QUESTIONS:
            continue
        assert "KernelArgumentError" in inspect.getdoc(function), f"{name}: say what it raises"


def test_every_op_has_a_test_file() -> None:
    found = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    modules = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    ops = set(public_functions(Ops)) - QUESTIONS
    assert found - (modules - ops) == ops


def test_cuda_kernels_are_refused_for_a_device_that_is_none() -> None:
    with pytest.raises(ConfigError, match=r"^kernels: cuda needs a CUDA device, .* is on cpu"):
        make_ops("cuda", torch.device("cpu"))
