#!/usr/bin/env python3
"""Golden vectors of the Afterimage protocol, made from PROTOCOL.md alone.

    make.py            writes valid.jsonl, invalid.jsonl and the listing in PROTOCOL.md
    make.py --check    writes nothing; fails when one of these files differs

The script shares no code with the Rust implementation or the Python client, so that one mistake is
not repeated in all three. A body is a list of named fields. The truncations inside each field and
the annotated listing come from this list.
"""

import json
import pathlib
import struct
import sys

HERE = pathlib.Path(__file__).resolve().parent
PROTOCOL = HERE.parent / "PROTOCOL.md"

KINDS = {
    "Hello": 0x01, "Welcome": 0x02, "Ping": 0x03, "Pong": 0x04, "StatsReq": 0x05, "StatsResp": 0x06,
    "Error": 0x07, "GoAway": 0x08, "SnapshotReq": 0x09, "SnapshotResp": 0x0A, "CacheReq": 0x10, "CacheResp": 0x11,
    "BytesReq": 0x12, "BytesResp": 0x13, "ClassifyReq": 0x20, "ClassifyResp": 0x21, "InferReq": 0x22, "InferResp": 0x23,
    "ForgetReq": 0x30, "ForgetResp": 0x31, "FlushReq": 0x32, "FlushResp": 0x33,
    "StreamOpen": 0x40, "StreamData": 0x41, "StreamCredit": 0x42, "StreamProgress": 0x43, "StreamReset": 0x44,
}
STATUSES = [
    "none", "upstream_error", "upstream_crashed", "upstream_corrupt", "bad_argument", "overloaded",
    "deadline_exceeded", "unauthenticated", "too_large", "unsupported", "shutting_down", "internal",
    "storage_failed", "unauthorized",
]
SERVICES = {"memo": 1, "cache": 2, "classifier": 3}
STATS_TYPES = {"counter": 1, "gauge": 2, "text": 3, "histogram": 4}
# The flags of a ClassifyResp, and the origins of an InferResp.
ORIGINS = {"miss": 0x00, "hit": 0x01, "coalesced": 0x02}

WRITE = EXISTS = CONNECTION = JOINED = REFRESH = END = 0x01
NO_STORE = 0x02
SHUTTING_DOWN = STATUSES.index("shutting_down")
MAGIC = b"AFTERIMG"
MIB = 1 << 20
U16, U32, U64 = (1 << 16) - 1, (1 << 32) - 1, (1 << 64) - 1
I64_MIN, I64_MAX = -(1 << 63), (1 << 63) - 1


def u8(value):
    return struct.pack("<B", value)


def u16(value):
    return struct.pack("<H", value)


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def i64(value):
    return struct.pack("<q", value)


# Bodies as lists of (field, bytes). The names of the fields are those of the byte tables in
# PROTOCOL.md.


def extension(tag, data):
    return [("extension tag", u16(tag)), ("extension length", u16(len(data))), ("extension", data)]


def hello(token=b"", oldest=1, newest=2, features=0, extensions=()):
    body = [
        ("magic", MAGIC), ("oldest version", u16(oldest)), ("newest version", u16(newest)),
        ("features", u32(features)), ("token length", u16(len(token))), ("token", token),
    ]
    return body + [part for tag, data in extensions for part in extension(tag, data)]


def welcome(service=1, version=2, features=0, max_body=MIB, window=4096, classes=10, digest=bytes(32),
            shape=(28, 28), name="", extensions=()):
    text = name.encode()
    body = [
        ("magic", MAGIC), ("version", u16(version)), ("service", u8(service)),
        ("number of dimensions", u8(len(shape))), ("features", u32(features)), ("largest body", u32(max_body)),
        ("window", u32(window)), ("number of classes", u32(classes)), ("digest", digest),
    ]
    body += [("dimension", u32(extent)) for extent in shape]
    body += [("name length", u8(len(text))), ("name", text)]
    return body + [part for tag, data in extensions for part in extension(tag, data)]


def stats_entry(name, kind, value):
    if kind == "counter":
        payload = [("counter", u64(value))]
    elif kind == "gauge":
        payload = [("gauge", i64(value))]
    elif kind == "text":
        payload = [("text", value.encode())]
    elif kind == "histogram":
        payload = [part for bound, count in value
                   for part in (("bucket bound", u64(bound)), ("bucket count", u64(count)))]
    else:
        payload = [("entry", value)]
    text = name.encode()
    return [
        ("entry type", u8(STATS_TYPES.get(kind, kind))), ("entry name length", u8(len(text))),
        ("entry name", text), ("entry length", u32(len(join(payload)))),
    ] + payload


def snapshot(entries, size, elapsed):
    return [("entries", u64(entries)), ("bytes", u64(size)), ("elapsed", u64(elapsed))]


def short_text(field, value):
    data = value.encode()
    return [(f"{field} length", u8(len(data))), (field, data)]


def infer(rows, model="", version="", ttl=0, budget=0, count=None):
    body = short_text("model", model) + short_text("version", version)
    body += [("time to live", u32(ttl)), ("budget", u32(budget))]
    body += [("number of rows", u32(len(rows) if count is None else count))]
    return body + [part for row in rows for part in (("row length", u32(len(row))), ("row", row))]


def infer_answer(origin, age, content):
    """An answer: `content` is a label or bytes."""
    head = [("origin", u8(ORIGINS.get(origin, origin))), ("age", u32(age))]
    if isinstance(content, int):
        return head + [("answer kind", u8(0)), ("label", u16(content))]
    return head + [("answer kind", u8(1)), ("answer length", u32(len(content))), ("answer", content)]


def infer_resp(answers, digest=bytes(32), count=None):
    body = [("digest", digest), ("number of answers", u32(len(answers) if count is None else count))]
    return body + [part for answer in answers for part in infer_answer(*answer)]


def stream_open(name="", header=b"", credit=0):
    return [("credit", u64(credit))] + short_text("name", name) + [("header", header)]


def join(parts):
    return b"".join(data for _, data in parts)


def frame(kind, body=b"", flags=0, status=0, request_id=1, body_len=None):
    length = len(body) if body_len is None else body_len
    return struct.pack("<IBBHQ", length, kind, flags, status, request_id) + body


# The collection.


class Vectors:
    def __init__(self):
        self.lines = {"valid": {}, "invalid": {}}
        self.frames = {}
        self.parts = {}

    def add(self, table, name, comment, content):
        assert name not in self.lines[table], f"two {table} vectors have the name {name}"
        vector = {"name": name, "comment": comment, **content}
        self.lines[table][name] = json.dumps(vector, ensure_ascii=False)

    def text(self, table):
        """The text of one file: a JSON object in each line."""
        return "".join(line + "\n" for line in self.lines[table].values())

    def valid(self, name, comment, kind, parts, fields, flags=0, status=0, request_id=1, canonical=True):
        """Adds a valid frame. `kind` is a name or an unknown number; `parts` is the body."""
        code = KINDS.get(kind, kind)
        body = join(parts)
        data = frame(code, body, flags, status, request_id)
        self.frames[name], self.parts[name] = data, parts
        self.add("valid", name, comment, {
            "hex": data.hex(),
            "header": {
                "body_len": len(body), "kind": code, "flags": flags, "status": status, "id": str(request_id),
            },
            "message": kind if kind in KINDS else "Unknown",
            "fields": fields,
            "canonical": canonical,
        })

    def invalid(self, name, comment, data, error, field, answer, max_body=MIB, **detail):
        self.add("invalid", name, comment, {
            "hex": data.hex(),
            "max_body": max_body,
            "error": error,
            "field": field,
            **detail,
            "answer": answer,
        })

    def truncations(self, kind, parts, answer, flags=0, status=0, label=None, skip=()):
        """Adds one invalid frame for each field of `parts`. Its body ends inside this field."""
        label, seen, at = label or kind, set(), 0
        for field, data in parts:
            if data and field not in seen and field not in skip:
                seen.add(field)
                body = join(parts)[:at + len(data) - 1]
                name = f"{snake(label)}_ends_inside_{field.replace(' ', '_')}"
                self.invalid(
                    name, f"The body of a {label} ends one byte before the end of the field \"{field}\".",
                    frame(KINDS[kind], body, flags, status), "truncated", field, answer)
            at += len(data)


def snake(name):
    return "".join("_" + c.lower() if c.isupper() and i else c.lower() for i, c in enumerate(name)).replace(" ", "")


def digit():
    """A 28×28 image of a digit 1 whose brightness grows from row to row."""
    return bytes(
        min(255, 40 + 7 * row) if 12 <= column <= 15 and 4 <= row <= 23 else 0
        for row in range(28) for column in range(28)
    )


def valid(v):
    # Handshake.
    def add_hello(name, comment, request_id=0, canonical=True, **arguments):
        parts = hello(**arguments)
        fields = {
            "version_min": arguments.get("oldest", 1), "version_max": arguments.get("newest", 2),
            "features": arguments.get("features", 0), "token": arguments.get("token", b"").hex(),
        }
        v.valid(name, comment, "Hello", parts, fields, request_id=request_id,
                canonical=canonical and not arguments.get("extensions"))

    add_hello("hello", "A Hello for versions 1 and 2 without a token.")
    add_hello("hello_version_1", "A Hello of a client that speaks version 1 only.", newest=1)
    add_hello("hello_version_2", "A Hello of a client that speaks version 2 only.", oldest=2)
    add_hello("hello_with_token", "A Hello with a token.", token=b"open sesame")
    add_hello("hello_longest_token", "A token of 1024 bytes, the maximum. It is not UTF-8.",
              token=bytes(255 - i % 256 for i in range(1024)), request_id=U64)
    add_hello("hello_versions", "The client speaks versions 1 to 65535 and requests every feature.", newest=U16, features=U32)
    add_hello("hello_no_common_version", "A well-formed Hello of a client that speaks versions 3 and 4 only.", oldest=3, newest=4)
    add_hello("hello_versions_reversed", "A well-formed Hello whose oldest version is above the newest.",
              oldest=1, newest=0)
    add_hello("hello_with_extension", "A Hello with one unknown extension. The server skips it.",
              extensions=[(0xF000, b"later")])
    add_hello("hello_with_extensions", "A token and three extensions: one is empty, one tag is repeated, the tags are the lowest and the highest.",
              token=b"t", extensions=[(0, b""), (U16, bytes(300)), (0, b"\xff")])
    body_room = 4096 - len(join(hello())) - 4
    add_hello("hello_longest", "A Hello with a body of 4096 bytes, the maximum before the handshake.",
              extensions=[(7, bytes(body_room))])
    v.valid("hello_with_budget", "The server ignores the time budget of a Hello.", "Hello", hello(),
            {"version_min": 1, "version_max": 2, "features": 0, "token": ""}, status=500, canonical=False)

    def add_welcome(vector, comment, request_id=0, flags=0, status=0, canonical=True, **arguments):
        parts = welcome(**arguments)
        fields = {
            "version": arguments.get("version", 2), "service": arguments.get("service", 1),
            "features": arguments.get("features", 0), "max_body": arguments.get("max_body", MIB),
            "window": arguments.get("window", 4096), "classes": arguments.get("classes", 10),
            "digest": arguments.get("digest", bytes(32)).hex(), "shape": list(arguments.get("shape", (28, 28))),
            "name": arguments.get("name", ""),
        }
        v.valid(vector, comment, "Welcome", parts, fields, flags=flags, status=status, request_id=request_id,
                canonical=canonical and not arguments.get("extensions"))

    model = bytes(range(32))
    add_welcome("welcome_memo", "A memo in front of a model for 28×28 digits.", digest=model, name="afterimage 0.1.0")
    add_welcome("welcome_version_1", "A memo on a connection of version 1.", version=1, digest=model, name="afterimage 0.1.0")
    add_welcome("welcome_classifier", "A classifier of the same model.", service=3, digest=model, name="afterimage 0.1.0")
    add_welcome("welcome_cache", "A cache has no model: no dimensions, no classes, a digest of zeros.",
                service=2, shape=(), classes=0, name="afterimage 0.1.0")
    add_welcome("welcome_four_dimensions", "Four dimensions, the maximum.", shape=(1, 3, 224, U32))
    add_welcome("welcome_one_dimension", "One dimension, of extent 0.", shape=(0,))
    add_welcome("welcome_longest_name", "A name of 255 bytes in UTF-8.", name="é" * 127 + "!", service=2, shape=())
    add_welcome("welcome_empty_name", "No name.", service=2, shape=(), classes=0)
    add_welcome("welcome_extremes", "The highest value in every number, and an unknown service.",
                version=U16, service=255, features=U32, max_body=U32, window=U32, classes=U32,
                digest=b"\xff" * 32, request_id=U64)
    add_welcome("welcome_unknown_service", "Service 0 is not assigned. Decoding keeps the number.", service=0)
    add_welcome("welcome_with_extensions", "The client skips unknown extensions.", digest=model, name="later",
                extensions=[(1, b"\x00"), (0xF001, b"")])
    add_welcome("welcome_unknown_flags", "The client ignores unknown flags and the status of a Welcome.", flags=0xFF,
                status=U16, canonical=False)

    # Ping, Pong.
    for kind in ("Ping", "Pong"):
        name = kind.lower()
        v.valid(f"{name}_empty", f"A {kind} with an empty body and the lowest id.", kind, [], {"bytes": ""}, request_id=0)
        v.valid(f"{name}_clock", f"A {kind} with eight bytes.", kind, [(name, b"\x01\x02\x03\x04\x05\x06\x07\x08")],
                {"bytes": "0102030405060708"}, request_id=0x0123456789ABCDEF)
        v.valid(f"{name}_longest", f"A {kind} with 64 bytes, the maximum, and the highest id.", kind,
                [(name, bytes(range(64)))], {"bytes": bytes(range(64)).hex()}, request_id=U64)
    v.valid("ping_with_budget", "The server ignores the time budget of a Ping.", "Ping", [("ping", b"x")],
            {"bytes": "78"}, status=1, canonical=False)
    v.valid("pong_unknown_flags", "The client ignores unknown flags of a Pong.", "Pong", [("pong", b"x")], {"bytes": "78"},
            flags=0x80, canonical=False)

    # Stats.
    v.valid("stats_req", "A StatsReq has an empty body.", "StatsReq", [], {}, request_id=0)
    v.valid("stats_req_highest_id", "A StatsReq with the highest id.", "StatsReq", [], {}, request_id=U64)

    def add_stats(name, comment, entries, request_id=1, canonical=True):
        parts = [part for entry in entries for part in stats_entry(*entry)]

        def value(kind, given):
            if kind in ("counter", "gauge"):
                return str(given)
            if kind == "histogram":
                return [[str(bound), str(count)] for bound, count in given]
            return given if kind == "text" else given.hex()

        fields = {"entries": [
            {"name": entry, "type": STATS_TYPES.get(kind, kind), "value": value(kind, given)}
            for entry, kind, given in entries
        ]}
        v.valid(name, comment, "StatsResp", parts, fields, request_id=request_id, canonical=canonical)

    add_stats("stats_resp_empty", "A StatsResp without entries.", [])
    add_stats("stats_resp", "One entry of each type.", [
        ("uptime_s", "counter", 86400), ("connections", "gauge", 17), ("model", "text", "digits"),
        ("latency_ns", "histogram", [(1000, 5), (2000, 40), (4000, 3)]),
    ])
    add_stats("stats_resp_extremes", "The lowest and highest value of each type.", [
        ("counter_min", "counter", 0), ("counter_max", "counter", U64),
        ("gauge_min", "gauge", I64_MIN), ("gauge_max", "gauge", I64_MAX), ("gauge_minus_one", "gauge", -1),
        ("text_empty", "text", ""), ("text", "text", "grün und 青"),
        ("histogram_empty", "histogram", []), ("histogram", "histogram", [(0, U64), (U64, 0)]),
    ], request_id=U64)
    add_stats("stats_resp_names", "An empty name and a name of 255 bytes, the maximum.",
              [("", "counter", 1), ("é" * 127 + "n", "gauge", 2)])
    add_stats("stats_resp_same_name_twice", "Two entries with the same name. Decoding keeps both; the client uses the first.",
              [("hits", "counter", 1), ("hits", "counter", 2)])
    add_stats("stats_resp_long_text", "A text of 2000 bytes. The limit on the text of an Error does not apply.",
              [("text", "text", "x" * 2000)])
    add_stats("stats_resp_unknown_type", "Unknown entry types before a counter. The client skips them.",
              [("later", 9, b"\x01\x02\x03"), ("none", 0, b""), ("last", 255, b"\xff"), ("hits", "counter", 5)],
              canonical=False)

    # Errors: one for each status, then the special cases.
    def add_error(name, comment, status, text, connection=False, request_id=1, flags=None, canonical=True):
        bits = (CONNECTION if connection else 0) if flags is None else flags
        v.valid(name, comment, "Error", [("text", text.encode())], {"text": text, "connection": connection},
                flags=bits, status=status, request_id=request_id, canonical=canonical)

    for code, name in enumerate(STATUSES):
        comment = f"An Error with status {code} ({name})."
        if code == 0:
            comment = "An Error with status 0 (none). No server sends it; a client treats it as an error."
        add_error(f"error_{name}", comment, code, f"about {name}", request_id=1000 + code)
    add_error("error_unknown_status", "An unknown status. Decoding keeps the number.", 13, "later")
    add_error("error_highest_status", "The highest status.", U16, "later", request_id=U64)
    add_error("error_empty_text", "An Error with an empty text.", 5, "", request_id=0)
    add_error("error_longest_text", "A text of 1024 bytes, the maximum.", 11, "é" * 511 + "ab")
    add_error("error_connection", "An Error that concerns the connection.", 7, "the token is wrong", True, 0)
    add_error("error_connection_unknown_status", "An Error that concerns the connection, with an unknown status.", 500, "", True, 0)
    add_error("error_unknown_flags", "The client ignores unknown flags of an Error.", 5, "wait", flags=0xFE, canonical=False)
    add_error("error_all_flags", "All flags are set. The client ignores the unknown ones and obeys CONNECTION.", 5, "wait", True, flags=0xFF, canonical=False)

    # GoAway.
    def add_goaway(name, comment, text, status=SHUTTING_DOWN, canonical=True, request_id=0, flags=0):
        v.valid(name, comment, "GoAway", [("text", text.encode())], {"text": text}, status=status,
                request_id=request_id, canonical=canonical, flags=flags)

    add_goaway("go_away", "A GoAway with a text.", "restarting")
    add_goaway("go_away_empty_text", "A GoAway with an empty text.", "")
    add_goaway("go_away_longest_text", "A text of 1024 bytes, the maximum.", "青" * 341 + "!")
    add_goaway("go_away_other_status", "The client ignores the status, flags and id of a GoAway.", "restarting", 0, False, U64, 0xFF)

    # Snapshots.
    v.valid("snapshot_req", "A SnapshotReq has an empty body.", "SnapshotReq", [], {}, request_id=0)
    v.valid("snapshot_req_highest_id", "A SnapshotReq with the highest id.", "SnapshotReq", [], {}, request_id=U64)
    v.valid("snapshot_req_with_budget", "The server ignores the time budget of a SnapshotReq.", "SnapshotReq",
            [], {}, status=9, canonical=False)

    def add_snapshot(name, comment, entries, size, elapsed, flags=0, request_id=1, status=0, canonical=True):
        v.valid(name, comment, "SnapshotResp", snapshot(entries, size, elapsed),
                {"entries": str(entries), "bytes": str(size), "elapsed_us": str(elapsed), "joined": bool(flags & JOINED)},
                flags=flags, status=status, request_id=request_id, canonical=canonical)

    add_snapshot("snapshot_resp", "Ten million entries, written in 1.25 s.", 10_000_000, 170_029_336, 1_250_000)
    add_snapshot("snapshot_resp_joined", "The snapshot was already being written when the request came.", 2, 78, 12, JOINED)
    add_snapshot("snapshot_resp_lowest", "An empty table, id 0.", 0, 36, 0, request_id=0)
    add_snapshot("snapshot_resp_highest", "The highest number in every field.", U64, U64, U64, request_id=U64)
    add_snapshot("snapshot_resp_unknown_flags", "The client ignores unknown flags and the status, and obeys JOINED.",
                 1, 57, 3, 0xFF, status=3, canonical=False)

    # Cache.
    def add_read(name, comment, key, budget=0, request_id=1):
        v.valid(name, comment, "CacheReq", [("key", u64(key))],
                {"write": False, "key": str(key), "budget_ms": budget}, status=budget, request_id=request_id)

    def add_write(name, comment, key, value, request_id=1, status=0):
        v.valid(name, comment, "CacheReq", [("key", u64(key)), ("value", i64(value))],
                {"write": True, "key": str(key), "value": str(value)}, flags=WRITE, status=status,
                request_id=request_id, canonical=status == 0)

    def add_value(name, comment, value, flags=0, request_id=1, status=0, canonical=True):
        parts = [] if value is None else [("value", i64(value))]
        v.valid(name, comment, "CacheResp", parts, {"value": None if value is None else str(value)},
                flags=flags, status=status, request_id=request_id, canonical=canonical)

    add_read("cache_read", "Reads a key.", 0x0123456789ABCDEF)
    add_read("cache_read_lowest", "Key 0, id 0.", 0, request_id=0)
    add_read("cache_read_highest", "The highest key, id and time budget.", U64, U16, U64)
    add_read("cache_read_budget", "A time budget of 250 ms.", 42, 250)
    add_write("cache_write", "Writes a key. There is no reply.", 0x0123456789ABCDEF, 7)
    add_write("cache_write_lowest", "Key 0, the lowest value, id 0.", 0, I64_MIN, 0)
    add_write("cache_write_highest", "The highest key, value and id.", U64, I64_MAX, U64)
    add_write("cache_write_minus_one", "The value −1: all bits are set.", 1, -1)
    add_write("cache_write_zero", "The value 0.", 1, 0)
    add_write("cache_write_with_budget", "The server ignores the time budget of a write.", 1, 2, status=9)
    add_value("cache_resp_absent", "The cache does not have the key.", None)
    add_value("cache_resp_exists", "The key's value.", 7, EXISTS)
    add_value("cache_resp_zero", "The value 0 differs from a missing value.", 0, EXISTS, request_id=0)
    add_value("cache_resp_lowest", "The lowest value.", I64_MIN, EXISTS)
    add_value("cache_resp_highest", "The highest value and id.", I64_MAX, EXISTS, U64)
    add_value("cache_resp_unknown_flags", "The client ignores unknown flags and the status, and obeys EXISTS.", -1,
              0xFF, status=3, canonical=False)
    add_value("cache_resp_absent_unknown_flags", "The client ignores unknown flags. Without EXISTS the body is empty.", None, 0xFE,
              canonical=False)

    # Classifier.
    def add_image(name, comment, image, budget=0, request_id=1):
        v.valid(name, comment, "ClassifyReq", [("image", image)], {"image": image.hex(), "budget_ms": budget},
                status=budget, request_id=request_id)

    def add_label(name, comment, label, origin, flags=None, request_id=1, status=0, canonical=True):
        v.valid(name, comment, "ClassifyResp", [("label", u16(label))], {"label": label, "origin": origin},
                flags=ORIGINS[origin] if flags is None else flags, status=status, request_id=request_id,
                canonical=canonical)

    add_image("classify_req_digit", "An image of 28×28 pixels.", digit())
    add_image("classify_req_budget", "One pixel, and a time budget of 20 ms.", b"\x80", 20)
    add_image("classify_req_extremes", "The highest id and time budget.", b"\xff" * 4, U16, U64)
    add_image("classify_req_empty", "An image without pixels. The frame is valid; the service answers bad_argument.", b"", 0, 0)
    add_label("classify_resp_miss", "A miss: the classifier computed the label for this request.", 7, "miss")
    add_label("classify_resp_hit", "A hit: the label comes from the store.", 7, "hit")
    add_label("classify_resp_coalesced", "Coalesced: the label was computed for an identical request in flight.", 7, "coalesced")
    add_label("classify_resp_lowest", "Label 0, id 0.", 0, "miss", request_id=0)
    add_label("classify_resp_highest", "The highest label and id.", U16, "hit", request_id=U64)
    add_label("classify_resp_both_flags", "HIT and COALESCED together: the client reports a hit.", 1, "hit", 0x03,
              canonical=False)
    add_label("classify_resp_unknown_flags", "The client ignores unknown flags and the status.", 1, "miss", 0xFC,
              status=5, canonical=False)

    # Version 2: values of bytes.
    def add_bytes_read(name, comment, key, budget=0, request_id=1):
        v.valid(name, comment, "BytesReq", [("key", key)], {"write": False, "key": key.hex(), "budget_ms": budget},
                status=budget, request_id=request_id)

    def add_bytes_write(name, comment, key, ttl, value, request_id=1, status=0):
        v.valid(name, comment, "BytesReq", [("key", key), ("time to live", u32(ttl)), ("value", value)],
                {"write": True, "key": key.hex(), "ttl_s": ttl, "value": value.hex()}, flags=WRITE, status=status,
                request_id=request_id, canonical=status == 0)

    def add_bytes(name, comment, value, flags=None, request_id=1, canonical=True):
        flags = (0 if value is None else EXISTS) if flags is None else flags
        v.valid(name, comment, "BytesResp", [] if value is None else [("value", value)],
                {"value": None if value is None else value.hex()}, flags=flags, request_id=request_id, canonical=canonical)

    key = bytes(range(16))
    add_bytes_read("bytes_read", "Reads the bytes of a key.", key)
    add_bytes_read("bytes_read_extremes", "The highest key, id and time budget.", b"\xff" * 16, U16, U64)
    add_bytes_write("bytes_write", "Writes bytes for 60 s.", key, 60, b"a value")
    add_bytes_write("bytes_write_empty", "A value of 0 bytes without a limit in time.", bytes(16), 0, b"", 0)
    add_bytes_write("bytes_write_longest_time", "The longest time to live.", key, U32, b"\x00", U64)
    add_bytes_write("bytes_write_with_budget", "The server ignores the time budget of a write.", key, 0, b"v", status=9)
    add_bytes("bytes_resp_absent", "The cache does not have the key. A write has the same reply.", None)
    add_bytes("bytes_resp_exists", "The key's value.", b"a value")
    add_bytes("bytes_resp_empty", "A value of 0 bytes differs from a missing value.", b"", request_id=U64)
    add_bytes("bytes_resp_unknown_flags", "The client ignores unknown flags and obeys EXISTS.", b"v", 0xFF, canonical=False)

    # Version 2: inference.
    def add_infer(name, comment, rows, refresh=False, no_store=False, request_id=1, status=0, **arguments):
        flags = (REFRESH if refresh else 0) | (NO_STORE if no_store else 0)
        fields = {
            "model": arguments.get("model", ""), "version": arguments.get("version", ""), "refresh": refresh,
            "no_store": no_store, "ttl_s": arguments.get("ttl", 0), "budget_ms": arguments.get("budget", 0),
            "rows": [row.hex() for row in rows],
        }
        v.valid(name, comment, "InferReq", infer(rows, **arguments), fields, flags=flags, status=status,
                request_id=request_id, canonical=status == 0)

    def add_answers(name, comment, answers, request_id=1, flags=0, **arguments):
        fields = {
            "digest": arguments.get("digest", bytes(32)).hex(),
            "answers": [
                {"origin": origin, "age_s": age, **({"label": content} if isinstance(content, int) else {"bytes": content.hex()})}
                for origin, age, content in answers
            ],
        }
        v.valid(name, comment, "InferResp", infer_resp(answers, **arguments), fields, flags=flags, request_id=request_id,
                canonical=flags == 0)

    add_infer("infer_req", "Two rows for a model, with a time budget of two minutes.", [b"first", b"second"],
              model="resnet", budget=120_000)
    add_infer("infer_req_row_empty", "One row of 0 bytes for the model of the Welcome.", [b""], request_id=0)
    add_infer("infer_req_directives", "Compute anew, and store nothing.", [b"row"], True, True, model="m", version="2")
    add_infer("infer_req_refresh", "Compute anew, and keep the answer for a minute.", [b"row"], True, ttl=60)
    add_infer("infer_req_no_store", "Store nothing.", [b"row"], no_store=True)
    add_infer("infer_req_extremes", "The longest name and version, and the highest numbers.", [b"\xff" * 3], request_id=U64,
              model="é" * 127 + "m", version="v" * 255, ttl=U32, budget=U32)
    add_infer("infer_req_with_budget_in_header", "The server ignores the time budget in the header.", [b"row"], status=9)
    add_answers("infer_resp", "A miss with bytes, a hit with a label, and a coalesced answer.",
                [("miss", 0, b"bytes"), ("hit", 3600, 7), ("coalesced", 0, b"")], digest=model)
    add_answers("infer_resp_extremes", "The highest age, label and id.", [("hit", U32, U16)], U64)
    add_answers("infer_resp_unknown_flags", "The client ignores flags of an InferResp.", [("miss", 0, 0)], flags=0xFF)

    # Version 2: stored answers.
    def add_forget(name, comment, model, version, row, request_id=1):
        v.valid(name, comment, "ForgetReq", short_text("model", model) + short_text("version", version) + [("row", row)],
                {"model": model, "version": version, "row": row.hex()}, request_id=request_id)

    add_forget("forget_req", "Takes the answer of one row back.", "resnet", "2", b"row")
    add_forget("forget_req_empty", "A row of 0 bytes, the only model, the present version.", "", "", b"", U64)
    v.valid("forget_resp", "One answer was stored.", "ForgetResp", [("count", u64(1))], {"count": "1"})
    v.valid("forget_resp_highest", "The highest number.", "ForgetResp", [("count", u64(U64))], {"count": str(U64)},
            request_id=U64)
    v.valid("flush_req", "Takes all answers of a model back.", "FlushReq", short_text("model", "resnet"), {"model": "resnet"})
    v.valid("flush_req_all", "Takes all answers of all models back.", "FlushReq", short_text("model", ""), {"model": ""}, request_id=0)
    v.valid("flush_resp", "It is done.", "FlushResp", [], {})

    # Version 2: streams.
    def add_open(vector, comment, request_id=1, status=0, canonical=True, **arguments):
        fields = {
            "credit": str(arguments.get("credit", 0)), "name": arguments.get("name", ""),
            "header": arguments.get("header", b"").hex(),
        }
        v.valid(vector, comment, "StreamOpen", stream_open(**arguments), fields, request_id=request_id, status=status,
                canonical=canonical)

    def add_data(name, comment, data, end=False, **arguments):
        v.valid(name, comment, "StreamData", [("data", data)], {"bytes": data.hex(), "end": end}, flags=END if end else 0,
                **arguments)

    def add_reset(name, comment, status, text, **arguments):
        v.valid(name, comment, "StreamReset", [("text", text.encode())], {"text": text}, status=status, **arguments)

    add_open("stream_open", "A stream with parameters; the server may send 256 KiB.", name="fold/mean", header=b"{}",
             credit=1 << 18)
    add_open("stream_open_empty", "No name, no parameters, no credit.")
    add_open("stream_open_extremes", "The longest name, and the highest credit and id.", U64, name="é" * 127 + "n",
             credit=U64, header=bytes(range(256)))
    add_open("stream_open_with_budget", "The server ignores the time budget of a StreamOpen.", status=9, canonical=False,
             name="watch")
    add_data("stream_data", "Bytes of a stream.", b"some bytes")
    add_data("stream_data_empty", "A StreamData may be empty.", b"", request_id=U64)
    add_data("stream_data_end", "The last bytes of a direction.", b"the rest", True)
    add_data("stream_data_end_alone", "The end of a direction alone.", b"", True)
    v.valid("stream_credit", "The receiver may send 16385 bytes in total.", "StreamCredit", [("credit", u64(16385))],
            {"credit": "16385"})
    v.valid("stream_credit_highest", "The highest credit is valid: there is no limit then.", "StreamCredit",
            [("credit", u64(U64))], {"credit": str(U64)}, request_id=U64)
    v.valid("stream_progress", "The state of the work.", "StreamProgress", [("progress", b"\x07\x00")], {"bytes": "0700"})
    v.valid("stream_progress_empty", "An empty progress message.", "StreamProgress", [], {"bytes": ""})
    add_reset("stream_reset_cancel", "The sender no longer needs the stream.", 0, "")
    add_reset("stream_reset_failed", "The work has failed.", STATUSES.index("bad_argument"), "record 7 is not a number")
    add_reset("stream_reset_unknown_status", "An unknown status survives, as in an Error.", U16, "é" * 512, request_id=U64)

    # Unknown kinds.
    for code, comment in [
        (0x00, "Kind 0 is not assigned"), (0x0B, "The first free kind of the connection group"),
        (0x14, "The first free kind of the cache group"), (0x24, "The first free kind of the group of models"),
        (0x34, "The first free kind of the group of stored answers"), (0x45, "The first free kind of the group of streams"), (0x50, "The first kind that is reserved"), (0xF0, "The first kind for private experiments"),
        (0xFF, "The highest kind"),
    ]:
        v.valid(f"unknown_kind_{code:02x}", f"{comment}. Decoding keeps the number.", code, [], {"kind": code},
                request_id=U64)
    v.valid("unknown_kind_with_body", "Decoding skips the body of an unknown kind and keeps its flags and status.", 0x7F,
            [("body", b"whatever this is")], {"kind": 0x7F}, flags=0xFF, status=U16, canonical=False)


def invalid(v):
    refuse, refuse_hello = "error bad_argument", "close bad_argument"
    foreign = "error unsupported"

    # Incomplete frames.
    read = frame(KINDS["CacheReq"], u64(1))
    v.invalid("nothing_yet", "No byte has come.", b"", "need_more", None, "wait")
    v.invalid("one_byte", "The first byte of a header.", read[:1], "need_more", None, "wait")
    v.invalid("header_without_its_last_byte", "The first 15 bytes of a header.", read[:15], "need_more", None, "wait")
    v.invalid("header_without_body", "A header. No byte of its body has come.", read[:16],
              "need_more", None, "wait")
    v.invalid("body_without_its_last_byte", "A frame without its last byte.", read[:-1], "need_more", None, "wait")
    v.invalid("largest_body_announced", "A header that announces max_body bytes, the maximum.",
              frame(KINDS["ClassifyReq"], body_len=MIB), "need_more", None, "wait")
    v.invalid("unknown_kind_announced", "An unknown kind whose body has not come yet.",
              frame(0x7F, b"ab", body_len=3), "need_more", None, "wait")

    # Too large.
    def too_large(name, comment, kind, length, answer, max_body=MIB, request_id=1, flags=0, body=b""):
        v.invalid(name, comment, frame(kind, body, flags, request_id=request_id, body_len=length), "frame_too_large",
                  None, answer, max_body, value=length, limit=max_body)

    classify = KINDS["ClassifyReq"]
    too_large("body_one_byte_too_large", "One byte more than max_body. The server skips the body.", classify, MIB + 1,
              "error too_large", request_id=U64)
    too_large("body_as_large_as_is_skipped", "16 MiB more than max_body, the longest body that the server skips.", classify,
              17 * MIB, "error too_large")
    too_large("body_larger_than_is_skipped", "One byte more than the longest body that the server skips.", classify, 17 * MIB + 1, "close too_large")
    too_large("body_of_4_gib", "The longest body that a header can announce.", classify, U32, "close too_large")
    too_large("body_too_large_of_a_write", "A cache write that is too large gets an Error, like every other frame.",
              KINDS["CacheReq"], 17, "error too_large", 16, flags=WRITE, body=bytes(17))
    too_large("body_too_large_for_max_body_0", "With max_body 0 only empty bodies are valid.", KINDS["Ping"], 1,
              "error too_large", 0, body=b"x")
    too_large("body_too_large_of_unknown_kind", "The length is checked before the kind.", 0x7F, MIB + 1, "error too_large")
    too_large("hello_too_large", "A Hello of 4097 bytes before the handshake.", KINDS["Hello"], 4097, refuse_hello,
              4096, request_id=0)
    for method in ("GET", "POST"):
        text = f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        v.invalid(f"http_{method.lower()}", "An HTTP request, decoded as a header.", text, "frame_too_large", None, "http 400",
                  4096, value=struct.unpack_from("<I", text)[0], limit=4096)
    tls = bytes.fromhex("1603010200010001fc0303") + bytes(32)
    v.invalid("tls_client_hello", "The start of a TLS handshake, decoded as a header of kind 0.", tls, "frame_too_large",
              None, "close unsupported", 4096, value=struct.unpack_from("<I", tls)[0], limit=4096)

    # Hello.
    code = KINDS["Hello"]
    full = hello(b"token", extensions=[(1, b"ab")])
    v.truncations("Hello", full, refuse_hello)
    v.invalid("hello_empty", "A Hello without a body.", frame(code), "truncated", "magic", refuse_hello)
    v.invalid("hello_token_missing", "The body ends before the announced token.",
              frame(code, join(hello()[:-2]) + u16(5)), "truncated", "token", refuse_hello)
    v.invalid("hello_extension_missing", "The body ends before the announced extension.",
              frame(code, join(hello()) + u16(1) + u16(U16)), "truncated", "extension", refuse_hello)
    v.invalid("hello_trailing_byte", "One byte after the token is the start of an extension.",
              frame(code, join(hello()) + b"\x00"), "truncated", "extension tag", refuse_hello)
    v.invalid("hello_wrong_magic", "The magic in lower case.", frame(code, b"afterimg" + join(hello()[1:])),
              "wrong_magic", "magic", refuse_hello)
    v.invalid("hello_wrong_magic_only", "The magic is checked before the missing fields after it.",
              frame(code, b"AFTERIMH"), "wrong_magic", "magic", refuse_hello)
    v.invalid("hello_token_too_long", "A token of 1025 bytes.", frame(code, join(hello(bytes(1025)))), "out_of_range",
              "token length", refuse_hello, value=1025, limit=1024)
    v.invalid("hello_token_far_too_long", "A token length of 65535. The length is checked before the missing token.",
              frame(code, join(hello()[:-2]) + u16(U16)), "out_of_range", "token length", refuse_hello,
              value=U16, limit=1024)
    for bits in (0x01, 0x80):
        v.invalid(f"hello_unknown_flags_{bits:02x}", "A Hello has no flags.", frame(code, join(hello()), bits),
                  "unknown_flags", None, "close unsupported", flags=bits)

    # Welcome. A server does not decode the body of a Welcome that it receives.
    code = KINDS["Welcome"]
    full = welcome(shape=(28,), name="name", extensions=[(1, b"ab")])
    v.truncations("Welcome", full, foreign)
    v.invalid("welcome_empty", "A Welcome without a body.", frame(code), "truncated", "magic", foreign)
    v.invalid("welcome_dimension_missing", "The body announces two dimensions and has one.",
              frame(code, join(welcome(shape=(28, 28))[:-3])), "truncated", "dimension", foreign)
    v.invalid("welcome_wrong_magic", "The magic is zeros.", frame(code, bytes(8) + join(welcome()[1:])),
              "wrong_magic", "magic", foreign)
    for dims in (5, 255):
        v.invalid(f"welcome_{dims}_dimensions", f"{dims} dimensions.", frame(code, join(welcome(shape=(1,) * dims))),
                  "out_of_range", "number of dimensions", foreign, value=dims, limit=4)
    v.invalid("welcome_name_not_utf8", "A name that is not UTF-8.",
              frame(code, join(welcome()[:-2]) + b"\x02\xc3\x28"), "not_utf8", "name", foreign)
    v.invalid("welcome_trailing_byte", "One byte after the name is the start of an extension.",
              frame(code, join(welcome()) + b"\x00"), "truncated", "extension tag", foreign)

    # Ping, Pong.
    v.invalid("ping_too_long", "A Ping of 65 bytes.", frame(KINDS["Ping"], bytes(65)), "out_of_range", "ping", refuse,
              value=65, limit=64)
    v.invalid("ping_unknown_flags", "A Ping has no flags.", frame(KINDS["Ping"], b"", 0x10), "unknown_flags", None,
              foreign, flags=0x10)
    v.invalid("ping_unknown_flags_and_too_long", "Flags are checked before the body.",
              frame(KINDS["Ping"], bytes(65), 0x01), "unknown_flags", None, foreign, flags=0x01)
    v.invalid("pong_too_long", "A Pong of 65 bytes.", frame(KINDS["Pong"], bytes(65)), "out_of_range", "pong", "ignore",
              value=65, limit=64)

    # Stats.
    v.invalid("stats_req_with_body", "A StatsReq has an empty body.", frame(KINDS["StatsReq"], b"abc"), "trailing", None,
              refuse, bytes=3)
    v.invalid("stats_req_unknown_flags", "A StatsReq has no flags.", frame(KINDS["StatsReq"], b"", 0x01),
              "unknown_flags", None, foreign, flags=0x01)
    code = KINDS["StatsResp"]

    def stats(name, comment, body, error, field, **detail):
        v.invalid(f"stats_resp_{name}", comment, frame(code, body), error, field, foreign, **detail)

    def entry(kind, payload, length=None, name=b"n"):
        size = len(payload) if length is None else length
        return u8(kind) + u8(len(name)) + name + u32(size) + payload

    # An entry that ends before its type does not exist. A payload that the end of the body cuts is
    # reported as a truncated entry, not as a truncated field of the entry.
    v.truncations("StatsResp", stats_entry("name", "counter", 1), foreign, skip=("entry type", "counter"))
    stats("ends_inside_entry", "The body ends inside a payload.", entry(1, bytes(7), 8), "truncated", "entry")
    stats("ends_inside_second_entry", "The first entry is whole, the second is not.",
          entry(1, bytes(8)) + b"\x01", "truncated", "entry name length")
    stats("entry_of_4_gib", "A payload length that is longer than every body.", entry(3, b"abc", U32), "truncated", "entry")
    stats("unknown_type_ends_inside_entry", "An unknown entry type must be complete, too.",
          entry(9, b"ab", 3), "truncated", "entry")
    stats("counter_too_short", "A counter of 7 bytes.", entry(1, bytes(7)), "truncated", "counter")
    stats("counter_too_long", "A counter of 9 bytes.", entry(1, bytes(9)), "trailing", None, bytes=1)
    stats("gauge_too_short", "A gauge of 0 bytes.", entry(2, b""), "truncated", "gauge")
    stats("gauge_too_long", "A gauge of 16 bytes.", entry(2, bytes(16)), "trailing", None, bytes=8)
    stats("histogram_half_a_pair", "A bucket bound without its count.", entry(4, bytes(24)), "truncated", "bucket count")
    stats("histogram_half_a_bound", "A bucket bound of 4 bytes.", entry(4, bytes(20)), "truncated", "bucket bound")
    stats("text_not_utf8", "A text that is not UTF-8.", entry(3, b"\xff"), "not_utf8", "text")
    stats("name_not_utf8", "A name that is not UTF-8.", entry(1, bytes(8), name=b"\xc0\x80"), "not_utf8", "entry name")
    stats("too_many_entries", "4097 entries, one more than the maximum.", entry(9, b"", name=b"") * 4097, "out_of_range",
          "number of entries", value=4097, limit=4096)

    # Snapshots.
    v.invalid("snapshot_req_with_body", "A client cannot name a file: a SnapshotReq has an empty body.",
              frame(KINDS["SnapshotReq"], b"/etc/passwd"), "trailing", None, refuse, bytes=11)
    v.invalid("snapshot_req_unknown_flags", "A SnapshotReq has no flags.", frame(KINDS["SnapshotReq"], b"", 0x01),
              "unknown_flags", None, foreign, flags=0x01)
    code = KINDS["SnapshotResp"]
    v.truncations("SnapshotResp", snapshot(1, 57, 3), foreign)
    v.invalid("snapshot_resp_empty", "A SnapshotResp without a body.", frame(code), "truncated", "entries", foreign)
    v.invalid("snapshot_resp_too_long", "One byte after the last field.", frame(code, bytes(25)), "trailing", None,
              foreign, bytes=1)

    # Texts of Error and GoAway. A server ignores both without decoding them.
    for kind, status in (("Error", 5), ("GoAway", SHUTTING_DOWN)):
        name = snake(kind)
        v.invalid(f"{name}_text_too_long", f"The text of an {kind} has 1025 bytes." if kind == "Error"
                  else "The text of a GoAway has 1025 bytes.", frame(KINDS[kind], b"x" * 1025, 0, status),
                  "out_of_range", "text", "ignore", value=1025, limit=1024)
        v.invalid(f"{name}_text_not_utf8", "A lone continuation byte.", frame(KINDS[kind], b"ok\x80", 0, status),
                  "not_utf8", "text", "ignore")
        v.invalid(f"{name}_text_cut_inside_a_character", "Two of the three bytes of a character.",
                  frame(KINDS[kind], "青".encode()[:2], 0, status), "not_utf8", "text", "ignore")
        v.invalid(f"{name}_text_with_a_surrogate", "A surrogate, which is not valid in UTF-8.",
                  frame(KINDS[kind], b"\xed\xa0\x80", 0, status), "not_utf8", "text", "ignore")

    # Cache.
    code = KINDS["CacheReq"]
    v.truncations("CacheReq", [("key", u64(1))], refuse, label="CacheRead")
    v.invalid("cache_read_empty", "A read without a key.", frame(code), "truncated", "key", refuse)
    v.invalid("cache_read_too_long", "A read with one extra byte.", frame(code, bytes(9)), "trailing", None, refuse,
              bytes=1)
    v.invalid("cache_read_with_value", "A read with a value: the flag WRITE is missing.", frame(code, bytes(16)),
              "trailing", None, refuse, bytes=8)
    v.truncations("CacheReq", [("key", u64(1)), ("value", i64(2))], refuse, flags=WRITE, label="CacheWrite")
    v.invalid("cache_write_without_value", "A malformed write gets an Error, although a write has no reply.",
              frame(code, bytes(8), WRITE, request_id=U64), "truncated", "value", refuse)
    v.invalid("cache_write_too_long", "A write with one extra byte.", frame(code, bytes(17), WRITE), "trailing", None,
              refuse, bytes=1)
    v.invalid("cache_read_unknown_flags", "A server rejects unknown flags in a request, because they can change its meaning.",
              frame(code, bytes(8), 0x02), "unknown_flags", None, foreign, flags=0x02)
    v.invalid("cache_write_unknown_flags", "WRITE and unknown flags: the unknown flags decide.",
              frame(code, bytes(16), 0xFF), "unknown_flags", None, foreign, flags=0xFE)
    code = KINDS["CacheResp"]
    v.truncations("CacheResp", [("value", i64(1))], foreign, flags=EXISTS)
    v.invalid("cache_resp_without_value", "EXISTS without a value.", frame(code, b"", EXISTS), "truncated", "value", foreign)
    v.invalid("cache_resp_absent_with_value", "A value without EXISTS.", frame(code, bytes(8)), "trailing", None, foreign,
              bytes=8)
    v.invalid("cache_resp_too_long", "A value and one extra byte.", frame(code, bytes(9), EXISTS), "trailing", None,
              foreign, bytes=1)

    # Classifier. Every body of a ClassifyReq is a valid frame; the service checks its length.
    for bits in (0x01, 0x80):
        v.invalid(f"classify_req_unknown_flags_{bits:02x}", "A ClassifyReq has no flags.",
                  frame(KINDS["ClassifyReq"], b"\x00", bits), "unknown_flags", None, foreign, flags=bits)
    code = KINDS["ClassifyResp"]
    v.truncations("ClassifyResp", [("label", u16(1))], foreign)
    v.invalid("classify_resp_empty", "A ClassifyResp without a body.", frame(code), "truncated", "label", foreign)
    v.invalid("classify_resp_too_long", "A label of 4 bytes.", frame(code, bytes(4)), "trailing", None, foreign, bytes=2)

    # Version 2.
    def bad(name, comment, kind, body, error, field, bits=0, answer=refuse, **detail):
        v.invalid(name, comment, frame(KINDS[kind], body, bits), error, field, answer, **detail)

    v.truncations("BytesReq", [("key", bytes(16))], refuse, label="BytesRead")
    bad("bytes_read_too_long", "A read with a value: the flag WRITE is missing.", "BytesReq", bytes(20), "trailing", None,
        bytes=4)
    v.truncations("BytesReq", [("key", bytes(16)), ("time to live", u32(1))], refuse, flags=WRITE, label="BytesWrite")
    bad("bytes_req_unknown_flags", "WRITE and an unknown flag.", "BytesReq", bytes(20), "unknown_flags", None, 0x03,
        foreign, flags=0x02)
    bad("bytes_resp_absent_with_value", "A value without EXISTS.", "BytesResp", b"v", "trailing", None, answer=foreign,
        bytes=1)

    v.truncations("InferReq", infer([b"row"], "model", "version"), refuse)
    bad("infer_req_empty", "An InferReq without a body.", "InferReq", b"", "truncated", "model length")
    bad("infer_req_without_rows", "No rows.", "InferReq", join(infer([])), "empty", "number of rows")
    bad("infer_req_too_many_rows", "65537 rows are announced. The number is checked before the missing rows.", "InferReq",
        join(infer([], count=65537)), "out_of_range", "number of rows", value=65537, limit=65536)
    bad("infer_req_row_missing", "Two rows are announced, one has come.", "InferReq", join(infer([b"row"], count=2)),
        "truncated", "row length")
    bad("infer_req_row_too_many", "One row is announced, two have come.", "InferReq", join(infer([b"a", b"b"], count=1)),
        "trailing", None, bytes=5)
    bad("infer_req_row_of_4_gib", "A row length that is longer than every body.", "InferReq",
        join(infer([], count=1)) + u32(U32), "truncated", "row")
    bad("infer_req_model_not_utf8", "A name that is not UTF-8.", "InferReq", b"\x01\xff" + join(infer([b"r"])[2:]),
        "not_utf8", "model")
    bad("infer_req_version_not_utf8", "A version that is not UTF-8.", "InferReq", b"\x00\x01\xff" + join(infer([b"r"])[4:]),
        "not_utf8", "version")
    bad("infer_req_unknown_flags", "REFRESH, NO_STORE and an unknown flag.", "InferReq", join(infer([b"r"])),
        "unknown_flags", None, 0x07, foreign, flags=0x04)
    answers = [("hit", 1, b"answer"), ("miss", 0, 5)]
    v.truncations("InferResp", infer_resp(answers), foreign)
    bad("infer_resp_without_answers", "No answers.", "InferResp", join(infer_resp([])), "empty", "number of answers",
        answer=foreign)
    bad("infer_resp_too_many_answers", "65537 answers are announced.", "InferResp", join(infer_resp([], count=65537)),
        "out_of_range", "number of answers", answer=foreign, value=65537, limit=65536)
    bad("infer_resp_answer_too_many", "One answer is announced, two have come.", "InferResp",
        join(infer_resp(answers, count=1)), "trailing", None, answer=foreign, bytes=8)
    bad("infer_resp_unknown_origin", "An origin above 2.", "InferResp", join(infer_resp([(3, 0, 5)])), "out_of_range",
        "origin", answer=foreign, value=3, limit=2)
    bad("infer_resp_unknown_answer_kind", "An answer kind above 1.", "InferResp",
        join(infer_resp([], count=1)) + bytes(5) + b"\x02\x00\x00", "out_of_range", "answer kind", answer=foreign, value=2,
        limit=1)

    v.truncations("ForgetReq", short_text("model", "model") + short_text("version", "version"), refuse)
    bad("forget_req_unknown_flags", "A ForgetReq has no flags.", "ForgetReq", bytes(2), "unknown_flags", None, 0x01,
        foreign, flags=0x01)
    bad("forget_req_not_utf8", "A name that is not UTF-8.", "ForgetReq", b"\x01\xff\x00", "not_utf8", "model")
    v.truncations("ForgetResp", [("count", u64(1))], foreign)
    bad("forget_resp_too_long", "One byte after the number.", "ForgetResp", bytes(9), "trailing", None, answer=foreign,
        bytes=1)
    v.truncations("FlushReq", short_text("model", "model"), refuse)
    bad("flush_req_empty", "A FlushReq without a body.", "FlushReq", b"", "truncated", "model length")
    bad("flush_req_too_long", "One byte after the name.", "FlushReq", b"\x01mx", "trailing", None, bytes=1)
    bad("flush_req_unknown_flags", "A FlushReq has no flags.", "FlushReq", b"\x00", "unknown_flags", None, 0x80,
        foreign, flags=0x80)
    bad("flush_resp_too_long", "A FlushResp has an empty body.", "FlushResp", b"x", "trailing", None, answer=foreign, bytes=1)

    reset, newer = "reset bad_argument", "reset unsupported"
    v.truncations("StreamOpen", stream_open("name", b""), reset)
    bad("stream_open_not_utf8", "A name that is not UTF-8.", "StreamOpen", bytes(8) + b"\x01\xff", "not_utf8", "name",
        answer=reset)
    bad("stream_open_unknown_flags", "A StreamOpen has no flags.", "StreamOpen", bytes(9), "unknown_flags", None, 0x01,
        newer, flags=0x01)
    bad("stream_data_unknown_flags", "END and an unknown flag.", "StreamData", b"x", "unknown_flags", None, 0x81, newer,
        flags=0x80)
    v.truncations("StreamCredit", [("credit", u64(1))], reset)
    bad("stream_credit_too_long", "A credit of more than 64 bits.", "StreamCredit", bytes(8) + b"\x01", "trailing", None,
        answer=reset, bytes=1)
    bad("stream_credit_unknown_flags", "A StreamCredit has no flags.", "StreamCredit", bytes(8), "unknown_flags", None, 0x02,
        newer, flags=0x02)
    bad("stream_progress_too_long", "A progress message of 1025 bytes.", "StreamProgress", bytes(1025), "out_of_range",
        "progress", answer=reset, value=1025, limit=1024)
    bad("stream_progress_unknown_flags", "A StreamProgress has no flags.", "StreamProgress", b"", "unknown_flags", None,
        0x01, newer, flags=0x01)
    bad("stream_reset_too_long", "A text of 1025 bytes.", "StreamReset", b"x" * 1025, "out_of_range", "text", answer=reset,
        value=1025, limit=1024)
    bad("stream_reset_not_utf8", "A text that is not UTF-8.", "StreamReset", b"\xff", "not_utf8", "text", answer=reset)
    bad("stream_reset_unknown_flags", "A StreamReset has no flags.", "StreamReset", b"", "unknown_flags", None, 0x01, newer,
        flags=0x01)


# The listing in PROTOCOL.md.

OPENS, CLOSES = "<!-- session -->\n", "<!-- end of session -->"
ROW = 16


def rows(data, meaning):
    """The bytes of `data` in hexadecimal, ROW in each line, with the meaning in the first line."""
    lines = [data[at:at + ROW].hex(" ") for at in range(0, len(data), ROW)]
    return [f"    {line:<{3 * ROW - 1}}  {meaning if i == 0 else ''}".rstrip() for i, line in enumerate(lines)]


def meaning(field, data):
    if field in ("magic", "token", "name"):
        return f"{field}: {data.decode()}"
    if field == "digest":
        return field
    return f"{field}: {int.from_bytes(data, 'little')}"


def listing(v):
    session = [("client", "hello_with_token"), ("server", "welcome_memo"), ("client", "classify_req_digit"),
               ("server", "classify_resp_hit")]
    names = {code: name for name, code in KINDS.items()}
    out = []
    for sender, name in session:
        data = v.frames[name]
        kind, flags = data[4], data[5]
        out += [f"The {sender} sends {names[kind]}, {len(data)} bytes:", "", "```text"]
        flag = " (HIT)" if names[kind] == "ClassifyResp" and flags == 0x01 else ""
        status = "time budget" if sender == "client" else "status"
        out += rows(data[0:4], f"body length: {len(data) - 16}")
        out += rows(data[4:5], f"kind: {names[kind]}")
        out += rows(data[5:6], f"flags: {flags}{flag}")
        out += rows(data[6:8], f"{status}: {int.from_bytes(data[6:8], 'little')}")
        out += rows(data[8:16], f"request id: {int.from_bytes(data[8:16], 'little')}")
        for field, part in v.parts[name]:
            if field == "image":
                first = 4 * 28 + 8
                out += rows(part[:ROW], f"image: 28 rows of 28 pixels, {len(part)} bytes")
                out += ["    ..."] + rows(part[first:first + ROW], f"bytes {first} to {first + ROW - 1}: part of row 4")
                out += ["    ..."] + rows(part[-ROW:], "the last bytes")
            elif part:
                out += rows(part, meaning(field, part))
        out += ["```", ""]
    return "\n".join(out)


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    check = arguments == ["--check"]
    v = Vectors()
    valid(v)
    invalid(v)
    text = PROTOCOL.read_text(encoding="utf-8")
    before, rest = text.split(OPENS)
    after = rest.split(CLOSES)[1]
    wanted = {HERE / f"{table}.jsonl": v.text(table) for table in v.lines}
    wanted[PROTOCOL] = before + OPENS + "\n" + listing(v) + "\n" + CLOSES + after
    if check:
        differing = [path for path, content in wanted.items()
                     if not path.exists() or path.read_bytes() != content.encode()]
        for path in differing:
            print(f"{path.relative_to(HERE.parent)} differs from the output of make.py; run make.py", file=sys.stderr)
        return 1 if differing else 0
    for path, content in wanted.items():
        path.write_bytes(content.encode())
    print(", ".join(f"{len(lines)} {table} vectors" for table, lines in v.lines.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
