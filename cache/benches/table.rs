//! The table's operations one by one: `cargo bench -p afterimage-cache --bench table`. `lookups`
//! measures more keys, `bench/scripts/cache.sh` the whole service.

use afterimage_cache::{Capacity, Table};
use divan::Bencher;
use divan::counter::ItemsCount;

/// Keys in the table: some 20 MB, more than a core's own caches hold. Few in a debug build, which
/// measures nothing.
const KEYS: u64 = if cfg!(debug_assertions) { 10_000 } else { 1_000_000 };

/// Keys that are looked up at once.
const BATCH: u64 = 256;

fn main() {
    divan::main();
}

fn table() -> Table {
    let table = Table::new(Capacity::Entries(2 * KEYS)).expect("enough memory");
    for key in 0..KEYS {
        table.insert(key, !key);
    }
    table
}

/// A walk over the keys in no order: an odd multiplier has a period of all 64-bit numbers.
fn scattered(step: &mut u64) -> u64 {
    *step = step.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*step >> 33) % KEYS
}

#[divan::bench]
fn hit(bencher: Bencher<'_, '_>) {
    let (table, mut step) = (table(), 1);
    bencher.bench_local(|| table.get(scattered(&mut step)));
}

#[divan::bench]
fn miss(bencher: Bencher<'_, '_>) {
    let (table, mut step) = (table(), 1);
    bencher.bench_local(|| table.get(scattered(&mut step) | 1 << 63));
}

#[divan::bench]
fn batch_of_hits(bencher: Bencher<'_, '_>) {
    let (table, mut step) = (table(), 1);
    let (mut keys, mut values) = ([0; BATCH as usize], [None; BATCH as usize]);
    bencher.counter(ItemsCount::new(BATCH)).bench_local(move || {
        keys.fill_with(|| scattered(&mut step));
        table.get_many(&keys, &mut values);
        values[0]
    });
}

#[divan::bench]
fn overwrite(bencher: Bencher<'_, '_>) {
    let (table, mut step) = (table(), 1);
    bencher.bench_local(|| table.insert(scattered(&mut step), 5));
}
