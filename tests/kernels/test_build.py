"""Building kernels: what a key depends on, one artefact whoever asks, and every architecture."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ember_pp.errors import KernelBuildError
from ember_pp.kernels import build
from ember_pp.kernels.build import ARCHITECTURES, Binary, KernelSource
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.kernels.skinny_linear import make_plan
from ember_pp.model_config import ModelConfig
from paged_model import PagedModel
from scripts.sanitize_kernels import kernels_by_file

COMPILER = (13, 0)
HEADER = "namespace ember { constexpr int kStep = 1; }\n"
KERNEL = """#include "step.cuh"
namespace ember {
template <typename Element>
__global__ void add_kernel(Element* x) { x[threadIdx.x] += kStep; }
}
"""


def has_compiler() -> bool:
    try:
        build.compiler_version()
    except KernelBuildError:
        return False
    return True


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="needs NVRTC: pip install 'ember-pp[cuda]'"
)


@pytest.fixture
def source(tmp_path: Path) -> KernelSource:
    folder = tmp_path / "csrc"
    folder.mkdir()
    (folder / "step.cuh").write_text(HEADER)
    (folder / "add.cuh").write_text(KERNEL)
    return KernelSource("add.cuh", "add_kernel<int>", folder)


# ------------------------------------------------------------------------------------
# keys and stored bytes


def test_a_key_depends_on_all_that_a_kernel_is_built_from(source: KernelSource) -> None:
    keys = [build.key_of(source, 90, COMPILER)]
    assert build.key_of(source, 90, COMPILER) == keys[0]
    keys.append(build.key_of(source, 80, COMPILER))
    keys.append(build.key_of(source, 90, (13, 1)))
    other = KernelSource(source.file, "add_kernel<float>", source.folder)
    keys.append(build.key_of(other, 90, COMPILER))
    (source.folder / "step.cuh").write_text(HEADER.replace("1", "2"))
    keys.append(build.key_of(source, 90, COMPILER))
    (source.folder / "add.cuh").write_text(KERNEL.replace("+=", "-="))
    keys.append(build.key_of(source, 90, COMPILER))
    assert len(set(keys)) == len(keys)


def test_a_key_depends_on_flags(source: KernelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.key_of(source, 90, COMPILER)
    monkeypatch.setattr(build, "_FLAGS", {"std": "c++20"})
    assert build.key_of(source, 90, COMPILER) != before


def test_a_key_does_not_depend_on_files_that_are_not_included(source: KernelSource) -> None:
    before = build.key_of(source, 90, COMPILER)
    (source.folder / "other.cuh").write_text("// nothing to do with it\n")
    assert build.key_of(source, 90, COMPILER) == before


def test_includes_are_followed_once_however_they_refer_to_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.cuh").write_text('#include "b.cuh"\n  #include "c.cuh"\n')
    (tmp_path / "b.cuh").write_text('#include "c.cuh"\n')
    (tmp_path / "c.cuh").write_text('#include "a.cuh"\n')
    assert list(build.sources_of(KernelSource("a.cuh", "k", tmp_path))) == [
        "a.cuh",
        "b.cuh",
        "c.cuh",
    ]


def test_stored_bytes_are_read_back_unless_one_of_them_changed() -> None:
    binary = Binary("_Z3addPi", bytes(range(256)) + b"\n\n")
    stored = binary.to_bytes()
    assert Binary.from_bytes(stored) == binary
    for position in range(len(stored)):
        damaged = bytearray(stored)
        damaged[position] ^= 1
        assert Binary.from_bytes(bytes(damaged)) is None, position
    for length in range(len(stored)):
        assert Binary.from_bytes(stored[:length]) is None, length


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"EMBER_KERNEL_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/ember_pp/kernels"),
        ({"HOME": "/c"}, "/c/.cache/ember_pp/kernels"),
    ],
    ids=["own", "xdg", "home"],
)
def test_the_cache_is_where_the_user_keeps_such_things(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("EMBER_KERNEL_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.default_cache() == Path(expected)


# ------------------------------------------------------------------------------------
# without a compiler


def test_import_loads_no_compiler_and_no_driver() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import ember_pp.kernels.cuda_ops
print(*set(sys.modules) - before)
"""
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "ember_pp.kernels.build" in output.split()
    assert [name for name in output.split() if name.partition(".")[0] == "cuda"] == []


@pytest.mark.parametrize("missing", ["cuda.bindings", "cuda.core"])
def test_a_missing_package_is_named_with_its_extra(
    missing: str, source: KernelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, missing, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(KernelBuildError, match=r"pip install 'ember-pp\[cuda\]'.*cuda"):
        build.load_or_compile(source, 90, tmp_path / "cache")


def test_a_cache_that_cannot_be_written_to_is_named(
    source: KernelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "compiler_version", lambda: COMPILER)
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelBuildError, match=r"file/cache: .*EMBER_KERNEL_CACHE"):
        build.load_or_compile(source, 90, tmp_path / "file" / "cache")


@pytest.fixture
def count_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that gets a line for every build; the compiler takes a moment and makes nothing."""
    log = tmp_path / "builds"
    log.write_text("")
    monkeypatch.setattr(build, "compiler_version", lambda: COMPILER)
    monkeypatch.setattr(build, "compile_kernel", _PretendedBuild(log))
    return log


class _PretendedBuild:
    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self, kernel: KernelSource, architecture: int) -> Binary:
        import time

        time.sleep(0.2)
        with self._log.open("a") as file:
            file.write(f"{kernel.expression} {architecture}\n")
        return Binary("symbol", b"code of " + kernel.expression.encode())


def _load_after(barrier, source: KernelSource, cache: Path, results) -> None:
    barrier.wait()
    results.put(build.load_or_compile(source, 90, cache).cubin)


def test_processes_that_build_at_once_make_one_artefact(
    source: KernelSource, tmp_path: Path, count_builds: Path
) -> None:
    context = multiprocessing.get_context("fork")  # the pretended compiler goes along
    barrier, results, cache = context.Barrier(3), context.SimpleQueue(), tmp_path / "cache"
    arguments = (barrier, source, cache, results)
    processes = [context.Process(target=_load_after, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert {results.get() for _ in processes} == {b"code of add_kernel<int>"}
    assert count_builds.read_text() == "add_kernel<int> 90\n"
    assert len(list(cache.glob("*.bin"))) == 1
    assert not list(cache.glob(".building-*"))
    assert cache.stat().st_mode & 0o077 == 0, "of this user alone"


def test_a_damaged_entry_is_built_anew(
    source: KernelSource, tmp_path: Path, count_builds: Path
) -> None:
    cache = tmp_path / "cache"
    first = build.load_or_compile(source, 90, cache)
    assert build.load_or_compile(source, 90, cache).cubin == first.cubin
    assert len(count_builds.read_text().splitlines()) == 1
    (entry,) = cache.glob("*.bin")
    entry.write_bytes(entry.read_bytes()[:-1])
    assert build.load_or_compile(source, 90, cache) == first
    assert len(count_builds.read_text().splitlines()) == 2
    assert Binary.from_bytes(entry.read_bytes()) == first


def test_a_build_that_fails_leaves_nothing_but_its_lock(
    source: KernelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(kernel: KernelSource, architecture: int) -> Binary:
        raise KernelBuildError("no")

    monkeypatch.setattr(build, "compiler_version", lambda: COMPILER)
    monkeypatch.setattr(build, "compile_kernel", fail)
    with pytest.raises(KernelBuildError, match=r"^no$"):
        build.load_or_compile(source, 90, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_what_was_built_long_ago_is_removed_when_something_is_built(
    source: KernelSource, tmp_path: Path, count_builds: Path
) -> None:
    import os

    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age_days in (("old.bin", 100), ("new.bin", 10)):
        (cache / name).write_text("")
        modified = (cache / name).stat().st_mtime - age_days * 24 * 3600
        os.utime(cache / name, (modified, modified))
    build.load_or_compile(source, 90, cache)
    assert {"old.bin", "new.bin"} & {path.name for path in cache.iterdir()} == {"new.bin"}


# ------------------------------------------------------------------------------------
# with a compiler


@needs_compiler
def test_a_refused_source_is_named_with_architecture_and_log(source: KernelSource) -> None:
    (source.folder / "add.cuh").write_text(KERNEL.replace("kStep", "kUnknown"))
    message = r"(?s)^add\.cuh, add_kernel<int>, sm_86: .*\"kUnknown\" is undefined"
    with pytest.raises(KernelBuildError, match=message):
        build.compile_kernel(source, 86)


@needs_compiler
def test_a_kernel_is_built_once_and_then_found(source: KernelSource, tmp_path: Path) -> None:
    built = build.load_or_compile(source, 90, tmp_path / "cache")
    assert re.search(r"Used \d+ registers", built.log)
    assert built.cubin.startswith(b"\x7fELF")
    assert "add_kernel" in built.symbol
    found = build.load_or_compile(source, 90, tmp_path / "cache")
    assert (found.symbol, found.cubin, found.log) == (built.symbol, built.cubin, "")


# One expression per kernel and element type that the models use, and the awkward ones.
PRESETS = ("0.6b", "1.7b", "4b", "8b", "14b", "32b")
H100 = {"num_multiprocessors": 132, "shared_limit": 227 * 1024}
HOT = [
    ("embedding.cuh", "embedding_kernel<uint4>"),
    ("rms_norm.cuh", "rms_norm_kernel<bf16, 8, 1, false>"),
    ("rms_norm.cuh", "rms_norm_kernel<bf16, 8, 1, true>"),
    ("rms_norm.cuh", "rms_norm_kernel<bf16, 8, 2, false>"),
    ("rms_norm.cuh", "rms_norm_kernel<bf16, 8, 2, true>"),
    ("qk_norm_rope_store_kv.cuh", "qk_norm_rope_store_kv_kernel<bf16, 128, 8, true, false>"),
    ("qk_norm_rope_store_kv.cuh", "qk_norm_rope_store_kv_kernel<bf16, 64, 8, false, true>"),
    ("swiglu.cuh", "swiglu_kernel<bf16, 8>"),
    ("step.cuh", "begin_step_kernel"),
    ("step.cuh", "end_step_kernel"),
    ("step.cuh", "leave_stage_kernel<bf16, 8>"),
    ("handoff.cuh", "send_slot_kernel<uint4>"),
    ("handoff.cuh", "take_slot_kernel<uint4>"),
    ("handoff.cuh", "take_pairs_kernel"),
    ("handoff.cuh", "write_time_kernel"),
    ("skinny_linear.cuh", "skinny_linear_kernel<8, false>"),
    ("skinny_linear.cuh", "skinny_linear_kernel<8, true>"),
    ("skinny_linear.cuh", "skinny_linear_kernel<16, false>"),
    ("skinny_linear.cuh", "skinny_linear_kernel<16, true>"),
    ("skinny_linear.cuh", "skinny_linear_kernel<24, true>"),
    ("read_bandwidth.cuh", "read_bandwidth_kernel"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 1, 16, 4>"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 1, 8, 4>"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 1, 8, 8>"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 4, 2, 4>"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 4, 2, 8>"),
    ("paged_decode.cuh", "paged_decode_kernel<64, 1, 16, 4>"),
    ("paged_decode.cuh", "paged_decode_kernel<64, 4, 2, 4>"),
    ("sampling.cuh", "sample_tokens_kernel<bf16, 8, true>"),
    ("top_logprobs.cuh", "top_logprobs_kernel<bf16, 8, true>"),
    ("paged_prefill.cuh", "paged_prefill_kernel<64>"),
    ("paged_prefill.cuh", "paged_prefill_kernel<128>"),
    ("paged_prefill_wgmma.cuh", "paged_prefill_wgmma_kernel<64>"),
    ("paged_prefill_wgmma.cuh", "paged_prefill_wgmma_kernel<128>"),
]
UNUSED = {("paged_prefill.cuh", 90)}
"""There paged_prefill_wgmma takes its place."""
OTHERS = [
    ("step.cuh", "leave_stage_kernel<float, 1>"),
    ("handoff.cuh", "send_slot_kernel<unsigned short>"),
    ("handoff.cuh", "take_slot_kernel<u32>"),
    ("embedding.cuh", "embedding_kernel<unsigned short>"),
    ("rms_norm.cuh", "rms_norm_kernel<float, 4, 8, true>"),
    ("rms_norm.cuh", "rms_norm_kernel<bf16, 1, 8, true>"),
    ("qk_norm_rope_store_kv.cuh", "qk_norm_rope_store_kv_kernel<float, 24, 4, true, true>"),
    ("swiglu.cuh", "swiglu_kernel<float, 1>"),
    ("paged_decode.cuh", "paged_decode_kernel<128, 3, 2, 8>"),
    ("sampling.cuh", "sample_tokens_kernel<bf16, 1, false>"),
    ("sampling.cuh", "sample_tokens_kernel<float, 8, false>"),
    ("top_logprobs.cuh", "top_logprobs_kernel<float, 1, false>"),
]


def products_of_the_models() -> set[tuple[str, str]]:
    """What ``skinny_linear`` instances the Qwen3 models need on an H100."""
    needed = set()
    for preset, num_rows in itertools.product(PRESETS, (1, 2, 4, 8, 16, 24)):
        cfg = config_of(preset)
        heads, kv_heads = cfg.num_heads, cfg.num_kv_heads
        for width, num_outputs, is_normed, is_gated in (
            (cfg.hidden_size, (heads + 2 * kv_heads) * cfg.head_dim, True, False),
            (heads * cfg.head_dim, cfg.hidden_size, False, False),
            (cfg.hidden_size, cfg.intermediate_size, True, True),
            (cfg.hidden_size, cfg.intermediate_size, False, True),
            (cfg.intermediate_size, cfg.hidden_size, False, False),
            (cfg.hidden_size, cfg.vocab_size, True, False),
            (cfg.hidden_size, cfg.vocab_size, False, False),
        ):
            flags = {"is_normed": is_normed, "is_gated": is_gated}
            plan = make_plan(num_rows, width, num_outputs, **flags, **H100)
            if plan is not None:
                flag = str(plan.streams).lower()
                expression = f"skinny_linear_kernel<{plan.rows}, {flag}>"
                needed.add(("skinny_linear.cuh", expression))
    return needed


def config_of(preset: str) -> ModelConfig:
    path = Path(__file__).parents[2] / "conf" / "model" / f"qwen3-{preset}.yaml"
    return ModelConfig.from_hf(yaml.safe_load(path.read_text())["architecture"])


FILES = sorted(kernels_by_file())


def test_no_kernel_is_left_out_of_what_is_compiled() -> None:
    """Every kernel is in one of the lists, and every file has a hot one."""
    listed = {(file, expression.partition("<")[0]) for file, expression in HOT + OTHERS}
    assert listed == {(file, name) for file, names in kernels_by_file().items() for name in names}
    assert sorted({file for file, _ in HOT}) == FILES


@needs_compiler
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_builds_and_the_hot_ones_spill_nothing(architecture: int, file: str) -> None:
    for source in (KernelSource(*kernel) for kernel in HOT + OTHERS if kernel[0] == file):
        log = build.compile_kernel(source, architecture).log
        spilled = [int(count) for count in re.findall(r"(\d+) bytes spill", log)]
        assert spilled, "the compiler did not say"
        if (file, source.expression) in HOT and (file, architecture) not in UNUSED:
            assert max(spilled) == 0, f"{source.expression}, sm_{architecture}:\n{log}"


@needs_compiler
def test_no_product_of_the_models_spills_on_the_card_that_is_tuned() -> None:
    for file, expression in sorted(products_of_the_models() - set(HOT)):
        log = build.compile_kernel(KernelSource(file, expression), 90).log
        assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, f"{expression}:\n{log}"


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_model_launches_is_among_the_hot(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one layer and both ends of each model, by rows of decodes and with chunks of prompts."""
    launched: set[tuple[str, str]] = set()
    get = KernelSet.get

    def recorded(self: KernelSet, file: str, expression: str, *arguments: Any, **options: Any):
        launched.add((file, expression))
        return get(self, file, expression, *arguments, **options)

    monkeypatch.setattr(KernelSet, "get", recorded)
    config = dataclasses.replace(config_of(preset), num_layers=1)
    model = PagedModel(None, cfg=config, device="cuda", dtype=torch.bfloat16, kernels="cuda")
    for num_rows in (1, 2, 4, 8, 16, 33, 64):
        model.step({f"{num_rows}-{row}": [row] for row in range(num_rows)})
    model.step({"prompt": list(range(100))})
    model.step({"prompt": [1], "other": list(range(70)), "16-1": [2]})
    assert launched - set(HOT) - products_of_the_models() == set()
