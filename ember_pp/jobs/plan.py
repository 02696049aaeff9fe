"""``job=plan``: split, memory, KV capacity, times and bubble before anything is loaded.

Weights are never read, and no GPU is needed: devices can be described. With ``profile=true``
the layers are measured first, in a child process; this one never loads torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ember_pp.checkpoint import BUNDLED_MODEL, Checkpoint, locate, read_config
from ember_pp.config import Config, ModelSettings
from ember_pp.coordinator.preparation import check_writable, choose_devices
from ember_pp.devices import (
    DeviceSpec,
    count_gpus,
    cpu_device,
    find_devices,
    machine_devices,
    parse_devices,
)
from ember_pp.errors import EXIT_OK, CapacityError
from ember_pp.jobs import plan_profile, plan_report, plan_workload
from ember_pp.jobs.json_file import write_json
from ember_pp.jobs.plan_prediction import Prediction, factorizations, least_stages, predict
from ember_pp.jobs.plan_workload import Simulated
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
    if config.plan.output is not None:
        check_writable("plan.output", Path(config.plan.output))
    cfg = read_model(config.model)
    devices = choose_plan_devices(config)
    if config.profile:
        plan_profile.measure_all(config, cfg, devices)
    chosen, best = choose_layout(config, cfg, devices)
    print(plan_report.render(config, cfg, devices, chosen, best), flush=True)
    simulated = None
    if config.plan.workload is not None:
        simulated = plan_workload.simulate(config, chosen)
        print(plan_report.render_simulation(simulated), flush=True)
    if config.plan.output is not None:
        _write(config, chosen, best, simulated)
    return EXIT_OK


def read_model(model: ModelSettings) -> ModelConfig:
    """The architecture, from ``config.json`` or a preset; headers of weights that are here are
    checked.

    Raises:
        CheckpointError: there is no such model, or its files contradict each other.
    """
    is_here = model.path is not None and (
        model.path == BUNDLED_MODEL or (Path(model.path).expanduser() / "config.json").is_file()
    )
    if model.architecture is not None and not is_here:
        return ModelConfig.from_hf(model.architecture)  # a preset needs no files
    assert model.path is not None, "ModelSettings.check asks for a path or an architecture"
    folder = locate(model.path, model.revision, config_only=True)
    cfg = ModelConfig.from_hf(read_config(folder))
    if is_here and any(folder.glob("*.safetensors*")):
        Checkpoint.open(folder).check(cfg)
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
) -> tuple[Prediction, list[Prediction]]:
    """The layout to use, and the best ones that fit, the best first.

    Those whose times are not of the same kind as the chosen one's, measured or at peak rates,
    come after all others: the number of threads of a CPU stage depends on the layout, so one may
    have a profile and another not.

    With ``pipeline.stages`` or ``pipeline.replicas`` above 1 it is the one that they say.

    Raises:
        CapacityError: it does not fit, or nothing does; says by how much, and what would.
    """
    wanted = (config.pipeline.replicas, config.pipeline.stages)
    is_given = wanted != (1, 1)
    layouts = list(factorizations(len(devices), cfg.num_layers))
    if is_given and wanted not in layouts:
        layouts.append(wanted)
    fitting, failures = _predict_all(config, cfg, devices, layouts)
    failure = failures.get(wanted if is_given else layouts[-1])
    if failure is not None and (is_given or not fitting):
        any_split = dataclasses.replace(
            config, pipeline=dataclasses.replace(config.pipeline, split="auto")
        )
        would_fit, _ = _predict_all(any_split, cfg, devices, layouts)
        text = _what_would_fit(any_split, cfg, devices, rank(list(would_fit.values())))
        raise CapacityError(f"{failure}. {text}")
    ranked = rank(list(fitting.values()))
    chosen = fitting[wanted] if is_given else ranked[0]
    ranked.sort(key=lambda one: one.is_measured != chosen.is_measured)
    return chosen, ranked[:_NUM_SHOWN]


def _predict_all(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    layouts: Sequence[tuple[int, int]],
) -> tuple[dict[tuple[int, int], Prediction], dict[tuple[int, int], CapacityError]]:
    """What fits, and why the others do not; by (replicas, stages)."""
    fitting, failures = {}, {}
    for layout in layouts:
        try:
            fitting[layout] = predict(config, cfg, devices, *layout)
        except CapacityError as error:
            failures[layout] = error
    return fitting, failures


def rank(predictions: Sequence[Prediction]) -> list[Prediction]:
    """By throughput; of those that are about as good as the best, fewer stages first.

    Measured ones first, and apart: the others are at peak rates, which nothing reaches.
    """
    best = {True: 0.0, False: 0.0}
    for one in predictions:
        best[one.is_measured] = max(best[one.is_measured], one.output_tokens_per_s)

    def key(one: Prediction) -> tuple[bool, int, float]:
        if one.output_tokens_per_s >= _IS_AS_GOOD * best[one.is_measured]:
            return not one.is_measured, 0, len(one.stages)
        return not one.is_measured, 1, -one.output_tokens_per_s

    return sorted(predictions, key=key)


def _what_would_fit(
    config: Config,
    cfg: ModelConfig,
    devices: Sequence[DeviceSpec],
    fitting: Sequence[Prediction],
) -> str:
    if fitting:
        listed = " or ".join(" ".join(one.overrides(config)) for one in fitting[:_NUM_SHOWN])
        return f"These devices hold it with {listed}"
    least = min(devices, key=lambda device: device.memory_bytes or math.inf)
    num_stages = least_stages(config, cfg, least, above=len(devices))
    if num_stages is not None:
        return f"It fits {num_stages} of {least.name}, with pipeline.stages={num_stages}"
    return (
        "More of these devices do not help: lower plan.prompt_tokens and plan.output_tokens, "
        "scheduler.max_tokens_per_plan or plan.sequences, or use devices with more memory"
    )


def _write(
    config: Config,
    chosen: Prediction,
    best: Sequence[Prediction],
    simulated: Simulated | None,
) -> None:
    path = Path(str(config.plan.output))
    plain = {
        "workload": {
            "prompt_tokens": config.plan.prompt_tokens,
            "output_tokens": config.plan.output_tokens,
            "sequences": config.plan.sequences,
        },
        "overrides": chosen.overrides(config),
        "plan": chosen.to_plain(),
        "best": [one.to_plain() | {"overrides": one.overrides(config)} for one in best],
        "simulation": None if simulated is None else simulated.to_plain(),
    }
    write_json("plan.output", path, plain)
