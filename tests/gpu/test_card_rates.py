"""Rates of a card are about what they should be, while nothing else uses it."""

from __future__ import annotations

import pytest
import torch

from ember_pp.devices import find_devices
from ember_pp.stage import rates


@pytest.mark.gpu
def test_a_card_reaches_most_of_what_its_vendor_says() -> None:
    measured = rates.measure(torch.device("cuda", 0), torch.bfloat16)
    [card] = find_devices(["cuda:0"])
    assert 0.5 < measured["read_bytes_per_s"] / card.bandwidth_bytes_per_s < 1.0
    assert 0.3 < measured["flops_per_s"] / card.flops_per_s < 1.0
    assert measured["read_spread"][0] > 0.8 * measured["read_spread"][1]
    assert measured["uuid"].startswith("GPU-")
