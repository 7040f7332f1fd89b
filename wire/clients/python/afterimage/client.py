"""The blocking client: one connection, many requests in flight, and one new connection when the old
one has ended."""

from __future__ import annotations

import selectors
import socket
import ssl as tls
import struct
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple, Type, Union, overload

from . import protocol
from .protocol import (
    BYTES_REQ, BYTES_RESP, FLUSH_REQ, FLUSH_RESP, FORGET_REQ, FORGET_RESP, INFER_REQ, INFER_RESP, KEY_LENGTH, MAX_ROWS,
    MAX_VALUE, NO_STORE, REFRESH, CACHE_REQ, CACHE_RESP, CLASSIFY_REQ, CLASSIFY_RESP, ERROR, GO_AWAY, HELLO,
    MAX_BUDGET_MS, MAX_PING, OLDEST_VERSION, PING, PONG, SHUTTING_DOWN, SNAPSHOT_REQ, SNAPSHOT_RESP, STATS_REQ,
    STATS_RESP, STREAM_OPEN, VERSION, WELCOME, WRITE, AfterimageError, Failed, Frame, Inference, Label, Lost, Malformed,
    Reply, Snapshot, StatsValue, Unsupported, Welcome, flat, integer,
)
from .stream import Flow, Flows, Stream, open_body

if TYPE_CHECKING:
    from typing_extensions import Buffer, Literal

READ_SIZE = 1 << 18
#: Bytes that are encoded before the socket takes them: enough to keep it busy.
SEND_AHEAD = 1 << 18
#: Bytes of requests in flight. The client keeps them for a repetition, so it limits them.
MAX_IN_FLIGHT_BYTES = 1 << 26
#: The highest values of the integers in a request.
U32, U64, I64_MIN, I64_MAX = (1 << 32) - 1, (1 << 64) - 1, -(1 << 63), (1 << 63) - 1


class Ended(Lost):
    """The connection has ended, so its requests may be repeated on another one."""


class Connection:
    """A non-blocking socket, TCP or TLS, with the bytes that wait to be sent and to be decoded."""

    def __init__(self, host: str, port: int, timeout: Optional[float], ssl: Optional[tls.SSLContext],
                 server_hostname: Optional[str]) -> None:
        self.timeout = timeout
        self.out = bytearray()
        self.received = bytearray()
        self.going_away = False
        self.flows = Flows()
        self.socket = socket.create_connection((host, port), timeout)
        try:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if ssl is not None:
                self.socket = ssl.wrap_socket(self.socket, server_hostname=server_hostname or host)
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.socket, selectors.EVENT_READ)

    def close(self, error: Optional[AfterimageError] = None) -> None:
        self.flows.lose(error or Lost("the connection of the stream has ended"))
        self.selector.close()
        self.socket.close()

    def interrupt(self) -> None:
        """Ends the stream of bytes. A thread that waits for the socket then sees the end."""
        try:
            self.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # The other side has ended it.

    def step(self, timeout: Optional[float] = None) -> List[Frame]:
        """Waits until the socket is ready, and sends or receives once. Returns the frames that
        came."""
        self.selector.modify(self.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if self.out else 0))
        timeout = self.timeout if timeout is None else timeout
        ready = self.selector.select(timeout)
        if not ready:
            raise Lost(f"the server has neither sent nor read a byte for {timeout} s")
        if ready[0][1] & selectors.EVENT_READ:
            return self.receive()
        try:
            del self.out[:self.socket.send(self.out)]
        except (BlockingIOError, tls.SSLWantReadError, tls.SSLWantWriteError):
            pass  # The socket is full, or TLS must read first.
        except OSError as error:
            raise Ended(f"the connection failed: {error}") from error
        return []

    def receive(self) -> List[Frame]:
        """Receives once without waiting. Returns the frames that came."""
        try:
            data = self.socket.recv(READ_SIZE)
        except (BlockingIOError, tls.SSLWantReadError, tls.SSLWantWriteError):
            return []  # Nothing has come, or only a part of a TLS record.
        except OSError as error:
            raise Ended(f"the connection failed: {error}") from error
        if not data:
            raise Ended("the server closed the connection")
        self.received += data
        frames, at = [], 0
        while (taken := protocol.take_frame(self.received, at)) is not None:
            frame, at = taken
            frames.append(frame)
            self.going_away |= frame.kind == GO_AWAY
        del self.received[:at]
        return frames


class Request(NamedTuple):
    """A request before it has an id. `reply` is the kind of the reply, None for a write."""

    kind: int
    body: bytes
    reply: Optional[int]
    flags: int = 0
    budget_ms: int = 0


class Pending:
    """A request that was sent and has no reply yet."""

    __slots__ = ("index", "reply", "frame", "repeated")

    def __init__(self, index: int, reply: Optional[int], frame: bytes) -> None:
        self.index, self.reply, self.frame, self.repeated = index, reply, frame, False


class Call:
    """The state of one call: its requests, their results, and the requests in flight."""

    def __init__(self, requests: Iterator[Request]) -> None:
        self.requests = requests
        self.results: List[Reply] = []
        self.pending: Dict[int, Pending] = {}
        self.pending_bytes = 0
        self.again: Dict[int, Pending] = {}
        self.writes: List[int] = []
        self.exhausted = False
        self.error: Optional[BaseException] = None
        self.may_reconnect = True

    def next(self) -> Optional[Request]:
        """The next request. An error of the caller's iterator or of an argument ends the call, not
        the connection."""
        try:
            return next(self.requests)
        except StopIteration:
            pass
        except BaseException as error:
            self.error = error
        self.exhausted = True
        return None

    def remove(self, request_id: int) -> Pending:
        pending = self.pending.pop(request_id)
        self.pending_bytes -= len(pending.frame)
        return pending

    def reconnects(self) -> bool:
        """Whether the call may make a new connection: once, and once more after each reply."""
        allowed, self.may_reconnect = self.may_reconnect, False
        return allowed


class Requests:
    """The requests of a client, encoded. Each checks its arguments against the server's Welcome."""

    #: The server's Welcome on the newest connection.
    welcome: Welcome

    def _classify_request(self, image: Buffer, budget_ms: int) -> Request:
        body = flat(image, "an image")
        if len(body) > self.welcome.max_body:
            raise ValueError(f"an image is {len(body)} bytes; the server takes at most {self.welcome.max_body}")
        return Request(CLASSIFY_REQ, body, CLASSIFY_RESP, 0, budget(budget_ms))

    def _newer(self, kind: int, body: bytes, reply: int, flags: int = 0, budget_ms: int = 0) -> Request:
        """A request of version 2."""
        if self.welcome.version < 2:
            raise Unsupported(f"the server speaks version {self.welcome.version} of the protocol; this call needs 2")
        if len(body) > self.welcome.max_body:
            raise ValueError(f"the request is {len(body)} bytes; the server takes at most {self.welcome.max_body}")
        return Request(kind, body, reply, flags, budget_ms)

    def _get_request(self, key: int, budget_ms: int) -> Request:
        body = struct.pack("<Q", integer(key, 0, U64, "the key"))
        return Request(CACHE_REQ, body, CACHE_RESP, 0, budget(budget_ms))

    def _set_request(self, key: int, value: int) -> Request:
        numbers = integer(key, 0, U64, "the key"), integer(value, I64_MIN, I64_MAX, "the value")
        return Request(CACHE_REQ, struct.pack("<Qq", *numbers), None, WRITE)

    def _infer_request(self, model: str, rows: Iterable[Any], version: str, refresh: bool, no_store: bool,
                       ttl_s: int, budget_ms: int) -> Tuple[Request, int]:
        """The request, and the number of its rows."""
        encoded = [protocol.row_bytes(row, "a row") for row in rows]
        if not 1 <= len(encoded) <= MAX_ROWS:
            raise ValueError(f"the request has {len(encoded)} rows; it must have 1 to {MAX_ROWS}")
        parts = [protocol.short_text(model, "the model"), protocol.short_text(version, "the version"),
                 struct.pack("<III", integer(ttl_s, 0, U32, "ttl_s"), integer(budget_ms, 0, U32, "budget_ms"),
                             len(encoded))]
        for row in encoded:
            parts += [struct.pack("<I", len(row)), row]
        flags = (REFRESH if refresh else 0) | (NO_STORE if no_store else 0)
        return self._newer(INFER_REQ, b"".join(parts), INFER_RESP, flags), len(encoded)

    def _read_bytes_request(self, key: Buffer, budget_ms: int) -> Request:
        return self._newer(BYTES_REQ, bytes_key(key), BYTES_RESP, 0, budget(budget_ms))

    def _write_bytes_request(self, key: Buffer, value: Buffer, ttl_s: int) -> Request:
        data = protocol.row_bytes(value, "the value")
        if len(data) > MAX_VALUE:
            raise ValueError(f"the value is {len(data)} bytes; the limit is {MAX_VALUE}")
        head = bytes_key(key) + struct.pack("<I", integer(ttl_s, 0, U32, "ttl_s"))
        return self._newer(BYTES_REQ, head + data, BYTES_RESP, WRITE)

    def _forget_request(self, model: str, row: Buffer, version: str) -> Request:
        names = protocol.short_text(model, "the model") + protocol.short_text(version, "the version")
        return self._newer(FORGET_REQ, names + protocol.row_bytes(row, "a row"), FORGET_RESP)

    def _flush_request(self, model: str) -> Request:
        return self._newer(FLUSH_REQ, protocol.short_text(model, "the model"), FLUSH_RESP)

    def _open_request(self, name: str, header: Buffer) -> Request:
        return self._newer(STREAM_OPEN, open_body(name, header), 0)

    def _ping_request(self, data: Buffer) -> Request:
        data = flat(data, "the data of a ping")
        if len(data) > MAX_PING:
            raise ValueError(f"the data of a ping is {len(data)} bytes; the limit is {MAX_PING}")
        return Request(PING, data, PONG)

    def _stats_request(self) -> Request:
        return Request(STATS_REQ, b"", STATS_RESP)

    def _snapshot_request(self) -> Request:
        return Request(SNAPSHOT_REQ, b"", SNAPSHOT_RESP)


class Turn:
    """The right to use a connection, which one thread has at a time. The others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: Optional[int] = None

    def is_own(self) -> bool:
        return self._owner == threading.get_ident()

    def take(self, wait: bool = True) -> bool:
        taken = self._lock.acquire(wait)
        if taken:
            self._owner = threading.get_ident()
        return taken

    def give_back(self) -> None:
        self._owner = None
        self._lock.release()

    def __enter__(self) -> None:
        if self.is_own():
            raise RuntimeError("the client is in a call already; the iterator of its inputs must not use it")
        self.take()

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.give_back()


class Client(Requests):
    """A client with one connection. Threads may share it: their calls run one after the other.

    `timeout` is the time in seconds after which a call fails if no byte is sent or received. With
    `ssl`, an ssl.SSLContext, the client speaks TLS; the server's certificate must be valid for
    `server_hostname` (default: `host`).

    When the server has closed the connection, the next call makes a new one and repeats the
    requests that have no reply. All requests are safe to repeat.
    """

    def __init__(self, host: str, port: int, token: Buffer = b"", timeout: Optional[float] = 10.0,
                 ssl: Optional[tls.SSLContext] = None, server_hostname: Optional[str] = None) -> None:
        self._hello = protocol.hello(protocol.valid_token(token))
        self._server = (host, port, timeout, ssl, server_hostname)
        self._turn = Turn()
        self._next_id = 1  # 0 is the id of each Hello.
        self._connection: Optional[Connection] = None
        #: Whether `close` was called.
        self.closed = False
        #: Replies that no request waited for, such as the Error of a write.
        self.dropped = 0
        #: Connections that the client has made.
        self.connects = 0
        self._connect()

    # Requests.

    def classify(self, image: Buffer, budget_ms: int = 0) -> Label:
        """The label of an image: any C-contiguous buffer of uint8."""
        result = self._one(self._classify_request(image, budget_ms))
        assert isinstance(result, Label)
        return result

    @overload
    def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0,
                      return_exceptions: Literal[False] = False) -> List[Label]: ...

    @overload
    def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0, *,
                      return_exceptions: Literal[True]) -> List[Union[Label, Failed]]: ...

    def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0, return_exceptions: bool = False) -> Any:
        """The labels of many images, in the order of the images.

        The requests are pipelined. With `return_exceptions` the list holds a Failed for each image
        whose request has failed; otherwise the first Failed is raised.
        """
        results = self._many(self._classify_request(image, budget_ms) for image in images)
        if not return_exceptions:
            for result in results:
                if isinstance(result, Failed):
                    raise result
        return results

    def get(self, key: int, budget_ms: int = 0) -> Optional[int]:
        """The value of a key in a cache. None if the cache does not have the key."""
        result = self._one(self._get_request(key, budget_ms))
        assert result is None or isinstance(result, int)
        return result

    def set(self, key: int, value: int) -> None:
        """Writes a value to a cache. There is no reply. A later `get` of this client sees the
        value, if it is kept."""
        self._many(iter([self._set_request(key, value)]))

    # Requests of version 2.

    def infer(self, model: str, rows: Iterable[Any], *, version: str = "",
              refresh: bool = False, no_store: bool = False, ttl_s: int = 0, budget_ms: int = 0) -> Inference:
        """The answers of a model to some rows, in the order of the rows.

        A row is any buffer, or a NumPy array of any type: its bytes are in C order. For an array of
        two or more dimensions, each element of the first dimension is a row. An empty `model` is
        the model of the Welcome, an empty `version` the present one. `refresh` computes stored
        answers anew, `no_store` stores nothing, and `ttl_s` limits the time for which the answers
        are stored.
        """
        request, count = self._infer_request(model, rows, version, refresh, no_store, ttl_s, budget_ms)
        result = self._one(request)
        assert isinstance(result, Inference)
        if len(result.answers) != count:
            self._disconnect()
            raise Malformed(f"the reply has {len(result.answers)} answers; the request has {count} rows")
        return result

    def read_bytes(self, key: Buffer, budget_ms: int = 0) -> Optional[bytes]:
        """The bytes of a key of 16 bytes in a cache. None if the cache does not have the key."""
        result = self._one(self._read_bytes_request(key, budget_ms))
        assert result is None or isinstance(result, bytes)
        return result

    def write_bytes(self, key: Buffer, value: Buffer, ttl_s: int = 0) -> None:
        """Writes bytes to a cache, which may drop them at any time, and does after `ttl_s` seconds
        (0: no limit)."""
        self._one(self._write_bytes_request(key, value, ttl_s))

    def forget(self, model: str, row: Buffer, version: str = "") -> int:
        """Deletes the stored answer of one row. Returns how many answers a memo has deleted, as far
        as it knows.

        Needs admin rights.
        """
        result = self._one(self._forget_request(model, row, version))
        assert isinstance(result, int)
        return result

    def flush(self, model: str = "") -> None:
        """Takes all stored answers of a model back; of all models if `model` is empty. Needs admin
        rights."""
        self._one(self._flush_request(model))

    def open(self, name: str, header: Buffer = b"") -> Stream:
        """Opens a stream: `name` is its service or method, `header` its parameters, any buffer.

        The server may still refuse it: the next call of the stream raises Failed then. A stream
        ends with its connection and is not opened again by itself.

            with client.open("fold/mean", b"{}") as stream:
                for chunk in stream.exchange(chunks):
                    ...
        """
        with self._turn:
            if self.closed:
                raise Lost("the client is closed")
            self._notice()
            request = self._open_request(name, header)
            if self._connection is None or self._connection.going_away:
                self._reconnect(Call(iter(())))
                request = self._open_request(name, header)
            assert self._connection is not None
            stream_id, self._next_id = self._next_id, self._next_id + 1
            flow = self._connection.flows.open(stream_id, self.welcome.max_body)
            self._queue(flow, protocol.frame(request.kind, 0, 0, stream_id, request.body))
            self._send_queued()
            return Stream(self, flow)

    def ping(self, data: Buffer = b"") -> float:
        """The round-trip time of a Ping in seconds. `data` is at most 64 bytes."""
        request = self._ping_request(data)
        start = time.perf_counter()
        if self._one(request) != request.body:
            self._disconnect()
            raise Malformed("the Pong has other bytes than the Ping")
        return time.perf_counter() - start

    def stats(self) -> Dict[str, StatsValue]:
        """The server's statistics by name, in the server's order.

        A value is an integer, a text, a list of pairs (upper bound, count), or the bytes of an
        unknown type.
        """
        entries = self._one(self._stats_request())
        assert isinstance(entries, list)
        return protocol.by_name(entries)

    def snapshot(self) -> Snapshot:
        """Makes the server write a snapshot to its own file. A large store may need a larger
        `timeout`."""
        result = self._one(self._snapshot_request())
        assert isinstance(result, Snapshot)
        return result

    # The connection.

    @property
    def going_away(self) -> bool:
        """Whether the server has announced that it will close the connection, or has closed it.

        The next call makes a new connection. This property only reads bytes that have already come.
        During a call of another thread it reads none.
        """
        if not self._turn.is_own() and self._turn.take(wait=False):
            try:
                self._notice()
            finally:
                self._turn.give_back()
        connection = self._connection
        return connection is None or connection.going_away

    def close(self) -> None:
        """Closes the connection. Later calls raise Lost, and so does a call of another thread."""
        self.closed = True
        if not self._turn.take(wait=False):
            # A call is in progress. It closes the connection as soon as it sees the end.
            if self._connection is not None:
                self._connection.interrupt()
            return
        try:
            self._disconnect()
        finally:
            self._turn.give_back()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.close()

    def _disconnect(self, error: Optional[AfterimageError] = None) -> None:
        if self._connection is not None:
            self._connection.close(error)
            self._connection = None

    def _notice(self) -> None:
        """Receives the bytes that came between two calls: a GoAway, the end of the stream, late
        replies."""
        try:
            while self._connection is not None and (frames := self._connection.receive()):
                for frame in frames:
                    self._receive(frame, Call(iter(())))
        except (Lost, Failed, Malformed) as error:
            self._disconnect(error)

    def _connect(self) -> None:
        """Makes a connection and reads the Welcome. Raises OSError when the server cannot be
        reached."""
        self._disconnect()
        self._connection = Connection(*self._server)
        try:
            call = Call(iter([Request(HELLO, self._hello, WELCOME)]))
            self._exchange(call, window=1)
            welcome = call.results[0]
            if isinstance(welcome, Failed):
                raise welcome
            if not isinstance(welcome, Welcome):
                raise Ended("the server shuts down")
            if not OLDEST_VERSION <= welcome.version <= VERSION:
                raise Malformed(f"the server chose version {welcome.version}; the client offered "
                                f"{OLDEST_VERSION} to {VERSION}")
        except BaseException:
            self._disconnect()
            raise
        self.welcome = welcome
        self.connects += 1

    # Streams.

    def _queue(self, flow: Flow, frame: bytes) -> None:
        """Queues a frame of a stream. Drops it if the stream's connection has ended."""
        if frame and self._connection is not None:
            self._connection.out += frame
            self._connection.flows.settle(flow)

    def _may_queue(self) -> bool:
        """Whether the send buffer has room for data of a stream."""
        return self._connection is not None and len(self._connection.out) < SEND_AHEAD

    def _pump(self, flow: Flow, end: Optional[float] = None) -> None:
        """Sends or receives once, and waits for it until `end`, or for `timeout` seconds.

        A timeout leaves the connection open; each other error ends it.
        """
        with self._turn:
            if self._connection is None:
                raise flow.error or Lost("the connection of the stream has ended")
            connection = self._connection
            try:
                frames = connection.step(None if end is None else max(0.0, end - time.monotonic()))
                for frame in frames:
                    self._receive(frame, Call(iter(())))
            except Ended as error:
                self._disconnect(error)
            except Lost:
                raise
            except BaseException as error:
                self._disconnect(error if isinstance(error, AfterimageError) else None)
                raise

    def _flush(self) -> None:
        """Sends all queued bytes. Receives meanwhile, because the server may need that."""
        with self._turn:
            self._send_queued()

    def _send_queued(self) -> None:
        while self._connection is not None and self._connection.out:
            try:
                for frame in self._connection.step():
                    self._receive(frame, Call(iter(())))
            except BaseException as error:
                self._disconnect(error if isinstance(error, AfterimageError) else None)
                if not isinstance(error, Ended):  # The streams have this error, and raise it.
                    raise

    # Calls.

    def _one(self, request: Request) -> Reply:
        result, = self._many(iter([request]))
        if isinstance(result, Failed):
            raise result
        return result

    def _many(self, requests: Iterator[Request]) -> List[Reply]:
        """Sends all requests and returns their results. Repeats them once if the connection
        ends."""
        with self._turn:
            return self._answers(Call(requests))

    def _answers(self, call: Call) -> List[Reply]:
        if not self.closed:
            self._notice()
        while True:
            if self.closed:
                self._disconnect()
                raise Lost("the client is closed")
            try:
                if self._connection is None or self._connection.going_away:
                    call.reconnects()
                    self._reconnect(call)
                self._exchange(call, max(1, self.welcome.window))
            except Ended as error:
                self._disconnect(error)
                if not call.may_reconnect and not self.closed:
                    raise
                continue
            except BaseException:
                # The stream may have stopped inside a frame, so the connection is unusable.
                self._disconnect()
                raise
            if call.error is not None:
                raise call.error
            if call.exhausted and not call.pending and not call.again:
                return call.results
            # The server has sent GoAway: the rest of the requests needs a new connection.
            if not call.may_reconnect:
                raise Lost("the server sent GoAway again before it answered a request")

    def _reconnect(self, call: Call) -> None:
        try:
            self._connect()
        except OSError as error:
            raise Lost(f"cannot connect again to {self._server[0]}:{self._server[1]}: {error}") from error
        assert self._connection is not None
        for request_id, pending in call.again.items():
            call.pending[request_id] = pending
            call.pending_bytes += len(pending.frame)
        call.again.clear()
        for _, pending in sorted(call.pending.items()):
            self._connection.out += pending.frame

    def _exchange(self, call: Call, window: int) -> None:
        """Sends requests and receives replies until all are answered, or until the server sends
        GoAway.

        Reads while it writes, as the protocol requires, with at most a window of requests in
        flight.
        """
        connection = self._connection
        assert connection is not None
        while True:
            while (not connection.going_away and not call.exhausted and len(connection.out) < SEND_AHEAD
                   and len(call.pending) < window and call.pending_bytes < MAX_IN_FLIGHT_BYTES):
                request = call.next()
                if request is not None:
                    self._send(connection, call, request)
            if call.error is not None:
                return
            if not connection.out:
                for request_id in call.writes:  # They have no reply: they end when they are sent.
                    call.remove(request_id)
                call.writes.clear()
                if not call.pending:
                    return
            for frame in connection.step():
                self._receive(frame, call)

    def _send(self, connection: Connection, call: Call, request: Request) -> None:
        request_id = 0
        if request.kind != HELLO:
            request_id, self._next_id = self._next_id, self._next_id + 1
        frame = protocol.frame(request.kind, request.flags, request.budget_ms, request_id, request.body)
        connection.out += frame
        call.pending[request_id] = Pending(len(call.results), request.reply, frame)
        call.pending_bytes += len(frame)
        if request.reply is None:
            call.writes.append(request_id)
        call.results.append(None)

    def _receive(self, frame: Frame, call: Call) -> None:
        """Stores the result of one reply."""
        content = frame.content
        if frame.kind == GO_AWAY:
            return
        if isinstance(content, Failed) and content.connection:
            if content.status == SHUTTING_DOWN:
                raise Ended(f"the server closed the connection: {content}")
            raise content
        if self._connection is not None and self._connection.flows.owns(frame):
            self._connection.out += self._connection.flows.receive(frame)
            return
        if content is None and frame.kind not in (CACHE_RESP, BYTES_RESP, FLUSH_RESP):
            self.dropped += 1
            return
        if frame.request_id >= self._next_id:
            raise Malformed(f"a reply has the id {frame.request_id}, which no request had")
        pending = call.pending.get(frame.request_id)
        if pending is None or pending.reply is None:
            self.dropped += 1
            return
        if frame.kind not in (pending.reply, ERROR):
            raise Malformed(
                f"the reply to request {frame.request_id} has kind {frame.kind:#04x}, not {pending.reply:#04x}")
        call.remove(frame.request_id)
        if isinstance(content, Failed) and content.status == SHUTTING_DOWN and not pending.repeated:
            # The server has not started the request: it goes to the next connection.
            pending.repeated = True
            call.again[frame.request_id] = pending
            if self._connection is not None:
                self._connection.going_away = True
            return
        call.results[pending.index] = content
        call.may_reconnect = True


def bytes_key(key: Buffer) -> bytes:
    """A valid key of a value of bytes."""
    data = flat(key, "the key")
    if len(data) != KEY_LENGTH:
        raise ValueError(f"the key is {len(data)} bytes; it must be {KEY_LENGTH}")
    return data


def budget(budget_ms: int) -> int:
    """A valid time budget."""
    return integer(budget_ms, 0, MAX_BUDGET_MS, "budget_ms")
