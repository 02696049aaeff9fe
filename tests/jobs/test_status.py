"""``job=status``: the map of a coordinator on stdout; the exit code says if work goes on."""

import contextlib
import json

import pytest

from ember_pp import config as configuration
from ember_pp.jobs import status as job


class FakeClient:
    def __init__(self, reply):
        self._reply = reply

    def status(self):
        return self._reply


@pytest.mark.parametrize(
    ("problems", "code"), [([], 0), (["plan 17 is overdue since 0.2 s"], 1)], ids=["well", "ill"]
)
def test_what_stands_still_is_an_exit_code(monkeypatch, capsys, problems, code):
    reply = {"phase": "ready", "problems": problems}
    client = contextlib.nullcontext(FakeClient(reply))
    monkeypatch.setattr(job, "open_running", lambda config, timeout_s: client)
    config = configuration.build({"job": {"name": "status"}, "model": {"path": "demo"}})
    assert job.run(config) == code
    assert json.loads(capsys.readouterr().out) == reply
