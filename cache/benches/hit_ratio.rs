//! Hit ratios of the table and of three other caches with equal numbers of entries, on generated
//! traces: `cargo bench -p afterimage-cache --bench hit_ratio -- [SEEDS [FIRST_SEED]]` (default:
//! one seed).
//!
//! All caches get the same requests: look the key up, and insert it on a miss. The first fifth of
//! each trace fills the caches and does not count. The ratios are means over the seeds.

use afterimage_cache::{Capacity, Table};
use afterimage_wire::splitmix::SplitMix64;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Entries of each cache: 12,500 buckets of eight.
const ENTRIES: u64 = 100_000;
/// Different keys of a Zipf trace, as a multiple of the entries.
const KEYS: usize = 10 * ENTRIES as usize;

/// Hits per hundred requests: of the table, moka, quick_cache, LRU.
type Ratios = [f64; 4];

fn main() {
    // `cargo test --all-targets` runs this without `--bench`, to see that it works.
    let measured = std::env::args().any(|arg| arg == "--bench");
    let requests = if measured { 4_000_000 } else { 1000 };
    let mut args = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let seeds: u64 = args.next().unwrap_or(1).max(1);
    let first = args.next().unwrap_or(0);
    println!(
        "{ENTRIES} entries, {KEYS} keys, {requests} requests; hits per hundred requests, seeds {first} to {}\n",
        first + seeds - 1
    );
    println!("| trace | afterimage | moka | quick_cache | LRU | to the best |");
    println!("|---|---|---|---|---|---|");
    let kinds = kinds();
    let results = measure(&kinds, requests, first..first + seeds);
    for (number, kind) in kinds.iter().enumerate() {
        let of_kind: Vec<Ratios> =
            results.iter().filter(|(of, _)| *of == number).map(|&(_, ratios)| ratios).collect();
        let mean = |cache: usize| {
            of_kind.iter().map(|ratios| ratios[cache]).sum::<f64>() / of_kind.len() as f64
        };
        let means: Ratios = std::array::from_fn(mean);
        let [ours, others @ ..] = means;
        let best = others.into_iter().fold(0.0, f64::max);
        let cells: Vec<String> = means.iter().map(|ratio| format!("{ratio:.2}")).collect();
        println!("| {} | {} | {:+.2} |", kind.name, cells.join(" | "), ours - best);
    }
}

/// Runs all caches on all traces, each trace on the next free core.
fn measure(kinds: &[Kind], requests: usize, seeds: Range<u64>) -> Vec<(usize, Ratios)> {
    let next = AtomicUsize::new(0);
    let results = Mutex::new(Vec::new());
    let count = (seeds.end - seeds.start) as usize;
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let job = next.fetch_add(1, Ordering::Relaxed);
                    let (number, seed) = (job / count, seeds.start + (job % count) as u64);
                    let Some(kind) = kinds.get(number) else { break };
                    let mut rng = SplitMix64(1000 * seed + number as u64);
                    let trace: Vec<u64> =
                        (0..requests).map(|at| (kind.request)(at, &mut rng)).collect();
                    let ratios = [
                        ratio(&trace, &mut Afterimage::new()),
                        ratio(&trace, &mut Moka::new()),
                        ratio(&trace, &mut QuickCache::new()),
                        ratio(&trace, &mut Lru::new()),
                    ];
                    let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                    results.push((number, ratios));
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Hits per hundred requests after the warm-up.
fn ratio(trace: &[u64], cache: &mut dyn Cache) -> f64 {
    let (warm_up, counted) = trace.split_at(trace.len() / 5);
    for &key in warm_up {
        cache.request(key);
    }
    let hits = counted.iter().filter(|&&key| cache.request(key)).count();
    100.0 * hits as f64 / counted.len() as f64
}

/// Computes the key of a request from its number and the random generator.
type Request = Box<dyn Fn(usize, &mut SplitMix64) -> u64 + Sync>;

/// A kind of trace.
struct Kind {
    name: String,
    request: Request,
}

impl Kind {
    fn new(
        name: impl Into<String>,
        request: impl Fn(usize, &mut SplitMix64) -> u64 + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), request: Box::new(request) }
    }
}

fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for exponent in [0.8, 0.99, 1.1] {
        let zipf = Zipf::new(KEYS, exponent);
        kinds.push(Kind::new(format!("Zipf {exponent}"), move |_, rng| zipf.draw(rng)));
    }
    for exponent in [0.8, 0.99, 1.1] {
        // After each 200,000 requests a scan of 100,000 keys that occur once.
        let zipf = Zipf::new(KEYS, exponent);
        kinds.push(Kind::new(format!("Zipf {exponent} and scans"), move |at, rng| {
            if at % 300_000 < 200_000 { zipf.draw(rng) } else { 1 << 40 | at as u64 }
        }));
    }
    // A twentieth of the keys changes with each 100,000 requests.
    let zipf = Zipf::new(KEYS / 4, 0.99);
    kinds.push(Kind::new("Zipf 0.99, drifting", move |at, rng| {
        (at / 100_000) as u64 * 12_500 + zipf.draw(rng)
    }));
    // All keys change after each 500,000 requests.
    let zipf = Zipf::new(KEYS / 4, 0.99);
    kinds.push(Kind::new("Zipf 0.99, changing", move |at, rng| {
        ((at / 500_000) as u64) << 32 | zipf.draw(rng)
    }));
    // A moving, uniform working set of four fifths of the capacity, mixed with other keys.
    kinds.push(Kind::new("sliding window", |at, rng| {
        if rng.number().is_multiple_of(5) {
            (1 << 41) | (rng.number() % 10_000_000)
        } else {
            at as u64 / 10 + rng.number() % (ENTRIES * 4 / 5)
        }
    }));
    kinds.push(Kind::new("loop of 1.25 × capacity", |at, _| at as u64 % (ENTRIES * 5 / 4)));
    kinds
}

trait Cache {
    /// Looks `key` up, and inserts it on a miss. Returns whether it was a hit.
    fn request(&mut self, key: u64) -> bool;
}

struct Afterimage(Table);

impl Afterimage {
    fn new() -> Self {
        let table = Table::new(Capacity::Bytes(ENTRIES / 8 * 144)).expect("a few megabytes");
        assert_eq!(table.capacity(), ENTRIES);
        Self(table)
    }
}

impl Cache for Afterimage {
    fn request(&mut self, key: u64) -> bool {
        let value = self.0.get(key);
        if value.is_none() {
            self.0.insert(key, !key);
        }
        // Wrong answers would make the ratio worthless.
        assert!(value.is_none_or(|value| value == !key));
        value.is_some()
    }
}

struct Moka(moka::sync::Cache<u64, u64>);

impl Moka {
    fn new() -> Self {
        Self(moka::sync::Cache::new(ENTRIES))
    }
}

impl Cache for Moka {
    fn request(&mut self, key: u64) -> bool {
        let hit = self.0.get(&key).is_some();
        if !hit {
            self.0.insert(key, !key);
        }
        hit
    }
}

struct QuickCache(quick_cache::unsync::Cache<u64, u64>);

impl QuickCache {
    fn new() -> Self {
        Self(quick_cache::unsync::Cache::new(ENTRIES as usize))
    }
}

impl Cache for QuickCache {
    fn request(&mut self, key: u64) -> bool {
        let hit = self.0.get(&key).is_some();
        if !hit {
            self.0.insert(key, !key);
        }
        hit
    }
}

/// Plain LRU: a map into a doubly linked ring, in which node 0 separates the newest and the oldest.
struct Lru {
    nodes: HashMap<u64, usize>,
    keys: Vec<u64>,
    newer: Vec<usize>,
    older: Vec<usize>,
}

impl Lru {
    fn new() -> Self {
        Self { nodes: HashMap::new(), keys: vec![0], newer: vec![0], older: vec![0] }
    }

    fn unlink(&mut self, node: usize) {
        let (newer, older) = (self.newer[node], self.older[node]);
        self.older[newer] = older;
        self.newer[older] = newer;
    }

    fn link_newest(&mut self, node: usize) {
        let newest = self.older[0];
        self.older[node] = newest;
        self.newer[node] = 0;
        self.newer[newest] = node;
        self.older[0] = node;
    }
}

impl Cache for Lru {
    fn request(&mut self, key: u64) -> bool {
        if let Some(&node) = self.nodes.get(&key) {
            self.unlink(node);
            self.link_newest(node);
            return true;
        }
        let node = if self.nodes.len() as u64 == ENTRIES {
            let oldest = self.newer[0];
            self.unlink(oldest);
            self.nodes.remove(&self.keys[oldest]);
            self.keys[oldest] = key;
            oldest
        } else {
            self.keys.push(key);
            self.newer.push(0);
            self.older.push(0);
            self.keys.len() - 1
        };
        self.nodes.insert(key, node);
        self.link_newest(node);
        false
    }
}

/// Ranks with probabilities proportional to `1 / rank^exponent`. Rank 0 is the most likely.
struct Zipf(Vec<f64>);

impl Zipf {
    fn new(keys: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let cumulative = (1..=keys).map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        });
        Self(cumulative.collect())
    }

    fn draw(&self, rng: &mut SplitMix64) -> u64 {
        let total = self.0.last().copied().unwrap_or_default();
        let point = (rng.number() >> 11) as f64 / (1u64 << 53) as f64 * total;
        self.0.partition_point(|&sum| sum <= point) as u64
    }
}
