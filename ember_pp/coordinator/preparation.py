"""What can be known before any process is started: the model's files, text, split, devices.

Everything here fails fast: a missing shard, a tensor of the wrong shape, more stages than
layers or a device that is not there is reported before a byte of weights is read.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ember_pp import __version__
from ember_pp.checkpoint import Checkpoint, locate, read_config, read_generation_config
from ember_pp.config import Config, ModelSettings
from ember_pp.cost_model import PlanCost, Profile, Workload, profile_path, read_profile
from ember_pp.devices import DeviceSpec, count_gpus, find_devices
from ember_pp.errors import ConfigError
from ember_pp.layout import Layout, StageDevice, choose_split
from ember_pp.memory_model import StageSettings
from ember_pp.model_config import ModelConfig
from ember_pp.partition import LayerRange
from ember_pp.tokenizer import Tokenizer, read_eos_token_ids, read_sampling_defaults

BYTES_PER_ELEMENT = {"bfloat16": 2, "float32": 4}
_GIB = 1024**3

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """The model and its layout over stages, all checked."""

    model_config: ModelConfig
    folder: Path | None
    """Checkpoint folder; None when weights are random and there are no files."""
    tokenizer: Tokenizer | None
    """None when there is no ``tokenizer.json``: then prompts are token ids only."""
    eos_token_ids: tuple[int, ...]
    sampling_defaults: dict[str, Any]
    """``SamplingParams`` fields from the checkpoint and the configuration."""
    max_model_len: int
    """Longest sequence in tokens."""
    layer_ranges: list[LayerRange]
    """Half-open layer range of each stage."""
    plan_cost: PlanCost | None
    """Of the slowest stage, as predicted; see ``Layout.scheduler_cost``."""
    devices: list[str]
    """Device of each stage, replica after replica."""
    cpu_threads: int
    """Torch threads of each CPU stage."""
    max_in_flight: int
    """Plans in the pipeline at once."""
    num_microbatches: int
    """Sets of sequences that are planned together."""

    def devices_of(self, replica: int) -> list[str]:
        """Device of each stage of one replica."""
        num_stages = len(self.layer_ranges)
        return self.devices[replica * num_stages : (replica + 1) * num_stages]


def prepare(config: Config) -> Preparation:
    """Resolve and check everything that needs no weights.

    Raises:
        CheckpointError: a file or tensor of the checkpoint is missing, damaged or misshapen.
        ConfigError: the settings do not go with the model or with this machine.
    """
    folder = _find_folder(config.model)
    model_json = _read_model_json(config.model, folder)
    model_config = ModelConfig.from_hf(model_json)
    if config.model.load == "checkpoint" and folder is not None:
        Checkpoint.open(folder).check(model_config)
    generation = read_generation_config(folder) if folder else {}
    tokenizer = _load_tokenizer(config.model, folder)
    num_stages = config.pipeline.stages
    num_processes = num_stages * config.pipeline.replicas
    run_ahead = config.pipeline.run_ahead
    max_in_flight = config.pipeline.max_in_flight or default_max_in_flight(num_stages, run_ahead)
    max_model_len = choose_max_model_len(config.model, model_config)
    devices = choose_devices(config.pipeline.devices, num_processes, count_gpus())
    layer_ranges, plan_cost = _place_layers(
        config, model_config, devices, max_model_len, max_in_flight
    )
    return Preparation(
        model_config=model_config,
        folder=folder,
        tokenizer=tokenizer,
        eos_token_ids=tuple(read_eos_token_ids(generation, model_json, tokenizer)),
        sampling_defaults=read_sampling_defaults(generation) | config.sampling.given(),
        max_model_len=max_model_len,
        layer_ranges=layer_ranges,
        plan_cost=plan_cost,
        devices=devices,
        cpu_threads=choose_cpu_threads(config, num_processes),
        max_in_flight=max_in_flight,
        num_microbatches=choose_num_microbatches(num_stages, max_in_flight, run_ahead),
    )


def check_writable(key: str, path: Path) -> None:
    """Refuse a file that could not be written once everything is done.

    Raises:
        ConfigError: names ``key``.
    """
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{key}: {path} cannot be written; is its folder there?")


def default_max_in_flight(num_stages: int, run_ahead: int) -> int:
    """One plan per stage, and one more to be ready while the host schedules.

    A single stage without run-ahead takes one: the second would have to be another micro-batch,
    and splitting the batch in two would read the weights twice.
    """
    return 1 if num_stages == 1 and run_ahead == 0 else num_stages + 1


def choose_num_microbatches(num_stages: int, max_in_flight: int, run_ahead: int) -> int:
    """One per stage; without run-ahead, one for each plan in flight."""
    return max_in_flight if run_ahead == 0 else min(num_stages, max_in_flight)


def choose_cpu_threads(config: Config, num_processes: int) -> int:
    """Torch threads of each CPU stage."""
    return config.pipeline.cpu_threads or max(1, len(os.sched_getaffinity(0)) // num_processes)


def choose_devices(devices: str | list[str], num_stages: int, num_gpus: int) -> list[str]:
    """A device for each stage: ``auto`` spreads stages over the GPUs in order, or takes the CPU.

    Raises:
        ConfigError: a GPU is named that this process does not see.
    """
    wanted = [devices] * num_stages if isinstance(devices, str) else list(devices)
    chosen = [
        _auto_device(stage_index, num_stages, num_gpus) if device == "auto" else device
        for stage_index, device in enumerate(wanted)
    ]
    for device in chosen:
        if device != "cpu" and int(device.removeprefix("cuda:")) >= num_gpus:
            raise ConfigError(
                f"pipeline.devices: {device} is not there; this process sees {num_gpus} GPUs "
                "(CUDA_VISIBLE_DEVICES hides the others)"
            )
    return chosen


def _auto_device(stage_index: int, num_stages: int, num_gpus: int) -> str:
    if num_gpus == 0:
        return "cpu"
    return f"cuda:{stage_index * num_gpus // num_stages if num_gpus < num_stages else stage_index}"


# --------------------------------------------------------------------------------------
# the split


def _place_layers(
    config: Config,
    model_config: ModelConfig,
    devices: Sequence[str],
    max_model_len: int,
    max_in_flight: int,
) -> tuple[list[LayerRange], PlanCost | None]:
    """Layers of each stage, for the workload of ``plan``, and what plans are timed by."""
    pipeline, scheduler = config.pipeline, config.scheduler
    num_threads = choose_cpu_threads(config, len(devices))
    placed = with_profiles(config, model_config, find_devices(devices), num_threads)
    layout = Layout(
        model_config,
        stage_settings(config, max_model_len, max_in_flight),
        [placed[i : i + pipeline.stages] for i in range(0, len(placed), pipeline.stages)],
    )
    workload = Workload(
        prompt_tokens=config.plan.prompt_tokens,
        output_tokens=config.plan.output_tokens,
        sequences=min(scheduler.max_sequences, -(-config.plan.sequences // pipeline.replicas)),
    )
    num_microbatches = choose_num_microbatches(pipeline.stages, max_in_flight, pipeline.run_ahead)
    size = workload.steady_plan(num_microbatches, scheduler.max_tokens_per_plan)
    # Less than this and nothing can run; how much more there is, the stages say.
    num_kv_tokens = config.cache.block_size * num_microbatches
    ranges = choose_split(layout, pipeline.split, size=size, num_kv_tokens=num_kv_tokens)
    return ranges, layout.scheduler_cost(ranges, size)


def stage_settings(config: Config, max_model_len: int, max_in_flight: int) -> StageSettings:
    """The settings that decide what a stage allocates."""
    memory_gib = config.cache.memory_gib
    return StageSettings(
        bytes_per_element=BYTES_PER_ELEMENT[config.model.dtype],
        block_size=config.cache.block_size,
        max_sequences=config.scheduler.max_sequences,
        max_tokens_per_plan=config.scheduler.max_tokens_per_plan,
        max_in_flight=max_in_flight,
        max_model_len=max_model_len,
        kv_memory_bytes=None if memory_gib is None else int(memory_gib * _GIB),
        memory_share=config.cache.memory_share,
    )


def with_profiles(
    config: Config, model_config: ModelConfig, devices: Sequence[DeviceSpec], num_threads: int
) -> list[StageDevice]:
    """Devices with what was measured on them: on all of them, or on none, to be comparable."""
    profiles = [_find_profile(config, model_config, device, num_threads) for device in devices]
    if any(profile is None for profile in profiles):
        return [StageDevice(device) for device in devices]
    return [StageDevice(device, profile) for device, profile in zip(devices, profiles, strict=True)]


def _find_profile(
    config: Config, model_config: ModelConfig, device: DeviceSpec, num_threads: int
) -> Profile | None:
    if not config.plan.use_profile:
        return None
    path = profile_path(
        config.plan.profile_folder,
        model_config,
        config.model.dtype,
        device.name,
        num_threads if device.kind == "cpu" else 0,
        __version__,
    )
    try:
        return read_profile(path)
    except ValueError as error:
        logger.warning("profile not used: %s", error)
        return None


# --------------------------------------------------------------------------------------
# the model


def _find_folder(model: ModelSettings) -> Path | None:
    if model.path is None:
        return None
    if model.load == "checkpoint" or model.architecture is None:
        return locate(model.path, model.revision)
    # Random weights need no files: take a folder that is there, never ask the network.
    folder = Path(model.path).expanduser()
    return folder if (folder / "config.json").is_file() else None


def _read_model_json(model: ModelSettings, folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return read_config(folder)
    if model.load == "checkpoint" or model.architecture is None:
        raise ConfigError("model.path: missing; give a checkpoint folder, hub id or model=<preset>")
    return dict(model.architecture)


def _load_tokenizer(model: ModelSettings, folder: Path | None) -> Tokenizer | None:
    if folder is None or (model.load == "random" and not (folder / "tokenizer.json").is_file()):
        return None
    return Tokenizer.load(folder)


def choose_max_model_len(model: ModelSettings, model_config: ModelConfig) -> int:
    """Longest sequence in tokens.

    Raises:
        ConfigError: ``model.context_length`` is more than the checkpoint can do.
    """
    longest = model_config.context_length
    if model.context_length is None:
        return longest
    if model.context_length > longest:
        raise ConfigError(
            f"model.context_length: {model.context_length} is above the {longest} positions "
            "of the checkpoint (max_position_embeddings and rope scaling in its config.json)"
        )
    return model.context_length
