"""The asyncio client: one connection that any number of tasks share, and a new one when the old one
has ended.

    async with await aio.connect("localhost", 7400) as client:
        print((await client.classify(image)).label)
"""

from __future__ import annotations

import asyncio
import ssl as tls
import time
from types import TracebackType
from typing import (
    TYPE_CHECKING, Any, AsyncIterable, AsyncIterator, Awaitable, Dict, Iterable, List, Optional, Type, TypeVar, Union,
    overload,
)

from . import protocol
from .client import READ_SIZE, Ended, Request, Requests
from .protocol import (
    BYTES_RESP, CACHE_RESP, ERROR, FLUSH_RESP, GO_AWAY, HELLO, OLDEST_VERSION, SHUTTING_DOWN, VERSION, WELCOME,
    AfterimageError, Failed, Frame, Inference, Label, Lost, Malformed, Reply, Snapshot, StatsValue, Welcome,
)
from .stream import Flow, Flows

if TYPE_CHECKING:
    from typing_extensions import Buffer, Literal

T = TypeVar("T")

#: Images of one `classify_many` in flight. The server's window applies, too.
MAX_CONCURRENT = 1024


async def connect(host: str, port: int, token: Buffer = b"", timeout: Optional[float] = 10.0,
                  ssl: Optional[tls.SSLContext] = None, server_hostname: Optional[str] = None) -> Client:
    """A connected client. The arguments are those of the blocking `afterimage.Client`."""
    client = Client(host, port, token, timeout, ssl, server_hostname)
    await client._linked()
    return client


class Link:
    """One connection: requests in flight by id, and the task that reads replies."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.pending: Dict[int, asyncio.Future[Frame]] = {}
        self.next_id = 1  # 0 is the id of the Hello.
        self.going_away = False
        self.ended: Optional[AfterimageError] = None
        self.dropped = 0
        self.window = asyncio.Semaphore(1)
        self.flows = Flows()
        #: One event for each stream: it is set when something about the stream has changed.
        self.changes: Dict[int, asyncio.Event] = {}
        #: The streams send in turns, one frame each. Requests go between two frames.
        self.turn = asyncio.Lock()
        self.task: asyncio.Task[None] = asyncio.ensure_future(self.read())

    async def read(self) -> None:
        """Hands replies to their waiters until the connection ends."""
        received = bytearray()
        try:
            while data := await self.reader.read(READ_SIZE):
                received += data
                at = 0
                while (taken := protocol.take_frame(received, at)) is not None:
                    frame, at = taken
                    self.receive(frame)
                del received[:at]
            raise Ended("the server closed the connection")
        except AfterimageError as error:
            self.end(error)
        except OSError as error:
            self.end(Ended(f"the connection failed: {error}"))

    def receive(self, frame: Frame) -> None:
        content = frame.content
        if frame.kind == GO_AWAY:
            self.going_away = True
        elif isinstance(content, Failed) and content.connection:
            raise Ended(f"the server closed the connection: {content}") if content.status == SHUTTING_DOWN else content
        elif self.flows.owns(frame):
            self.send(self.flows.receive(frame))
            self.change(frame.request_id)
        elif frame.request_id >= self.next_id:
            raise Malformed(f"a reply has the id {frame.request_id}, which no request had")
        elif (waiter := self.pending.pop(frame.request_id, None)) is None or waiter.done():
            self.dropped += 1
        else:
            waiter.set_result(frame)

    def end(self, error: AfterimageError) -> None:
        """Ends the connection and fails the requests in flight."""
        self.ended = self.ended or error
        self.writer.close()
        for waiter in self.pending.values():
            if not waiter.done():
                waiter.set_exception(error)
                waiter.exception()  # Without this, Python logs the error of a cancelled call.
        self.pending.clear()
        self.flows.lose(error)
        for stream_id in list(self.changes):
            self.change(stream_id)

    def change(self, stream_id: int) -> None:
        """Wakes the tasks that wait for a stream."""
        if (change := self.changes.get(stream_id)) is not None:
            change.set()
            if stream_id not in self.flows.by_id:
                del self.changes[stream_id]

    def send(self, frame: bytes) -> None:
        """Queues a frame of a stream."""
        if frame and self.ended is None:
            self.writer.write(frame)

    async def ask(self, request: Request) -> Reply:
        """Sends one request and returns the content of its reply."""
        async with self.window:
            if self.ended is not None:
                raise self.ended
            request_id = 0
            if request.kind != HELLO:
                request_id, self.next_id = self.next_id, self.next_id + 1
            frame = protocol.frame(request.kind, request.flags, request.budget_ms, request_id, request.body)
            waiter: Optional[asyncio.Future[Frame]] = None
            if request.reply is not None:
                waiter = self.pending[request_id] = asyncio.get_running_loop().create_future()
            try:
                self.writer.write(frame)
                await self.writer.drain()
                if waiter is None:
                    return None
                reply = await waiter
            except OSError as error:
                raise Ended(f"the connection failed: {error}") from error
            finally:
                self.pending.pop(request_id, None)
        content = reply.content
        if reply.kind not in (request.reply, ERROR) or (
                content is None and reply.kind not in (CACHE_RESP, BYTES_RESP, FLUSH_RESP)):
            wrong = Malformed(f"the reply to request {request_id} has kind {reply.kind:#04x}, not {request.reply:#04x}")
            self.end(wrong)
            raise wrong
        if isinstance(content, Failed) and content.status == SHUTTING_DOWN:
            # The server has not started the request: it goes to the next connection.
            self.going_away = True
            raise Ended(f"the server shuts down: {content}")
        return content


class Stream:
    """A stream of the asyncio client: `Client.open` makes it. One task may read while another one
    writes.

    The server sends more only when the application reads, so a slow reader slows the server down.
    """

    def __init__(self, link: Link, flow: Flow, timeout: Optional[float]) -> None:
        self._link, self._flow, self._timeout = link, flow, timeout
        self._change = link.changes[flow.id] = asyncio.Event()

    async def write(self, data: Any) -> None:
        """Sends any buffer, and waits for the server's credit.

        Raises Lost if the server gives no credit for the client's `timeout`. A part of the data may
        be sent then.
        """
        view = memoryview(protocol.row_bytes(data, "the data"))
        self._flow.check()
        while view:
            if self._flow.room() <= 0:
                await self._changed(self._timeout, "credit")
                continue
            async with self._link.turn:
                size = max(0, min(self._flow.room(), len(view)))
                if size > 0:
                    self._link.send(self._flow.data(view[:size].tobytes()))
                    view = view[size:]
                await self._drain()

    async def finish(self) -> None:
        """Ends the client's direction. The server's direction goes on."""
        self._send(self._flow.finish())
        await self._drain()

    async def read(self, timeout: Optional[float] = None) -> Optional[bytes]:
        """The next bytes, as many as came in one frame. None after the last ones.

        `timeout` in seconds (default: the client's) limits the wait; after it, Lost is raised and
        the stream is still open.
        """
        self._send(self._flow.release())
        while (chunk := self._flow.read()) is None:
            if self._flow.has_ended:
                return None
            if self._flow.error is not None:
                raise self._flow.error
            await self._changed(self._timeout if timeout is None else timeout, "data")
        return chunk

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """The chunks until the end of the server's direction."""
        while (chunk := await self.read()) is not None:
            yield chunk

    async def exchange(self, chunks: Union[Iterable[Any], AsyncIterable[Any]]) -> AsyncIterator[bytes]:
        """Sends all `chunks` and then the end, and yields the server's bytes meanwhile."""
        async def send() -> None:
            if isinstance(chunks, AsyncIterable):
                async for chunk in chunks:
                    await self.write(chunk)
            else:
                for chunk in chunks:
                    await self.write(chunk)
            await self.finish()

        sending = asyncio.ensure_future(send())
        # An error of the chunks must end the wait for the server's bytes.
        sending.add_done_callback(lambda _: self._change.set())
        try:
            while not sending.done() or sending.exception() is None:
                self._send(self._flow.release())
                chunk = self._flow.read()
                if chunk is not None:
                    yield chunk
                elif self._flow.has_ended and sending.done():
                    return
                elif self._flow.error is not None:
                    raise self._flow.error
                else:
                    await self._changed(self._timeout, "data")
            await sending  # Raises its error.
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def progress(self, message: Buffer) -> None:
        """Sends the state of the client's work: at most 1024 bytes, without waiting for credit."""
        self._send(self._flow.report(message))
        await self._drain()

    async def read_progress(self, timeout: Optional[float] = None) -> Optional[bytes]:
        """The server's newest progress message that was not read yet. None when the server's
        direction has ended.

        `timeout` limits the wait as in `read`.
        """
        while (message := self._flow.take_progress()) is None:
            if self._flow.has_ended:
                return None
            if self._flow.error is not None:
                raise self._flow.error
            await self._changed(self._timeout if timeout is None else timeout, "progress message")
        return message

    async def cancel(self) -> None:
        """Ends the stream in both directions. Does nothing to a stream that is over."""
        self._send(self._flow.cancel())
        self._change.set()
        await self._drain()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                        traceback: Optional[TracebackType]) -> None:
        await self.cancel()

    def _send(self, frame: bytes) -> None:
        self._link.send(frame)
        self._link.flows.settle(self._flow)
        if self._flow.is_over:
            self._link.changes.pop(self._flow.id, None)

    async def _drain(self) -> None:
        """Waits until the send buffer has room."""
        if self._link.ended is None:
            try:
                await asyncio.wait_for(self._link.writer.drain(), self._timeout)
            except asyncio.TimeoutError:
                raise Lost(f"the server has read no byte for {self._timeout} s") from None
            except OSError as error:
                self._link.end(Ended(f"the connection failed: {error}"))

    async def _changed(self, timeout: Optional[float], awaited: str) -> None:
        """Waits until something about the stream has changed."""
        self._change.clear()
        try:
            await asyncio.wait_for(self._change.wait(), timeout)
        except asyncio.TimeoutError:
            raise Lost(f"the stream has got no {awaited} for {timeout} s") from None


class Client(Requests):
    """A client for the tasks of one event loop. `connect` makes one that is connected.

    `timeout` is the time limit of a call in seconds, and of a connection. A call whose connection
    has ended is repeated once on a new one. All requests are safe to repeat.
    """

    def __init__(self, host: str, port: int, token: Buffer = b"", timeout: Optional[float] = 10.0,
                 ssl: Optional[tls.SSLContext] = None, server_hostname: Optional[str] = None) -> None:
        self._hello = protocol.hello(protocol.valid_token(token))
        self._address = (host, port)
        self._timeout = timeout
        self._ssl = ssl
        self._server_hostname = server_hostname if ssl is not None else None
        self._link: Optional[Link] = None
        self._connecting = asyncio.Lock()
        #: Whether `close` was called.
        self.closed = False
        #: Connections that the client has made.
        self.connects = 0

    # Requests.

    async def classify(self, image: Buffer, budget_ms: int = 0) -> Label:
        """The label of an image: any C-contiguous buffer of uint8."""
        await self._linked()
        result = await self._one(self._classify_request(image, budget_ms))
        assert isinstance(result, Label)
        return result

    @overload
    async def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0,
                            return_exceptions: Literal[False] = False) -> List[Label]: ...

    @overload
    async def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0, *,
                            return_exceptions: Literal[True]) -> List[Union[Label, Failed]]: ...

    async def classify_many(self, images: Iterable[Buffer], budget_ms: int = 0, return_exceptions: bool = False) -> Any:
        """The labels of many images, in the order of the images. The requests are pipelined.

        With `return_exceptions` the list holds a Failed for each image whose request has failed;
        otherwise the first error is raised, and the other requests are cancelled.
        """
        limit = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(image: Buffer) -> Union[Label, Failed]:
            try:
                return await self.classify(image, budget_ms)
            except Failed as error:
                if return_exceptions:
                    return error
                raise
            finally:
                limit.release()

        tasks: List[asyncio.Task[Union[Label, Failed]]] = []
        try:
            for image in images:
                await limit.acquire()
                tasks.append(asyncio.ensure_future(one(image)))
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def get(self, key: int, budget_ms: int = 0) -> Optional[int]:
        """The value of a key in a cache. None if the cache does not have the key."""
        result = await self._one(self._get_request(key, budget_ms))
        assert result is None or isinstance(result, int)
        return result

    async def set(self, key: int, value: int) -> None:
        """Writes a value to a cache. There is no reply."""
        await self._one(self._set_request(key, value))

    async def infer(self, model: str, rows: Iterable[Any], *, version: str = "", refresh: bool = False,
                    no_store: bool = False, ttl_s: int = 0, budget_ms: int = 0) -> Inference:
        """The answers of a model to some rows, in the order of the rows: see the blocking
        client."""
        await self._linked()
        request, count = self._infer_request(model, rows, version, refresh, no_store, ttl_s, budget_ms)
        result = await self._one(request)
        assert isinstance(result, Inference)
        if len(result.answers) != count:
            raise Malformed(f"the reply has {len(result.answers)} answers; the request has {count} rows")
        return result

    async def read_bytes(self, key: Buffer, budget_ms: int = 0) -> Optional[bytes]:
        """The bytes of a key of 16 bytes in a cache. None if the cache does not have the key."""
        await self._linked()
        result = await self._one(self._read_bytes_request(key, budget_ms))
        assert result is None or isinstance(result, bytes)
        return result

    async def write_bytes(self, key: Buffer, value: Buffer, ttl_s: int = 0) -> None:
        """Writes bytes to a cache, which may drop them at any time, and does after `ttl_s` seconds
        (0: no limit)."""
        await self._linked()
        await self._one(self._write_bytes_request(key, value, ttl_s))

    async def forget(self, model: str, row: Buffer, version: str = "") -> int:
        """Deletes the stored answer of one row. Needs admin rights. Returns how many answers were
        deleted."""
        await self._linked()
        result = await self._one(self._forget_request(model, row, version))
        assert isinstance(result, int)
        return result

    async def flush(self, model: str = "") -> None:
        """Takes all stored answers of a model back; of all models if `model` is empty. Needs admin
        rights."""
        await self._linked()
        await self._one(self._flush_request(model))

    async def open(self, name: str, header: Buffer = b"") -> Stream:
        """Opens a stream: `name` is its service or method, `header` its parameters, any buffer.

        The server may still refuse it: the next call of the stream raises Failed then. A stream
        ends with its connection and is not opened again by itself.
        """
        link = await self._linked()
        request = self._open_request(name, header)
        stream_id, link.next_id = link.next_id, link.next_id + 1
        stream = Stream(link, link.flows.open(stream_id, self.welcome.max_body), self._timeout)
        link.send(protocol.frame(request.kind, 0, 0, stream_id, request.body))
        await stream._drain()
        return stream

    async def ping(self, data: Buffer = b"") -> float:
        """The round-trip time of a Ping in seconds. `data` is at most 64 bytes."""
        request = self._ping_request(data)
        await self._linked()
        start = time.perf_counter()
        if await self._one(request) != request.body:
            raise Malformed("the Pong has other bytes than the Ping")
        return time.perf_counter() - start

    async def stats(self) -> Dict[str, StatsValue]:
        """The server's statistics by name, in the server's order: see the blocking client."""
        entries = await self._one(self._stats_request())
        assert isinstance(entries, list)
        return protocol.by_name(entries)

    async def snapshot(self) -> Snapshot:
        """Makes the server write a snapshot to its own file. A large store may need a larger
        `timeout`."""
        result = await self._one(self._snapshot_request())
        assert isinstance(result, Snapshot)
        return result

    # The connection.

    async def close(self) -> None:
        """Closes the connection. Calls in flight and later calls raise Lost."""
        self.closed = True
        link, self._link = self._link, None
        if link is not None:
            link.end(Lost("the client is closed"))
            link.task.cancel()
            await asyncio.gather(link.task, return_exceptions=True)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                        traceback: Optional[TracebackType]) -> None:
        await self.close()

    async def _linked(self) -> Link:
        """The connection; a new one if there is none that takes requests."""
        async with self._connecting:
            if self.closed:
                raise Lost("the client is closed")
            link = self._link
            if link is None or link.ended is not None or link.going_away:
                # Requests in flight on a connection that is going away still get their replies.
                link = self._link = await self._within(self._connect())
            return link

    async def _connect(self) -> Link:
        reader, writer = await asyncio.open_connection(
            *self._address, ssl=self._ssl, server_hostname=self._server_hostname)
        link = Link(reader, writer)
        try:
            welcome = await link.ask(Request(HELLO, self._hello, WELCOME))
            if isinstance(welcome, Failed):
                raise welcome
            assert isinstance(welcome, Welcome)
            if not OLDEST_VERSION <= welcome.version <= VERSION:
                raise Malformed(f"the server chose version {welcome.version}; the client offered "
                                f"{OLDEST_VERSION} to {VERSION}")
        except BaseException:
            link.end(Lost("the connection was not opened"))
            link.task.cancel()
            raise
        self.welcome = welcome
        link.window = asyncio.Semaphore(max(1, welcome.window))
        self.connects += 1
        return link

    async def _one(self, request: Request) -> Reply:
        return await self._within(self._repeated(request))

    async def _repeated(self, request: Request) -> Reply:
        """Sends a request, and once more on a new connection if its connection ends."""
        try:
            result = await (await self._linked()).ask(request)
        except Ended:
            try:
                result = await (await self._linked()).ask(request)
            except OSError as error:
                host, port = self._address
                raise Lost(f"cannot connect again to {host}:{port}: {error}") from error
        if isinstance(result, Failed):
            raise result
        return result

    async def _within(self, call: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(call, self._timeout)
        except asyncio.TimeoutError:
            raise Lost(f"no answer within {self._timeout} s") from None
