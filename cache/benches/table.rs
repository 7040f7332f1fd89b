//! Time per operation of the table: `cargo bench -p afterimage-cache --bench table`. `lookups` uses
//! more keys; `bench/scripts/run.sh cache` measures the whole service.

use afterimage_cache::{Capacity, Table};
use divan::Bencher;
use divan::counter::ItemsCount;

/// Keys in the table: about 20 MB, more than a core's own caches. Few in a debug build, which
/// measures nothing.
const KEYS: u64 = if cfg!(debug_assertions) { 10_000 } else { 1_000_000 };

/// Keys of one batch.
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

/// A pseudo-random walk over the keys: a linear congruential generator of full period.
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
