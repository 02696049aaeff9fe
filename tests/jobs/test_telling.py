"""What a measurement tells: the table and the JSON never mix."""

import json

import pytest

from ember_pp.errors import ConfigError
from ember_pp.jobs.telling import report, say

RESULT = {"measured": [1, 2.5]}


def test_without_output_the_table_is_all(capsys):
    report("a table", RESULT, None)
    assert capsys.readouterr() == ("a table\n", "")


def test_a_dash_leaves_stdout_to_json(capsys):
    report("a table", RESULT, "-")
    out, err = capsys.readouterr()
    assert json.loads(out) == RESULT
    assert err == "a table\n"


def test_a_file_gets_json_and_stdout_the_table(tmp_path, capsys):
    path = tmp_path / "result.json"
    report("a table", RESULT, str(path))
    assert json.loads(path.read_text()) == RESULT
    assert capsys.readouterr() == ("a table\n", "")


def test_a_file_that_cannot_be_written_is_named(tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"^job\.output: .*nowhere"):
        report("a table", RESULT, str(tmp_path / "nowhere" / "result.json"))
    assert capsys.readouterr().out == "a table\n", "the numbers are not lost"


def test_what_goes_on_is_a_line_each_where_there_is_no_terminal(capsys):
    say("loading ...")
    say("")
    assert capsys.readouterr() == ("", "loading ...\n")
