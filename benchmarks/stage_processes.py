"""Real processes around one card or several, for tests and benchmarks of what is between stages.

``Pair`` runs a function in two processes that talk through a pipe. ``Pipeline`` runs a
``StageWorker`` in each of its processes and plays the coordinator for recorded plans.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from queue import SimpleQueue
from typing import Any

from ember_pp import config as configuration
from ember_pp import partition, protocol
from ember_pp.coordinator.edge_choice import EdgeChoice
from ember_pp.model_config import ModelConfig

TIMEOUT_S = 45.0
_SPAWN = multiprocessing.get_context("spawn")


@contextlib.contextmanager
def mps() -> Iterator[bool]:
    """A daemon of one's own for the processes started meanwhile; whether there is one.

    Without it the processes of one card take turns, which is right as well, and slow.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY", "CUDA_VISIBLE_DEVICES")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(names[:2], folder))
        try:
            subprocess.run(["nvidia-cuda-mps-control", "-d"], check=True, timeout=20)
            is_on = True
        except (OSError, subprocess.SubprocessError):
            is_on = False
        if is_on and before["CUDA_VISIBLE_DEVICES"]:
            # The daemon has taken these: its clients count among the devices that it sees.
            count = len(before["CUDA_VISIBLE_DEVICES"].split(","))
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(index) for index in range(count))
        try:
            yield is_on
        finally:
            if is_on:
                command = ["nvidia-cuda-mps-control"]
                subprocess.run(command, input=b"quit\n", check=False, timeout=30)
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class _Process:
    """A child that answers through a pipe, and whose exceptions are raised here."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self.pipe, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(
            target=_run_child, args=(theirs, target, arguments), daemon=True
        )
        self._process.start()
        theirs.close()

    def receive(self) -> Any:
        if not self.pipe.poll(TIMEOUT_S):
            raise TimeoutError(f"process {self._process.pid} says nothing")
        return self.opened(self.pipe.recv())

    def opened(self, answer: Any) -> Any:
        """What it said, unless it was its last words."""
        if isinstance(answer, _Failure):
            raise AssertionError(answer.text)
        return answer

    def stop(self) -> None:
        self._process.kill()
        self._process.join(5.0)
        self.pipe.close()


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _run_child(pipe: Connection, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        target(pipe, *arguments)
    except BaseException:  # noqa: BLE001  raised again by the parent
        pipe.send(_Failure(traceback.format_exc()))
    pipe.poll(TIMEOUT_S)  # it is killed: nothing that ends by itself can hang


# ------------------------------------------------------------------------------------
# two ends of an edge


class Other:
    """The other process of a pair."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def swap(self, value: Any = None) -> Any:
        """Give ``value``, get what the other gives; neither goes on before both have come."""
        self._pipe.send(("swap", value))
        if not self._pipe.poll(TIMEOUT_S):
            raise TimeoutError("the other process does not come")
        return self._pipe.recv()

    def answer(self, value: Any) -> None:
        """To the parent, as the last word."""
        self._pipe.send(("answer", value))


def run_pair(
    target: Callable[..., Any], *arguments: Any, devices: Sequence[int] = (0, 0)
) -> list[Any]:
    """What ``target(role, other, device, *arguments)`` returns in each of two processes."""
    processes = [
        _Process(_run_role, target, role, device, arguments) for role, device in enumerate(devices)
    ]
    answers: dict[int, Any] = {}
    given: dict[int, Any] = {}
    try:
        while len(answers) < 2:
            for role, process in enumerate(processes):
                if role in answers or role in given or not process.pipe.poll(0.001):
                    continue
                kind, value = process.receive()
                (answers if kind == "answer" else given)[role] = value
            if len(given) == 2:
                for role, process in enumerate(processes):
                    process.pipe.send(given[1 - role])
                given.clear()
        return [answers[0], answers[1]]
    finally:
        for process in processes:
            process.stop()


def _run_role(
    pipe: Connection, target: Callable[..., Any], role: int, device: int, arguments: Any
) -> None:
    import torch

    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())
    other = Other(pipe)
    other.answer(target(role, other, torch.device("cuda", device), *arguments))


# ------------------------------------------------------------------------------------
# stages


def _run_stage(pipe: Connection, stage_index: int, hook: Callable[[Any], None] | None) -> None:
    """A worker that takes messages from the pipe; ``stats`` is answered beside it."""
    from ember_pp.stage.worker import StageWorker

    lock = threading.Lock()

    def post(message: protocol.Message) -> None:
        with lock:
            pipe.send_bytes(protocol.encode(message))

    worker = StageWorker(stage_index, post)
    inbox: SimpleQueue[protocol.Message | None] = SimpleQueue()
    if hook is not None:
        hook(worker)

    def listen() -> None:
        while True:
            packed = pipe.recv_bytes()
            if packed == b"stats":
                stats = worker.stats()
                if stats is not None:
                    post(stats)
            elif packed.startswith(b"call "):  # what a hook has left there for this
                with lock:
                    pipe.send_bytes(pickle.dumps(worker.calls[packed[5:].decode()]()))
            else:
                inbox.put(protocol.decode(packed))

    threading.Thread(target=listen, daemon=True).start()
    worker.run(inbox)


class Pipeline:
    """Stage processes, ready for plans.

    Args:
        model: the group ``model`` of the configuration.
        model_config: its architecture.
        devices: one for each stage.
        limits: ``max_slots``, ``max_model_len``, ``max_in_flight`` of ``StageConfig``.
        num_blocks: KV blocks.
        hooks: for some stages, a function at module level that changes the worker.
        settings: other groups and keys of the configuration.
    """

    def __init__(
        self,
        model: dict[str, Any],
        model_config: ModelConfig,
        devices: Sequence[str],
        limits: dict[str, int],
        num_blocks: int,
        *,
        hooks: dict[int, Callable[[Any], None]] | None = None,
        **settings: Any,
    ) -> None:
        self._max_in_flight = limits["max_in_flight"]
        self.num_stages = num_stages = len(devices)
        pipeline = {"stages": num_stages, "devices": list(devices)}
        plain = {"job": {"name": "serve"}, "model": model, "pipeline": pipeline} | settings
        config = configuration.to_plain(configuration.build(plain))
        ranges = partition.split_layers(model_config, num_stages, "equal")
        self._heard: list[deque[protocol.Message]] = [deque() for _ in devices]
        self._stages = [
            _Process(_run_stage, index, (hooks or {}).get(index)) for index in range(num_stages)
        ]
        for index, (start_layer, end_layer) in enumerate(ranges):
            message = protocol.StageConfig(
                epoch=0,
                stage_index=index,
                num_stages=num_stages,
                start_layer=start_layer,
                end_layer=end_layer,
                device=devices[index],
                num_threads=1,
                config=config,
                model_config=model_config.to_plain(),
                eos_token_ids=protocol.pack_i32([]),
                **limits,
            )
            self.send(index, message)
        try:
            self._start(num_blocks)
        except BaseException:
            self.stop()
            raise

    def _start(self, num_blocks: int) -> None:
        count = len(self._stages)
        handles = [self.hear(index, protocol.StageReady).handle for index in range(count)]
        for index in range(count):
            neighbours = handles[(index + 1) % count], handles[index - 1]
            self.send(index, protocol.Start(0, num_blocks, *neighbours))
        choice, probes = EdgeChoice(count), []
        for index in range(count):
            probes += choice.add(index, self.hear(index, protocol.StageStarted).paths)
        while probes:
            probe = probes.pop(0)
            for index in (probe.receiver_index, probe.sender_index):
                self.send(index, protocol.Probe(0, probe.edge, probe.path, 5))
            for index in (probe.receiver_index, probe.sender_index):
                probes += choice.report(self.hear(index, protocol.ProbeReport))
        self.edges, self.edge_reasons = choice.chosen, choice.reasons

    def send(self, index: int, message: protocol.Message) -> None:
        self._stages[index].pipe.send_bytes(protocol.encode(message))

    def hear(self, index: int, kind: type[Any], timeout_s: float = TIMEOUT_S) -> Any:
        """The next message of ``kind`` from a stage; other messages of it are passed over.

        Raises:
            AssertionError: a stage failed, whichever it is.
            TimeoutError: it did not come; says what every stage is at.
        """
        deadline_s = time.monotonic() + timeout_s
        while True:
            while self._heard[index]:
                message = self._heard[index].popleft()
                if isinstance(message, kind):
                    return message
            if not self._listen(max(0.0, deadline_s - time.monotonic())):
                raise TimeoutError(f"stage {index} sends no {kind.__name__}: {self._describe()}")

    def _listen(self, timeout_s: float) -> bool:
        """Take in what any stage says; whether it was anything."""
        pipes = [process.pipe for process in self._stages]
        ready = wait(pipes, timeout_s)
        for index, pipe in enumerate(pipes):
            if pipe not in ready:
                continue
            message = protocol.decode(pipe.recv_bytes())
            if isinstance(message, protocol.StageFailed):
                raise AssertionError(f"stage {index}: {message.text}\n{message.traceback}")
            self._heard[index].append(message)
        return bool(ready)

    def _describe(self) -> list[str]:
        said = []
        for index, process in enumerate(self._stages):
            process.pipe.send_bytes(b"stats")
            if not process.pipe.poll(2.0):
                said.append(f"stage {index} does not answer")
                continue
            stats = protocol.decode(process.pipe.recv_bytes())
            said.append(f"stage {index}: {stats}")
        return said

    def run(
        self, plans: Sequence[protocol.Execute], max_in_flight: int | None = None
    ) -> list[protocol.Sampled]:
        """What the last stage draws, with as many plans in flight as may be."""
        max_in_flight = max_in_flight or self._max_in_flight
        answers: list[protocol.Sampled] = []
        in_flight: deque[int] = deque()
        for execute in plans:
            while len(in_flight) >= max_in_flight:
                answers.append(self.hear(len(self._stages) - 1, protocol.Sampled))
                in_flight.popleft()
            in_flight.append(execute.plan)
            packed = protocol.encode(execute)
            for process in self._stages:
                process.pipe.send_bytes(packed)
        answers += [self.hear(len(self._stages) - 1, protocol.Sampled) for _ in in_flight]
        return answers

    def stats(self, index: int) -> protocol.StageStats:
        """Of one stage, now."""
        self._stages[index].pipe.send_bytes(b"stats")
        return self.hear(index, protocol.StageStats)

    def call(self, index: int, name: str) -> Any:
        """What ``worker.calls[name]()`` returns, which a hook has put there; between plans."""
        self._stages[index].pipe.send_bytes(f"call {name}".encode())
        return pickle.loads(self._stages[index].pipe.recv_bytes())

    def stop(self) -> None:
        """End all processes."""
        for process in self._stages:
            process.stop()


class DecodePlans:
    """Plans of micro-batches that decode, as a coordinator would make them.

    Each micro-batch begins with the prompts of all its rows; from then on a plan draws one token
    for each row of one micro-batch, in turn, from the tokens of its plan before.

    Args:
        rows: of a micro-batch.
        num_microbatches: plans that do not need each other.
        prompt: tokens of each row's prompt.
        max_tokens: of a sequence: blocks for so many are given at the start.
        first_plan: the number of the first plan.
        first_slot: slots from here on are taken; blocks and micro-batches follow from it.
        block_size: ``cache.block_size``.
    """

    def __init__(
        self,
        rows: int,
        *,
        num_microbatches: int = 1,
        prompt: int = 4,
        max_tokens: int = 200,
        first_plan: int = 0,
        first_slot: int = 0,
        block_size: int = 16,
    ) -> None:
        self.next_plan = first_plan
        self._first_slot = first_slot
        self._rows, self._prompt, self._num_microbatches = rows, prompt, num_microbatches
        self._blocks_per_slot = -(-max_tokens // block_size)
        self._turn = 0
        self._newest: dict[int, int] = {}
        """The last plan of each micro-batch."""

    @property
    def next_slot(self) -> int:
        """The first that is not taken."""
        return self._first_slot + self._rows * self._num_microbatches

    def take(self, count: int) -> list[protocol.Execute]:
        """The next plans."""
        return [self._next() for _ in range(count)]

    def _next(self) -> protocol.Execute:
        turn = self._turn % self._num_microbatches
        has_begun, microbatch = turn in self._newest, self._first_slot + turn
        slots = range(
            self._first_slot + self._rows * turn, self._first_slot + self._rows * (turn + 1)
        )
        fields: dict[str, Any] = dict.fromkeys(("leave", "blocks", "join", "chunks"), b"")
        fields |= {"open": [], "chunk_ids": b"", "feedback": self._newest.get(turn, -1)}
        if not has_begun:
            fields |= self._prompts(slots)
        elif self._turn < 2 * self._num_microbatches:
            fields["join"] = protocol.pack_u32(list(slots))
        plan = protocol.Execute(
            epoch=0,
            plan=self.next_plan,
            microbatch=microbatch,
            after_idle=self._turn == 0,
            tap=None,
            **fields,
        )
        self._newest[turn] = self.next_plan
        self.next_plan += 1
        self._turn += 1
        return plan

    def _prompts(self, slots: range) -> dict[str, Any]:
        per_slot, prompt = self._blocks_per_slot, self._prompt
        blocks = [n for s in slots for i in range(per_slot) for n in (s, s * per_slot + i)]
        ids = [(31 * slot + 7 * i) % 900 + 3 for slot in slots for i in range(prompt)]
        greedy = {"temperature": 0.0}
        return {
            "open": [protocol.OpenSlot(s, s, greedy, prompt, 0, b"", b"") for s in slots],
            "blocks": protocol.pack_u32(blocks),
            "chunks": protocol.pack_u32([n for s in slots for n in (s, 0, prompt, 1)]),
            "chunk_ids": protocol.pack_i32(ids),
            "feedback": -1,
        }


def settle(condition: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    """Wait until ``condition`` holds."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it never came true"
        time.sleep(0.01)
