//! The server and a client that sends whatever it likes, over a pipe in memory, on virtual time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::server_model::{Behaviour, Reply, Rest, Setup, answers, behaviour, class, kind, status};
use super::support::{Rng, Source};
use crate::proto::message::{Label, Origin};
use crate::proto::stats::Stats;
use crate::proto::{Frame, HEADER_LEN, Hello, Message, Service as ServiceKind, Snapshot};
use crate::server::{Batch, Identity, Later, Op, ServerOptions, Service, Token, serve_stream};

/// The secret of a server that asks for one.
const TOKEN: &[u8] = b"open sesame";

/// Virtual time in which any connection must have ended: all its deadlines together, for each of the
/// pauses that a client makes.
const FOR_EVER: Duration = Duration::from_secs(24 * 3600);

/// Bytes that a server may say whatever it hears: a Welcome, a GoAway, an error.
const OUTPUT_BASE: usize = 4096;
/// Bytes that a server may say for each that it hears. The worst is a header of 16 bytes that asks for
/// statistics.
const OUTPUT_PER_BYTE: usize = 64;

/// How the client behaves, from the first eight bytes of the input.
#[derive(Debug)]
struct Script {
    is_cache: bool,
    token: bool,
    /// A good Hello is sent before the input's bytes.
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
    /// The service becomes another one after so many batches.
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
        // The largest shows whether memory is taken for what is announced.
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

    /// Whether nothing but the bytes decides what the server says.
    fn is_plain(&self) -> bool {
        !self.abort
            && self.deaf_for.is_none()
            && !self.pauses
            && self.drain_after.is_none()
            && self.changes_after == u64::MAX
    }
}

/// Input: a [`Script`], then what the client sends.
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

/// Lets the two talk until the server hangs up; returns all that the client read.
async fn converse(script: &Script, stream: &[u8]) -> Vec<u8> {
    let (ours, theirs) = tokio::io::duplex(script.pipe);
    let service = Arc::new(Oracle {
        is_cache: script.is_cache,
        values: Mutex::default(),
        batches: AtomicU64::new(0),
        changes_after: script.changes_after,
    });
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
            // Both halves go, and with them what was not read.
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
    let longest = 1 + cuts.below(stream.len().max(1));
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at((1 + cuts.below(longest)).min(rest.len()));
        if writer.write_all(piece).await.is_err() {
            return;
        }
        rest = behind;
        if script.pauses && cuts.below(4) == 0 {
            // Around the times at which a server loses patience: 250 ms, 5 s, 30 s, 300 s.
            let ms = [1, 249, 4_990, 29_000, 31_000, 299_000, 301_000][cuts.below(7)];
            sleep(Duration::from_millis(ms)).await;
        } else if cuts.below(2) == 0 {
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
    // An error would be the end, too; a pipe in memory has none.
    let _ = reader.read_to_end(&mut output).await;
    output
}

/// Compares what was said with what was to be said.
fn check(script: &Script, mut expected: Vec<Reply>, rest: Rest, output: &[u8]) {
    // One that is slow enough is told of the deadline instead, in a frame.
    if rest == Rest::Http && (script.is_plain() || output.starts_with(b"HTTP")) {
        let start = b"HTTP/1.1 400 Bad Request\r\n";
        assert!(output.starts_with(start) || script.deaf_for.is_some(), "HTTP is answered in HTTP");
        assert!(output.ends_with(b"client.\n") || !script.is_plain(), "with a whole answer");
        return;
    }
    let (mut said, left) = frames(output);
    // Only a client that does not read, or is not there, may see part of a frame.
    let is_cut = script.abort || script.deaf_for.is_some();
    assert!(is_cut || left == 0, "the output ends {left} bytes into a frame");

    // Nothing comes after a connection-level error.
    let fatal = said.iter().position(|frame| frame.kind == kind::ERROR && frame.flags == 1);
    assert!(fatal.is_none_or(|at| at + 1 == said.len()), "more follows the last words: {said:?}");
    assert!(said.iter().skip(1).all(|frame| frame.kind != kind::WELCOME), "one Welcome");

    // Notices of the server's own, which answer nothing.
    let notice = |frame: &Reply| {
        frame.id == 0
            && match (frame.kind, frame.flags) {
                (kind::GO_AWAY, 0) => frame.status == status::SHUTTING_DOWN,
                (kind::ERROR, 1) => {
                    matches!(frame.status, status::DEADLINE_EXCEEDED | status::SHUTTING_DOWN)
                }
                _ => false,
            }
    };
    let notices: Vec<Reply> = said.iter().filter(|frame| notice(frame)).cloned().collect();
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
    // After a connection-level error, or with the client gone, replies may be missing; none may be too many.
    let may_miss = is_cut || fatal.is_some() || (!script.is_plain() && !notices.is_empty());
    // A service that has become another one turns requests away; which of them, is a matter of batches.
    let has_changed = script.changes_after != u64::MAX;
    let (turned_away, said): (Vec<Reply>, Vec<Reply>) =
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
        expected.remove(place.expect("only who asks the service is turned away"));
    }
    assert!(may_miss || expected.is_empty(), "no answer: {expected:?}");
}

/// Whether this is an error that says "elsewhere" to one request.
fn is_turned_away(frame: &Reply) -> bool {
    (frame.kind, frame.flags, frame.status) == (kind::ERROR, 0, status::SHUTTING_DOWN)
}

/// Whether this is what became of a request that reached the service.
fn is_of_service(reply: &Reply) -> bool {
    matches!(reply.kind, kind::CACHE_RESP | kind::CLASSIFY_RESP) || reply.status == status::INTERNAL
}

/// Whether `said` is the reply that was `expected`.
fn is_answer(expected: &Reply, said: &Reply) -> bool {
    let body_fits = match &expected.body {
        None => true,
        body => *body == said.body,
    };
    body_fits
        && (expected.id, expected.kind, expected.flags, expected.status)
            == (said.id, said.kind, said.flags, said.status)
}

/// All whole frames of `output`, each checked to be well-formed, and how many bytes follow.
fn frames(output: &[u8]) -> (Vec<Reply>, usize) {
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
        frames.push(Reply {
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

/// A service that answers in all the ways there are, by its request alone.
struct Oracle {
    is_cache: bool,
    values: Mutex<HashMap<u64, i64>>,
    batches: AtomicU64,
    changes_after: u64,
}

impl Service for Oracle {
    fn identity(&self) -> Identity {
        Identity::without_model(if self.is_cache {
            ServiceKind::Cache
        } else {
            ServiceKind::Classifier
        })
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
                    respond(batch, index, key as u8, now, move |later| later.value(value));
                }
                Op::Classify { image } => {
                    let label = Label { class: class(image), origin: Origin::Computed };
                    let seed = image.first().copied().unwrap_or(0);
                    let now = |batch: &mut Batch<'_>| batch.label(index, label);
                    respond(batch, index, seed, now, move |later| later.label(label));
                }
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.counter("batches", self.batches.load(Ordering::Relaxed));
    }

    fn snapshot(&self, later: Later) {
        let elapsed = Duration::from_micros(3);
        later.snapshot(Snapshot { entries: 1, bytes: 2, elapsed, joined: true });
    }
}

fn respond(
    batch: &mut Batch<'_>,
    index: usize,
    seed: u8,
    now: impl Fn(&mut Batch<'_>),
    then: impl FnOnce(Later) + Send + 'static,
) {
    match behaviour(seed) {
        Behaviour::Now => now(batch),
        Behaviour::Twice => {
            now(batch);
            now(batch);
        }
        Behaviour::After { ms } => {
            let later = batch.later(index);
            tokio::spawn(async move {
                sleep(Duration::from_millis(ms)).await;
                then(later);
            });
        }
        Behaviour::Dropped => drop(batch.later(index)),
        Behaviour::Forgotten => {}
    }
}
