"""What a checkpoint's ``generation_config.json`` says: where to stop, and how to sample."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from ember_pp.errors import CheckpointError, InvalidRequestError
from ember_pp.sampling_params import SamplingParams

_LOG = logging.getLogger(__name__)


class EosSource(Protocol):
    """The part of ``Tokenizer`` that knows the end-of-text token."""

    @property
    def special_tokens(self) -> Mapping[str, str]: ...

    def token_id(self, token: str) -> int | None: ...


def read_eos_token_ids(
    generation_config: Mapping[str, Any],
    model_config_json: Mapping[str, Any],
    tokenizer: EosSource | None,
) -> tuple[int, ...]:
    """Ids that end a text: the first of ``generation_config.json``, ``config.json`` and the
    tokenizer's ``eos_token`` that names any.

    Raises:
        CheckpointError: ``eos_token_id`` is neither an id nor a list of ids; names the file.
    """
    sources = {"generation_config.json": generation_config, "config.json": model_config_json}
    for name, source in sources.items():
        given = source.get("eos_token_id")
        if given is None or given == []:
            continue
        token_ids = given if isinstance(given, list) else [given]
        if not all(type(token_id) is int and token_id >= 0 for token_id in token_ids):
            raise CheckpointError(f"{name}: eos_token_id: expected token ids, got {given!r}")
        return tuple(dict.fromkeys(token_ids))
    if tokenizer is None:
        return ()
    token = tokenizer.special_tokens.get("eos_token")
    token_id = None if token is None else tokenizer.token_id(token)
    return () if token_id is None else (token_id,)


_GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_FIELDS_OF_A_DRAW = ("top_k", "top_p", "min_p")
_UNSUPPORTED_GENERATION_FIELDS = {  # with the values that ask for nothing
    "num_beams": (1,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
}


def read_sampling_defaults(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """``SamplingParams`` fields that a checkpoint's ``generation_config.json`` sets.

    ``do_sample: false`` is temperature 0, whatever else it says of the draw. What it asks for
    and we do not have is named in a warning.

    Raises:
        CheckpointError: a field has the wrong type or is out of range; names it.
    """
    defaults = {
        ours: generation_config[theirs]
        for theirs, ours in _GENERATION_FIELDS.items()
        if generation_config.get(theirs) is not None
    }
    if generation_config.get("do_sample") is False:
        for name in _FIELDS_OF_A_DRAW:
            defaults.pop(name, None)
        defaults["temperature"] = 0.0
    for name, neutral in _UNSUPPORTED_GENERATION_FIELDS.items():
        value = generation_config.get(name)
        if value is not None and value not in neutral:
            _LOG.warning("generation_config.json: %s=%r is not supported", name, value)
    try:
        SamplingParams.from_mapping(defaults)
    except (InvalidRequestError, OverflowError) as error:
        raise CheckpointError(f"generation_config.json: {error}") from None
    return defaults
