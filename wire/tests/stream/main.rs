//! Streams end to end: over TCP and TLS, with slow, hostile and dying peers.

#![allow(clippy::unwrap_used, reason = "tests panic")]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod hostile;
mod transfer;

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Role, Status};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
use afterimage_wire::stream::{IncomingStream, Stream, StreamError};
use afterimage_wire::{Client, ClientOptions};
use bytes::Bytes;
use tokio_util::sync::CancellationToken;

/// A time limit that is longer than any step of a test on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A memo that answers each image with its first byte, and has these streams:
///
/// * `echo` returns each chunk;
/// * `count` counts bytes, with progress, and returns the number;
/// * `pour` sends as many bytes as the header says;
/// * `idle` never reads and never writes;
/// * `drop` drops its halves at once, and `panic` panics.
struct Streams;

impl Service for Streams {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Memo)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else { continue };
            batch.label(i, Classification { label: image[0].into(), origin: Origin::Miss });
        }
    }

    fn stats(&self, _: &mut Stats) {}

    fn open(&self, stream: IncomingStream) {
        match stream.name() {
            "echo" => drop(tokio::spawn(echo(stream.accept()))),
            "count" => drop(tokio::spawn(count(stream.accept()))),
            "pour" => {
                let bytes = str::from_utf8(stream.header()).unwrap().parse().unwrap();
                drop(tokio::spawn(pour(stream.accept(), bytes)));
            }
            "idle" => drop(tokio::spawn(idle(stream.accept()))),
            "drop" => drop(stream.accept()),
            "panic" => panic!("on purpose"),
            name => {
                let text = format!("there is no stream \"{name}\"");
                stream.refuse(Status::BadArgument, &text);
            }
        }
    }
}

async fn echo(mut stream: Stream) -> Result<(), StreamError> {
    while let Some(chunk) = stream.reader.read().await? {
        stream.writer.write(chunk).await?;
    }
    stream.writer.finish()
}

async fn count(mut stream: Stream) -> Result<(), StreamError> {
    let mut count = 0;
    while let Some(chunk) = stream.reader.read().await? {
        count += chunk.len() as u64;
        stream.writer.progress(count.to_string())?;
    }
    stream.writer.write(count.to_string()).await?;
    stream.writer.finish()
}

async fn pour(mut stream: Stream, mut bytes: usize) -> Result<(), StreamError> {
    let chunk = pattern(256 << 10);
    while bytes > 0 {
        let len = bytes.min(chunk.len());
        stream.writer.write(chunk.slice(..len)).await?;
        bytes -= len;
    }
    stream.writer.finish()
}

async fn idle(mut stream: Stream) -> Result<(), StreamError> {
    while stream.progress.next().await.is_some() {}
    Ok(())
}

/// Bytes that repeat with a period that divides no power of two.
fn pattern(len: usize) -> Bytes {
    (0..len).map(|i| (i % 251) as u8).collect::<Vec<u8>>().into()
}

/// Serves on a free port until `drain` is cancelled. Returns the address.
async fn serve(options: ServerOptions, drain: CancellationToken) -> String {
    let server = Server::bind("127.0.0.1:0", Arc::new(Streams), options).await.unwrap();
    let addr = server.local_addr().unwrap().to_string();
    tokio::spawn(server.serve(drain.cancelled_owned()));
    addr
}

/// A client of a new server with the default options.
async fn connect() -> Client {
    let addr = serve(ServerOptions::default(), CancellationToken::new()).await;
    Client::connect(addr, ClientOptions::new()).await.unwrap()
}

/// Sends `bytes` and returns what comes back.
async fn exchange(stream: Stream, bytes: Bytes) -> Result<Vec<u8>, StreamError> {
    let Stream { mut reader, mut writer, .. } = stream;
    let send = async {
        writer.write(bytes).await?;
        writer.finish()
    };
    let receive = async {
        let mut received = Vec::new();
        while let Some(chunk) = reader.read().await? {
            received.extend_from_slice(&chunk);
        }
        Ok(received)
    };
    let (sent, received) = tokio::join!(send, receive);
    sent?;
    received
}

/// Waits for `future`, and fails after [`PATIENCE`].
async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("a step of the test takes too long")
}
