"""From a completion to the line that answers a request of a batch."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ember_pp.client import Completion
from ember_pp.jobs import openai
from ember_pp.jobs.batch_requests import Item
from ember_pp.tokenizer import Tokenizer

REQUEST_HASH_KEY = "request_hash"


class AnswerWriter:
    """Writes answer and error lines; reads the model's tokenizer only if an answer needs it.

    Args:
        folder: of the model; None when it is not on this machine. Then log-probabilities name
            tokens by id, and thinking is recognised by its closing tag alone.
        model_name: for the ``model`` of the answers.
    """

    def __init__(self, folder: Path | None, model_name: str | None) -> None:
        self._folder = folder
        self._model_name = model_name
        self._is_thinking_open = functools.lru_cache(maxsize=64)(self._opens_thinking)

    def answer(self, item: Item, completion: Completion) -> bytes:
        """The output line, with the hash by which a later run knows the request again."""
        request = item.request
        tokenizer = self._tokenizer if request.has_logprobs else None
        is_open = None
        if request.kind == "chat":
            is_open = self._is_thinking_open(json.dumps(request.template_kwargs, sort_keys=True))
        body = openai.success_body(
            request,
            completion,
            created=int(time.time()),
            model_name=self._model_name,
            token_bytes=None if tokenizer is None else tokenizer.token_bytes,
            is_thinking_open=is_open,
        )
        line = openai.output_line(request, body)
        return encode_line({**line, REQUEST_HASH_KEY: item.request_hash})

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer | None:
        if self._folder is None or not (self._folder / "tokenizer.json").is_file():
            return None
        return Tokenizer.load(self._folder)

    def _opens_thinking(self, template_kwargs: str) -> bool | None:
        tokenizer = self._tokenizer
        if tokenizer is None or not tokenizer.has_chat_template:
            return None
        return tokenizer.opens_thinking(json.loads(template_kwargs))


def encode_line(line: Mapping[str, Any]) -> bytes:
    """``line`` as JSON on one line, in UTF-8, with its line feed."""
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"
