//! Frames per second of the wire codec alone, on one core.
//!
//! `cargo run --release -p afterimage-bench --bin codec [FOLDER for the record]`
//!
//! Each frame is encoded into a buffer as a client does, then cut out of it, decoded as a server
//! does, and checked. The buffer fits into the first-level cache twice. The best and the median of
//! many rounds count. `wire/tests/no_allocation.rs` checks that the codec allocates nothing.

use std::env;
use std::error::Error;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use afterimage_bench::record::{Machine, Record};
use afterimage_wire::proto::header::DEFAULT_MAX_BODY;
use afterimage_wire::proto::message::{
    Classification, Origin, put_cache_read, put_cache_resp, put_cache_write, put_classify_req,
    put_classify_resp,
};
use afterimage_wire::proto::{Frame, Message};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Frames in the buffer: some 24 KB of the smallest.
const FRAMES: u64 = 512;

/// Passes over the buffer between two readings of the clock: less than a scheduler's time slice.
const PASSES: u64 = 400;

const ROUNDS: usize = 101;

fn main() -> Result<(), Box<dyn Error>> {
    let machine = Machine::here();
    let mut cpus = CpuSet::new();
    cpus.set(0);
    sched_setaffinity(None, &cpus)?;
    let mut record = Record::new("codec", Path::new("."), machine, Vec::new());
    let mut say = |line: String| {
        println!("{line}");
        record.text.push(line);
    };
    let ghz = ghz();
    let image = [7; 784];
    let label = Classification { label: 7, origin: Origin::Hit };
    say(format!(
        "{:<28}{:>14}{:>14}{:>12}{:>12}",
        "encode + decode", "best M/s", "median M/s", "best ns", "cycles"
    ));
    let mut figures = Vec::new();
    let mut add = |name: &str, (best, median): (f64, f64)| {
        let (fast, usual, cycles) = (1e3 / best, 1e3 / median, best * ghz);
        say(format!("{name:<28}{fast:>14.1}{usual:>14.1}{best:>12.2}{cycles:>12.1}"));
        for (what, value) in [("M/s", fast), ("median M/s", usual), ("cycles", cycles)] {
            figures.push((format!("{name}, {what}"), value));
        }
    };
    add(
        "CacheReq, read",
        measure(
            |out, id| put_cache_read(out, id, id * 3, 0),
            |id, message| matches!(message, Message::CacheRead { key, .. } if *key == id * 3),
        ),
    );
    add(
        "CacheReq, write",
        measure(
            |out, id| put_cache_write(out, id, id, 5),
            |id, message| matches!(message, Message::CacheWrite { key, value: 5 } if *key == id),
        ),
    );
    add(
        "CacheResp, hit",
        measure(
            |out, id| put_cache_resp(out, id, Some(9)),
            |_, message| matches!(message, Message::CacheResp { value: Some(9) }),
        ),
    );
    add(
        "ClassifyReq, 784 bytes",
        measure(
            |out, id| put_classify_req(out, id, &image, 0),
            |_, m| matches!(m, Message::ClassifyReq { image, .. } if image.len() == 784),
        ),
    );
    add(
        "ClassifyResp",
        measure(
            |out, id| put_classify_resp(out, id, label),
            |_, message| matches!(message, Message::ClassifyResp(label) if label.label == 7),
        ),
    );
    record.figures = figures.into_iter().collect();
    record.figures.insert("GHz".into(), ghz);
    if let Some(folder) = env::args().nth(1) {
        println!("recorded in {}", record.write(Path::new(&folder))?.display());
    }
    Ok(())
}

/// Nanoseconds for each frame, encoded and decoded: the best round and the median one.
fn measure(
    encode: impl Fn(&mut Vec<u8>, u64),
    check: impl Fn(u64, &Message<'_>) -> bool,
) -> (f64, f64) {
    let mut buffer = Vec::with_capacity(1 << 20);
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            for _ in 0..PASSES {
                buffer.clear();
                for id in 0..FRAMES {
                    encode(&mut buffer, id);
                }
                let right = decode_all(black_box(&buffer), &check);
                assert_eq!(right, FRAMES, "a frame was decoded to something else");
            }
            began.elapsed().as_nanos() as f64 / (PASSES * FRAMES) as f64
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    (rounds[0], rounds[ROUNDS / 2])
}

/// The number of correct frames in the buffer.
fn decode_all(mut rest: &[u8], check: impl Fn(u64, &Message<'_>) -> bool) -> u64 {
    let mut right = 0;
    while let Ok(Some(frame)) = Frame::decode(rest, DEFAULT_MAX_BODY) {
        rest = &rest[frame.header.frame_len()..];
        if let Ok(message) = Message::decode(frame) {
            right += u64::from(check(frame.header.id, &message));
        }
    }
    right
}

/// The clock of the processor's cores as the system reports it, which is the one that cycles are
/// counted by.
fn ghz() -> f64 {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz"));
    let mhz = line.and_then(|line| line.trim_start_matches([' ', '\t', ':']).parse::<f64>().ok());
    mhz.unwrap_or(0.0) / 1e3
}
