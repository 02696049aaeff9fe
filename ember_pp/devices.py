"""Devices that stages run on: found on this machine, named from a table, or described. No torch.

What a plan needs to know of a device are four numbers: memory, bandwidth, matrix rate, and what
a plan costs beside them. Names and numbers of common cards are in ``cards.json``, each with the
vendor's document that it comes from.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ember_pp.errors import ConfigError
from ember_pp.sampling_params import suggest

_GIB = 1024**3
_CARDS_FILE = Path(__file__).with_name("cards.json")

USABLE_SHARE = 0.985
"""Of a card's nominal memory, what CUDA reports as its total; the driver keeps the rest."""

_ECC_SHARE = 15 / 16

PLAN_OVERHEAD_S = 20e-6
"""Assumed where nothing was measured: launching a plan and handing it on."""

# Rough on purpose, and the same on every machine: a split depends on their ratio alone.
_CPU_BANDWIDTH_PER_CORE = 10e9
_CPU_FLOPS_PER_CORE = 40e9

_COUNTED = re.compile(r"\s*(\d+)\s*[xX*]\s*(.+)")
_NUMBERS = ("memory_gib", "bandwidth_gbps", "tflops")
_MAX_DEVICES = 1024


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One device, as its vendor describes it: peak rates, not what a program reaches."""

    name: str
    memory_bytes: int | None
    """What a process can allocate if it is alone; None: the machine's, not limited here."""
    bandwidth_bytes_per_s: float
    flops_per_s: float
    """Dense matrix products in bfloat16, accumulated in float32."""
    plan_overhead_s: float = PLAN_OVERHEAD_S
    kind: str = "cuda"
    """``cuda`` or ``cpu``."""
    source: str = "described"

    def share(self, num_stages: int) -> DeviceSpec:
        """What one of several stages on this device has of it."""
        memory_bytes = self.memory_bytes
        return dataclasses.replace(
            self,
            memory_bytes=None if memory_bytes is None else memory_bytes // num_stages,
            bandwidth_bytes_per_s=self.bandwidth_bytes_per_s / num_stages,
            flops_per_s=self.flops_per_s / num_stages,
        )


# --------------------------------------------------------------------------------------
# named and described


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A row of ``cards.json``; numbers are the vendor's."""

    name: str
    memory_gib: float
    bandwidth_gbps: float
    tflops: float
    has_inline_ecc: bool = False
    driver: tuple[str, ...] = ()
    """What the CUDA driver calls it."""
    source: str = "described"

    def spec(self) -> DeviceSpec:
        """As a device to run on."""
        share = USABLE_SHARE * (_ECC_SHARE if self.has_inline_ecc else 1)
        return DeviceSpec(
            name=self.name,
            memory_bytes=int(self.memory_gib * share * _GIB),
            bandwidth_bytes_per_s=self.bandwidth_gbps * 1e9,
            flops_per_s=self.tflops * 1e12,
            source=self.source,
        )


@functools.cache
def known_cards() -> tuple[Card, ...]:
    """The table that is shipped."""
    rows = json.loads(_CARDS_FILE.read_text(encoding="utf-8"))["cards"]
    return tuple(Card(**(row | {"driver": tuple(row["driver"])})) for row in rows)


def parse_devices(value: Any) -> list[DeviceSpec]:
    """Devices from ``plan.devices``: text, a map, or a list of these.

    Text is a name from the table, with a count before it if there are several of them:
    ``RTX 4090``, ``4xRTX 4090``. A map has the fields ``name memory_gib bandwidth_gbps tflops``,
    and ``count`` if there are several; what a name of the table leaves out is taken from there.

    Raises:
        ConfigError: an unknown name or field, or one that is missing; starts with the key.
    """
    items = value if isinstance(value, list | tuple) else [value]
    devices = [device for item in items for device in _parse_item(item)]
    if not 0 < len(devices) <= _MAX_DEVICES:
        raise ConfigError(f"plan.devices: expected 1 to {_MAX_DEVICES} devices, got {len(devices)}")
    return devices


def _parse_item(item: Any) -> list[DeviceSpec]:
    if isinstance(item, str):
        counted = _COUNTED.fullmatch(item)
        count, name = (int(counted[1]), counted[2]) if counted else (1, item)
        return [_by_name(name)] * min(count, _MAX_DEVICES + 1)
    if not isinstance(item, Mapping):
        raise ConfigError(f"plan.devices: expected a card's name or a map, got {item!r}")
    fields = dict(item)
    count = fields.pop("count", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"plan.devices: count: expected at least 1, got {count!r}")
    return [_described(fields)] * min(count, _MAX_DEVICES + 1)


def _by_name(name: str) -> DeviceSpec:
    if _plain(name) == "cpu":
        return cpu_device()
    card = _find_card(name)
    if card is None:
        raise ConfigError(
            f"plan.devices: no card {name!r} in the table{_suggest_cards(name)}; "
            "docs/planning.md lists them all; or "
            "describe it: {name: NAME, memory_gib: 24, bandwidth_gbps: 936, tflops: 71}"
        )
    return card.spec()


def _suggest_cards(name: str) -> str:
    """The cards whose names begin with what was given; without any, the one most like it."""
    beginning = _plain(name)
    longer = [
        card.name
        for card in known_cards()
        if beginning and any(_plain(one).startswith(beginning) for one in (card.name, *card.driver))
    ]
    if longer:
        return f"; did you mean {' or '.join(map(repr, longer))}?"
    return suggest(name, [card.name for card in known_cards()])


def _find_card(name: str) -> Card | None:
    for card in known_cards():
        if _plain(name) in map(_plain, (card.name, *card.driver)):
            return card
    return None


def _plain(name: str) -> str:
    words = re.split(r"[\s_-]+", name.lower())
    return " ".join(word for word in words if word and word not in ("nvidia", "geforce"))


def _described(fields: Mapping[str, Any]) -> DeviceSpec:
    for field in fields:
        if field not in ("name", *_NUMBERS):
            known = ["name", *_NUMBERS, "count"]
            raise ConfigError(f"plan.devices: {field}: no such field{suggest(str(field), known)}")
    name = str(fields.get("name", "device"))
    card = _find_card(name)
    for field in _NUMBERS:
        value = fields.get(field, getattr(card, field, None))
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            got = "is missing" if value is None else f"expected above 0, got {value!r}"
            raise ConfigError(f"plan.devices: {name}: {field}: {got}")
    if card is None:
        return Card(**(dict(fields) | {"name": name})).spec()
    is_changed = any(fields[field] != getattr(card, field) for field in fields if field != "name")
    changes = dict(fields) | ({"source": "described"} if is_changed else {})
    return dataclasses.replace(card, **changes).spec()


# --------------------------------------------------------------------------------------
# found


def find_devices(wanted: Sequence[str]) -> list[DeviceSpec]:
    """The device of each stage, by names as in ``pipeline.devices``: ``cpu`` or ``cuda:N``.

    Stages that share a device have equal parts of it.
    """
    gpus = _find_gpus() if any(name != "cpu" for name in wanted) else []
    specs = []
    for name in wanted:
        spec = cpu_device() if name == "cpu" else gpus[int(name.removeprefix("cuda:"))]
        specs.append(spec.share(list(wanted).count(name)))
    return specs


def machine_devices() -> list[DeviceSpec]:
    """Every GPU that this process may use; without any, the CPU."""
    return _find_gpus() or [cpu_device()]


def cpu_device() -> DeviceSpec:
    """This machine's processor, with rough rates by its number of cores."""
    cores = len(os.sched_getaffinity(0))
    return DeviceSpec(
        name=cpu_name(),
        memory_bytes=None,
        bandwidth_bytes_per_s=_CPU_BANDWIDTH_PER_CORE * cores,
        flops_per_s=_CPU_FLOPS_PER_CORE * cores,
        kind="cpu",
        source=f"rough rates of {cores} cores",
    )


def cpu_name() -> str:
    """What the processor calls itself."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def takes_gpus(wanted: Any) -> bool:
    """Whether any stage runs on a GPU, by ``pipeline.devices``."""
    names = wanted if isinstance(wanted, list | tuple) else [wanted]
    if any(str(name).startswith("cuda:") for name in names):
        return True
    return "auto" in names and count_gpus() > 0


def count_gpus() -> int:
    """CUDA devices that this process may use, asked of the driver without torch; 0 without one."""
    driver = _open_driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _open_driver() -> Any:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return driver if driver.cuInit(0) == 0 else None


def _find_gpus() -> list[DeviceSpec]:
    driver = _open_driver()
    return [] if driver is None else [_ask(driver, index) for index in range(count_gpus())]


# CUdevice_attribute, from cuda.h
_CLOCK_KHZ, _NUM_MULTIPROCESSORS, _MEMORY_CLOCK_KHZ, _BUS_BITS = 13, 16, 36, 37
_MAJOR, _MINOR = 75, 76
# Operations of a multiprocessor in one cycle, by compute capability (CUDA's architecture
# whitepapers, dense bfloat16): for cards that the table does not have.
_FLOPS_PER_CYCLE = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (12, 0): 512}


def _ask(driver: Any, index: int) -> DeviceSpec:
    """What the driver says of one GPU; rates from the table if its name is there."""
    device = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), device)
    memory = ctypes.c_size_t(0)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    found = name.value.decode(errors="replace")
    for card in known_cards():
        if found in card.driver:
            return dataclasses.replace(card.spec(), name=found, memory_bytes=memory.value)
    return _from_attributes(driver, device, found, memory.value)


def _from_attributes(driver: Any, device: ctypes.c_int, name: str, memory_bytes: int) -> DeviceSpec:
    def attribute(number: int) -> int:
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), number, device)
        return value.value

    capability = attribute(_MAJOR), attribute(_MINOR)
    multiprocessors, clock_hz = attribute(_NUM_MULTIPROCESSORS), attribute(_CLOCK_KHZ) * 1e3
    bandwidth = 2 * attribute(_MEMORY_CLOCK_KHZ) * 1e3 * attribute(_BUS_BITS) / 8
    return DeviceSpec(
        name=name,
        memory_bytes=memory_bytes,
        bandwidth_bytes_per_s=max(bandwidth, 1e9),
        flops_per_s=max(multiprocessors * clock_hz * _FLOPS_PER_CYCLE.get(capability, 512), 1e9),
        source="clocks and widths that the driver states",
    )
