"""The files of a trace: checked before anything is loaded, written once the stages have ended.

They are written under another name first, so a file that is there is whole, however the run
ended: by itself, by a signal, or by the death of a stage.
"""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from ember_pp import __version__
from ember_pp.config import Config
from ember_pp.coordinator import gantt
from ember_pp.coordinator.drawing import has_pillow
from ember_pp.coordinator.preparation import Preparation
from ember_pp.coordinator.trace import Timeline, TraceLog, timeline
from ember_pp.coordinator.trace_events import write_events
from ember_pp.errors import ConfigError

logger = logging.getLogger(__name__)


def check_trace(config: Config) -> None:
    """Refuse files that could not be written in the end.

    Raises:
        ConfigError: names ``trace.output`` or ``trace.picture``.
    """
    settings = config.trace
    for key, path in (("output", settings.output), ("picture", settings.picture)):
        if path is not None and not _is_writable(Path(path)):
            raise ConfigError(f"trace.{key}: {path} cannot be written; is its folder there?")
    if settings.picture is not None and settings.picture.endswith(".png") and not has_pillow():
        raise ConfigError(
            f"trace.picture: {settings.picture}: PNG needs Pillow, which is not installed; "
            "pip install 'ember-pp[picture]', or name an .svg file"
        )


class TraceOutput:
    """The logs of all replicas, and the files that come of them.

    Args:
        config: the whole configuration.
        preparation: the checked model and layout.
    """

    def __init__(self, config: Config, preparation: Preparation) -> None:
        self._config = config
        self._preparation = preparation
        replicas = config.pipeline.replicas
        max_plans = max(1, config.trace.max_plans // replicas)
        self.logs = [
            TraceLog(replica, config.pipeline.stages, max_plans) for replica in range(replicas)
        ]

    def write(self) -> None:
        """Write what was asked for. A file that cannot be written is a warning: the run is over."""
        settings = self._config.trace
        traced = timeline(self.logs)
        if settings.output is not None:
            self._write_file(settings.output, lambda stream: self._write_events(traced, stream))
        if settings.picture is not None:
            self._write_file(settings.picture, lambda stream: self._write_picture(traced, stream))

    def _write_file(self, path: str, write: Callable[[BinaryIO], None]) -> None:
        partial = f"{path}.partial"
        try:
            with open(partial, "wb") as stream:
                write(stream)
            os.replace(partial, path)
        except OSError as error:
            logger.warning("trace: %s: %s", path, error.strerror)

    def _write_events(self, traced: Timeline, stream: BinaryIO) -> None:
        text = io.TextIOWrapper(stream, encoding="utf-8")
        write_events(traced, self._facts(), text)
        text.flush()
        text.detach()

    def _write_picture(self, traced: Timeline, stream: BinaryIO) -> None:
        settings, facts = self._config.trace, self._facts()
        layers = self._preparation.layer_ranges
        devices = self._preparation.devices
        captions = gantt.Captions(
            title=f"{facts['model']} on {facts['stages']} stages"
            + (f" x {facts['replicas']} replicas" if facts["replicas"] > 1 else ""),
            conditions=(
                f"{facts['dtype']}, {facts['max_in_flight']} plans in flight, "
                f"{facts['microbatches']} micro-batches, run-ahead {facts['run_ahead']}, "
                f"policy {facts['policy']}, ember-pp {facts['version']}"
            ),
            rows=[
                f"{devices[index]}, layers {start}-{end - 1}"
                for index, (start, end) in enumerate(layers * len(self.logs))
            ],
        )
        drawing = gantt.draw(traced, captions, settings.window_s)
        if str(settings.picture).endswith(".png"):
            drawing.write_png(stream)
        else:
            stream.write(drawing.to_svg().encode())

    def _facts(self) -> dict[str, Any]:
        config, preparation = self._config, self._preparation
        return {
            "version": __version__,
            "clock": "CLOCK_MONOTONIC",
            "model": config.model.path or preparation.model_config.model_type,
            "num_layers": preparation.model_config.num_layers,
            "dtype": config.model.dtype,
            "stages": config.pipeline.stages,
            "replicas": config.pipeline.replicas,
            "devices": preparation.devices,
            "layer_ranges": preparation.layer_ranges,
            "max_in_flight": preparation.max_in_flight,
            "microbatches": preparation.num_microbatches,
            "run_ahead": config.pipeline.run_ahead,
            "policy": config.scheduler.policy,
        }


def _is_writable(path: Path) -> bool:
    if path.is_dir():
        return False
    return path.parent.is_dir() and os.access(path.parent, os.W_OK)
