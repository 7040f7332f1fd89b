//! Fuzz targets of the table and its snapshots: functions that take any bytes and panic when an
//! invariant is broken.
//!
//! `fuzz/` runs them under libFuzzer. The tests of this crate run them on a stable toolchain, with
//! seeds, regressions and seeded mutations of both. `fuzz/README.md` lists their assertions.

mod bytes_load;
mod snapshot_load;

use std::collections::HashMap;

use afterimage_cache::Hashed;
use afterimage_cache::table::{Capacity, Entry, Insert, Table};

use super::Target;
use crate::fuzz::{Rng, Seed, Source};

/// All targets of the cache.
pub const TARGETS: &[Target] = &[
    Target {
        name: "table_model",
        body: table_model,
        seeds: table_seeds,
        // Two bytes write an entry of the model, whose map may be half empty; 32 bytes look up 31
        // keys at once.
        memory_per_byte: 128,
    },
    Target {
        name: "snapshot_load",
        body: snapshot_load,
        seeds: snapshot_load::seeds,
        // The file, and the entries that the model reads from it. The base covers the buffers of
        // fixed size.
        memory_per_byte: 64,
    },
    Target {
        name: "bytes_load",
        body: bytes_load,
        seeds: bytes_load::seeds,
        // As above.
        memory_per_byte: 64,
    },
];

/// Any file as a snapshot of a byte store, as [`snapshot_load`].
pub fn bytes_load(data: &[u8]) {
    bytes_load::bytes_load(data);
}

/// Any file as a snapshot. It is loaded or refused as an independent parser of `SNAPSHOT.md` does.
/// A refused file changes nothing; after a load, each value comes from the file or from the table.
pub fn snapshot_load(data: &[u8]) {
    snapshot_load::snapshot_load(data);
}

/// Random operations on a table and on a map. Both have the same entries except the entries that
/// the table reports as evicted, and the table is valid after each operation.
///
/// Input: `u8` capacity, `u8` number of keys, then operations: each a byte, followed by its
/// arguments.
pub fn table_model(data: &[u8]) {
    let mut source = Source::new(data);
    let capacity = 1 + u64::from(source.u8() % 64);
    let table = Table::new(Capacity::Entries(capacity)).expect("a small table");
    let keys = source.u8().max(1);
    let mut pair = Pair { table, model: HashMap::new(), keys };
    while !source.is_empty() {
        pair.step(&mut source);
        pair.table.validate().expect("the table is sound after every operation");
        assert_eq!(pair.table.len(), pair.model.len() as u64);
    }
    pair.compare_all();
    let stats = pair.table.stats();
    assert!(stats.entries <= stats.capacity && stats.kept_out == 0, "{stats:?}");
}

struct Pair {
    table: Table,
    model: HashMap<u64, u64>,
    /// Number of different keys; more than the table can hold, or fewer.
    keys: u8,
}

impl Pair {
    fn key(&self, source: &mut Source<'_>) -> u64 {
        let number = u64::from(source.u8() % self.keys);
        // From both ends of the range.
        if number.is_multiple_of(2) { number } else { u64::MAX - number }
    }

    fn step(&mut self, source: &mut Source<'_>) {
        let op = source.u8();
        let key = self.key(source);
        match op % 16 {
            0..5 => self.insert(key, u64::from(op).wrapping_mul(0x0101_0101_0101_0101)),
            5 => self.insert(key, source.u64()),
            6..9 => assert_eq!(self.table.get(key), self.value(key), "get {key:#x}"),
            9 => {
                let hashed = Hashed::new(key);
                self.table.prefetch(hashed);
                assert_eq!(self.table.read(hashed), self.value(key), "read {key:#x}");
                self.table.record_lookups(1, 0);
            }
            10 => assert_eq!(self.table.remove(key), self.model.remove(&key).is_some()),
            11 => {
                let expected =
                    if source.flag() { self.value(key).unwrap_or_default() } else { source.u64() };
                let fits = self.value(key) == Some(expected);
                assert_eq!(self.table.remove_if(key, expected), fits);
                if fits {
                    self.model.remove(&key);
                }
            }
            12 => {
                let wanted: Vec<u64> = (0..source.u8() % 64).map(|_| self.key(source)).collect();
                let mut values = vec![Some(0xdead); wanted.len()];
                self.table.get_many(&wanted, &mut values);
                let expected: Vec<_> = wanted.iter().map(|&key| self.value(key)).collect();
                assert_eq!(values, expected, "get_many {wanted:x?}");
            }
            13 => {
                // As from a snapshot, with any heat.
                let entry = Entry { key, value: source.u64(), heat: source.u8() };
                match self.table.restore(entry) {
                    None => assert!(self.model.contains_key(&key), "{key:#x} was not in the table"),
                    Some(outcome) => self.inserted(key, entry.value, outcome),
                }
            }
            14 => self.compare_all(),
            _ => {
                // Rarely: little happens in an empty table.
                if key == 0 {
                    self.table.clear();
                    self.model.clear();
                }
            }
        }
    }

    fn value(&self, key: u64) -> Option<u64> {
        self.model.get(&key).copied()
    }

    fn insert(&mut self, key: u64, value: u64) {
        let outcome = self.table.insert(key, value);
        if let Insert::Updated { old } = outcome {
            assert_eq!(self.model.insert(key, value), Some(old), "update {key:#x}");
        } else {
            self.inserted(key, value, outcome);
        }
        assert_eq!(self.table.get(key), Some(value), "a written value is found");
    }

    /// A new key was inserted; another may have been evicted.
    fn inserted(&mut self, key: u64, value: u64, outcome: Insert) {
        assert_eq!(self.model.insert(key, value), None, "{key:#x} was in the table");
        match outcome {
            Insert::Inserted => {}
            Insert::Updated { old } => panic!("{key:#x} was {old:#x}, but not in the model"),
            Insert::Evicted { key: evicted, value: old } => {
                assert_ne!(evicted, key, "a new entry does not evict itself");
                assert_eq!(self.model.remove(&evicted), Some(old), "eviction of {evicted:#x}");
            }
        }
    }

    /// Compares all entries.
    fn compare_all(&self) {
        let mut listed = HashMap::new();
        for entry in self.table.entries() {
            assert_eq!(listed.insert(entry.key, entry.value), None, "{:#x} twice", entry.key);
            assert!(entry.heat <= 5, "heat {}", entry.heat);
        }
        assert_eq!(listed, self.model);
    }
}

/// Random operations on tables of several sizes.
fn table_seeds() -> Vec<Seed> {
    let mut rng = Rng(5);
    (0..24u8)
        .map(|number| {
            let mut input = vec![number * 2, 10 + 10 * number];
            input.extend((0..20 + rng.index(400)).map(|_| rng.number() as u8));
            (format!("operations_{number}"), input)
        })
        .collect()
}
