"""``job=serve``: a coordinator for clients, until a signal."""

from __future__ import annotations

import dataclasses
import sys

from ember_pp.config import Config
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.errors import EXIT_OK
from ember_pp.sockets import default_address


def run(config: Config) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit code."""
    address = config.coordinator.address or default_address()
    coordinator = dataclasses.replace(config.coordinator, address=address)
    with StopSignal() as stop:
        serve(dataclasses.replace(config, coordinator=coordinator), stop, announce=_announce)
    return EXIT_OK


def _announce(text: str) -> None:
    print(f"ember-pp: {text} (Ctrl-C ends it)", file=sys.stderr, flush=True)
