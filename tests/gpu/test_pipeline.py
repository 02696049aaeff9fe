"""The engine on a GPU: tokens do not depend on stages, on the device, or on CUDA graphs."""

import pytest
import torch

from ember_pp import config as configuration
from ember_pp.jobs.session import open_client

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

PROMPTS = [
    "The capital of France is",
    "A planet is a large body that",
    "Music is",
    "In 1905, the physicist Albert Einstein published four papers. In the first of them he",
]
NUM_TOKENS = 48
GREEDY = {"temperature": 0.0, "max_tokens": NUM_TOKENS, "ignore_eos": True}


def generate(devices, *, prompts=PROMPTS, cuda_graphs=True, **model):
    """Token ids of all prompts, submitted at once; devices may repeat."""
    config = configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"path": "demo", "dtype": "float32"} | model,
            "pipeline": {"stages": len(devices), "devices": devices},
            "cache": {"memory_gib": 0.25},
            "cuda_graphs": cuda_graphs,
        }
    )
    with open_client(config) as client:
        requests = [client.submit(prompt, sampling=GREEDY) for prompt in prompts]
        return [request.result(300.0).token_ids for request in requests]


@pytest.fixture(scope="module")
def one_gpu_stage():
    return generate(["cuda:0"])


@pytest.mark.parametrize("num_stages", [2, 3])
def test_tokens_do_not_depend_on_the_number_of_gpu_stages(num_stages, one_gpu_stage):
    assert generate(["cuda:0"] * num_stages) == one_gpu_stage


def test_gpu_and_cpu_stages_mix(one_gpu_stage):
    assert generate(["cuda:0", "cpu"]) == one_gpu_stage
    assert generate(["cpu", "cuda:0"]) == one_gpu_stage


def test_greedy_tokens_are_those_of_transformers(one_gpu_stage, demo_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_path)
    model = transformers.Qwen3ForCausalLM.from_pretrained(demo_path, dtype=torch.float32)
    model = model.to("cuda:0").eval()
    for prompt, tokens in zip(PROMPTS, one_gpu_stage, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to("cuda:0")
        with torch.inference_mode():
            for _ in range(NUM_TOKENS):
                next_id = model(ids).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, next_id], dim=1)
        assert ids[0, -NUM_TOKENS:].tolist() == tokens, prompt


def test_bfloat16_runs_and_repeats():
    first = generate(["cuda:0", "cuda:0"], dtype="bfloat16")
    assert first == generate(["cuda:0", "cuda:0"], dtype="bfloat16")
    assert all(len(tokens) == NUM_TOKENS for tokens in first)


@pytest.fixture(scope="module")
def without_graphs():
    """bf16 models are those whose steps are captured; one prompt makes the same plans each time."""
    return generate(["cuda:0"], prompts=PROMPTS[-1:], cuda_graphs=False, dtype="bfloat16")


@pytest.mark.parametrize("num_stages", [1, 2])
def test_steps_as_graphs_draw_the_same(num_stages, without_graphs):
    devices = ["cuda:0"] * num_stages
    assert generate(devices, prompts=PROMPTS[-1:], dtype="bfloat16") == without_graphs
