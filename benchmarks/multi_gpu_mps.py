"""CUDA's multi-process service, for stages that share a GPU: without it they take turns."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

from benchmarks.multi_gpu_child import end_with_parent, kill_group

CONTROL = "nvidia-cuda-mps-control"
_START_S, _QUIT_S = 1.0, 15.0


def is_wanted(devices: Sequence[str]) -> bool:
    """Whether a GPU is named twice, nobody runs the service already, and it is installed."""
    gpus = [name for name in devices if name != "cpu"]
    is_there = "CUDA_MPS_PIPE_DIRECTORY" in os.environ or shutil.which(CONTROL) is None
    return len(gpus) > len(set(gpus)) and not is_there


@contextlib.contextmanager
def service(devices: Sequence[str]) -> Iterator[None]:
    """Every child started in here uses the service, where ``is_wanted`` says so."""
    if not is_wanted(devices):
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        places = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(places)
        process = subprocess.Popen(
            [CONTROL, "-f"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
            preexec_fn=end_with_parent,
        )
        time.sleep(_START_S)
        try:
            yield
        finally:
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run([CONTROL], input="quit\n", text=True, timeout=_QUIT_S, check=False)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_QUIT_S)
            kill_group(process)
            for name in places:
                del os.environ[name]
