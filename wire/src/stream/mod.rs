//! Streams: bytes of any length in both directions of one connection, with credit.
//!
//! A [`Stream`] is a [`StreamReader`], a [`StreamWriter`] and the [`StreamProgress`] of the peer. A
//! client opens one with [`Connection::open`](crate::Connection::open); a server's
//! [`Service::open`](crate::server::Service::open) gets it as an [`IncomingStream`].
//!
//! * **Credit.** A peer sends as many bytes as this side allows. A chunk counts as processed when
//!   the next one is read, and only then the peer may send more. So a slow reader slows its peer
//!   down, and the memory of a stream is bounded.
//! * **One end.** Each direction ends regularly ([`StreamWriter::finish`]), or the whole stream
//!   ends with a [`StreamError`]. A half that is dropped early ends the stream.
//! * **Fairness.** The streams of a connection send in turns, one frame each, and replies to
//!   requests go between two frames.
//!
//! `flow.rs` has the rules of one stream, `table.rs` those of all streams of a connection; both are
//! pure. This file has the halves that applications hold.

mod error;
mod flow;
mod table;

use std::fmt;
use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};

use afterimage_core::ByteBudget;
#[cfg(feature = "server")]
use afterimage_core::ClientId;
use atomic_waker::AtomicWaker;
use bytes::Bytes;

use crate::Status;
use crate::client::ConnectionError;
use crate::proto::stream::MAX_STREAM_PROGRESS;
pub use error::StreamError;
#[cfg(feature = "server")]
pub(crate) use table::NeverOpened;
pub(crate) use table::{Limits, Table};

/// A stream: both directions, and the peer's progress messages.
#[derive(Debug)]
pub struct Stream {
    /// The peer's bytes.
    pub reader: StreamReader,
    /// This side's bytes.
    pub writer: StreamWriter,
    /// The peer's progress messages.
    pub progress: StreamProgress,
}

impl Stream {
    fn new(streams: &Arc<Streams>, id: u64) -> Self {
        let half = || Half { streams: Arc::clone(streams), id };
        Stream {
            reader: StreamReader { half: half(), held: 0 },
            writer: StreamWriter { half: half() },
            progress: StreamProgress { half: half() },
        }
    }
}

/// The peer's direction of a stream.
///
/// Dropping it before the end stops the peer: with the stream if this side's direction has ended,
/// else as soon as it ends.
#[derive(Debug)]
pub struct StreamReader {
    half: Half,
    /// Bytes of the last chunk: they are processed when the next chunk is read.
    held: usize,
}

impl StreamReader {
    /// The next chunk; `None` after the last one. Calling it means that the chunk before is
    /// processed, and gives the peer credit for it. May be dropped before it is ready: no chunk is
    /// lost.
    ///
    /// # Errors
    /// [`StreamError`] if the stream has ended early. Chunks that arrived before may be lost then.
    pub async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        poll_fn(|cx| {
            let held = std::mem::take(&mut self.held);
            let read = self.half.act(|table, id| table.poll_read(id, held, cx));
            if let Poll::Ready(Ok(Some(chunk))) = &read {
                self.held = chunk.len();
            }
            read
        })
        .await
    }
}

impl Drop for StreamReader {
    fn drop(&mut self) {
        self.half.act(Table::drop_reader);
    }
}

/// This side's direction of a stream.
///
/// Dropping it without [`finish`](StreamWriter::finish) ends the stream with an error: at a server
/// with status `internal`, at a client with status `none`.
#[derive(Debug)]
pub struct StreamWriter {
    half: Half,
}

impl StreamWriter {
    /// Queues a chunk, and waits for the peer's credit and for space in the send buffer. Chunks of
    /// at least 16 KiB are not copied. If this is dropped before it is ready, a part of the chunk
    /// may be sent.
    ///
    /// # Errors
    /// [`StreamError`] if the stream has ended.
    pub async fn write(&mut self, chunk: impl Into<Bytes>) -> Result<(), StreamError> {
        let mut chunk = chunk.into();
        poll_fn(|cx| self.half.act(|table, id| table.poll_write(id, &mut chunk, cx))).await
    }

    /// Ends this direction after the chunks that were written. Does not wait until they are sent.
    ///
    /// # Errors
    /// [`StreamError`] if the stream or this direction has ended.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.half.act(Table::finish)
    }

    /// Sends the state of the work, at most 1 KiB. It needs no credit and does not wait. A message
    /// that is not sent yet is replaced, so the peer gets the newest one.
    ///
    /// # Errors
    /// [`StreamError::TooLong`]; another [`StreamError`] if the stream or this direction has ended.
    pub fn progress(&self, message: impl Into<Bytes>) -> Result<(), StreamError> {
        let message = message.into();
        let (bytes, limit) = (message.len(), MAX_STREAM_PROGRESS);
        if bytes > limit {
            return Err(StreamError::TooLong { bytes, limit });
        }
        self.half.act(|table, id| table.progress(id, message))
    }

    /// Ends the stream in both directions. Bytes that are not sent yet are dropped. `text` tells
    /// people the reason; a client that no longer needs the stream sends [`Status::None`].
    pub fn reset(self, status: Status, text: &str) {
        self.half.act(|table, id| table.cancel(id, status, text));
    }
}

impl Drop for StreamWriter {
    fn drop(&mut self) {
        let (status, text) = self.half.streams.unfinished;
        self.half.act(|table, id| table.drop_writer(id, status, text));
    }
}

/// The peer's progress messages.
#[derive(Debug)]
pub struct StreamProgress {
    half: Half,
}

impl StreamProgress {
    /// The newest message that was not read yet; `None` when the peer's direction has ended.
    pub async fn next(&mut self) -> Option<Bytes> {
        poll_fn(|cx| self.half.act(|table, id| table.poll_progress(id, cx))).await
    }
}

/// A stream that a client has opened.
///
/// ```
/// use afterimage_wire::Status;
/// use afterimage_wire::stream::{IncomingStream, Stream, StreamError};
///
/// /// Returns each chunk to the client.
/// fn open(stream: IncomingStream) {
///     if stream.name() == "echo" {
///         tokio::spawn(echo(stream.accept()));
///     } else {
///         stream.refuse(Status::Unsupported, "this service has one stream: echo");
///     }
/// }
///
/// async fn echo(mut stream: Stream) -> Result<(), StreamError> {
///     while let Some(chunk) = stream.reader.read().await? {
///         stream.writer.write(chunk).await?;
///     }
///     stream.writer.finish()
/// }
/// ```
#[cfg(feature = "server")]
#[derive(Debug)]
pub struct IncomingStream {
    name: Box<str>,
    header: Bytes,
    is_admin: bool,
    client: ClientId,
    stream: Stream,
}

#[cfg(feature = "server")]
impl IncomingStream {
    /// The name of the service or method that the client wants.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The parameters, as the service defines them.
    pub fn header(&self) -> &Bytes {
        &self.header
    }

    /// Whether the client has admin rights.
    pub fn is_admin(&self) -> bool {
        self.is_admin
    }

    /// The connection of the stream: a number of its own within the process.
    pub fn client(&self) -> ClientId {
        self.client
    }

    /// Takes the duty to serve the stream.
    pub fn accept(self) -> Stream {
        self.stream
    }

    /// Ends the stream; `text` names the thing, the limit and the value.
    pub fn refuse(self, status: Status, text: &str) {
        self.stream.writer.reset(status, text);
    }
}

/// The streams of one connection, shared with the halves that applications hold.
#[derive(Debug)]
pub(crate) struct Streams {
    table: Mutex<Table>,
    /// The connection's task.
    connection: AtomicWaker,
    /// This side has opened a stream.
    is_used: AtomicBool,
    /// The reset of a stream whose writer is dropped without an end.
    unfinished: (Status, &'static str),
}

impl Streams {
    /// The streams of a server's connection, which use `memory`, a part of `process`.
    #[cfg(feature = "server")]
    pub(crate) fn of_server(limits: Limits, memory: ByteBudget, process: ByteBudget) -> Arc<Self> {
        let text = "the service ended without finishing the stream";
        Streams::new(Table::new(limits, memory, process), (Status::Internal, text))
    }

    /// The streams of a client's connection, whose memory the application bounds by their number.
    pub(crate) fn of_client(limits: Limits, unfinished: (Status, &'static str)) -> Arc<Self> {
        let memory = ByteBudget::new(usize::MAX);
        Streams::new(Table::new(limits, memory.clone(), memory), unfinished)
    }

    fn new(table: Table, unfinished: (Status, &'static str)) -> Arc<Self> {
        let (table, connection) = (Mutex::new(table), AtomicWaker::new());
        Arc::new(Streams { table, connection, is_used: AtomicBool::new(false), unfinished })
    }

    /// Wakes this task when there is something to send from now on.
    pub(crate) fn register(&self, waker: &Waker) {
        self.connection.register(waker);
    }

    /// Calls `act` for the connection, which sends the resulting frames itself.
    pub(crate) fn with<R>(&self, act: impl FnOnce(&mut Table) -> R) -> R {
        // No code under this lock panics by design. If it does, the other streams may continue.
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut table);
        let woken = table.take_woken();
        drop(table);
        woken.into_iter().for_each(Waker::wake);
        result
    }

    /// Opens a stream. Its first frame waits for the connection.
    ///
    /// # Errors
    /// If the connection has ended or takes no new streams.
    pub(crate) fn open(self: &Arc<Self>, name: &str, header: Bytes) -> Result<Stream, StreamError> {
        let id = self.with(|table| table.open(name, header))?;
        self.is_used.store(true, Ordering::Release);
        Ok(Stream::new(self, id))
    }

    /// Whether there has been a stream. Checked at every turn of a connection, without a lock.
    #[inline]
    pub(crate) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    /// The halves of a stream that the peer has opened.
    #[cfg(feature = "server")]
    pub(crate) fn incoming(
        self: &Arc<Self>,
        id: u64,
        name: &str,
        header: Bytes,
        is_admin: bool,
        client: ClientId,
    ) -> IncomingStream {
        IncomingStream {
            name: name.into(),
            header,
            is_admin,
            client,
            stream: Stream::new(self, id),
        }
    }

    /// Whether a stream is open, or a frame is not sent yet.
    pub(crate) fn is_busy(&self) -> bool {
        self.is_used() && self.with(|table| !table.is_settled())
    }

    /// The connection has ended: all streams end with it.
    pub(crate) fn lose(&self, cause: Option<Arc<ConnectionError>>) {
        self.with(|table| table.lose(cause));
    }
}

/// One half of a stream, as the application holds it.
struct Half {
    streams: Arc<Streams>,
    id: u64,
}

impl Half {
    /// Calls `act`, and wakes the connection if there is something to send.
    fn act<R>(&self, act: impl FnOnce(&mut Table, u64) -> R) -> R {
        let (result, has_frames) = self.streams.with(|table| {
            let before = table.has_frames();
            let result = act(table, self.id);
            (result, table.has_frames() && !before)
        });
        if has_frames {
            self.streams.connection.wake();
        }
        result
    }
}

impl fmt::Debug for Half {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Half").field(&self.id).finish()
    }
}
