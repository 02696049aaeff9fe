"""Every message between processes: frozen dataclasses, msgpack in and out, validated.

A message is one msgpack array ``[PROTOCOL_VERSION, tag, field, field, ...]`` with the fields
in the order of the class. ``encode`` and ``decode`` are the only way in and out; ``decode``
refuses bytes that are not exactly one known message with fields of the declared types.
``docs/protocol.md`` lists who sends what to whom.

Arrays of numbers travel as packed little-endian bytes, never as lists: ``pack_u32`` and its
like make them, ``unpack_u32`` and its like read them back.
"""

from __future__ import annotations

import array
import dataclasses
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

import msgpack

from ember_pp.errors import ProtocolError
from ember_pp.field_codec import Struct, from_array, to_array

PROTOCOL_VERSION = 1

_U32 = "I"
_I32 = "i"
_I64 = "q"
_F32 = "f"
_IS_LITTLE_ENDIAN = sys.byteorder == "little"


# --------------------------------------------------------------------------------------
# packed arrays


def _pack(typecode: str, values: Iterable[int] | Iterable[float]) -> bytes:
    if isinstance(values, array.array) and values.typecode == typecode and _IS_LITTLE_ENDIAN:
        return values.tobytes()
    packed = array.array(typecode, values)
    if not _IS_LITTLE_ENDIAN:
        packed.byteswap()
    return packed.tobytes()


def _unpack(typecode: str, packed: bytes) -> array.array[Any]:
    values = array.array(typecode)
    if len(packed) % values.itemsize:
        raise ProtocolError(f"a packed array of {len(packed)} bytes of {values.itemsize} each")
    values.frombytes(packed)
    if not _IS_LITTLE_ENDIAN:
        values.byteswap()
    return values


def pack_u32(values: Iterable[int]) -> bytes:
    """Unsigned 32-bit little-endian bytes of ``values``."""
    return _pack(_U32, values)


def pack_i32(values: Iterable[int]) -> bytes:
    """Signed 32-bit little-endian bytes of ``values``."""
    return _pack(_I32, values)


def pack_i64(values: Iterable[int]) -> bytes:
    """Signed 64-bit little-endian bytes of ``values``."""
    return _pack(_I64, values)


def pack_f32(values: Iterable[float]) -> bytes:
    """32-bit float little-endian bytes of ``values``."""
    return _pack(_F32, values)


def unpack_u32(packed: bytes) -> array.array[int]:
    """The numbers that ``pack_u32`` packed; ``ProtocolError`` if the length is no multiple of 4."""
    return _unpack(_U32, packed)


def unpack_i32(packed: bytes) -> array.array[int]:
    """The numbers that ``pack_i32`` packed; ``ProtocolError`` if the length is no multiple of 4."""
    return _unpack(_I32, packed)


def unpack_i64(packed: bytes) -> array.array[int]:
    """The numbers that ``pack_i64`` packed; ``ProtocolError`` if the length is no multiple of 8."""
    return _unpack(_I64, packed)


def unpack_f32(packed: bytes) -> array.array[float]:
    """The numbers that ``pack_f32`` packed; ``ProtocolError`` if the length is no multiple of 4."""
    return _unpack(_F32, packed)


# --------------------------------------------------------------------------------------
# structs and messages


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; ``TAG`` names the class on the wire."""

    TAG: ClassVar[str] = ""


_REGISTRY: dict[str, type[Message]] = {}
_MessageT = TypeVar("_MessageT", bound=type[Message])


def _register(cls: _MessageT) -> _MessageT:
    if not cls.TAG or cls.TAG in _REGISTRY:
        raise AssertionError(f"{cls.__name__}: TAG {cls.TAG!r} is empty or taken")
    _REGISTRY[cls.TAG] = cls
    return cls


def registered_messages() -> Mapping[str, type[Message]]:
    """All message classes by tag."""
    return types.MappingProxyType(_REGISTRY)


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprobs(Struct):
    """Log-probabilities at one generated token, of the unmodified distribution."""

    logprob: float
    """Of the token that was drawn."""
    top_ids: bytes
    """i32 ids of the most likely tokens, most likely first."""
    top_logprobs: bytes
    """f32, one per id in ``top_ids``."""


# client -> coordinator


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Submit(Message):
    """One request. Exactly one of ``prompt``, ``messages`` and ``token_ids`` is given."""

    TAG: ClassVar[str] = "submit"
    request_id: str
    prompt: str | None
    messages: list[Any] | None
    """Chat messages: maps with ``role`` and ``content``, as the chat template takes them."""
    token_ids: bytes | None
    """i32 prompt token ids."""
    sampling: dict[str, Any]
    """``SamplingParams`` fields that the client sets; the rest are the coordinator's defaults."""
    template_kwargs: dict[str, Any]
    """Extra names for the chat template, such as ``enable_thinking`` or ``tools``."""
    stream: bool
    """True: text and ids come in ``TokenDeltas`` as they are made; False: all in ``Finished``."""
    seed_key: str
    """Without a seed, the request draws with one derived from ``sampling.seed`` and this key."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Cancel(Message):
    """End these requests; answered by ``CancelReply``, each request by ``Finished("abort")``."""

    TAG: ClassVar[str] = "cancel"
    request_ids: list[str]
    everyone: bool
    """True: ids may be any client's, and no ids means all requests."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Status(Message):
    """Asks for ``StatusReply``."""

    TAG: ClassVar[str] = "status"


# coordinator -> client


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Accepted(Message):
    """The request is valid and queued."""

    TAG: ClassVar[str] = "accepted"
    request_id: str
    num_prompt_tokens: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class TokenDeltas(Message):
    """What is new of a client's streamed answers, in one message for all of them.

    Text lags behind ids while a stop string may begin. Without any request it is no more than
    a sign of life.
    """

    TAG: ClassVar[str] = "token_deltas"
    request_ids: list[str]
    texts: list[str]
    """One per request."""
    num_token_ids: bytes
    """u32, one per request."""
    token_ids: bytes
    """i32, of one request after the other."""
    logprobs: list[TokenLogprobs | None]
    """One per token id, None where not asked for; empty when no request asks."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Finished(Message):
    """The end of a request, with what ``TokenDeltas`` have not carried yet."""

    TAG: ClassVar[str] = "finished"
    request_id: str
    text: str
    token_ids: bytes
    """i32."""
    logprobs: list[TokenLogprobs]
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended it."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose keys and values came from the prefix cache."""
    num_output_tokens: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class RequestFailed(Message):
    """The request, or an undecodable message (``request_id`` empty), came to nothing."""

    TAG: ClassVar[str] = "request_failed"
    request_id: str
    error: dict[str, Any]
    """``EmberError.to_wire``."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class CancelReply(Message):
    """How many requests a ``Cancel`` ended."""

    TAG: ClassVar[str] = "cancel_reply"
    num_cancelled: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StatusReply(Message):
    """State of the coordinator and its stages; fields as in ``docs/protocol.md``."""

    TAG: ClassVar[str] = "status_reply"
    status: dict[str, Any]
    open_request_ids: list[str]
    """Of the client that asks, as far as they are open here."""


# stage -> coordinator


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageHello(Message):
    """First word of a stage process."""

    TAG: ClassVar[str] = "stage_hello"
    stage_index: int
    token: str
    """One-time secret that the launcher gave this process."""
    pid: int
    device: dict[str, Any]
    """``name``, ``kind``, ``total_bytes`` and ``free_bytes`` of the device it runs on."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageProgress(Message):
    """A phase that takes time, and how far it is."""

    TAG: ClassVar[str] = "stage_progress"
    stage_index: int
    phase: str
    """``weights``, ``compiling`` or ``capturing``; empty: the last one is over."""
    num_done: int
    num_total: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageReady(Message):
    """Weights are loaded and both ends of edges are made; waits for ``Start``."""

    TAG: ClassVar[str] = "stage_ready"
    epoch: int
    stage_index: int
    num_blocks: int
    """KV blocks that fit beside the weights."""
    handle: dict[str, Any]
    """How its neighbours reach its ends: ``receiver`` for the stage before, ``sender`` for the
    stage after, each a map from path to that path's handle, the best first. Stages form a circle:
    the last sends its feedback to the first. Empty with a single stage."""
    weight_bytes: int
    block_bytes: int
    """KV bytes of one block on this stage."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageStarted(Message):
    """The KV cache is allocated and the neighbours' ends are open."""

    TAG: ClassVar[str] = "stage_started"
    epoch: int
    stage_index: int
    paths: dict[str, Any]
    """For each of its edges, e.g. ``0->1``, a map from path, the best first, to why this stage
    cannot use it; empty text: it can."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class ProbeReport(Message):
    """What one end of an edge saw of a probe."""

    TAG: ClassVar[str] = "probe_report"
    epoch: int
    stage_index: int
    edge: str
    """``sender->receiver`` stage indices, e.g. ``0->1``."""
    path: str
    is_ok: bool
    text: str


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Sampled(Message):
    """Token ids that a plan drew: decode rows in roster order, then chunks that sample."""

    TAG: ClassVar[str] = "sampled"
    epoch: int
    plan: int
    token_ids: bytes
    """i32, one per row that samples; -1 where the logits were NaN or infinite."""
    logprobs: list[TokenLogprobs | None]
    """One per row that samples, None where not asked for; empty when no row asks."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageStats(Message):
    """Running totals of a stage since its start (``stage/timing.py``), sent while they change."""

    TAG: ClassVar[str] = "stage_stats"
    epoch: int
    stage_index: int
    plan: int
    """Last plan that it finished; -1 before the first."""
    busy_ns: int
    wait_input_ns: int
    """Waiting for hidden states or for feedback."""
    wait_output_ns: int
    """Waiting for a free slot of the next stage's ring."""
    host_gap_ns: int
    """Waiting for a plan while the coordinator had sequences."""
    idle_ns: int
    """Waiting for a plan while it had none."""
    waiting_for: str
    """What it waits for now, in words: plan, slot, edge; empty when it works or idles."""
    peak_bytes: int
    """Most device memory held so far; resident set on CPU."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageTrace(Message):
    """Times of plans and waits, while ``trace.output`` or ``trace.picture`` asks for them.

    In nanoseconds of the host's monotonic clock, in the order in which they ended.
    """

    TAG: ClassVar[str] = "stage_trace"
    epoch: int
    stage_index: int
    plans: bytes
    """i64 quintuples (plan, when it came, when its input was there, when its output was handed
    on, when it was done); 0 for an input or output that a plan does not have."""
    waits: bytes
    """i64 triples (state, start, end); states as in ``StageState`` of the stage."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Heartbeat(Message):
    """Comes back as it is from every stage process that is alive (``sockets.Heart``)."""

    TAG: ClassVar[str] = "heartbeat"
    count: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Tally(Message):
    """How many messages its sender has sent over this connection before this one.

    The receiver has counted as many, or one was lost or repeated.
    """

    TAG: ClassVar[str] = "tally"
    num_messages: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageFailed(Message):
    """A stage raised. Its process ends, or the epoch is over for it and it waits for ``Renew``."""

    TAG: ClassVar[str] = "stage_failed"
    epoch: int
    stage_index: int
    is_ending: bool
    """True: the process ends. False: what failed lies between processes; this one is sound."""
    plan: int
    error: dict[str, Any]
    """``EmberError.to_wire`` when it raised one of ours, else empty."""
    remote_type: str
    text: str
    traceback: str


# coordinator -> stage


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class StageConfig(Message):
    """All that a stage needs to load its slice of the model."""

    TAG: ClassVar[str] = "stage_config"
    epoch: int
    stage_index: int
    num_stages: int
    start_layer: int
    end_layer: int
    device: str
    """``cpu`` or ``cuda:N``."""
    num_threads: int
    """CPU threads for torch."""
    config: dict[str, Any]
    """The run's whole configuration, ``config.to_plain``."""
    model_config: dict[str, Any]
    """The model's architecture, ``ModelConfig.to_plain``."""
    eos_token_ids: bytes
    """i32; not drawn while ``min_tokens`` is not reached."""
    max_slots: int
    """Sequences that may be open at once."""
    max_model_len: int
    """Longest sequence, prompt and output, in tokens."""
    max_in_flight: int
    """Slots of every ring; the feedback ring has twice as many."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Start(Message):
    """The agreed block count, and how to reach the neighbours."""

    TAG: ClassVar[str] = "start"
    epoch: int
    num_blocks: int
    next_handle: dict[str, Any]
    """The next stage's ``StageReady.handle``; the first stage's for the last."""
    previous_handle: dict[str, Any]
    """The one before's; the last stage's for the first."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Renew(Message):
    """A new epoch: forget all but the weights, and answer ``StageReady`` with a new ring."""

    TAG: ClassVar[str] = "renew"
    epoch: int


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Probe(Message):
    """Send (or expect) a pattern over this edge by this path, and compare bytes.

    An edge uses the path of its last probe.
    """

    TAG: ClassVar[str] = "probe"
    epoch: int
    edge: str
    path: str
    seed: int


@dataclasses.dataclass(frozen=True, slots=True)
class OpenSlot(Struct):
    """A sequence takes a slot: its earlier state there is forgotten."""

    slot: int
    seed: int
    """Key of its random numbers, unsigned 64 bit."""
    sampling: dict[str, Any]
    """``SamplingParams.to_mapping``."""
    num_prompt_tokens: int
    """Length of the prompt; tokens after it in a chunk are output being replayed."""
    num_output_tokens: int
    """Output tokens that were drawn before this life of the sequence."""
    prompt_ids: bytes
    """i32 prompt ids; empty unless a penalty counts them."""
    output_ids: bytes
    """i32 earlier output ids; empty unless a penalty counts them."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Execute(Message):
    """One plan. Stages execute plans in the order of their numbers, which have no gaps.

    A micro-batch has a *roster* of decoding slots that every stage remembers; the plan says
    only what changed. Rows of the plan are the roster (one token each), then the chunks. The
    input of a roster row is the newest token drawn for its slot, which stage 0 has from the
    last stage.
    Applied in this order: ``leave``, ``open``, ``blocks``, ``join``, then the rows.
    """

    TAG: ClassVar[str] = "execute"
    epoch: int
    plan: int
    microbatch: int
    leave: bytes
    """u32 slots that leave the roster."""
    open: list[OpenSlot]
    blocks: bytes
    """u32 pairs (slot, block id) appended to block tables."""
    join: bytes
    """u32 slots appended to the roster."""
    chunks: bytes
    """u32 quadruples (slot, start position, num tokens, 1 if the last token samples)."""
    chunk_ids: bytes
    """i32 token ids of all chunks, in order."""
    feedback: int
    """Newest plan that drew an input of the roster rows; -1 without roster rows. Stage 0 computes
    them once it has the feedback of that plan."""
    after_idle: bool
    """True for the first plan after a time without any sequence."""
    tap: str | None
    """Directory in which each stage writes its hidden states of this plan as safetensors."""


@_register
@dataclasses.dataclass(frozen=True, slots=True)
class Shutdown(Message):
    """The stage ends now."""

    TAG: ClassVar[str] = "shutdown"
    reason: str


# --------------------------------------------------------------------------------------
# encoding


def encode(message: Message) -> bytes:
    """The bytes of ``message``."""
    values = [PROTOCOL_VERSION, message.TAG, *to_array(message)]
    packed: bytes = msgpack.packb(values)
    return packed


def decode(packed: bytes) -> Message:
    """The message in ``packed``.

    Raises:
        ProtocolError: not msgpack, trailing bytes, another version, an unknown tag, or a field
            that is missing, extra or of the wrong type; the text names it.
    """
    try:
        values = msgpack.unpackb(packed, raw=False, strict_map_key=False)
    except Exception as error:  # noqa: BLE001  msgpack raises many types on foreign bytes
        raise ProtocolError(f"not a message: {type(error).__name__}: {error}") from None
    if not isinstance(values, list) or len(values) < 2 or not isinstance(values[1], str):
        raise ProtocolError("not a message: expected [version, tag, fields...]")
    if values[0] != PROTOCOL_VERSION or isinstance(values[0], bool):
        raise ProtocolError(
            f"protocol version {values[0]!r}; this process speaks {PROTOCOL_VERSION}: "
            "run the same ember_pp on both sides"
        )
    cls = _REGISTRY.get(values[1])
    if cls is None:
        raise ProtocolError(f"unknown message {values[1][:64]!r}")
    decoded: Message = from_array(cls, values[2:], cls.__name__)
    return decoded
