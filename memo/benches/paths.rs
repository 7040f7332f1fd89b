//! The steps of a memo for each image, one by one: `cargo bench -p afterimage-memo --bench paths`.

use std::hint::black_box;
use std::sync::Arc;

use afterimage_core::ModelId;
use afterimage_memo::Secret;
use afterimage_memo::flights::{Flights, Join};
use afterimage_memo::key::KeySpace;
use afterimage_wire::proto::Shape;
use divan::Bencher;

fn main() {
    divan::main();
}

fn keys() -> KeySpace {
    let shape = Shape::new(&[28, 28]).expect("two dimensions are allowed");
    let model = ModelId::labels([7; 32], Some(shape), 10);
    KeySpace::new(&Secret::new([5; 32]), Arc::new(model), 0).expect("a complete model")
}

/// The keyed 128-bit hash of an image of 784 bytes.
#[divan::bench]
fn key_hash(bencher: Bencher<'_, '_>) {
    let (keys, image) = (keys(), [9; 784]);
    bencher.bench_local(|| keys.hash(black_box(&image)));
}

/// Checking that a stored value was made for this image.
#[divan::bench]
fn open_a_seal(bencher: Bencher<'_, '_>) {
    let keys = keys();
    let hash = keys.hash(&[9; 784]);
    let value = keys.seal(hash, 7);
    bencher.bench_local(|| {
        assert_eq!(keys.open(black_box(hash), black_box(value)), Some(7));
    });
}

/// One flight: the first waiter, `joining` further waiters, and the completion. The table holds
/// `OTHERS` other flights.
#[divan::bench(args = [0, 1, 10], consts = [0, 10_000])]
fn flight<const OTHERS: u128>(bencher: Bencher<'_, '_>, joining: u64) {
    let flights = Flights::new(1 << 20);
    for key in 0..OTHERS {
        if let Join::First(permit) = flights.join(key << 64 | key, 0) {
            permit.transfer();
        }
    }
    // Far from the other keys, even after many increments.
    let mut key = 1 << 127;
    bencher.bench_local(|| {
        key += 1;
        let Join::First(permit) = flights.join(key, 0) else { panic!("a new key") };
        for waiter in 1..=joining {
            assert!(matches!(flights.join(key, waiter), Join::Joined));
        }
        flights.complete(permit.transfer())
    });
}
