"""docs/batch.md: its example lines are accepted, and it names every setting and exit code."""

import dataclasses
import json
import re
from pathlib import Path

from ember_pp import errors
from ember_pp.config import BatchJob
from ember_pp.jobs import openai
from ember_pp.jobs.batch_answers import REQUEST_HASH_KEY

TEXT = (Path(__file__).parents[2] / "docs" / "batch.md").read_text()


def test_example_lines_are_what_the_job_reads_and_writes():
    read, written = re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)
    requests = [openai.parse_line(json.loads(line), n) for n, line in enumerate(read.splitlines())]
    assert [request.kind for request in requests].count("chat") == 2
    (answer,) = map(json.loads, written.splitlines())
    assert list(answer) == ["id", "custom_id", "response", "error", REQUEST_HASH_KEY]


def test_every_setting_and_exit_code_has_its_row():
    rows = set(re.findall(r"^\| `?([\w.]+)`? \|", TEXT, re.MULTILINE))
    names = {f"job.{field.name}" for field in dataclasses.fields(BatchJob)} - {"job.name"}
    codes = {str(getattr(errors, name)) for name in dir(errors) if name.startswith("EXIT_")}
    assert names | codes <= rows
