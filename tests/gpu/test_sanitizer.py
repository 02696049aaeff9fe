"""The checkers of scripts/gpu_check find what they are for, as they are called there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ember_pp.kernels import build
from scripts.gpu_check import count_findings, find_sanitizer, sanitizer_command

SANITIZER = find_sanitizer("")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not SANITIZER, reason="no compute-sanitizer (of the CUDA toolkit)"),
]

NUM_ELEMENTS = 13
KERNELS = """#include "device.cuh"
namespace ember {
__global__ void none_kernel(float* x, int n) { x[n - 1] = 1.0f; }
__global__ void memcheck_kernel(float* x, int n) { x[n] = 1.0f; }
__global__ void racecheck_kernel(float* x, int n) {
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x < n) x[threadIdx.x] = shared[63 - threadIdx.x];
}
__global__ void initcheck_kernel(float* x, int n) { x[0] = x[n - 1] + 1.0f; }
__global__ void synccheck_kernel(float* x, int n) {
  if (threadIdx.x < n) __syncthreads();
  x[0] = 1.0f;
}
}
"""
LAUNCH = """
import os, sys
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
from pathlib import Path
import torch
from ember_pp.kernels import build
from ember_pp.kernels.launch import Kernel, capability
folder, name, num_elements = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
device = torch.device("cuda", 0)
x = torch.empty(num_elements, device=device)
source = build.KernelSource("planted.cuh", f"{name}_kernel", folder)
kernel = Kernel(build.compile_kernel(source, capability(device)), "Pi", device=device)
kernel.launch((1, 1), 64, (x.data_ptr(), num_elements))
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("fault", ["planted", "none"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_a_planted_fault_is_found_and_only_that(tool: str, fault: str, tmp_path: Path) -> None:
    """One element behind a tensor; a missing barrier; a read before any write; a barrier that only
    some threads of a warp meet."""
    (tmp_path / "device.cuh").write_text((build.SOURCES / "device.cuh").read_text())
    (tmp_path / "planted.cuh").write_text(KERNELS)
    name = tool if fault == "planted" else "none"
    command = [*sanitizer_command(SANITIZER, tool), sys.executable, "-c", LAUNCH, str(tmp_path)]
    done = subprocess.run(
        [*command, name, str(NUM_ELEMENTS)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    findings = count_findings(done.stdout)
    if fault == "planted":
        assert done.returncode == 1, done.stdout
        assert sum(findings.values()) > 0, done.stdout
        assert f"{tool}_kernel" in done.stdout, done.stdout
    else:
        assert done.returncode == 0, done.stdout
        assert findings["errors"] == 0, done.stdout
