"""From a client's ``Submit`` to a request that can be scheduled, or a refusal that names why."""

from __future__ import annotations

from typing import Any

from ember_pp import protocol
from ember_pp.config import Config
from ember_pp.coordinator.preparation import Preparation
from ember_pp.coordinator.request import Request
from ember_pp.coordinator.sequence import Sequence
from ember_pp.errors import InvalidRequestError
from ember_pp.sampling_params import SamplingParams, check_against_vocabulary, derive_seed
from ember_pp.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer

_CHARACTERS_PER_TOKEN = 16  # English has about 4


class Admission:
    """Turns submissions into requests, with the defaults and limits of this run."""

    def __init__(self, config: Config, preparation: Preparation) -> None:
        self._preparation = preparation
        self._tokenizer = preparation.tokenizer
        self._base_seed = config.sampling.seed
        self._eos_token_ids = frozenset(preparation.eos_token_ids)
        limits = config.coordinator
        self._sizes = limits.sampling_sizes
        most_tokens = limits.max_prompt_tokens or preparation.max_model_len
        self._max_characters = limits.max_prompt_characters or (
            _CHARACTERS_PER_TOKEN * min(most_tokens, preparation.max_model_len)
        )

    def admit(self, client: bytes, submit: protocol.Submit) -> Request:
        """The request in ``submit``.

        Raises:
            InvalidRequestError: a field is unknown or out of range, or the prompt is empty or
                not in the vocabulary, or something is larger than a setting allows, which the
                text names beside the field. Lengths are the scheduler's to check, which knows
                what fits.
        """
        fields = {**self._preparation.sampling_defaults, **_given(submit.sampling)}
        self._sizes.check(fields)
        params = SamplingParams.from_mapping(fields)
        check_against_vocabulary(params, self._preparation.model_config.vocab_size)
        if params.stop and self._tokenizer is None:
            raise InvalidRequestError("stop: this model has no tokenizer; use stop_token_ids")
        prompt_ids = self._prompt_ids(submit)
        self._check_prompt(prompt_ids)
        return Request(
            request_id=submit.request_id,
            client=client,
            sequence=Sequence(
                request_id=submit.request_id,
                prompt_ids=prompt_ids,
                params=params,
                seed=self._seed(params, submit.seed_key or submit.request_id),
            ),
            params=params,
            eos_token_ids=self._eos_token_ids,
            stream=submit.stream,
            detokenizer=_detokenizer(self._tokenizer, params),
            matcher=StopMatcher(params.stop) if params.stop else None,
        )

    def _prompt_ids(self, submit: protocol.Submit) -> list[int]:
        given = [
            name
            for name in ("prompt", "messages", "token_ids")
            if getattr(submit, name) is not None
        ]
        if len(given) != 1:
            raise InvalidRequestError(
                f"expected one of prompt, messages and token_ids; got {given or 'none'}"
            )
        if submit.token_ids is not None:
            return list(protocol.unpack_i32(submit.token_ids))
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{given[0]}: this model has no tokenizer.json; send token_ids"
            )
        if submit.prompt is not None:
            self._check_characters("prompt", submit.prompt)
            return self._tokenizer.encode(submit.prompt)
        text = self._tokenizer.render_chat(submit.messages or [], submit.template_kwargs)
        self._check_characters("messages", text)
        return self._tokenizer.encode_rendered(text)

    def _check_characters(self, field: str, text: str) -> None:
        # Tokenising takes seconds for megabytes, and whoever comes after has to wait for it.
        if len(text) > self._max_characters:
            raise InvalidRequestError(
                f"{field}: {len(text)} characters; at most {self._max_characters} "
                "(coordinator.max_prompt_characters)"
            )

    def _check_prompt(self, prompt_ids: list[int]) -> None:
        if not prompt_ids:
            raise InvalidRequestError("prompt: empty; give at least one token")
        vocab_size = self._preparation.model_config.vocab_size
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            raise InvalidRequestError(f"token_ids: expected ids in [0, {vocab_size})")

    def _seed(self, params: SamplingParams, seed_key: str) -> int:
        if params.seed is not None:
            return params.seed % 2**64
        return derive_seed(self._base_seed, seed_key)


def _given(sampling: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def _detokenizer(
    tokenizer: Tokenizer | None, params: SamplingParams
) -> IncrementalDetokenizer | None:
    if tokenizer is None:
        return None
    return IncrementalDetokenizer(tokenizer, params.skip_special_tokens)
