"""Launches kernels on torch's current stream, at little cost to the host.

One driver call per launch, with the arguments packed into one buffer. The driver copies them, so
the buffer is used again; a stream that is being captured takes the launch into its graph.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch

from ember_pp.errors import KernelLaunchError
from ember_pp.kernels.build import Binary
from ember_pp.kernels.driver import LaunchAttribute, LaunchConfig, driver, error_text

# Of the driver API's header, cuda.h.
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE, _PARAM_END = 1, 2, 0
_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED, _SHARED_CARVEOUT = 8, 9
_DEFAULT_SHARED_BYTES = 32 * 1024
"""Dynamic shared memory that is there unasked: 48 KiB less what a kernel has beside it."""
_OVERLAP_FROM = 90
"""Compute capability, times ten, from which a kernel may start before the one before ends."""


class Kernel:
    """A kernel on the current device.

    Args:
        binary: its code.
        arguments: their types in order, in the letters of ``struct``: ``P`` pointer, ``q`` int64,
            ``i`` int32, ``f`` float. A structure passed by value is its fields, then ``0P``.
        overlaps: it may start while the kernel before it still runs, where the card can do that;
            it then waits itself (``wait_for_previous_kernel`` in ``csrc/device.cuh``).
    """

    def __init__(
        self, binary: Binary, arguments: str, *, device: torch.device, overlaps: bool = True
    ) -> None:
        from cuda.core import ObjectCode

        self._name = binary.symbol
        self._device_index = device.index
        self._object = ObjectCode.from_cubin(binary.cubin)  # unloaded when it goes
        self._function = ctypes.c_void_p(int(self._object.get_kernel(binary.symbol).handle))
        self._pack = struct.Struct(arguments)
        self._buffer = ctypes.create_string_buffer(self._pack.size)
        self._size = ctypes.c_size_t(self._pack.size)
        self._extra = (ctypes.c_void_p * 5)(
            _PARAM_BUFFER_POINTER,
            ctypes.addressof(self._buffer),
            _PARAM_BUFFER_SIZE,
            ctypes.addressof(self._size),
            _PARAM_END,
        )
        self._config = LaunchConfig(grid_z=1, block_y=1, block_z=1)
        can_overlap = capability(device) >= _OVERLAP_FROM
        if overlaps and can_overlap:
            self._attribute = LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION)
            self._attribute.value[0] = 1
            self._config.attributes = ctypes.pointer(self._attribute)
            self._config.num_attributes = 1
        self._config_pointer = ctypes.byref(self._config)
        self._launch: Callable[..., int] = driver().cuLaunchKernelEx
        self._most_shared_bytes = _DEFAULT_SHARED_BYTES
        # Kernels that overlap share a multiprocessor, whose split into cache and shared memory
        # cannot change while one runs: the same split for all.
        self._set_attribute(_SHARED_CARVEOUT, 100)

    def launch(
        self,
        grid: tuple[int, int],
        block: int,
        arguments: Sequence[int | float],
        *,
        shared_bytes: int = 0,
    ) -> None:
        """Enqueue it: ``grid`` thread blocks in x and y, of ``block`` threads.

        Raises:
            KernelLaunchError: the driver refused.
        """
        if shared_bytes > self._most_shared_bytes:
            self._set_attribute(_MAX_DYNAMIC_SHARED, shared_bytes)
            self._most_shared_bytes = shared_bytes
        config = self._config
        config.grid_x, config.grid_y = grid
        config.block_x = block
        config.shared_bytes = shared_bytes
        config.stream = torch._C._cuda_getCurrentRawStream(self._device_index)
        self._pack.pack_into(self._buffer, 0, *arguments)
        status = self._launch(self._config_pointer, self._function, None, self._extra)
        if status:
            raise KernelLaunchError(
                f"{self._name}: the driver refused to launch grid {grid}, block {block}, "
                f"{shared_bytes} bytes of shared memory: {error_text(status)}"
            )

    def _set_attribute(self, attribute: int, value: int) -> None:
        arguments = attribute, value, self._function, self._device_index
        status = driver().cuKernelSetAttribute(*arguments)
        if status:
            raise KernelLaunchError(
                f"{self._name}: the driver refused attribute {attribute} = {value}: "
                f"{error_text(status)}"
            )


def capability(device: torch.device) -> int:
    """Compute capability times ten: 90 on an H100."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
