//! Initial inputs: the golden vectors, after each target's own choices.

use crate::fuzz::{Rng, Seed};
use crate::vectors::Vector;
use afterimage_wire::proto::Message;

/// The name and bytes of each golden vector.
fn golden() -> Vec<Seed> {
    let vectors = Vector::valid().into_iter().chain(Vector::invalid());
    let mut seeds: Vec<Seed> =
        vectors.map(|vector| (vector.name().to_owned(), vector.bytes())).collect();
    seeds.sort();
    // A long frame of zeros makes a fuzzer slow and shows it nothing new.
    seeds.retain(|(_, bytes)| bytes.len() <= 2048);
    seeds
}

/// The golden vectors behind `prefix`.
fn behind(prefix: &[u8]) -> Vec<Seed> {
    let with_prefix = |(name, bytes): Seed| (name, [prefix, &bytes].concat());
    golden().into_iter().map(with_prefix).collect()
}

/// Several vectors in a row, behind `prefix`.
fn streams(prefix: &[u8], count: usize) -> Vec<Seed> {
    let (golden, mut rng) = (golden(), Rng(count as u64));
    (0..count)
        .map(|number| {
            let mut stream = prefix.to_vec();
            for _ in 0..2 + rng.index(6) {
                stream.extend_from_slice(&golden[rng.index(golden.len())].1);
            }
            (format!("stream_{number}"), stream)
        })
        .collect()
}

pub(super) fn decode_raw() -> Vec<Seed> {
    let max_body = 4096u16.to_le_bytes();
    [behind(&max_body), streams(&max_body, 20)].concat()
}

pub(super) fn split_invariance() -> Vec<Seed> {
    let start = [4, 0, 7, 7];
    [behind(&start), streams(&start, 20)].concat()
}

/// Noise of several lengths for each kind of message: the input is the message's fields in order.
pub(super) fn round_trip() -> Vec<Seed> {
    let mut rng = Rng(1);
    (0..62u8)
        .map(|number| {
            // Id, text of ten bytes, ten bytes, the kind, its fields.
            let mut input = vec![number; 8];
            input.extend_from_slice(&[10, 0]);
            input.extend_from_slice("ten bytes…".as_bytes());
            input.truncate(20);
            input.extend_from_slice(&[10, 0]);
            input.extend_from_slice(b"0123456789");
            input.push(number % 31);
            input.extend((0..rng.index(200)).map(|_| rng.number() as u8 % 8));
            (format!("fields_{number}"), input)
        })
        .collect()
}

pub(super) fn server_stream() -> Vec<Seed> {
    // Common bits, unusual bits, window, largest body / 8, pipe, cuts, times: see `Script`.
    let cache_after_hello = [0b1101, 0, 15, 250, 9, 3, 3, 10];
    let classifier_after_hello = [0b1100, 0, 3, 128, 4, 1, 2, 10];
    let from_the_start = [0b1010, 0, 15, 250, 9, 0, 0, 10];
    let mut seeds = vec![
        ("every_behaviour_of_a_cache".to_owned(), [&cache_after_hello[..], &reads()].concat()),
        (
            "every_behaviour_of_a_classifier".to_owned(),
            [&classifier_after_hello[..], &images()].concat(),
        ),
    ];
    let change = [0b10_1101, 0b1_1000, 15, 250, 9, 3, 3, 10];
    seeds.push((
        "a_change_between_reads".to_owned(),
        [&change[..], &reads(), &reads(), &reads()].concat(),
    ));
    for (name, start) in [
        ("cache", cache_after_hello),
        ("classifier", classifier_after_hello),
        ("start", from_the_start),
        ("pauses", [0b1_0101, 0, 15, 255, 9, 3, 3, 10]),
        ("drain", [0b10_0101, 0b100, 15, 250, 9, 3, 3, 10]),
        ("change", change),
        ("deaf", [0b10_0101, 0b10, 15, 255, 2, 3, 3, 255]),
    ] {
        let renamed = |(of, bytes): Seed| (format!("{name}_{of}"), bytes);
        seeds.extend(streams(&start, 12).into_iter().map(renamed));
        if name.len() != 5 || name == "start" || name == "cache" {
            seeds.extend(behind(&start).into_iter().map(renamed));
        }
    }
    seeds
}

/// Steps of a client with streams, most of them sensible: see `server_streams::act`.
pub(super) fn server_streams() -> Vec<Seed> {
    let mut rng = Rng(3);
    (0..60u8)
        .map(|number| {
            let mut steps = vec![number];
            for id in 1..2 + number % 8 {
                // Open a stream, send bytes, give credit, wait.
                steps.extend([0, id, number % 5, number * 4]);
                steps.extend([2, id, 50, number, 6, id, 255, 11, 0, 20]);
            }
            steps.extend((0..rng.index(100)).map(|_| rng.number() as u8));
            (format!("steps_{number}"), steps)
        })
        .collect()
}

/// Writes and reads of keys that cover every behaviour of the service.
fn reads() -> Vec<u8> {
    let mut stream = Vec::new();
    for key in 0..32 {
        if key % 3 == 0 {
            Message::CacheWrite { key, value: -1 }.encode(100 + key, &mut stream);
        }
        Message::CacheRead { key, budget_ms: 0 }.encode(key, &mut stream);
    }
    stream
}

/// Images that cover every behaviour of the service.
fn images() -> Vec<u8> {
    let mut stream = Vec::new();
    for first in 0..32 {
        let image = [first, 1, 2];
        Message::ClassifyReq { image: &image, budget_ms: 9 }.encode(first.into(), &mut stream);
    }
    stream
}

pub(super) fn client_stream() -> Vec<Seed> {
    let mut seeds = Vec::new();
    // Options: bits, timeout, requests in flight, largest body; then the number of calls.
    let options = [0, 0, 16, 15, 0, 16];
    for (kind, name) in
        ["deadline", "classify", "get", "get_many", "ping", "set", "callback", "many_callback"]
            .into_iter()
            .enumerate()
    {
        let mut input = options.to_vec();
        input.extend_from_slice(&[2, 0]);
        for after in 0..3 {
            input.extend_from_slice(&[kind as u8, after, 200]);
        }
        // Close, a good end, a wide pipe; then: welcome, answers.
        for (end, script) in [
            ("good", &[2, 0, 4, 0, 4, 1, 9, 4, 0, 4, 2, 2, 11][..]),
            ("errors", &[4, 0, 14, 5, 14, 10, 4, 1]),
            ("go_away", &[4, 0, 4, 1, 16, 4, 0, 11]),
            ("lost", &[4, 0, 17, 22, 22, 4, 0, 11]),
            ("refused", &[0, 3, 15, 7, 22, 22, 22, 4, 0, 4]),
            ("again", &[4, 0, 4, 9, 20, 60, 13, 3, 0, 1, 19, 255, 255, 255, 255, 33]),
            ("message", &[4, 0, 12, 0, 0, 7, 3, 0, b'a', b'b', b'c', 2, 0, 1, 2, 13, 7, 0, 1]),
        ] {
            let mut input = input.clone();
            input.extend_from_slice(&[3, 9]);
            input.extend_from_slice(script);
            seeds.push((format!("{name}_{end}"), input));
        }
    }
    // Raw bytes of a server.
    let mut start = options.to_vec();
    start.extend_from_slice(&[1, 0, 1, 0, 100, 2, 1, 100, 3, 9, 4, 0]);
    for (name, bytes) in golden() {
        let Ok(len) = u8::try_from(bytes.len()) else { continue };
        let mut input = start.clone();
        input.extend_from_slice(&[18, len]);
        input.extend_from_slice(&bytes);
        seeds.push((format!("raw_{name}"), input));
    }
    seeds
}
