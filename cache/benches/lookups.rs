//! Lookups per second, one thread: `cargo bench -p afterimage-cache --bench lookups -- [millions of keys ...]`.
//!
//! Keys are asked for in random order, so in a large table each lookup is a miss of every cache. Each
//! answer is checked.

use afterimage_cache::{Capacity, Table};
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Different keys asked for in a pass.
const PASS: usize = 1 << 20;
/// Keys handed to `get_many` at once: about what one read from a busy connection holds.
const BATCH: usize = 256;
/// The best pass counts: whoever shares the machine can only add to the time.
const PASSES: usize = 25;

fn main() {
    let mut millions: Vec<u64> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    if millions.is_empty() {
        millions = vec![1, 50];
    }
    println!("| keys | table | what | single ns | batched ns | batched, million/s |");
    println!("|---|---|---|---|---|---|");
    for keys in millions.into_iter().map(|millions| millions * 1_000_000) {
        // A quarter more room than keys: nearly all of them find a place, and the rest are not asked for.
        let table = Table::new(Capacity::Entries(keys + keys / 4)).expect("enough memory");
        let filling = Instant::now();
        for key in 0..keys {
            table.insert(key, !key);
        }
        let filling = filling.elapsed();
        let mut rng = Rng(7);
        let mut hits = Vec::with_capacity(PASS);
        while hits.len() < PASS {
            let key = rng.next() % keys;
            if table.get(key).is_some() {
                hits.push(key);
            }
        }
        let misses: Vec<u64> = (0..PASS).map(|_| rng.next() | 1 << 63).collect();
        let megabytes = table.memory_bytes() / 1_000_000;
        for (what, wanted, hit) in [("hit", &hits, true), ("miss", &misses, false)] {
            let single = best(|| single(&table, wanted, hit));
            let batched = best(|| batched(&table, wanted, hit));
            println!(
                "| {keys} | {megabytes} MB | {what} | {:.1} | {:.1} | {:.1} |",
                per_key(single),
                per_key(batched),
                1e3 / per_key(batched),
            );
        }
        println!(
            "| {keys} | {megabytes} MB | insert, page faults included | {:.1} | | |",
            filling.as_nanos() as f64 / keys as f64
        );
    }
}

fn single(table: &Table, keys: &[u64], hit: bool) -> Duration {
    let started = Instant::now();
    for &key in keys {
        check(key, table.get(black_box(key)), hit);
    }
    started.elapsed()
}

fn batched(table: &Table, keys: &[u64], hit: bool) -> Duration {
    let mut values = [None; BATCH];
    let started = Instant::now();
    for keys in keys.chunks(BATCH) {
        let values = &mut values[..keys.len()];
        table.get_many(black_box(keys), values);
        for (&key, &value) in keys.iter().zip(&*values) {
            check(key, value, hit);
        }
    }
    started.elapsed()
}

fn check(key: u64, value: Option<u64>, hit: bool) {
    assert_eq!(value, hit.then_some(!key));
}

fn best(run: impl Fn() -> Duration) -> Duration {
    (0..PASSES).map(|_| run()).min().unwrap_or_default()
}

fn per_key(time: Duration) -> f64 {
    time.as_nanos() as f64 / PASS as f64
}

/// SplitMix64.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}
