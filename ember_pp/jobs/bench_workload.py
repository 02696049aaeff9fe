"""The workloads of ``job=bench``: prompts as token ids, and what their tokens' arrivals mean."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from ember_pp.config import BenchJob
from ember_pp.errors import ConfigError

_BATCH = {"single": 1, "fixed": 64, "mixed": 256, "prefill": 8}
_INPUT = {"single": 128, "fixed": 512, "prefill": 2048}
_OUTPUT = {"single": 128, "fixed": 256, "prefill": 1}
_MIXED_VOCABULARY = 10_001
_MIXED_TEMPERATURE = 0.6


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """A prompt, and how many tokens are asked for."""

    token_ids: list[int]
    output_tokens: int

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.token_ids) + self.output_tokens


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchWorkload:
    """Requests that are sent at once, in this order."""

    name: str
    requests: list[BenchRequest]
    temperature: float
    """Where the job's settings do not say."""

    @property
    def batch(self) -> int:
        """Number of requests."""
        return len(self.requests)

    @property
    def input_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(request.token_ids) for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Of all answers."""
        return sum(request.output_tokens for request in self.requests)

    def turn(self, number: int, vocab_size: int) -> BenchWorkload:
        """The same lengths, and no prompt that begins as one of another turn: what the prefix
        cache keeps of one run must not make the next faster."""
        turned = [
            dataclasses.replace(
                request,
                token_ids=[(request.token_ids[0] + number) % vocab_size, *request.token_ids[1:]],
            )
            for request in self.requests
        ]
        return dataclasses.replace(self, requests=turned)


def make_workload(job: BenchJob, vocab_size: int, max_model_len: int) -> BenchWorkload:
    """What ``job`` describes, for a model with this vocabulary and context.

    ``mixed`` with its defaults draws lengths and ids as the benchmark of nano-vllm does, in the
    same order from the same generator, so that its 256 requests are the same ones.

    Raises:
        ConfigError: a request is longer than the context; names the setting.
    """
    name, batch = job.workload, job.batch or _BATCH[job.workload]
    generator = random.Random(job.seed)
    if name == "mixed":
        requests = _draw_mixed(generator, batch, job.lengths, min(vocab_size, _MIXED_VOCABULARY))
    else:
        input_tokens = job.input_tokens or _INPUT[name]
        requests = [
            BenchRequest(
                token_ids=[generator.randrange(vocab_size) for _ in range(input_tokens)],
                output_tokens=job.output_tokens or _OUTPUT[name],
            )
            for _ in range(batch)
        ]
    longest = max(requests, key=lambda request: request.length)
    if longest.length > max_model_len:
        keys = "job.lengths" if name == "mixed" else "job.input_tokens, job.output_tokens"
        raise ConfigError(
            f"{keys}: a prompt of {len(longest.token_ids)} and an answer of "
            f"{longest.output_tokens} tokens do not fit the context of {max_model_len} "
            "(model.context_length)"
        )
    temperature = _MIXED_TEMPERATURE if name == "mixed" else 0.0
    return BenchWorkload(name=name, requests=requests, temperature=temperature)


def _draw_mixed(
    generator: random.Random, batch: int, lengths: Sequence[int], vocab_size: int
) -> list[BenchRequest]:
    low, high = lengths
    prompts = [
        [generator.randint(0, vocab_size - 1) for _ in range(generator.randint(low, high))]
        for _ in range(batch)
    ]
    return [
        BenchRequest(token_ids=prompt, output_tokens=generator.randint(low, high))
        for prompt in prompts
    ]


# --------------------------------------------------------------------------------------
# what came when


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """The tokens of one answer as they came to the client."""

    input_tokens: int
    arrivals: list[tuple[float, int]]
    """(seconds since the requests were sent, tokens that came then), in order."""
    first_token: int
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""

    @property
    def output_tokens(self) -> int:
        """Tokens that came."""
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_s(self) -> float:
        """Time to the first token."""
        return self.arrivals[0][0]

    @property
    def end_s(self) -> float:
        """When the last token came."""
        return self.arrivals[-1][0]

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None where there is none."""
        num_after = self.output_tokens - self.arrivals[0][1]
        return (self.end_s - self.ttft_s) / num_after if num_after > 0 else None

    def tokens_by(self, time_s: float) -> int:
        """Tokens that had come at ``time_s``."""
        return sum(count for at_s, count in self.arrivals if at_s <= time_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SteadyDecode:
    """The part of a run in which every request decodes, and nothing else happens."""

    start_s: float
    end_s: float
    step_s: float
    """Time between two tokens of a sequence, on average."""
    steps: float
    """Tokens of each sequence, on average."""
    context_tokens: float
    """Tokens that all sequences together attend to, on average."""


def find_steady_decode(streams: Sequence[Stream]) -> SteadyDecode | None:
    """From the moment when all have their first token to the first that has its last; None where
    no sequence gets two tokens in it on average."""
    start_s = max(stream.ttft_s for stream in streams)
    end_s = min(stream.end_s for stream in streams)
    at_start = [stream.tokens_by(start_s) for stream in streams]
    at_end = [stream.tokens_by(end_s) for stream in streams]
    steps = (sum(at_end) - sum(at_start)) / len(streams)
    if end_s <= start_s or steps < 2:
        return None
    # A step attends to what was there before the token that it makes.
    prompts = sum(stream.input_tokens for stream in streams)
    return SteadyDecode(
        start_s=start_s,
        end_s=end_s,
        step_s=(end_s - start_s) / steps,
        steps=steps,
        context_tokens=prompts + (sum(at_start) + sum(at_end)) / 2,
    )
