"""A client for a job: of a coordinator that runs, or of one that is started."""

import pytest

from ember_pp import config as configuration
from ember_pp.errors import ConfigError
from ember_pp.jobs.session import open_client


@pytest.mark.parametrize(
    "asked",
    [
        {"trace": {"output": "run.json"}},
        {"trace": {"picture": "run.svg"}},
        {"metrics": {"port": 0}},
    ],
)
def test_what_only_the_start_of_a_coordinator_decides_is_refused(asked):
    config = configuration.build(
        {
            "job": {"name": "chat"},
            "model": {"path": "demo"},
            "coordinator": {"address": "ipc:///nowhere/ember.sock"},
        }
        | asked
    )
    [(group, settings)] = asked.items()
    [key] = settings
    with (
        pytest.raises(ConfigError, match=rf"^{group}\.{key}: .*runs already.*job=serve"),
        open_client(config),
    ):
        pass
