//! The speed of stored answers of bytes over TCP: the program of `bytes` in `bench/scripts/run.sh`.
//!
//! Argument: the folder for the record. Each server is one thread on CPU 0 and the load one thread
//! on CPU 1, and the servers are measured in turns.
//!
//! - **Answers:** stored answers of 4 KiB, beside two servers that send a constant 4 KiB: a loop
//!   over a socket, and the server half of `wire` with a service that does nothing else.
//! - **Inputs:** inputs of 1 MiB with a stored answer of 4 KiB. The bound is one pass that reads
//!   the bytes from the socket and one that hashes them.

#![allow(clippy::unwrap_used, reason = "a measurement stops at the first fault")]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_bench::record::{Machine, Record};
use afterimage_cache::ByteStore;
use afterimage_core::{Answer, ModelId, Origin, Response, RowAnswer};
use afterimage_memo::key::KeySpace;
use afterimage_memo::upstream::Function;
use afterimage_memo::{Memo, MemoOptions, MemoService, ModelOptions, Secret};
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::infer::Rows;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Message, Role, Shape, Welcome};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
use bytes::Bytes;
use rustix::thread::{CpuSet, sched_setaffinity};

const ANSWER_LEN: usize = 4096;
/// An input of the size of a small image.
const SMALL: usize = 784;
const LARGE: usize = 1 << 20;
/// Inputs that the store has answers for.
const KNOWN: usize = 256;
const ROUNDS: usize = 7;
const MEASURE: Duration = Duration::from_millis(400);
const DIGEST: [u8; 32] = [7; 32];

/// The answer to an input.
fn answer(row: &[u8]) -> Vec<u8> {
    let mut answer = vec![row[8]; ANSWER_LEN];
    answer[..8].copy_from_slice(&row[..8]);
    answer
}

/// The input of this number.
fn input(number: usize, len: usize) -> Vec<u8> {
    let mut input: Vec<u8> = (0..len).map(|i| (i * 31 + number) as u8).collect();
    input[..8].copy_from_slice(&(number as u64).to_le_bytes());
    input
}

fn pin(cpu: usize) {
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    // On a machine with one CPU the figures are worth less, and the ratios still hold.
    let _ = sched_setaffinity(None, &cpus);
}

/// A server on a thread of its own.
struct Running {
    name: &'static str,
    addr: SocketAddr,
    /// Its thread, as `/proc` names it.
    thread: i32,
}

impl Running {
    /// Runs `serve` on CPU 0.
    fn start(name: &'static str, serve: impl FnOnce(TcpListener) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            pin(0);
            sender.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
            serve(listener);
        });
        Running { name, addr, thread: receiver.recv().unwrap() }
    }

    /// The server half of `wire` with this service.
    fn wire(
        name: &'static str,
        service: impl FnOnce() -> Arc<dyn ServiceOf> + Send + 'static,
    ) -> Self {
        Running::start(name, move |listener| {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(service().serve(listener));
        })
    }

    fn cpu_ns(&self) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/self/task/{}/schedstat", self.thread));
        text.unwrap().split(' ').next().unwrap().parse().unwrap()
    }
}

/// A service that a wire server can own.
trait ServiceOf: Send + Sync {
    fn serve(self: Arc<Self>, listener: TcpListener)
    -> std::pin::Pin<Box<dyn Future<Output = ()>>>;
}

impl<S: Service> ServiceOf for S {
    fn serve(
        self: Arc<Self>,
        listener: TcpListener,
    ) -> std::pin::Pin<Box<dyn Future<Output = ()>>> {
        Box::pin(async move {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            let server = Server::new(listener, self, ServerOptions::default());
            server.serve(std::future::pending()).await;
        })
    }
}

/// A memo with the answers of all inputs of both sizes in its store.
fn memo() -> Arc<dyn ServiceOf> {
    let store = Arc::new(ByteStore::new(64 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([1; 32])));
    let model = Function::new(ModelId::bytes("m", DIGEST), 1, |rows: &[Bytes]| {
        Ok(rows.iter().map(|row| Answer::Bytes(answer(row).into())).collect())
    });
    memo.add_model("m", model, ModelOptions::default());
    Arc::new(MemoService::of(&memo, "m").unwrap())
}

/// Sends a constant answer through the server half of `wire`.
struct Constant(Arc<ModelId>, Bytes);

impl Service for Constant {
    fn identity(&self) -> Identity {
        let shape = Shape::default();
        Identity { service: Role::Memo, digest: DIGEST, classes: 0, shape }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            if matches!(request.op, Op::Infer(_)) {
                let (answer, age) = (Answer::Bytes(self.1.clone()), Duration::ZERO);
                let row = RowAnswer { answer, origin: Origin::Hit, age };
                let rows = [row].into_iter().collect();
                batch.response_reply(i).send(Ok(Response { model: Arc::clone(&self.0), rows }));
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// Reads requests from a socket and sends a constant answer for each, with one write for each read.
fn constant_loop(listener: TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let shape = Shape::default();
    let welcome = Welcome {
        version: 2,
        service: Role::Memo,
        features: 0,
        max_body: 17 << 20,
        window: 16_384,
        classes: 0,
        digest: DIGEST,
        shape,
        name: "constant".into(),
    };
    let mut out = Vec::new();
    Message::Welcome(welcome).encode(0, &mut out);
    let mut input = vec![0; 64 << 10];
    // The bytes of the present frame that are still to come, and the bytes of a partial header.
    let (mut skip, mut partial) = (0, Vec::new());
    let mut greeted = false;
    loop {
        let read = match stream.read(&mut input) {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        let mut rest = &input[..read];
        while !rest.is_empty() {
            let skipped = rest.len().min(skip);
            (skip, rest) = (skip - skipped, &rest[skipped..]);
            if skip > 0 || rest.is_empty() {
                break;
            }
            let needed = HEADER_LEN - partial.len();
            let taken = rest.len().min(needed);
            partial.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            if partial.len() == HEADER_LEN {
                let header = Header::decode(&partial).unwrap();
                partial.clear();
                skip = header.body_len as usize;
                if std::mem::replace(&mut greeted, true) {
                    put_answer(&mut out, header.id, &[0; ANSWER_LEN]);
                }
            }
        }
        stream.write_all(&out).unwrap();
        out.clear();
    }
}

/// Bytes of the body of an `InferResp` before its only answer.
const BEFORE_ANSWER: usize = 32 + 4 + 10;

fn put_answer(out: &mut Vec<u8>, id: u64, answer: &[u8]) {
    let body_len = (BEFORE_ANSWER + answer.len()) as u32;
    let header = Header { body_len, kind: Kind::InferResp, flags: 0, status: 0, id };
    out.extend_from_slice(&header.encode());
    out.extend_from_slice(&DIGEST);
    out.extend_from_slice(&1_u32.to_le_bytes());
    out.extend_from_slice(&[1, 0, 0, 0, 0, 1]);
    out.extend_from_slice(&(answer.len() as u32).to_le_bytes());
    out.extend_from_slice(answer);
}

/// The body of an `InferReq` with one row for the model of the `Welcome`.
fn request(row: &[u8]) -> Vec<u8> {
    let mut body = vec![0; 10];
    body.extend_from_slice(&1_u32.to_le_bytes());
    Rows::put(&mut body, row);
    body
}

/// A connection that keeps `depth` requests in flight.
struct Load {
    stream: TcpStream,
    requests: Vec<Vec<u8>>,
    answers: Vec<Vec<u8>>,
    /// Whether each answer is compared with the right one.
    checks: bool,
    next: usize,
    input: Vec<u8>,
    have: usize,
}

impl Load {
    fn connect(server: &Running, len: usize, checks: bool) -> Self {
        let mut stream = TcpStream::connect(server.addr).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut hello = Vec::new();
        Message::Hello(Hello::new(b"")).encode(0, &mut hello);
        stream.write_all(&hello).unwrap();
        let known = if len == LARGE { 8 } else { KNOWN };
        let inputs: Vec<_> = (0..known).map(|number| input(number, len)).collect();
        let (requests, answers) = (
            inputs.iter().map(|row| request(row)).collect(),
            inputs.iter().map(|row| answer(row)).collect(),
        );
        let mut load =
            Load { stream, requests, answers, checks, next: 0, input: vec![0; 1 << 20], have: 0 };
        // The Welcome, and one answer for each input so that the rest are hits.
        load.receive(&mut |kind, _, _| assert_eq!(kind, Kind::Welcome));
        load.run(known, 1);
        load
    }

    fn send(&mut self, count: usize) {
        let mut out = Vec::new();
        for _ in 0..count {
            let number = self.next % self.requests.len();
            let body = &self.requests[number];
            let body_len = body.len() as u32;
            let id = self.next as u64;
            let header = Header { body_len, kind: Kind::InferReq, flags: 0, status: 0, id };
            out.extend_from_slice(&header.encode());
            out.extend_from_slice(body);
            self.next += 1;
        }
        self.stream.write_all(&out).unwrap();
    }

    /// Reads once, at least one whole frame, and returns the number of frames.
    fn receive(&mut self, frame: &mut dyn FnMut(Kind, u64, &[u8])) -> usize {
        let mut frames = 0;
        while frames == 0 {
            match self.stream.read(&mut self.input[self.have..]) {
                Ok(read) if read > 0 => self.have += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                other => panic!("the server closed the connection: {other:?}"),
            }
            let mut at = 0;
            while self.have - at >= HEADER_LEN {
                let header = Header::decode(&self.input[at..]).unwrap();
                let end = at + HEADER_LEN + header.body_len as usize;
                if end > self.have {
                    break;
                }
                frame(header.kind, header.id, &self.input[at + HEADER_LEN..end]);
                at = end;
                frames += 1;
            }
            self.input.copy_within(at..self.have, 0);
            self.have -= at;
        }
        frames
    }

    /// Sends `count` requests, at most `depth` at once.
    fn run(&mut self, count: usize, depth: usize) {
        let (answers, checks) = (std::mem::take(&mut self.answers), self.checks);
        let mut check = |kind: Kind, id: u64, body: &[u8]| {
            let found = &body[BEFORE_ANSWER.min(body.len())..];
            assert!(kind == Kind::InferResp && found.len() == ANSWER_LEN, "{kind:?}");
            assert!(!checks || found == answers[id as usize % answers.len()], "a wrong answer");
        };
        self.send(depth.min(count));
        let (mut sent, mut received) = (depth.min(count), 0);
        while received < count {
            let frames = self.receive(&mut check);
            received += frames;
            let more = frames.min(count - sent);
            self.send(more);
            sent += more;
        }
        self.answers = answers;
    }
}

/// The figures of one server in one round.
#[derive(Clone, Copy)]
struct Figures {
    per_s: f64,
    /// CPU time of the server's thread for each request.
    cpu_us: f64,
}

fn measure(server: &Running, load: &mut Load, depth: usize) -> Figures {
    let (began, cpu, mut count) = (Instant::now(), server.cpu_ns(), 0);
    while began.elapsed() < MEASURE {
        load.run(2 * depth, depth);
        count += 2 * depth;
    }
    let (took, cpu) = (began.elapsed().as_secs_f64(), server.cpu_ns() - cpu);
    Figures { per_s: count as f64 / took, cpu_us: cpu as f64 / 1e3 / count as f64 }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Measures all servers in turns. Returns the medians of each.
fn compare(record: &mut Record, servers: &[Running], len: usize, depth: usize) -> Vec<Figures> {
    let loads = servers.iter().map(|server| Load::connect(server, len, server.name == MEMO));
    let mut loads: Vec<Load> = loads.collect();
    let mut rounds: Vec<Vec<Figures>> = vec![Vec::new(); servers.len()];
    for _ in 0..ROUNDS {
        for (i, server) in servers.iter().enumerate() {
            rounds[i].push(measure(server, &mut loads[i], depth));
        }
    }
    let mut medians = Vec::new();
    for (server, rounds) in servers.iter().zip(rounds) {
        let of = |value: fn(&Figures) -> f64| median(rounds.iter().map(value).collect());
        let figures = Figures { per_s: of(|f| f.per_s), cpu_us: of(|f| f.cpu_us) };
        let Figures { per_s, cpu_us } = figures;
        say(record, &format!("{:<28}{per_s:>12.0}/s{cpu_us:>12.2} µs CPU", server.name));
        medians.push(figures);
    }
    medians
}

fn say(record: &mut Record, line: &str) {
    println!("{line}");
    record.text.push(line.to_owned());
}

fn figure(record: &mut Record, name: &str, value: f64) {
    say(record, &format!("{name:<44}{value:>12.3}"));
    record.figures.insert(name.to_owned(), value);
}

/// Time in µs to do this once: the least of many.
fn least_us(mut act: impl FnMut()) -> f64 {
    let once = |act: &mut dyn FnMut()| {
        let began = Instant::now();
        act();
        began.elapsed().as_secs_f64() * 1e6
    };
    (0..200).map(|_| once(&mut act)).fold(f64::INFINITY, f64::min)
}

const MEMO: &str = "memo, stored answers";

fn main() {
    let folder = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let folder = folder.unwrap_or_else(|| "target/bench".to_owned());
    pin(1);
    let mut record = Record::new("byte-answers", Path::new("."), Machine::here(), Vec::new());
    record.command = ["bench/scripts/run.sh", "bytes"].map(str::to_owned).into();
    let servers = || {
        let constant = || {
            Arc::new(Constant(Arc::new(ModelId::bytes("m", DIGEST)), vec![0; ANSWER_LEN].into()))
        };
        [
            Running::start("constant, a loop", constant_loop),
            Running::wire("constant, our server half", move || constant()),
            Running::wire(MEMO, memo),
        ]
    };
    for depth in [1, 64] {
        say(&mut record, &format!("{SMALL} B in, {ANSWER_LEN} B out, depth {depth}"));
        let [bare, wire, memo] = compare(&mut record, &servers(), SMALL, depth)[..] else { return };
        for (name, value) in [
            ("throughput_over_constant_loop", memo.per_s / bare.per_s),
            ("throughput_over_constant_server", memo.per_s / wire.per_s),
            ("cpu_over_constant_loop", memo.cpu_us / bare.cpu_us),
            ("cpu_over_constant_server", memo.cpu_us / wire.cpu_us),
        ] {
            figure(&mut record, &format!("depth_{depth}_{name}"), value);
        }
    }
    say(&mut record, &format!("{LARGE} B in, {ANSWER_LEN} B out, depth 2"));
    let [bare, wire, memo] = compare(&mut record, &servers(), LARGE, 2)[..] else { return };
    let row = input(0, LARGE);
    let keys = KeySpace::new(&Secret::new([1; 32]), Arc::new(ModelId::bytes("m", DIGEST)), 0);
    let keys = keys.unwrap();
    let hash = least_us(|| {
        std::hint::black_box(keys.hash(&row));
    });
    let mut copy = vec![0; LARGE];
    let copied = least_us(|| std::hint::black_box(&mut copy).copy_from_slice(&row));
    for (name, value) in [
        ("hash_us", hash),
        ("copy_us", copied),
        ("read_us", bare.cpu_us),
        ("our_server_half_us", wire.cpu_us),
        ("memo_us", memo.cpu_us),
        ("memo_over_read_and_hash", memo.cpu_us / (bare.cpu_us + hash)),
        ("memo_ns_per_byte", memo.cpu_us * 1e3 / LARGE as f64),
    ] {
        figure(&mut record, &format!("input_1_mib_{name}"), value);
    }
    say(&mut record, "targets: throughput at depth 64 at least 0.6 of the constant loop's");
    println!("recorded in {}", record.write(Path::new(&folder)).unwrap().display());
}
