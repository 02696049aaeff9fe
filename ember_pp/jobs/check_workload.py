"""What ``job=check`` asks: prompts as token ids, from files or a built-in set.

The built-in set is text of several kinds, since models treat text, code and other scripts
differently inside; where the model has no tokenizer it is ids at random. Most prompts are short,
so that many requests decode together; a few are longer than a plan holds.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from ember_pp.config import CheckJob, Config
from ember_pp.coordinator.preparation import Preparation
from ember_pp.errors import BatchInputError, CapacityError, ConfigError, InvalidRequestError
from ember_pp.jobs.batch_input import BatchInput, find_files
from ember_pp.jobs.batch_requests import BadLine, parse
from ember_pp.jobs.openai import BatchRequest
from ember_pp.tokenizer import Tokenizer

_LONG_EVERY = 128
"""One request of so many is long, the first among them."""
_LONG_TOKENS = 1024
"""Length of a long one, where neither the context nor one and a half plans are less: attention of
the plain kind, which it is compared with, takes memory by the square."""
_SHORT_TOKENS = (3, 24)

_PASSAGES = (
    "The river rises in the hills north of the town and reaches the sea after ninety miles. Its "
    "upper course is steep, and until the last century nobody had built a bridge there.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n"
    "    if len(ordered) % 2:\n        return ordered[middle]\n"
    "    return (ordered[middle - 1] + ordered[middle]) / 2\n",
    "Der Zug nach Leipzig f\u00e4hrt heute von Gleis 7 ab. Wegen Bauarbeiten dauert die Fahrt etwa "
    "zwanzig Minuten l\u00e4nger als \u00fcblich.",
    "Let n be an odd number. Then n = 2k + 1 for some k, so n^2 = 4k^2 + 4k + 1 = 4k(k + 1) + 1, "
    "and since k(k + 1) is even, n^2 leaves the remainder 1 when it is divided by 8.",
    "\u4eca\u5929\u7684\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u4e00\u8d77\u53bb\u516c\u56ed"
    "\u6563\u6b65\u5427\u3002\u665a\u4e0a\u53ef\u80fd\u4f1a\u4e0b\u96e8\u3002",
    '{"name": "sensor-12", "unit": "kPa", "values": [101.3, 101.1, 100.8], "is_calibrated": true}',
    "Question: A farmer has 17 sheep, and all but 9 run away. How many are left?\nAnswer: All but "
    "9 ran away, so 9 are left.",
    "SELECT city, COUNT(*) AS orders FROM sales WHERE year = 2019 GROUP BY city HAVING COUNT(*) > "
    "100 ORDER BY orders DESC;",
)


def make_prompts(config: Config, job: CheckJob, preparation: Preparation) -> list[list[int]]:
    """Token ids of every prompt.

    Raises:
        ConfigError: files are missing or have no prompts, or a prompt cannot be tokenised.
        BatchInputError: lines that are no requests.
        CapacityError: a prompt and its answer are longer than the context.
    """
    longest = preparation.max_model_len - job.output_tokens
    if longest < 1:
        raise CapacityError(
            f"job.output_tokens: {job.output_tokens} do not fit the context of "
            f"{preparation.max_model_len} (model.context_length)"
        )
    if job.input is None:
        return list(_built_in(config, job, preparation, longest))
    prompts = list(_read(config, job, preparation))
    if not prompts:
        raise ConfigError("job.input: no line with a prompt")
    for number, prompt in enumerate(prompts):
        if len(prompt) > longest:
            raise CapacityError(
                f"job.input: prompt {number + 1} has {len(prompt)} tokens; with an answer of "
                f"{job.output_tokens} the context of {preparation.max_model_len} holds {longest}"
            )
    return prompts


# --------------------------------------------------------------------------------------
# built in


def _built_in(
    config: Config, job: CheckJob, preparation: Preparation, longest: int
) -> Iterator[list[int]]:
    vocab_size = preparation.model_config.vocab_size
    long_tokens = min(longest, _LONG_TOKENS, config.scheduler.max_tokens_per_plan * 3 // 2)
    generator = random.Random(0)
    for index in range(job.requests):
        length = long_tokens
        if index % _LONG_EVERY:
            length = min(longest, generator.randint(*_SHORT_TOKENS))
        if preparation.tokenizer is None:
            yield [generator.randrange(vocab_size) for _ in range(length)]
        else:
            yield _text_of(preparation.tokenizer, index, length)


def _text_of(tokenizer: Tokenizer, index: int, length: int) -> list[int]:
    """``length`` tokens of text that begins differently for each ``index``."""
    token_ids = tokenizer.encode(f"{index}. {_PASSAGES[index % len(_PASSAGES)]}")
    following = index
    while len(token_ids) < length:
        following += 1
        token_ids += tokenizer.encode(" " + _PASSAGES[following % len(_PASSAGES)])
    return token_ids[:length]


# --------------------------------------------------------------------------------------
# from files


def _read(config: Config, job: CheckJob, preparation: Preparation) -> Iterator[list[int]]:
    max_line_bytes = config.coordinator.max_message_bytes
    source = BatchInput(find_files(job.input), max_line_bytes=max_line_bytes)
    try:
        for count, line in enumerate(source.lines()):
            if count == job.requests:
                return
            item = parse(line, max_line_bytes)
            place = source.place(line.number)
            if isinstance(item, BadLine):
                raise BatchInputError(f"{place}: {item.error}")
            try:
                yield _token_ids(item.request, preparation)
            except InvalidRequestError as error:
                raise BatchInputError(f"{place}: {error}") from None
    finally:
        source.close()


def _token_ids(request: BatchRequest, preparation: Preparation) -> list[int]:
    """As the coordinator makes them of the same line."""
    vocab_size, tokenizer = preparation.model_config.vocab_size, preparation.tokenizer
    if request.token_ids is not None:
        token_ids = request.token_ids
    elif tokenizer is None:
        raise InvalidRequestError("this model has no tokenizer.json; give token ids")
    elif request.prompt is not None:
        token_ids = tokenizer.encode(request.prompt)
    else:
        text = tokenizer.render_chat(request.messages or [], request.template_kwargs)
        token_ids = tokenizer.encode_rendered(text)
    if not token_ids or not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        raise InvalidRequestError(f"prompt: expected token ids in [0, {vocab_size}), at least one")
    return token_ids
