"""The run's configuration: typed, validated once by ``build``, then immutable.

The dataclasses here are the only place where keys, types, defaults and units are written;
``conf/`` holds presets over them, ``docs/config.md`` is checked against them. A bad value is
a ``ConfigError`` that names the dotted key. Sizes end in ``_bytes`` or ``_gib``, durations in
``_s``; counts of tokens say so.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ember_pp.config_checks import at_least, check_devices, check_shard, check_split, is_device
from ember_pp.config_values import build_dataclass
from ember_pp.errors import ConfigError, InvalidRequestError
from ember_pp.sampling_params import SamplingParams, SamplingSizes
from ember_pp.supervisor_settings import SupervisorSettings

ON_GPUS = "on_gpus"
"""Metadata of a field that has another default where stages run on GPUs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Which model, and how its weights come in."""

    path: str | None = None
    """Folder in Hugging Face layout, a Hugging Face hub id, or ``demo`` for the bundled model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of weights, hidden states and KV cache."""
    load: Literal["checkpoint", "random"] = "checkpoint"
    """``random``: seeded weights of the model's true shapes; no weight files are read."""
    context_length: int | None = None
    """Longest sequence, prompt and output, in tokens; null: what the checkpoint says."""
    architecture: dict[str, Any] | None = None
    """The ``config.json`` to use where the path has none (with ``model.load=random``)."""

    def check(self) -> None:
        at_least("model.context_length", self.context_length, 1)
        if self.path is None and self.architecture is None:
            raise ConfigError(
                "model.path: missing; give a checkpoint folder, a hub id, or model=<preset>"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSettings:
    """The stages and where they run."""

    stages: int = 1
    """Number of stages, each a process with a contiguous slice of the layers."""
    replicas: int = 1
    """Copies of the whole pipeline under one coordinator; requests are spread over them."""
    devices: Any = "auto"
    """``auto``, ``cpu``, or a list with one device per stage (replica after replica) such as
    ``[cuda:0,cuda:1]``;
    a device may repeat. ``auto``: the GPUs in order, shared where there are fewer than stages;
    the CPU where there is none."""
    split: Any = "auto"
    """``auto`` (by cost, for the workload of ``plan``), ``equal``, or a list with the number of
    layers of each stage; the last of several may have none, and the lm_head alone."""
    max_in_flight: int | None = None
    """Plans in the pipeline at once; null: enough that no stage waits for the host."""
    run_ahead: int = 1
    """Tokens of a sequence that may be planned before the host has seen the ones before them; a
    stop then costs as many steps for nothing. 0: the host is on the path of every token."""
    cpu_threads: int | None = None
    """Threads of each stage that runs on the CPU; null: the cores shared out, at least 1."""

    def check(self) -> None:
        at_least("pipeline.stages", self.stages, 1)
        at_least("pipeline.replicas", self.replicas, 1)
        at_least("pipeline.max_in_flight", self.max_in_flight, 1)
        at_least("pipeline.run_ahead", self.run_ahead, 0)
        if self.run_ahead > 8:
            raise ConfigError(f"pipeline.run_ahead: expected at most 8, got {self.run_ahead}")
        at_least("pipeline.cpu_threads", self.cpu_threads, 1)
        check_devices(self.devices, self.stages, self.replicas)
        check_split(self.split, self.stages)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CacheSettings:
    """The paged KV cache of each stage."""

    memory_gib: float | None = None
    """KV memory of each stage in GiB; null: by ``memory_share`` on a GPU, and on the CPU a quarter
    of what is available, divided by the stages."""
    memory_share: float = 0.9
    """Of what is free on a GPU beside the weights, what a stage takes for its KV cache and
    everything else (``docs/planning.md``); the rest stays free."""
    block_size: int = 16
    """Tokens per block."""
    prefix: bool = True
    """Share the blocks of equal prompt beginnings."""

    def check(self) -> None:
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigError(f"cache.memory_gib: expected above 0, got {self.memory_gib}")
        if not 0 < self.memory_share <= 1:
            raise ConfigError(
                f"cache.memory_share: expected above 0, at most 1, got {self.memory_share}"
            )
        at_least("cache.block_size", self.block_size, 1)
        if self.block_size > 256:
            raise ConfigError(f"cache.block_size: expected at most 256, got {self.block_size}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """How requests are put together to plans."""

    policy: Literal["balanced", "greedy", "fixed"] = "balanced"
    """``balanced``: plans in flight cost alike. ``greedy``: each takes all that its token budget
    holds. ``fixed``: the same token budget for every plan, whatever waits. For comparison, see
    ``docs/scheduling.md``."""
    max_sequences: int = dataclasses.field(default=64, metadata={ON_GPUS: 256})
    """Sequences that may run at once, over all plans in flight."""
    max_tokens_per_plan: int = dataclasses.field(default=512, metadata={ON_GPUS: 2048})
    """Tokens of one plan, prompts and decodes together; also the size of a hand-off slot."""

    def check(self) -> None:
        at_least("scheduler.max_sequences", self.max_sequences, 1)
        at_least("scheduler.max_tokens_per_plan", self.max_tokens_per_plan, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Defaults for requests that do not say; null: what ``generation_config.json`` says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    seed: int = 0
    """Base of the random numbers of requests without a seed of their own."""

    def check(self) -> None:
        try:
            SamplingParams.from_mapping(self.given())
        except InvalidRequestError as error:
            raise ConfigError(f"sampling.{error}") from None

    def given(self) -> dict[str, Any]:
        """The fields that are set, without ``seed``: sampling defaults that override the
        checkpoint's own."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "seed" and getattr(self, field.name) is not None
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorSettings:
    """Where the coordinator listens, and the bounds it keeps."""

    address: str | None = None
    """``ipc://PATH`` or ``tcp://HOST:PORT`` of the client socket. A job other than ``serve``
    uses the coordinator that runs there; null: it starts one of its own."""
    max_queued_requests: int = 100_000
    """Requests that may be open at once; more are refused."""
    max_queued_bytes: int = 1024 * 1024 * 1024
    """Bytes of the messages of all open requests together; beyond it more are refused."""
    max_prompt_tokens: int | None = None
    """Longest prompt; null: the context length."""
    max_prompt_characters: int | None = None
    """Longest prompt text, looked at before it is tokenised; null: 16 for each token that the
    prompt may have."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Largest message from a client."""
    max_unread_messages: int = 100_000
    """Messages to one client that wait to be read by it; beyond it its requests end."""
    max_stop_strings: int = 16
    """Strings in the ``stop`` of a request."""
    max_stop_characters: int = 256
    """Length of each of them."""
    max_stop_token_ids: int = 1024
    """Ids in the ``stop_token_ids`` of a request."""
    max_logit_bias_entries: int = 1024
    """Entries in the ``logit_bias`` of a request."""
    curve: bool | None = None
    """Encrypt and authenticate connections of clients (CURVE); null: where other machines can
    reach ``address``, which needs it (``docs/trust.md``)."""
    keys: str = "~/.config/ember-pp/keys"
    """Folder of the keys for that; ``job=keys`` makes them."""
    start_timeout_s: float = 1800.0
    """Longest time from start to all stages being ready."""
    shutdown_grace_s: float = 5.0
    """Time for stages to end before they are killed."""

    def check(self) -> None:
        at_least("coordinator.max_queued_requests", self.max_queued_requests, 1)
        for key in ("max_prompt_tokens", "max_prompt_characters", "max_unread_messages"):
            at_least(f"coordinator.{key}", getattr(self, key), 1)
        for field in dataclasses.fields(SamplingSizes):
            at_least(f"coordinator.{field.name}", getattr(self, field.name), 0)
        at_least("coordinator.max_message_bytes", self.max_message_bytes, 1024)
        at_least("coordinator.max_queued_bytes", self.max_queued_bytes, self.max_message_bytes)
        for key in ("start_timeout_s", "shutdown_grace_s"):
            if getattr(self, key) <= 0:
                raise ConfigError(f"coordinator.{key}: expected above 0, got {getattr(self, key)}")

    @property
    def sampling_sizes(self) -> SamplingSizes:
        """How much of each kind the sampling fields of a request may have."""
        names = [field.name for field in dataclasses.fields(SamplingSizes)]
        return SamplingSizes(**{name: getattr(self, name) for name in names})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownSettings:
    """What SIGTERM and SIGINT do; a second one ends everything at once."""

    grace_s: float = 20.0
    """Time for open requests to end and be kept, once nothing new is begun. After it, and
    ``coordinator.shutdown_grace_s``, the run is over; Slurm kills 30 s after its SIGTERM."""

    def check(self) -> None:
        if not 0 <= self.grace_s < float("inf"):
            raise ConfigError(f"shutdown.grace_s: expected at least 0, got {self.grace_s}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DebugSettings:
    """Looking inside a run; slow, off by default (``docs/debugging.md``)."""

    tap: str | None = None
    """Folder in which each stage writes the hidden states of every plan as safetensors."""
    tap_every: int = 1
    """Of how many plans one is written there: those whose numbers it divides."""
    record: str | None = None
    """File to which the coordinator writes the plans it issues, to be replayed."""

    def check(self) -> None:
        at_least("debug.tap_every", self.tap_every, 1)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MetricsSettings:
    """Counters for Prometheus (``docs/observability.md``)."""

    port: int | None = None
    """TCP port on 127.0.0.1 at which the coordinator serves ``/metrics``; 0: any that is free,
    printed at start; null: none."""

    def check(self) -> None:
        at_least("metrics.port", self.port, 0)
        if self.port is not None and self.port > 65535:
            raise ConfigError(f"metrics.port: expected at most 65535, got {self.port}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceSettings:
    """What every stage did when, as a file to look at (``docs/observability.md``)."""

    output: str | None = None
    """JSON file for Perfetto or chrome://tracing, written when the run ends."""
    picture: str | None = None
    """The same as a Gantt chart, ``.svg`` or ``.png``."""
    max_plans: int = 10_000
    """Plans that are kept; of a longer run, the last ones."""
    window_s: float | None = None
    """Length of time that the picture shows, from the middle of the run; null: about 50 plans."""

    @property
    def is_on(self) -> bool:
        """True if stages have to record times."""
        return self.output is not None or self.picture is not None

    def check(self) -> None:
        at_least("trace.max_plans", self.max_plans, 1)
        if self.window_s is not None and self.window_s <= 0:
            raise ConfigError(f"trace.window_s: expected above 0, got {self.window_s}")
        if self.picture is not None and not self.picture.endswith((".svg", ".png")):
            raise ConfigError(f"trace.picture: expected *.svg or *.png, got {self.picture!r}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """The workload that layers are split for, and what ``job=plan`` is asked
    (``docs/planning.md``)."""

    devices: Any = "auto"
    """Devices to plan for: ``auto`` (those of this machine), the name of a card with a count, such
    as ``4xRTX 4090``, a map ``{name: RTX 3090, memory_gib: 24, bandwidth_gbps: 936, tflops: 71}``,
    or a list of these."""
    prompt_tokens: int = 512
    """Tokens of a prompt."""
    output_tokens: int = 256
    """Tokens of an answer."""
    sequences: int = 256
    """Requests that are open at once, over all replicas."""
    workload: str | None = None
    """Requests to simulate: a CSV file with the columns ``TIMESTAMP``, ``ContextTokens`` and
    ``GeneratedTokens``, or ``synthetic``: four times ``plan.sequences``, all at once."""
    max_requests: int | None = None
    """Requests of the file that are simulated, from its beginning; null: all."""
    use_profile: bool = True
    """Take measured times where ``profile=true`` has stored them."""
    profile_folder: str = "~/.cache/ember-pp/profiles"
    """Where they are stored."""
    output: str | None = None
    """JSON file for the plan, with everything that is printed."""

    def check(self) -> None:
        for key in ("prompt_tokens", "output_tokens", "sequences", "max_requests"):
            at_least(f"plan.{key}", getattr(self, key), 1)
        items = self.devices if isinstance(self.devices, list | tuple) else [self.devices]
        for item in items:
            if not isinstance(item, str) and not (isinstance(item, Mapping) and "name" in item):
                raise ConfigError(
                    "plan.devices: expected auto, a card's name, a map with name, memory_gib, "
                    f"bandwidth_gbps and tflops, or a list of these; got {item!r}"
                )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """``job=batch``: every line of the input answered once in the output."""

    name: Literal["batch"] = "batch"
    input: Any = None
    """JSONL file, a list of files, a glob, or ``-`` for stdin; ``.gz`` is unpacked on the way.
    null: the bundled prompts of the demo model."""
    output: str | None = None
    """JSONL file for the answers, or ``-`` for stdout; null with the bundled prompts:
    ``ember-out/answers.jsonl``."""
    errors: str | None = None
    """JSONL file for the requests that failed; null: beside the output, ``*.errors.jsonl``."""
    overwrite: bool = False
    """Start over instead of going on where an earlier run stopped."""
    on_bad_line: Literal["stop", "skip"] = "stop"
    """``stop``: end before the model is loaded, all bad lines listed. ``skip``: they go to
    the errors file, the others run."""
    ordered: bool = False
    """Write answers in the order of the input."""
    shard: str | None = None
    """``I/N``: only the I-th (from 1) of N parts of the input, for array jobs."""
    max_open_requests: int = 512
    """Requests handed to the coordinator at once."""

    def check(self) -> None:
        at_least("job.max_open_requests", self.max_open_requests, 1)
        if self.shard is not None:
            check_shard(self.shard)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeJob:
    """``job=serve``: a coordinator for clients, until a signal."""

    name: Literal["serve"] = "serve"

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """``job=chat``: a chat in the terminal."""

    name: Literal["chat"] = "chat"
    system: str | None = None
    """System message that opens the chat."""
    enable_thinking: bool | None = None
    """Given to the chat template; null: the template's own default."""

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StatusJob:
    """``job=status``: what a running coordinator is doing."""

    name: Literal["status"] = "status"

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CancelJob:
    """``job=cancel``: end requests of a running coordinator."""

    name: Literal["cancel"] = "cancel"
    request_ids: list[str] = dataclasses.field(default_factory=list)
    """Which; none: all."""

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeysJob:
    """``job=keys``: the keys with which clients on other machines connect
    (``docs/trust.md``)."""

    name: Literal["keys"] = "keys"
    make: Literal["client", "server"] = "client"
    """Whose pair of keys is made, if it is missing. A coordinator makes its own at its start."""
    allow: list[str] = dataclasses.field(default_factory=list)
    """Public keys of clients, ``*.key`` files, that may connect to this user's coordinators."""

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanJob:
    """``job=plan``: split, memory, times and bubble, before anything is loaded; see ``plan``."""

    name: Literal["plan"] = "plan"

    def check(self) -> None:
        """Nothing to check."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchJob:
    """``job=bench``: speed of a stated workload, beside what the device could do at most
    (``docs/benchmarking.md``)."""

    name: Literal["bench"] = "bench"
    workload: Literal["single", "fixed", "mixed", "prefill", "handoff"] = "single"
    """``single``: one stream. ``fixed``: a batch of equal requests. ``mixed``: prompts and answers
    of random lengths. ``prefill``: prompts with one output token each. ``handoff``: no requests,
    but the time of a hop between stages, by size and path."""
    batch: int | None = None
    """Requests, all sent at once; null: 1 for ``single``, 64 for ``fixed``, 256 for ``mixed``, 8
    for ``prefill``."""
    input_tokens: int | None = None
    """Tokens of each prompt; null: 128 for ``single``, 512 for ``fixed``, 2048 for ``prefill``."""
    output_tokens: int | None = None
    """Tokens of each answer; null: 128 for ``single``, 256 for ``fixed``."""
    lengths: list[int] = dataclasses.field(default_factory=lambda: [100, 1024])
    """Shortest and longest prompt of ``mixed``, and the same for its answers."""
    seed: int = 0
    """Of token ids, and of lengths in ``mixed``."""
    warmup: int = 1
    """Runs of the workload before those that count."""
    repeats: int = 3
    """Runs that count."""
    output: str | None = None
    """JSON file for the result with all its conditions, or ``-`` for stdout; null: the table
    alone."""
    compare: Literal["none", "transformers"] = "none"
    """``transformers``: the same workload with it, on the same device, in the same run."""

    def check(self) -> None:
        for key in ("batch", "input_tokens", "output_tokens", "repeats"):
            at_least(f"job.{key}", getattr(self, key), 1)
        at_least("job.warmup", self.warmup, 0)
        low, high = (*self.lengths, 0, 0)[:2]
        if len(self.lengths) != 2 or not 1 <= low <= high:
            raise ConfigError(
                f"job.lengths: expected [shortest, longest], from 1, got {self.lengths}"
            )
        if self.workload == "single" and self.batch not in (None, 1):
            raise ConfigError("job.batch: job.workload=single is one request; fixed takes more")
        if self.workload == "prefill" and self.output_tokens not in (None, 1):
            raise ConfigError("job.output_tokens: job.workload=prefill has one output token")
        for key in ("input_tokens", "output_tokens"):
            if self.workload == "mixed" and getattr(self, key) is not None:
                raise ConfigError(f"job.{key}: job.workload=mixed draws lengths; see job.lengths")
        if self.workload in ("single", "fixed") and self.output_tokens == 1:
            raise ConfigError(
                f"job.output_tokens: job.workload={self.workload} times tokens after the first; "
                "give at least 2"
            )
        for key in ("batch", "input_tokens", "output_tokens"):
            if self.workload == "handoff" and getattr(self, key) is not None:
                raise ConfigError(f"job.{key}: job.workload=handoff sends no requests")
        if self.workload == "handoff" and self.compare != "none":
            raise ConfigError(f"job.compare: {self.compare} hands nothing on; leave it out")
        if self.workload == "mixed" and self.compare != "none":
            raise ConfigError(
                f"job.compare: {self.compare} has no scheduler for job.workload=mixed; compare "
                "single, fixed or prefill"
            )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CheckJob:
    """``job=check``: whether this machine computes what transformers computes, layer by layer, and
    with several stages what one stage computes, bit for bit (``docs/checking.md``)."""

    name: Literal["check"] = "check"
    against: Literal["all", "transformers", "one_stage"] = "all"
    """What the configured pipeline is held against. ``transformers`` needs the extra ``compare``.
    ``one_stage``: the same plans again, by one stage on the device of the first."""
    input: Any = None
    """Prompts: files as for ``job=batch``, of whose lines only the prompt counts; null: a built-in
    set, some of them long enough to be computed in chunks."""
    requests: int = 256
    """Requests, all open at once; of ``job.input``, at most so many."""
    output_tokens: int = 16
    """Tokens of each answer, greedy."""
    device: str | None = None
    """Where transformers runs, ``cpu`` or ``cuda:N``; null: on the device of the first stage."""
    tap_every: int | None = None
    """Of how many plans one is compared tensor by tensor; tokens are of all. null: by what fits
    ``disk_gib``, but where there are CUDA graphs one of two at most, since these plans are none."""
    disk_gib: float = 8.0
    """Disk for what the stages compute, in GiB, under ``TMPDIR`` while the job runs."""
    output: str | None = None
    """JSON file for the result, or ``-`` for stdout; null: the tables alone."""

    def check(self) -> None:
        at_least("job.requests", self.requests, 1)
        at_least("job.output_tokens", self.output_tokens, 1)
        at_least("job.tap_every", self.tap_every, 1)
        if self.disk_gib <= 0:
            raise ConfigError(f"job.disk_gib: expected above 0, got {self.disk_gib}")
        if self.device not in (None, "cpu") and not is_device(self.device):
            raise ConfigError(f"job.device: expected cpu or cuda:N, got {self.device!r}")


Job = (
    BatchJob | ServeJob | ChatJob | StatusJob | CancelJob | KeysJob | PlanJob | BenchJob | CheckJob
)
JOBS: Mapping[str, type[Job]] = types.MappingProxyType(
    {
        "batch": BatchJob,
        "serve": ServeJob,
        "chat": ChatJob,
        "status": StatusJob,
        "cancel": CancelJob,
        "keys": KeysJob,
        "plan": PlanJob,
        "bench": BenchJob,
        "check": CheckJob,
    }
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that ``launch.sh`` can be told."""

    job: Job = dataclasses.field(default_factory=BatchJob)
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    pipeline: PipelineSettings = dataclasses.field(default_factory=PipelineSettings)
    cache: CacheSettings = dataclasses.field(default_factory=CacheSettings)
    scheduler: SchedulerSettings = dataclasses.field(default_factory=SchedulerSettings)
    sampling: SamplingDefaults = dataclasses.field(default_factory=SamplingDefaults)
    coordinator: CoordinatorSettings = dataclasses.field(default_factory=CoordinatorSettings)
    shutdown: ShutdownSettings = dataclasses.field(default_factory=ShutdownSettings)
    supervisor: SupervisorSettings = dataclasses.field(default_factory=SupervisorSettings)
    metrics: MetricsSettings = dataclasses.field(default_factory=MetricsSettings)
    trace: TraceSettings = dataclasses.field(default_factory=TraceSettings)
    debug: DebugSettings = dataclasses.field(default_factory=DebugSettings)
    plan: PlanSettings = dataclasses.field(default_factory=PlanSettings)
    profile: bool = False
    """``job=plan`` measures the model's layers on the devices first, and stores the times."""
    handoff: Literal["auto", "cuda_ipc", "host_shm"] = "auto"
    """Path of hidden states between stages; ``auto`` takes the best that passes its probe."""
    kernels: Literal["auto", "cuda", "reference"] = "auto"
    """Implementation of the model's operations: own CUDA kernels, or plain torch; ``auto`` is
    ``cuda`` on a CUDA device that has the extra ``cuda`` installed."""
    cuda_graphs: bool = True
    """Whether CUDA kernels are launched as graphs, a step at once; false launches each by itself:
    far slower, the same results, and a profiler or debugger sees every one."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Least severe log line that goes to stderr."""


def build(plain: Mapping[str, Any], *, on_gpus: bool = False) -> Config:
    """The validated configuration in ``plain``, nested maps as Hydra composes them.

    Args:
        plain: what is not in it has its default.
        on_gpus: which default those settings get that have one for GPUs and are null in ``plain``.

    Raises:
        ConfigError: an unknown key (with a suggestion), a wrong type, a value out of range;
            the text starts with the dotted key.
    """
    plain = _fill_by_device(plain, on_gpus=on_gpus)
    config = build_dataclass(Config, plain, known_keys=dotted_keys())
    for field in dataclasses.fields(config):
        part: Any = getattr(config, field.name)
        if hasattr(part, "check"):
            part.check()
    return config


def to_plain(config: Any) -> dict[str, Any]:
    """``config`` (or a part of it) as nested maps and lists; ``build`` takes it back."""
    return dataclasses.asdict(config)


def default_plain() -> dict[str, Any]:
    """Every key but ``job`` with its default, as nested maps; null where devices decide."""
    plain = to_plain(Config())
    del plain["job"]
    for group, name, _ in _defaults_by_device():
        plain[group][name] = None
    return plain


def _defaults_by_device() -> Iterator[tuple[str, str, tuple[Any, Any]]]:
    """Group, name, and the defaults on CPUs and on GPUs."""
    for group in dataclasses.fields(Config):
        settings = group.default_factory
        if dataclasses.is_dataclass(settings):
            for field in dataclasses.fields(settings):
                if ON_GPUS in field.metadata:
                    yield group.name, field.name, (field.default, field.metadata[ON_GPUS])


def _fill_by_device(plain: Mapping[str, Any], *, on_gpus: bool) -> Mapping[str, Any]:
    filled = dict(plain)
    for group, name, defaults in _defaults_by_device():
        given = filled.get(group, {})
        if isinstance(given, Mapping) and given.get(name) is None:
            filled[group] = {**given, name: defaults[on_gpus]}
    return filled


def dotted_keys() -> list[str]:
    """Every key that can be overridden, dotted, for each job."""
    keys = [f"job.{field.name}" for job in JOBS.values() for field in dataclasses.fields(job)]
    for group, value in default_plain().items():
        keys += [f"{group}.{name}" for name in value] if isinstance(value, dict) else [group]
    return sorted(set(keys))
