"""The CUDA driver's own calls, for what torch has no words for: launches, flags, shared memory.

Names, structures and numbers are those of ``cuda.h``. A name ends in ``_v2`` where the header has
that behind its plain name. Every call gives up Python's lock while it runs: a launch waits where
the queue of its stream is full.
"""

from __future__ import annotations

import ctypes
import functools

WAIT_GEQ = 0
"""``CU_STREAM_WAIT_VALUE_GEQ``: until (int32)(*address - value) >= 0."""
IPC_LAZY_PEER_ACCESS = 1
IPC_HANDLE_BYTES = 64
UUID_BYTES = 16


class IpcHandle(ctypes.Structure):
    """``CUipcMemHandle``."""

    _fields_ = (("data", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


_ADDRESS, _SIZE, _WORD, _STREAM = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint, ctypes.c_void_p
_OUT = ctypes.c_void_p
_ARGUMENTS = {
    "cuCtxGetCurrent": (_OUT,),
    "cuCtxSetCurrent": (ctypes.c_void_p,),
    "cuCtxGetDevice": (_OUT,),
    "cuDeviceGet": (_OUT, ctypes.c_int),
    "cuDeviceGetCount": (_OUT,),
    "cuDeviceGetUuid_v2": (_OUT, ctypes.c_int),
    "cuDeviceCanAccessPeer": (_OUT, ctypes.c_int, ctypes.c_int),
    "cuMemAlloc_v2": (_OUT, _SIZE),
    "cuMemFree_v2": (_ADDRESS,),
    "cuMemsetD32Async": (_ADDRESS, _WORD, _SIZE, _STREAM),
    "cuMemcpyDtoDAsync_v2": (_ADDRESS, _ADDRESS, _SIZE, _STREAM),
    "cuIpcGetMemHandle": (_OUT, _ADDRESS),
    "cuIpcOpenMemHandle_v2": (_OUT, IpcHandle, _WORD),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuStreamWaitValue32_v2": (_STREAM, _ADDRESS, _WORD, _WORD),
    "cuStreamWriteValue32_v2": (_STREAM, _ADDRESS, _WORD, _WORD),
    "cuStreamCreateWithPriority": (_OUT, _WORD, ctypes.c_int),
    "cuStreamDestroy_v2": (_STREAM,),
    "cuStreamQuery": (_STREAM,),
    "cuStreamSynchronize": (_STREAM,),
}


@functools.cache
def driver() -> ctypes.CDLL:
    """The driver's library; its functions return 0, or what ``error_text`` explains.

    Raises:
        OSError: there is none.
    """
    library = ctypes.CDLL("libcuda.so.1")
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    return library


def error_text(status: int) -> str:
    """The driver's words for a status, with its number."""
    text = ctypes.c_char_p()
    driver().cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({status})"
