"""The kernels of one device that are in use: built when a shape first comes up, and kept."""

from __future__ import annotations

from pathlib import Path

import torch

from ember_pp.kernels import build
from ember_pp.kernels.build import KernelSource
from ember_pp.kernels.launch import Kernel, capability


class KernelSet:
    """What all operations of a device share.

    Args:
        device: with its index.
        cache: folder of built kernels; None: ``build.default_cache()``.

    Raises:
        KernelBuildError: what building needs is not installed; says what to install.
    """

    def __init__(self, device: torch.device, cache: Path | None = None) -> None:
        build.compiler_version()
        self.device = device
        self.architecture = capability(device)
        """Compute capability times ten."""
        properties = torch.cuda.get_device_properties(device)
        self.num_multiprocessors: int = properties.multi_processor_count
        self._cache = cache or build.default_cache()
        self._kernels: dict[tuple[str, str, bool], Kernel] = {}
        self.is_building = False
        """True while a kernel is built, or found to be built: seconds at worst. Any thread."""

    def get(self, file: str, expression: str, arguments: str, *, overlaps: bool = True) -> Kernel:
        """The kernel that ``expression`` names in ``csrc/<file>``.

        Args:
            file: name under ``csrc/``.
            expression: the kernel with its template arguments.
            arguments: see ``Kernel``.
            overlaps: see ``Kernel``.

        Raises:
            KernelBuildError: it does not compile.
        """
        key = (file, expression, overlaps)
        kernel = self._kernels.get(key)
        if kernel is None:
            self.is_building = True
            try:
                source = KernelSource(file, expression)
                binary = build.load_or_compile(source, self.architecture, self._cache)
            finally:
                self.is_building = False
            kernel = Kernel(binary, arguments, device=self.device, overlaps=overlaps)
            self._kernels[key] = kernel
        return kernel
