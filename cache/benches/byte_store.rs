//! Time and memory per entry of the byte store, and its hit ratio by bytes beside moka and LRU:
//! `cargo bench -p afterimage-cache --bench byte_store`.
//!
//! 1. A million values of 256 bytes. "Hot" looks up a thousand of them again and again, "cold" all
//!    of them in random order. Each lookup checks the length of the value. The time is wall time on
//!    one thread, the best of five rounds.
//! 2. The overhead is the growth of resident memory per entry, beyond the bytes of its value. It is
//!    measured first: later stores would use memory that an earlier one has freed.
//! 3. A Zipf trace of inputs whose answers have 64 bytes to 1 MiB, with even logarithms. Each cache
//!    holds a tenth of the bytes of all answers. Only requests after the first fifth count. On the
//!    drifting trace the popular inputs change: every 50 requests each rank moves to the next one.
//! 4. A snapshot of the million values, written and loaded.

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::time::Instant;

use afterimage_cache::byte_store::ENTRY_OVERHEAD_BYTES;
use afterimage_cache::{ByteStore, SnapshotFile};
use afterimage_testkit::memory::resident_bytes;
use afterimage_wire::splitmix::SplitMix64;
use bytes::Bytes;

const VALUE_BYTES: usize = 256;
const ROUNDS: usize = 5;

/// Aims: nanoseconds of a hot and a cold hit, and bytes of overhead.
const AIMS: [f64; 3] = [80.0, 600.0, 130.0];

fn main() {
    // `cargo test --all-targets` runs this without `--bench`, to see that it works.
    let measured = std::env::args().any(|arg| arg == "--bench");
    let (entries, keys, requests) =
        if measured { (1_000_000, 100_000, 2_000_000) } else { (2000, 500, 2000) };
    println!("| 256-byte values | measured | aim | met |");
    println!("|---|---|---|---|");
    let (store, overhead) = fill(entries);
    let [hot, cold] = lookups(&store, entries);
    let rows = [("hot hit, ns", hot), ("cold hit, ns", cold), ("overhead, bytes", overhead)];
    for ((name, value), aim) in rows.into_iter().zip(AIMS) {
        let met = if value <= aim { "yes" } else { "no" };
        println!("| {name} | {value:.0} | {aim} | {met} |");
    }
    snapshot(&store);
    drop(store);
    println!("\n| Zipf | hits by bytes, % | byte store | moka | LRU |");
    println!("|---|---|---|---|---|");
    for (exponent, drifts) in [(0.8, false), (0.99, false), (1.1, false), (0.8, true), (0.99, true)]
    {
        let trace = Trace::new(keys, requests, exponent, drifts);
        let capacity = trace.total_bytes() / 10;
        let ratios = [
            trace.ratios(&mut Ours(ByteStore::new(capacity, usize::MAX))),
            trace.ratios(&mut Moka::new(capacity)),
            trace.ratios(&mut Lru::new(capacity)),
        ];
        for (name, of) in [("bytes", 1), ("requests", 0)] {
            let [ours, moka, lru] = ratios.map(|ratio| ratio[of]);
            let drifting = if drifts { ", drifting" } else { "" };
            println!("| {exponent}{drifting} | of {name} | {ours:.2} | {moka:.2} | {lru:.2} |");
        }
    }
}

fn key(number: usize) -> u128 {
    let mut random = SplitMix64(number as u64);
    u128::from(random.number()) << 64 | u128::from(random.number())
}

/// A store with this many entries, and the resident bytes of each beyond its value.
fn fill(entries: usize) -> (ByteStore, f64) {
    // Shards fill unevenly: with half more than needed, nothing is evicted.
    let capacity = (entries * (VALUE_BYTES + ENTRY_OVERHEAD_BYTES) * 3 / 2) as u64;
    let before = resident_bytes();
    // The limit of a value as in a service: it determines the shards.
    let (store, now) = (ByteStore::new(capacity, 1 << 16), Instant::now());
    for number in 0..entries {
        let value = Bytes::from(vec![number as u8; VALUE_BYTES]);
        store.insert(key(number), value, None, now);
    }
    let held = store.stats().entries;
    assert_eq!(held, entries as u64, "all entries fit");
    let bytes = resident_bytes().saturating_sub(before) as f64;
    let overhead = bytes / held as f64 - VALUE_BYTES as f64;
    (store, overhead)
}

/// Nanoseconds of a hit, for keys that are used again and again, and for all in random order.
fn lookups(store: &ByteStore, entries: usize) -> [f64; 2] {
    let mut random = SplitMix64(1);
    let hot: Vec<u128> = (0..entries).map(|i| key(i % (entries / 1000).max(1000))).collect();
    let any = |_| key(random.number() as usize % entries);
    let cold: Vec<u128> = (0..entries).map(any).collect();
    [hot, cold].map(|keys| {
        let rounds = (0..ROUNDS).map(|_| {
            let now = Instant::now();
            for &key in &keys {
                let stored = store.get(key, now).expect("all entries are stored");
                assert_eq!(black_box(stored).value.len(), VALUE_BYTES);
            }
            now.elapsed().as_nanos() as f64 / keys.len() as f64
        });
        rounds.fold(f64::INFINITY, f64::min)
    })
}

fn snapshot(store: &ByteStore) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = SnapshotFile::open_bytes(directory.path().join("bytes")).expect("a new file");
    let written = file.write(store).expect("enough disk");
    let stats = store.stats();
    let restored = ByteStore::new(stats.capacity_bytes, 1 << 16);
    let loaded = file.load(&restored).expect("a whole snapshot");
    assert_eq!(loaded.restored, stats.entries);
    println!(
        "\nsnapshot of {} MB: written in {:.2?}, loaded in {:.2?}",
        written.bytes / 1_000_000,
        written.elapsed,
        loaded.elapsed
    );
}

/// Requests, and the length of the answer to each key.
struct Trace {
    requests: Vec<usize>,
    sizes: Vec<usize>,
}

impl Trace {
    fn new(keys: usize, requests: usize, exponent: f64, drifts: bool) -> Self {
        let mut random = SplitMix64(7);
        let sizes = (0..keys).map(|_| (64.0 * 16_384_f64.powf(random.share())) as usize).collect();
        let mut sum = 0.0;
        let weights = (1..=keys).map(|rank| {
            sum += (rank as f64).powf(-exponent);
            sum
        });
        let weights: Vec<f64> = weights.collect();
        let draw = |i: usize| {
            let at = random.share() * sum;
            let rank = weights.partition_point(|&weight| weight < at).min(keys - 1);
            if drifts { (rank + i / 50) % keys } else { rank }
        };
        Trace { requests: (0..requests).map(draw).collect(), sizes }
    }

    fn total_bytes(&self) -> u64 {
        self.sizes.iter().map(|&size| size as u64).sum()
    }

    /// Hits per hundred requests, and bytes of hits per hundred bytes, after the first fifth.
    fn ratios(&self, cache: &mut impl Cache) -> [f64; 2] {
        let (mut hits, mut all) = ([0; 2], [0; 2]);
        for (i, &request) in self.requests.iter().enumerate() {
            let size = self.sizes[request];
            let found = cache.get(request);
            if !found {
                cache.insert(request, size);
            }
            if i < self.requests.len() / 5 {
                continue;
            }
            for (j, weight) in [1, size as u64].into_iter().enumerate() {
                all[j] += weight;
                hits[j] += if found { weight } else { 0 };
            }
        }
        std::array::from_fn(|i| 100.0 * hits[i] as f64 / all[i] as f64)
    }
}

/// A cache bounded by bytes. Each counts [`ENTRY_OVERHEAD_BYTES`] per entry.
trait Cache {
    fn get(&mut self, key: usize) -> bool;
    fn insert(&mut self, key: usize, size: usize);
}

struct Ours(ByteStore);

impl Cache for Ours {
    fn get(&mut self, number: usize) -> bool {
        self.0.get(key(number), Instant::now()).is_some()
    }

    fn insert(&mut self, number: usize, size: usize) {
        self.0.insert(key(number), vec![0; size].into(), None, Instant::now());
    }
}

/// Only sizes are stored: the hit ratio does not depend on the bytes.
struct Moka(moka::sync::Cache<u128, usize>);

impl Moka {
    fn new(capacity: u64) -> Self {
        let weigher = |_: &u128, &size: &usize| (size + ENTRY_OVERHEAD_BYTES) as u32;
        Moka(moka::sync::Cache::builder().weigher(weigher).max_capacity(capacity).build())
    }
}

impl Cache for Moka {
    fn get(&mut self, number: usize) -> bool {
        self.0.get(&key(number)).is_some()
    }

    fn insert(&mut self, number: usize, size: usize) {
        self.0.insert(key(number), size);
        // Eviction is deferred otherwise, and the bound would not hold.
        self.0.run_pending_tasks();
    }
}

struct Lru {
    capacity: usize,
    bytes: usize,
    time: u64,
    /// Sizes and times of the last use, by key.
    entries: HashMap<usize, (usize, u64)>,
    /// Keys by the time of their last use.
    order: BTreeMap<u64, usize>,
}

impl Lru {
    fn new(capacity: u64) -> Self {
        Lru {
            capacity: capacity as usize,
            bytes: 0,
            time: 0,
            entries: HashMap::new(),
            order: BTreeMap::new(),
        }
    }
}

impl Cache for Lru {
    fn get(&mut self, key: usize) -> bool {
        self.time += 1;
        let Some((_, used)) = self.entries.get_mut(&key) else { return false };
        self.order.remove(used);
        *used = self.time;
        self.order.insert(self.time, key);
        true
    }

    fn insert(&mut self, key: usize, size: usize) {
        let size = size + ENTRY_OVERHEAD_BYTES;
        while self.bytes + size > self.capacity
            && let Some((_, oldest)) = self.order.pop_first()
        {
            let (size, _) = self.entries.remove(&oldest).expect("every key in order has an entry");
            self.bytes -= size;
        }
        self.time += 1;
        self.bytes += size;
        self.entries.insert(key, (size, self.time));
        self.order.insert(self.time, key);
    }
}
