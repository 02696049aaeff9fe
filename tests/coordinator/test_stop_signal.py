"""StopSignal: a descriptor that is readable from the moment a signal arrives."""

import hashlib
import os
import select
import signal
import threading
import time

import pytest

from ember_pp.coordinator.stop_signal import StopSignal


def is_readable(descriptor, timeout_s):
    return bool(select.select([descriptor], [], [], timeout_s)[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_named_and_wakes_a_poll(number):
    with StopSignal() as stop:
        assert stop.name is None
        assert not is_readable(stop.descriptor, 0)
        os.kill(os.getpid(), number)
        assert is_readable(stop.descriptor, 5)
        assert stop.name == number.name


def test_the_descriptor_does_not_wait_for_the_handler():
    """The main thread is in C code that no signal interrupts, as it is between two polls."""
    found = []

    def send():
        time.sleep(0.1)  # until the main thread is there
        os.kill(os.getpid(), signal.SIGTERM)
        found.append((is_readable(stop.descriptor, 5), stop.name))

    with StopSignal() as stop:
        sender = threading.Thread(target=send)
        sender.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)
        sender.join()
        assert stop.name == "SIGTERM"
    assert found == [(True, None)]


def test_what_was_there_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal():
        pass
    assert signal.getsignal(signal.SIGTERM) is before
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    assert wakeup == -1
