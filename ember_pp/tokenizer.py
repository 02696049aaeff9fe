"""Text to token ids and back, for one checkpoint. The only file that imports ``tokenizers``.

``encode`` gives the ids that transformers' ``AutoTokenizer`` gives for the same folder, and
``render_chat`` the text of its ``apply_chat_template``. What is done with generated text
afterwards lives in ``text_stream.py`` and can be imported from here.
"""

from __future__ import annotations

import codecs
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ember_pp.chat_template import ChatTemplate, check_messages
from ember_pp.errors import CheckpointError, InvalidRequestError
from ember_pp.generation_config import read_eos_token_ids, read_sampling_defaults
from ember_pp.text_stream import THINK_START, StopMatcher, split_reasoning

__all__ = [
    "IncrementalDetokenizer",
    "StopMatcher",
    "Tokenizer",
    "check_messages",
    "read_eos_token_ids",
    "read_sampling_defaults",
    "split_reasoning",
]

_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tokenizer:
    """The tokenizer and chat template of a checkpoint; made by ``load``."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        templates: Mapping[str, ChatTemplate],
        special_tokens: Mapping[str, str],
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._backend = backend
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        self.eos_token_ids = eos_token_ids
        """Ids that end a text, by the checkpoint's files (``read_eos_token_ids``)."""
        self._byte_values = _byte_values() if _is_byte_level(backend) else None
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._token_bytes: dict[int, bytes] = {}
        self._whole_texts: tuple[dict[int, str], dict[int, str]] = ({}, {})

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of ``folder``.

        Raises:
            CheckpointError: ``tokenizer.json`` is missing, or a file is damaged; names it.
        """
        folder = Path(folder)
        backend = _read_backend(folder / "tokenizer.json")
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(_read_json(folder / "special_tokens_map.json") | config)
        _apply_config(backend, config, special_tokens, folder)
        tokenizer = cls(
            backend,
            templates=_read_templates(folder, config),
            special_tokens=special_tokens,
        )
        tokenizer.eos_token_ids = read_eos_token_ids(
            _read_json(folder / "generation_config.json"),
            _read_json(folder / "config.json"),
            tokenizer,
        )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens; a model's own ``vocab_size`` may be larger."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        """True when ``render_chat`` can work."""
        return bool(self._templates)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """``bos_token``, ``eos_token`` and so on, as far as the checkpoint names them."""
        return types.MappingProxyType(self._special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of the token spelled ``token``, as it stands in the vocabulary."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with the tokens that the checkpoint puts around a text.

        Raises:
            InvalidRequestError: ``text`` is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidRequestError("prompt: not valid Unicode (a lone surrogate)") from None
        # Of the library's ways to encode, only batches let other threads run meanwhile.
        batch = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids: list[int] = batch[0].ids
        return ids

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of what ``render_chat`` made; a template writes its special tokens itself."""
        return self.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    @property
    def is_byte_level(self) -> bool:
        """True when a text is nothing but the joined ``token_bytes`` of its tokens."""
        return self._byte_values is not None

    def joins_next(self, token_id: int) -> bool:
        """True when text after ``token_id`` may change what it decodes to: it spells one byte
        as ``<0x0A>``, or is no token at all and leaves the one before it to decide."""
        token = self._backend.id_to_token(token_id)
        return token is None or _is_byte_token(token)

    def is_special(self, token_id: int) -> bool:
        """True for tokens that ``skip_special_tokens`` leaves out."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that ``token_id`` adds to a text; empty for an id without a token."""
        known = self._token_bytes.get(token_id)
        if known is None:
            known = self._token_bytes[token_id] = self._make_token_bytes(token_id)
        return known

    def whole_texts(self, skip_special_tokens: bool) -> dict[int, str]:
        """What ids add to a text that ends with a whole character, as far as that is whole
        characters again; filled by the detokenizers, which share it. Empty unless
        ``is_byte_level``."""
        return self._whole_texts[skip_special_tokens]

    def _make_token_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_values is None:
            if _is_byte_token(token):
                return bytes([int(token[3:5], 16)])
            return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        try:
            return bytes([self._byte_values[character] for character in token])
        except KeyError:  # an added token that is spelled as itself
            return token.encode()

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], template_kwargs: Mapping[str, Any]
    ) -> str:
        """The prompt text of a chat, up to where the answer begins.

        ``template_kwargs`` are further names for the template, such as ``tools`` or
        ``enable_thinking``. See ``ChatTemplate.render`` for what is refused.

        Raises:
            InvalidRequestError: the checkpoint has no chat template, or it cannot render this.
        """
        return self._template(template_kwargs).render(
            messages, template_kwargs, self._special_tokens
        )

    def opens_thinking(self, template_kwargs: Mapping[str, Any]) -> bool:
        """True when prompts made with these kwargs end with ``<think>``: the answer has no
        opening tag then (``split_reasoning``)."""
        rendered = self.render_chat([{"role": "user", "content": "?"}], template_kwargs)
        return rendered.rstrip().endswith(THINK_START)

    def _template(self, template_kwargs: Mapping[str, Any]) -> ChatTemplate:
        name = "tool_use" if template_kwargs.get("tools") else "default"
        template = self._templates.get(name) or self._templates.get("default")
        if template is None:
            raise InvalidRequestError(
                "messages: this checkpoint has no chat template; send a prompt"
            )
        return template


class IncrementalDetokenizer:
    """Text of a growing list of token ids, given out as soon as it is certain.

    All that ``push`` and ``flush`` return, joined, equals ``Tokenizer.decode`` of all ids.
    Never a part of a character: bytes of an unfinished one wait for the rest. U+FFFD comes
    only for bytes that can no longer become a character. Constant time per token on average.

    Tokenizers that spell bytes as ``<0x0A>`` (SentencePiece with byte fallback) decide on a
    whole run of such bytes at once, so its text comes when the run ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._whole_texts = tokenizer.whole_texts(skip_special_tokens)
        self._is_inside_character = False
        """Bytes of a character have come, and not all of them; only with a byte-level one."""
        self._context: list[int] = []
        """Ids whose text is out, kept to decode what follows as it is decoded after them."""
        self._pending: list[int] = []
        self._num_decodable = 0
        """How many of the pending ids come before a run of bytes at the end."""

    def push(self, token_ids: Iterable[int]) -> str:
        """Take more ids; return the text that became certain."""
        return "".join(map(self.push_one, token_ids))

    def push_one(self, token_id: int) -> str:
        """As ``push`` of one id, which nearly always is one look into a table."""
        if not self._is_inside_character:
            text = self._whole_texts.get(token_id)
            if text is not None:
                return text
        tokenizer = self._tokenizer
        if self._skip_special_tokens and tokenizer.is_special(token_id):
            return ""
        if tokenizer.is_byte_level:
            return self._add_bytes(token_id, tokenizer.token_bytes(token_id))
        self._pending.append(token_id)
        if not tokenizer.joins_next(token_id):
            self._num_decodable = len(self._pending)
        return self._decode_pending(self._num_decodable, is_last=False)

    def _add_bytes(self, token_id: int, added: bytes) -> str:
        was_inside = self._is_inside_character
        text = self._utf8.decode(added)
        self._is_inside_character = bool(self._utf8.getstate()[0])
        if not (was_inside or self._is_inside_character or _REPLACEMENT in text):
            self._whole_texts[token_id] = text
        return text

    def flush(self) -> str:
        """The text still held back, once no more ids will come."""
        return self._utf8.decode(b"", final=True) + self._decode_pending(
            len(self._pending), is_last=True
        )

    def _decode_pending(self, num_ids: int, *, is_last: bool) -> str:
        if num_ids == 0:
            return ""
        window = self._context + self._pending[:num_ids]
        text = self._decode(window)[len(self._decode(self._context)) :]
        if text.endswith(_REPLACEMENT) and not is_last:
            return ""  # may be the beginning of a character
        self._context, self._pending = self._shortest_context(window), self._pending[num_ids:]
        self._num_decodable = 0
        return text

    def _shortest_context(self, window: list[int]) -> list[int]:
        """The last ids of ``window`` that make text of their own: a decoder that treats the
        beginning of a text differently has then left the beginning behind."""
        length = 1
        while length < len(window) and not self._decode(window[-length:]):
            length *= 2
        return window[-length:]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)


# --------------------------------------------------------------------------------------
# the checkpoint's files


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: not found; a checkpoint needs tokenizer.json. Download it with the "
            "weights, or make it with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001  the library raises plain Exception
        raise CheckpointError(
            f"{path}: damaged, or made by a newer version of tokenizers ({error}); "
            "download it again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    """The object in the JSON file ``path``; empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as text: {error}") from None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Named special tokens; a token is its text, or a map with its text as ``content``."""
    tokens = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(content, str):
            tokens[name] = content
    return tokens


def _apply_config(
    backend: tokenizers.Tokenizer,
    config: Mapping[str, Any],
    special_tokens: Mapping[str, str],
    folder: Path,
) -> None:
    """Change ``backend`` as ``tokenizer_config.json`` says, in the way transformers does.

    What goes around a text is ``tokenizer.json``'s to say (its post-processor); ``add_bos_token``
    and ``add_eos_token`` are left alone, as transformers does where there is a ``tokenizer.json``.
    """
    path = folder / "tokenizer_config.json"
    for token in _added_tokens(config.get("added_tokens_decoder"), path):
        if backend.token_to_id(token.content) is None:
            backend.add_tokens([token])
    for content in special_tokens.values():
        backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])
    backend.encode_special_tokens = config.get("split_special_tokens") is True


def _added_tokens(decoder: Any, path: Path) -> list[tokenizers.AddedToken]:
    """The entries of ``added_tokens_decoder``, by id."""
    if decoder is None:
        return []
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    try:
        return [
            tokenizers.AddedToken(
                entry["content"], **{flag: entry[flag] for flag in flags if flag in entry}
            )
            for _, entry in sorted(decoder.items(), key=lambda item: int(item[0]))
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: added_tokens_decoder: {error!r}") from None


def _read_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, ChatTemplate]:
    """Templates by name; files win over ``tokenizer_config.json``, as in transformers."""
    files = {path.stem: path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {
            name: ChatTemplate(_read_text(path), origin=str(path)) for name, path in files.items()
        }
    origin = str(folder / "tokenizer_config.json")
    given = config.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        given = [{"name": "default", "template": given}]
    try:
        sources = {entry["name"]: entry["template"] for entry in given}
        return {str(name): ChatTemplate(text, origin=origin) for name, text in sources.items()}
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{origin}: chat_template: expected text, or a list of name and template"
        ) from None


# --------------------------------------------------------------------------------------
# bytes


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """True when decoding joins the bytes of the tokens, and nothing else happens."""
    if backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    parts = decoder.get("decoders", [decoder])
    return [part.get("type") for part in parts] == ["ByteLevel"]


def _is_byte_token(token: str) -> bool:
    return (
        len(token) == 6
        and token.startswith("<0x")
        and token.endswith(">")
        and all(digit in "0123456789ABCDEF" for digit in token[3:5])
    )


def _byte_values() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 bytes are themselves, the others take the
    characters from U+0100 on (Radford et al., 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    values = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return values | {chr(0x100 + i): byte for i, byte in enumerate(others)}
