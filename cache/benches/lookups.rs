//! Time per lookup on one thread: `cargo bench -p afterimage-cache --bench lookups --
//! [MILLIONS_OF_KEYS ...]`.
//!
//! Keys are looked up in random order, so in a large table each lookup misses the processor's
//! caches. Each answer is checked.

use afterimage_cache::{Capacity, Table};
use afterimage_wire::splitmix::SplitMix64;
use std::hint::black_box;
use std::time::Instant;

/// Different keys that are looked up: their buckets take 512 MB.
const KEYS_ASKED: usize = 1 << 22;
/// Keys in the table and keys that are looked up if nothing is measured (`cargo test
/// --all-targets`).
const FEW: usize = 10_000;
/// Keys between two readings of the clock, which takes less than a scheduler's time slice.
const SLICE: usize = 1 << 15;
/// Keys of one `get_many`: about as many as one read from a busy connection contains.
const BATCH: usize = 256;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    // `cargo bench` passes this argument, `cargo test` does not.
    let measured = args.iter().any(|arg| arg == "--bench");
    let millions = args.iter().filter_map(|arg| arg.parse::<u64>().ok());
    let mut sizes: Vec<u64> = millions.map(|millions| millions * 1_000_000).collect();
    if sizes.is_empty() {
        sizes = if measured { vec![1_000_000, 50_000_000] } else { vec![FEW as u64] };
    }
    let asked = if measured { KEYS_ASKED } else { FEW };
    println!(
        "| keys | table | lookup | single ns, best (median) | batched ns, best (median) | batched, million/s, best |"
    );
    println!("|---|---|---|---|---|---|");
    for keys in sizes {
        // A quarter more slots than keys: nearly all keys stay, and the others are not looked up.
        let table = Table::new(Capacity::Bytes((keys + keys / 4) * 16)).expect("enough memory");
        let filling = Instant::now();
        for key in 0..keys {
            table.insert(key, !key);
        }
        let filling = filling.elapsed();
        let mut rng = SplitMix64(7);
        let mut hits = Vec::with_capacity(asked);
        while hits.len() < asked {
            let key = rng.number() % keys;
            if table.get(key).is_some() {
                hits.push(key);
            }
        }
        let misses: Vec<u64> = (0..asked).map(|_| rng.number() | 1 << 63).collect();
        let megabytes = table.memory_bytes() / 1_000_000;
        for (what, wanted, hit) in [("hit", &hits, true), ("miss", &misses, false)] {
            let single = Times::of(wanted, |keys| single(&table, keys, hit));
            let batched = Times::of(wanted, |keys| batched(&table, keys, hit));
            println!(
                "| {keys} | {megabytes} MB | {what} | {single} | {batched} | {:.1} |",
                1e3 / batched.best,
            );
        }
        println!(
            "| {keys} | {megabytes} MB | insert, page faults included | {:.1} | | |",
            filling.as_nanos() as f64 / keys as f64
        );
    }
}

fn single(table: &Table, keys: &[u64], hit: bool) {
    for &key in keys {
        check(key, table.get(black_box(key)), hit);
    }
}

fn batched(table: &Table, keys: &[u64], hit: bool) {
    let mut values = [None; BATCH];
    for keys in keys.chunks(BATCH) {
        let values = &mut values[..keys.len()];
        table.get_many(black_box(keys), values);
        for (&key, &value) in keys.iter().zip(&*values) {
            check(key, value, hit);
        }
    }
}

fn check(key: u64, value: Option<u64>, hit: bool) {
    assert_eq!(value, hit.then_some(!key));
}

/// Nanoseconds per key: of the best slice, because other load can only add time, and of the median
/// slice.
struct Times {
    best: f64,
    median: f64,
}

impl Times {
    /// Runs over all keys four times. Only the first passes mark hits.
    fn of(keys: &[u64], run: impl Fn(&[u64])) -> Self {
        let mut times = Vec::new();
        for slice in std::iter::repeat_n(keys, 4).flat_map(|keys| keys.chunks(SLICE)) {
            let started = Instant::now();
            run(slice);
            times.push(started.elapsed().as_nanos() as f64 / slice.len() as f64);
        }
        times.sort_by(f64::total_cmp);
        Self { best: times[0], median: times[times.len() / 2] }
    }
}

impl std::fmt::Display for Times {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1})", self.best, self.median)
    }
}
