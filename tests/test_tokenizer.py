"""Tokenizer: transformers is the oracle; streamed text equals the text decoded at once."""

import itertools
import json
import lzma
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from ember_pp.errors import CheckpointError, InvalidRequestError
from ember_pp.tokenizer import IncrementalDetokenizer, Tokenizer

DEMO = Path(__file__).parents[1] / "ember_pp" / "demo"
DATA = Path(os.environ.get("EMBER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The ship sailed at dawn, and nobody on the quay said a word.",
    "Das Boot fährt über den Fluß. L'été fut très chaud à Orléans.",
    "船は夜明けに出航した。 Корабль отплыл на рассвете. \U0001f6a2\U0001f30a",
    "def f(x):\n    return x ** 2  # 12345\n",
]
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "line one\n\n\tline two\r\n",
    "naïve café — “quotes” … ½",
    "船は夜明けに 🚢🌊👩‍👩‍👧‍👦",
    "e\u0301 is not \u00e9",
    "a<|im_end|>b<|endoftext|>",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<think>\n</think> <tool_call>",
    "x" * 300,
    "\x00\x7f\ufffd",
]


def save(folder, backend, **config):
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def train_byte_level(**options):
    """A small byte-level BPE in the manner of Qwen's."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **options,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def byte_level_and_more():
    """A decoder that joins bytes and then does something else."""
    backend = train_byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return backend


def train_sentencepiece():
    """A small BPE in the manner of Llama 2's: spaces as U+2581, bytes as <0x0A>."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *byte_tokens],
        initial_alphabet=["\u2581"],
        limit_alphabet=60,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:
        token["special"] = not token["content"].startswith("<0x")
    state["model"]["vocab"][""] = len(state["model"]["vocab"])  # a token without text
    state["added_tokens"] = [token for token in state["added_tokens"] if token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def train_metaspace():
    """A word-piece-like decoder that is neither of the above."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("byte-level"), train_byte_level(), eos_token=SPECIALS[2])


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    source = DATA / "qwen3-tokenizer"
    if not (source / "tokenizer.json.xz").is_file():
        pytest.skip("Qwen3's tokenizer is not here; EMBER_TEST_DATA names the folder above it")
    folder = tmp_path_factory.mktemp("qwen3")
    with lzma.open(source / "tokenizer.json.xz") as packed:
        (folder / "tokenizer.json").write_bytes(packed.read())
    (folder / "tokenizer_config.json").write_bytes((source / "tokenizer_config.json").read_bytes())
    return folder


KINDS = ["byte-level", "byte-level-and-more", "sentencepiece", "metaspace", "demo"]
ALL_KINDS = [*KINDS, pytest.param("qwen3", marks=pytest.mark.optional)]


@pytest.fixture(scope="session")
def tokenizer_of(request, byte_level_folder, tmp_path_factory):
    makers = {
        "byte-level": lambda: byte_level_folder,
        "byte-level-and-more": lambda: save(tmp_path_factory.mktemp("more"), byte_level_and_more()),
        "sentencepiece": lambda: save(tmp_path_factory.mktemp("spm"), train_sentencepiece()),
        "metaspace": lambda: save(tmp_path_factory.mktemp("meta"), train_metaspace()),
        "demo": lambda: DEMO,
        "qwen3": lambda: request.getfixturevalue("qwen3_folder"),
    }
    loaded = {}

    def get(kind):
        if kind not in loaded:
            loaded[kind] = Tokenizer.load(makers[kind]())
        return loaded[kind]

    return get


def oracle(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


# --------------------------------------------------------------------------------------
# encode


def assert_encodes_like_transformers(folder):
    ours, theirs = Tokenizer.load(folder), oracle(folder)
    for text in [*TEXTS, *CORPUS]:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode_rendered(text) == theirs.encode(text, add_special_tokens=False), text
    return ours


@pytest.mark.parametrize("is_bos_in_json", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"bos_token": "<|endoftext|>"},
        {"bos_token": "<|endoftext|>", "add_bos_token": True},
        {"bos_token": "<|endoftext|>", "add_bos_token": False},
        {"bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True}},
        {"bos_token": None, "add_bos_token": True},
        {"eos_token": "<|im_end|>", "add_eos_token": True},
        {
            "bos_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "add_bos_token": True,
            "add_eos_token": True,
        },
        {"eos_token": "<|im_end|>", "split_special_tokens": True},
        {"eos_token": "<|new|>"},
    ],
    ids=str,
)
def test_encodes_like_transformers_whatever_the_config_adds(tmp_path, config, is_bos_in_json):
    backend = train_byte_level()
    if is_bos_in_json:
        backend.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    assert_encodes_like_transformers(save(tmp_path, backend, **config))


def test_takes_tokens_that_only_the_config_has(tmp_path):
    added = {"content": "<|extra|>", "special": True, "normalized": False}
    folder = save(tmp_path, train_byte_level(), added_tokens_decoder={"400": added})
    tokenizer = assert_encodes_like_transformers(folder)
    assert tokenizer.encode("<|extra|>") == oracle(folder).encode("<|extra|>") == [400]
    assert tokenizer.is_special(400)


def test_forgets_truncation_and_padding(tmp_path):
    backend = train_byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=100)
    tokenizer = Tokenizer.load(save(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_demo_encodes_like_transformers():
    assert_encodes_like_transformers(DEMO)


@pytest.mark.optional
def test_qwen3_encodes_like_transformers(qwen3_folder):
    tokenizer = assert_encodes_like_transformers(qwen3_folder)
    assert tokenizer.vocab_size == 151_669
    assert tokenizer.eos_token_ids == (151_645,)


def test_refuses_half_a_surrogate_pair(tokenizer_of):
    with pytest.raises(InvalidRequestError, match="prompt: not valid Unicode"):
        tokenizer_of("byte-level").encode("a\ud83d")


# --------------------------------------------------------------------------------------
# decode


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS)
def test_streams_what_was_encoded(tokenizer_of, kind, text):
    tokenizer = tokenizer_of(kind)
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=False)
    token_ids = tokenizer.encode(text)
    streamed = "".join(detokenizer.push([token_id]) for token_id in token_ids)
    assert streamed + detokenizer.flush() == tokenizer.decode(token_ids, False)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_streamed_text_equals_text_decoded_at_once(tokenizer_of, kind, skip_special_tokens, data):
    """Any ids at all, cut anywhere: also bytes that make no character, and unused ids."""
    tokenizer = tokenizer_of(kind)
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    often_bytes = st.integers(0, min(300, tokenizer.vocab_size))
    pushes = data.draw(st.lists(st.lists(any_id | often_bytes, max_size=5), max_size=12))
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    streamed = "".join(detokenizer.push(token_ids) for token_ids in pushes) + detokenizer.flush()
    assert streamed == tokenizer.decode(list(itertools.chain(*pushes)), skip_special_tokens)


@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_detokenizers_of_one_tokenizer_do_not_disturb_each_other(tokenizer_of, kind, data):
    """They share what they know of ids; some skip special tokens, some are inside a character."""
    tokenizer = tokenizer_of(kind)
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size + 3), min_size=1, max_size=12)
    ids = st.sampled_from(data.draw(some_ids))  # few, so that they come again
    turns = data.draw(st.lists(st.tuples(st.integers(0, 3), ids), max_size=40))
    detokenizers = [IncrementalDetokenizer(tokenizer, n % 2 == 0) for n in range(4)]
    streamed = [""] * 4
    for n, token_id in turns:
        streamed[n] += detokenizers[n].push_one(token_id)
    for n, detokenizer in enumerate(detokenizers):
        own = [token_id for m, token_id in turns if m == n]
        assert streamed[n] + detokenizer.flush() == tokenizer.decode(own, n % 2 == 0)


@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(deadline=None, max_examples=100)
@given(text=st.text(st.characters(codec="utf-8"), max_size=60), data=st.data())
def test_streams_any_text_cut_between_its_tokens_bytes(tokenizer_of, kind, text, data):
    """Also with special tokens inside, which may stand in the middle of a character."""
    tokenizer = tokenizer_of(kind)
    token_ids = tokenizer.encode(text)
    specials = st.sampled_from([i for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)])
    for position in data.draw(st.lists(st.integers(0, len(token_ids)), max_size=3)):
        token_ids.insert(position, data.draw(specials))
    for skips in (True, False):
        detokenizer = IncrementalDetokenizer(tokenizer, skips)
        streamed = "".join(map(detokenizer.push_one, token_ids)) + detokenizer.flush()
        assert streamed == tokenizer.decode(token_ids, skips)


def test_others_run_while_a_text_is_tokenised(tokenizer_of):
    """Else a thread for it would be none: the interpreter's lock would hold everybody up."""
    tokenizer = tokenizer_of("demo")
    text = "".join(CORPUS) * 2000
    has_begun, has_ended = threading.Event(), threading.Event()

    def encode():
        has_begun.set()
        tokenizer.encode(text)
        has_ended.set()

    thread = threading.Thread(target=encode)
    started_s = last_s = time.perf_counter()
    longest_s = 0.0
    thread.start()
    has_begun.wait()
    while not has_ended.is_set():
        now_s = time.perf_counter()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    longest_s = max(longest_s, time.perf_counter() - last_s)
    thread.join()
    assert longest_s < (last_s - started_s) / 2


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_never_shows_a_part_of_a_character(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "née 船\U0001f6a2\U0001f469\u200d\U0001f469 ends."
    pieces = [detokenizer.push([token_id]) for token_id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_says_that_bytes_are_no_character_as_soon_as_it_is_certain(tokenizer_of):
    tokenizer = tokenizer_of("byte-level")
    alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    (ship,) = [token for token, _ in alphabet.pre_tokenize_str("\U0001f6a2")]
    ids = [tokenizer.token_id(character) for character in ship]
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "\U0001f6a2"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.push([tokenizer.token_id("a")]) == "\ufffda"
    assert detokenizer.push(ids[:3]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_leading_space_is_dropped_once(tokenizer_of):
    tokenizer = tokenizer_of("sentencepiece")
    space, word = tokenizer.token_id("\u2581"), [tokenizer.encode("ship")[0]]
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push([space]), detokenizer.push([space]), detokenizer.push(word)]
    assert tokenizer.decode(word) == "shi"
    assert pieces == ["", " ", " shi"]
    assert tokenizer.decode([space, space, *word]) == "  shi"


@pytest.mark.parametrize("kind", KINDS)
def test_time_per_token_does_not_grow(tokenizer_of, kind):
    """30,000 tokens of noise: decoding all of them at each token would take minutes."""
    tokenizer = tokenizer_of(kind)
    rng = random.Random(0)
    token_ids = [rng.randrange(tokenizer.vocab_size) for _ in range(30_000)]
    detokenizer = IncrementalDetokenizer(tokenizer)
    streamed = "".join(detokenizer.push([token_id]) for token_id in token_ids)
    assert streamed + detokenizer.flush() == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "demo"])
def test_token_bytes_are_the_parts_of_a_text(tokenizer_of, kind):
    tokenizer = tokenizer_of(kind)
    for text in CORPUS:
        spelled = b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode()
        assert spelled.removeprefix(" ") == text
    assert tokenizer.token_bytes(tokenizer.vocab_size + 5) == b""


# --------------------------------------------------------------------------------------
# files


def test_eos_comes_from_the_first_file_that_names_it(byte_level_folder, tmp_path):
    for file in byte_level_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert Tokenizer.load(tmp_path).eos_token_ids == (2,)
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    assert Tokenizer.load(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0, 2]}')
    assert Tokenizer.load(tmp_path).eos_token_ids == (2, 0)


def test_special_tokens_of_older_checkpoints_are_read(tmp_path):
    folder = save(tmp_path, train_byte_level())
    named = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    expected = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert dict(Tokenizer.load(folder).special_tokens) == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"tokenizer\.json: not found.*save_pretrained"),
        ("tokenizer.json", "", r"tokenizer\.json: damaged.*download it again"),
        ("tokenizer.json", '{"version": "1.0", "mod', r"tokenizer\.json: damaged"),
        ("tokenizer.json", "[]", r"tokenizer\.json: damaged"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json: not readable as JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object"),
        ("tokenizer_config.json", b"\xff", r"tokenizer_config\.json: not readable as JSON"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": {"x": 1}}',
            r"tokenizer_config\.json: added_tokens_decoder",
        ),
        ("tokenizer_config.json", '{"chat_template": 5}', r"chat_template: expected text, or"),
        ("tokenizer_config.json", '{"chat_template": [{}]}', r"chat_template: expected text, or"),
        (
            "tokenizer_config.json",
            json.dumps({"chat_template": "{% for"}),
            r"tokenizer_config\.json: chat template: line 1",
        ),
        ("chat_template.jinja", "ok\n{{ 1 +", r"chat_template\.jinja: chat template: line 2"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja: not readable as text"),
        ("config.json", '{"eos_token_id": "x"}', r"config\.json: eos_token_id"),
        ("generation_config.json", "nope", r"generation_config\.json: not readable as JSON"),
    ],
)
def test_damage_is_named(byte_level_folder, tmp_path, file, content, message):
    for source in byte_level_folder.iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    if content is None:
        (tmp_path / file).unlink()
    else:
        content = content.encode() if isinstance(content, str) else content
        (tmp_path / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_loads_neither_torch_nor_transformers():
    code = "import sys, ember_pp.tokenizer; print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
