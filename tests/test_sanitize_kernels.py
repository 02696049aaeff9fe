"""scripts/sanitize_kernels.py: no kernel can be forgotten; the launches themselves need a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ember_pp.kernels import build, make_ops
from scripts import sanitize_kernels
from scripts.sanitize_kernels import CASES, ONLY_ON, Card, kernels_by_file, kernels_in, not_launched


def test_every_file_of_kernels_has_a_case() -> None:
    assert sorted(CASES) == sorted(kernels_by_file())
    assert set(ONLY_ON) <= set(CASES)


class CpuCard(Card):
    """The same inputs, and the reference."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.ops = make_ops("reference", self.device)
        self._generator = torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "file",
    [
        "embedding.cuh",
        "qk_norm_rope_store_kv.cuh",
        "rms_norm.cuh",
        "sampling.cuh",
        "skinny_linear.cuh",
        "swiglu.cuh",
        "top_logprobs.cuh",
    ],
)
def test_cases_call_operations_as_they_are(file: str) -> None:
    """Those that go through ``Ops`` alone; the other files need a card for the call itself."""
    CASES[file](CpuCard())


def test_kernels_are_found_whatever_stands_before_their_names() -> None:
    source = """
    /* __global__ void old_kernel(int x); */
    // __global__ void older_kernel(int x);
    template <int kA, typename T>
    __global__ void __launch_bounds__(kA* kB, 16 / (kA * max(1, kB)))
        one_kernel(const __grid_constant__ Arguments a) {}
    __global__ void two_kernel(float* x) {}
    __global__ __launch_bounds__(128) void three_kernel(float* x) {}
    extern "C" __global__ void __cluster_dims__(2, 1, 1) four_kernel(float* x) {}
    __device__ void no_kernel(float* x) {}
    """
    assert kernels_in(source) == ["one_kernel", "two_kernel", "three_kernel", "four_kernel"]
    assert kernels_in("__device__ void no_kernel(float* x) {}") == []


def test_as_many_are_found_as_there_are() -> None:
    for path in build.SOURCES.glob("*.cuh"):
        text = path.read_text("ascii")
        assert len(kernels_in(text)) == text.count("__global__"), path.name


def test_launches_are_known_by_their_mangled_names() -> None:
    symbols = ["_ZN5ember11norm_kernelI4bf16Li8EEEvPKT_", "_ZN5ember10add_kernelEPf"]
    names = ["norm_kernel", "rms_norm_kernel", "add_kernel", "kernel"]
    assert not_launched(symbols, names) == ["rms_norm_kernel", "kernel"]


class PretendedCard:
    kernels = SimpleNamespace(architecture=80)


def test_a_kernel_that_no_case_launches_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is a file without a case; what one case raises does not stop the others."""
    launches: Counter[str] = Counter()

    def fail(card: object) -> None:
        raise ValueError("no such shape")

    def launch(card: object) -> None:
        launches["_ZN5ember12third_kernelEv"] += 1

    monkeypatch.setattr(sanitize_kernels, "Card", PretendedCard)
    monkeypatch.setattr(sanitize_kernels.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(sanitize_kernels, "CASES", {"b.cuh": fail, "c.cuh": launch, "d.cuh": fail})
    monkeypatch.setattr(sanitize_kernels, "ONLY_ON", {"c.cuh": 80, "d.cuh": 90})
    files = {"a.cuh": ["first_kernel"], "b.cuh": ["second_kernel"], "c.cuh": ["third_kernel"]}
    files["d.cuh"] = ["fourth_kernel"]
    monkeypatch.setattr(sanitize_kernels, "kernels_by_file", lambda: files)

    problems = list(sanitize_kernels.launch_all(list(files), launches))

    assert [problem.partition(":")[0] for problem in problems] == ["a.cuh", "b.cuh", "b.cuh"]
    assert problems[0].endswith("launches first_kernel")
    assert "no such shape" in problems[1]
    assert problems[2].endswith("launches second_kernel")


def test_files_that_only_share_code_need_no_case(tmp_path: Path) -> None:
    (tmp_path / "shared.cuh").write_text("__device__ int two() { return 2; }\n")
    (tmp_path / "one.cuh").write_text("__global__ void one_kernel(int* x) {}\n")
    assert kernels_by_file(tmp_path) == {"one.cuh": ["one_kernel"]}
