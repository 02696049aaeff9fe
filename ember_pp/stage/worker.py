"""The working thread of a stage: takes messages in order, loads, probes, runs plans.

``StageWorker`` belongs to one thread, which may block in a hand-off for as long as it takes;
``close``, ``end_waits`` and ``stats`` are for the control thread of ``__main__``, which never
blocks. The worker sends through ``post`` and sees no socket.

What fails between processes (``TransportError``) ends the epoch and not the stage: it keeps its
weights, ignores what is still on its way, and waits for ``Renew``.
"""

from __future__ import annotations

import gc
import logging
import resource
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypedDict

import torch

from ember_pp import config as configuration
from ember_pp import memory_model, partition
from ember_pp.checkpoint import Checkpoint, locate
from ember_pp.config import Config
from ember_pp.errors import ProtocolError, TransportError
from ember_pp.kernels import Ops, make_ops
from ember_pp.model_config import ModelConfig
from ember_pp.protocol import (
    Execute,
    Message,
    Probe,
    Renew,
    StageConfig,
    StageProgress,
    StageReady,
    StageStarted,
    StageStats,
    StageTrace,
    Start,
    unpack_i32,
)
from ember_pp.stage import capacity
from ember_pp.stage.captured import MAX_CAPTURED_ROWS, CapturedSteps, StepLimits
from ember_pp.stage.captured_runner import CapturedRunner
from ember_pp.stage.card_clock import CardClock
from ember_pp.stage.edges import Edges
from ember_pp.stage.failure import failure_of
from ember_pp.stage.handoff import RingShape
from ember_pp.stage.input_batch import SlotTable
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.model import StageModel
from ember_pp.stage.runner import StageRunner, StartedPlan
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.slots import Slots
from ember_pp.stage.timing import PlanRecorder, StageClock
from ember_pp.stage.weights import load_stage

_PROGRESS_PERIOD_S = 0.1
_POLL_S = 50e-6
"""How late the end of a plan on the device may be noticed. Short against a plan, and long against
what looking costs."""
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

logger = logging.getLogger(__name__)


class StageWorker:
    """One stage from its configuration to its last plan.

    Args:
        stage_index: of this stage.
        post: takes messages for the coordinator.
    """

    def __init__(self, stage_index: int, post: Callable[[Message], None]) -> None:
        self._stage_index = stage_index
        self._post = post
        self._slice: _Slice | None = None
        self._epoch = -1
        self._newest_epoch = -1
        """That the control thread knows of: what is of an older one is not begun any more."""
        self._is_epoch_over = False
        self._edges: Edges | None = None
        self._old_edges: list[Edges] = []
        """Of epochs that are over, which the neighbours may still have open."""
        self._runner: StageRunner | CapturedRunner | None = None
        self._started: deque[tuple[int, StartedPlan]] = deque()
        """Plans that the device may still be at, by number."""
        self._failed_plan: int | None = None
        """The one whose end turned out to be a failure; None: what fails is being started."""
        self._clock = StageClock()
        self._has_started = False
        self._card_clock: CardClock | None = None
        """Where the device times plans."""
        self._last_plan = -1
        self._finished_plan = -1
        self._is_closing = False

    def run(self, inbox: SimpleQueue[Message | None]) -> None:
        """Handle messages until None comes; an exception is posted as ``StageFailed``.

        Any but a ``TransportError`` is the last that this does.
        """
        while True:
            try:
                message = self._next_message(inbox)
                if message is None:
                    return
                if not self._is_of_the_past(message):
                    self.handle(message)
            except TransportError as error:
                self._end_epoch(error)
            except BaseException as error:  # noqa: BLE001  whatever it is, the coordinator must know
                if not self._is_closing:
                    self._post(self.failure(error))
                return

    def _is_of_the_past(self, message: Message) -> bool:
        if isinstance(message, Renew | StageConfig):
            return False
        return self._is_epoch_over or getattr(message, "epoch", self._epoch) < self._newest_epoch

    def _end_epoch(self, error: TransportError) -> None:
        """Do nothing more before ``Renew``; say why, unless that is what ended a wait."""
        self._is_epoch_over = True
        self._started.clear()
        if not self._is_closing and self._newest_epoch <= self._epoch:
            self._post(self.failure(error, is_ending=False))

    def _next_message(self, inbox: SimpleQueue[Message | None]) -> Message | None:
        """Waits for a message; meanwhile plans end."""
        while self._is_at_work:
            self._finish_plans()
            if self._is_at_work:
                try:
                    return inbox.get(timeout=_POLL_S)
                except Empty:
                    continue
        return inbox.get()

    @property
    def _is_at_work(self) -> bool:
        """Whether plans are to be posted, or to be counted, that the device may be at."""
        return bool(self._started) or (self._runner is not None and self._runner.is_timing)

    def handle(self, message: Message) -> None:
        """Do what one message asks.

        Raises:
            ProtocolError: it does not fit what came before.
            EmberError: loading, hand-off or model failed.
        """
        match message:
            case Execute():
                self._on_execute(message)
            case StageConfig():
                self._on_config(message)
            case Start():
                self._on_start(message)
            case Probe():
                self._on_probe(message)
            case Renew():
                self._on_renew(message)
            case _:
                raise ProtocolError(
                    f"stage {self._stage_index} cannot take {type(message).__name__}"
                )

    def failure(self, error: BaseException, *, is_ending: bool = True) -> Message:
        """``error`` as a message: with ``is_ending``, the stage's last."""
        logger.debug("stage %d fails", self._stage_index, exc_info=error)
        return failure_of(
            error,
            epoch=self._epoch,
            stage_index=self._stage_index,
            is_ending=is_ending,
            plan=self._last_plan + 1 if self._failed_plan is None else self._failed_plan,
            **self._memory_advice(),
        )

    def _memory_advice(self) -> dict[str, str]:
        """What to lower if it was memory that was short, by what is going on."""
        if self._slice is None:
            return {}
        if self._runner is not None:
            return {"memory_advice": self._slice.step_advice(self._last_plan + 1)}
        is_loaded = self._slice.weight_bytes > 0
        return {} if is_loaded else {"memory_advice": self._slice.loading_advice()}

    def close(self) -> None:
        """End waits for neighbours, now; the worker then fails silently. Any thread."""
        self._is_closing = True
        if self._edges is not None:
            self._edges.close()

    def end_waits(self, newest_epoch: int) -> None:
        """Another epoch has begun: end what belongs to those before it, now. Any thread."""
        self._newest_epoch = newest_epoch
        if (edges := self._edges) is not None:
            edges.close()

    @property
    def building(self) -> str:
        """``compiling`` or ``capturing`` while it does that: it may take long. Any thread."""
        loaded, runner = self._slice, self._runner
        if loaded is not None and loaded.is_compiling:
            return "compiling"
        return "capturing" if runner is not None and runner.is_capturing else ""

    def stats(self) -> StageStats | None:
        """Totals so far and what is waited for now; None before ``Start``. Any thread."""
        loaded, edges = self._slice, self._edges
        if self._runner is None or loaded is None or edges is None:
            return None
        epoch = self._epoch  # read before the plan: see ``_on_renew``
        times = self._clock.totals()
        return StageStats(
            epoch=epoch,
            stage_index=self._stage_index,
            plan=self._finished_plan,
            busy_ns=times.busy_ns,
            wait_input_ns=times.wait_input_ns,
            wait_output_ns=times.wait_output_ns,
            host_gap_ns=times.host_gap_ns,
            idle_ns=times.idle_ns,
            waiting_for=edges.waiting_for or self._device_waits_for(edges, self._runner),
            peak_bytes=_peak_bytes(loaded.device),
        )

    def _device_waits_for(self, edges: Edges, runner: StageRunner | CapturedRunner) -> str:
        wait = runner.wait
        if wait is None or self._card_clock is None:
            return ""
        since_ns = wait.since_ns + self._card_clock.offset.ns
        return edges.describe(wait.plan, since_ns, is_for_input=wait.is_for_input)

    def take_trace(self) -> StageTrace | None:
        """Times that were not posted yet, if a trace is wanted; once the worker has ended."""
        return None if self._clock.recorder is None else self._clock.recorder.take()

    # ---------------------------------------------------------------- phases

    def _on_config(self, message: StageConfig) -> None:
        if self._slice is not None or message.stage_index != self._stage_index:
            raise ProtocolError(
                f"stage {self._stage_index} got the configuration of stage {message.stage_index}"
                + (" a second time" if self._slice is not None else "")
            )
        torch.set_num_threads(message.num_threads)
        self._slice = loaded = _Slice(message)
        self._epoch = message.epoch
        if loaded.device.type == "cuda":
            torch.cuda.set_device(loaded.device)
            # Of this thread, for good: the default stream cannot be captured.
            torch.cuda.set_stream(torch.cuda.Stream(loaded.device))  # type: ignore[no-untyped-call]
        loaded.load(self._progress_reporter())
        self._make_ready(loaded)

    def _make_ready(self, loaded: _Slice) -> None:
        """Make the incoming ring of this epoch, and tell how to reach it."""
        self._edges = edges = loaded.make_edges(self._clock)
        self._post(
            StageReady(
                epoch=self._epoch,
                stage_index=self._stage_index,
                num_blocks=loaded.num_blocks_that_fit(),
                handle=edges.handle,
                weight_bytes=loaded.weight_bytes,
                block_bytes=loaded.block_bytes,
            )
        )

    def _on_renew(self, message: Renew) -> None:
        """Keep weights and nothing else: no edge, KV block, slot, plan or graph."""
        loaded = self._slice
        if loaded is None or message.epoch <= self._epoch:
            raise ProtocolError(
                f"stage {self._stage_index} is in epoch {self._epoch}; it got Renew to "
                f"{message.epoch}"
            )
        self.end_waits(message.epoch)
        self._started.clear()
        self._failed_plan = None
        if loaded.device.type == "cuda":
            torch.cuda.synchronize(loaded.device)  # nothing runs that reads what is freed now
        if self._clock.recorder is not None:
            self._post(self._clock.recorder.take())
        self._clock.break_off()
        if self._edges is not None:
            self._edges.disconnect()
            self._old_edges.append(self._edges)
        self._runner = self._edges = None
        gc.collect()  # graphs and cache go before there are new ones
        # In this order: whoever reads the new epoch reads no plan of the one before.
        self._last_plan = self._finished_plan = -1
        self._epoch = message.epoch
        self._is_epoch_over = False
        self._make_ready(loaded)

    def _progress_reporter(self) -> Callable[[int, int], None]:
        last_s = 0.0

        def report(num_done: int, num_total: int) -> None:
            nonlocal last_s
            if num_done < num_total and time.monotonic() - last_s < _PROGRESS_PERIOD_S:
                return
            last_s = time.monotonic()
            self._post(StageProgress(self._stage_index, "weights", num_done, num_total))

        return report

    def _on_start(self, message: Start) -> None:
        loaded = self._loaded("Start", message.epoch)
        if self._runner is not None:
            raise ProtocolError(f"stage {self._stage_index} got Start a second time")
        edges = self._edges
        assert edges is not None, "made with the configuration"
        for old in self._old_edges:
            old.free()  # the neighbours have new ones, so they have let go of these
        self._old_edges.clear()
        edges.open(message.next_handle, message.previous_handle)
        self._runner = loaded.make_runner(message.num_blocks)
        self._runner.warm_up()
        recorder = None
        if loaded.config.trace.is_on:
            recorder = PlanRecorder(self._stage_index, message.epoch, self._post)
        if self._has_started:
            self._clock.recorder = recorder
        else:
            self._clock.start(recorder)
        self._has_started = True
        self._post(StageStarted(message.epoch, self._stage_index, dict(edges.paths)))

    def _on_probe(self, message: Probe) -> None:
        self._loaded("Probe", message.epoch)
        edges = self._edges
        assert edges is not None, "made with the configuration"
        if self._runner is None:
            raise ProtocolError(f"stage {self._stage_index} got Probe before Start")
        report = edges.probe(message)
        self._runner.connect(edges.receiver, edges.sender)
        if self._runner.is_timed_by_device and self._card_clock is None:
            self._card_clock = CardClock(self._loaded("Probe", message.epoch).device)
            self._card_clock.sample()
        self._post(report)

    def _on_execute(self, execute: Execute) -> None:
        self._loaded("Execute", execute.epoch)
        if self._runner is None:
            raise ProtocolError(f"stage {self._stage_index} got plan {execute.plan} before Start")
        if execute.plan != self._last_plan + 1:
            raise ProtocolError(
                f"stage {self._stage_index} got plan {execute.plan} after plan {self._last_plan}"
            )
        self._finish_plans()
        if not self._runner.is_timed_by_device:
            self._clock.begin_plan(after_idle=execute.after_idle)
        self._started.append((execute.plan, self._runner.start(execute)))
        self._last_plan = execute.plan
        self._finish_plans()

    def _finish_plans(self) -> None:
        """Post what plans have drawn that the device is done with, in their order."""
        runner = self._runner
        assert runner is not None, "plans come after Start"
        while self._started:
            plan, started = self._started[0]
            try:
                if not started.is_done():
                    break
                self._check_received()
                sampled = started.finish()
            except BaseException:
                self._failed_plan = plan
                raise
            self._started.popleft()
            if sampled is not None:
                self._post(sampled)
            if not runner.is_timed_by_device:
                self._clock.end_plan(plan)
            self._finished_plan = plan
        self._count_plans(runner)

    def _check_received(self) -> None:
        if self._edges is not None:
            self._edges.check()

    def _count_plans(self, runner: StageRunner | CapturedRunner) -> None:
        """Take in what the device says of when it did what."""
        counted = runner.take_times()
        if not counted or self._card_clock is None:
            return
        self._card_clock.sample()
        offset_ns = self._card_clock.offset.ns
        for plan, after_idle, times in counted:
            self._clock.count(plan, times.later_by(offset_ns), after_idle=after_idle)

    def _loaded(self, what: str, epoch: int) -> _Slice:
        if self._slice is None:
            raise ProtocolError(f"stage {self._stage_index} got {what} before its configuration")
        if epoch != self._epoch:
            raise ProtocolError(
                f"stage {self._stage_index} is in epoch {self._epoch}; {what} is of epoch {epoch}"
            )
        return self._slice


class _RunnerEnds(TypedDict):
    """What the first stage and the last one have at their ends."""

    sampler: Sampler | None
    last_tokens: LastTokens | None


class _Slice:
    """This stage's part of the model, as its ``StageConfig`` describes it."""

    def __init__(self, message: StageConfig) -> None:
        self.message = message
        self.config: Config = configuration.build(message.config)
        self.model_config = ModelConfig.from_plain(message.model_config)
        self.device = torch.device(message.device)
        self.dtype = _DTYPES[self.config.model.dtype]
        self.is_first = message.stage_index == 0
        self.is_last = message.stage_index == message.num_stages - 1
        self.num_layers = message.end_layer - message.start_layer
        block_size = self.config.cache.block_size
        self.max_blocks_per_sequence = -(-message.max_model_len // block_size)
        self.block_bytes = block_size * partition.kv_bytes_per_token(
            self.model_config, self.num_layers, self.dtype.itemsize
        )
        self.weight_bytes = 0
        self.kv_bytes = 0
        self._model: StageModel | None = None
        self._ops: Ops | None = None

    @property
    def ring_shape(self) -> RingShape:
        return RingShape(
            num_slots=self.message.max_in_flight,
            max_tokens=self.config.scheduler.max_tokens_per_plan,
            hidden_size=self.model_config.hidden_size,
            dtype=self.dtype,
        )

    @property
    def feedback_shape(self) -> RingShape:
        """Of the edge from the last stage to the first: pairs of slot and token that a plan draws.

        See ``LastTokens`` for the number of slots.
        """
        max_tokens = self.config.scheduler.max_tokens_per_plan
        return RingShape(
            num_slots=2 * self.message.max_in_flight,
            max_tokens=min(self.message.max_slots, max_tokens),
            hidden_size=2,  # slot and token
            dtype=torch.int32,
        )

    def make_edges(self, clock: StageClock) -> Edges:
        """Both ends of a new epoch; ``clock`` counts their waits."""
        return Edges(
            self.message.stage_index,
            self.message.num_stages,
            setting=self.config.handoff,
            ring_shape=self.ring_shape,
            feedback_shape=self.feedback_shape,
            device=self.device,
            clock=clock,
        )

    def load(self, on_progress: Callable[[int, int], None]) -> None:
        """Read this slice's weights."""
        model, message = self.config.model, self.message
        checkpoint = None
        if model.load == "checkpoint":
            assert model.path is not None, "the coordinator has read this checkpoint's config"
            checkpoint = Checkpoint.open(locate(model.path, model.revision))
        ends = {"is_first": self.is_first, "is_last": self.is_last}
        layers = (message.start_layer, message.end_layer)
        weights = load_stage(
            checkpoint,
            self.model_config,
            *layers,
            **ends,
            dtype=self.dtype,
            device=self.device,
            on_progress=on_progress,
        )
        self.weight_bytes = weights.num_bytes
        self._ops = make_ops(self.config.kernels, self.device)
        self._model = StageModel(
            self.model_config,
            weights,
            *layers,
            **ends,
            max_model_len=message.max_model_len,
            ops=self._ops,
        )

    @property
    def is_compiling(self) -> bool:
        """True while a kernel is compiled. Any thread."""
        return self._ops is not None and self._ops.is_building

    def loading_advice(self) -> str:
        """What takes memory before there are plans, and what to do about it."""
        weight_bytes = partition.stage_weight_bytes(
            self.model_config,
            (self.message.start_layer, self.message.end_layer),
            is_first=self.is_first,
            is_last=self.is_last,
            bytes_per_element=self.dtype.itemsize,
        )
        return capacity.loading_advice(self.num_layers, weight_bytes, str(self.device))

    def step_advice(self, plan: int) -> str:
        """What takes memory in a plan, and what to lower."""
        return capacity.step_advice(
            self.config, plan, self.weight_bytes, self.kv_bytes, self.activation_bytes
        )

    def num_blocks_that_fit(self) -> int:
        """KV blocks that this stage can hold beside its weights."""
        memory_gib = self.config.cache.memory_gib
        if self.device.type == "cpu":
            return capacity.num_cpu_blocks(
                self.block_bytes,
                memory_gib=memory_gib,
                num_stages=self.config.pipeline.stages * self.config.pipeline.replicas,
                most_blocks=self.message.max_slots * self.max_blocks_per_sequence,
            )
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        return capacity.num_cuda_blocks(
            self.block_bytes,
            memory_gib=memory_gib,
            memory_share=self.config.cache.memory_share,
            free_bytes=free_bytes,
            total_bytes=total_bytes,
            weight_bytes=self.weight_bytes,
            reserved_bytes=self.activation_bytes + memory_model.CUDA_GRAPH_BYTES,
            num_stages_on_device=self._num_stages_on_device(),
        )

    @property
    def activation_bytes(self) -> int:
        """Set aside for a forward pass."""
        return memory_model.activation_bytes(
            self.model_config,
            self.config.scheduler.max_tokens_per_plan,
            self.message.max_slots if self.is_last else 0,
        )

    def _num_stages_on_device(self) -> int:
        pipeline = self.config.pipeline
        if isinstance(pipeline.devices, list | tuple):
            return max(1, list(pipeline.devices).count(self.message.device))
        num_processes = pipeline.stages * pipeline.replicas
        if pipeline.devices != "auto":
            return num_processes
        return -(-num_processes // torch.cuda.device_count())

    def make_runner(self, num_blocks: int) -> StageRunner | CapturedRunner:
        """The runner of this slice, with ``num_blocks`` KV blocks; not connected."""
        assert self._model is not None, "load comes first"
        assert self._ops is not None, "load comes first"
        message, cfg = self.message, self.model_config
        block_size = self.config.cache.block_size
        max_rows = min(message.max_slots, self.config.scheduler.max_tokens_per_plan)
        is_captured = (
            self.device.type == "cuda"
            and max_rows <= MAX_CAPTURED_ROWS
            and self._ops.captures_attention(
                self.dtype, cfg.head_dim, cfg.num_heads // cfg.num_kv_heads, block_size
            )
        )
        kv_cache = KVCache.allocate(
            cfg, self.num_layers, num_blocks, block_size, self.dtype, self.device
        )
        self.kv_bytes = kv_cache.num_bytes
        sampler = None
        if self.is_last:
            eos_token_ids = unpack_i32(message.eos_token_ids).tolist()
            sampler = Sampler(
                cfg.vocab_size, message.max_slots, eos_token_ids, self.device, self._ops
            )
        last_tokens = None
        if self.is_first:
            last_tokens = LastTokens(
                message.max_slots, self.device, max_in_flight=message.max_in_flight
            )
        ends = _RunnerEnds(sampler=sampler, last_tokens=last_tokens)
        sizes = message.max_slots, self.max_blocks_per_sequence, block_size
        bounds = {"num_blocks": num_blocks, "vocab_size": cfg.vocab_size}
        if not is_captured:
            table = SlotTable(*sizes, **bounds, device=self.device)
            return StageRunner(message.stage_index, self._model, kv_cache, table, **ends)
        steps = CapturedSteps(
            self._model,
            kv_cache,
            self._ops,
            StepLimits(
                max_slots=message.max_slots,
                max_tokens=self.config.scheduler.max_tokens_per_plan,
                max_blocks_per_sequence=self.max_blocks_per_sequence,
                max_pending=message.max_in_flight + 1,
            ),
            sampler=sampler,
            last_tokens=None if last_tokens is None else last_tokens.tokens,
            uses_graphs=self.config.cuda_graphs,
        )
        return CapturedRunner(message.stage_index, steps, Slots(*sizes, **bounds), **ends)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
