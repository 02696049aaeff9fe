"""The batch job from files to files, with a client in memory: once each, resumed, refused."""

import contextlib
import fcntl
import gzip
import itertools
import json
import os
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from fake_client import READY, FakeClient, answer_text
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp import config as configuration
from ember_pp.coordinator.admission import Admission
from ember_pp.errors import (
    EXIT_DRAINED,
    EXIT_FAILED,
    EXIT_OK,
    BatchInputError,
    ConfigError,
    EmberError,
    InvalidRequestError,
    PipelineError,
    StageFailedError,
    TransportError,
    UnavailableError,
)
from ember_pp.jobs import batch
from ember_pp.jobs.batch_output import BatchOutput
from ember_pp.sampling_params import SamplingParams, derive_seed


class Job:
    """A batch in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "out.jsonl"
        self.errors = folder / "out.errors.jsonl"
        self.manifest = folder / "out.jsonl.manifest.json"

    def write_input(self, num_lines=10, name="in.jsonl", first=1):
        lines = [request_line(f"r{n}") for n in range(first, first + num_lines)]
        (self.folder / name).write_text("".join(lines))

    def run(self, client=None, *, stop=None, groups=None, clock=time.monotonic, **settings):
        self.client = FakeClient() if client is None else client
        plain = {
            "job": {
                "name": "batch",
                "input": str(self.folder / "in.jsonl"),
                "output": str(self.output),
            }
            | settings,
            "model": {"path": "demo"},
            "shutdown": {"grace_s": 0.01},
        }
        for name, values in (groups or {}).items():
            plain[name] = plain.get(name, {}) | values
        return batch.run(
            configuration.build(plain), connect=self.client.connect, stop=stop, clock=clock
        )

    def ids(self):
        return [line["custom_id"] for line in read_lines(self.output)]

    def error_ids(self):
        return [line["custom_id"] for line in read_lines(self.errors)]


def request_line(custom_id, **body):
    return json.dumps({"custom_id": custom_id, "prompt": f"about {custom_id}"} | body) + "\n"


def read_lines(path):
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def all_ids(num):
    return {f"r{n}" for n in range(1, num + 1)}


# --------------------------------------------------------------------------------------
# a run


def test_every_request_is_answered_once(job):
    job.write_input(100)
    assert job.run(max_open_requests=7) == EXIT_OK
    assert len(job.ids()) == 100
    assert set(job.ids()) == all_ids(100)
    assert job.client.most_open == 7
    assert read_lines(job.errors) == []
    for line in read_lines(job.output):
        assert line["error"] is None
        assert line["response"]["status_code"] == 200
        choice = line["response"]["body"]["choices"][0]
        assert choice["text"] == answer_text(line["custom_id"])


def test_openai_lines_and_chats_are_answered(job):
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (job.folder / "in.jsonl").write_text(json.dumps(line) + "\n")
    assert job.run() == EXIT_OK
    (answer,) = read_lines(job.output)
    message = answer["response"]["body"]["choices"][0]["message"]
    assert message == {"role": "assistant", "content": answer_text("a")}


def test_a_failed_request_goes_to_errors_and_the_others_run(job):
    job.write_input(10)
    outcomes = {"r3": [InvalidRequestError("prompt: too long")], "r5": ["abort"]}
    assert job.run(FakeClient(outcomes=outcomes)) == EXIT_FAILED
    assert set(job.ids()) == all_ids(10) - {"r3", "r5"}
    errors = {line["custom_id"]: line["error"] for line in read_lines(job.errors)}
    assert errors["r3"] == {"code": "invalid_request", "message": "prompt: too long"}
    assert errors["r5"]["code"] == "aborted"
    assert job.errors.read_text().count("\n") == 2


def test_what_the_coordinator_cannot_take_now_is_sent_again(job):
    job.write_input(10)
    outcomes = {f"r{n}": [UnavailableError("full")] * 2 for n in (1, 4, 10)}
    assert job.run(FakeClient(outcomes=outcomes)) == EXIT_OK
    assert set(job.ids()) == all_ids(10)
    assert len(job.ids()) == 10
    assert job.client.submitted.count("r4") == 3


@pytest.mark.parametrize("lines", ["", "\n\n  \n"])
def test_nothing_to_do(job, lines, capsys):
    (job.folder / "in.jsonl").write_text(lines)
    assert job.run() == EXIT_OK
    assert capsys.readouterr().out == "nothing to do: the input has no requests\n"
    assert job.output.read_text() == ""
    assert job.client.submitted == []


def test_sampling_defaults_reach_requests_that_do_not_say(job):
    (job.folder / "in.jsonl").write_text(request_line("a") + request_line("b", temperature=1.5))
    seen = {}
    client = FakeClient()
    client.submit, submit = (
        lambda **f: seen.update({f["seed_key"]: f}) or submit(**f),
        client.submit,
    )
    job.run(client, groups={"sampling": {"temperature": 0.5, "top_k": 3}})
    assert seen["a"]["sampling"] == {"temperature": 0.5, "top_k": 3}
    assert seen["b"]["sampling"] == {"temperature": 1.5, "top_k": 3}


def test_a_coordinator_elsewhere_draws_as_one_of_our_own(job):
    """Its sampling.seed is not ours, so seeds are derived here, by the same rule."""
    (job.folder / "in.jsonl").write_text(request_line("a") + request_line("b", seed=5))
    seeds = {}
    client = FakeClient()
    client.submit, submit = (
        lambda **f: seeds.update({f["seed_key"]: f["sampling"].get("seed")}) or submit(**f),
        client.submit,
    )
    remote = {"coordinator": {"address": "ipc:///nowhere"}, "sampling": {"seed": 7}}
    job.run(client, groups=remote)
    admission = Admission.__new__(Admission)
    admission._base_seed = 7
    assert seeds == {"a": admission._seed(SamplingParams(), "a"), "b": 5}
    assert derive_seed(7, "a") == seeds["a"]


def test_the_closing_table_goes_to_stdout_and_progress_to_stderr(job, capsys):
    job.write_input(12)
    job.run(FakeClient(outcomes={"r2": [InvalidRequestError("no")]}))
    printed = capsys.readouterr()
    rows = dict(line.split(None, 1) for line in printed.out.splitlines()[:5])
    assert rows["requests"] == "11 answered, 1 failed"
    assert rows["tokens"] == "55 prompt (0 from the prefix cache), 33 output"
    assert rows["answers"] == str(job.output)
    assert rows["errors"] == str(job.errors)
    assert "0     cpu     0-7         4.0   64.0     90.0  75.0%" in printed.out
    assert "12/12 done, 1 failed, 0 open" in printed.err


def test_answers_to_stdout_leave_it_to_them(job, capfd):
    job.write_input(5)
    outcomes = {"r2": [InvalidRequestError("no")]}
    assert job.run(FakeClient(outcomes=outcomes), output="-") == EXIT_FAILED
    printed = capfd.readouterr()
    answers = [json.loads(line) for line in printed.out.splitlines()]
    assert {line["custom_id"] for line in answers} == all_ids(5) - {"r2"}
    assert '"custom_id":"r2"' in printed.err
    assert "4 answered, 1 failed" in printed.err
    assert sorted(path.name for path in job.folder.iterdir()) == ["in.jsonl"]


def test_bundled_prompts_start_over_and_show_answers(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = configuration.build({"job": {"name": "batch"}, "model": {"path": "demo"}})
    for _ in range(2):
        client = FakeClient()
        assert batch.run(config, connect=client.connect) == EXIT_OK
        assert len(client.submitted) >= 10
    answers = read_lines(tmp_path / "ember-out" / "answers.jsonl")
    assert len(answers) == len(client.submitted)
    assert capsys.readouterr().out.count("\n> ") == 6


# --------------------------------------------------------------------------------------
# where the input comes from


def test_several_files_a_glob_and_gzip_are_one_input(job):
    job.write_input(3, "in-1.jsonl")
    (job.folder / "in-2.jsonl.gz").write_bytes(gzip.compress(request_line("r4").encode()))
    assert job.run(input=str(job.folder / "in-*")) == EXIT_OK
    assert set(job.ids()) == all_ids(4)
    files = [str(job.folder / "in-1.jsonl"), str(job.folder / "in-2.jsonl.gz")]
    assert job.run(input=files) == EXIT_OK
    assert job.client.submitted == []


def test_a_glob_over_the_folder_of_the_output_can_be_resumed(job):
    job.write_input(5)
    outcomes = {"r1": [InvalidRequestError("no")]}
    glob = str(job.folder / "*.jsonl")
    assert job.run(FakeClient(outcomes=outcomes), input=glob) == EXIT_FAILED
    assert job.run(input=glob) == EXIT_OK
    assert job.client.submitted == ["r1"]


def test_shards_together_answer_everything_once(job):
    job.write_input(23)
    for index in (1, 2, 3):
        assert job.run(shard=f"{index}/3") == EXIT_OK
    outputs = sorted(job.folder.glob("out.?-of-3.jsonl"))
    ids = [line["custom_id"] for path in outputs for line in read_lines(path)]
    assert len(outputs) == 3
    assert len(ids) == 23
    assert set(ids) == all_ids(23)
    assert not job.output.exists()


def test_line_numbers_name_requests_without_an_id(job):
    (job.folder / "in.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"}\n')
    job.run()
    assert set(job.ids()) == {"line-1", "line-3"}


# --------------------------------------------------------------------------------------
# bad lines


BAD_LINES = (
    request_line("r1")
    + '{"custom_id": "broken"\n'
    + request_line("r2")
    + request_line("r1", max_tokens=3)
    + request_line("r3", temprature=1)
    + request_line("r4")
)


def test_bad_lines_stop_the_job_before_anything_starts(job):
    (job.folder / "in.jsonl").write_text(BAD_LINES)
    client = FakeClient()
    client.connect = lambda config: pytest.fail("a coordinator was started")
    with pytest.raises(BatchInputError) as refusal:
        job.run(client)
    assert refusal.value.exit_code == 2
    assert len(refusal.value.problems) == 3
    assert sorted(path.name for path in job.folder.iterdir()) == ["in.jsonl"]


def test_more_than_a_limit_of_our_own_coordinator_is_a_bad_line(job):
    (job.folder / "in.jsonl").write_text(request_line("a", stop=["x", "y"]) + request_line("b"))
    limit = {"coordinator": {"max_stop_strings": 1}}
    with pytest.raises(
        BatchInputError, match=r"in\.jsonl:1: stop: .*coordinator\.max_stop_strings"
    ):
        job.run(groups=limit)
    assert job.run(on_bad_line="skip", groups=limit) == EXIT_FAILED
    assert (job.ids(), job.error_ids()) == (["b"], ["a"])


def test_the_limits_of_a_coordinator_elsewhere_are_its_own(job):
    (job.folder / "in.jsonl").write_text(request_line("a", stop=["x", "y"]))
    limit = {"coordinator": {"max_stop_strings": 1, "address": "ipc:///nowhere"}}
    assert job.run(groups=limit) == EXIT_OK


def test_skipped_bad_lines_go_to_errors_and_the_others_run(job):
    (job.folder / "in.jsonl").write_text(BAD_LINES)
    for _ in range(2):  # the second run has nothing left but says the same of the bad lines
        assert job.run(on_bad_line="skip") == EXIT_FAILED
        assert sorted(job.ids()) == ["r1", "r2", "r4"]
        assert job.error_ids() == ["line-2", "r1", "r3"]
    assert job.client.submitted == []


def test_skipped_bad_lines_belong_to_one_shard(job):
    (job.folder / "in.jsonl").write_text(BAD_LINES)
    codes = [job.run(on_bad_line="skip", shard=f"{index}/2") for index in (1, 2)]
    assert codes == [EXIT_FAILED, EXIT_FAILED]
    errors = [read_lines(job.folder / f"out.{i}-of-2.errors.jsonl") for i in (1, 2)]
    assert [[line["custom_id"] for line in lines] for lines in errors] == [
        ["r3"],
        ["line-2", "r1"],
    ]


# --------------------------------------------------------------------------------------
# resuming


def test_a_second_run_does_only_what_is_missing(job):
    job.write_input(10)
    outcomes = {"r3": [InvalidRequestError("no")], "r7": [InvalidRequestError("no")]}
    job.run(FakeClient(outcomes=outcomes))
    assert job.run(FakeClient(outcomes={"r7": [InvalidRequestError("still")]})) == EXIT_FAILED
    assert sorted(job.client.submitted) == ["r3", "r7"]
    assert job.error_ids() == ["r7"]
    assert job.run() == EXIT_OK
    assert job.client.submitted == ["r7"]
    assert set(job.ids()) == all_ids(10)
    assert len(job.ids()) == 10
    assert job.error_ids() == []


def test_a_finished_job_starts_nothing(job, capsys):
    job.write_input(10)
    job.run()
    capsys.readouterr()
    client = FakeClient()
    client.connect = lambda config: pytest.fail("a coordinator was started")
    assert job.run(client) == EXIT_OK
    assert capsys.readouterr().out == (
        f"nothing to do: 10 requests answered in {job.output}, none left\n"
    )


def test_a_longer_input_adds_to_the_answers(job):
    job.write_input(5)
    job.run()
    job.write_input(8)
    assert job.run() == EXIT_OK
    assert sorted(job.client.submitted) == ["r6", "r7", "r8"]


def test_answers_to_lines_that_are_gone_stay(job, capsys):
    job.write_input(5)
    job.run()
    job.write_input(3, first=4)
    assert job.run() == EXIT_OK
    assert set(job.ids()) == all_ids(6)
    assert "keeps 3 answers to requests that the input does not have" in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A job of four requests that is done, and what its output holds."""
    done = Job(tmp_path_factory.mktemp("finished"))
    done.write_input(4)
    done.run()
    return done, done.output.read_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_wherever_the_output_was_cut_every_id_is_there_once(finished, data):
    """The end of a file after a crash: any prefix, perhaps with zeros where data never came."""
    done, content = finished
    size = data.draw(st.integers(0, len(content)), label="size")
    num_zeros = data.draw(st.sampled_from([0, 0, 1, 4096]), label="zeros")
    done.output.write_bytes(content[:size] + b"\0" * num_zeros)
    whole = content[: content.rfind(b"\n", 0, size) + 1]
    assert done.run() == EXIT_OK
    assert sorted(done.ids()) == ["r1", "r2", "r3", "r4"]
    assert done.output.read_bytes().startswith(whole)
    assert len(done.client.submitted) == 4 - whole.count(b"\n")


def test_every_byte_of_the_last_lines_is_a_place_to_stop(finished, tmp_path, monkeypatch):
    _, content = finished
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # some thousand of them
    path = tmp_path / "out.jsonl"
    start = content.index(b"\n", content.index(b"\n") + 1)  # the last byte of the second line
    for size in range(start, len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[: content.rfind(b"\n", 0, size) + 1]
        with BatchOutput(path, tmp_path / "errors.jsonl") as output:
            assert len(output.read_answered()) == whole.count(b"\n")
            assert output.num_torn_bytes == size - len(whole)
            output.start({}, keep_answers=True)
        assert path.read_bytes() == whole, size


def test_a_damaged_line_in_the_middle_is_named(job):
    job.write_input(4)
    job.run()
    lines = job.output.read_bytes().splitlines(keepends=True)
    job.output.write_bytes(lines[0] + b"{}\n" + b"".join(lines[1:]))
    with pytest.raises(ConfigError, match=r"out.jsonl:2 is no answer of this job"):
        job.run()
    job.output.write_bytes(b"".join([*lines, lines[0]]))
    with pytest.raises(ConfigError, match=r"out.jsonl:5 is an id answered before"):
        job.run()
    assert job.run(overwrite=True) == EXIT_OK
    assert len(job.ids()) == 4


def test_a_changed_request_under_an_old_id_is_refused(job):
    job.write_input(4)
    job.run()
    before = job.output.read_bytes()
    text = (job.folder / "in.jsonl").read_text().replace("about r3", "about something else")
    (job.folder / "in.jsonl").write_text(text)
    with pytest.raises(BatchInputError, match=r"in.jsonl:3: custom_id 'r3'") as refusal:
        job.run()
    assert "job.overwrite=true" in str(refusal.value)
    assert job.output.read_bytes() == before
    assert job.run(overwrite=True) == EXIT_OK
    assert len(job.client.submitted) == 4


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"sampling": {"seed": 1}}, "sampling.seed was 0 and is 1"),
        ({"sampling": {"top_k": 5}}, "sampling.top_k was not set and is 5"),
        ({"model": {"dtype": "float32"}}, "model.dtype was bfloat16 and is float32"),
        ({"model": {"path": "{other}"}}, "model was one with fingerprint"),
    ],
    ids=["seed", "defaults", "dtype", "model"],
)
def test_other_settings_than_those_of_the_answers_are_refused(job, demo_path, groups, message):
    other = job.folder / "other"
    other.mkdir()
    for path in demo_path.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = other / "model-00002-of-00002.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    weights.write_bytes(content)
    job.write_input(4)
    job.run()
    before = job.output.read_bytes()
    if "model" in groups and "path" in groups["model"]:
        groups = {"model": {"path": str(other)}}
    with pytest.raises(ConfigError, match=message) as refusal:
        job.run(groups=groups)
    assert "job.overwrite=true starts over" in str(refusal.value)
    assert job.output.read_bytes() == before
    assert job.run(groups=groups, overwrite=True) == EXIT_OK
    assert len(job.client.submitted) == 4
    assert job.run(groups=groups) == EXIT_OK


def test_other_devices_and_a_copy_of_the_model_go_on(job, demo_path):
    copy = job.folder / "copy"
    copy.mkdir()
    for path in demo_path.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    job.write_input(4)
    job.run()
    groups = {"model": {"path": str(copy)}, "pipeline": {"stages": 3}}
    assert job.run(groups=groups) == EXIT_OK
    assert job.client.submitted == []


def test_another_model_at_the_coordinator_is_refused(job):
    job.write_input(4)
    remote = {"coordinator": {"address": "ipc:///nowhere"}}
    assert job.run(groups=remote) == EXIT_OK
    other = FakeClient(status=READY | {"model": {"name": "other"}})
    with pytest.raises(ConfigError, match="model was one with fingerprint"):
        job.run(other, groups=remote)


def test_the_manifest_says_what_the_answers_were_made_with(job):
    job.write_input(4)
    job.run(groups={"sampling": {"seed": 3}})
    manifest = json.loads(job.manifest.read_text())
    assert manifest["decides"]["sampling.seed"] == 3
    assert manifest["config"]["model"]["path"] == "demo"
    assert manifest["input"] == [
        {
            "name": str(job.folder / "in.jsonl"),
            "num_bytes": (job.folder / "in.jsonl").stat().st_size,
        }
    ]
    assert set(manifest["versions"]) == {"ember-pp", "python", "torch"}
    assert configuration.build(manifest["config"]).sampling.seed == 3


def test_a_damaged_manifest_is_refused(job):
    job.write_input(4)
    job.run()
    job.manifest.write_text("{")
    with pytest.raises(ConfigError, match=r"manifest.json: damaged; job.overwrite=true"):
        job.run()


# --------------------------------------------------------------------------------------
# order


@pytest.mark.parametrize("per_wait", [1, 3, 50])
def test_ordered_answers_come_in_the_order_of_the_input(job, per_wait):
    job.write_input(60)
    outcomes = {"r1": [UnavailableError("full")], "r30": [InvalidRequestError("no")]}
    client = FakeClient(outcomes=outcomes, per_wait=per_wait, seed=per_wait)
    assert job.run(client, ordered=True, max_open_requests=10) == EXIT_FAILED
    assert job.ids() == [f"r{n}" for n in range(1, 61) if n != 30]
    assert job.run(ordered=True) == EXIT_OK  # r30 comes last, and belongs in the middle
    assert job.client.submitted == ["r30"]
    assert job.ids() == [f"r{n}" for n in range(1, 61)]


def test_an_unordered_output_can_be_ordered_later(job):
    job.write_input(30)
    job.run()
    before = read_lines(job.output)
    assert job.ids() != [f"r{n}" for n in range(1, 31)]
    job.write_input(20)  # answers to r21..r30 have no line any more
    assert job.run(ordered=True) == EXIT_OK
    assert job.ids()[:20] == [f"r{n}" for n in range(1, 21)]
    assert sorted(map(str, read_lines(job.output))) == sorted(map(str, before))
    assert not list(job.folder.glob("*.tmp"))


def test_the_window_of_ordered_answers_is_bounded(job):
    """One slow request at the front must not make the job hold all the others."""
    job.write_input(200)
    most_submitted = []

    def first_ends_last(client):
        client._random.shuffle = lambda items: None
        client._open.sort(key=lambda request: request.fields["seed_key"] == "r1")
        if len(client._open) == 1 and not most_submitted:
            most_submitted.append(len(client.submitted))

    client = FakeClient(per_wait=1, on_wait=first_ends_last)
    assert job.run(client, ordered=True, max_open_requests=4) == EXIT_OK
    assert job.ids() == [f"r{n}" for n in range(1, 201)]
    # 8 windows are held, then what is open ends, at last the first one.
    assert most_submitted[0] in range(8 * 4 + 1, 9 * 4 + 1)


# --------------------------------------------------------------------------------------
# ends


def stop_after(num_waits, stop):
    def on_wait(client):
        client.num_waits = getattr(client, "num_waits", 0) + 1
        if client.num_waits == num_waits:
            stop.set()
        if client.num_waits > num_waits:
            client.per_wait = 0

    return on_wait


@pytest.mark.parametrize("is_ordered", [False, True])
def test_a_stop_keeps_what_is_done_and_the_next_run_goes_on(job, capsys, is_ordered):
    job.write_input(40)
    stop = threading.Event()
    client = FakeClient(on_wait=stop_after(4, stop), per_wait=3)
    code = job.run(client, stop=stop, max_open_requests=8, ordered=is_ordered)
    assert code == EXIT_DRAINED
    assert 9 <= len(job.ids()) <= 12
    assert len(client.submitted) < 40
    assert len(client.cancelled) == len(client.submitted) - len(job.ids())
    printed = capsys.readouterr()
    assert f"answered {len(job.ids())} of 40 requests" in printed.err
    assert f"the same command goes on from {job.output}" in printed.err
    assert job.run(ordered=is_ordered) == EXIT_OK
    assert len(job.ids()) == 40
    assert set(job.ids()) == all_ids(40)
    if is_ordered:
        assert job.ids() == [f"r{n}" for n in range(1, 41)]


def test_a_stop_while_lines_are_checked_starts_nothing(job):
    job.write_input(6)
    stop = threading.Event()
    stop.set()
    client = FakeClient()
    client.connect = lambda config: pytest.fail("a coordinator was started")
    assert job.run(client, stop=stop) == EXIT_DRAINED


def test_a_stop_when_all_is_done_changes_nothing(job):
    job.write_input(6)
    stop = threading.Event()
    client = FakeClient(on_wait=lambda client: stop.set(), per_wait=6)
    assert job.run(client, stop=stop) == EXIT_OK


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_the_job_and_get_their_old_meaning_back(job, number):
    job.write_input(40)
    before = signal.getsignal(number)

    def send(client):
        if client.on_wait is not None:
            client.on_wait = None
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is before  # a second one ends at once
            client.per_wait = 0

    assert job.run(FakeClient(on_wait=send), max_open_requests=8) == EXIT_DRAINED
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    "error",
    [TransportError("the coordinator is gone"), StageFailedError("stage 1 failed", stage_index=1)],
)
@pytest.mark.parametrize("is_result", [False, True], ids=["from-wait", "from-result"])
def test_a_lost_coordinator_ends_the_job_and_what_is_done_stays(job, capsys, error, is_result):
    job.write_input(40)

    def lose(client):
        if len(client.submitted) > 20 and not is_result:
            raise error

    outcomes = {"r21": [error]} if is_result else {}
    with pytest.raises(type(error)):
        job.run(FakeClient(on_wait=lose, outcomes=outcomes), max_open_requests=10)
    assert 10 <= len(job.ids()) < 40
    assert job.error_ids() == []
    assert f"answered {len(job.ids())} of 40 requests" in capsys.readouterr().err
    assert job.run() == EXIT_OK
    assert set(job.ids()) == all_ids(40)
    assert len(job.ids()) == 40


def test_a_coordinator_that_ends_with_the_same_signal_is_no_failure(job, capsys):
    job.write_input(40)
    stop = threading.Event()

    def end(client):
        if len(client.submitted) > 20:
            stop.set()
            raise PipelineError("the coordinator ended with status 0")

    assert job.run(FakeClient(on_wait=end), stop=stop, max_open_requests=10) == EXIT_DRAINED
    assert 10 <= len(job.ids()) < 40
    assert "stopping: the coordinator ended with status 0" in capsys.readouterr().err
    assert job.run() == EXIT_OK
    assert sorted(job.ids()) == sorted(all_ids(40))


def test_only_durable_answers_are_counted(job, monkeypatch):
    """Every number that the progress line shows was on the disk when it was shown."""
    job.write_input(60)
    synced = {"lines": 0}
    real_fsync = os.fsync

    def fsync(fd):
        real_fsync(fd)
        if job.output.exists() and os.path.samestat(os.fstat(fd), job.output.stat()):
            synced["lines"] = job.output.read_bytes().count(b"\n")

    shown = []

    def show_running(self, tally, *, num_open, is_final=False):
        shown.append(tally.num_ok)
        assert tally.num_ok <= synced["lines"]

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(batch.Progress, "show_running", show_running)
    for is_ordered in (False, True):
        ticks = itertools.count()
        settings_ = {"ordered": is_ordered, "overwrite": True, "clock": lambda: next(ticks) / 30}  # noqa: B023
        assert job.run(FakeClient(per_wait=1), max_open_requests=5, **settings_) == EXIT_OK
        assert len(job.ids()) == 60
    # fsync is grouped: the same count is shown several times, then a higher one.
    assert 5 < len({*shown}) < len(shown) / 2


# --------------------------------------------------------------------------------------
# files that cannot be written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/out.jsonl", r"job.output: the folder .*/nowhere does not exist; make it first"),
        ("folder", r"job.output: .*/folder cannot be written: Is a directory"),
        ("in.jsonl/out.jsonl", r"job.output: .*/in.jsonl/out.jsonl cannot be written: Not a dir"),
        ("in.jsonl", r"job.output: .*/in.jsonl is also an input"),
    ],
)
def test_refuses_outputs_that_cannot_be(job, name, message):
    job.write_input(3)
    (job.folder / "folder").mkdir()
    before = (job.folder / "in.jsonl").read_bytes()
    for settings_ in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=message):
            job.run(output=str(job.folder / name), **settings_)
    assert (job.folder / "in.jsonl").read_bytes() == before
    assert sorted(path.name for path in job.folder.iterdir()) == ["folder", "in.jsonl"]


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"errors": "{}/out.jsonl"}, "job.errors: the same file as job.output"),
        ({"errors": "{}/in.jsonl"}, "is also an input"),
        ({"errors": "-"}, "job.errors: expected a file"),
        ({"errors": "{}/no/e.jsonl"}, "job.errors: the folder .*/no does not exist"),
        ({"output": None}, "job.output: missing"),
        ({"output": "{}/out.jsonl.gz"}, "job.output: answers are written unpacked"),
        ({"output": "{}/notes.txt"}, "job.output: .*/notes.txt is there and was not written by"),
        ({"errors": "{}/notes.txt"}, "job.errors: .*/notes.txt is there and was not written by"),
        ({"input": "{}/*.json"}, r"job.input: no file matches .*/\*.json"),
    ],
)
def test_refuses_before_it_touches_anything(job, settings_, message):
    job.write_input(3)
    (job.folder / "notes.txt").write_text("mine\n")
    settings_ = {k: v and v.format(job.folder) for k, v in settings_.items()}
    with pytest.raises(ConfigError, match=message):
        job.run(**settings_)
    assert (job.folder / "notes.txt").read_text() == "mine\n"
    assert sorted(path.name for path in job.folder.iterdir()) == ["in.jsonl", "notes.txt"]


def test_two_runs_on_one_output_are_refused(job):
    job.write_input(10)
    refused = []

    def run_another(client):
        if not refused:
            with pytest.raises(ConfigError, match=r"another run is writing .*/out.jsonl") as error:
                Job(job.folder).run()
            refused.append(str(error.value))

    assert job.run(FakeClient(on_wait=run_another)) == EXIT_OK
    assert len(refused) == 1
    assert len(job.ids()) == 10


def test_two_outputs_cannot_share_an_errors_file(job):
    job.write_input(3)
    errors = job.folder / "errors.jsonl"
    with errors.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match=r"job.errors: another run is writing"):
            job.run(errors=str(errors))


def test_a_full_disk_is_named_and_costs_no_answer(job, capsys):
    job.write_input(40)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_at = 10_000  # the manifest fits, the answers do not

    def fill(client):
        client.on_wait = None
        resource.setrlimit(resource.RLIMIT_FSIZE, (full_at, limit[1]))

    try:
        with pytest.raises(
            EmberError, match=r"out.jsonl: cannot be written: File too large"
        ) as end:
            job.run(FakeClient(on_wait=fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert end.value.exit_code == EXIT_FAILED
    num_whole = job.output.read_bytes().count(b"\n")
    assert 0 < num_whole < 40
    assert f"answered {num_whole} of 40 requests" in capsys.readouterr().err
    assert job.run() == EXIT_OK
    assert len(job.client.submitted) == 40 - num_whole
    assert set(job.ids()) == all_ids(40)


def test_nothing_is_written_behind_half_a_line(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with BatchOutput(tmp_path / "out.jsonl", tmp_path / "errors.jsonl") as output:
        output.answers.append(b"a\n")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6, limit[1]))
            with pytest.raises(EmberError, match="File too large"):
                output.answers.append(b"0123456789\n")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with pytest.raises(EmberError, match="File too large"):
            output.answers.append(b"b\n")  # there is room again, but not here
    assert (tmp_path / "out.jsonl").read_bytes() == b"a\n0123"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_device_that_is_full_is_named(job):
    job.write_input(5)
    with pytest.raises(EmberError, match="/dev/full: cannot be written: No space left"):
        job.run(output="/dev/full")


def test_a_failed_job_gives_the_lock_back(job):
    job.write_input(5)
    with pytest.raises(TransportError):
        job.run(FakeClient(outcomes={"r1": [TransportError("gone")]}))
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(job.output.open("a"))
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
