"""What comes from outside, a million times: does anything raise what it should not?

    nice -n 10 python -m benchmarks.fuzz [--inputs 4000000] [--seed 0] [--output FILE]

Five readers of foreign bytes, each with inputs that begin as good ones and are changed: bytes
flipped, cut, repeated and spliced, or values replaced inside the JSON or msgpack that they are. An
input that ends in a new way (another error, by its words) joins those that are changed further.

    protocol     bytes -> message; what decodes encodes to itself; a client takes it or says why not
    admission    bytes -> message -> request, as a coordinator makes it, chat template included
    batch        bytes -> lines -> requests; every request that is taken can be sent
    header       bytes -> safetensors file; what is taken is gapless, and safetensors takes it too
    stops        text in pieces and stop strings, against the definition

Every other exception than the documented one is a failure, as are a wrong result and an input that
takes longer than a second. ``tests/test_fuzz.py`` runs the same checks on fewer inputs.
"""

from __future__ import annotations

import argparse
import base64
import collections
import dataclasses
import io
import json
import math
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import safetensors

from benchmarks.conditions import conditions
from ember_pp import checkpoint, protocol
from ember_pp import config as configuration
from ember_pp.client_session import ClientSession, RequestState
from ember_pp.coordinator.admission import Admission
from ember_pp.coordinator.preparation import prepare
from ember_pp.errors import (
    BatchInputError,
    CheckpointError,
    EmberError,
    InvalidRequestError,
    ProtocolError,
)
from ember_pp.jobs.batch_input import BatchInput, InputFile
from ember_pp.jobs.batch_requests import BadLine, parse
from ember_pp.jobs.json_file import write_json
from ember_pp.jobs.openai import to_submit_fields
from ember_pp.text_stream import StopMatcher

RESULT = Path(__file__).parent / "results" / "fuzz.json"
MAX_S = 1.0
MAX_CORPUS = 2000
MAX_FAILURES = 20
MAX_INPUT_BYTES = 4096
_INTERESTING_BYTES = (0, 1, 9, 10, 34, 39, 44, 58, 91, 92, 93, 123, 125, 127, 128, 192, 193, 255)
_DEEP: list[Any] = []
for _ in range(200):
    _DEEP = [_DEEP]
_INTERESTING_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31 - 1, 2**31, -(2**63), 2**63, 2**64 - 1),
    *(0.0, -0.0, 0.5, 1.5, 1e300, math.nan, math.inf, -math.inf),
    *("", "x", "\n", "\0", "\x07", "\u00e9", "\U0001f642", "x" * 300, "1", "-1", "1e5", "user"),
    *([], [[]], [0], ["x"], {}, {"": 0}, {"x": {"x": {}}}, "\ud800", _DEEP, b"", b"\0\0\0\0"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader of foreign bytes.

    Raises (``check``):
        EmberError: one of those that are documented; all else is a failure.
    """

    name: str
    seeds: tuple[bytes, ...]
    check: Callable[[bytes], object]
    allowed: tuple[type[EmberError], ...]
    loads: Callable[[bytes], Any] | None = None
    """To the values that are changed; None: only bytes are."""
    dumps: Callable[[Any], bytes] | None = None
    share: float = 1.0
    """Of the inputs."""


# --------------------------------------------------------------------------------------
# changing


def change_bytes(data: bytes, other: bytes, source: random.Random) -> bytes:
    """One change of ``data``, maybe with a piece of ``other``."""
    at = source.randrange(len(data) + 1)
    to = min(len(data), at + source.choice((1, 1, 2, 4, 16, 200)))
    match source.randrange(7):
        case 0:
            return data[:at] + bytes([source.randrange(256)]) + data[at + 1 :]
        case 1:
            return data[:at] + bytes([source.choice(_INTERESTING_BYTES)]) + data[at + 1 :]
        case 2:
            return data[:at] + data[to:]
        case 3:
            return data[:at] + data[at:to] * source.choice((2, 3, 50)) + data[to:]
        case 4:
            return data[:at] + source.randbytes(source.choice((1, 2, 4, 8))) + data[at:]
        case 5:
            start = source.randrange(len(other) + 1)
            return data[:at] + other[start : start + source.choice((4, 30, 500))] + data[to:]
        case _:
            flipped = (data[at] ^ (1 << source.randrange(8))) if at < len(data) else 0
            return data[:at] + bytes([flipped]) + data[at + 1 :]


def change_value(value: Any, source: random.Random) -> Any:
    """``value`` with something inside it replaced, left out or repeated."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(list(value))
        changed = dict(value)
        if source.random() < 0.1:
            del changed[key]
        elif source.random() < 0.1:
            changed[source.choice(("x", "", "\0", "stop", "shape", 7))] = changed.pop(key)
        else:
            changed[key] = change_value(value[key], source)
        return changed
    if isinstance(value, list) and value and source.random() < 0.85:
        index = source.randrange(len(value))
        match source.randrange(8):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return value[:index] + [value[index]] * source.choice((2, 30)) + value[index:]
            case _:
                changed_item = change_value(value[index], source)
                return [*value[:index], changed_item, *value[index + 1 :]]
    if isinstance(value, int) and not isinstance(value, bool) and source.random() < 0.4:
        return value + source.choice((-1, 1, 2, 4, 8, -8))
    if isinstance(value, bytes | str) and value and source.random() < 0.4:
        return value[: source.randrange(len(value))]
    alike = [option for option in _INTERESTING_VALUES if type(option) is type(value)]
    return source.choice(alike if alike and source.random() < 0.6 else _INTERESTING_VALUES)


class Corpus:
    """Inputs that ended in different ways; those that were taken are changed more often."""

    def __init__(self, seeds: tuple[bytes, ...]) -> None:
        self.taken = list(seeds)
        self.refused: list[bytes] = []

    def add(self, data: bytes, *, is_taken: bool) -> None:
        """Keep an input, as long as there is room."""
        inputs = self.taken if is_taken else self.refused
        if len(inputs) < MAX_CORPUS:
            inputs.append(data)

    def choose(self, source: random.Random) -> bytes:
        """One of them."""
        return source.choice(self.refused if self.refused and source.random() < 0.3 else self.taken)


def change(target: Target, corpus: Corpus, source: random.Random) -> bytes:
    """The next input."""
    data = corpus.choose(source)
    if target.loads is not None and target.dumps is not None and source.random() < 0.5:
        try:
            value = target.loads(data)
            for _ in range(source.choice((1, 1, 2, 3))):
                value = change_value(value, source)
            return target.dumps(value)
        except Exception:  # noqa: BLE001  no longer what it began as: change its bytes
            pass
    for _ in range(source.choice((1, 1, 2, 3, 6))):
        data = change_bytes(data, corpus.choose(source), source)
    return data[:MAX_INPUT_BYTES]


# --------------------------------------------------------------------------------------
# targets


def check_protocol(data: bytes) -> object:
    """Decode; what decodes is itself again, and a client can be sent it."""
    message = protocol.decode(data)
    again = protocol.decode(protocol.encode(message))
    # NaN is not equal to itself, but its bytes are.
    assert protocol.encode(again) == protocol.encode(message)
    session: ClientSession[RequestState] = ClientSession("ipc:///fuzz", 1.0)
    for request_id in ("a", "r1"):
        state = RequestState(request_id)
        session.add(state, state)
    try:
        session.handle(message)
    except EmberError as refusal:  # RequestFailed without a request comes back as its own class
        return type(refusal)
    return type(message)


def _sampling() -> dict[str, Any]:
    return {
        "temperature": 0.5,
        "top_k": 5,
        "stop": ["end", "."],
        "stop_token_ids": [3],
        "logit_bias": {"7": 1.0, 9: -2.0},
        "seed": 1,
        "logprobs": 2,
    }


def _submit(**fields: Any) -> bytes:
    plain: dict[str, Any] = {
        "request_id": "r1",
        "prompt": None,
        "messages": None,
        "token_ids": None,
        "sampling": {},
        "template_kwargs": {},
        "stream": True,
        "seed_key": "",
    }
    return protocol.encode(protocol.Submit(**(plain | fields)))


def _submits() -> tuple[bytes, ...]:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    return (
        _submit(prompt="The sea", sampling=_sampling()),
        _submit(messages=messages, template_kwargs={"enable_thinking": False, "tools": tools}),
        _submit(token_ids=protocol.pack_i32([1, 2, 3]), sampling={"max_tokens": 4}),
    )


def _messages() -> tuple[bytes, ...]:
    logprobs = protocol.TokenLogprobs(-1.5, protocol.pack_i32([1]), protocol.pack_f32([-1.5]))
    u32, i32 = protocol.pack_u32, protocol.pack_i32
    opened = protocol.OpenSlot(1, 2**63, {"top_k": 5}, 3, 0, i32([1, 2, 3]), b"")
    made: list[protocol.Message] = [
        protocol.Cancel(["a", "b"], everyone=False),
        protocol.Status(),
        protocol.Accepted("a", 5),
        protocol.TokenDeltas(["a", "r1"], ["x", "yz"], u32([1, 2]), i32([4, 5, 6]), []),
        protocol.TokenDeltas(["a"], ["x"], u32([1]), i32([4]), [logprobs]),
        protocol.Finished("a", "text", i32([1]), [logprobs], "stop", "end", 3, 0, 1),
        protocol.RequestFailed("a", InvalidRequestError("top_p: no").to_wire()),
        protocol.CancelReply(2),
        protocol.StatusReply({"phase": "ready", "stages": [{"pid": 1}]}, ["a"]),
        protocol.StageHello(0, "token", 1, {"name": "cpu"}),
        protocol.Sampled(0, 7, i32([1, -1]), [logprobs, None]),
        protocol.StageFailed(0, 1, True, 2, {}, "KeyError", "text", "Traceback"),
        protocol.Heartbeat(7),
        protocol.Tally(2**40),
        protocol.Execute(
            *(0, 3, 1, u32([2]), [opened], u32([1, 9]), u32([1]), u32([1, 0, 3, 1])),
            *(i32([1, 2, 3]), 2, False, None),
        ),
    ]
    return tuple(protocol.encode(message) for message in made)


def admission_target() -> Target:
    """As the coordinator of the demo model admits."""
    plain = {"job": {"name": "serve"}, "model": {"path": "demo", "dtype": "float32"}}
    config = configuration.build(plain | {"pipeline": {"devices": "cpu"}})
    admission = Admission(config, prepare(config))

    def check(data: bytes) -> object:
        message = protocol.decode(data)
        if isinstance(message, protocol.Submit):
            request = admission.admit(b"client", message)
            assert request.sequence.num_prompt_tokens > 0
        return type(message)

    allowed = (ProtocolError, InvalidRequestError)
    return Target("admission", _submits(), check, allowed, _unpack, _pack, share=0.5)


def _unpack(data: bytes) -> Any:
    return msgpack.unpackb(data, strict_map_key=False)


def _pack(value: Any) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


_LINES = (
    b'{"prompt": "The sea", "max_tokens": 4, "stop": ["\\n"], "temperature": 0.5}',
    b'{"custom_id": "a", "messages": [{"role": "user", "content": "Hi"}], "logprobs": true}',
    b'{"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", '
    b'"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "tools": '
    b'[{"type": "function", "function": {"name": "f"}}], "max_completion_tokens": 5}}',
    b'{"custom_id": "c", "url": "/v1/completions", "body": {"prompt": [1, 2], "logprobs": 3}}',
    b'{"token_ids": [101, 102], "return_token_ids": true, "logit_bias": {"5": 1.5}, "seed": 7}',
)


def check_batch(data: bytes) -> object:
    """Read the lines of a file; each is a request that can be sent, or a bad line, then raised."""
    file = InputFile("fuzz", Path("fuzz"), io.BytesIO(data), len(data), ())
    source = BatchInput([file], max_line_bytes=2000)
    session: ClientSession[RequestState] = ClientSession("ipc:///fuzz", 1.0)
    bad: InvalidRequestError | None = None
    for line in source.lines():
        parsed = parse(line, source.max_line_bytes)
        if isinstance(parsed, BadLine):
            bad = parsed.error
            continue
        try:
            session.submit(stream=False, **to_submit_fields(parsed.request))
        except InvalidRequestError as error:
            raise AssertionError(f"a line that was taken cannot be sent: {error}") from None
        source.place(line.number)
    if bad is not None:
        raise bad
    return "all lines"


def _header_file(header: Any, data: bytes = b"\0" * 24) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def _split_header(data: bytes) -> tuple[Any, bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def header_target(folder: Path) -> Target:
    """Files in ``folder``, read as checkpoints are."""
    path = folder / checkpoint.SINGLE_FILE
    known = checkpoint._ITEM_BYTES | checkpoint._FOREIGN_ITEM_BYTES

    def check(data: bytes) -> object:
        path.write_bytes(data)
        tensors = checkpoint.Checkpoint.open(folder).tensors
        end = 8 + int.from_bytes(data[:8], "little")
        for stored in sorted(tensors.values(), key=lambda t: (t.start_byte, t.end_byte)):
            assert stored.start_byte == end <= stored.end_byte
            end = stored.end_byte
            size = known.get(stored.dtype)
            assert size is None or math.prod(stored.shape) * size == stored.num_bytes
        assert end == len(data)
        if all(stored.dtype in known for stored in tensors.values()):
            theirs = safetensors.deserialize(data)
            assert {name for name, _ in theirs} == set(tensors)
        return len(tensors)

    def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    three = {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 1], 0, 8),
        "model.layers.0.b": entry("BF16", [4], 8, 16),
        "c": entry("F16", [2, 2], 16, 24),
    }
    seeds = (
        _header_file(three),
        _header_file({"a": entry("I64", [3], 0, 24)}),
        _header_file({"a": entry("F32", [], 0, 4), "e": entry("F32", [0, 5], 4, 4)}, b"\0" * 4),
        _header_file({}, b""),
    )
    return Target(
        *("header", seeds, check, (CheckpointError,), _split_header),
        dumps=lambda value: _header_file(*value),
    )


def check_stops(data: bytes) -> object:
    """Bytes to stop strings and pieces of text over few characters; against the definition."""
    alphabet = "ab\U0001f642"
    fields = ["".join(alphabet[byte % 3] for byte in part) for part in data.split(b"\0")]
    num_stops = data[0] % 5 if data else 0
    stops = [stop for stop in fields[:num_stops] if stop]
    pieces = fields[num_stops:]
    text = "".join(pieces)
    matcher = StopMatcher(stops)
    emitted, found = "", None
    for piece in pieces:
        safe, found = matcher.push(piece)
        emitted += safe
        if found is not None:
            break
    if found is None:
        emitted += matcher.flush()
    assert (emitted, found) == cut_by_definition(text, stops)
    return found is None, len(stops)


def cut_by_definition(text: str, stops: list[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first; there the longest."""
    longest_first = sorted(stops, key=len, reverse=True)
    for end in range(len(text) + 1):
        for stop in longest_first:
            if text.endswith(stop, 0, end):
                return text[: end - len(stop)], stop
    return text, None


def targets(folder: Path) -> list[Target]:
    """All of them; ``folder`` is for files."""
    several = b"\n".join(_LINES)
    stops = (
        b"\2ab\0b\0abab\0ba",
        b"\1aab\0aa\0ab",
        b"\3a\0\0ab\0\0bb\0abb",
        b"\0aaa",
        b"\4a\0b\0c\0d\0x",
    )
    both = (ProtocolError, InvalidRequestError)
    return [
        Target("protocol", (*_messages(), *_submits()), check_protocol, both, _unpack, _pack),
        admission_target(),
        Target(
            *("batch", (*_LINES, several), check_batch, (BatchInputError, InvalidRequestError)),
            loads=json.loads,
            dumps=lambda value: json.dumps(value).encode(),
        ),
        header_target(folder),
        Target("stops", stops, check_stops, ()),
    ]


# --------------------------------------------------------------------------------------
# a run


def outcome_of(target: Target, data: bytes) -> str:
    """How ``data`` ended, in words without numbers.

    Raises:
        Exception: what is not documented.
    """
    try:
        return f"taken: {target.check(data)}"[:200]
    except target.allowed as error:
        words = re.sub(r"'[^']*'|\"[^\"]*\"|\d+", "_", str(error))
        return f"{type(error).__name__}: {words[:80]}"


def fuzz(target: Target, num_inputs: int, seed: int) -> dict[str, Any]:
    """Change, check, repeat; what happened."""
    source = random.Random(f"{seed}/{target.name}")
    corpus = Corpus(target.seeds)
    seen: collections.Counter[str] = collections.Counter()
    failures: list[dict[str, str]] = []
    slowest_s, num_taken = 0.0, 0
    started_s = time.monotonic()
    for index in range(num_inputs):
        is_seed = index < len(target.seeds)
        data = target.seeds[index] if is_seed else change(target, corpus, source)
        before_s = time.thread_time()  # of this thread: others work on this machine too
        try:
            outcome = outcome_of(target, data)
        except Exception:  # noqa: BLE001  that is what is looked for
            outcome = f"FAILED: {traceback.format_exc(limit=-1)}"
            if outcome not in seen and len(failures) < MAX_FAILURES:
                text = traceback.format_exc()
                failures.append({"input": base64.b64encode(data).decode(), "traceback": text})
        slowest_s = max(slowest_s, time.thread_time() - before_s)
        num_taken += outcome.startswith("taken")
        if outcome not in seen:
            corpus.add(data, is_taken=outcome.startswith("taken"))
        seen[outcome] += 1
    if slowest_s > MAX_S:
        failures.append({"input": "", "traceback": f"an input took {slowest_s:.2f} s"})
    return {
        "num_inputs": num_inputs,
        "num_taken": num_taken,
        "num_refused": num_inputs - num_taken,
        "num_outcomes": len(seen),
        "slowest_ms": round(slowest_s * 1000, 2),
        "elapsed_s": round(time.monotonic() - started_s, 1),
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=4_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    plain = {"conditions": conditions(), "seed": options.seed}
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        chosen = targets(Path(folder))
        parts = sum(target.share for target in chosen)
        for target in chosen:
            num_inputs = math.ceil(options.inputs * target.share / parts)
            results[target.name] = fuzz(target, num_inputs, options.seed)
            shown = {k: v for k, v in results[target.name].items() if k != "failures"}
            print(f"{target.name:10} {shown}", flush=True)
            for failure in results[target.name]["failures"]:
                print(failure["input"], failure["traceback"], sep="\n", flush=True)
    total = sum(result["num_inputs"] for result in results.values())
    failed = sum(len(result["failures"]) for result in results.values())
    plain |= {"num_inputs": total, "num_failures": failed, "targets": results}
    write_json("--output", options.output, plain)
    print(f"{total:,} inputs, {failed} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
