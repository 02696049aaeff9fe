"""``job=serve``: a coordinator for clients, until a signal."""

from __future__ import annotations

import dataclasses
import sys

from ember_pp.config import Config
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.errors import EXIT_DRAINED, EXIT_OK
from ember_pp.sockets import default_address


def run(config: Config) -> int:
    """Serve until SIGINT or SIGTERM, then let open requests end for ``shutdown.grace_s``.

    Returns the exit code: 75 if that was too short for some of them.
    """
    address = config.coordinator.address or default_address()
    coordinator = dataclasses.replace(config.coordinator, address=address)
    with StopSignal() as stop:
        num_cut_off = serve(
            dataclasses.replace(config, coordinator=coordinator), stop, announce=_announce
        )
    if num_cut_off:
        _announce(f"{num_cut_off} requests were cut off; their clients were told")
    return EXIT_DRAINED if num_cut_off else EXIT_OK


def _announce(text: str) -> None:
    print(f"ember-pp: {text}", file=sys.stderr, flush=True)
