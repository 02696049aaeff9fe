"""A batch killed with SIGKILL at any moment, and run again, ends as if nothing had happened."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiproc

NUM_KILLS = 10
NUM_REQUESTS = 45
DEADLINE_S = 120.0
SETTINGS = (
    "model.path=demo",
    "model.dtype=float32",
    "pipeline.stages=2",
    "pipeline.devices=cpu",
    "pipeline.cpu_threads=1",
    "cache.memory_gib=0.05",
    "job.max_open_requests=6",
    "sampling.seed=3",
)


def write_input(path):
    """Text and chat, greedy and drawn, with and without seeds, short and long."""
    with path.open("w") as file:
        for n in range(NUM_REQUESTS):
            line = {"custom_id": f"r{n}", "max_tokens": 4 + 3 * (n % 7), "ignore_eos": n % 2 == 0}
            if n % 3:
                line["prompt"] = f"In the year {1900 + n}, the"
            else:
                line["messages"] = [{"role": "user", "content": f"Tell me about {n}."}]
            if n % 5:
                line |= {"temperature": 0.9, "top_k": 40}
            if n % 4 == 0:
                line["seed"] = n
            file.write(json.dumps(line) + "\n")


def start(source, output, *more):
    command = [sys.executable, "-m", "ember_pp", *SETTINGS, f"job.input={source}"]
    return subprocess.Popen(
        [*command, f"job.output={output}", *more],
        cwd=output.parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process):
    _, stderr = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stderr.decode()


def num_answers(output):
    return output.read_bytes().count(b"\n") if output.exists() else 0


def wait_for(is_true, process, what):
    """Poll until it is true or the process has ended by itself."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_true() and process.poll() is None:
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.005)


def descendants(pid):
    """Process ids of children, their children and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def answers(output):
    """What depends on the request alone, by id; every id once."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert len(found) == len(lines)
    return {key: (body["choices"], body["usage"]) for key, body in found.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The input, and the answers of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_input(folder / "in.jsonl")
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
        children = descendants(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        finish(process)
        deadline_s = time.monotonic() + 10.0
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline_s, "a process outlived the job"
            time.sleep(0.01)
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
