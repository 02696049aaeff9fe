"""``job=chat``: a chat in the terminal that streams, keeps its history and can be interrupted."""

from __future__ import annotations

import sys
import time
from typing import Any

from ember_pp.client import Client
from ember_pp.config import ChatJob, Config
from ember_pp.errors import EXIT_OK, InvalidRequestError
from ember_pp.jobs.session import open_client
from ember_pp.tokenizer import split_reasoning

_HELP = "/new starts over, /quit or Ctrl-D ends, Ctrl-C stops an answer"


def run(config: Config) -> int:
    """Chat until the input ends; returns the exit code."""
    if not isinstance(config.job, ChatJob):
        raise AssertionError("dispatched by job.name")
    with open_client(config) as client:
        model = _wait_until_ready(client)
        _say(f"{model}: {_HELP}\n")
        _Chat(client, config.job).run()
    return EXIT_OK


def _say(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _wait_until_ready(client: Client) -> str:
    """The path of the model that answers."""
    _say("loading ...")
    while (status := client.status())["phase"] != "ready":
        time.sleep(0.2)
    _say("\r            \r")
    return str(status["model"]["path"])


class _Chat:
    def __init__(self, client: Client, job: ChatJob) -> None:
        self._client = client
        self._template_kwargs: dict[str, Any] = {}
        if job.enable_thinking is not None:
            self._template_kwargs["enable_thinking"] = job.enable_thinking
        self._opening = [{"role": "system", "content": job.system}] if job.system else []
        self._messages: list[dict[str, Any]] = list(self._opening)

    def run(self) -> None:
        while True:
            try:
                text = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                _say("\n")
                return
            if text == "/quit":
                return
            if text == "/new":
                self._messages = list(self._opening)
            elif text.startswith("/"):
                _say(f"{_HELP}\n")
            elif text:
                self._answer(text)

    def _answer(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        parts: list[str] = []
        stream = self._client.stream(messages=messages, template_kwargs=self._template_kwargs)
        try:
            for delta in stream:
                parts.append(delta.text)
                sys.stdout.write(delta.text)
                sys.stdout.flush()
        except KeyboardInterrupt:
            stream.close()  # type: ignore[attr-defined]  # a generator: cancels the request
            _say(" [stopped]")
        except InvalidRequestError as error:
            _say(f"{error}\n")
            return
        sys.stdout.write("\n")
        _, content = split_reasoning("".join(parts))
        self._messages = [*messages, {"role": "assistant", "content": content}]
