//! The promises of the table, through its public interface.

use afterimage_cache::{Capacity, Hashed, Insert, Table, TableError};
use afterimage_wire::splitmix::SplitMix64;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

/// A smaller number under Miri, which is about a thousand times slower.
const fn sized(normal: u64, miri: u64) -> u64 {
    if cfg!(miri) { miri } else { normal }
}

/// A table with this many slots, rounded up to whole buckets. It stores whole keys.
fn table(slots: u64) -> Table {
    assert!(slots < 1 << 19, "{slots}");
    Table::new(Capacity::Bytes(slots.div_ceil(8) * 144)).expect("a small table")
}

/// Ends the threads of a test when the test ends, also by a failure.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn any_key_and_any_value_can_be_stored() {
    let table = table(100);
    let odd = [0, 1, u64::MAX, u64::MAX - 1, 1 << 63, i64::MAX as u64];
    for key in odd {
        assert_eq!(table.get(key), None, "{key:#x} before it was written");
        for value in odd {
            table.insert(key, value);
            assert_eq!(table.get(key), Some(value), "{key:#x}");
        }
        table.validate().unwrap();
    }
    assert_eq!(table.len(), odd.len() as u64);
    for key in odd {
        assert!(table.remove(key));
        assert_eq!(table.get(key), None, "{key:#x} after it was removed");
        assert!(!table.remove(key));
    }
    assert_eq!(table.len(), 0);
    table.validate().unwrap();
}

#[test]
fn random_operations_agree_with_a_hash_map() {
    for seed in 0..sized(60, 2) {
        println!("seed {seed}");
        let mut rng = SplitMix64(seed);
        // From one bucket to eight, with more keys than slots.
        let table = table(1 + rng.below(60));
        let keys = 1 + rng.below(150);
        // Keys from both ends of the range.
        let key = |n: u64| if n.is_multiple_of(2) { n } else { u64::MAX - n };
        let mut model = HashMap::new();
        for _ in 0..sized(1500, 150) {
            let k = key(rng.below(keys));
            match rng.below(100) {
                0..45 => {
                    let v = rng.number();
                    match table.insert(k, v) {
                        Insert::Inserted => assert_eq!(model.insert(k, v), None),
                        Insert::Updated { old } => assert_eq!(model.insert(k, v), Some(old)),
                        Insert::Evicted { key, value } => {
                            assert_eq!(model.insert(k, v), None);
                            assert_eq!(model.remove(&key), Some(value));
                        }
                    }
                    assert_eq!(table.get(k), Some(v));
                }
                45..80 => assert_eq!(table.get(k), model.get(&k).copied()),
                80..90 => assert_eq!(table.remove(k), model.remove(&k).is_some()),
                90..95 => {
                    let expected = if rng.below(2) == 0 {
                        rng.number()
                    } else {
                        model.get(&k).copied().unwrap_or(3)
                    };
                    let matches = model.get(&k) == Some(&expected);
                    assert_eq!(table.remove_if(k, expected), matches);
                    if matches {
                        model.remove(&k);
                    }
                }
                95..99 => {
                    let wanted: Vec<u64> =
                        (0..rng.below(100)).map(|_| key(rng.below(keys))).collect();
                    let mut values = vec![Some(1); wanted.len()];
                    table.get_many(&wanted, &mut values);
                    for (k, v) in wanted.iter().zip(values) {
                        assert_eq!(v, model.get(k).copied());
                    }
                }
                _ => {
                    table.clear();
                    model.clear();
                }
            }
            table.validate().unwrap();
            assert_eq!(table.len(), model.len() as u64);
        }
        let listed: HashMap<u64, u64> = table.entries().map(|e| (e.key, e.value)).collect();
        assert_eq!(table.entries().count(), model.len(), "an entry was listed twice");
        assert_eq!(listed, model);
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn a_table_that_stores_only_tags_agrees_with_a_hash_map() {
    // One bucket more than the least such table: the number is not a power of two.
    let table = Table::new(Capacity::Bytes((8 << 20) + 128)).unwrap();
    let mut rng = SplitMix64(1);
    let mut model = HashMap::new();
    for round in 0..400_000 {
        let (key, value) = (rng.below(1_000_000).wrapping_mul(0x5851_f42d_4c95_7f2d), rng.number());
        match table.insert(key, value) {
            Insert::Inserted => assert_eq!(model.insert(key, value), None),
            Insert::Updated { old } => assert_eq!(model.insert(key, value), Some(old)),
            Insert::Evicted { key: gone, value: old } => {
                assert_eq!(model.insert(key, value), None);
                assert_eq!(model.remove(&gone), Some(old));
            }
        }
        if round % 16 == 0 {
            let key = rng.below(1_000_000).wrapping_mul(0x5851_f42d_4c95_7f2d);
            assert_eq!(table.remove(key), model.remove(&key).is_some());
        }
    }
    assert!(table.stats().evictions > 0);
    table.validate().unwrap();
    let keys: Vec<u64> = model.keys().copied().collect();
    let mut values = vec![None; keys.len()];
    table.get_many(&keys, &mut values);
    assert!(keys.iter().zip(values).all(|(key, value)| value == model.get(key).copied()));
    let listed: HashMap<u64, u64> = table.entries().map(|e| (e.key, e.value)).collect();
    assert_eq!(listed, model);
}

#[test]
fn counts_hits_misses_writes_and_evictions() {
    let table = table(8);
    assert_eq!(table.capacity(), 8);
    assert_eq!(table.memory_bytes(), 144);
    for key in 0..10 {
        table.insert(key, key);
    }
    table.insert(9, 1);
    let mut values = [None; 3];
    table.get_many(&[9, 100, 101], &mut values);
    table.get(9);
    table.get(102);
    table.read(Hashed::new(9));
    table.record_lookups(1, 0);
    let stats = table.stats();
    assert_eq!(
        (stats.entries, stats.capacity, stats.bytes, stats.writes, stats.evictions),
        (8, 8, 144, 11, 2)
    );
    assert_eq!((stats.hits, stats.misses, stats.kept_out), (3, 3, 0));
}

#[test]
fn entries_are_rounded_up_and_bytes_down_to_buckets() {
    for (capacity, entries) in [
        (Capacity::Entries(1), 8),
        (Capacity::Entries(7), 8),
        (Capacity::Entries(8), 16),
        (Capacity::Entries(64), 72),
        (Capacity::Entries(65), 80),
        (Capacity::Entries(10_000_000), 11_250_000),
        (Capacity::Bytes(144), 8),
        (Capacity::Bytes(287), 8),
        (Capacity::Bytes(288), 16),
        (Capacity::Bytes((8 << 20) - 1), 58_254 * 8),
        (Capacity::Bytes(8 << 20), 65_536 * 8),
        (Capacity::Bytes((8 << 20) + 127), 65_536 * 8),
    ] {
        assert_eq!(Table::new(capacity).unwrap().capacity(), entries, "{capacity:?}");
    }
}

#[test]
fn an_impossible_capacity_is_a_clear_error() {
    for capacity in [Capacity::Entries(0), Capacity::Bytes(0), Capacity::Bytes(143)] {
        let error = Table::new(capacity).unwrap_err();
        assert!(matches!(error, TableError::TooSmall { .. }), "{capacity:?}: {error}");
    }
    for capacity in [
        Capacity::Entries(u64::MAX),
        Capacity::Bytes(u64::MAX),
        Capacity::Entries(1 << 60),
        Capacity::Bytes(1 << 63),
    ] {
        let error = Table::new(capacity).unwrap_err();
        assert!(matches!(error, TableError::TooLarge { .. }), "{capacity:?}: {error}");
    }
    // Within the address space, but more than the memory. Miri knows no such limit.
    if !cfg!(miri) {
        for capacity in [Capacity::Entries(1 << 45), Capacity::Bytes(1 << 50)] {
            let error = Table::new(capacity).unwrap_err();
            assert!(matches!(error, TableError::TooLarge { .. }), "{capacity:?}: {error}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn a_full_table_takes_less_than_twenty_bytes_an_entry() {
    let table = table(100_000);
    for key in 0..10 * table.capacity() {
        table.insert(key, key);
    }
    let per_entry = table.memory_bytes() as f64 / table.len() as f64;
    assert!(per_entry < 20.0, "{per_entry}");
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn nine_in_ten_keys_stay_in_a_table_for_that_many() {
    const ENTRIES: u64 = 1_000_000;
    let table = Table::new(Capacity::Entries(ENTRIES)).unwrap();
    for key in 0..ENTRIES {
        table.insert(key, key);
    }
    // A bucket of eight that 7.1 keys come to by chance keeps 90.3 % of them.
    let share = table.len() as f64 / ENTRIES as f64;
    assert!((0.90..0.907).contains(&share), "{share}");
    let per_entry = table.memory_bytes() as f64 / table.len() as f64;
    assert!(per_entry < 20.0, "{per_entry}");
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn eviction_prefers_the_cold() {
    let table = table(70_000);
    let hot = table.capacity() / 4;
    for key in 0..hot {
        table.insert(key, key);
        table.get(key);
    }
    // Each cold key comes once; hot keys are looked up now and then.
    for cold in 0..5 * table.capacity() {
        table.insert(1 << 32 | cold, 0);
        let key = cold % hot;
        if table.get(key).is_none() {
            table.insert(key, key);
        }
    }
    let kept = (0..hot).filter(|&key| table.get(key).is_some()).count();
    assert!(kept as f64 > 0.97 * hot as f64, "{kept} of {hot} hot keys were kept");
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn a_scan_does_not_evict_the_working_set() {
    let table = table(70_000);
    let working_set = table.capacity() / 2;
    for _ in 0..3 {
        for key in 0..working_set {
            if table.get(key).is_none() {
                table.insert(key, key);
            }
        }
    }
    // Ten times the capacity, each key once, without lookups of the working set.
    for key in 0..10 * table.capacity() {
        table.insert(1 << 40 | key, 0);
    }
    let kept = (0..working_set).filter(|&key| table.get(key).is_some()).count();
    assert!(kept as f64 > 0.90 * working_set as f64, "{kept} of {working_set} were kept");
}

#[test]
#[cfg_attr(miri, ignore = "needs large numbers")]
fn a_table_follows_a_moving_working_set() {
    let table = table(20_000);
    let mut rng = SplitMix64(1);
    let (window, requests) = (table.capacity() * 4 / 5, 40 * table.capacity());
    let mut hits_of_last_quarter = 0;
    for at in 0..requests {
        // Each key is looked up about ten times, so nine in ten requests can be hits.
        let key = at / 10 + rng.number() % window;
        if table.get(key).is_none() {
            table.insert(key, key);
        } else if at >= requests * 3 / 4 {
            hits_of_last_quarter += 1;
        }
    }
    let ratio = hits_of_last_quarter as f64 / (requests / 4) as f64;
    // With S3-FIFO alone the ratio is 0.75.
    assert!(ratio > 0.80, "{ratio} of the last quarter were hits");
}

#[test]
fn a_value_was_always_written_under_the_same_key() {
    // A value mixes its key and a generation, and so shows any mixture of two entries.
    const SALT: u64 = 0x5851_f42d_4c95_7f2d;
    let seal = |key: u64, generation: u64| (key << 32 | generation).wrapping_mul(SALT);
    let inverse = (0..6).fold(SALT, |x, _| x.wrapping_mul(2u64.wrapping_sub(SALT.wrapping_mul(x))));
    let opens = |key: u64, value: u64| value.wrapping_mul(inverse) >> 32 == key;

    let table = table(sized(35, 8));
    let keys = sized(80, 12);
    let rounds = sized(400_000, 60);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let ending = Ending(&done);
        let writers: Vec<_> = (0..2)
            .map(|writer| {
                let table = &table;
                scope.spawn(move || {
                    let mut rng = SplitMix64(writer);
                    for round in 0..rounds {
                        let key = rng.below(keys);
                        match rng.below(8) {
                            0 => drop(table.remove(key)),
                            1 => drop(table.remove_if(key, seal(key, round))),
                            _ => match table.insert(key, seal(key, round & 0xffff)) {
                                Insert::Updated { old } => assert!(opens(key, old)),
                                Insert::Evicted { key, value } => assert!(opens(key, value)),
                                Insert::Inserted => {}
                            },
                        }
                    }
                })
            })
            .collect();
        for reader in 0..2 {
            let (table, done) = (&table, &done);
            scope.spawn(move || {
                let mut rng = SplitMix64(100 + reader);
                let mut hits = 0u64;
                while !done.load(Ordering::Relaxed) {
                    let key = rng.below(keys);
                    if let Some(value) = table.get(key) {
                        assert!(opens(key, value), "key {key} read {value:#x}");
                        hits += 1;
                    }
                    let wanted: [u64; 5] = std::array::from_fn(|_| rng.below(keys));
                    let mut values = [None; 5];
                    table.get_many(&wanted, &mut values);
                    for (key, value) in wanted.into_iter().zip(values) {
                        assert!(value.is_none_or(|value| opens(key, value)));
                    }
                    for entry in table.entries() {
                        assert!(opens(entry.key, entry.value), "{entry:?} listed");
                    }
                    if cfg!(miri) {
                        thread::yield_now();
                    }
                }
                println!("reader {reader}: {hits} single hits");
            });
        }
        let started = Instant::now();
        for writer in writers {
            writer.join().unwrap();
        }
        drop(ending);
        println!("writers took {:?}", started.elapsed());
    });
    table.validate().unwrap();
    println!("{:?}", table.stats());
}

#[test]
fn an_untouched_entry_is_in_every_listing_of_a_busy_bucket() {
    // One bucket, of which a thread changes one entry without pause. The others must be in every
    // listing.
    let table = table(8);
    for key in 0..8 {
        table.insert(key, key);
    }
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _ending = Ending(&done);
        scope.spawn(|| {
            let mut value = 0;
            while !done.load(Ordering::Relaxed) {
                table.insert(7, value);
                value += 1;
            }
        });
        let listings = (0..sized(20_000, 20))
            .map(|_| table.entries().map(|entry| entry.key).collect::<Vec<u64>>());
        let wrong = listings.into_iter().find(|listed| !(0..8).all(|key| listed.contains(&key)));
        assert_eq!(wrong, None);
    });
}
