"""Measuring for plans: a child process times the model's layers, the result is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ember_pp import __version__
from ember_pp.config import Config
from ember_pp.coordinator.preparation import choose_cpu_threads
from ember_pp.cost_model import Profile, profile_path
from ember_pp.devices import DeviceSpec, machine_devices
from ember_pp.errors import ConfigError
from ember_pp.jobs.child import run_child
from ember_pp.jobs.json_file import write_json
from ember_pp.model_config import ModelConfig


def measure_all(config: Config, cfg: ModelConfig, devices: Sequence[DeviceSpec]) -> None:
    """Measure each kind of device once, and store what came out.

    Raises:
        ConfigError: a device is not on this machine, or the folder cannot be written.
        EmberError: the measurement failed; its own words are on stderr.
    """
    for name in dict.fromkeys(device.name for device in devices):
        device = next(device for device in devices if device.name == name)
        num_threads = 0
        if device.kind == "cpu":
            num_stages = config.pipeline.stages * config.pipeline.replicas
            num_threads = choose_cpu_threads(config, num_stages)
        path = profile_path(
            config.plan.profile_folder, cfg, config.model.dtype, name, num_threads, __version__
        )
        profile = _measure(config, cfg, device, num_threads)
        _store(path, profile)
        print(f"measured {name}: {path}\n{_describe(profile)}\n", flush=True)


def _measure(config: Config, cfg: ModelConfig, device: DeviceSpec, num_threads: int) -> Profile:
    wanted = {
        "model_config": cfg.to_plain(),
        "dtype": config.model.dtype,
        "device": _torch_name(device),
        "device_name": device.name,
        "num_threads": num_threads,
        "version": __version__,
    }
    measured = run_child(
        "ember_pp.stage.measure",
        wanted,
        timeout_s=config.coordinator.start_timeout_s,
        what=f"profile: measuring {device.name}",
    )
    return Profile.from_plain(measured)


def _torch_name(device: DeviceSpec) -> str:
    if device.kind == "cpu":
        return "cpu"
    for index, found in enumerate(machine_devices()):
        if found.kind == "cuda" and found.name == device.name:
            return f"cuda:{index}"
    raise ConfigError(
        f"profile: {device.name} is not on this machine; profile=true measures where it runs"
    )


def _store(path: Path, profile: Profile) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"plan.profile_folder: {path}: {error.strerror}") from None
    write_json("plan.profile_folder", path, profile.to_plain())


def _describe(profile: Profile) -> str:
    def line(title: str, points: Sequence[tuple[int, float]]) -> str:
        return f"  {title}: " + ", ".join(f"{size}: {time_s * 1e3:.3g}" for size, time_s in points)

    return "\n".join(
        [
            line("one layer, ms by decode rows", profile.layer_decode),
            line("one layer, ms by prompt tokens", profile.layer_prefill),
            line("lm_head and sampling, ms by rows", profile.head),
        ]
    )
