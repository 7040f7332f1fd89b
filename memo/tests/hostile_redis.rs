//! A Redis that sends too much, too little or at the wrong time, as a single server and as a node
//! of a cluster: every request is answered as a miss in time, memory stays bounded, and the memo
//! uses the server again once it is honest.
//!
//! One test runs all cases in turn, because it measures the memory of its own process.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_core::{Answer, ModelId};
use afterimage_memo::store::{
    OfBytes, Redis, RedisOptions, RemoteStore, StoreOfBytes, StoreOptions,
};
use afterimage_memo::upstream::Function;
use afterimage_memo::{Memo, MemoOptions, MemoService, ModelOptions, Request, Secret, Store};
use afterimage_testkit::memory::resident_bytes;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::{Client, ClientOptions};
use bytes::Bytes;
use common::{Running, label_of, model_id, until};

/// Images in a round of requests: enough that each node of a cluster has some of them.
const IMAGES: usize = 16;

/// The growth that a hostile server may cause.
const MAX_GROWTH: u64 = 16 << 20;

/// The same for a store of answers of bytes: a reply may have 16 MiB, and the library copies it.
const MAX_GROWTH_OF_BYTES: u64 = 96 << 20;

/// The time that each case lasts at least.
const ATTACK: Duration = Duration::from_millis(1500);

/// The time within which a request is answered on a busy machine.
const IN_TIME: Duration = Duration::from_secs(3);

/// Bytes after which every attack ends, so that a failing test finishes.
const MAX_SENT: usize = 400 << 20;

/// Replies to a lookup: first the beginning, then the rest without end.
#[derive(Clone, Copy)]
enum Mood {
    Honest,
    Replies(&'static [u8], &'static [u8]),
    /// The same without a request, as soon as a connection is set up.
    Unasked(&'static [u8]),
    Silent,
    /// One reply too many, once for each connection: after it, every request gets the reply of an
    /// earlier one.
    Shifted,
}

const ATTACKS: &[(&str, Mood)] = &[
    ("an endless simple string", Mood::Replies(b"+", b"endless")),
    ("an endless error", Mood::Replies(b"-ERR ", b"endless")),
    ("a string of 512 MiB", Mood::Replies(b"$536870912\r\n", b"endless")),
    ("a value of 512 MiB", Mood::Replies(b"*1\r\n$536870912\r\n", b"endless")),
    ("a string of 9 exabytes", Mood::Replies(b"$9223372036854775807\r\n", b"endless")),
    ("nested arrays", Mood::Replies(b"", b"*1\r\n")),
    ("wide nested arrays", Mood::Replies(b"", b"*99999\r\n")),
    ("a huge array", Mood::Replies(b"*2147483647\r\n", b"$-1\r\n")),
    ("many large values", Mood::Replies(b"*65536\r\n", b"$8\r\nendless!\r\n$0\r\n\r\n")),
    ("endless attributes", Mood::Replies(b"", b"|1\r\n+a\r\n+b\r\n")),
    ("endless replies", Mood::Replies(b"*1\r\n$-1\r\n", b"*1\r\n$-1\r\n")),
    ("data without a request", Mood::Unasked(b"+OK\r\n")),
    ("another protocol", Mood::Replies(b"HTTP/1.1 200 OK\r\n\r\n", b"endless")),
    ("no reply", Mood::Silent),
];

/// Attacks on a lookup of an answer of bytes.
const ATTACKS_ON_BYTES: &[(&str, Mood)] = &[
    ("a value of 512 MiB", Mood::Replies(b"$536870912\r\n", b"endless")),
    ("endless values of 16 MiB", Mood::Replies(b"$16777216\r\n", b"endless")),
    ("an endless error", Mood::Replies(b"-ERR ", b"endless")),
    ("endless small values", Mood::Replies(b"$8\r\nendless!\r\n", b"$8\r\nendless!\r\n")),
    ("no reply", Mood::Silent),
];

/// A Redis server as far as a memo needs one.
struct Fake {
    port: u16,
    mood: Mutex<Mood>,
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    /// Connections so far.
    accepted: AtomicUsize,
    /// The ports of the cluster that it is a node of; empty for a single server.
    cluster: Mutex<Vec<u16>>,
}

impl Fake {
    fn start() -> Arc<Fake> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mood, values) = (Mutex::new(Mood::Honest), Mutex::default());
        let (accepted, cluster) = (AtomicUsize::new(0), Mutex::default());
        let fake = Arc::new(Fake { port, mood, values, accepted, cluster });
        let shared = Arc::clone(&fake);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let fake = Arc::clone(&shared);
                fake.accepted.fetch_add(1, SeqCst);
                // An error ends the connection.
                std::thread::spawn(move || fake.serve(stream.unwrap()));
            }
        });
        fake
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    fn accepted(&self) -> usize {
        self.accepted.load(SeqCst)
    }

    fn serve(&self, stream: TcpStream) -> std::io::Result<()> {
        let mut commands = BufReader::new(stream.try_clone()?);
        loop {
            let command = read_command(&mut commands)?;
            let mood = *self.mood.lock().unwrap();
            let name = command[0].to_ascii_uppercase();
            match (mood, &name[..]) {
                (Mood::Replies(begin, rest), b"MGET" | b"GET") => {
                    (&stream).write_all(begin)?;
                    return endless(&stream, rest);
                }
                (Mood::Shifted, b"MGET") => {
                    // With another request in flight, so that the reply is not unasked for.
                    let mut replies = self.reply(&name, &command[1..]);
                    let next = read_command(&mut commands)?;
                    let name = next[0].to_ascii_uppercase();
                    replies.extend(b"*1\r\n$-1\r\n");
                    (&stream).write_all(&replies)?;
                    // From now on each reply waits for the next request.
                    let mut reply = self.reply(&name, &next[1..]);
                    loop {
                        let next = read_command(&mut commands)?;
                        (&stream).write_all(&reply)?;
                        reply = self.reply(&next[0].to_ascii_uppercase(), &next[1..]);
                    }
                }
                (Mood::Silent, b"MGET" | b"MSET" | b"GET" | b"SET") => loop {
                    read_command(&mut commands)?;
                },
                (Mood::Unasked(bytes), b"CLIENT") if command[2] == b"LIB-VER" => {
                    (&stream).write_all(b"+OK\r\n")?;
                    std::thread::sleep(Duration::from_millis(20));
                    return endless(&stream, bytes);
                }
                _ => (&stream).write_all(&self.reply(&name, &command[1..]))?,
            }
        }
    }

    fn reply(&self, name: &[u8], args: &[Vec<u8>]) -> Vec<u8> {
        let mut values = self.values.lock().unwrap();
        match name {
            b"MSET" => {
                values.extend(args.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())));
                b"+OK\r\n".into()
            }
            b"SET" => {
                values.insert(args[0].clone(), args[1].clone());
                b"+OK\r\n".into()
            }
            b"GET" => bulk(values.get(&args[0])),
            b"PING" if !args.is_empty() => bulk(args.first()),
            b"PING" => b"+PONG\r\n".into(),
            b"CLUSTER" => self.slots(),
            b"MGET" => {
                let mut reply = format!("*{}\r\n", args.len()).into_bytes();
                for key in args {
                    reply.extend(bulk(values.get(key)));
                }
                reply
            }
            _ => b"+OK\r\n".into(),
        }
    }

    /// The slots of the cluster, in equal parts.
    fn slots(&self) -> Vec<u8> {
        let ports = self.cluster.lock().unwrap().clone();
        let mut reply = format!("*{}\r\n", ports.len());
        let share = 16_384usize.div_ceil(ports.len().max(1));
        for (i, port) in ports.iter().enumerate() {
            let (first, last) = (i * share, ((i + 1) * share).min(16_384) - 1);
            reply += &format!(
                "*3\r\n:{first}\r\n:{last}\r\n*3\r\n$9\r\n127.0.0.1\r\n:{port}\r\n$1\r\n{i}\r\n"
            );
        }
        reply.into_bytes()
    }
}

/// A bulk string.
fn bulk(value: Option<&Vec<u8>>) -> Vec<u8> {
    match value {
        Some(value) => {
            let head = format!("${}\r\n", value.len());
            [head.as_bytes(), value, b"\r\n"].concat()
        }
        None => b"$-1\r\n".into(),
    }
}

/// Sends `bytes` until the peer closes the connection.
fn endless(mut stream: &TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    let bytes = bytes.repeat((64 << 10) / bytes.len());
    for _ in 0..MAX_SENT / bytes.len() {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

/// The arguments of the next command.
fn read_command(from: &mut BufReader<TcpStream>) -> std::io::Result<Vec<Vec<u8>>> {
    let number = |from: &mut BufReader<TcpStream>| {
        let mut line = String::new();
        from.read_line(&mut line)?;
        let digits = line.get(1..).unwrap_or_default().trim();
        digits.parse::<usize>().map_err(std::io::Error::other)
    };
    let args = number(from)?;
    let mut arg = || {
        let mut bytes = vec![0; number(from)? + 2];
        from.read_exact(&mut bytes)?;
        bytes.truncate(bytes.len() - 2);
        Ok(bytes)
    };
    (0..args).map(|_| arg()).collect()
}

async fn memo(url: &str) -> (Running, Client) {
    let redis = Redis::connect_lazy(url, RedisOptions::default()).unwrap();
    // A busy machine is not what this test is about.
    let lookup_budget = Duration::from_millis(50);
    let store = RemoteStore::new(redis, StoreOptions { lookup_budget, ..StoreOptions::default() });
    let upstream = Function::new(model_id(1), 1, |rows| {
        Ok(rows.iter().map(|row| Answer::Label(label_of(1, row))).collect())
    });
    let options = MemoOptions::new(Secret::new([7; 32]));
    let service = MemoService::new(Store::Remote(store), upstream, options);
    let running = Running::start(service, "127.0.0.1:0").await;
    let client = Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap();
    (running, client)
}

/// A memo whose model answers with bytes.
fn memo_of_bytes(url: &str) -> Memo {
    let redis = Redis::<OfBytes>::connect_lazy(url, RedisOptions::default()).unwrap();
    let lookup_budget = Duration::from_millis(50);
    let limits = StoreOptions { lookup_budget, ..StoreOptions::for_bytes() };
    let store = StoreOfBytes::Remote(RemoteStore::new(redis, limits));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let upstream = Function::new(ModelId::bytes("echo", [5; 32]), 1, |rows| {
        Ok(rows.iter().cloned().map(Answer::Bytes).collect())
    });
    memo.add_model("m", upstream, ModelOptions::default());
    memo
}

/// Asks for 64 rows of bytes, and returns the number of hits.
async fn ask_for_bytes(memo: &Memo) -> usize {
    let rows: Vec<Bytes> = (0..64).map(|i| vec![i; 100].into()).collect();
    let start = Instant::now();
    let response = memo.ask(Request::rows(rows.clone()).model("m")).await.unwrap();
    assert!(start.elapsed() < IN_TIME, "a request took {:?}", start.elapsed());
    let mut hits = 0;
    for (answer, row) in response.rows.iter().zip(rows) {
        assert_eq!(answer.answer, Answer::Bytes(row));
        hits += usize::from(answer.origin == Origin::Hit);
    }
    hits
}

/// Asks for some images, and returns the number of hits.
async fn ask(client: &Client) -> usize {
    let mut hits = 0;
    for image in 0..IMAGES as u8 {
        let start = Instant::now();
        let image = [image, 1, 2, 3];
        let answer = client.classify(&image).await.unwrap();
        assert!(start.elapsed() < IN_TIME, "a request took {:?}", start.elapsed());
        assert_eq!(answer.label, label_of(1, &image));
        hits += usize::from(answer.origin == Origin::Hit);
    }
    hits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_redis_costs_neither_memory_nor_time() {
    let fake = Fake::start();
    let url = format!("redis://127.0.0.1:{}", fake.port);
    let (_running, client) = memo(&url).await;
    let asks = async || ask(&client).await == IMAGES;
    resists(&fake, ATTACKS, MAX_GROWTH, &asks).await;
    gets_back_in_step(&fake, &client).await;

    // A cluster of two, of which one is hostile. The library retries a failed lookup by itself.
    let (honest, hostile) = (Fake::start(), Fake::start());
    let ports = vec![honest.port, hostile.port];
    for node in [&honest, &hostile] {
        node.cluster.lock().unwrap().clone_from(&ports);
    }
    let url = format!("redis+cluster://127.0.0.1:{},127.0.0.1:{}", ports[0], ports[1]);
    let (_running, client) = memo(&url).await;
    let asks = async || ask(&client).await == IMAGES;
    until("both nodes have answers", async || {
        let has_answers = |node: &Fake| !node.values.lock().unwrap().is_empty();
        asks().await && has_answers(&honest) && has_answers(&hostile)
    })
    .await;
    resists(&hostile, ATTACKS, MAX_GROWTH, &asks).await;

    let memo = memo_of_bytes(&format!("redis://127.0.0.1:{}", fake.port));
    let asks = async || ask_for_bytes(&memo).await == 64;
    resists(&fake, ATTACKS_ON_BYTES, MAX_GROWTH_OF_BYTES, &asks).await;
}

/// Runs attacks, and checks time, memory and the number of connections. `asks` returns whether all
/// answers are hits.
async fn resists(
    fake: &Fake,
    attacks: &[(&str, Mood)],
    max_growth: u64,
    asks: &impl AsyncFn() -> bool,
) {
    until("all answers are hits", asks).await;
    let before = resident_bytes();
    for &(attack, mood) in attacks {
        let accepted = fake.accepted();
        fake.set(mood);
        if matches!(mood, Mood::Unasked(_)) {
            // The attack begins with the next connection.
            fake.set(Mood::Replies(b"$-2\r\n", b"\r\n"));
            until("the connection ends", async || {
                asks().await;
                fake.accepted() > accepted
            })
            .await;
            fake.set(mood);
        }
        let start = Instant::now();
        let mut growth = 0;
        while start.elapsed() < ATTACK || fake.accepted() == accepted {
            asks().await;
            growth = growth.max(resident_bytes().saturating_sub(before));
            assert!(growth < max_growth, "{attack}: {growth} bytes more");
            assert!(start.elapsed() < common::PATIENCE, "{attack}: still connected");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let connections = fake.accepted() - accepted;
        println!("{attack}: {} KiB more, {connections} connections", growth >> 10);
        // Ten attempts to connect and ten probes a second.
        let most = start.elapsed().div_duration_f64(Duration::from_millis(40)) as usize;
        assert!(connections < most, "{attack}: {connections} connections");
        fake.set(Mood::Honest);
        until(attack, asks).await;
    }
}

/// After one reply too many, each request of the connection gets the reply of an earlier one. The
/// memo finds that out, and connects anew.
async fn gets_back_in_step(fake: &Fake, client: &Client) {
    let accepted = fake.accepted();
    fake.set(Mood::Shifted);
    // Enough requests at once that one is always in flight: no reply comes without a request.
    let busy: Vec<_> = (0..4)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                loop {
                    ask(&client).await;
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    until("the replies are out of step", async || ask(client).await < IMAGES).await;
    fake.set(Mood::Honest);
    let start = Instant::now();
    until("the memo connects anew", async || fake.accepted() > accepted).await;
    println!("out of step: a new connection after {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    until("all answers are hits again", async || ask(client).await == IMAGES).await;
    busy.into_iter().for_each(|task| task.abort());
}
