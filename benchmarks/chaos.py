"""Faults at random moments, and what becomes of the requests: ``python -m benchmarks.chaos``.

Each round sends dozens of requests to a pipeline and does one thing to it: kills a stage
(SIGKILL), freezes it (SIGSTOP), slows it down (stopped half of the time), or has one message
between coordinator and stage dropped, sent twice or cut in half, of any kind and in any state of
the protocol; what is only said at the start of an epoch is met by killing a stage as well. Every
answer is compared with that of a run that nothing happened to. Nothing may be lost, differ, or be
left.

    python -m benchmarks.chaos --rounds 200 --output benchmarks/results/chaos.json
    python -m benchmarks.chaos --device cuda --stages 2 --rounds 20
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.chaos_engine import Engine, engine, is_running, rings_of, serve_linked
from benchmarks.chaos_link import ACTIONS, Fault
from benchmarks.conditions import conditions, gpu_conditions
from ember_pp import config as configuration
from ember_pp.client import Client, Request
from ember_pp.errors import EmberError

REQUEST_TIMEOUT_S = 90.0
ROUNDS_PER_ENGINE = 25
PROMPTS = (
    "The capital of France is",
    "A planet is a large body that",
    "Music is",
    "In 1905, the physicist Albert Einstein published four papers. In the first of them he",
    "The history of the city begins with a small village by the river. " * 3 + "Later",
    "The history of the city begins with a small village by the river. " * 3 + "Its people",
)
WHILE_SERVING = {
    "to": ("Execute", "Tally", "Heartbeat"),
    "from": ("Sampled", "StageStats", "Tally", "Heartbeat"),
}
AT_THE_START = {
    "to": ("StageConfig", "Renew", "Start", "Probe", "Tally"),
    "from": ("StageHello", "StageReady", "StageStarted", "ProbeReport", "StageProgress", "Tally"),
}
KINDS = ("kill", "kill", "kill two", "freeze", "slow", "message", "message", "message")
"""Of rounds; some come more often."""
HARMLESS = {"Heartbeat", "Tally"}
"""Kinds that carry no work: one less or one more of them may go without a new epoch."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a round does."""

    kind: str
    """``kill``, ``kill two``, ``freeze``, ``slow`` or ``message``."""
    fault: Fault | None
    victims: tuple[int, ...]
    delay_s: float


def draw_plan(rng: random.Random, num_stages: int, kinds: Sequence[str] = KINDS) -> Plan:
    """A round by chance."""
    kind = rng.choice(kinds)
    victims = tuple(rng.sample(range(num_stages), 2 if kind == "kill two" else 1))
    fault = None
    if kind == "message":
        is_at_start = rng.random() < 0.4
        is_to_stage = rng.random() < 0.5
        names = (AT_THE_START if is_at_start else WHILE_SERVING)["to" if is_to_stage else "from"]
        # While serving there are many of most kinds: any of the first few dozen.
        skip = rng.randrange(2 if is_at_start else 40)
        name = rng.choice(names)
        fault = Fault(rng.choice(ACTIONS), name, is_to_stage, 0 if name in HARMLESS else skip)
        victims = victims if is_at_start else ()
    return Plan(kind, fault, victims, rng.uniform(0.0, 0.6))


# ---------------------------------------------------------------------------------------
# requests


def requests_of(num_requests: int) -> list[tuple[str, dict[str, Any]]]:
    """Greedy and drawn, with and without penalties, of several lengths; the same every time."""
    made = []
    for index in range(num_requests):
        sampling: dict[str, Any] = {"max_tokens": 8 + 5 * (index % 6), "ignore_eos": True}
        if index % 2:
            sampling |= {"temperature": 0.9, "top_k": 50, "seed": index}
        else:
            sampling |= {"temperature": 0.0}
        if index % 5 == 0:
            sampling |= {"repetition_penalty": 1.2, "presence_penalty": 0.3}
        made.append((PROMPTS[index % len(PROMPTS)], sampling))
    return made


def submit(client: Client, requests: list[tuple[str, dict[str, Any]]]) -> list[Request]:
    """All at once, half of them as streams."""
    return [
        client.submit(prompt, sampling=sampling, stream=index % 2 == 0)
        for index, (prompt, sampling) in enumerate(requests)
    ]


def answer_of(request: Request) -> list[int] | str:
    """Its token ids; the reason if there is none. A stream's deltas add up to the same, or else."""
    try:
        streamed = [token for delta in request for token in delta.token_ids]
        whole = list(request.result(REQUEST_TIMEOUT_S).token_ids)
    except EmberError as error:
        return f"{type(error).__name__}: {error}"
    return whole if streamed == whole else f"streamed {streamed}, at the end {whole}"


# ---------------------------------------------------------------------------------------
# a round


def run_round(
    running: Engine, plan: Plan, requests: list[tuple[str, dict[str, Any]]], expected: list[Any]
) -> dict[str, Any]:
    """Do what ``plan`` says while ``requests`` are served; what was seen."""
    num_known = len(running.journal())
    before = running.pids()
    began_s = time.monotonic()
    submitted = submit(running.client, requests)
    time.sleep(plan.delay_s)
    at_s = inflict(running, plan, before)
    answers = [answer_of(request) for request in submitted]
    served_s = time.monotonic() - began_s
    fired_at_s = running.fired_at_s(0.0)
    running.arm(None)
    if plan.fault is not None:  # with a victim, that is only what brings the message about
        at_s = fired_at_s
    running.check_alive()
    running.wait_ready()
    epochs = running.journal()[num_known:]
    begun = [entry["begins_at_s"] for entry in epochs if "begins_at_s" in entry]
    due_to_it = [] if at_s is None else [begin_s for begin_s in begun if begin_s >= at_s]
    ready = [entry["ready_at_s"] for entry in epochs if "ready_at_s" in entry]
    after = running.pids()
    lost = [answer for answer in answers if isinstance(answer, str)]
    return {
        "kind": plan.kind,
        "fault": None if plan.fault is None else dataclasses.asdict(plan.fault),
        "victims": plan.victims,
        "happened": at_s is not None,
        "noticed_s": due_to_it[0] - at_s if due_to_it and at_s is not None else None,
        "serving_again_s": ready[-1] - at_s if ready and at_s is not None else None,
        "epochs": len(begun),
        "whys": [entry["why"] for entry in epochs if "why" in entry],
        "served_s": served_s,
        "lost": len(lost),
        "lost_texts": lost[:3],
        "differing": sum(
            answer != tokens
            for answer, tokens in zip(answers, expected, strict=True)
            if not isinstance(answer, str)
        ),
        "orphans": sum(is_running(pid) for pid in set(before) - set(after)),
        "rings": [len(rings_of(pid)) for pid in after],
    }


def inflict(running: Engine, plan: Plan, pids: list[int]) -> float | None:
    """Do it; the moment at which it happened, None if a message has not come by yet."""
    if plan.fault is not None:
        running.arm(plan.fault)
    at_s = time.monotonic()
    for number, victim in enumerate(plan.victims):
        if plan.kind == "slow":
            slow_down(pids[victim], 1.0)
            continue
        if number:  # the second one while the first is on its way
            time.sleep(0.8)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGSTOP if plan.kind == "freeze" else signal.SIGKILL)
    return None if plan.fault is not None and not plan.victims else at_s


def slow_down(pid: int, for_s: float) -> None:
    """Stop it and let it go on, every 30 ms."""
    until_s = time.monotonic() + for_s
    while time.monotonic() < until_s:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(0.03)


# ---------------------------------------------------------------------------------------
# the run


def make_config(device: str, num_stages: int, dtype: str, folder: Path) -> configuration.Config:
    """The demo model, small, with short limits so that rounds are short."""
    return configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"path": "demo", "dtype": dtype, "context_length": 256},
            "pipeline": {
                "stages": num_stages,
                "devices": "cpu" if device == "cpu" else ["cuda:0"] * num_stages,
                "cpu_threads": 1,
            },
            "cache": {"memory_gib": 0.02},
            "scheduler": {"max_tokens_per_plan": 128, "max_sequences": 16},
            "coordinator": {"address": f"ipc://{folder}/clients"},
            "supervisor": {"max_restarts": 10_000, "hello_timeout_s": 10.0},
        }
    )


def undisturbed(device: str, dtype: str, requests: list[Any]) -> list[list[int]]:
    """Answers of one stage that nothing happens to, in a run of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        running = stack.enter_context(engine(make_config(device, 1, dtype, folder), folder))
        answers = [answer_of(request) for request in submit(running.client, requests)]
        running.close()
    return checked(answers)


def checked(answers: list[list[int] | str]) -> list[list[int]]:
    """The answers, none of which may be missing."""
    assert not any(isinstance(answer, str) for answer in answers), answers
    return [list(answer) for answer in answers]


def run_rounds(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, on engines with 2 to 4 stages by turns."""
    rng = random.Random(options.seed)
    requests = requests_of(options.requests)
    expected: list[list[int]] = []
    if options.reference == "alone":
        expected = undisturbed(options.device, options.dtype, requests)
    rounds: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    until_s = time.monotonic() + options.seconds
    sizes = [options.stages] if options.stages else [2, 3, 4]
    while len(rounds) < options.rounds and time.monotonic() < until_s:
        num_stages = sizes[len(ends) % len(sizes)]
        with tempfile.TemporaryDirectory(prefix="chaos-") as name:
            config = make_config(options.device, num_stages, options.dtype, Path(name))
            with engine(config, Path(name)) as running:
                if not expected:
                    answers = [answer_of(request) for request in submit(running.client, requests)]
                    expected = checked(answers)
                num_rounds = min(ROUNDS_PER_ENGINE, options.rounds - len(rounds))
                for _ in range(num_rounds):
                    if time.monotonic() > until_s:
                        break
                    plan = draw_plan(rng, num_stages, options.kinds.split(","))
                    seen = run_round(running, plan, requests, expected)
                    rounds.append({"round": len(rounds), "stages": num_stages} | seen)
                    print(json.dumps(rounds[-1]), flush=True)
                ends.append({"stages": num_stages} | running.close())
                print(json.dumps(ends[-1]), flush=True)
    return {"rounds": rounds, "ends": ends, "requests_per_round": len(requests)}


def summarise(run: dict[str, Any]) -> dict[str, Any]:
    """What has to be 0, and how long things took."""
    rounds = run["rounds"]
    by_kind: dict[str, Any] = {}
    for kind in sorted({entry["kind"] for entry in rounds}):
        of_kind = [entry for entry in rounds if entry["kind"] == kind]
        by_kind[kind] = {
            "rounds": len(of_kind),
            "with a new epoch": sum(entry["epochs"] > 0 for entry in of_kind),
            "noticed_s": spread([entry["noticed_s"] for entry in of_kind]),
            "serving_again_s": spread([entry["serving_again_s"] for entry in of_kind]),
        }
    messages = [entry for entry in rounds if entry["fault"] is not None and entry["happened"]]
    unnoticed = collections.Counter(
        f"{entry['fault']['name']} {entry['fault']['action']}"
        for entry in messages
        if entry["noticed_s"] is None
    )
    usual = {stages: ring for entry in rounds for stages in [entry["stages"]]
             for ring in [min(entry["rings"])]}  # fmt: skip
    return {
        "rounds": len(rounds),
        "requests": len(rounds) * run["requests_per_round"],
        "requests lost": sum(entry["lost"] for entry in rounds),
        "answers differing": sum(entry["differing"] for entry in rounds),
        "orphans": sum(e["orphans"] for e in rounds) + sum(e["orphans"] for e in run["ends"]),
        "segments left": sum(end["segments"] for end in run["ends"])
        + sum(max(0, max(e["rings"]) - usual[e["stages"]]) for e in rounds),
        "by kind": by_kind,
        "messages": dict(sorted(collections.Counter(e["fault"]["name"] for e in messages).items())),
        "messages without consequence": dict(sorted(unnoticed.items())),
    }


def merge(paths: Sequence[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Runs that were stored, as one; and their conditions."""
    reports = [json.loads(path.read_text()) for path in paths]
    run = {
        "rounds": [entry for report in reports for entry in report["rounds"]],
        "ends": [entry for report in reports for entry in report["ends"]],
        "requests_per_round": reports[0]["requests_per_round"],
    }
    assert {report["requests_per_round"] for report in reports} == {run["requests_per_round"]}
    kept = ("gpu_memory_mib",)
    return run, [
        report["conditions"]
        | {"rounds": len(report["rounds"])}
        | {key: report[key] for key in kept if key in report}
        for report in reports
    ]


def spread(times_s: list[float | None]) -> dict[str, float] | None:
    """Median and worst, of those that there are."""
    known = sorted(time_s for time_s in times_s if time_s is not None)
    if not known:
        return None
    return {"median": round(known[len(known) // 2], 3), "max": round(known[-1], 3)}


def gpu_memory_mib() -> int | None:
    """In use on the card of ``cuda:0``, by ``nvidia-smi``."""
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", card]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def under_mps() -> contextlib.AbstractContextManager[bool]:
    """A daemon of the run's own; whether there is one."""
    from benchmarks.stage_processes import mps  # which loads torch

    return mps()


def main() -> None:
    """Run, print, store; or serve, as the child of a run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--stages", type=int, default=0, help="0: 2, 3 and 4 by turns")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--reference",
        choices=("alone", "first"),
        default="alone",
        help="answers to compare with: of one stage in a run of its own, or of the first engine "
        "before anything happens to it",
    )
    parser.add_argument("--mps", action="store_true", help="stages share the card through MPS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round after this")
    parser.add_argument("--merge", nargs="+", type=Path, default=None, help="stored runs")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        serve_linked(options.serve)
        return
    if options.merge is not None:
        run, all_conditions = merge(options.merge)
        report = {"benchmark": "chaos", "conditions": all_conditions, "summary": summarise(run)}
    else:
        memory_before = gpu_memory_mib() if options.device == "cuda" else None
        load = {"load_average_1min_before": round(os.getloadavg()[0], 2), "nice": os.nice(0)}
        with under_mps() if options.mps else contextlib.nullcontext(False) as is_mps:
            run = run_rounds(options)
        where = conditions() | load | {"mps": is_mps}
        report = {"benchmark": "chaos", "conditions": where, "summary": summarise(run)}
        if options.device == "cuda":
            where |= gpu_conditions()
            report["gpu_memory_mib"] = {"before": memory_before, "after": gpu_memory_mib()}
    print(json.dumps(report["summary"], indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report | run, indent=1) + "\n")


if __name__ == "__main__":
    main()
