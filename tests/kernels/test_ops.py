"""The set of operations: an entry point, a reference and a test file for each."""

from __future__ import annotations

import inspect
from pathlib import Path

from ember_pp import kernels
from ember_pp.kernels import ops, reference


def public_functions(module: object) -> dict[str, object]:
    return {
        name: value
        for name, value in inspect.getmembers(module, inspect.isfunction)
        if not name.startswith("_") and value.__module__ == module.__name__
    }


def test_every_op_has_a_reference_with_its_signature() -> None:
    entry_points, references = public_functions(ops), public_functions(reference)
    assert set(kernels.__all__) == set(entry_points) == set(references)
    for name, function in entry_points.items():
        assert inspect.signature(function) == inspect.signature(references[name]), name
        assert "KernelArgumentError" in inspect.getdoc(function), f"{name}: say what it raises"
        assert inspect.getdoc(references[name]), f"{name}: give the formula"


def test_every_op_has_a_test_file() -> None:
    found = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    modules = {path.stem for path in Path(kernels.__file__).parent.glob("*.py")}
    assert found - modules == set(kernels.__all__)
