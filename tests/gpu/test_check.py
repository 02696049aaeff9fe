"""``job=check`` on a GPU: sound with every kind of kernels, and a planted fault is found.

One card is several stages: what is said of N stages against one holds whatever the devices, but
time says nothing here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ember_pp import config as configuration
from ember_pp.errors import EXIT_OK, EXIT_TOLERANCE
from ember_pp.jobs import check
from ember_pp.jobs.session import open_client

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]


def config_of(output: Path, *, num_stages: int, job: dict[str, Any], **settings: Any) -> Any:
    return configuration.build(
        {
            "job": {"name": "check", "output": str(output)} | job,
            "model": {"path": "demo", "dtype": "bfloat16"} | settings.pop("model", {}),
            "pipeline": {"stages": num_stages, "devices": ["cuda:0"] * num_stages},
            "cache": {"memory_gib": 0.25},
            "scheduler": {"max_tokens_per_plan": 128},
        }
        | settings
    )


@pytest.mark.parametrize(
    ("dtype", "kernels", "num_stages", "load"),
    [
        ("bfloat16", "cuda", 2, "checkpoint"),
        ("bfloat16", "reference", 2, "random"),
        ("float32", "cuda", 3, "random"),
        ("float32", "reference", 1, "checkpoint"),
    ],
)
def test_the_card_computes_what_transformers_computes(
    tmp_path: Path, dtype: str, kernels: str, num_stages: int, load: str
) -> None:
    pytest.importorskip("transformers")
    config = config_of(
        tmp_path / "r.json",
        num_stages=num_stages,
        job={"requests": 40},
        kernels=kernels,
        model={"dtype": dtype, "load": load},
    )
    assert check.run(config) == EXIT_OK
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["plans"]["tap_every"] > 1
    assert result["one_stage"]["tokens"] == {"compared": 640, "differing": 0, "first": None}
    assert all(tensor["ours"]["worst"] > 0 for tensor in result["transformers"]["tensors"])
    assert result["transformers"]["weights"] == "cuda:0"


def test_a_fault_in_one_layer_of_one_stage_is_named(tmp_path: Path, demo_path: Path) -> None:
    folder = tmp_path / "faulty"
    shutil.copytree(demo_path, folder)
    name = "model.layers.6.mlp.down_proj.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    tensors[name][3, 5] += 0.5
    save_file(tensors, path)
    config = config_of(
        tmp_path / "r.json", num_stages=2, job={"requests": 8, "against": "one_stage"}
    )

    def connect(changed: configuration.Config) -> Any:
        model = dataclasses.replace(changed.model, path=str(folder))
        return open_client(dataclasses.replace(changed, model=model))

    assert check.run(config, connect=connect) == EXIT_TOLERANCE
    [fault] = json.loads((tmp_path / "r.json").read_text())["faults"]
    assert (fault["name"], fault["stage"], fault["where"]["plan"]) == ("layer.6", 1, 0)
    assert fault["where"]["element"] == 3  # the output that the weight belongs to
