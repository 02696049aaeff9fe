"""``supervisor.*``: when a stage counts as gone, and how often it is started again.

``docs/reliability.md`` says how these work together.
"""

from __future__ import annotations

import dataclasses

from ember_pp.errors import ConfigError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorSettings:
    """What happens to stages that fail."""

    max_restarts: int = 5
    """Failures within ``restart_window_s`` after each of which the pipeline is renewed and goes on;
    one more ends the run with what the stage said."""
    restart_window_s: float = 600.0
    """Length of time in which failures are counted."""
    heartbeat_interval_s: float = 0.15
    """Time between two heartbeats."""
    heartbeat_max_misses: int = 5
    """Heartbeats in a row that may stay unanswered; then the process counts as gone."""
    overdue_min_s: float = 5.0
    """No plan is overdue before this time."""
    overdue_factor: float = 20.0
    """Times the predicted duration after which a plan is overdue."""
    hello_timeout_s: float = 60.0
    """Longest time from starting a process to its first message."""
    build_timeout_s: float = 600.0
    """Longest time that a stage may compile a kernel or capture graphs while plans wait."""

    def check(self) -> None:
        """Raise ``ConfigError`` for a value out of range; names its dotted key."""
        for key, low in (("max_restarts", 0), ("heartbeat_max_misses", 1)):
            if getattr(self, key) < low:
                raise ConfigError(
                    f"supervisor.{key}: expected at least {low}, got {getattr(self, key)}"
                )
        for field in dataclasses.fields(self):
            if field.name.endswith(("_s", "_factor")) and getattr(self, field.name) <= 0:
                raise ConfigError(
                    f"supervisor.{field.name}: expected above 0, got {getattr(self, field.name)}"
                )
