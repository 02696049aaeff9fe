"""POSIX semaphores in shared memory, used as 0/1 flags between two processes.

Why not a futex: a flag needs an atomic read-modify-write and the memory barriers around it,
which Python cannot express; ``sem_post`` and ``sem_wait`` have both, are the same on every
architecture, and cost no system call when nobody has to sleep. A process that dies holds
nothing: a semaphore has no owner.

ctypes releases the GIL during each call, so a waiting thread stops nobody else.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import time

SEMAPHORE_BYTES = 32
"""``sizeof(sem_t)`` of glibc on 64-bit machines."""


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# PyDLL keeps the GIL: right for calls that never sleep, where giving it up costs more than
# the call. CDLL gives it up: right for the two that sleep.
_nonblocking = ctypes.PyDLL(None, use_errno=True)
_blocking = ctypes.CDLL(None, use_errno=True)
for _name in ("sem_post", "sem_trywait"):
    getattr(_nonblocking, _name).argtypes = (ctypes.c_void_p,)
_nonblocking.sem_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_blocking.sem_wait.argtypes = (ctypes.c_void_p,)
_blocking.sem_timedwait.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Timespec))


class SharedSemaphore:
    """The semaphore at ``address`` in memory that two processes map.

    The memory must stay mapped for as long as this object is used.
    """

    def __init__(self, address: int) -> None:
        self._address = address

    def initialise(self, value: int) -> None:
        """Make the semaphore; once, by the owner of the memory, before anyone uses it."""
        _check(_nonblocking.sem_init(self._address, 1, value))

    def post(self) -> None:
        """Add one, and wake one waiter."""
        _check(_nonblocking.sem_post(self._address))

    def try_wait(self) -> bool:
        """Take one if there is one."""
        result = _nonblocking.sem_trywait(self._address)
        return bool(_took(result, expected=(errno.EAGAIN, errno.EINTR)))

    def wait(self, timeout_s: float = math.inf) -> bool:
        """Sleep until there is one and take it; False when the time is over."""
        if timeout_s == math.inf:
            while not _took(_blocking.sem_wait(self._address), expected=(errno.EINTR,)):
                pass
            return True
        deadline = time.monotonic() + timeout_s
        while (remaining := deadline - time.monotonic()) > 0:
            # sem_timedwait takes wall-clock time: after a jump of it the loop asks again.
            until = _Timespec(*divmod(time.time_ns() + int(remaining * 1e9), 1_000_000_000))
            result = _blocking.sem_timedwait(self._address, ctypes.byref(until))
            if _took(result, expected=(errno.ETIMEDOUT, errno.EINTR)):
                return True
        return self.try_wait()


def _took(result: int, *, expected: tuple[int, ...]) -> bool:
    if result == 0:
        return True
    if ctypes.get_errno() in expected:
        return False
    _check(result)
    raise AssertionError(f"semaphore call returned {result}")


def _check(result: int) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"semaphore: {os.strerror(error)}")
