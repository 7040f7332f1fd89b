//! The server against a hostile client, over a pipe in memory, on virtual time.

mod oracle;
mod verdict;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use self::oracle::Oracle;
use self::verdict::check;
use super::server_model::{Setup, answers};
use crate::fuzz::{Rng, Source};
use afterimage_wire::proto::{Hello, Message};
use afterimage_wire::server::{ServerOptions, Token, serve_stream};

/// The token of a server that demands one.
const TOKEN: &[u8] = b"open sesame";

/// Virtual time in which any connection must have ended: all its deadlines together, for each of
/// the client's pauses.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// Bytes that a server may send for any input: a Welcome, a GoAway, an error.
const OUTPUT_BASE: usize = 4096;
/// Bytes that a server may send for each byte that it receives. The worst case is a header of 16
/// bytes that asks for statistics.
const OUTPUT_PER_BYTE: usize = 64;

/// The client's behaviour, from the first eight bytes of the input.
#[derive(Debug)]
struct Script {
    is_cache: bool,
    token: bool,
    /// A valid Hello is sent before the input's bytes.
    hello: bool,
    /// It ends its sending half after the last byte; else it waits for the server's end.
    half_close: bool,
    /// It drops the connection after the last byte, replies unread.
    abort: bool,
    /// It reads nothing for this long.
    deaf_for: Option<Duration>,
    /// It makes pauses while it sends.
    pauses: bool,
    /// The server is told to shut down after so long.
    drain_after: Option<Duration>,
    /// The service changes its identity after this many batches.
    changes_after: u64,
    window: u32,
    max_body: u32,
    pipe: usize,
    cuts: Rng,
}

impl Script {
    fn new(source: &mut Source<'_>) -> Self {
        let (common, what) = (source.u8(), source.u8());
        let bit = |number: u8| common >> number & 1 != 0;
        let unusual = bit(5);
        let window = 1 + u32::from(source.u8());
        // The largest value checks that an announced body allocates nothing.
        let max_body = match source.u8() {
            u8::MAX => 64 << 20,
            small => u32::from(small) * 8,
        };
        let pipe = 8 << (source.u8() % 14);
        let cuts = Rng(source.u16().into());
        let time = Duration::from_millis(u64::from(source.u8()) * 37);
        Script {
            is_cache: bit(0),
            token: bit(1),
            hello: bit(2),
            half_close: bit(3),
            abort: unusual && what & 1 != 0,
            deaf_for: (unusual && what & 2 != 0).then_some(time * 8),
            pauses: bit(4),
            drain_after: (unusual && what & 4 != 0).then_some(time),
            changes_after: if unusual && what & 8 != 0 { (what >> 4).into() } else { u64::MAX },
            window,
            max_body,
            pipe,
            cuts,
        }
    }

    /// Whether the bytes alone decide what the server sends.
    fn is_plain(&self) -> bool {
        !self.abort
            && self.deaf_for.is_none()
            && !self.pauses
            && self.drain_after.is_none()
            && self.changes_after == u64::MAX
    }
}

/// Input: a [`Script`], then the client's bytes.
pub(super) fn server_stream(data: &[u8]) {
    let mut source = Source::new(data);
    let script = Script::new(&mut source);
    let mut stream = Vec::new();
    if script.hello {
        let token = if script.token { TOKEN } else { b"" };
        Message::Hello(Hello::new(token)).encode(0, &mut stream);
    }
    stream.extend_from_slice(source.rest());

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    let output = runtime.block_on(converse(&script, &stream));
    let limit = OUTPUT_BASE + OUTPUT_PER_BYTE * stream.len();
    assert!(output.len() <= limit, "{} bytes of output; the limit is {limit}", output.len());

    let setup = Setup {
        is_cache: script.is_cache,
        token: script.token.then_some(TOKEN),
        max_body: script.max_body,
    };
    let (expected, rest) = answers(setup, &stream);
    check(&script, expected, rest, &output);
}

/// Runs both ends until the server closes; returns everything that the client read.
async fn converse(script: &Script, stream: &[u8]) -> Vec<u8> {
    let (ours, theirs) = tokio::io::duplex(script.pipe);
    let service = Arc::new(Oracle::new(script.is_cache, script.changes_after));
    let options = ServerOptions {
        token: script.token.then(|| Token::new(TOKEN).expect("a token of a good length")),
        window: script.window,
        max_body: script.max_body,
        ..ServerOptions::default()
    };
    let drain = CancellationToken::new();
    let server = serve_stream(service, options, theirs, drain.clone());
    let (reader, writer) = tokio::io::split(ours);
    let drainer = async {
        if let Some(after) = script.drain_after {
            sleep(after).await;
            drain.cancel();
        }
    };
    let client = async {
        let sent = send(script, stream, writer);
        if script.abort {
            sent.await;
            // Both halves are dropped, with all unread bytes.
            drop(reader);
            Vec::new()
        } else {
            let ((), output) = tokio::join!(sent, receive(script, reader));
            output
        }
    };
    let started = Instant::now();
    let everything = async { tokio::join!(server, client, drainer).1 };
    match timeout(FOR_EVER, everything).await {
        Ok(output) => output,
        Err(_) => panic!("the server hangs: {:?} have passed", started.elapsed()),
    }
}

async fn send(script: &Script, stream: &[u8], mut writer: WriteHalf<DuplexStream>) {
    let mut cuts = script.cuts.clone();
    let mut rest = stream;
    let longest = 1 + cuts.index(stream.len().max(1));
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at((1 + cuts.index(longest)).min(rest.len()));
        if writer.write_all(piece).await.is_err() {
            return;
        }
        rest = behind;
        if script.pauses && cuts.index(4) == 0 {
            // Near the server's timeouts: 250 ms, 5 s, 30 s, 300 s.
            let ms = [1, 249, 4_990, 29_000, 31_000, 299_000, 301_000][cuts.index(7)];
            sleep(Duration::from_millis(ms)).await;
        } else if cuts.index(2) == 0 {
            tokio::task::yield_now().await;
        }
    }
    if script.half_close {
        let _ = writer.shutdown().await;
    }
}

async fn receive(script: &Script, mut reader: ReadHalf<DuplexStream>) -> Vec<u8> {
    if let Some(time) = script.deaf_for {
        sleep(time).await;
    }
    let mut output = Vec::new();
    // An error would end the stream, too; a pipe in memory has none.
    let _ = reader.read_to_end(&mut output).await;
    output
}
