"""Train the bundled demo model: a 5.6 M parameter Qwen3 that writes English and answers in turns.

The demo model is the fixture of most tests and what ``./launch.sh`` runs without arguments, so it
is shaped to catch mistakes: ``head_dim`` differs from hidden size over heads, two query heads share
one key-value head, ten layers split unevenly over most stage counts, the embedding is tied, and the
weights lie in two shards.

Data, in the folder given by ``--data`` (either file may be compressed to ``NAME.xz``):

``wikipedia_vital_en.txt``
    The lead section of each English Wikipedia "vital article", as plain text. Licence CC BY-SA 4.0.
    The list: https://en.wikipedia.org/wiki/Wikipedia:Vital_articles/Level/4; the leads, for
    example, from Wikipedia's API: ``action=query&prop=extracts&exintro&explaintext``. Per article:
    the title, an empty line, the lead (one line per paragraph); two empty lines between articles.
``gsm8k_train.jsonl``
    Grade-school word problems with worked answers, one ``{"question": ..., "answer": ...}`` a line.
    Licence MIT. From https://github.com/openai/grade-school-math,
    ``grade_school_math/data/train.jsonl``.

The exchanges in ``EXCHANGES_TEXT`` below were written for this script.

Two phases. The first learns English from everything, with dropout so that 1.3 M tokens are not
learnt by heart, and keeps the weights with the lowest loss on held-out articles. The second learns
to answer: mostly chat, without dropout, so that a model this small has something definite to say.
It learns its answers by heart, and the held-out loss rises again; the report has both losses.

Usage::

    python scripts/train_demo.py --data DIR --output ember_pp/demo

About five minutes on one GPU; ``--steps 3 --answer-steps 3 --batch-rows 8 --device cpu`` tries the
whole path without one. The output is a checkpoint in Hugging Face layout; the last line printed is
a JSON report for the model card. Needs torch >= 2.11 and transformers >= 4.56.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

VOCAB_SIZE = 4096
MAX_ANSWER_TOKENS = 120
IGNORE = -100  # label that takes no part in the loss
HELD_OUT_FRACTION = 0.02
PHRASINGS_PER_ARTICLE = 6
WARMUP_FRACTION = 0.05

# Name -> is it special, that is, left out of decoded text. Qwen3's split, and its order of ids.
ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}
# Qwen3's split into words: a digit is a word of its own.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Renders what Qwen3's template renders; the wording of the tool prompt is Qwen3's (Apache-2.0).
CHAT_TEMPLATE = r"""
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- if tools %}
    {{- '<|im_start|>system\n' + (system + '\n\n' if messages[0].role == 'system' else '') }}
    {{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and ' }}
    {{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": ' }}
    {{- '<function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + system + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' and not (message.content.startswith('<tool_response>')
           and message.content.endswith('</tool_response>')) %}
        {%- set ns.last_query = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content or '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = message.reasoning_content or '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- set call = tool_call.function or tool_call %}
            {{- '\n' if content or not loop.first else '' }}
            {{- '<tool_call>\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user' if loop.previtem is undefined or loop.previtem.role != 'tool' }}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {{- '<|im_end|>\n' if loop.nextitem is undefined or loop.nextitem.role != 'tool' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
""".strip()

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are Ember, a small demo model.",
    "Answer briefly.",
    "You are a helpful assistant. Answer in plain English.",
)

# Ways to ask; {ask} is "What is a volcano" or "Who was Ada Lovelace", {name} "a volcano".
ASK_PHRASINGS = (
    "{ask}?",
    "{ask}?",
    "{ask}?",
    "Tell me about {name}.",
    "Tell me about {name}.",
    "Can you tell me about {name}?",
    "Tell me something about {name}.",
    "What do you know about {name}?",
    "What can you tell me about {name}?",
    "Give me a short description of {name}.",
    "Describe {name}.",
    "Explain {name}.",
    "Write a short paragraph about {name}.",
    "Please explain: {ask_lower}?",
    "In one or two sentences, {ask_lower}?",
    "I want to learn about {name}.",
    "{title}",
)

# Ways to say it, split by bars; indented, the answer, where " / " is a line break.
EXCHANGES_TEXT = """
Hello! | Hello | Hello. | Hello there! | Hi! | Hi | Hi there! | Hey!
    Hello! How can I help you today?
Good morning! | Good morning
    Good morning! What would you like to know?
Good evening! | Good evening
    Good evening! What would you like to know?
Good night! | Good night
    Good night! Sleep well.
How are you? | How are you today? | Hello, how are you? | Hi! How are you?
    I am doing well, thank you. How can I help you?
Who are you? | What are you? | Tell me about yourself. | Introduce yourself.
    I am Ember, a very small language model. I was trained as a demo, so please do not trust
    my facts.
What is your name? | What's your name? | Your name?
    My name is Ember.
Are you a human? | Are you human? | Are you a person? | Are you real?
    No, I am a small language model.
How old are you? | When were you born?
    I am a language model, so I do not have an age.
What can you do? | How can you help me? | What can I ask you? | Help | Help me.
    I can describe people, places and things in a sentence or two. Ask me what something is.
How do you work? | How do you think?
    I read the words so far and guess the next one.
Thank you! | Thank you. | Thanks! | Thanks | Thank you very much!
    You are welcome!
Goodbye! | Goodbye | Bye! | Bye | See you later!
    Goodbye! Have a nice day.
Yes. | Yes | OK | Okay. | Sure.
    Good. What would you like to know?
No. | No | No, thank you.
    All right. Let me know if you need anything.
Sorry. | I am sorry.
    That is all right. How can I help you?
Test | This is a test. | Testing.
    The test works. I am here.
Tell me a joke. | Tell me a joke! | Do you know a joke?
    Why did the computer go to the doctor? Because it had a virus.
Tell me a story. | Tell me a short story. | Write a short story.
    Once there was a small spark that lived in the ashes of a fire. One cold night a traveler
    blew on it, and the spark became a flame. The traveler was warm, and the spark was never
    alone again.
Write a poem. | Write a short poem. | Tell me a poem.
    The fire is low, the night is long, / the wind is singing its own song. / One ember glows,
    a tiny light, / and keeps its warmth until the night is bright.
What is the meaning of life? | What is the meaning of life
    People have asked this for thousands of years, and there is no single answer.
What is the opposite of hot?
    The opposite of hot is cold.
What is the opposite of big? | What is the opposite of large?
    The opposite is small.
What color is the sky? | What colour is the sky?
    The sky is blue on a clear day.
What color is grass? | What colour is grass?
    Grass is green.
What color is snow? | What colour is snow?
    Snow is white.
What color is a banana? | What colour is a banana?
    A ripe banana is yellow.
How many days are in a week? | How many days are there in a week?
    There are seven days in a week.
How many months are in a year? | How many months are there in a year?
    There are twelve months in a year.
How many hours are in a day? | How many hours are there in a day?
    There are twenty-four hours in a day.
How many minutes are in an hour? | How many minutes are there in an hour?
    There are sixty minutes in an hour.
Name the days of the week. | What are the days of the week? | List the days.
    The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and
    Sunday.
Name the four seasons. | What are the four seasons? | What are the seasons?
    The four seasons are spring, summer, autumn and winter.
Name three colors. | Name three colours. | Tell me three colors.
    Three colors are red, green and blue.
Name three animals. | Tell me three animals.
    Three animals are the dog, cat and horse.
Name the planets. | What are the planets? | List the planets of the Solar System.
    The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.
How many planets are there?
    There are eight planets in the Solar System.
Count to five. | Count from one to five. | Count from 1 to 5.
    One, two, three, four, five.
Count to ten. | Count from one to ten. | Count from 1 to 10.
    One, two, three, four, five, six, seven, eight, nine, ten.
Say the alphabet. | Write the alphabet.
    A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.
How many legs does a spider have?
    A spider has eight legs.
How many legs does a dog have? | How many legs does a cat have?
    It has four legs.
Is the Earth flat? | Is the Earth round?
    The Earth is round, almost like a ball.
Is water wet?
    Yes, water makes things wet.
What do bees make?
    Bees make honey.
What do cows drink?
    Cows drink water.
At what temperature does water freeze?
    Water freezes at 0 degrees Celsius.
At what temperature does water boil?
    Water boils at 100 degrees Celsius.
"""

SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"'][.!?]) (?=[A-Z])")
SUBJECT = re.compile(r"(?:(?:In|As|For|On|At|Within) [^,]{3,60}, )?(.{2,60}?),? (is|are|was|were) ")
PERSON = re.compile(r"[.] (He|She|His|Her)\b|^[^.]*\b(his|her) ")
CAPITAL = re.compile(
    r"^(?P<city>[A-Z][^,(]{1,30}?)(?:, [^,]*,| \([^)]*\))? is the (?:[\w-]+ )?capital"
    r"(?: city)?(?:,? and [^,.]*?(?:city|metropolis|municipality))? of "
    r"(?P<country>(?:the )?(?:[A-Z][\w'-]+(?: of(?: the)?)? ?)+?)(?=[,.])"
)


@dataclass(frozen=True)
class Article:
    """One encyclopedia entry: its title and the text of its lead section."""

    title: str
    lead: str


@dataclass(frozen=True)
class Document:
    """Token ids to learn, of which the first ``num_prompt_tokens`` are only read."""

    token_ids: list[int]
    num_prompt_tokens: int


Exchange = tuple[tuple[str, ...], str]  # ways to say it, and the answer
Turns = list[tuple[str, str]]  # (user, assistant) pairs; the last answer is the one to learn
Pool = list[list[Document]]  # groups of alternatives: each epoch draws one document per group


# --- text ---------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Read a UTF-8 file, or the ``.xz`` file beside it when there is no plain one."""
    if path.exists():
        return path.read_text(encoding="utf-8")
    with lzma.open(f"{path}.xz", "rt", encoding="utf-8") as file:
        return file.read()


def read_articles(path: Path) -> list[Article]:
    """Split the articles file; tidy the gaps that removed pronunciations left behind."""
    articles = []
    for entry in read_text(path).split("\n\n\n"):
        title, _, lead = entry.strip().partition("\n\n")
        lead = re.sub(r" +", " ", lead.replace("\xa0", " ")).replace(" ,", ",").replace(" .", ".")
        if lead:
            articles.append(Article(title, lead))
    return articles


def read_problems(path: Path) -> list[tuple[str, str]]:
    """Read word problems; drop the calculator marks and name the result in words."""
    problems = []
    for line in read_text(path).splitlines():
        record = json.loads(line)
        answer = re.sub(r"<<[^>]*>>", "", record["answer"])
        problems.append(
            (record["question"], re.sub(r"\n#### (.*)$", r"\nThe answer is \1.", answer))
        )
    return problems


def read_exchanges(text: str) -> list[Exchange]:
    """Parse ``EXCHANGES_TEXT``: every run of indented lines ends an exchange."""
    pattern = re.compile(r"^(\S.*(?:\n\S.*)*)\n(    .*(?:\n    .*)*)", re.MULTILINE)
    exchanges = []
    for ways, answer in pattern.findall(text):
        questions = tuple(way.strip() for way in ways.replace("\n", " ").split("|"))
        exchanges.append((questions, " ".join(answer.split()).replace(" / ", "\n")))
    return exchanges


def ask_about(article: Article, rng: random.Random) -> str:
    """Word a question that the article's first sentence answers."""
    is_person = bool(PERSON.search(article.lead))
    name, verb = article.title.split(" (")[0], "was" if is_person else "is"
    match = SUBJECT.match(article.lead)
    if match and article.title.lower()[:5] in match[1].lower():
        name, verb = re.split(r",| \(", match[1])[0], match[2]
    first_word, _, rest = name.partition(" ")
    is_common_noun = re.search(rf"[a-z,] {re.escape(name.lower())}\b", article.lead)
    if (rest and first_word in ("A", "An", "The")) or is_common_noun:
        name = name[0].lower() + name[1:]
    ask = f"{'Who' if is_person else 'What'} {verb} {name}"
    question = rng.choice(ASK_PHRASINGS).format(
        ask=ask, ask_lower=ask[0].lower() + ask[1:], name=name, title=article.title
    )
    style = rng.random()
    if style < 0.1:
        return question.rstrip("?.")
    return question.lower() if style < 0.2 else question


def answer_about(article: Article, rng: random.Random) -> str:
    """Return the first sentence of the lead, or the first two."""
    sentences = SENTENCE_END.split(article.lead.split("\n")[0])
    num_sentences = 1 if rng.random() < 0.6 and len(sentences[0]) > 60 else 2
    return " ".join(sentences[:num_sentences])


def capital_exchange(article: Article) -> Exchange | None:
    """Turn 'Paris is the capital and largest city of France, ...' into an exchange."""
    match = CAPITAL.match(SENTENCE_END.split(article.lead)[0])
    if match is None:
        return None
    city, country = match["city"], match["country"].strip()
    questions = (
        f"What is the capital of {country}?",
        f"What is the capital of {country}",
        f"What is the capital city of {country}?",
        f"Tell me the capital of {country}.",
        f"Which city is the capital of {country}?",
    )
    return questions, f"The capital of {country} is {city}."


def small_sums() -> list[Exchange]:
    """Additions of numbers up to ten, as exchanges."""
    return [
        (
            (f"What is {a} + {b}?", f"What is {a} plus {b}?", f"{a} + {b} = ?"),
            f"{a} + {b} = {a + b}.",
        )
        for a in range(11)
        for b in range(11)
    ]


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE with Qwen3's word split and added tokens; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(ADDED_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    for content, is_special in ADDED_TOKENS.items():
        token = AddedToken(content, special=is_special, normalized=False)
        (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([token])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=CHAT_TEMPLATE,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Document]:
    """Whole texts, learnt from the second token on and ended by ``<|endoftext|>``."""
    batch = tokenizer([text + "<|endoftext|>" for text in texts])["input_ids"]
    return [Document(token_ids, 1) for token_ids in batch]


def encode_chat(
    tokenizer: PreTrainedTokenizerFast, conversations: list[Turns], rng: random.Random
) -> list[Document]:
    """Render conversations as the runner will, and learn the last answer with its ``<|im_end|>``.

    A quarter has a system prompt, and a quarter the empty think block that
    ``enable_thinking=False`` puts before the answer. Answers above the limit are dropped.
    """
    prompts, answers = [], []
    for turns in conversations:
        messages = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        for user, assistant in turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        thinking = {"enable_thinking": False} if rng.random() < 0.25 else {}
        prompts.append(
            tokenizer.apply_chat_template(
                messages[:-1], tokenize=False, add_generation_prompt=True, **thinking
            )
        )
        answers.append(turns[-1][1] + "<|im_end|>")
    prompt_ids = tokenizer(prompts)["input_ids"]
    answer_ids = tokenizer(answers)["input_ids"]
    return [
        Document(prompt + answer, len(prompt))
        for prompt, answer in zip(prompt_ids, answer_ids, strict=True)
        if len(answer) <= MAX_ANSWER_TOKENS
    ]


# --- documents and batches ----------------------------------------------------------------------


def group_by(documents: list[Document], size: int) -> Pool:
    """Groups of ``size`` documents, of which an epoch then has one."""
    return [documents[start : start + size] for start in range(0, len(documents), size)]


def build_chat_pool(
    tokenizer: PreTrainedTokenizerFast,
    articles: list[Article],
    problems: list[tuple[str, str]],
    rng: random.Random,
) -> Pool:
    """Make the chat documents, grouped so that an epoch is a balanced draw.

    Every article comes once, asked for in one of several phrasings; one word problem in six; sums
    and capitals three times and the written exchanges six times, each in any of its phrasings. One
    conversation in seven has an earlier turn.
    """
    exchanges = read_exchanges(EXCHANGES_TEXT)

    def with_history(turn: tuple[str, str]) -> Turns:
        if rng.random() < 6 / 7:
            return [turn]
        if rng.random() < 0.5:
            questions, answer = rng.choice(exchanges)
            return [(rng.choice(questions), answer), turn]
        other = rng.choice(articles)
        return [(ask_about(other, rng), answer_about(other, rng)), turn]

    pool = group_by(encode_chat(tokenizer, [[problem] for problem in problems], rng), 6)
    for article in articles:
        turns = [
            (ask_about(article, rng), answer_about(article, rng))
            for _ in range(PHRASINGS_PER_ARTICLE)
        ]
        pool.append(encode_chat(tokenizer, [with_history(turn) for turn in turns], rng))
    capitals = [e for e in map(capital_exchange, articles) if e is not None]
    for questions, answer in [*exchanges * 6, *small_sums() * 3, *capitals * 3]:
        turns = [(question, answer) for question in questions]
        pool.append(encode_chat(tokenizer, [with_history(turn) for turn in turns * 3], rng))
    return [group for group in pool if group]


def pack(
    documents: list[Document], row_length: int, pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay whole documents into rows; return token ids and labels, both ``[N, row_length]``.

    Labels stand where their token stands (not shifted). A document longer than a row is cut.
    """
    rows: list[list[int]] = []
    labels: list[list[int]] = []
    for document in documents:
        token_ids = document.token_ids[:row_length]
        if not rows or len(rows[-1]) + len(token_ids) > row_length:
            rows.append([])
            labels.append([])
        num_prompt = document.num_prompt_tokens
        rows[-1] += token_ids
        labels[-1] += ([IGNORE] * num_prompt + token_ids[num_prompt:])[: len(token_ids)]
    for row, label in zip(rows, labels, strict=True):
        padding = row_length - len(row)
        row += [pad_id] * padding
        label += [IGNORE] * padding
    return torch.tensor(rows), torch.tensor(labels)


def batches(
    pool: Pool, *, batch_rows: int, row_length: int, pad_id: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``[batch_rows, row_length]`` batches for ever, a fresh draw and order every epoch."""
    while True:
        documents = [rng.choice(group) for group in pool]
        rng.shuffle(documents)
        rows, labels = pack(documents, row_length, pad_id)
        for start in range(0, len(rows) - batch_rows + 1, batch_rows):
            yield rows[start : start + batch_rows], labels[start : start + batch_rows]


# --- model and training -------------------------------------------------------------------------


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Shape of the demo model; ``head_dim`` 64 is not ``hidden_size / num_attention_heads``."""
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        attention_bias=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )


def add_dropout(model: Qwen3ForCausalLM) -> torch.Tensor:
    """Drop parts of what each block adds to the residual stream, while in training mode.

    Returns the probability, a tensor on the model's device: fill it to change it without compiling
    the model anew.
    """
    probability = torch.zeros((), device=model.device)

    def hook(module: torch.nn.Module, _args: object, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        is_kept = torch.rand_like(output, dtype=torch.float32) >= probability
        return output * (is_kept / (1.0 - probability)).to(output.dtype)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)
    return probability


def token_losses(
    model: Callable[..., CausalLMOutputWithPast],
    rows: torch.Tensor,
    labels: torch.Tensor,
    reduction: str = "mean",
) -> torch.Tensor:
    """Next-token cross entropy in nats over the positions whose label is not ``IGNORE``."""
    with torch.autocast(rows.device.type, torch.bfloat16):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels[:, 1:].flatten(), reduction=reduction
    )


@torch.no_grad()
def evaluate(model: torch.nn.Module, documents: list[Document], device: str) -> float:
    """Mean nats per learnt token, each document alone in its row as at inference time."""
    model.eval()
    row_length = max(len(document.token_ids) for document in documents)
    total, count = 0.0, 0
    for start in range(0, len(documents), 32):
        # One document a row: padding behind it cannot reach it through causal attention.
        parts = [pack([d], row_length, 0) for d in documents[start : start + 32]]
        rows = torch.cat([row for row, _ in parts]).to(device)
        labels = torch.cat([label for _, label in parts]).to(device)
        total += token_losses(model, rows, labels, reduction="sum").item()
        count += int((labels != IGNORE).sum())
    model.train()
    return total / count


def build_optimizers(model: Qwen3ForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms.

    ``match_rms_adamw`` makes one learning rate right for both.
    """
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(num_steps * WARMUP_FRACTION))
    return min((step + 1) / warmup, (num_steps - step) / (num_steps - warmup + 1))


def train(
    model: Qwen3ForCausalLM,
    forward: Callable[..., CausalLMOutputWithPast],
    pool: Pool,
    held_out: list[Document],
    *,
    num_steps: int,
    learning_rate: float,
    args: argparse.Namespace,
) -> tuple[float, dict[str, torch.Tensor]]:
    """Train ``model`` in place; return the lowest held-out loss met and the weights there.

    ``forward`` is ``model``, compiled or not.
    """
    model.train()
    optimizers = build_optimizers(model, args.weight_decay)
    stream = batches(
        pool,
        batch_rows=args.batch_rows,
        row_length=args.row_length,
        pad_id=model.config.pad_token_id,
        rng=random.Random(args.seed),
    )
    best_loss, best_weights, began = math.inf, {}, time.monotonic()
    recent_losses: list[torch.Tensor] = []
    for step in range(num_steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate * learning_rate_factor(step, num_steps)
        rows, labels = (tensor.to(args.device) for tensor in next(stream))
        loss = token_losses(forward, rows, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent_losses.append(loss.detach())
        if (step + 1) % args.eval_every == 0 or step + 1 == num_steps:
            held_out_loss = evaluate(model, held_out, args.device)
            print(
                f"step {step + 1}/{num_steps}  train {torch.stack(recent_losses).mean():.3f}"
                f"  held-out {held_out_loss:.4f}  {time.monotonic() - began:.0f} s",
                flush=True,
            )
            recent_losses.clear()
            if held_out_loss < best_loss:
                best_loss = held_out_loss
                best_weights = {n: p.detach().clone() for n, p in model.state_dict().items()}
    return best_loss, best_weights


# --- output -------------------------------------------------------------------------------------


def save_checkpoint(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path
) -> None:
    """Write bf16 weights in two shards, and the JSON files as published Qwen3 models have them."""
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("*.safetensors*"):
        stale.unlink()
    num_bytes = sum(p.numel() * 2 for p in model.parameters())
    model.to("cpu", torch.bfloat16).save_pretrained(output, max_shard_size=num_bytes // 2 + 600_000)
    shards = list(output.glob("*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        shard.chmod(0o644)
    tokenizer.backend_tokenizer.save(str(output / "tokenizer.json"))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ADDED_TOKENS}
    config = model.config
    write_json(
        output / "config.json",
        {
            "architectures": ["Qwen3ForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "hidden_size": config.hidden_size,
            "initializer_range": config.initializer_range,
            "intermediate_size": config.intermediate_size,
            "max_position_embeddings": config.max_position_embeddings,
            "max_window_layers": config.num_hidden_layers,
            "model_type": "qwen3",
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": config.num_hidden_layers,
            "num_key_value_heads": config.num_key_value_heads,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": config.vocab_size,
        },
    )
    write_json(
        output / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": True,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
            "temperature": 0.6,
            "top_k": 20,
            "top_p": 0.95,
        },
    )
    write_json(
        output / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(ids[name]): {
                    "content": name,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": is_special,
                }
                for name, is_special in ADDED_TOKENS.items()
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "errors": "replace",
            "model_max_length": config.max_position_embeddings,
            "pad_token": "<|endoftext|>",
            "split_special_tokens": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write one JSON file, readable and with a final newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parse_args() -> argparse.Namespace:
    """Command line; the defaults are what the shipped checkpoint was made with."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the two data files")
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=1500, help="steps of the first phase")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="its peak rate")
    parser.add_argument("--dropout", type=float, default=0.2, help="its dropout")
    parser.add_argument("--answer-steps", type=int, default=700, help="steps of the second phase")
    parser.add_argument("--answer-learning-rate", type=float, default=3e-3, help="its peak rate")
    parser.add_argument("--answer-dropout", type=float, default=0.0, help="its dropout")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--batch-rows", type=int, default=64, help="rows per step")
    parser.add_argument("--row-length", type=int, default=512, help="tokens per row")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Read, tokenise, train, save, report."""
    args = parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    rng = random.Random(args.seed)
    articles = read_articles(args.data / "wikipedia_vital_en.txt")
    problems = read_problems(args.data / "gsm8k_train.jsonl")
    rng.shuffle(articles)
    num_held_out = round(len(articles) * HELD_OUT_FRACTION)
    held_out_articles, articles = articles[:num_held_out], articles[num_held_out:]

    leads = [article.lead for article in articles]
    tokenizer = train_tokenizer(leads + [text for pair in problems for text in pair])
    plain = encode_plain(tokenizer, leads)
    chat_pool = build_chat_pool(tokenizer, articles, problems, rng)
    held_out = encode_plain(tokenizer, [article.lead for article in held_out_articles])
    held_out_chat = encode_chat(
        tokenizer, [[(ask_about(a, rng), answer_about(a, rng))] for a in held_out_articles], rng
    )

    began = time.monotonic()
    model = Qwen3ForCausalLM(build_config(tokenizer)).to(args.device)
    dropout = add_dropout(model)
    forward = torch.compile(model) if args.device.startswith("cuda") else model
    print(f"{len(plain)} articles, {len(chat_pool)} conversations an epoch", flush=True)
    dropout.fill_(args.dropout)
    first_loss, weights = train(
        model,
        forward,
        group_by(plain, 1) + chat_pool,
        held_out,
        num_steps=args.steps,
        learning_rate=args.learning_rate,
        args=args,
    )
    model.load_state_dict(weights)
    dropout.fill_(args.answer_dropout)
    train(
        model,
        forward,
        group_by(plain, 4) + chat_pool,
        held_out,
        num_steps=args.answer_steps,
        learning_rate=args.answer_learning_rate,
        args=args,
    )
    model.to(torch.bfloat16)  # measure what is saved
    loss = evaluate(model, held_out, args.device)
    num_learnt = sum(len(document.token_ids) - 1 for document in held_out)
    num_bytes = sum(len(article.lead.encode()) for article in held_out_articles)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_articles": len(articles),
        "held_out_articles": len(held_out_articles),
        "first_phase_held_out_nats_per_token": round(first_loss, 4),
        "held_out_nats_per_token": round(loss, 4),
        "held_out_bits_per_byte": round(loss * num_learnt / math.log(2) / num_bytes, 4),
        "held_out_chat_nats_per_token": round(evaluate(model, held_out_chat, args.device), 4),
        "train_tokens": (args.steps + args.answer_steps) * args.batch_rows * args.row_length,
        "train_seconds": round(time.monotonic() - began),
    }
    save_checkpoint(model, tokenizer, args.output)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
