"""A batch killed with SIGKILL at any moment, and run again, ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from benchmarks.batch_kill import (
    answers,
    descendants,
    finish,
    kill_everything,
    num_answers,
    start,
    wait_for,
    write_input,
)

pytestmark = pytest.mark.multiproc

NUM_KILLS = 10
NUM_REQUESTS = 45


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The input, and the answers of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_input(folder / "in.jsonl", NUM_REQUESTS)
    code, stderr = finish(start(folder / "in.jsonl", folder / "out.jsonl"))
    assert code == 0, stderr
    expected = answers(folder / "out.jsonl")
    assert len(expected) == NUM_REQUESTS
    assert len({str(choices) for choices, _ in expected.values()}) > NUM_REQUESTS // 2
    return folder / "in.jsonl", expected


def test_killed_at_random_moments_every_id_is_answered_once(undisturbed, tmp_path):
    source, expected = undisturbed
    output = tmp_path / "out.jsonl"
    moments = random.Random(20)
    for kill in range(NUM_KILLS):
        process = start(source, output)
        target = num_answers(output) + (moments.randrange(6) if kill else 0)
        wait_for(lambda target=target: num_answers(output) >= target, process, "answers")
        time.sleep(moments.random() * 0.05)
        kill_everything(process)
    before = num_answers(output)
    assert 0 < before < NUM_REQUESTS
    code, stderr = finish(start(source, output))
    assert code == 0, stderr
    assert f"going on: {before} answer" in stderr
    assert answers(output) == expected


def test_a_signal_drains_and_the_next_run_ends_the_job(undisturbed, tmp_path):
    source, expected = undisturbed
    output = tmp_path / "out.jsonl"
    process = start(source, output, "job.ordered=true")
    wait_for(lambda: num_answers(output) >= 3, process, "answers")
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    code, stderr = finish(process)
    assert code == 75, stderr
    assert "the same command goes on from" in stderr
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert 3 <= num_answers(output) < NUM_REQUESTS
    code, stderr = finish(start(source, output, "job.ordered=true"))
    assert code == 0, stderr
    assert answers(output) == expected
    assert list(answers(output)) == [f"r{n}" for n in range(NUM_REQUESTS)]


def test_a_stage_that_dies_costs_a_batch_nothing_and_too_many_leave_it_to_be_resumed(
    undisturbed, tmp_path
):
    source, expected = undisturbed
    output = tmp_path / "out.jsonl"

    def run_and_kill_a_stage(*settings):
        before = num_answers(output)
        process = start(source, output, *settings)
        wait_for(lambda: num_answers(output) > before, process, "answers")
        [stage] = [pid for pid in descendants(process.pid) if name_of(pid) == "stage-1"]
        os.kill(stage, signal.SIGKILL)
        return finish(process)

    code, stderr = run_and_kill_a_stage("supervisor.max_restarts=0")
    assert code == 1, stderr
    assert "stage 1" in stderr
    assert "was killed by signal 9" in stderr
    assert "Traceback" not in stderr
    assert 0 < num_answers(output) < NUM_REQUESTS
    code, stderr = run_and_kill_a_stage()
    assert code == 0, stderr
    assert answers(output) == expected


def name_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_signal_to_every_process_drains_too(undisturbed, tmp_path, num_before):
    """As Slurm sends it; stages and coordinator must not end before the job has what they owe."""
    source, expected = undisturbed
    output = tmp_path / "out.jsonl"
    process = start(source, output)
    if num_before:
        wait_for(lambda: num_answers(output) >= num_before, process, "answers")
    else:
        wait_for(lambda: len(descendants(process.pid)) == 3, process, "processes")
    children = descendants(process.pid)
    assert len(children) == 3
    for pid in random.Random(num_before).sample([process.pid, *children], 4):
        os.kill(pid, signal.SIGTERM)
    code, stderr = finish(process)
    assert code == 75, stderr
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    if num_before:  # and what was open has ended
        assert num_answers(output) > num_before
    code, stderr = finish(start(source, output))
    assert code == 0, stderr
    assert answers(output) == expected


def test_nobody_computes_on_for_a_job_that_is_gone(undisturbed, tmp_path):
    """Its coordinator is told by the kernel; what was open is nobody's, and is not waited for."""
    source, _ = undisturbed
    process = start(source, tmp_path / "out.jsonl", "shutdown.grace_s=1000")
    wait_for(lambda: num_answers(tmp_path / "out.jsonl") >= 3, process, "answers")
    children = descendants(process.pid)
    assert len(children) == 3
    process.kill()
    process.wait()
    deadline_s = time.monotonic() + 20.0
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline_s, "a process outlived the job"
        time.sleep(0.01)
    process.stderr.close()
