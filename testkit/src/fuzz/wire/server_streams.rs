//! The streams of a server against a hostile client, over a pipe in memory, on virtual time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{
    Frame, Header, Hello, Kind, Message, Role, Status, StreamFrame, StreamOpen,
};
use afterimage_wire::server::{Batch, Identity, ServerOptions, Service, serve_stream};
use afterimage_wire::stream::{IncomingStream, Stream, StreamError};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::fuzz::Source;

/// Virtual time in which a connection must have ended.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// Bytes that the service sends on a stream `pour`.
const POURED: usize = 20_000;

/// The id of the last Ping. No stream has it.
const MARK: u64 = u64::MAX;

/// A service that echoes, pours, ignores or drops a stream.
struct Streams;

impl Service for Streams {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Cache)
    }

    fn handle(&self, _: &mut Batch<'_>) {}

    fn stats(&self, _: &mut Stats) {}

    fn open(&self, stream: IncomingStream) {
        match stream.name() {
            "echo" => drop(tokio::spawn(echo(stream.accept()))),
            "pour" => drop(tokio::spawn(pour(stream.accept()))),
            "idle" => drop(tokio::spawn(idle(stream.accept()))),
            "drop" => drop(stream.accept()),
            _ => stream.refuse(Status::BadArgument, "there is no such stream"),
        }
    }
}

async fn echo(mut stream: Stream) -> Result<(), StreamError> {
    while let Some(chunk) = stream.reader.read().await? {
        stream.writer.progress(chunk.slice(..chunk.len().min(100)))?;
        stream.writer.write(chunk).await?;
    }
    stream.writer.finish()
}

async fn pour(mut stream: Stream) -> Result<(), StreamError> {
    stream.writer.write(Bytes::from_static(&[7; POURED])).await?;
    // The client's direction is not read: it ends with a reset.
    stream.writer.finish()
}

async fn idle(mut stream: Stream) {
    while stream.progress.next().await.is_some() {}
}

/// The client's knowledge of a stream.
#[derive(Debug, Default)]
struct Known {
    /// The highest credit that the client gave.
    credit: u64,
    /// Bytes that the server sent.
    received: u64,
    /// The server's direction has ended.
    ended: bool,
    /// The server has reset the stream.
    reset: bool,
}

/// All streams of the client, and whether the last Ping is answered.
#[derive(Default)]
struct Books {
    streams: Mutex<HashMap<u64, Known>>,
    answered: Notify,
}

/// Input: the pipe's size, then the client's steps.
pub(super) fn server_streams(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    runtime.block_on(async {
        timeout(FOR_EVER, converse(Source::new(data))).await.expect("the server ends");
    });
}

async fn converse(mut source: Source<'_>) {
    let (ours, theirs) = tokio::io::duplex(16 << (source.u8() % 12));
    let options = ServerOptions { max_streams: 20, ..ServerOptions::default() };
    let server = serve_stream(Arc::new(Streams), options, theirs, CancellationToken::new());
    let (reader, writer) = tokio::io::split(ours);
    let books = Books::default();
    tokio::join!(server, act(&books, source, writer), observe(&books, reader));
}

/// Sends what the script says, then a Ping; ends the direction after the Pong.
async fn act(books: &Books, mut source: Source<'_>, mut writer: WriteHalf<DuplexStream>) {
    let mut out = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut out);
    let mut opened = Vec::new();
    while !source.is_empty() {
        let (op, choice) = (source.u8() % 12, source.u8());
        // The target `server_stream` has frames of streams that were never opened.
        let id = match op {
            0 | 1 => u64::from(choice % 32),
            _ if opened.is_empty() => continue,
            _ => opened[usize::from(choice) % opened.len()],
        };
        match op {
            0 | 1 => {
                opened.push(id);
                let name = ["echo", "pour", "idle", "drop", "none"][source.below(5)];
                let credit = credit(&mut source);
                let mut streams = books.lock();
                let known = streams.entry(id).or_default();
                known.credit = known.credit.max(credit);
                let open = StreamOpen { credit, name, header: b"" };
                Message::StreamOpen(open).encode(id, &mut out);
            }
            2..=5 => {
                let bytes = vec![op; usize::from(source.u8()) * 40];
                let end = source.u8() > 200;
                Message::Stream(StreamFrame::Data { bytes: &bytes, end }).encode(id, &mut out);
            }
            6 | 7 => {
                let credit = credit(&mut source);
                let mut streams = books.lock();
                let known = streams.entry(id).or_default();
                known.credit = known.credit.max(credit);
                Message::Stream(StreamFrame::Credit { credit }).encode(id, &mut out);
            }
            8 => Message::Stream(StreamFrame::Progress(b"half")).encode(id, &mut out),
            9 => {
                let status = Status::from_code(source.u8().into());
                Message::Stream(StreamFrame::Reset { status, text: "" }).encode(id, &mut out);
            }
            10 => {
                // Any frame of a stream, with any body and flags.
                let kind = Kind::from_code(0x40 + source.u8() % 5);
                let len = usize::from(source.u8() % 32);
                let body = source.bytes(len).to_vec();
                let (body_len, flags) = (body.len() as u32, source.u8());
                if let Some(credit) = body.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) {
                    let mut streams = books.lock();
                    let known = streams.entry(id).or_default();
                    known.credit = known.credit.max(credit);
                }
                let header = Header { body_len, kind, flags, status: 0, id };
                out.extend_from_slice(&header.encode());
                out.extend_from_slice(&body);
            }
            _ => {
                if writer.write_all(&out).await.is_err() {
                    return;
                }
                out.clear();
                sleep(Duration::from_millis(source.u8().into())).await;
            }
        }
    }
    Message::Ping(b"").encode(MARK, &mut out);
    if writer.write_all(&out).await.is_ok() {
        books.answered.notified().await;
        let _ = writer.shutdown().await;
    }
}

/// A credit: none, little, or no limit.
fn credit(source: &mut Source<'_>) -> u64 {
    match source.u8() {
        choice @ 0..200 => u64::from(choice) * 50,
        _ => u64::MAX,
    }
}

/// Reads the server's frames until it closes, and checks each against the rules of streams.
async fn observe(books: &Books, mut reader: ReadHalf<DuplexStream>) {
    let (mut received, mut space) = (Vec::new(), [0; 4096]);
    loop {
        let len = reader.read(&mut space).await.unwrap_or(0);
        if len == 0 {
            assert!(received.is_empty(), "{} bytes of a frame", received.len());
            return;
        }
        received.extend_from_slice(&space[..len]);
        let mut rest = &received[..];
        while let Some(frame) = Frame::decode(rest, 1 << 20).expect("no frame is that large") {
            books.check(frame);
            rest = &rest[frame.header.frame_len()..];
        }
        let done = received.len() - rest.len();
        received.drain(..done);
    }
}

impl Books {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Known>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, frame: Frame<'_>) {
        let id = frame.header.id;
        let mut streams = self.lock();
        match Message::decode(frame).expect("a server's frames are well-formed") {
            Message::Welcome(_) => {}
            Message::Pong(_) => self.answered.notify_one(),
            Message::Stream(StreamFrame::Reset { .. }) => {
                streams.entry(id).or_default().reset = true;
            }
            Message::Stream(frame) => {
                let known = streams.get_mut(&id).expect("the client has opened the stream");
                assert!(!known.reset, "{frame:?} after a reset of stream {id}");
                if let StreamFrame::Data { bytes, end } = frame {
                    known.received += bytes.len() as u64;
                    assert!(!known.ended, "data after the end of stream {id}");
                    assert!(known.received <= known.credit, "{known:?}: more than the credit");
                    known.ended = end;
                }
            }
            other => panic!("the server sends {other:?}"),
        }
    }
}
