"""The script of speed targets: every row is a ``job=bench`` that composes, and what it reaches."""

from __future__ import annotations

import pytest

from benchmarks import targets
from ember_pp import __main__ as entry
from ember_pp import config as configuration


@pytest.mark.parametrize("name", targets.ROWS)
def test_every_row_is_a_benchmark_that_composes(monkeypatch, name) -> None:
    built = []
    monkeypatch.setattr(entry, "_run_job", lambda composed: built.append(composed) or 0)
    row = targets.ROWS[name]
    assert entry.main(["job=bench", "model.load=random", *row.overrides]) == 0
    config = configuration.build(entry.OmegaConf.to_container(built[0], resolve=True))
    assert config.pipeline.stages == 1
    assert config.model.dtype == "bfloat16"
    assert row.must < row.aim
    batch = config.job.batch or 1
    assert config.job.workload != "fixed" or batch <= config.scheduler.max_sequences


@pytest.mark.parametrize(
    ("median", "reaches"), [(0.59, "neither"), (0.60, "must"), (0.89, "must"), (0.90, "aim")]
)
def test_a_row_says_what_it_reaches(median, reaches) -> None:
    summary = {"ratio": {"median": median, "min": 0.5, "max": 0.95}}
    entry_of_row = targets.describe(targets.ROWS["0.6b-single"], {"result": {"summary": summary}})
    assert entry_of_row["reaches"] == reaches
    assert (entry_of_row["measured"], entry_of_row["spread"]) == (median, [0.5, 0.95])


def test_a_row_that_failed_says_why() -> None:
    failed = targets.describe(targets.ROWS["8b-mixed"], {"error": "exit code 3"})
    assert (failed["measured"], failed["error"]) == (None, "exit code 3")


def test_an_unknown_row_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["targets", "--rows", "0.6b-single,9b-single"])
    with pytest.raises(SystemExit):
        targets.main()
    assert "no row 9b-single; there are 0.6b-single" in capsys.readouterr().err
