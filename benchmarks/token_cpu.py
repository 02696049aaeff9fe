"""CPU time of the whole coordinator process per output token, with a real tokenizer.

    python -m benchmarks.token_cpu --tokenizer FOLDER [--text FILE] [--output FILE]

The coordinator, its sockets, scheduler and text side are the real ones, in a process of their
own; stages take a stated time per plan and draw the ids of ``--text`` (``token_stage``). Every
request has four stop strings, which never complete. Once all sequences run, CPU time (user
and system, of all threads, ZeroMQ's included) is read from the kernel over some seconds and
divided by the tokens that came in that time. Three kinds of clients:

stream  One client that streams the answers of all sequences.
clients As many clients as sequences, each with a connection of its own and one stream.
batch   ``job=batch`` with chat messages, its coordinator started by this file. Sequences end and
        new ones begin all the time, so tokenising, templates and admission count here.
        What the job's own process takes (JSON, files, fsync) is given apart.

FOLDER has ``tokenizer.json`` (or ``tokenizer.json.xz``) and ``tokenizer_config.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.client import Client
from ember_pp.client_session import ClientSession
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.launcher import LocalProcess, child_environment
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.jobs import batch
from ember_pp.sockets import DealerSocket
from ember_pp.tokenizer import Tokenizer

KINDS = ("stream", "clients", "batch")
STOPS = ["\n\nQuestion:", "<|user|>", "### Instruction", "END OF ANSWER"]
WARM_UP_S = 3.0
STREAM_TOKENS = 100_000
BATCH_TOKENS = (128, 384)
PROMPT_WORDS = 60
ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "vocab_size": 151_936,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 151_645,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured; ``folder`` has the model's files, the text's ids and the inputs."""

    folder: Path
    kind: str
    num_sequences: int
    num_stages: int
    stage_time_us: int

    @property
    def address(self) -> str:
        """Where the coordinator listens."""
        return f"ipc://{self.folder}/{self.kind}-{self.num_stages}.sock"

    def arguments(self) -> list[str]:
        """To build it again in a child."""
        fields = (self.folder, self.kind, self.num_sequences, self.num_stages, self.stage_time_us)
        return [str(field) for field in fields]

    @classmethod
    def parse(cls, given: list[str]) -> Case:
        """What ``arguments`` made."""
        folder, kind, *numbers = given
        return cls(Path(folder), kind, *map(int, numbers))


class TokenLauncher:
    """Starts ``benchmarks.token_stage`` where ``local`` would start a stage."""

    def __init__(self, case: Case) -> None:
        self._case = case

    def start(self, stage_index: int, *, address: str, token: str) -> LocalProcess:
        """Start one stage."""
        command = [
            *(sys.executable, "-m", "benchmarks.token_stage"),
            *("--address", address, "--stage-index", str(stage_index)),
            *("--stage-time-us", str(self._case.stage_time_us)),
            *("--ids", str(self._case.folder / "text.i32")),
        ]
        environment = child_environment() | {"EMBER_STAGE_TOKEN": token}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, process_group=0
        )
        return LocalProcess(stage_index, process)


def make_config(case: Case, *, job: dict[str, Any], address: str | None) -> configuration.Config:
    """Defaults, except for what the case says."""
    return configuration.build(
        {
            "job": job,
            "model": {"path": str(case.folder), "load": "random"},
            "pipeline": {"stages": case.num_stages, "devices": "cpu", "split": "equal"},
            "scheduler": {"max_sequences": case.num_sequences, "max_tokens_per_plan": 2048},
            "coordinator": {"address": address},
        }
    )


# --------------------------------------------------------------------------------------
# the processes


def run_coordinator(case: Case) -> None:
    """Serve until SIGTERM."""
    with StopSignal() as stop:
        config = make_config(case, job={"name": "serve"}, address=case.address)
        serve(config, stop, launcher=TokenLauncher(case))


def run_stream(case: Case) -> None:
    """Stream all answers until killed."""
    sampling = {"max_tokens": STREAM_TOKENS, "stop": STOPS}
    with Client(case.address, timeout_s=60) as client:
        for index in range(case.num_sequences):
            client.submit(f"Sequence {index} says:", sampling=sampling, stream=True)
        while True:
            client.wait_any(1.0)


def run_clients(case: Case) -> None:
    """Stream each answer to a client of its own until killed."""
    sampling = {"max_tokens": STREAM_TOKENS, "stop": STOPS}
    sockets = [DealerSocket(case.address) for _ in range(case.num_sequences)]
    session: ClientSession[None] = ClientSession(case.address, 60.0)
    for index, socket in enumerate(sockets):
        socket.send(session.submit(f"Sequence {index} says:", sampling=sampling, stream=True))
    while True:
        for socket in sockets:
            while socket.receive(0.0) is not None:
                pass
        time.sleep(0.02)


def run_batch(case: Case) -> None:
    """``job=batch`` with a client of the coordinator that is there, as it has one of its own."""
    job = {
        "name": "batch",
        "input": str(case.folder / "input.jsonl"),
        "output": str(case.folder / f"answers-{case.num_stages}.jsonl"),
        "max_open_requests": case.num_sequences + case.num_sequences // 8,
        "overwrite": True,
    }

    @contextlib.contextmanager
    def connect(config: configuration.Config) -> Iterator[Client]:
        with Client(case.address, timeout_s=60) as client:
            yield client

    batch.run(make_config(case, job=job, address=None), connect=connect)


@contextlib.contextmanager
def child(role: str, case: Case) -> Iterator[subprocess.Popen[bytes]]:
    """This file in another process."""
    command = [sys.executable, "-m", "benchmarks.token_cpu", "--role", role, *case.arguments()]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()
        process.wait()


# --------------------------------------------------------------------------------------
# measuring


def cpu_ns(pid: int) -> int:
    """User and system time of a process, of all its threads (``clock_getcpuclockid(3)``)."""
    return time.clock_gettime_ns((~pid << 3) | 2)


def main_thread_ns(pid: int) -> int:
    """The same of its main thread alone."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0])


def measure_case(case: Case, measure_s: float) -> dict[str, float]:
    """Microseconds of CPU per output token in steady state."""
    with (
        child("coordinator", case) as coordinator,
        child(case.kind, case) as client,
        Client(case.address, timeout_s=60) as watch,
    ):
        _wait_until_running(watch, case.num_sequences)
        first = _reading(watch, coordinator.pid, client.pid)
        time.sleep(measure_s)
        last = _reading(watch, coordinator.pid, client.pid)
    delta = {name: last[name] - first[name] for name in first}
    num_tokens = delta["num_output_tokens"]
    return {
        "coordinator_us": delta["coordinator_ns"] / 1e3 / num_tokens,
        "main_thread_us": delta["main_thread_ns"] / 1e3 / num_tokens,
        "client_us": delta["client_ns"] / 1e3 / num_tokens,
        "coordinator_cores": delta["coordinator_ns"] / delta["wall_ns"],
        "tokens_per_s": num_tokens / delta["wall_ns"] * 1e9,
        "rows_per_plan": num_tokens / delta["num_plans"],
        "ended_requests_per_s": delta["finished_requests"] / delta["wall_ns"] * 1e9,
    }


def _wait_until_running(watch: Client, num_sequences: int) -> None:
    deadline_s = time.monotonic() + 60
    while watch.status().get("num_running", 0) < num_sequences * 0.98:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"not running after 60 s: {watch.status()}")
        time.sleep(0.2)
    time.sleep(WARM_UP_S)


def _reading(watch: Client, coordinator_pid: int, client_pid: int) -> dict[str, int]:
    status = watch.status()
    names = ("num_output_tokens", "num_plans", "finished_requests")
    return {
        "coordinator_ns": cpu_ns(coordinator_pid),
        "main_thread_ns": main_thread_ns(coordinator_pid),
        "client_ns": cpu_ns(client_pid),
        "wall_ns": time.monotonic_ns(),
        **{name: status[name] for name in names},
    }


def prepare_folder(folder: Path, tokenizer: Path, text: str, num_lines: int) -> int:
    """Model files, the ids to draw and the batch's input; the number of ids."""
    (folder / "config.json").write_text(json.dumps(ARCHITECTURE))
    packed = tokenizer / "tokenizer.json.xz"
    if packed.is_file():
        (folder / "tokenizer.json").write_bytes(lzma.decompress(packed.read_bytes()))
    else:
        shutil.copy(tokenizer / "tokenizer.json", folder)
    shutil.copy(tokenizer / "tokenizer_config.json", folder)
    token_ids = Tokenizer.load(folder).encode(text)
    (folder / "text.i32").write_bytes(protocol.pack_i32(token_ids))
    words = text.split()
    fewest, most = BATCH_TOKENS
    with (folder / "input.jsonl").open("w") as file:
        for number in range(num_lines):
            start = number * 31 % max(1, len(words) - PROMPT_WORDS)
            content = " ".join(words[start : start + PROMPT_WORDS])
            line = {
                "messages": [{"role": "user", "content": f"{number}. {content}"}],
                "max_tokens": fewest + number * 97 % (most - fewest + 1),
                "stop": STOPS,
            }
            file.write(json.dumps(line) + "\n")
    return len(token_ids)


def measure_all(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every kind with every number of stages, printed as it comes."""
    results = []
    for num_stages in map(int, options.stages.split(",")):
        for kind in options.kinds.split(","):
            # As many tokens per second with any number of stages.
            stage_time_us = round(options.step_time_ms * 1000 / num_stages)
            case = Case(folder, kind, options.sequences, num_stages, stage_time_us)
            runs = [measure_case(case, options.measure_s) for _ in range(options.repeats)]
            result: dict[str, Any] = {"kind": kind, "num_stages": num_stages}
            for name in runs[0]:
                result[name] = {
                    "median": round(statistics.median(run[name] for run in runs), 3),
                    "all": [round(run[name], 3) for run in runs],
                }
            results.append(result)
            shown = {name: result[name]["median"] for name in runs[0]}
            print(
                f"{kind:<7} {num_stages} stages: coordinator {shown['coordinator_us']:.2f} us per "
                f"token ({shown['main_thread_us']:.2f} in its main thread), client "
                f"{shown['client_us']:.2f} us; {shown['tokens_per_s']:,.0f} tokens/s, "
                f"{shown['rows_per_plan']:.0f} rows a plan, "
                f"{shown['ended_requests_per_s']:.0f} requests end per s",
                flush=True,
            )
    return results


def main() -> None:
    """Measure, print, store; or be one of the processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--text", type=Path, default=Path(__file__).parent.parent / "README.md")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--stages", default="1,4")
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--step-time-ms", type=float, default=40.0)
    parser.add_argument("--measure-s", type=float, default=6.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--role", nargs=6, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role is not None:
        roles = {"coordinator": run_coordinator, "stream": run_stream}
        roles |= {"clients": run_clients, "batch": run_batch}
        roles[options.role[0]](Case.parse(options.role[1:]))
        return
    if options.tokenizer is None:
        parser.error("--tokenizer: give the folder of a tokenizer")
    load_average = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        num_lines = options.sequences * 40
        text = options.text.read_text()
        num_ids = prepare_folder(Path(folder), options.tokenizer, text, num_lines)
        results = measure_all(options, Path(folder))
    report = {
        "benchmark": "token_cpu",
        "conditions": conditions()
        | {
            "load_average_1min_before": round(load_average, 2),
            "repeats": options.repeats,
            "measured_s": options.measure_s,
            "time": "CPU time of the process, user and system, all threads",
            "sequences": options.sequences,
            "step_time_ms": options.step_time_ms,
            "text": options.text.name,
            "text_ids": num_ids,
            "stops": STOPS,
            "batch_max_tokens": BATCH_TOKENS,
        },
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
