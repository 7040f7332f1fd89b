"""A client for Afterimage services, written from PROTOCOL.md. Python 3.9 or newer, no dependencies. One thread each.

    with afterimage.Client("localhost", 7400) as client:
        print(client.classify(image).label)         # one image
        labels = client.classify_many(images)       # thousands in flight at once
"""

import collections
import contextlib
import selectors
import socket
import ssl as tls
import struct
import time

HELLO, WELCOME, PING, PONG, STATS_REQ, STATS_RESP, ERROR, GO_AWAY, SNAPSHOT_REQ, SNAPSHOT_RESP = range(
    0x01, 0x0B)
CACHE_REQ, CACHE_RESP, CLASSIFY_REQ, CLASSIFY_RESP = 0x10, 0x11, 0x20, 0x21
WRITE, EXISTS, HIT, COALESCED, CONNECTION, JOINED = 0x01, 0x01, 0x01, 0x02, 0x01, 0x01
STATUSES = ["none", "upstream_error", "upstream_crashed", "upstream_corrupt", "bad_argument", "overloaded",
            "deadline_exceeded", "unauthenticated", "too_large", "unsupported", "shutting_down", "internal",
            "storage_failed"]
RETRYABLE = {1, 2, 3, 5, 10, 11, 12}
MAGIC, VERSION, HEADER = b"AFTERIMG", 1, struct.Struct("<IBBHQ")
MAX_REPLY_BODY, MAX_TEXT, MAX_PING, MAX_DIMS, MAX_ENTRIES = 1 << 20, 1024, 64, 4, 4096
SEND_AHEAD = 1 << 18  # Bytes encoded before the socket takes them: enough to keep it busy.

Welcome = collections.namedtuple("Welcome", "version service features max_body window classes digest shape name")
Label = collections.namedtuple("Label", "label origin")
Snapshot = collections.namedtuple("Snapshot", "entries bytes elapsed_us joined")


class AfterimageError(Exception):
    """What every error here is a kind of. `retryable`: whether the same request may succeed elsewhere or later."""
    retryable = False


class Failed(AfterimageError):
    """The server answered with an Error. With `connection` it ended the connection, and the client is closed."""

    def __init__(self, status, text, connection=False):
        self.status, self.text, self.connection, self.retryable = status, text, connection, status in RETRYABLE
        self.name = STATUSES[status] if status < len(STATUSES) else f"status_{status}"
        super().__init__(f"{self.name}: {text}")


class Lost(AfterimageError):
    """The connection ended before the answer came, and the client is closed."""
    retryable = True


class Malformed(AfterimageError):
    """The server's bytes are not what the protocol says."""


class Body:
    def __init__(self, data):
        self.data = memoryview(data)

    def bytes(self, length):
        at_most(len(self.data), length, "the length of a field, by what is left of its body,")
        taken, self.data = bytes(self.data[:length]), self.data[length:]
        return taken

    def text(self, length):
        try:
            return self.bytes(length).decode()
        except UnicodeDecodeError as error:
            raise Malformed(f"a text is not UTF-8: {error}") from None

    def ints(self, layout):
        return struct.unpack("<" + layout, self.bytes(struct.calcsize("<" + layout)))


def at_most(limit, value, what):
    if value > limit:
        raise Malformed(f"{what} is {value}; the limit is {limit}")
    return value


def decode(kind, flags, status, data):
    """What a reply says; None for a kind that no server of version 1 sends."""
    body = Body(data)
    if kind == CLASSIFY_RESP:
        origin = "hit" if flags & HIT else "coalesced" if flags & COALESCED else "miss"
        result = Label(*body.ints("H"), origin)
    elif kind == CACHE_RESP:
        result = body.ints("q")[0] if flags & EXISTS else None
    elif kind == PONG:
        result = body.bytes(at_most(MAX_PING, len(body.data), "a Pong"))
    elif kind in (ERROR, GO_AWAY):
        text = body.text(at_most(MAX_TEXT, len(body.data), "a text"))
        result = Failed(status, text, bool(flags & CONNECTION)) if kind == ERROR else text
    elif kind == STATS_RESP:
        result = decode_stats(body)
    elif kind == SNAPSHOT_RESP:
        result = Snapshot(*body.ints("QQQ"), bool(flags & JOINED))
    elif kind == WELCOME:
        result = decode_welcome(body)
    else:
        return None
    at_most(0, len(body.data), "the number of bytes after the last field")
    return result


def decode_welcome(body):
    if body.bytes(8) != MAGIC:
        raise Malformed("this is not an Afterimage server: its magic is wrong")
    version, service, dims, features, max_body, window, classes = body.ints("HBBIIII")
    at_most(MAX_DIMS, dims, "the number of dimensions")
    digest, shape, name = body.bytes(32), body.ints(f"{dims}I"), body.text(*body.ints("B"))
    while body.data:  # Extensions: a tag, a length and as many bytes. None is known.
        body.bytes(body.ints("HH")[1])
    return Welcome(version, service, features, max_body, window, classes, digest, shape, name)


def decode_stats(body):
    """A list of (name, type, value); the value of an unknown type is its bytes."""
    entries = []
    while body.data:
        at_most(MAX_ENTRIES, len(entries) + 1, "the number of entries")
        kind, length = body.ints("BB")
        name = body.text(length)
        payload = Body(body.bytes(*body.ints("I")))
        if kind in (1, 2):
            value, = payload.ints(" Qq"[kind])
        elif kind == 3:
            value = payload.text(len(payload.data))
        elif kind == 4:
            value = [payload.ints("QQ") for _ in range((len(payload.data) + 15) // 16)]
        else:
            value = payload.bytes(len(payload.data))
        at_most(0, len(payload.data), f"the number of bytes too many in {name}")
        entries.append((name, kind, value))
    return entries


class Client(contextlib.AbstractContextManager):
    """One connection. `timeout`: seconds without any progress after which a call gives up. `ssl`: an ssl.SSLContext
    to speak TLS with, whose certificate must be for `server_hostname` (the host, if that is not given)."""

    def __init__(self, host, port, token=b"", timeout=10.0, ssl=None, server_hostname=None):
        hello = MAGIC + struct.pack("<HHIH", VERSION, VERSION, 0, len(token)) + token
        self.next_id, self.received, self.dropped = 0, bytearray(), 0
        self.timeout, self.going_away, self.welcome = timeout, False, None
        self.socket = socket.create_connection((host, port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if ssl is not None:
            self.socket = ssl.wrap_socket(self.socket, server_hostname=server_hostname or host)
        self.socket.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ)
        self.welcome = self._one(HELLO, hello, WELCOME)
        if self.welcome.version != VERSION:
            self.close()
            raise Malformed(f"the server chose version {self.welcome.version}; only {VERSION} was offered")

    def classify(self, image, budget_ms=0):
        """The Label (label, origin) of one image's bytes."""
        return self._one(CLASSIFY_REQ, image, CLASSIFY_RESP, budget_ms)

    def classify_many(self, images, budget_ms=0, return_exceptions=False):
        """The Labels of many images, in their order. With `return_exceptions` a Failed may stand in place of one."""
        return self._many(((CLASSIFY_REQ, image, CLASSIFY_RESP, 0, budget_ms) for image in images), return_exceptions)

    def get(self, key, budget_ms=0):
        """The value of a key, or None."""
        return self._one(CACHE_REQ, struct.pack("<Q", key), CACHE_RESP, budget_ms)

    def set(self, key, value):
        """Stores a value. No reply comes; a `get` on this connection sees it, if the cache keeps it."""
        self._many([(CACHE_REQ, struct.pack("<Qq", key, value), None, WRITE, 0)])

    def ping(self, data=b""):
        """The seconds that a Ping takes there and back."""
        start = time.perf_counter()
        if self._one(PING, data, PONG) != data:
            raise Malformed("the Pong does not carry the Ping's bytes")
        return time.perf_counter() - start

    def stats(self):
        """What the server counts, by name: integers, texts, lists of (bound, count). Of two of a name the first."""
        return {name: value for name, _, value in reversed(self._one(STATS_REQ, b"", STATS_RESP))}

    def snapshot(self):
        """Has the server write a snapshot to its own file. For a large table give the Client a generous timeout."""
        return self._one(SNAPSHOT_REQ, b"", SNAPSHOT_RESP)

    def close(self):
        self.selector.close()
        self.socket.close()

    def __exit__(self, *_):
        self.close()

    def _one(self, kind, body, reply, budget_ms=0):
        return self._many([(kind, body, reply, 0, budget_ms)])[0]

    def _many(self, requests, return_exceptions=False):
        """Sends all requests (kind, body, kind of reply or None, flags, budget) and gathers their results.
        Reads while it writes, as the protocol asks, and keeps at most a window in flight."""
        if self.socket.fileno() < 0:
            raise Lost("the client is closed")
        try:
            results = self._exchange(iter(requests))
        except BaseException as error:  # The stream may have stopped inside a frame: it is of no more use.
            self.close()
            if isinstance(error, OSError):
                raise Lost(f"the transport failed: {error}") from error
            raise
        for result in results:
            if isinstance(result, Failed) and not return_exceptions:
                raise result
        return results

    def _exchange(self, requests):
        results, waiting, out = [], {}, bytearray()
        window = max(1, self.welcome.window) if self.welcome else 1
        while True:
            while len(out) < SEND_AHEAD and len(waiting) < window and (request := next(requests, None)):
                (kind, body, reply, flags, budget_ms), request_id = request, self.next_id
                self.next_id += 1
                out += HEADER.pack(len(body), kind, flags, budget_ms, request_id) + body
                if reply is not None:
                    waiting[request_id] = (len(results), reply)
                results.append(None)
            if not out and not waiting:
                return results
            self.selector.modify(self.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0))
            ready = self.selector.select(self.timeout)
            if not ready:
                raise Lost(f"nothing was sent or received for {self.timeout} s; {len(waiting)} replies are missing")
            with contextlib.suppress(tls.SSLWantReadError, tls.SSLWantWriteError):  # Half a record, or a full socket.
                if ready[0][1] & selectors.EVENT_READ:
                    if not (data := self.socket.recv(1 << 18)):
                        raise Lost(f"the server closed the connection; {len(waiting)} replies are missing")
                    self.received += data
                    self._take(results, waiting)
                elif out:
                    del out[:self.socket.send(out)]

    def _take(self, results, waiting):
        """Takes every whole frame out of what was received, and files the results."""
        at = 0
        while len(self.received) - at >= HEADER.size:
            length, kind, flags, status, request_id = HEADER.unpack_from(self.received, at)
            at_most(MAX_REPLY_BODY, length, "the length of a reply's body")
            end = at + HEADER.size + length
            if len(self.received) < end:
                break
            result, at = decode(kind, flags, status, self.received[at + HEADER.size:end]), end
            if kind == GO_AWAY:
                self.going_away = True
            elif kind == ERROR and result.connection:
                raise result
            elif result is None and kind != CACHE_RESP:
                self.dropped += 1
            elif request_id >= self.next_id:
                raise Malformed(f"a reply to request {request_id}, which was never sent")
            elif request_id not in waiting:
                self.dropped += 1
            else:
                index, reply = waiting.pop(request_id)
                if kind not in (reply, ERROR):
                    raise Malformed(f"the reply to request {request_id} is of kind {kind:#04x}, not {reply:#04x}")
                results[index] = result
        del self.received[:at]
