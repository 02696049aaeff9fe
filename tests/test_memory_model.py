"""Predicted bytes against what real stages allocate, kind by kind."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from ember_pp import config as configuration
from ember_pp import memory_model, protocol
from ember_pp.checkpoint import read_config
from ember_pp.coordinator.preparation import stage_settings
from ember_pp.devices import cpu_device
from ember_pp.jobs.plan_prediction import predict
from ember_pp.jobs.session import open_client
from ember_pp.memory_model import StageBytes
from ember_pp.model_config import ModelConfig
from ember_pp.partition import split_layers
from ember_pp.stage.worker import StageWorker

TOLERANCE = 0.03
MAX_IN_FLIGHT, NUM_BLOCKS = 3, 37
SMALL: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 224,
    "vocab_size": 1009,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def make_config(name: str, demo_path: Path, num_stages: int, **groups: Any) -> configuration.Config:
    models: dict[str, dict[str, Any]] = {
        "demo": {"path": str(demo_path), "dtype": "float32"},
        "small": {"architecture": SMALL, "load": "random", "dtype": "bfloat16"},
    }
    plain: dict[str, Any] = {
        "job": {"name": "serve"},
        "model": models[name],
        "pipeline": {"stages": num_stages, "devices": "cpu", "cpu_threads": 1},
        "scheduler": {"max_sequences": 24, "max_tokens_per_plan": 128},
        "plan": {"sequences": 24, "prompt_tokens": 100, "output_tokens": 50, "use_profile": False},
    }
    return configuration.build(plain | groups)


def read_model(config: configuration.Config) -> ModelConfig:
    model = config.model
    if model.path is None:
        assert model.architecture is not None
        return ModelConfig.from_hf(model.architecture)
    return ModelConfig.from_hf(read_config(Path(model.path)))


def shared_memory() -> dict[int, int]:
    """Start and end of every mapping of a memfd in this process: rings of the hand-off."""
    spans = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "memfd" in line:
            start, end = line.split()[0].split("-")
            spans[int(start, 16)] = int(end, 16)
    return spans


def tensor_bytes() -> dict[int, int]:
    """Bytes of each block of memory that a tensor of this process holds, by address."""
    gc.collect()
    storages = [
        one.untyped_storage() for one in gc.get_objects() if issubclass(type(one), torch.Tensor)
    ]
    spans = shared_memory()
    return {
        storage.data_ptr(): storage.nbytes()
        for storage in storages
        if not any(start <= storage.data_ptr() < end for start, end in spans.items())
    }


@dataclasses.dataclass
class Measured:
    """What one stage holds once it takes plans."""

    ready: protocol.StageReady
    tensor_bytes: int
    """Beside the ring of its edge."""
    ring_bytes: int


def measure_stage(config: configuration.Config, cfg: ModelConfig, stage: int) -> Measured:
    """Load one stage in this process, as far as it gets without its neighbours."""
    num_stages = config.pipeline.stages
    start, end = split_layers(cfg, num_stages)[stage]
    before, rings_before = tensor_bytes(), shared_memory()
    posted: list[Any] = []
    worker = StageWorker(stage, posted.append)
    worker.handle(
        protocol.StageConfig(
            epoch=0,
            stage_index=stage,
            num_stages=num_stages,
            start_layer=start,
            end_layer=end,
            device="cpu",
            num_threads=1,
            config=configuration.to_plain(config),
            model_config=cfg.to_plain(),
            eos_token_ids=b"",
            max_slots=config.scheduler.max_sequences,
            max_model_len=cfg.context_length,
            max_in_flight=MAX_IN_FLIGHT,
        )
    )
    loaded = worker._slice
    assert loaded is not None
    runner = loaded.make_runner(NUM_BLOCKS)  # never connected: no plan is run
    rings = [end - start for start, end in shared_memory().items() if start not in rings_before]
    measured = Measured(
        ready=posted[-1],
        tensor_bytes=sum(size for address, size in tensor_bytes().items() if address not in before),
        ring_bytes=sum(rings),
    )
    del runner
    worker.close()
    return measured


@pytest.mark.parametrize(
    ("name", "num_stages", "stage"),
    [
        *(("demo", num_stages, stage) for num_stages in (1, 2, 3) for stage in range(num_stages)),
        *(("small", num_stages, stage) for num_stages in (1, 3) for stage in range(num_stages)),
    ],
)
def test_every_tensor_of_a_stage_is_foreseen(
    demo_path: Path, name: str, num_stages: int, stage: int
) -> None:
    config = make_config(name, demo_path, num_stages)
    cfg = read_model(config)
    start, end = split_layers(cfg, num_stages)[stage]
    settings = stage_settings(config, cfg.context_length, MAX_IN_FLIGHT)
    held = memory_model.stage_bytes(
        cfg,
        end - start,
        settings,
        is_first=stage == 0,
        is_last=stage == num_stages - 1,
        is_cpu=True,
    ).with_kv(NUM_BLOCKS * memory_model.block_bytes(cfg, end - start, settings))

    measured = measure_stage(config, cfg, stage)

    assert held.weights == pytest.approx(measured.ready.weight_bytes, rel=TOLERANCE)
    assert held.kv == measured.ready.block_bytes * NUM_BLOCKS
    assert held.rings == measured.ring_bytes
    # Closer than the 3% that are promised: what is left is the copies of the QK norms.
    assert held.allocated - held.rings == pytest.approx(measured.tensor_bytes, rel=0.01)


def test_a_stage_of_the_head_alone_has_no_kv_and_no_rope(demo_path: Path) -> None:
    cfg = read_model(make_config("small", demo_path, 1))
    settings = stage_settings(make_config("small", demo_path, 1), cfg.context_length, 3)
    held = memory_model.stage_bytes(cfg, 0, settings, is_first=False, is_last=True, is_cpu=False)
    matrix = cfg.vocab_size * cfg.hidden_size
    assert (held.lm_head, held.layers, held.rope) == (2 * matrix, 2 * cfg.hidden_size, 0)
    assert memory_model.block_bytes(cfg, 0, settings) == 0


def test_a_tied_head_is_held_once_where_the_embedding_is() -> None:
    cfg = ModelConfig.from_hf(SMALL | {"tie_word_embeddings": True})
    settings = memory_model.StageSettings(
        bytes_per_element=2,
        block_size=16,
        max_sequences=8,
        max_tokens_per_plan=64,
        max_in_flight=3,
        max_model_len=128,
    )

    def heads(*, is_first: bool, is_last: bool) -> tuple[int, int]:
        held = memory_model.stage_bytes(
            cfg, 2, settings, is_first=is_first, is_last=is_last, is_cpu=True
        )
        return held.embedding, held.lm_head

    matrix = 2 * cfg.vocab_size * cfg.hidden_size
    assert heads(is_first=True, is_last=True) == (matrix, 0)
    assert heads(is_first=True, is_last=False) == (matrix, 0)
    assert heads(is_first=False, is_last=True) == (0, matrix)


def test_kinds_add_up() -> None:
    held = StageBytes(
        layers=1, embedding=2, lm_head=4, kv=8, rope=16, tables=32, rings=64, activations=128,
        graphs=256, context=512,
    )  # fmt: skip
    assert (held.weights, held.loaded, held.allocated, held.total) == (7, 87, 127, 1023)
    assert held.reserved == 128 + 256


def test_the_kv_budget_leaves_a_share_and_room_for_what_is_reserved() -> None:
    assert memory_model.kv_budget_bytes(1000, 100, 0.9) == 800
    assert memory_model.kv_budget_bytes(1000, 100, 0.5) == 400
    assert memory_model.kv_budget_bytes(100, 100, 0.9) < 0


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("name", "num_stages", "memory_gib"),
    [("demo", 2, 0.25), ("small", 3, None)],  # all sequences at full length: 16 MB
)
def test_a_run_holds_what_was_predicted(
    demo_path: Path, name: str, num_stages: int, memory_gib: float | None
) -> None:
    """Stages as processes: what ``status`` says of them, and the split that they got."""
    config = make_config(name, demo_path, num_stages, cache={"memory_gib": memory_gib})
    prediction = predict(config, read_model(config), [cpu_device()], 1, num_stages)
    with open_client(config) as client:
        client.submit(token_ids=[1, 2, 3], sampling={"max_tokens": 2}).result(60.0)
        stages = client.status()["stages"]
    assert len(stages) == num_stages
    for stage, real in zip(prediction.stages, stages, strict=True):
        assert (real["start_layer"], real["end_layer"]) == stage.layers
        assert stage.held.kv == real["kv_bytes"] > 0
        predicted = stage.held.weights + stage.held.kv
        assert predicted == pytest.approx(real["weight_bytes"] + real["kv_bytes"], rel=TOLERANCE)
