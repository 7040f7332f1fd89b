//! A Redis that sends too much, too little or at the wrong time: every request is answered as a
//! miss in time, memory stays bounded, and the memo uses the server again once it is honest.
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

use afterimage_core::Answer;
use afterimage_memo::store::{Redis, RedisOptions, RemoteStore, StoreOptions};
use afterimage_memo::upstream::Function;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_testkit::memory::resident_bytes;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::{Client, ClientOptions};
use common::{Running, label_of, model_id, until};

/// The growth that a hostile server may cause.
const MAX_GROWTH: u64 = 16 << 20;

/// The time that each case lasts at least.
const ATTACK: Duration = Duration::from_millis(1500);

/// The time within which a request is answered on a busy machine.
const IN_TIME: Duration = Duration::from_secs(1);

/// Bytes after which an attack ends all the same, so that a failing test finishes.
const MAX_SENT: usize = 400 << 20;

/// Replies to a lookup: first the beginning, then the rest without end.
#[derive(Clone, Copy)]
enum Mood {
    Honest,
    Replies(&'static [u8], &'static [u8]),
    /// The same without a request, as soon as a connection is set up.
    Unasked(&'static [u8]),
    Silent,
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

/// A Redis server as far as a memo needs one.
struct Fake {
    port: u16,
    mood: Mutex<Mood>,
    values: Mutex<HashMap<Vec<u8>, Vec<u8>>>,
    /// Connections so far.
    accepted: AtomicUsize,
}

impl Fake {
    fn start() -> Arc<Fake> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (mood, values) = (Mutex::new(Mood::Honest), Mutex::default());
        let fake = Arc::new(Fake { port, mood, values, accepted: AtomicUsize::new(0) });
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
                (Mood::Replies(begin, rest), b"MGET") => {
                    (&stream).write_all(begin)?;
                    return endless(&stream, rest);
                }
                (Mood::Silent, b"MGET" | b"MSET") => loop {
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
            b"MGET" => {
                let mut reply = format!("*{}\r\n", args.len()).into_bytes();
                for key in args {
                    match values.get(key) {
                        Some(value) => reply.extend([b"$8\r\n", &value[..], b"\r\n"].concat()),
                        None => reply.extend(b"$-1\r\n"),
                    }
                }
                reply
            }
            _ => b"+OK\r\n".into(),
        }
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

/// Asks for some images, and returns the number of hits.
async fn ask(client: &Client) -> usize {
    let mut hits = 0;
    for image in 0..5 {
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
    until("all answers are hits", async || ask(&client).await == 5).await;
    let before = resident_bytes();
    for &(attack, mood) in ATTACKS {
        let accepted = fake.accepted();
        fake.set(mood);
        if matches!(mood, Mood::Unasked(_)) {
            // The attack begins with the next connection.
            fake.set(Mood::Replies(b"$-2\r\n", b"\r\n"));
            until("the connection ends", async || {
                ask(&client).await;
                fake.accepted() > accepted
            })
            .await;
            fake.set(mood);
        }
        let start = Instant::now();
        let mut growth = 0;
        while start.elapsed() < ATTACK || fake.accepted() == accepted {
            ask(&client).await;
            growth = growth.max(resident_bytes().saturating_sub(before));
            assert!(growth < MAX_GROWTH, "{attack}: {growth} bytes more");
            assert!(start.elapsed() < common::PATIENCE, "{attack}: still connected");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let connections = fake.accepted() - accepted;
        println!("{attack}: {} KiB more, {connections} connections", growth >> 10);
        // Ten attempts to connect and ten probes a second.
        let most = start.elapsed().div_duration_f64(Duration::from_millis(40)) as usize;
        assert!(connections < most, "{attack}: {connections} connections");
        fake.set(Mood::Honest);
        until(attack, async || ask(&client).await == 5).await;
    }
}
