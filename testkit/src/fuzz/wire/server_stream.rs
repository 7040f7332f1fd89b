//! The server against a hostile client, over a pipe in memory, on virtual time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_core::{Failure, ModelId, Reply, Response, RowAnswer, Rows};
use afterimage_wire::proto::message::{BytesKey, Classification, Origin};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Frame, HEADER_LEN, Hello, Message, Role, Snapshot};
use afterimage_wire::server::{
    Batch, Identity, Op, ServerOptions, Service, SnapshotReply, Token, serve_stream,
};
use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::server_model::{Setup, answers};
use crate::fuzz::wire::server_model::{
    Behaviour, Reply as Expected, Rest, STORED, behaviour, class, kind, status,
};
use crate::fuzz::{Rng, Source};

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
    /// The server begins to shut down after this time.
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

/// A service whose answer depends on the request alone, with every behaviour.
struct Oracle {
    is_cache: bool,
    values: Mutex<HashMap<u64, i64>>,
    bytes: Mutex<HashMap<BytesKey, Bytes>>,
    batches: AtomicU64,
    changes_after: u64,
}

impl Oracle {
    /// A cache service or a classifier, which changes its identity after this many batches.
    fn new(is_cache: bool, changes_after: u64) -> Self {
        let (values, bytes) = (Mutex::default(), Mutex::default());
        Oracle { is_cache, values, bytes, batches: AtomicU64::new(0), changes_after }
    }
}

impl Service for Oracle {
    fn identity(&self) -> Identity {
        Identity::without_model(if self.is_cache { Role::Cache } else { Role::Classifier })
    }

    fn generation(&self) -> u64 {
        u64::from(self.batches.load(Ordering::Relaxed) >= self.changes_after)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::CacheWrite { key, value } => {
                    values.insert(key, value);
                }
                Op::CacheRead { key } => {
                    let value = values.get(&key).copied();
                    let now = |batch: &mut Batch<'_>| batch.value(index, value);
                    let later = |batch: &mut Batch<'_>| batch.value_reply(index);
                    respond(batch, key as u8, now, later, value);
                }
                Op::Classify { image } => {
                    let label = Classification { label: class(image), origin: Origin::Miss };
                    let seed = image.first().copied().unwrap_or(0);
                    let now = |batch: &mut Batch<'_>| batch.label(index, label);
                    let later = |batch: &mut Batch<'_>| batch.row_reply(index);
                    respond(batch, seed, now, later, label.into());
                }
                Op::ReadBytes { key } => {
                    let values = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                    let value = values.get(&key).cloned();
                    let now = |batch: &mut Batch<'_>| batch.bytes(index, value.clone());
                    let later = |batch: &mut Batch<'_>| batch.bytes_reply(index);
                    respond(batch, key[0], now, later, value.clone());
                }
                Op::WriteBytes(write) => {
                    let mut values = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                    let value = &write.value[..write.value.len().min(STORED)];
                    values.insert(write.key, Bytes::copy_from_slice(value));
                    batch.stored(index);
                }
                Op::Infer(infer) => {
                    let answer = |row: Bytes| RowAnswer::label(class(&row), Origin::Miss);
                    let rows: Rows<RowAnswer> = infer.rows().map(answer).collect();
                    let seed = infer.rows.iter().next().and_then(|row| row.first().copied());
                    let model = Arc::new(ModelId::bytes(infer.model, [0; 32]));
                    let response = Response { model, rows };
                    let now = |batch: &mut Batch<'_>| {
                        batch.response_reply(index).send(Ok(response.clone()));
                    };
                    let later = |batch: &mut Batch<'_>| batch.response_reply(index);
                    respond(batch, seed.unwrap_or(0), now, later, response.clone());
                }
                Op::Forget(_) | Op::Flush { .. } => panic!("no memo gets this request"),
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.push("batches", Value::Counter(self.batches.load(Ordering::Relaxed)));
    }

    fn snapshot(&self, reply: SnapshotReply) {
        let elapsed = Duration::from_micros(3);
        reply.send(Ok(Snapshot { entries: 1, bytes: 2, elapsed, joined: true }));
    }
}

fn respond<'a, T: Send + 'static>(
    batch: &mut Batch<'a>,
    seed: u8,
    now: impl Fn(&mut Batch<'a>),
    later: impl FnOnce(&mut Batch<'a>) -> Reply<Result<T, Failure>>,
    outcome: T,
) {
    match behaviour(seed) {
        Behaviour::Now => now(batch),
        Behaviour::Twice => {
            now(batch);
            now(batch);
        }
        Behaviour::After { ms } => {
            let reply = later(batch);
            tokio::spawn(async move {
                sleep(Duration::from_millis(ms)).await;
                reply.send(Ok(outcome));
            });
        }
        Behaviour::Dropped => drop(later(batch)),
        Behaviour::Forgotten => {}
    }
}

/// Compares the output with the expected replies.
fn check(script: &Script, mut expected: Vec<Expected>, rest: Rest, output: &[u8]) {
    // A slow client gets the deadline's error instead, in a frame.
    if rest == Rest::Http && (script.is_plain() || output.starts_with(b"HTTP")) {
        let start = b"HTTP/1.1 400 Bad Request\r\n";
        assert!(output.starts_with(start) || script.deaf_for.is_some(), "HTTP is answered in HTTP");
        assert!(output.ends_with(b"client.\n") || !script.is_plain(), "with a whole answer");
        return;
    }
    let (mut said, left) = frames(output);
    // Only a client that does not read, or has aborted, may see part of a frame.
    let is_cut = script.abort || script.deaf_for.is_some();
    assert!(is_cut || left == 0, "the output ends {left} bytes into a frame");

    // No frame follows a connection-level error.
    let fatal = said.iter().position(|frame| frame.kind == kind::ERROR && frame.flags == 1);
    assert!(fatal.is_none_or(|at| at + 1 == said.len()), "more follows the last words: {said:?}");
    assert!(said.iter().skip(1).all(|frame| frame.kind != kind::WELCOME), "one Welcome");

    // Notices of the server that answer no request.
    let notice = |frame: &Expected| {
        frame.id == 0
            && match (frame.kind, frame.flags) {
                (kind::GO_AWAY, 0) => frame.status == status::SHUTTING_DOWN,
                (kind::ERROR, 1) => {
                    matches!(frame.status, status::DEADLINE_EXCEEDED | status::SHUTTING_DOWN)
                }
                _ => false,
            }
    };
    let notices: Vec<Expected> = said.iter().filter(|frame| notice(frame)).cloned().collect();
    said.retain(|frame| !notice(frame));

    if script.is_plain() {
        let to_expect = match rest {
            _ if script.half_close => None,
            Rest::Closed | Rest::Http => None,
            Rest::Greeting | Rest::Partial => Some((kind::ERROR, status::DEADLINE_EXCEEDED)),
            Rest::Idle => Some((kind::GO_AWAY, status::SHUTTING_DOWN)),
        };
        let noticed: Vec<_> = notices.iter().map(|notice| (notice.kind, notice.status)).collect();
        assert!(
            noticed.iter().copied().eq(to_expect),
            "{noticed:?} but not {to_expect:?}, {rest:?}"
        );
    }
    // After a connection-level error, or a client's end, replies may be missing, but none may
    // be extra.
    let may_miss = is_cut || fatal.is_some() || (!script.is_plain() && !notices.is_empty());
    // A changed service turns requests away; which ones depends on the batches.
    let has_changed = script.changes_after != u64::MAX;
    let (turned_away, said): (Vec<Expected>, Vec<Expected>) =
        said.into_iter().partition(|frame| has_changed && is_turned_away(frame));
    for frame in said {
        let place = expected.iter().position(|reply| is_answer(reply, &frame));
        let Some(place) = place else {
            panic!("nothing asks for {frame:?}; still to come are {expected:?}");
        };
        expected.remove(place);
    }
    for frame in turned_away {
        let place = expected.iter().position(|reply| is_of_service(reply) && reply.id == frame.id);
        expected.remove(place.expect("only requests to the service are turned away"));
    }
    assert!(may_miss || expected.is_empty(), "no answer: {expected:?}");
}

/// Whether the client repeats the request on a new connection after this error.
fn is_turned_away(frame: &Expected) -> bool {
    (frame.kind, frame.flags, frame.status) == (kind::ERROR, 0, status::SHUTTING_DOWN)
}

/// Whether this replies to a request that reached the service.
fn is_of_service(reply: &Expected) -> bool {
    let kinds = [kind::CACHE_RESP, kind::CLASSIFY_RESP, kind::BYTES_RESP, kind::INFER_RESP];
    kinds.contains(&reply.kind) || reply.status == status::INTERNAL
}

/// Whether `said` is the reply that was `expected`.
fn is_answer(expected: &Expected, said: &Expected) -> bool {
    let body_fits = match &expected.body {
        None => true,
        body => *body == said.body,
    };
    // A server that drains opens no stream.
    let drained = expected.kind == kind::STREAM_RESET && said.status == status::SHUTTING_DOWN;
    let status = if drained { status::SHUTTING_DOWN } else { expected.status };
    body_fits
        && (expected.id, expected.kind, expected.flags, status)
            == (said.id, said.kind, said.flags, said.status)
}

/// All whole frames of `output`, each checked to be well-formed, and how many bytes follow.
fn frames(output: &[u8]) -> (Vec<Expected>, usize) {
    let (mut frames, mut rest) = (Vec::new(), output);
    while let Some(frame) = Frame::decode(rest, 1 << 20).expect("no reply is above 1 MiB") {
        let header = frame.header;
        match Message::decode(frame).expect("a server's frames are well-formed") {
            Message::Error { text, .. } | Message::GoAway { text } => {
                assert!(!text.is_empty(), "an error says why");
            }
            Message::Unknown { kind } => panic!("a frame of kind {kind:#04x}"),
            _ => {}
        }
        frames.push(Expected {
            id: header.id,
            kind: header.kind.code(),
            flags: header.flags,
            status: header.status,
            body: Some(frame.body.to_vec()),
        });
        rest = &rest[HEADER_LEN + frame.body.len()..];
    }
    (frames, rest.len())
}
