"""What stages of one card lose to one another: ``python -m benchmarks.handoff``.

Real stage processes on the first GPU, with random weights, under a daemon of MPS if there is one;
plans come straight from here, without coordinator or sockets, but for the last part.

    hop          a chain of decodes, each of which needs the token of the one before: time a token
                 of S stages less that of one, divided by its S hops (feedback is one of them).
                 On the device: from the end of sampling to the inputs of the next step, and from
                 the end of one stage's layers to their being there for the next
    throughput   micro-batches of equal size: S processes over one, the same plans. On one card
                 S stages cannot be faster
    delay        one thread block of every stage is busy for so long before its layers: plans per
                 second with 2 S plans in flight, over those with one
    copy         messages of 8 KB to 64 MB to and fro between two processes, by kernel stores and by
                 the copy engine: microseconds a hop, with the copy out of the slot
    coordinator  tokens/s of one stream through ``job=bench`` while a busy process shares the one
                 core that the coordinator may use, over those without

``--parts`` chooses some; parts that were stored before stay in the result until they run again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.conditions import conditions, gpu_conditions
from benchmarks.stage_processes import DecodePlans, Other, Pipeline, mps, run_pair
from ember_pp.model_config import ModelConfig

RESULT = Path(__file__).with_name("results") / "handoff.json"
DEVICE = "cuda:0"
MAX_IN_FLIGHT = 8
CHAIN, CHAIN_WARM_UP = 150, 30
ROUNDS, WARM_UP_ROUNDS = 20, 5
"""Plans of each micro-batch."""
ROWS, MICROBATCHES = 32, 4
DELAYS_MS = (1, 2, 5)
TOKENS_OF_8_KB = (1, 16, 64, 256, 1024, 4096, 8192)
BENCH_TIMEOUT_S = 90


def start(model: str, num_stages: int, hook: Callable[[Any], None]) -> Pipeline:
    """Stages of a preset, with room for every part of this benchmark."""
    preset = Path(__file__).parent.parent / "conf" / "model" / f"{model}.yaml"
    architecture = yaml.safe_load(preset.read_text())["architecture"]
    return Pipeline(
        {"architecture": architecture, "load": "random", "dtype": "bfloat16"},
        ModelConfig.from_hf(architecture),
        [DEVICE] * num_stages,
        {"max_slots": 256, "max_model_len": 256, "max_in_flight": MAX_IN_FLIGHT},
        num_blocks=256 * 13,
        hooks=dict.fromkeys(range(num_stages), hook),
        cache={"memory_gib": 1.0},
        scheduler={"max_tokens_per_plan": 1024, "max_sequences": 256},
    )


# ------------------------------------------------------------------------------------
# in the stages


def keep_times(worker: Any) -> None:
    """The card's times of all plans can be asked for."""
    from ember_pp.stage.captured_runner import CapturedRunner

    take_times, kept = CapturedRunner.take_times, []

    def take_and_keep(self: CapturedRunner) -> Any:
        counted = take_times(self)
        kept.extend((plan, tuple(times)) for plan, _, times in counted)
        return counted

    CapturedRunner.take_times = take_and_keep  # type: ignore[method-assign]
    worker.calls = {"times": lambda: kept}


def delay_layers(worker: Any) -> None:
    """How long a thread block is busy before the layers of each plan can be set."""
    from ember_pp.stage.captured import CapturedSteps

    cycles, per_ms = [0], functools.cache(cycles_per_ms)

    def after_delay(method: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(self: CapturedSteps, *arguments: Any) -> Any:
            if cycles[0]:
                torch.cuda._sleep(cycles[0])  # type: ignore[no-untyped-call]
            return method(self, *arguments)

        return delayed

    for name in ("hidden_states", "draw"):
        setattr(CapturedSteps, name, after_delay(getattr(CapturedSteps, name)))

    def set_delay(delay_ms: float) -> float:
        torch.cuda.set_device(0)
        cycles[0] = int(delay_ms * per_ms())
        return per_ms()

    worker.calls = {f"{ms}": functools.partial(set_delay, ms) for ms in (0, *DELAYS_MS)}


def cycles_per_ms() -> float:
    """Of the clock that ``torch.cuda._sleep`` counts."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
    torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
    events[0].record()  # type: ignore[no-untyped-call]
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]
    events[1].record()  # type: ignore[no-untyped-call]
    events[1].synchronize()  # type: ignore[no-untyped-call]
    return 20_000_000 / float(events[0].elapsed_time(events[1]))  # type: ignore[no-untyped-call]


# ------------------------------------------------------------------------------------
# parts


def measure_stages(model: str, counts: tuple[int, ...]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Chains and throughput of each number of stages."""
    for num_stages in counts:
        stages = start(model, num_stages, keep_times)
        try:
            found: dict[str, Any] = {"edges": stages.edges}
            plans = DecodePlans(1)
            for rows in (1, ROWS):
                found[f"chain_{rows}"] = time_chain(stages, plans)
                plans = DecodePlans(
                    ROWS, first_plan=plans.next_plan, first_slot=plans.next_slot, prompt=16
                )
            plans = DecodePlans(
                ROWS,
                num_microbatches=MICROBATCHES,
                first_plan=plans.next_plan,
                first_slot=plans.next_slot - ROWS,
                prompt=16,
            )
            found["plans_per_s"] = time_plans(stages, plans, ROUNDS * MICROBATCHES)
            yield num_stages, found
        finally:
            stages.stop()


def time_chain(stages: Pipeline, plans: DecodePlans) -> dict[str, Any]:
    """Milliseconds a plan, and what the card says of hops."""
    stages.run(plans.take(CHAIN_WARM_UP))
    first = plans.next_plan
    began_s = time.perf_counter()
    stages.run(plans.take(CHAIN))
    took_ms = (time.perf_counter() - began_s) * 1e3
    found: dict[str, Any] = {"ms": took_ms / CHAIN}
    if stages.num_stages == 1:
        return found
    time.sleep(0.1)  # the last plan is counted
    times = [dict(stages.call(index, "times")) for index in range(stages.num_stages)]
    return found | device_hops(times, range(first + 1, first + CHAIN - 1))


def device_hops(times: list[dict[int, tuple[int, ...]]], plans: range) -> dict[str, Any]:
    """Medians over plans, in microseconds by the card's clock."""
    # Words of PlanTimes.
    feedback_there, input_wait, input_there, output_wait = 1, 3, 4, 5
    first, last = times[0], times[-1]
    hops = [
        after[plan][input_there] - before[plan][output_wait]
        for before, after in itertools.pairwise(times)
        for plan in plans
    ]
    sampled_to_there = [first[p][feedback_there] - last[p - 1][output_wait] for p in plans]
    sampled_to_inputs = [first[p][input_wait] - last[p - 1][output_wait] for p in plans]
    return {
        "layers_to_next_stage_us": statistics.median(hops) / 1e3,
        "sampled_to_first_stage_us": statistics.median(sampled_to_there) / 1e3,
        "sampled_to_next_inputs_us": statistics.median(sampled_to_inputs) / 1e3,
    }


def time_plans(
    stages: Pipeline, plans: DecodePlans, count: int, max_in_flight: int = MAX_IN_FLIGHT
) -> float:
    """Plans per second."""
    stages.run(plans.take(max(count // 4, 2 * MAX_IN_FLIGHT)), max_in_flight)
    began_s = time.perf_counter()
    stages.run(plans.take(count), max_in_flight)
    return count / (time.perf_counter() - began_s)


def part_stages(model: str) -> dict[str, Any]:
    """``hop`` and ``throughput`` of one model."""
    found = dict(measure_stages(model, (1, 2, 4)))
    result: dict[str, Any] = {"stages": found}
    for num_stages, of_stages in found.items():
        if num_stages == 1:
            continue
        for rows in (1, ROWS):
            added_ms = of_stages[f"chain_{rows}"]["ms"] - found[1][f"chain_{rows}"]["ms"]
            result[f"hop_us_{num_stages}_stages_{rows}_rows"] = 1e3 * added_ms / num_stages
        ratio = of_stages["plans_per_s"] / found[1]["plans_per_s"]
        result[f"throughput_ratio_{num_stages}_stages"] = ratio
    return result


def part_delay() -> dict[str, Any]:
    """``delay``, of the demo's shape, whose own layers are short."""
    result: dict[str, Any] = {}
    for num_stages in (2, 4):
        stages, plans = start("qwen3-0.6b", num_stages, delay_layers), None
        try:
            for delay_ms in DELAYS_MS:
                plans = DecodePlans(
                    1,
                    num_microbatches=2 * num_stages,
                    max_tokens=120,
                    first_plan=0 if plans is None else plans.next_plan,
                    first_slot=0 if plans is None else plans.next_slot,
                )
                stages.run(plans.take(8 * num_stages))
                for index in range(num_stages):
                    stages.call(index, f"{delay_ms}")
                alone = time_plans(stages, plans, 40, max_in_flight=1)
                together = time_plans(stages, plans, 40 * num_stages, 2 * num_stages)
                for index in range(num_stages):
                    stages.call(index, "0")
                result[f"{num_stages}_stages_{delay_ms}_ms"] = {
                    "plans_per_s_one_in_flight": alone,
                    "plans_per_s": together,
                    "ratio_over_stages": together / alone / num_stages,
                }
        finally:
            stages.stop()
    return result


def part_copy() -> dict[str, Any]:
    """``copy``."""
    return {"us": run_pair(time_copies)[0]}


def time_copies(role: int, other: Other, device: torch.device) -> dict[str, dict[str, float]]:
    """Microseconds a hop by each way, for each number of tokens of 8 KB."""
    from ember_pp.stage.handoff import Edge, RingShape, cuda_ipc, make_receiver, make_sender

    most = TOKENS_OF_8_KB[-1]
    shape = RingShape(num_slots=4, max_tokens=most, hidden_size=4096, dtype=torch.bfloat16)
    sender = make_sender("cuda_ipc", Edge(role, 1 - role), shape, device)
    receiver = make_receiver("cuda_ipc", Edge(1 - role, role), shape, device)
    theirs = other.swap((sender.handle, receiver.handle))
    receiver.connect(theirs[0])
    sender.connect(theirs[1])
    message = torch.zeros(most, 4096, dtype=torch.bfloat16, device=device)
    found: dict[str, dict[str, float]] = {}
    plan = 0
    for num_tokens in TOKENS_OF_8_KB:
        count = 300 if num_tokens <= 256 else 40
        for way, threshold in (("kernel_stores", 1 << 60), ("copy_engine", 0)):
            cuda_ipc.COPY_ENGINE_BYTES = threshold
            other.swap()
            began_s = time.perf_counter()
            for number in range(plan, plan + count):
                for turn in (role, 1 - role):
                    if turn == 0:
                        sender.send(number, message[:num_tokens])
                    else:
                        receiver.receive_into(number, message[:num_tokens])
            receiver.settle(timeout_s=20.0)
            sender.settle(timeout_s=20.0)
            took_us = (time.perf_counter() - began_s) * 1e6
            found.setdefault(str(8 * num_tokens) + " KB", {})[way] = took_us / (2 * count)
            plan += count
    other.swap()
    return found


def part_coordinator() -> dict[str, Any]:
    """``coordinator``, of 0.6B in two stages."""
    free, halved, again = (bench_single(is_halved=halved) for halved in (False, True, False))
    return {
        "tokens_per_s": [free, again],
        "tokens_per_s_halved": halved,
        "ratio": halved / statistics.mean((free, again)),
    }


def bench_single(*, is_halved: bool) -> float:
    """Tokens per second of one stream."""
    command = [
        *(sys.executable, "-m", "ember_pp", "job=bench", "model=qwen3-0.6b", "model.load=random"),
        *("pipeline.stages=2", f"pipeline.devices=[{DEVICE},{DEVICE}]", "job.workload=single"),
        *("job.repeats=2", "job.output=-"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        halving = threading.Thread(target=halve_coordinator, args=(child,), daemon=True)
        if is_halved:
            halving.start()
        output, _ = child.communicate(timeout=BENCH_TIMEOUT_S)
    result = json.loads(output)
    return float(result["summary"]["steady_output_tokens_per_s"]["median"])


def halve_coordinator(child: subprocess.Popen[str]) -> None:
    """The coordinator gets one core, and a busy process the same one, until ``child`` ends."""
    core = max(os.sched_getaffinity(0))
    while child.poll() is None:
        pids = [pid for pid in descendants(child.pid) if "ember_pp.coordinator" in command_of(pid)]
        if pids:
            break
        time.sleep(0.05)
    for task in Path(f"/proc/{pids[0]}/task").iterdir():
        os.sched_setaffinity(int(task.name), {core})
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    os.sched_setaffinity(busy.pid, {core})
    child.wait()
    busy.kill()
    busy.wait()


def descendants(pid: int) -> list[int]:
    """Processes that ``pid`` started, and those that they did."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    found = [int(child) for child in children.read_text().split()] if children.exists() else []
    return found + [deeper for child in found for deeper in descendants(child)]


def command_of(pid: int) -> str:
    """Its arguments."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "stages-8b": functools.partial(part_stages, "qwen3-8b"),
    "stages-0.6b": functools.partial(part_stages, "qwen3-0.6b"),
    "delay": part_delay,
    "copy": part_copy,
    "coordinator": part_coordinator,
}


def main() -> None:
    """Print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="some of: " + ",".join(PARTS))
    parser.add_argument("--commit", default=None, help="kept where the files are no git checkout")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    stored: dict[str, Any] = {"benchmark": "handoff", "parts": {}}
    if options.output.exists():
        stored = json.loads(options.output.read_text())
    for name in options.parts.split(","):
        with mps() as is_on:
            began_s = time.monotonic()
            found = PARTS[name]()
        found |= {"took_s": round(time.monotonic() - began_s, 1), "mps": is_on}
        found["conditions"] = conditions() | gpu_conditions()
        if options.commit:
            found["conditions"]["commit"] = options.commit
        stored["parts"][name] = found
        print(name, json.dumps({k: v for k, v in found.items() if k != "conditions"}, indent=1))
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
