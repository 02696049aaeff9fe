"""What can be known before any process is started: the model's files, text, split, devices.

Everything here fails fast: a missing shard, a tensor of the wrong shape, more stages than
layers or a device that is not there is reported before a byte of weights is read.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
from pathlib import Path
from typing import Any

from ember_pp import partition
from ember_pp.checkpoint import Checkpoint, locate, read_config, read_generation_config
from ember_pp.config import Config, ModelSettings
from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig
from ember_pp.tokenizer import Tokenizer, read_eos_token_ids, read_sampling_defaults

_BYTES_PER_ELEMENT = {"bfloat16": 2, "float32": 4}


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
    layer_ranges: list[tuple[int, int]]
    """Half-open layer range of each stage."""
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
    return Preparation(
        model_config=model_config,
        folder=folder,
        tokenizer=tokenizer,
        eos_token_ids=tuple(read_eos_token_ids(generation, model_json, tokenizer)),
        sampling_defaults=read_sampling_defaults(generation) | config.sampling.given(),
        max_model_len=_max_model_len(config.model, model_config),
        layer_ranges=partition.split_layers(
            model_config,
            num_stages,
            config.pipeline.split,
            bytes_per_element=_BYTES_PER_ELEMENT[config.model.dtype],
        ),
        devices=choose_devices(config.pipeline.devices, num_processes, count_gpus()),
        cpu_threads=config.pipeline.cpu_threads
        or max(1, len(os.sched_getaffinity(0)) // num_processes),
        max_in_flight=max_in_flight,
        num_microbatches=choose_num_microbatches(num_stages, max_in_flight, run_ahead),
    )


def default_max_in_flight(num_stages: int, run_ahead: int) -> int:
    """One plan per stage, and one more to be ready while the host schedules.

    A single stage without run-ahead takes one: the second would have to be another micro-batch,
    and splitting the batch in two would read the weights twice.
    """
    return 1 if num_stages == 1 and run_ahead == 0 else num_stages + 1


def choose_num_microbatches(num_stages: int, max_in_flight: int, run_ahead: int) -> int:
    """One per stage; without run-ahead, one for each plan in flight."""
    return max_in_flight if run_ahead == 0 else min(num_stages, max_in_flight)


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


def count_gpus() -> int:
    """CUDA devices that this process may use, asked of the driver without torch; 0 without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


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


def _max_model_len(model: ModelSettings, model_config: ModelConfig) -> int:
    longest = model_config.context_length
    if model.context_length is None:
        return longest
    if model.context_length > longest:
        raise ConfigError(
            f"model.context_length: {model.context_length} is above the {longest} positions "
            "of the checkpoint (max_position_embeddings and rope scaling in its config.json)"
        )
    return model.context_length
