"""``./launch.sh job=batch`` on a GPU: the same greedy answers whatever computes them, through one
stage and through two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240.0
RUNS = [("reference", 1), ("reference", 2), ("cuda", 1), ("cuda", 2)]
NUM_REQUESTS, NUM_TOKENS = 20, 40


def write_input(path: Path) -> None:
    """Text and chat, prompts of a few tokens and of several chunks."""
    with path.open("w") as file:
        for n in range(NUM_REQUESTS):
            line = {"custom_id": f"r{n}", "max_tokens": NUM_TOKENS, "ignore_eos": True}
            line |= {"temperature": 0, "return_token_ids": True}
            text = f"In the year {1900 + n}, the river " * (1 + 9 * (n % 3))
            if n % 4:
                line["prompt"] = text
            else:
                line["messages"] = [{"role": "user", "content": text}]
            file.write(json.dumps(line) + "\n")


def start(source: Path, output: Path, kernels: str, num_stages: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            str(ROOT / "launch.sh"),
            "model.dtype=float32",
            f"kernels={kernels}",
            f"pipeline.stages={num_stages}",
            f"pipeline.devices=[{','.join(['cuda:0'] * num_stages)}]",
            "scheduler.max_tokens_per_plan=64",
            "cache.memory_gib=0.25",
            f"job.input={source}",
            f"job.output={output}",
        ],
        cwd=output.parent,
        env=os.environ | {"EMBER_PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def tokens_by_id(output: Path) -> dict[str, list[int]]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(lines) == NUM_REQUESTS
    bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
    return {name: body["choices"][0]["token_ids"] for name, body in bodies.items()}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict]:
    """Token ids of each run; all run at once."""
    folder = tmp_path_factory.mktemp("batch")
    write_input(folder / "in.jsonl")
    outputs = {run: folder / f"{run[0]}-{run[1]}.jsonl" for run in RUNS}
    processes = {run: start(folder / "in.jsonl", outputs[run], *run) for run in RUNS}
    try:
        for run, process in processes.items():
            _, stderr = process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 0, f"{run}: {stderr}"
    finally:
        for process in processes.values():
            process.kill()
    return {run: tokens_by_id(output) for run, output in outputs.items()}


def test_answers_are_whole_and_differ(answers: dict[tuple[str, int], dict]) -> None:
    tokens = answers["reference", 1].values()
    assert {len(ids) for ids in tokens} == {NUM_TOKENS}
    assert len({str(ids) for ids in tokens}) > NUM_REQUESTS // 2


@pytest.mark.parametrize(("kernels", "num_stages"), RUNS[1:])
def test_greedy_tokens_depend_neither_on_kernels_nor_on_stages(
    kernels: str, num_stages: int, answers: dict[tuple[str, int], dict]
) -> None:
    assert answers[kernels, num_stages] == answers["reference", 1]
