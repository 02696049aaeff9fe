"""``job=status``: the map of a coordinator on stdout; the exit code says if work goes on."""

import json

import pytest

from ember_pp import config as configuration
from ember_pp.jobs import status as job


class FakeClient:
    def __init__(self, reply):
        self._reply = reply

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def status(self):
        return self._reply


@pytest.mark.parametrize(
    ("problems", "code"), [([], 0), (["plan 17 is overdue since 0.2 s"], 1)], ids=["well", "ill"]
)
def test_what_stands_still_is_an_exit_code(monkeypatch, capsys, problems, code):
    reply = {"phase": "ready", "problems": problems}
    monkeypatch.setattr(job, "Client", lambda address, timeout_s: FakeClient(reply))
    config = configuration.build({"job": {"name": "status"}, "model": {"path": "demo"}})
    assert job.run(config) == code
    assert json.loads(capsys.readouterr().out) == reply
