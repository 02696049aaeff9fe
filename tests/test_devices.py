"""Devices by name, by description and by what a driver says."""

from __future__ import annotations

import ctypes
import json

import pytest

from ember_pp import devices
from ember_pp.devices import DeviceSpec, find_devices, known_cards, parse_devices
from ember_pp.errors import ConfigError

GIB = 1024**3
RTX_3090 = {"name": "RTX 3090", "memory_gib": 24, "bandwidth_gbps": 936, "tflops": 71}


def test_every_card_has_numbers_and_a_source() -> None:
    cards = known_cards()
    assert len({card.name for card in cards}) == len(cards) > 15
    for card in cards:
        assert 8 <= card.memory_gib <= 300, card
        assert 100 <= card.bandwidth_gbps <= 10_000, card
        assert 20 <= card.tflops <= 3000, card
        assert len(card.source) > 10, card
        assert card.driver, card
    named = [name for card in cards for name in card.driver]
    assert len(set(named)) == len(named)


def test_a_card_is_known_by_name_however_it_is_written() -> None:
    (card,) = parse_devices("RTX 3090")
    assert card.bandwidth_bytes_per_s == 936e9
    assert card.flops_per_s == 71e12
    assert card.memory_bytes == pytest.approx(24 * GIB * 0.985, abs=1)
    for name in ("rtx-3090", "NVIDIA GeForce RTX 3090", " geforce rtx_3090"):
        assert parse_devices(name) == [card]
    assert parse_devices("NVIDIA A100-SXM4-80GB") == parse_devices("A100 80GB")


@pytest.mark.parametrize(
    ("name", "gib"),
    [
        # What CUDA states as the total on these cards, as seen in its out-of-memory messages.
        ("RTX 4090", 23.64),
        ("L40", 44.40),
        ("L40S", 44.42),
        ("A100 80GB", 79.15),
    ],
)
def test_usable_memory_is_what_cuda_reports(name: str, gib: float) -> None:
    (card,) = parse_devices(name)
    assert card.memory_bytes == pytest.approx(gib * GIB, rel=0.01)


def test_counts_maps_and_lists_mix() -> None:
    found = parse_devices(["2xRTX 4090", RTX_3090 | {"count": 2}, "A10"])
    assert [device.name for device in found] == ["RTX 4090"] * 2 + ["RTX 3090"] * 2 + ["A10"]
    assert parse_devices("3 x L4") == parse_devices(["L4", "L4", "L4"])
    assert parse_devices("1024xL4")[1023] == parse_devices("L4")[0]


def test_a_description_stands_over_the_table_and_is_filled_from_it() -> None:
    (table,) = parse_devices("RTX 3090")
    assert parse_devices(RTX_3090) == [table]
    (half,) = parse_devices({"name": "RTX 3090", "bandwidth_gbps": 468})
    assert half.bandwidth_bytes_per_s == table.bandwidth_bytes_per_s / 2
    assert half.memory_bytes == table.memory_bytes
    assert (table.source[:6], half.source) == ("NVIDIA", "described")
    (own,) = parse_devices(RTX_3090 | {"name": "my card", "memory_gib": 12.5})
    assert own.memory_bytes == pytest.approx(12.5 * GIB * 0.985, abs=1)


def test_the_processor_is_a_device_too() -> None:
    (cpu,) = parse_devices("cpu")
    assert (cpu.kind, cpu.memory_bytes) == ("cpu", None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("RTX 3091", r"plan.devices: no card 'RTX 3091' in the table.*RTX 3090.*describe it"),
        (
            "4xA100",
            r"no card 'A100' in the table; did you mean "
            r"'A100 40GB' or 'A100 80GB' or 'A100 80GB PCIe'\?; docs/planning.md lists them all",
        ),
        ("NVIDIA A100-SXM4", r"did you mean 'A100 40GB' or 'A100 80GB'\?"),
        ("geforce", r"no card 'geforce' in the table; docs/planning.md lists them all"),
        ("0xRTX 3090", r"expected 1 to 1024 devices, got 0"),
        ("99999999999xL4", r"expected 1 to 1024 devices, got 1025"),
        ([], r"expected 1 to 1024 devices, got 0"),
        ([7], r"expected a card's name or a map, got 7"),
        (RTX_3090 | {"memory_gb": 24}, r"memory_gb: no such field.*memory_gib"),
        (RTX_3090 | {"count": 0}, r"count: expected at least 1, got 0"),
        (RTX_3090 | {"count": True}, r"count: expected at least 1, got True"),
        (RTX_3090 | {"tflops": -1}, r"RTX 3090: tflops: expected above 0, got -1"),
        (RTX_3090 | {"tflops": "71"}, r"RTX 3090: tflops: expected above 0, got '71'"),
        ({"name": "mine", "memory_gib": 24, "tflops": 9}, r"mine: bandwidth_gbps: is missing"),
    ],
)
def test_refuses_by_name(value: object, message: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^plan\.devices: .*{message.removeprefix('plan.devices: ')}"
    ):
        parse_devices(value)


def test_a_share_has_its_part_of_everything_but_the_launch() -> None:
    (card,) = parse_devices("L4")
    part = card.share(4)
    assert part.memory_bytes == card.memory_bytes // 4  # type: ignore[operator]
    assert part.bandwidth_bytes_per_s == card.bandwidth_bytes_per_s / 4
    assert part.flops_per_s == card.flops_per_s / 4
    assert part.plan_overhead_s == card.plan_overhead_s


def test_stages_on_one_device_share_it() -> None:
    alone, (first, second) = find_devices(["cpu"])[0], find_devices(["cpu", "cpu"])
    assert first == second
    assert first.flops_per_s == alone.flops_per_s / 2


class FakeDriver:
    """The calls of libcuda that are used, for two cards."""

    names = (b"NVIDIA L4", b"NVIDIA Imaginary 5000")
    attributes = {13: 2_000_000, 16: 100, 36: 10_000_000, 37: 256, 75: 9, 76: 0}  # noqa: RUF012

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetCount(self, count) -> int:  # noqa: N802
        count._obj.value = 2
        return 0

    def cuDeviceGet(self, device, index: int) -> int:  # noqa: N802
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name, length: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = self.names[device.value]
        return 0

    def cuDeviceTotalMem_v2(self, memory, device: ctypes.c_int) -> int:  # noqa: N802
        memory._obj.value = 10 * GIB
        return 0

    def cuDeviceGetAttribute(self, value, number: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = self.attributes[number]
        return 0


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.ctypes, "CDLL", lambda name: FakeDriver())


@pytest.mark.usefixtures("two_gpus")
def test_a_found_card_has_its_own_memory_and_the_rates_of_the_table() -> None:
    known, unknown = find_devices(["cuda:0", "cuda:1"])
    assert known.name == "NVIDIA L4"
    assert known.memory_bytes == 10 * GIB
    assert known.bandwidth_bytes_per_s == 300e9
    # 2 x 10 GHz x 256 bits; 100 multiprocessors x 2 GHz x 4096
    assert unknown == DeviceSpec(
        name="NVIDIA Imaginary 5000",
        memory_bytes=10 * GIB,
        bandwidth_bytes_per_s=640e9,
        flops_per_s=pytest.approx(819.2e12),
        source="clocks and widths that the driver states",
    )


@pytest.mark.usefixtures("two_gpus")
def test_found_cards_are_shared_and_mix_with_the_processor() -> None:
    first, second, cpu = find_devices(["cuda:0", "cuda:0", "cpu"])
    assert first == second
    assert first.memory_bytes == 5 * GIB
    assert cpu.kind == "cpu"
    assert [device.name for device in devices.machine_devices()] == [
        "NVIDIA L4",
        "NVIDIA Imaginary 5000",
    ]


def test_without_a_driver_the_machine_is_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(devices.ctypes, "CDLL", missing)
    assert devices.count_gpus() == 0
    assert [device.kind for device in devices.machine_devices()] == ["cpu"]


def test_the_table_is_plain_json() -> None:
    rows = json.loads(devices._CARDS_FILE.read_text(encoding="ascii"))["cards"]
    assert [row["name"] for row in rows] == [card.name for card in known_cards()]
