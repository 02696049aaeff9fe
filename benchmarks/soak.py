"""Half an hour of mixed load on the CPU: does anything grow, leak, or answer differently?

    nice -n 10 python -m benchmarks.soak [--minutes 30] [--rate 5] [--output FILE]

``job=serve`` with the demo model on two stages, and a process of clients beside it: whole and
streamed answers, chats, shared prefixes, penalties, log-probabilities, stop strings; requests that
are cancelled half way; clients that vanish, that send bytes which are no message, and that ask for
what is refused. Every few seconds memory and descriptors of all processes are read from ``/proc``.

Fails unless, after the warm-up, the median memory of every process in each fifth of the time is
within 2% of the first fifth's, no process has more descriptors or threads than then, no block,
request, process or shared memory is left at the end, and every greedy answer was the same each
time. Prints a table and writes one JSON file with all conditions.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.conditions import conditions
from ember_pp.client import AsyncClient, Client
from ember_pp.errors import EmberError, InvalidRequestError
from ember_pp.jobs.json_file import write_json
from ember_pp.sockets import DealerSocket

SETTINGS = (
    "job=serve",
    "model=demo",
    "pipeline.stages=2",
    "pipeline.devices=cpu",
    "pipeline.cpu_threads=1",
    "cache.memory_gib=0.02",
    "scheduler.max_sequences=16",
)
RESULT = Path(__file__).parent / "results" / "soak.json"
MAX_GROWTH = 0.02
NUM_WINDOWS = 5
WARM_UP_SHARE = 1 / 5
SAMPLE_S = 5.0
MAX_OPEN = 12
START_S = 120.0
END_S = 60.0


# --------------------------------------------------------------------------------------
# load


class Load:
    """Clients of one coordinator, in a process of their own.

    Args:
        rate: clients' actions a second.
        seed: of their kinds and lengths.
    """

    def __init__(self, address: str, rate: float, seed: int) -> None:
        self._address = address
        self._rate = rate
        self._random = random.Random(seed)
        self._greedy: dict[str, str] = {}
        """The first answer to each greedy prompt."""
        self.counts: collections.Counter[str] = collections.Counter()

    async def run(self, until_s: float) -> None:
        """Act until ``time.monotonic()`` is ``until_s``."""
        async with AsyncClient(self._address) as client:
            acts = {
                self._whole: 3,
                self._streamed: 3,
                self._chat: 2,
                self._cancelled: 2,
                self._vanishing: 1,
                self._garbage: 1,
                self._refused: 1,
                self._short_lived: 1,
            }
            open_acts: set[asyncio.Task[None]] = set()
            while time.monotonic() < until_s:
                await asyncio.sleep(self._random.expovariate(self._rate))
                if len(open_acts) < MAX_OPEN:
                    (act,) = self._random.choices(list(acts), list(acts.values()))
                    task = asyncio.create_task(act(client))
                    open_acts.add(task)
                    task.add_done_callback(open_acts.discard)
                for task in list(open_acts):
                    if task.done():
                        task.result()
            await asyncio.gather(*open_acts)

    def _sampling(self, **more: Any) -> dict[str, Any]:
        return {"max_tokens": self._random.randrange(4, 40)} | more

    async def _whole(self, client: AsyncClient) -> None:
        subject = self._random.randrange(40)
        prompt = f"The history of the town begins in the year {1900 + subject}, when the"
        answer = await client.generate(prompt, sampling={"temperature": 0.0, "max_tokens": 24})
        first = self._greedy.setdefault(prompt, answer.text)
        self.counts["answered"] += 1
        self.counts["answered differently"] += answer.text != first

    async def _streamed(self, client: AsyncClient) -> None:
        sampling = self._sampling(
            temperature=0.9,
            top_k=self._random.choice([0, 5, 50]),
            top_p=self._random.choice([1.0, 0.9]),
            repetition_penalty=self._random.choice([1.0, 1.2]),
            frequency_penalty=self._random.choice([0.0, 0.5]),
            logprobs=self._random.choice([None, 3]),
            stop=self._random.choice([None, ["the end", "."]]),
            logit_bias=self._random.choice([None, {7: 1.5, 11: -2.0}]),
        )
        prompt = "Once upon a time " * self._random.randrange(1, 12)
        parts = [delta async for delta in client.stream(prompt, sampling=sampling)]
        self.counts["streamed"] += 1
        self.counts["tokens"] += sum(len(part.token_ids) for part in parts)

    async def _chat(self, client: AsyncClient) -> None:
        messages = [{"role": "user", "content": f"Tell me about {self._random.randrange(1000)}."}]
        await client.chat(messages, sampling=self._sampling(seed=self._random.randrange(99)))
        self.counts["chats"] += 1

    async def _cancelled(self, client: AsyncClient) -> None:
        sampling = {"max_tokens": 400, "ignore_eos": True}
        num_parts = self._random.randrange(6)
        request = await client.submit("The sea", stream=True, sampling=sampling)
        async for _ in request:
            num_parts -= 1
            if num_parts < 0:
                await request.cancel()
        self.counts["cancelled"] += 1

    async def _vanishing(self, client: AsyncClient) -> None:
        socket = DealerSocket(self._address)
        for _ in range(3):
            fields = client._session.submit("Far away", stream=True, sampling={"max_tokens": 300})
            socket.send(fields)
        await asyncio.sleep(self._random.random() * 0.5)
        socket.receive(0.0)
        socket.close(linger_ms=0)
        self.counts["vanished"] += 1

    async def _garbage(self, client: AsyncClient) -> None:
        socket = DealerSocket(self._address)
        for _ in range(self._random.randrange(1, 20)):
            socket._socket.send(self._random.randbytes(self._random.randrange(2000)))
        await asyncio.sleep(0.2)
        with contextlib.suppress(EmberError):
            while socket.receive(0.0) is not None:
                pass
        socket.close(linger_ms=0)
        self.counts["garbage"] += 1

    async def _refused(self, client: AsyncClient) -> None:
        try:
            await client.generate("x", sampling={"stop": ["x"] * 100})
        except InvalidRequestError:
            self.counts["refused"] += 1

    async def _short_lived(self, client: AsyncClient) -> None:
        async with AsyncClient(self._address) as own:
            await own.generate("A day", sampling=self._sampling())
        self.counts["short-lived"] += 1


def run_load(address: str, rate: float, seconds: float) -> None:
    """The child: load for so long, then what was done as JSON on stdout."""
    load = Load(address, rate, seed=6)
    asyncio.run(load.run(time.monotonic() + seconds))
    print(json.dumps(load.counts))


# --------------------------------------------------------------------------------------
# watching


def facts_of(pid: int) -> dict[str, int]:
    """Memory of a process that is its own alone, in bytes; its descriptors and threads."""
    private = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            private += int(line.split()[1]) * 1024
    return {
        "private_bytes": private,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
    }


def windows_of(samples: list[dict[str, int]], key: str) -> list[list[int]]:
    """The values of each part of the time after the warm-up."""
    values = [sample[key] for sample in samples]
    values = values[int(len(values) * WARM_UP_SHARE) :]
    size = len(values) // NUM_WINDOWS
    return [values[i * size : (i + 1) * size] for i in range(NUM_WINDOWS)]


class Watch:
    """Samples of all processes, and what they say in the end."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.pids = pids
        self.samples: dict[str, list[dict[str, int]]] = {name: [] for name in pids}

    def sample(self) -> None:
        """Look at every process once."""
        for name, pid in self.pids.items():
            self.samples[name].append(facts_of(pid))

    def result(self) -> dict[str, Any]:
        """By process: what each window saw, and how far memory was from the first one's.

        Of descriptors and threads the fewest count: the others are those of clients that come and
        go.
        """
        found: dict[str, Any] = {}
        for name, samples in self.samples.items():
            memory = [median(values) for values in windows_of(samples, "private_bytes")]
            found[name] = {
                "private_mib": [round(value / 2**20, 2) for value in memory],
                "largest_change": round(max(abs(v / memory[0] - 1) for v in memory), 4),
                "descriptors": [min(values) for values in windows_of(samples, "descriptors")],
                "threads": [min(values) for values in windows_of(samples, "threads")],
                "num_samples": len(samples),
            }
        return found


def faults_in(processes: dict[str, Any], end: dict[str, Any], counts: dict[str, int]) -> list[str]:
    """What is wrong with a run, in words."""
    faults = []
    for name, facts in processes.items():
        if facts["largest_change"] > MAX_GROWTH:
            faults.append(f"{name}: memory changed by {facts['largest_change']:.1%}")
        for key in ("descriptors", "threads"):
            if facts[key][-1] > facts[key][0]:
                faults.append(f"{name}: {key} grew from {facts[key][0]} to {facts[key][-1]}")
    wanted = {
        "open_requests": 0,
        "num_running": 0,
        "num_waiting": 0,
        "blocks_in_use": 0,
        "new_descriptors": 0,
        "new_segments": 0,
        "orphans": 0,
        "exit_code": 0,
    }
    faults += [f"{key} is {end[key]}" for key, value in wanted.items() if end[key] != value]
    if counts.get("answered differently"):
        faults.append(f"{counts['answered differently']} greedy answers differ")
    return faults


# --------------------------------------------------------------------------------------
# a run


def wait_until_ready(client: Client) -> None:
    """Until the stages take work."""
    deadline_s = time.monotonic() + START_S
    while client.status()["phase"] != "ready":
        assert time.monotonic() < deadline_s, "the stages are not ready"
        time.sleep(0.2)


def shared_memory() -> set[str]:
    """Names of segments of this machine."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.is_file()}


def idle_status(client: Client) -> dict[str, Any]:
    """The status once nothing runs, or after a while."""
    deadline_s = time.monotonic() + END_S
    while True:
        status = client.status()
        is_idle = not status["open_requests"] and not status["num_in_flight"]
        if is_idle or time.monotonic() > deadline_s:
            return status
        time.sleep(0.2)


def run(minutes: float, rate: float) -> dict[str, Any]:
    """Serve, load, watch, end; the result with its faults."""
    segments = shared_memory()
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/soak.sock"
        command = [sys.executable, "-m", "ember_pp", *SETTINGS, f"coordinator.address={address}"]
        server = subprocess.Popen(command)
        try:
            with Client(address, timeout_s=60.0) as client:
                wait_until_ready(client)
                return _measure(server, client, address, minutes, rate, segments)
        finally:
            server.kill()


def _measure(
    server: subprocess.Popen[bytes],
    client: Client,
    address: str,
    minutes: float,
    rate: float,
    segments: set[str],
) -> dict[str, Any]:
    pids = {"coordinator": server.pid}
    pids |= {f"stage {s['stage_index']}": s["pid"] for s in client.status()["stages"]}
    child = [sys.executable, "-m", "benchmarks.soak", "--child", address]
    child += ["--minutes", str(minutes), "--rate", str(rate)]
    descriptors = {name: facts_of(pid)["descriptors"] for name, pid in pids.items()}
    load = subprocess.Popen(child, stdout=subprocess.PIPE)
    watch = Watch(pids | {"clients": load.pid})
    watched_until_s = time.monotonic() + minutes * 60 - SAMPLE_S
    try:
        while load.poll() is None and time.monotonic() < watched_until_s:
            watch.sample()
            if len(watch.samples["clients"]) % 12 == 1:
                _show(watch, client.status())
            time.sleep(SAMPLE_S)
        output, _ = load.communicate(timeout=END_S + 60)
    finally:
        load.kill()
    counts = json.loads(output)
    status = idle_status(client)
    time.sleep(2.0)  # closed connections are noticed
    end = {key: status[key] for key in ("open_requests", "num_running", "num_waiting")}
    end["blocks_in_use"] = status["num_blocks"] - status["num_free_blocks"]
    end["new_descriptors"] = sum(
        max(0, facts_of(pid)["descriptors"] - descriptors[name]) for name, pid in pids.items()
    )
    server.send_signal(signal.SIGTERM)
    end["exit_code"] = server.wait(END_S)
    end["orphans"] = sum(Path(f"/proc/{pid}").exists() for pid in pids.values())
    end["new_segments"] = len(shared_memory() - segments)
    processes = watch.result()
    kept = ("num_plans", "num_output_tokens", "finished_requests", "num_preemptions")
    kept += ("num_refused_messages", "num_dropped_clients", "num_blocks")
    return {
        "minutes": minutes,
        "rate_per_s": rate,
        "settings": SETTINGS,
        "warm_up_share": WARM_UP_SHARE,
        "max_growth": MAX_GROWTH,
        "clients": counts,
        "status": {key: status[key] for key in kept},
        "processes": processes,
        "end": end,
        "faults": faults_in(processes, end, counts),
    }


def _show(watch: Watch, status: dict[str, Any]) -> None:
    memory = {
        name: f"{samples[-1]['private_bytes'] / 2**20:.1f}"
        for name, samples in watch.samples.items()
    }
    print(f"{status['finished_requests']} requests, MiB {memory}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_load(options.child, options.rate, options.minutes * 60)
        return 0
    result = {"conditions": conditions(), **run(options.minutes, options.rate)}
    write_json("--output", options.output, result)
    for name, facts in result["processes"].items():
        print(f"{name:12} {facts['private_mib']} MiB, {facts['largest_change']:.2%}")
    print("\n".join(result["faults"]) or "nothing grew, nothing is left")
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
