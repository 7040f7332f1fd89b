//! A model of one bucket, checked by loom in every interleaving that the memory model allows:
//! `RUSTFLAGS="--cfg loom" CARGO_TARGET_DIR=target/loom cargo test --release -p afterimage-cache
//! --lib`.
//!
//! A line of the model holds one entry, so each line is soon full and the other one in use.

use crate::bucket::{Bucket, Insert, Lines, Read};
use crate::eviction::{LINES, Policy, SLOTS};
use crate::hash::{Hashed, Span, TAGS_SUFFICE};
use crate::line::Tops;
use loom::sync::Arc;
use loom::thread;

/// A bucket that owns its memory.
struct Owned {
    lines: Lines,
    tops: Option<[Tops; LINES]>,
}

impl Owned {
    fn new() -> Arc<Self> {
        Arc::new(Self { lines: Lines::new(), tops: None })
    }

    /// As in a table that is so small that it stores tops.
    fn small() -> Arc<Self> {
        Arc::new(Self { lines: Lines::new(), tops: Some(std::array::from_fn(|_| Tops::new(0))) })
    }

    /// The first bucket of some, which all hashes below 2^48 belong into.
    fn bucket(&self) -> Bucket<'_> {
        let span = Span { bucket: 0, buckets: TAGS_SUFFICE };
        Bucket { lines: &self.lines, tops: self.tops.as_ref(), span }
    }

    fn insert(&self, tag: u64, value: u64) -> Insert {
        self.bucket().insert(key(tag), value, Policy::Guard)
    }

    fn read(&self, tag: u64) -> Read {
        self.bucket().read(key(tag))
    }
}

/// The key with this tag; even ones are looked for in line 0 first, odd ones in line 1.
const fn key(tag: u64) -> Hashed {
    Hashed::from_parts(0, tag)
}

/// What belongs to a key: any mixture of two entries shows.
const fn value_of(tag: u64) -> u64 {
    tag * 100
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

fn assert_whole(read: Read, tag: u64) {
    assert!(matches!(read, Read::Miss | Read::KeptOut) || read == Read::Hit(value_of(tag)));
}

#[test]
fn a_reader_never_sees_half_of_an_entry_while_one_replaces_another() {
    model(3, || {
        let owned = Owned::new();
        for tag in 1..=SLOTS as u64 {
            owned.insert(tag, value_of(tag));
        }
        let writer = {
            let owned = Arc::clone(&owned);
            thread::spawn(move || {
                owned.insert(8, value_of(8));
                owned.insert(9, value_of(9));
            })
        };
        for tag in [8, 1] {
            assert_whole(owned.read(tag), tag);
        }
        writer.join().expect("the writer ends");
        assert_eq!(owned.read(9), Read::Hit(value_of(9)));
        owned.bucket().validate().expect("whole");
    });
}

#[test]
fn two_writers_and_a_reader_agree() {
    model(2, || {
        let owned = Owned::new();
        owned.insert(1, value_of(1));
        let writers = [2, 3].map(|tag| {
            let owned = Arc::clone(&owned);
            thread::spawn(move || owned.insert(tag, value_of(tag)))
        });
        assert_whole(owned.read(2), 2);
        let outcomes = writers.map(|writer| writer.join().expect("the writer ends"));
        // Two slots and three keys: exactly one writer found room.
        let inserted = outcomes.iter().filter(|&&outcome| outcome == Insert::Inserted).count();
        assert_eq!(inserted, 1, "{outcomes:?}");
        assert_eq!(owned.bucket().entries().1, SLOTS);
        owned.bucket().validate().expect("whole");
    });
}

#[test]
fn a_value_is_the_old_or_the_new_one_and_never_goes_back() {
    model(3, || {
        let owned = Owned::new();
        owned.insert(1, 10);
        let writer = {
            let owned = Arc::clone(&owned);
            thread::spawn(move || owned.insert(1, 11))
        };
        let first = owned.read(1);
        let second = owned.read(1);
        for read in [first, second] {
            assert!(matches!(read, Read::Hit(10 | 11) | Read::KeptOut), "{read:?}");
        }
        assert!(!(first == Read::Hit(11) && second == Read::Hit(10)), "went back");
        writer.join().expect("the writer ends");
        assert_eq!(owned.read(1), Read::Hit(11));
    });
}

#[test]
fn a_key_that_moves_to_its_own_line_is_never_missed() {
    model(3, || {
        let owned = Owned::new();
        // 1 is at home in line 1, 3 had to go to line 0. It was hit, so 1 has to go when 2 comes,
        // and 3 goes home to make room for 2.
        owned.insert(1, value_of(1));
        owned.insert(3, value_of(3));
        assert_eq!(owned.read(3), Read::Hit(value_of(3)));
        let writer = {
            let owned = Arc::clone(&owned);
            thread::spawn(move || owned.insert(2, value_of(2)))
        };
        let read = owned.read(3);
        assert!(matches!(read, Read::Hit(300) | Read::KeptOut), "{read:?}");
        let evicted = Insert::Evicted { key: key(1).key(), value: value_of(1) };
        assert_eq!(writer.join().expect("the writer ends"), evicted);
        assert_eq!([owned.read(2), owned.read(3)], [Read::Hit(200), Read::Hit(300)]);
        owned.bucket().validate().expect("whole");
    });
}

#[test]
fn keys_that_differ_in_their_tops_alone_are_never_taken_for_each_other() {
    model(3, || {
        let owned = Owned::small();
        let [old, new] = [1, 2].map(|top| Hashed::from_parts(top, 4));
        owned.bucket().insert(old, 10, Policy::Guard);
        let writer = {
            let owned = Arc::clone(&owned);
            thread::spawn(move || {
                owned.bucket().remove_if(old, |_| true);
                owned.bucket().insert(new, 20, Policy::Guard);
            })
        };
        let read = owned.bucket().read(new);
        assert!(matches!(read, Read::Miss | Read::Hit(20) | Read::KeptOut), "{read:?}");
        let read = owned.bucket().read(old);
        assert!(matches!(read, Read::Miss | Read::Hit(10) | Read::KeptOut), "{read:?}");
        writer.join().expect("the writer ends");
        assert_eq!([old, new].map(|key| owned.bucket().read(key)), [Read::Miss, Read::Hit(20)]);
    });
}

#[test]
fn a_listing_is_of_one_moment() {
    model(2, || {
        let owned = Owned::new();
        owned.insert(1, value_of(1));
        let writer = {
            let owned = Arc::clone(&owned);
            thread::spawn(move || {
                owned.bucket().remove_if(key(1), |_| true);
                owned.insert(2, value_of(2));
            })
        };
        let (entries, count) = owned.bucket().entries();
        assert!(count <= 1, "1 and 2 were never there together");
        for entry in &entries[..count] {
            assert_eq!(entry.value, value_of(Hashed::new(entry.key).tag()));
        }
        writer.join().expect("the writer ends");
    });
}
