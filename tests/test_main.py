"""The command line: composes, dispatches, and turns every failure into one line and a code."""

import logging
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from ember_pp import __main__ as entry
from ember_pp import __version__, config, devices, errors

MODULE = [sys.executable, "-m", "ember_pp"]


@pytest.fixture
def batch_job(monkeypatch, tmp_path):
    """Stands in for job=batch: keeps each Config; what it returns or raises is set by tests."""
    monkeypatch.chdir(tmp_path)
    job = types.ModuleType("ember_pp.jobs.batch")
    job.configs = []
    job.outcomes = []  # per run: an exit code or something to raise

    def run(composed):
        job.configs.append(composed)
        outcome = job.outcomes.pop(0) if job.outcomes else 0
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    job.run = run
    monkeypatch.setitem(sys.modules, "ember_pp.jobs.batch", job)
    return job


def test_without_arguments_the_demo_runs_over_two_stages(batch_job):
    assert entry.main([]) == 0
    (run,) = batch_job.configs
    assert isinstance(run.job, config.BatchJob)
    assert (run.model.path, run.model.dtype, run.pipeline.stages) == ("demo", "float32", 2)


def test_a_model_of_ones_own_takes_nothing_over_from_the_demo(batch_job):
    assert entry.main(["model.path=/models/mine"]) == 0
    (run,) = batch_job.configs
    assert run.model == config.ModelSettings(path="/models/mine")
    assert run.pipeline == config.PipelineSettings()


def test_overrides_win_over_a_preset(batch_job):
    assert entry.main(["pipeline.stages=3", "model=qwen3-0.6b", "model.path=/m"]) == 0
    (run,) = batch_job.configs
    assert (run.model.path, run.pipeline.stages) == ("/m", 3)
    assert run.model.architecture["hidden_size"] == 1024


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("job.input=a b.jsonl", "a b.jsonl"),
        ("job.input=runs (1)/x.jsonl", "runs (1)/x.jsonl"),
        ("job.input=a=b.jsonl", "a=b.jsonl"),
        ('job.input=say "hi".jsonl', 'say "hi".jsonl'),
        (r"job.input=back\slash(1)", r"back\slash(1)"),
        (r"job.input=back(1)\"", r"back(1)\""),
        ("job.input=at the end (1)\\", "at the end (1)\\"),
        ("+job.input=known", "known"),  # adding a key that is there sets it
        ("job.input=data/*.jsonl", "data/*.jsonl"),
        ("job.input=-", "-"),
        ("job.input=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("job.input='a,b.jsonl'", "a,b.jsonl"),
        ("job.input=${stem:data/x.jsonl.gz}", "x"),
        ("job.input=in (1)/${stem:x.json}", "in (1)/x"),
    ],
)
def test_values_arrive_as_they_were_typed(batch_job, argument, value):
    assert entry.main([argument]) == 0
    assert batch_job.configs[0].job.input == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pipeline.stgaes=2"], r"pipeline\.stgaes: no such setting; did you mean 'pipeline.stag"),
        (["pipline.stages=2"], r"pipline\.stages: no such setting; did you mean 'pipeline.stages'"),
        (["jbo=batch"], r"jbo: no such setting; did you mean 'job'"),
        (["+foo=1"], r"foo: no such setting"),
        (["+model.laod=random"], r"model\.laod: no such setting; did you mean 'model.load'"),
        (["job=chat", "job.input=x"], r"job\.input: a setting of job=batch"),
        (["job=bacth"], r"job=bacth: expected one of .*; did you mean 'batch'"),
        (["model=qwen3-9b"], r"model=qwen3-9b: expected one of demo, .*; did you mean 'qwen3-"),
        (["pipeline.stages=two"], r"pipeline\.stages: expected a whole number, got 'two'"),
        (["pipeline.stages=[1,"], r"pipeline\.stages: expected a whole number, got '\[1,'"),
        (["pipeline.stages=0"], r"pipeline\.stages: expected at least 1, got 0"),
        (["pipeline=2"], r"pipeline: expected a group of settings, got 2"),
        (["job.overwrite=maybe"], r"job\.overwrite: expected true or false, got 'maybe'"),
        (["job.input=${nope}"], r"job\.input: Interpolation key 'nope' not found"),
        (["job.input=a,b"], r"job\.input: several values; a list is job.input=\[a,b\], .*--multir"),
        (["batch"], r"batch: expected key=value"),
        (["model.path=null"], r"model\.path: missing"),
        (["--config-name", "nope"], r"primary config 'nope'"),
        (["--config-dir", "/nope"], r"'/nope' not found"),
        (["-m", "--cfg", "job"], r"Only one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_configuration_is_one_line_and_exit_code_2(batch_job, capsys, arguments, message):
    code = entry.main(arguments)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert re.search(message, captured.err)
    assert captured.err.startswith("ember-pp: ")
    assert captured.err.count("\n") == 1
    assert batch_job.configs == []


def test_unknown_flag_is_exit_code_2(batch_job, capsys):
    assert entry.main(["--frobnicate"]) == 2
    assert "ember-pp: error: unrecognized arguments: --frobnicate" in capsys.readouterr().err


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75])
def test_the_job_decides_the_exit_code(batch_job, code):
    batch_job.outcomes = [code]
    assert entry.main([]) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("job.output: missing"), 2),
        (errors.CapacityError("stage 0: 3 GiB short"), 3),
        (errors.CheckpointError("model.safetensors: truncated"), 2),
        (errors.StageDiedError("stage 1 was killed", stage_index=1), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_ours_are_one_line(batch_job, capsys, error, code):
    batch_job.outcomes = [error]
    assert entry.main([]) == code
    assert capsys.readouterr().err == f"ember-pp: {error}\n"


def test_a_bug_shows_its_traceback_and_where_to_go(batch_job, capsys):
    batch_job.outcomes = [ZeroDivisionError("oops")]
    assert entry.main([]) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: oops" in told
    assert "docs/debugging.md" in told.splitlines()[-1]


def test_ctrl_c_is_130(batch_job, capsys):
    batch_job.outcomes = [KeyboardInterrupt()]
    assert entry.main([]) == 130
    assert capsys.readouterr().err == "ember-pp: interrupted\n"


def test_a_job_sees_the_environment_as_it_was(batch_job, monkeypatch):
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    seen = []
    monkeypatch.setattr(batch_job, "run", lambda _: seen.append(dict(os.environ)) or 0)
    before = dict(os.environ)
    assert entry.main([]) == 0
    assert [environment.items() - before.items() for environment in seen] == [set()]
    assert dict(os.environ) == before


def test_logs_go_to_stderr_from_the_asked_level_and_leave_the_root_logger_alone(batch_job, capsys):
    logger, root_handlers = logging.getLogger("ember_pp"), list(logging.getLogger().handlers)
    try:
        for _ in range(2):  # a second run in one process must not log every line twice
            assert entry.main(["log_level=info"]) == 0
        logging.getLogger("ember_pp.coordinator").info("hello")
        logging.getLogger("ember_pp.coordinator").debug("not this")
    finally:
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("hello") == 1
    assert "ember-pp INFO ember_pp.coordinator: hello" in captured.err
    assert "not this" not in captured.err
    assert logging.getLogger().handlers == root_handlers


# --------------------------------------------------------------------------------------
# several runs


def test_multirun_runs_each_and_leaves_nothing_behind(batch_job, tmp_path):
    arguments = ["--multirun", "job.input=in/a.jsonl,b.jsonl.gz"]
    assert entry.main([*arguments, "job.output=out/${stem:${job.input}}.jsonl"]) == 0
    runs = [(run.job.input, run.job.output) for run in batch_job.configs]
    assert runs == [("in/a.jsonl", "out/a.jsonl"), ("b.jsonl.gz", "out/b.jsonl")]
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_multirun_says_which_run_it_is(batch_job, capsys):
    output = "job.output=${job.input}.out"
    assert entry.main(["-m", "model.path=/m", "job.input=a,b", output]) == 0
    assert capsys.readouterr().err.splitlines() == [
        f"ember-pp: run 1: model.path=/m job.input=a {output}",
        f"ember-pp: run 2: model.path=/m job.input=b {output}",
    ]


def test_a_single_run_leaves_nothing_behind(batch_job, tmp_path):
    assert entry.main([]) == 0
    assert Path.cwd() == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([0, 1, 0], 1),
        ([1, errors.ConfigError("x"), 0], 2),
        ([errors.CapacityError("x"), 1, 4], 3),
        ([ZeroDivisionError("x"), 0, 0], 1),
    ],
)
def test_multirun_goes_on_after_a_failure_and_returns_the_worst(batch_job, outcomes, code):
    batch_job.outcomes = list(outcomes)
    assert entry.main(["-m", "job.input=a,b,c"]) == code
    assert [run.job.input for run in batch_job.configs] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("outcome", "code"), [(75, 75), (130, 130), (KeyboardInterrupt(), 130)], ids=str
)
def test_a_signal_ends_the_whole_sweep(batch_job, outcome, code):
    batch_job.outcomes = [0, outcome, 0]
    assert entry.main(["-m", "job.input=a,b,c"]) == code
    assert [run.job.input for run in batch_job.configs] == ["a", "b"]


def test_a_failure_before_a_drain_is_still_told(batch_job):
    batch_job.outcomes = [1, 75]
    assert entry.main(["-m", "job.input=a,b,c"]) == 1


def test_multirun_checks_what_it_can_before_the_first_run(batch_job, capsys):
    assert entry.main(["-m", "model=demo,qwen3-9b"]) == 2
    assert "model=qwen3-9b" in capsys.readouterr().err
    assert batch_job.configs == []


def test_worst_exit_code_orders_them_all():
    from_best = [0, 75, 1, 4, 3, 2, 130]
    assert entry.worst_exit_code([]) == 0
    for worse in range(len(from_best)):
        for better in range(worse + 1):
            pair = [from_best[better], from_best[worse]]
            assert entry.worst_exit_code(pair) == from_best[worse]
            assert entry.worst_exit_code(pair[::-1]) == from_best[worse]


@pytest.mark.parametrize(
    ("arguments", "num_gpus", "max_sequences"),
    [
        ([], 0, 64),
        ([], 1, 256),
        (["pipeline.devices=cpu"], 1, 64),
        (["pipeline.devices=[cpu,cuda:0]", "pipeline.stages=2"], 0, 256),
        (["scheduler.max_sequences=3"], 1, 3),
        (["plan.devices=RTX 4090"], 0, 64),  # only job=plan runs on what is described
    ],
)
def test_defaults_are_those_of_the_devices(
    batch_job, monkeypatch, arguments, num_gpus, max_sequences
):
    monkeypatch.setattr(devices, "count_gpus", lambda: num_gpus)
    assert entry.main(arguments) == 0
    assert batch_job.configs[0].scheduler.max_sequences == max_sequences


# --------------------------------------------------------------------------------------
# what a person asks of it


def test_cfg_prints_a_configuration_that_builds(batch_job, capsys):
    assert entry.main(["--cfg", "job", "pipeline.stages=3"]) == 0
    printed = config.build(yaml.safe_load(capsys.readouterr().out))
    assert entry.main(["pipeline.stages=3"]) == 0
    assert batch_job.configs == [printed]


def test_help_names_every_job_and_every_preset(capsys):
    assert entry.main(["--help"]) == 0
    told = capsys.readouterr().out
    for job in config.JOBS:
        assert f"job={job} " in told
    for preset in entry.presets():
        assert f" {preset}" in told
    assert all(len(line) <= 100 for line in told.splitlines())


def test_help_shows_only_settings_that_exist(batch_job, capsys):
    assert entry.main(["--help"]) == 0
    told = capsys.readouterr().out
    keys = set(re.findall(r"\b([a-z_]+\.[a-z_]+)=", told))
    assert len(keys) > 5
    assert keys <= set(config.dotted_keys())


def test_version(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ember-pp {__version__}\n"


def test_info_still_works():
    """In a process of its own: it leaves Hydra's loggers at work, with this process's streams."""
    process = subprocess.run([*MODULE, "--info", "defaults"], capture_output=True, check=True)
    assert b"Defaults List" in process.stdout


def test_a_reader_that_goes_away_is_no_traceback():
    process = subprocess.Popen([*MODULE, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    _, told = process.communicate(timeout=60)
    assert told == b""
    assert process.returncode == 1


def test_starts_without_torch():
    """Loading torch takes seconds, and neither the coordinator nor a client needs it."""
    check = "import sys, ember_pp.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=60).returncode == 0
