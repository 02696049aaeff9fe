"""Launches: on the current stream, into a graph, in order, with the driver's word on failure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelLaunchError
from ember_pp.kernels import PagedRows, RopeRows, build, make_ops
from ember_pp.kernels.build import KernelSource
from ember_pp.kernels.launch import Kernel, capability
from numeric import assert_bitwise_equal, assert_close, sum_tolerance

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
SCALE_KERNEL = """#include "device.cuh"
namespace ember {
struct Scale { float* x; i64 count; int times; float by; };
__global__ void scale_kernel(const Scale s) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 i = (static_cast<i64>(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < s.count) s.x[i] = s.x[i] * s.by + s.times;
}
}
"""


@pytest.fixture(params=[False, True], ids=["in-turn", "overlapping"])
def scale(request: pytest.FixtureRequest, tmp_path: Path) -> Kernel:
    """``x = x * by + times`` for ``count`` elements; arguments are one structure."""
    (tmp_path / "device.cuh").write_text((build.SOURCES / "device.cuh").read_text())
    (tmp_path / "scale.cuh").write_text(SCALE_KERNEL)
    source = KernelSource("scale.cuh", "scale_kernel", tmp_path)
    binary = build.compile_kernel(source, capability(DEVICE))
    return Kernel(binary, "Pqif0P", device=DEVICE, overlaps=request.param)


def test_takes_arguments_of_every_kind_on_a_grid_of_two_dimensions(scale: Kernel) -> None:
    x = torch.arange(1000, device=DEVICE, dtype=torch.float32)
    scale.launch((3, 2), 128, (x.data_ptr(), 700, -7, 0.5))
    expected = torch.arange(1000).float()
    expected[:700] = expected[:700] * 0.5 - 7
    assert torch.equal(x.cpu(), expected)


def test_launches_follow_one_another_on_the_current_stream(scale: Kernel) -> None:
    """Each reads what the one before wrote, whether or not it may start early."""
    x = torch.zeros(2**22, device=DEVICE)
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream(DEVICE))
    with torch.cuda.stream(stream):
        for step in range(1, 40):
            scale.launch((2**22 // 256, 1), 256, (x.data_ptr(), 2**22, step % 3, 1.5))
        total = x.clone()
    stream.synchronize()
    expected = 0.0
    for step in range(1, 40):
        expected = float(torch.tensor(expected * 1.5 + step % 3, dtype=torch.float32))
    assert_close(total, torch.full_like(total, expected), sum_tolerance(torch.float32, 39))


def test_a_captured_launch_keeps_its_arguments(scale: Kernel) -> None:
    x, y = torch.zeros(100, device=DEVICE), torch.zeros(100, device=DEVICE)
    scale.launch((1, 1), 128, (x.data_ptr(), 100, 0, 1.0))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale.launch((1, 1), 128, (x.data_ptr(), 100, 1, 2.0))
        scale.launch((1, 1), 128, (y.data_ptr(), 50, 5, 1.0))
    for _ in range(3):
        graph.replay()
    assert torch.equal(x.cpu(), torch.full((100,), 7.0))
    assert torch.equal(y.cpu(), torch.tensor([15.0] * 50 + [0.0] * 50))


@pytest.mark.parametrize("num_rows", [1, 3, 64])
def test_kernels_in_a_graph_see_what_those_before_them_wrote(num_rows: int) -> None:
    """A long kernel first: those after it start early, and must wait for one another."""
    ops, head_dim, num_heads, num_kv_heads = make_ops("cuda", DEVICE), 128, 16, 8
    width = (num_heads + 2 * num_kv_heads) * head_dim
    long, source = (
        torch.randn(rows, width, device=DEVICE).bfloat16() for rows in (20000, num_rows)
    )
    caches = torch.randn(2, 4 * num_rows, 16, num_kv_heads, head_dim, device=DEVICE).bfloat16()
    tables = torch.arange(4 * num_rows, device=DEVICE, dtype=torch.int32).view(num_rows, 4)
    rows = PagedRows(
        block_tables=tables,
        context_lens=torch.full((num_rows,), 50, device=DEVICE, dtype=torch.int32),
        cu_seqlens_q=torch.arange(num_rows + 1, device=DEVICE, dtype=torch.int32),
        num_tokens=num_rows,
        max_query_len=1,
        block_size=16,
        dtype=torch.bfloat16,
    )
    rope = RopeRows(
        torch.randn(64, head_dim, device=DEVICE), torch.full((num_rows,), 49, device=DEVICE)
    )
    slots = tables[:, 3].long() * 16 + 1
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "eps": 1e-6}

    def step(wait: Callable[[], None]) -> list[Tensor]:
        ops.add_rms_norm(long, long, long[0], 1e-6)
        qkv = ops.rms_norm(source, long[0], 1e-6)
        wait()
        query = ops.qk_norm_rope_store_kv(qkv, None, None, rope, *caches, slots, **heads)
        wait()
        attended = ops.paged_attention(query, *caches, rows, scale=0.3)
        wait()
        gated = ops.swiglu(attended.flatten(1))
        wait()
        return [qkv, query, attended, gated, *ops.add_rms_norm(gated, gated, long[1, :1024], 1e-6)]

    step(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(lambda: None)
    for _ in range(20):
        source.normal_()
        caches.view(2, -1, num_kv_heads, head_dim)[:, slots] = float("nan")
        torch.cuda.synchronize()
        graph.replay()
        for output, expected in zip(outputs, step(torch.cuda.synchronize), strict=True):
            assert bool(expected.isfinite().all())
            assert_bitwise_equal(output, expected)


def test_a_refused_launch_says_why(scale: Kernel) -> None:
    with pytest.raises(KernelLaunchError, match=r"scale_kernel.*block 4096.*invalid argument"):
        scale.launch((1, 1), 4096, (0, 0, 0, 0.0))


def test_reading_alone_reads_everything() -> None:
    """The sum of all words is found where the kernel is told to look for it."""
    source = KernelSource("read_bandwidth.cuh", "read_bandwidth_kernel")
    binary = build.load_or_compile(source, capability(DEVICE), build.default_cache())
    kernel = Kernel(binary, "PqIP", device=DEVICE)
    data = torch.zeros(4 * 512 * 8 * 4, device=DEVICE, dtype=torch.int32)  # a word a read
    for position in (0, 1, 4 * 511, 4 * 512 * 8 + 3, len(data) - 1):
        data.zero_()
        data[position] = 77
        output = torch.zeros(1, device=DEVICE, dtype=torch.int32)
        kernel.launch((1, 1), 512, (data.data_ptr(), len(data) // 4, 77, output.data_ptr()))
        assert output.item() == 77, position
