"""Streams: bytes of any length in both directions of one connection, with credit."""

from __future__ import annotations

import struct
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, Deque, Dict, Iterable, Iterator, Optional, Type

from . import protocol
from .protocol import (
    END, ERROR, MAX_PROGRESS, MAX_STREAM_DATA, MAX_STREAM_HEADER, MAX_TEXT, STREAM_CREDIT, STREAM_DATA, STREAM_PROGRESS,
    STREAM_RESET, AfterimageError, Failed, Frame, Lost, Malformed, StreamFrame,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .client import Client

#: Bytes of a stream that the server may send before the application has read them.
WINDOW = 1 << 18
#: Bytes that the client may send before the first StreamCredit.
FIRST_CREDIT = 4096
BAD_ARGUMENT = protocol.STATUSES.index("bad_argument")
UNSUPPORTED = protocol.STATUSES.index("unsupported")


class Flow:
    """The state of one stream at the client. It does no I/O: the frames to send are return
    values."""

    def __init__(self, stream_id: int, max_body: int) -> None:
        self.id = stream_id
        #: The data of one StreamData are at most this long.
        self.max_data = max(1, min(MAX_STREAM_DATA, max_body))
        self.credit, self.sent, self.is_finished = FIRST_CREDIT, 0, False
        self.granted, self.received, self.processed, self.has_ended = WINDOW, 0, 0, False
        #: Data that arrived and that the application has not read.
        self.chunks: Deque[bytes] = deque()
        #: Bytes of the chunk that was read last. They are processed when the next one is read.
        self.held = 0
        #: The newest progress message of the server that the application has not read.
        self.unread_progress: Optional[bytes] = None
        #: The reason why the stream ended early.
        self.error: Optional[AfterimageError] = None

    @property
    def is_over(self) -> bool:
        """Whether no frame of the stream is expected or allowed any more."""
        return self.error is not None or (self.is_finished and self.has_ended)

    def receive(self, frame: Frame) -> bytes:
        """Takes a frame of the server. Returns the frame that answers a violation of the rules,
        mostly nothing."""
        if self.is_over:
            return b""
        # A server without streams, or with a smaller limit, answers with an Error.
        if frame.kind == ERROR:
            assert isinstance(frame.content, Failed)
            self.error = frame.content
            return b""
        content = frame.content
        assert isinstance(content, StreamFrame)
        try:
            self._take(frame.kind, content)
        except Malformed as error:
            self.error = error
            known = END if frame.kind == STREAM_DATA else 0
            status = UNSUPPORTED if content.flags & ~known else BAD_ARGUMENT
            text = str(error).encode()[:MAX_TEXT]
            return protocol.frame(STREAM_RESET, 0, status, self.id, text)
        return b""

    def _take(self, kind: int, frame: StreamFrame) -> None:
        data = frame.data
        if frame.flags & ~(END if kind == STREAM_DATA else 0):
            raise Malformed(f"a frame of the stream has the unknown flags {frame.flags:#04x}")
        if kind == STREAM_DATA:
            protocol.at_most(MAX_STREAM_DATA, len(data), "the length of a StreamData")
            if self.has_ended:
                raise Malformed("a StreamData came after END")
            self.received += len(data)
            protocol.at_most(self.granted, self.received, "the number of bytes received on the stream")
            if data:
                self.chunks.append(data)
            self.has_ended = bool(frame.flags & END)
        elif kind == STREAM_CREDIT:
            body = protocol.Body(data)
            credit, = body.ints("Q")
            protocol.at_most(0, len(body.data), "the number of bytes after the last field")
            self.credit = max(self.credit, credit)
        elif kind == STREAM_PROGRESS:
            protocol.at_most(MAX_PROGRESS, len(data), "the length of a progress message")
            if not self.has_ended:
                self.unread_progress = data
        else:
            text = protocol.Body(data).text(protocol.at_most(MAX_TEXT, len(data), "the length of a text"))
            self.error = Failed(frame.status, text)

    def read(self) -> Optional[bytes]:
        """The next chunk that has arrived. None if there is none."""
        if not self.chunks:
            return None
        chunk = self.chunks.popleft()
        self.held = len(chunk)
        return chunk

    def release(self) -> bytes:
        """Counts the last chunk as processed. Returns the StreamCredit to send, mostly nothing."""
        self.processed += self.held
        self.held = 0
        target = self.processed + WINDOW
        if self.is_over or self.has_ended or target - self.granted < WINDOW // 2:
            return b""
        self.granted = target
        return protocol.frame(STREAM_CREDIT, 0, 0, self.id, struct.pack("<Q", target))

    def room(self) -> int:
        """The number of bytes that the next StreamData may have. Raises the error of a stream that
        has ended."""
        self.check()
        return min(self.max_data, self.credit - self.sent)

    def check(self) -> None:
        """Raises the error of a stream that has ended early, and ValueError after `finish`."""
        if self.error is not None:
            raise self.error
        if self.is_finished:
            raise ValueError("the stream takes no data after finish()")

    def data(self, data: bytes) -> bytes:
        """A StreamData. `data` has at most `room()` bytes."""
        self.sent += len(data)
        return protocol.frame(STREAM_DATA, 0, 0, self.id, data)

    def finish(self) -> bytes:
        """The end of the client's direction. Nothing if it has ended."""
        if self.is_finished or self.error is not None:
            return b""
        self.is_finished = True
        return protocol.frame(STREAM_DATA, END, 0, self.id, b"")

    def report(self, message: Buffer) -> bytes:
        """A progress message of the client."""
        data = protocol.flat(message, "a progress message")
        if len(data) > MAX_PROGRESS:
            raise ValueError(f"a progress message is {len(data)} bytes; the limit is {MAX_PROGRESS}")
        self.check()
        return protocol.frame(STREAM_PROGRESS, 0, 0, self.id, data)

    def cancel(self) -> bytes:
        """The reset of a stream that is no longer needed. Nothing if the stream is over."""
        if self.is_over:
            return b""
        self.error = Lost("the stream was cancelled")
        self.chunks.clear()
        return protocol.frame(STREAM_RESET, 0, 0, self.id, b"")

    def take_progress(self) -> Optional[bytes]:
        """The newest progress message, if the application has not read it."""
        message, self.unread_progress = self.unread_progress, None
        return message


class Flows:
    """The open streams of one connection."""

    def __init__(self) -> None:
        self.by_id: Dict[int, Flow] = {}
        #: The highest id of a stream so far.
        self.newest = 0

    def open(self, stream_id: int, max_body: int) -> Flow:
        flow = self.by_id[stream_id] = Flow(stream_id, max_body)
        self.newest = stream_id
        return flow

    def owns(self, frame: Frame) -> bool:
        """Whether a frame belongs to a stream."""
        return isinstance(frame.content, StreamFrame) or (frame.kind == ERROR and frame.request_id in self.by_id)

    def receive(self, frame: Frame) -> bytes:
        """Passes a frame to its stream. Returns the answer to a violation, mostly nothing."""
        flow = self.by_id.get(frame.request_id)
        if flow is None:
            if frame.request_id > self.newest:
                raise Malformed(f"a frame belongs to the stream {frame.request_id}, which was never opened")
            return b""  # The server sent it before it knew of the stream's end.
        answer = flow.receive(frame)
        self.settle(flow)
        return answer

    def settle(self, flow: Flow) -> None:
        """Removes a stream that is over."""
        if flow.is_over:
            self.by_id.pop(flow.id, None)

    def lose(self, error: AfterimageError) -> None:
        """Ends all streams, because their connection has ended."""
        for flow in self.by_id.values():
            flow.error = flow.error or error
        self.by_id.clear()


def open_body(name: str, header: Buffer) -> bytes:
    """The body of a StreamOpen."""
    data = protocol.row_bytes(header, "the header")
    if len(data) > MAX_STREAM_HEADER:
        raise ValueError(f"the header of a stream is {len(data)} bytes; the limit is {MAX_STREAM_HEADER}")
    return struct.pack("<Q", WINDOW) + protocol.short_text(name, "the name of a stream") + data


class Stream:
    """A stream of the blocking client: `Client.open` makes it.

    The server sends more only when the application reads, so a slow reader slows the server down. A
    program that has much to send and to receive uses `exchange`: a server that waits for a reader
    makes `write` wait, too.
    """

    def __init__(self, client: Client, flow: Flow) -> None:
        self._client, self._flow = client, flow

    def write(self, data: Any) -> None:
        """Sends any buffer, and waits for the server's credit.

        Raises Lost if the server gives no credit for the client's `timeout`. A part of the data may
        be sent then.
        """
        view = memoryview(protocol.row_bytes(data, "the data"))
        while view:
            view = view[self._send(view):]
            if view:
                self._client._pump(self._flow)
        self._client._flush()

    def finish(self) -> None:
        """Ends the client's direction. The server's direction goes on."""
        self._queue(self._flow.finish())
        self._client._flush()

    def read(self, timeout: Optional[float] = None) -> Optional[bytes]:
        """The next bytes, as many as came in one frame. None after the last ones.

        `timeout` in seconds (default: the client's) limits the wait; after it, Lost is raised and
        the stream is still open.
        """
        self._queue(self._flow.release())
        end = None if timeout is None else time.monotonic() + timeout
        while (chunk := self._flow.read()) is None:
            if self._flow.has_ended:
                return None
            if self._flow.error is not None:
                raise self._flow.error
            self._client._pump(self._flow, end)
        self._client._flush()
        return chunk

    def __iter__(self) -> Iterator[bytes]:
        """The chunks until the end of the server's direction."""
        while (chunk := self.read()) is not None:
            yield chunk

    def exchange(self, chunks: Iterable[Any]) -> Iterator[bytes]:
        """Sends all `chunks` and then the end, and yields the server's bytes meanwhile."""
        waiting = iter(chunks)
        view = memoryview(b"")
        while True:
            self._queue(self._flow.release())
            while not self._flow.is_finished:
                if not view:
                    following = next(waiting, None)
                    if following is None:
                        self._queue(self._flow.finish())
                        break
                    view = memoryview(protocol.row_bytes(following, "a chunk"))
                sent = self._send(view)
                view = view[sent:]
                if sent == 0 and view:
                    break
            chunk = self._flow.read()
            if chunk is not None:
                yield chunk
            elif self._flow.has_ended and self._flow.is_finished:
                self._client._flush()
                return
            elif self._flow.error is not None:
                raise self._flow.error
            else:
                self._client._pump(self._flow)

    def progress(self, message: Buffer) -> None:
        """Sends the state of the client's work: at most 1024 bytes, without waiting for credit."""
        self._queue(self._flow.report(message))
        self._client._flush()

    def read_progress(self, timeout: Optional[float] = None) -> Optional[bytes]:
        """The server's newest progress message that was not read yet. None when the server's
        direction has ended.

        `timeout` limits the wait as in `read`.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (message := self._flow.take_progress()) is None:
            if self._flow.has_ended:
                return None
            if self._flow.error is not None:
                raise self._flow.error
            self._client._pump(self._flow, end)
        return message

    def cancel(self) -> None:
        """Ends the stream in both directions. Does nothing to a stream that is over."""
        self._queue(self._flow.cancel())
        self._client._flush()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.cancel()

    def _send(self, view: memoryview) -> int:
        """Queues as many bytes as the credit and the send buffer allow. Returns their number."""
        size = min(self._flow.room(), len(view)) if self._client._may_queue() else 0
        if size > 0:
            self._queue(self._flow.data(view[:size].tobytes()))
        return max(0, size)

    def _queue(self, frame: bytes) -> None:
        self._client._queue(self._flow, frame)
