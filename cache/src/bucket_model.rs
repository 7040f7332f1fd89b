//! A model of one bucket, checked by loom in every interleaving that the memory model allows:
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p afterimage-cache --lib`.

use crate::bucket::{Bucket, Insert, Read, SLOTS};
use crate::eviction::Policy;
use crate::hash::Hashed;
use loom::sync::Arc;
use loom::thread;

/// What belongs to a key: any mixture of two entries shows.
const fn value_of(key: u64) -> u64 {
    key * 100
}

fn model(preemptions: usize, check: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = std::sync::Arc::clone(&runs);
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        check();
    });
    println!("{} executions", runs.load(std::sync::atomic::Ordering::Relaxed));
}

fn assert_whole(read: Read, key: u64) {
    assert!(matches!(read, Read::Miss | Read::KeptOut) || read == Read::Hit(value_of(key)));
}

#[test]
fn a_reader_never_sees_half_of_an_entry_while_one_replaces_another() {
    model(3, || {
        let bucket = Arc::new(Bucket::new());
        for key in 1..=SLOTS as u64 {
            bucket.insert(Hashed::new(key), value_of(key), Policy::Guard);
        }
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                bucket.insert(Hashed::new(8), value_of(8), Policy::Guard);
                bucket.insert(Hashed::new(9), value_of(9), Policy::Guard);
            })
        };
        for key in [8, 1] {
            assert_whole(bucket.read(key), key);
        }
        writer.join().expect("the writer ends");
        assert_eq!(bucket.read(9), Read::Hit(value_of(9)));
        bucket.validate().expect("whole");
    });
}

#[test]
fn two_writers_and_a_reader_agree() {
    model(2, || {
        let bucket = Arc::new(Bucket::new());
        bucket.insert(Hashed::new(1), value_of(1), Policy::Guard);
        let writers = [2, 3].map(|key| {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || bucket.insert(Hashed::new(key), value_of(key), Policy::Guard))
        });
        assert_whole(bucket.read(2), 2);
        let outcomes = writers.map(|writer| writer.join().expect("the writer ends"));
        // Two slots and three keys: exactly one writer found room.
        let inserted = outcomes.iter().filter(|&&outcome| outcome == Insert::Inserted).count();
        assert_eq!(inserted, 1, "{outcomes:?}");
        assert_eq!(bucket.entries().1, SLOTS);
        bucket.validate().expect("whole");
    });
}

#[test]
fn a_value_is_the_old_or_the_new_one_and_never_goes_back() {
    model(3, || {
        let bucket = Arc::new(Bucket::new());
        bucket.insert(Hashed::new(1), 10, Policy::Guard);
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || bucket.insert(Hashed::new(1), 11, Policy::Guard))
        };
        let first = bucket.read(1);
        let second = bucket.read(1);
        for read in [first, second] {
            assert!(matches!(read, Read::Hit(10 | 11) | Read::KeptOut), "{read:?}");
        }
        assert!(!(first == Read::Hit(11) && second == Read::Hit(10)), "went back");
        writer.join().expect("the writer ends");
        assert_eq!(bucket.read(1), Read::Hit(11));
    });
}

#[test]
fn a_listing_is_of_one_moment() {
    model(2, || {
        let bucket = Arc::new(Bucket::new());
        bucket.insert(Hashed::new(1), value_of(1), Policy::Guard);
        let writer = {
            let bucket = Arc::clone(&bucket);
            thread::spawn(move || {
                bucket.remove_if(1, |_| true);
                bucket.insert(Hashed::new(2), value_of(2), Policy::Guard);
            })
        };
        let (entries, count) = bucket.entries();
        assert!(count <= 1, "1 and 2 were never there together");
        for entry in &entries[..count] {
            assert_eq!(entry.value, value_of(entry.key));
        }
        writer.join().expect("the writer ends");
    });
}
