"""``job=plan``: split, memory, KV capacity, times and bubble before anything is loaded.

Weights are never read, and no GPU is needed: devices can be described. With ``profile=true``
the layers are measured first, in a child process; this one never loads torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ember_pp.checkpoint import Checkpoint, locate, read_config
from ember_pp.config import Config, ModelSettings
from ember_pp.coordinator.preparation import choose_devices
from ember_pp.devices import (
    DeviceSpec,
    count_gpus,
    cpu_device,
    find_devices,
    machine_devices,
    parse_devices,
)
from ember_pp.errors import EXIT_OK, CapacityError, ConfigError
from ember_pp.jobs import plan_profile, plan_report, plan_workload
from ember_pp.jobs.plan_layout import (
    LayoutPlan,
    factorizations,
    plan_layout,
    smallest_that_fits,
)
from ember_pp.model_config import ModelConfig

_NUM_SHOWN = 3
_IS_AS_GOOD = 0.99
"""A layout of fewer stages is taken when it reaches this share of the best throughput."""


def run(config: Config) -> int:
    """Plan, print, and store if asked; the exit code.

    Raises:
        CapacityError: no layout fits the devices; says by how much, and what would.
        ConfigError, CheckpointError: the settings or the model cannot be used.
    """
    cfg = read_model(config.model)
    devices = choose_plan_devices(config)
    if config.profile:
        plan_profile.measure_all(config, cfg, devices)
    chosen, others = choose_layout(config, cfg, devices)
    print(plan_report.render(config, cfg, devices, chosen, others), flush=True)
    simulated = None
    if config.plan.workload is not None:
        simulated = plan_workload.simulate(config, chosen)
        print(plan_report.render_simulation(simulated), flush=True)
    if config.plan.output is not None:
        _write(config, chosen, others, simulated)
    return EXIT_OK


def read_model(model: ModelSettings) -> ModelConfig:
    """The architecture, from a preset or from ``config.json``; headers of weights are checked.

    Raises:
        CheckpointError: there is no such model, or its files contradict each other.
    """
    folder = None if model.path is None else Path(model.path).expanduser()
    is_here = folder is not None and (folder / "config.json").is_file()
    if model.architecture is not None and not is_here and model.path != "demo":
        return ModelConfig.from_hf(model.architecture)  # a preset needs no files
    if model.path is None:
        raise ConfigError("model.path: missing; give a checkpoint folder, hub id or model=<preset>")
    found = folder if is_here and folder is not None else locate(model.path, model.revision)
    cfg = ModelConfig.from_hf(read_config(found))
    if any(found.glob("*.safetensors*")):
        Checkpoint.open(found).check(cfg)
    return cfg


def choose_plan_devices(config: Config) -> list[DeviceSpec]:
    """The devices that ``plan.devices`` or ``pipeline.devices`` mean, else this machine's."""
    if config.plan.devices != "auto":
        return parse_devices(config.plan.devices)
    wanted = config.pipeline.devices
    if wanted == "cpu":
        return [cpu_device()]
    if wanted == "auto":
        return machine_devices()
    num_processes = config.pipeline.stages * config.pipeline.replicas
    return find_devices(choose_devices(wanted, num_processes, count_gpus()))


def choose_layout(
    config: Config, cfg: ModelConfig, devices: Sequence[DeviceSpec]
) -> tuple[LayoutPlan, list[LayoutPlan]]:
    """The layout to use, and all that fit, the best first.

    With ``pipeline.stages`` or ``pipeline.replicas`` above 1 it is the one that they say.

    Raises:
        CapacityError: nothing fits; says by how much, and what would.
    """
    pipeline, failures, plans = config.pipeline, [], []
    wanted = pipeline.replicas, pipeline.stages
    layouts = list(factorizations(len(devices), cfg.num_layers))
    is_given = wanted != (1, 1)
    for layout in dict.fromkeys([wanted, *layouts] if is_given else layouts):
        try:
            plans.append(plan_layout(config, cfg, devices, *layout))
        except CapacityError as error:
            failures.append((layout, error))
    ranked = rank(plans)
    if is_given and failures and failures[0][0] == wanted:
        raise CapacityError(f"{failures[0][1]}. {_help(config, cfg, devices, ranked)}")
    if not plans:
        raise CapacityError(f"{failures[-1][1]}. {_help(config, cfg, devices, [])}")
    return (plans[0] if is_given else ranked[0]), ranked[:_NUM_SHOWN]


def rank(plans: Sequence[LayoutPlan]) -> list[LayoutPlan]:
    """By throughput; of those that are about as good as the best, fewer stages first."""
    best = max((plan.output_tokens_per_s for plan in plans), default=0.0)

    def key(plan: LayoutPlan) -> tuple[int, float]:
        if plan.output_tokens_per_s >= _IS_AS_GOOD * best:
            return 0, len(plan.stages)
        return 1, -plan.output_tokens_per_s

    return sorted(plans, key=key)


def _help(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    fitting: Sequence[LayoutPlan],
) -> str:
    if fitting:
        listed = " or ".join(" ".join(plan.overrides(config)) for plan in fitting[:_NUM_SHOWN])
        return f"These devices hold it with {listed}"
    least = min(devices, key=lambda device: device.memory_bytes or 0)
    num_stages = smallest_that_fits(config, cfg, least, len(devices))
    if num_stages:
        return f"It fits {num_stages} of {least.name}, as pipeline.stages={num_stages}"
    return (
        "More of these devices do not help: lower plan.prompt_tokens and plan.output_tokens, "
        "scheduler.max_tokens_per_plan or plan.sequences, or use devices with more memory"
    )


def _write(
    config: Config, chosen: LayoutPlan, others: Sequence[LayoutPlan], simulated: Any
) -> None:
    path = Path(str(config.plan.output))
    plain = {
        "workload": {
            "prompt_tokens": config.plan.prompt_tokens,
            "output_tokens": config.plan.output_tokens,
            "sequences": config.plan.sequences,
        },
        "overrides": plan_report.overrides(config, chosen),
        "plan": chosen.to_plain(),
        "best": [plan.to_plain() for plan in others],
        "simulation": None if simulated is None else dataclasses.asdict(simulated),
    }
    try:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"plan.output: {path}: {error.strerror}") from None
