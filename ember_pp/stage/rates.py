"""``python -m ember_pp.stage.rates``: how fast a device reads memory and multiplies matrices.

Started by ``job=bench``, before any stage is. Which devices comes as JSON on stdin, what was
measured goes as JSON to stdout. On a GPU: a kernel that only reads, over 2 GiB, and a product
of two matrices of 8192 x 8192 in the model's type. On the CPU: a sum over 256 MiB and a product
of 1024 x 1024, with the threads that a stage has. Each is a median of several.
"""

from __future__ import annotations

import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from ember_pp.errors import KernelBuildError
from ember_pp.kernels.kernel_set import KernelSet
from ember_pp.stage.__main__ import die_with_parent

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_CUDA_REPEATS, _CPU_REPEATS = 300, 5
"""On a GPU about half a second: what it keeps up, not what it reaches before it is warm."""
_CUDA_BYTES, _CPU_BYTES = 2 * 1024**3, 256 * 1024**2
_CUDA_SIZE, _CPU_SIZE = 8192, 1024
_READ_THREADS, _READ_BLOCKS_PER_MULTIPROCESSOR = 512, 4  # of csrc/read_bandwidth.cuh


def main() -> None:
    """Measure what stdin says."""
    wanted = json.load(sys.stdin)
    die_with_parent(wanted["parent_pid"])
    torch.set_num_threads(wanted["num_threads"])
    dtype = _DTYPES[wanted["dtype"]]
    rates = {name: measure(torch.device(name), dtype) for name in wanted["devices"]}
    sys.stdout.write(json.dumps({"rates": rates, "versions": versions()}) + "\n")


def versions() -> dict[str, str | None]:
    """Of Python, and of what computes."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def measure(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Rates of one device, with how each was measured and its spread.

    Returns:
        ``read_bytes_per_s`` and ``flops_per_s``, medians; ``read_method`` and ``matrix_method``
        in words; ``read_spread`` and ``matrix_spread``, lowest and highest; ``uuid`` of a GPU.
    """
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    read_bytes, read_method, read = _reader(device)
    read_s = _times(read, device)
    size = _CUDA_SIZE if is_cuda else _CPU_SIZE
    matrix_s = _times(_multiplier(size, dtype, device), device)
    flops = 2 * size**3
    rates: dict[str, Any] = {
        "read_bytes_per_s": read_bytes / statistics.median(read_s),
        "read_spread": [read_bytes / max(read_s), read_bytes / min(read_s)],
        "read_method": read_method,
        "flops_per_s": flops / statistics.median(matrix_s),
        "matrix_spread": [flops / max(matrix_s), flops / min(matrix_s)],
        "matrix_method": f"torch.mm of {size} x {size} {str(dtype).removeprefix('torch.')}",
    }
    if is_cuda:
        properties = torch.cuda.get_device_properties(device)
        rates["uuid"] = f"GPU-{properties.uuid}"
    else:
        rates["num_threads"] = torch.get_num_threads()
    return rates


def _reader(device: torch.device) -> tuple[int, str, Callable[[], object]]:
    """Bytes, method, and what reads them once."""
    num_bytes = _CUDA_BYTES if device.type == "cuda" else _CPU_BYTES
    # Ones: memory that was asked for as zeros need not be there before it is written.
    data = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    size = f"{num_bytes / 2**30:g} GiB"
    if device.type == "cuda":
        try:
            return num_bytes, f"read_bandwidth kernel over {size}", _read_kernel(data)
        except KernelBuildError:
            pass  # the extra "cuda" is not installed: torch's own reduction reads nearly as fast
    return num_bytes, f"torch.sum over {size}", data.sum


def _read_kernel(data: torch.Tensor) -> Callable[[], object]:
    kernels = KernelSet(data.device)
    kernel = kernels.get("read_bandwidth.cuh", "read_bandwidth_kernel", "PqIP", overlaps=False)
    output = torch.zeros(1, device=data.device, dtype=torch.int32)
    grid = (kernels.num_multiprocessors * _READ_BLOCKS_PER_MULTIPROCESSOR, 1)
    never = 0xFFFFFFFF  # what the ones do not sum to
    arguments = (data.data_ptr(), data.nbytes // 16, never, output.data_ptr())

    def read() -> object:
        kernel.launch(grid, _READ_THREADS, arguments)
        return data, output  # they live as long as this does

    return read


def _multiplier(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


def _times(run: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each run, after one to warm up."""
    run()
    if device.type == "cpu":
        seconds = []
        for _ in range(_CPU_REPEATS):
            started_s = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started_s)
        return seconds
    marks: list[Any] = [
        torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        for _ in range(_CUDA_REPEATS + 1)
    ]
    run()  # the clocks are up
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(marks)]


if __name__ == "__main__":
    main()
