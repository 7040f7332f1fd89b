"""Frames and messages of the Afterimage protocol, versions 1 and 2. This module does no I/O."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, Dict, List, Literal, NamedTuple, Optional, Tuple, Union

if TYPE_CHECKING:
    from typing_extensions import Buffer

HELLO, WELCOME, PING, PONG, STATS_REQ, STATS_RESP, ERROR, GO_AWAY, SNAPSHOT_REQ, SNAPSHOT_RESP = range(0x01, 0x0B)
CACHE_REQ, CACHE_RESP, CLASSIFY_REQ, CLASSIFY_RESP = 0x10, 0x11, 0x20, 0x21
# Version 2.
BYTES_REQ, BYTES_RESP, INFER_REQ, INFER_RESP = 0x12, 0x13, 0x22, 0x23
FORGET_REQ, FORGET_RESP, FLUSH_REQ, FLUSH_RESP = 0x30, 0x31, 0x32, 0x33
STREAM_OPEN, STREAM_DATA, STREAM_CREDIT, STREAM_PROGRESS, STREAM_RESET = range(0x40, 0x45)
WRITE, EXISTS, HIT, COALESCED, CONNECTION, JOINED, END = 0x01, 0x01, 0x01, 0x02, 0x01, 0x01, 0x01
REFRESH, NO_STORE = 0x01, 0x02
STATUSES = [
    "none", "upstream_error", "upstream_crashed", "upstream_corrupt", "bad_argument", "overloaded",
    "deadline_exceeded", "unauthenticated", "too_large", "unsupported", "shutting_down", "internal",
    "storage_failed", "unauthorized",
]
RETRYABLE = frozenset([1, 2, 3, 5, 10, 11, 12])
SHUTTING_DOWN = STATUSES.index("shutting_down")

MAGIC = b"AFTERIMG"
#: The oldest and the newest version of the protocol that this client speaks.
OLDEST_VERSION, VERSION = 1, 2
HEADER = struct.Struct("<IBBHQ")
MAX_VALUE = 1 << 24
MAX_LARGE_BODY = 17 << 20
MAX_REPLY_BODY = 1 << 20
MAX_ROWS = 1 << 16
MAX_NAME = 255
KEY_LENGTH = 16
MAX_TOKEN = 1024
MAX_TEXT = 1024
MAX_PING = 64
MAX_STREAM_DATA = MAX_STREAM_HEADER = 1 << 16
MAX_PROGRESS = 1024
MAX_DIMS = 4
MAX_ENTRIES = 4096
MAX_BUDGET_MS = (1 << 16) - 1

Origin = Literal["hit", "miss", "coalesced"]
StatsValue = Union[int, str, bytes, List[Tuple[int, int]]]
StatsEntry = Tuple[str, int, StatsValue]


class Welcome(NamedTuple):
    """The server's description of itself: its service, its model and its limits."""

    version: int
    service: int
    features: int
    max_body: int
    window: int
    classes: int
    digest: bytes
    shape: Tuple[int, ...]
    name: str


class Label(NamedTuple):
    """The answer to one image.

    `origin` is 'hit' (from the memo's store), 'miss' (computed for this request) or 'coalesced'
    (computed for an identical request in flight).
    """

    label: int
    origin: Origin


class Answer(NamedTuple):
    """The answer to one row: a label or bytes. `age_s`: the seconds since the model computed it; 0
    unless it is a hit."""

    value: Union[int, bytes]
    origin: Origin
    age_s: int


class Inference(NamedTuple):
    """The answers of a model, in the order of the rows. `digest` names the model that computed
    them."""

    digest: bytes
    answers: List[Answer]


class Snapshot(NamedTuple):
    """The result of a snapshot. `joined`: another request had already started it."""

    entries: int
    bytes: int
    elapsed_us: int
    joined: bool


class AfterimageError(Exception):
    """The base class of all errors of this package."""

    #: Whether the same request may succeed later or at another server.
    retryable = False


class Failed(AfterimageError):
    """The server answered with an Error. With `connection` it has also ended the connection."""

    def __init__(self, status: int, text: str, connection: bool = False) -> None:
        self.status = status
        self.text = text
        self.connection = connection
        self.retryable = status in RETRYABLE
        self.name = STATUSES[status] if status < len(STATUSES) else f"status_{status}"
        # The text comes from the server: control characters must not reach a terminal or a log.
        super().__init__(f"{self.name}: {printable(text)}")


class Lost(AfterimageError):
    """The connection ended before the answer came, or no connection was possible."""

    retryable = True


class Unsupported(AfterimageError):
    """The server speaks an older version of the protocol, which does not have this request."""


class Malformed(AfterimageError):
    """The server sent bytes that violate the protocol."""


class StreamFrame(NamedTuple):
    """A frame of a stream, not checked yet: a bad one ends its stream and not the connection."""

    flags: int
    status: int
    data: bytes


Reply = Union[Welcome, Label, Inference, Snapshot, Failed, StreamFrame, List[StatsEntry], bytes, str, int, None]


def printable(text: str) -> str:
    """`text` with all characters escaped that are not printable."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def flat(data: Buffer, name: str) -> bytes:
    """The bytes of any C-contiguous buffer of uint8. `name` is the argument's name for error
    messages."""
    if isinstance(data, bytes):
        return data
    try:
        view = memoryview(data)
    except (TypeError, ValueError) as error:
        if hasattr(data, "__array__"):
            raise TypeError(f"{name} is an array that has no buffer of uint8 ({error})") from None
        raise TypeError(
            f"{name} must be bytes, bytearray, memoryview or an array of uint8, not {type(data).__name__}") from None
    if view.format.lstrip("@=<>!") not in ("B", "c"):
        raise TypeError(f"{name} has elements of format {view.format!r}; convert it to uint8")
    if not view.c_contiguous:
        raise ValueError(f"{name} is not C-contiguous; copy it first, for example with numpy.ascontiguousarray")
    return view.tobytes()


def row_bytes(data: Any, name: str) -> bytes:
    """The bytes of any buffer, such as a NumPy array of any type and layout, in C order."""
    if isinstance(data, bytes):
        return data
    try:
        view = memoryview(data)
    except (TypeError, ValueError):
        if not hasattr(data, "tobytes"):
            raise TypeError(f"{name} must be a buffer or an array, not {type(data).__name__}") from None
        # An array without a buffer of its own, such as one of dates.
        return bytes(data.tobytes())
    return view.tobytes()


def short_text(text: str, name: str) -> bytes:
    """A text with its length in one byte."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, not {type(text).__name__}")
    data = text.encode()
    if len(data) > MAX_NAME:
        raise ValueError(f"{name} has {len(data)} bytes; the limit is {MAX_NAME}")
    return bytes([len(data)]) + data


def integer(value: int, least: int, most: int, name: str) -> int:
    """`value`, if it is an integer from `least` to `most`."""
    try:
        number = value.__index__()
    except AttributeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}; it must be from {least} to {most}")
    return number


def valid_token(token: Buffer) -> bytes:
    """The bytes of a token."""
    data = flat(token, "the token")
    if len(data) > MAX_TOKEN:
        raise ValueError(f"the token is {len(data)} bytes; the limit is {MAX_TOKEN}")
    return data


def hello(token: bytes) -> bytes:
    """The body of a Hello."""
    return MAGIC + struct.pack("<HHIH", OLDEST_VERSION, VERSION, 0, len(token)) + token


def frame(kind: int, flags: int, status: int, request_id: int, body: bytes) -> bytes:
    """A whole frame. `status` is the time budget of a request."""
    return HEADER.pack(len(body), kind, flags, status, request_id) + body


class Body:
    """A reader of a reply's body that checks all bounds."""

    def __init__(self, data: Buffer) -> None:
        self.data = memoryview(data)

    def bytes(self, length: int) -> bytes:
        at_most(len(self.data), length, "a field's length, compared with the rest of the body,")
        taken, self.data = bytes(self.data[:length]), self.data[length:]
        return taken

    def text(self, length: int) -> str:
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"a text is not UTF-8: {error}") from None

    def ints(self, layout: str) -> Tuple[int, ...]:
        return struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))


def at_most(limit: int, value: int, what: str) -> int:
    if value > limit:
        raise Malformed(f"{what} is {value}; the limit is {limit}")
    return value


def decode(kind: int, flags: int, status: int, data: Buffer) -> Reply:
    """The content of a reply. None for a kind that no server sends."""
    body = Body(data)
    result: Reply
    if kind == CLASSIFY_RESP:
        origin: Origin = "hit" if flags & HIT else "coalesced" if flags & COALESCED else "miss"
        result = Label(body.ints("H")[0], origin)
    elif kind == CACHE_RESP:
        result = body.ints("q")[0] if flags & EXISTS else None
    elif kind == BYTES_RESP:
        result = body.bytes(len(body.data)) if flags & EXISTS else None
    elif kind == INFER_RESP:
        result = decode_answers(body)
    elif kind == FORGET_RESP:
        result = body.ints("Q")[0]
    elif kind == FLUSH_RESP:
        result = None
    elif kind == PONG:
        result = body.bytes(at_most(MAX_PING, len(body.data), "the length of a Pong"))
    elif kind in (ERROR, GO_AWAY):
        text = body.text(at_most(MAX_TEXT, len(body.data), "the length of a text"))
        result = Failed(status, text, bool(flags & CONNECTION)) if kind == ERROR else text
    elif kind == STATS_RESP:
        result = decode_stats(body)
    elif kind == SNAPSHOT_RESP:
        entries, size, elapsed_us = body.ints("QQQ")
        result = Snapshot(entries, size, elapsed_us, bool(flags & JOINED))
    elif kind == WELCOME:
        result = decode_welcome(body)
    elif kind in (STREAM_DATA, STREAM_CREDIT, STREAM_PROGRESS, STREAM_RESET):
        result = StreamFrame(flags, status, body.bytes(len(body.data)))
    else:
        return None
    at_most(0, len(body.data), "the number of bytes after the last field")
    return result


def decode_welcome(body: Body) -> Welcome:
    if body.bytes(8) != MAGIC:
        raise Malformed("this is not an Afterimage server: the magic is wrong")
    version, service, dims, features, max_body, window, classes = body.ints("HBBIIII")
    at_most(MAX_DIMS, dims, "the number of dimensions")
    digest, shape, name = body.bytes(32), body.ints(f"{dims}I"), body.text(*body.ints("B"))
    while body.data:  # Extensions: a tag, a length and the data. Version 1 has none.
        body.bytes(body.ints("HH")[1])
    return Welcome(version, service, features, max_body, window, classes, digest, shape, name)


def decode_answers(body: Body) -> Inference:
    digest, count = body.bytes(32), body.ints("I")[0]
    if count == 0:
        raise Malformed("the number of answers is 0")
    at_most(MAX_ROWS, count, "the number of answers")
    origins: List[Origin] = ["miss", "hit", "coalesced"]
    answers = []
    for _ in range(count):
        origin, age_s, kind = body.ints("BIB")
        at_most(2, origin, "an origin")
        at_most(1, kind, "the kind of an answer")
        value: Union[int, bytes] = body.ints("H")[0] if kind == 0 else body.bytes(*body.ints("I"))
        answers.append(Answer(value, origins[origin], age_s))
    return Inference(digest, answers)


def decode_stats(body: Body) -> List[StatsEntry]:
    """A list of (name, type, value). The value of an unknown type is its payload."""
    entries: List[StatsEntry] = []
    while body.data:
        at_most(MAX_ENTRIES, len(entries) + 1, "the number of entries")
        kind, length = body.ints("BB")
        name = body.text(length)
        payload = Body(body.bytes(*body.ints("I")))
        value: StatsValue
        if kind in (1, 2):
            value, = payload.ints(" Qq"[kind])
        elif kind == 3:
            value = payload.text(len(payload.data))
        elif kind == 4:
            pairs = [payload.ints("QQ") for _ in range((len(payload.data) + 15) // 16)]
            value = [(bound, count) for bound, count in pairs]
        else:
            value = payload.bytes(len(payload.data))
        at_most(0, len(payload.data), f"the number of bytes after the value of {printable(name)}")
        entries.append((name, kind, value))
    return entries


def by_name(entries: List[StatsEntry]) -> Dict[str, StatsValue]:
    """The values by name, in the server's order. Of two entries with the same name the first
    counts."""
    values: Dict[str, StatsValue] = {}
    for name, _, value in entries:
        values.setdefault(name, value)
    return values


class Frame(NamedTuple):
    """One received frame with its decoded content."""

    kind: int
    request_id: int
    content: Reply


def take_frame(received: bytearray, at: int) -> Optional[Tuple[Frame, int]]:
    """The frame that starts at `at`, and the index of its end. None while it is incomplete."""
    if len(received) - at < HEADER.size:
        return None
    length, kind, flags, status, request_id = HEADER.unpack_from(received, at)
    limit = MAX_LARGE_BODY if kind in (BYTES_RESP, INFER_RESP) else MAX_REPLY_BODY
    at_most(limit, length, "the length of a reply's body")
    start = at + HEADER.size
    if len(received) < start + length:
        return None
    content = decode(kind, flags, status, received[start:start + length])
    return Frame(kind, request_id, content), start + length
