"""write_json: whole or not at all; errors name the setting."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ember_pp.errors import ConfigError
from ember_pp.jobs.json_file import write_json


def test_replaces_what_is_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for plain in ({"a": [1, 2]}, {"b": None}):
        write_json("job.output", path, plain)
        assert json.loads(path.read_text()) == plain
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.json"]


def test_a_write_that_fails_keeps_the_file_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.json"
    write_json("job.output", path, {"a": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"^job\.output: .*out\.json: No space left"):
        write_json("job.output", path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
