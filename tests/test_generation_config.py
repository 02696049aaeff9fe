"""generation_config.json: sampling defaults and end-of-text ids."""

import logging

import pytest

from ember_pp.errors import CheckpointError
from ember_pp.generation_config import read_eos_token_ids, read_sampling_defaults

QWEN3 = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "4.51.0",
}


class NamedEos:
    def __init__(self, special_tokens, ids):
        self.special_tokens = special_tokens
        self.token_id = ids.get


NO_EOS = NamedEos({}, {})


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        ({}, {}),
        (QWEN3, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
        ({"temperature": None, "top_p": None}, {}),
        ({"min_p": 0.1, "max_new_tokens": 2048}, {"min_p": 0.1, "max_tokens": 2048}),
        ({"min_new_tokens": 3, "max_length": 20}, {"min_tokens": 3}),
    ],
)
def test_sampling_defaults(generation_config, expected):
    assert read_sampling_defaults(generation_config) == expected


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("temperature", "hot", "temperature"),
        ("temperature", -1, "temperature"),
        ("top_k", 1.5, "top_k"),
        ("top_p", 2, "top_p"),
        ("max_new_tokens", 0, "max_tokens"),
        ("repetition_penalty", True, "repetition_penalty"),
    ],
)
def test_a_bad_value_is_named(field, value, named):
    with pytest.raises(CheckpointError, match=rf"generation_config\.json: {named}"):
        read_sampling_defaults({field: value})


def test_what_is_not_supported_is_said(caplog):
    asked = {"num_beams": 4, "typical_p": 1.0, "bad_words_ids": [[1]], "guidance_scale": None}
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults(asked) == {}
    said = " ".join(caplog.messages)
    assert "num_beams=4" in said
    assert "bad_words_ids" in said
    assert "typical_p" not in said
    assert "guidance_scale" not in said


@pytest.mark.parametrize(
    ("generation_config", "model_config", "tokenizer", "expected"),
    [
        (QWEN3, {"eos_token_id": 1}, NO_EOS, (151645, 151643)),
        ({"eos_token_id": 7}, {"eos_token_id": 1}, NO_EOS, (7,)),
        ({"eos_token_id": None}, {"eos_token_id": [1, 2, 1]}, NO_EOS, (1, 2)),
        ({"eos_token_id": []}, {}, NamedEos({"eos_token": "</s>"}, {"</s>": 2}), (2,)),
        ({}, {}, NamedEos({"eos_token": "</s>"}, {}), ()),
        ({}, {}, NO_EOS, ()),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, NO_EOS, (0,)),
    ],
)
def test_eos_token_ids(generation_config, model_config, tokenizer, expected):
    assert read_eos_token_ids(generation_config, model_config, tokenizer) == expected


@pytest.mark.parametrize("value", ["</s>", [1, "2"], [True], 1.5, -1, {"id": 1}])
def test_a_bad_eos_names_its_file(value):
    with pytest.raises(CheckpointError, match=r"^generation_config\.json: eos_token_id"):
        read_eos_token_ids({"eos_token_id": value}, {}, NO_EOS)
    with pytest.raises(CheckpointError, match=r"^config\.json: eos_token_id"):
        read_eos_token_ids({}, {"eos_token_id": value}, NO_EOS)
