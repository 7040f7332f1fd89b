//! A bucket: eight entries in two cache lines, each with a sequence lock.
//!
//! A bit of the hash chooses the line in which a key is looked up first, its *home*. A key is put
//! there while there is a vacant slot. A bit in the line's word says whether any of its keys is in
//! the other line; without it a lookup ends at the home line. So most lookups read one line of
//! memory.
//!
//! The sequence of a line is odd while a writer is inside, and each writer adds two. A reader loads
//! the sequence, the tags and a value, then the sequence again. The same even number twice proves
//! that no writer was inside in between. Every word is an atomic. So a reader that loses the race
//! has read old or new words, never undefined ones, and discards them (Boehm, "Can seqlocks get
//! along with programming language memory models?", MSPC 2012, whose fences these are). A reader
//! that finds nothing in both lines compares both sequences at the end: then there was a moment at
//! which the key was in neither line. A sequence has 32 bits. For it to repeat unnoticed, a reader
//! must lose its core within some twenty instructions while exactly 2^31 writers pass through this
//! bucket, which takes them a minute or more.
//!
//! The sequence shares its word with half of the eviction state ([`crate::layout`]). Readers mark
//! hits there by compare-and-swap while no writer is inside, so a mark always applies to the entry
//! that was read. A mark that loses against another mark is a hit that does not count. The exchange
//! continues the release sequence of the last writer, so a reader of a marked word synchronises
//! with that writer.
//!
//! A writer locks line 0 first. Only the holder of line 0 locks line 1, which therefore needs no
//! waiting. The tag in a vacant slot has no meaning, so no key is reserved.

use crate::eviction::{Half, Meta, Policy};
use crate::hash::{Hashed, Span, home_of};
use crate::layout::{LANES, LINES, ODD, SEQUENCE, SLOTS, STRIDE, place, slot};
use crate::line::{Line, Tops, lanes_with_top, set_top, top};
use crate::sync::{AtomicU64, Ordering, fence, spin_loop, yield_now};

/// Tries of a reader before it reports [`Read::KeptOut`]. A writer is inside for some tens of
/// nanoseconds. A writer that is inside during all tries has lost its core for milliseconds, which
/// is too long to wait for a cache.
const READ_TRIES: u32 = if cfg!(loom) { 2 } else { 128 };

/// Checks of a taken lock before a writer yields its core between checks.
const SPINS_BEFORE_YIELD: u32 = if cfg!(loom) { 0 } else { 128 };

/// The result of a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Hit(u64),
    Miss,
    /// Writers were inside at each try.
    KeptOut,
}

/// The result of a lookup in the home line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Near {
    Hit(u64),
    Miss,
    /// The key may be in the other line. The value is the word of the home line.
    Spilled(u64),
    /// A writer was inside.
    Busy,
}

/// An entry in a listing of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: u64,
    /// The value that was last written under the key.
    pub value: u64,
    /// The value of keeping the entry, from 0 (new, without a hit) to 5.
    pub heat: u8,
}

/// The result of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insert {
    /// The key was new, and a slot was vacant.
    Inserted,
    /// The key was in the table, with the value `old`.
    Updated {
        /// The previous value.
        old: u64,
    },
    /// The key was new, and another entry was evicted.
    Evicted {
        /// The key of the evicted entry.
        key: u64,
        /// Its value.
        value: u64,
    },
}

/// The lines of a bucket. All bytes zero is an empty one.
#[cfg_attr(not(loom), repr(C, align(128)))]
#[derive(Default)]
pub(crate) struct Lines(pub(crate) [Line; LINES]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Lines>() == 128 && align_of::<Lines>() == 128);

/// A bucket in its table, with the data that its keys are computed from. See the [module](self).
#[derive(Clone, Copy)]
pub(crate) struct Bucket<'a> {
    pub(crate) lines: &'a Lines,
    /// The tops of its entries by line, if tags do not suffice.
    pub(crate) tops: Option<&'a [Tops; LINES]>,
    pub(crate) span: Span,
}

impl<'a> Bucket<'a> {
    /// Looks a key up. Marks a hit on its entry.
    #[inline]
    pub(crate) fn read(self, hashed: Hashed) -> Read {
        // The first try is separate so that the common case is straight-line code.
        match self.read_near(hashed) {
            Near::Hit(value) => Read::Hit(value),
            Near::Miss => Read::Miss,
            Near::Spilled(_) | Near::Busy => self.read_far(hashed),
        }
    }

    #[cold]
    #[inline(never)]
    fn read_far(self, hashed: Hashed) -> Read {
        for _ in 0..READ_TRIES {
            match self.try_read(hashed) {
                Some(read) => return read,
                None => spin_loop(),
            }
        }
        Read::KeptOut
    }

    /// Looks a key up in its home line. Always inlined: the call, and the result that it passed
    /// through memory, took a fifth of a lookup.
    #[inline(always)]
    pub(crate) fn read_near(self, hashed: Hashed) -> Near {
        let line = &self.lines.0[hashed.home()];
        let before = line.word.load(Ordering::Acquire);
        if let Some(found) = self.find_in(hashed.home(), before, hashed) {
            return match found {
                Some(value) => Near::Hit(value),
                None => Near::Busy,
            };
        }
        // Orders the loads of the tags before the load of the sequence. A reader that has seen one
        // word of a writer then also sees that writer's odd sequence.
        fence(Ordering::Acquire);
        if !unchanged(before, line.word.load(Ordering::Relaxed)) {
            Near::Busy
        } else if Half::of(before).spilled() {
            Near::Spilled(before)
        } else {
            Near::Miss
        }
    }

    /// One try in both lines. `None` if a writer was inside.
    fn try_read(self, hashed: Hashed) -> Option<Read> {
        let home = match self.read_near(hashed) {
            Near::Hit(value) => return Some(Read::Hit(value)),
            Near::Miss => return Some(Read::Miss),
            Near::Spilled(home) => home,
            Near::Busy => return None,
        };
        let other = 1 - hashed.home();
        let line = &self.lines.0[other];
        let before = line.word.load(Ordering::Acquire);
        if let Some(found) = self.find_in(other, before, hashed) {
            return found.map(Read::Hit);
        }
        // As above, for both lines: the key may have moved from one to the other.
        fence(Ordering::Acquire);
        let is_whole = unchanged(home, self.lines.0[hashed.home()].word.load(Ordering::Relaxed))
            && unchanged(before, line.word.load(Ordering::Relaxed));
        is_whole.then_some(Read::Miss)
    }

    /// Looks a key up in one line, whose word was `before`, and marks a hit. `None` if the key does
    /// not seem to be there. `Some(None)` if it does, but a writer was inside.
    #[inline(always)]
    fn find_in(self, number: usize, before: u64, hashed: Hashed) -> Option<Option<u64>> {
        let line = &self.lines.0[number];
        let lane = first_lane(self.lanes_of(number, Half::of(before), hashed))?;
        let value = line.value(lane);
        // See `read_near`.
        fence(Ordering::Acquire);
        let word = line.word.load(Ordering::Relaxed);
        if !unchanged(before, word) {
            return Some(None);
        }
        let mark = Half::of(word).hit(lane);
        if mark != 0 {
            // If this fails, another reader or a writer was faster. A lost mark is not worth a
            // retry.
            let marked = word ^ mark;
            let _ = line.word.compare_exchange(word, marked, Ordering::Relaxed, Ordering::Relaxed);
        }
        Some(Some(value))
    }

    /// The lanes of a line that hold the key, one bit each. At most one, except while a writer is
    /// inside.
    #[inline(always)]
    fn lanes_of(self, number: usize, half: Half, hashed: Hashed) -> u64 {
        let lanes = self.lines.0[number].lanes_with(hashed.tag()) & half.occupied();
        match self.tops {
            Some(tops) if lanes != 0 => lanes_with_top(&tops[number], hashed, lanes),
            _ => lanes,
        }
    }

    /// Stores `value` under the key.
    pub(crate) fn insert(self, hashed: Hashed, value: u64, policy: Policy) -> Insert {
        let mut writer = self.lock();
        if let Some(slot) = writer.find(hashed) {
            let old = writer.value(slot);
            writer.set_value(slot, value);
            writer.meta.hit(slot);
            return Insert::Updated { old };
        }
        writer.add(hashed, value, policy).1
    }

    /// Stores an entry of a snapshot. An entry of the same key in the bucket is newer and stays.
    pub(crate) fn restore(
        self,
        hashed: Hashed,
        value: u64,
        heat: u8,
        policy: Policy,
    ) -> Option<Insert> {
        let mut writer = self.lock();
        if writer.find(hashed).is_some() {
            return None;
        }
        let (slot, outcome) = writer.add(hashed, value, policy);
        writer.meta.set_heat(slot, heat);
        Some(outcome)
    }

    /// Removes the entry of a key if `condition` is true of its value; returns whether it was
    /// removed.
    pub(crate) fn remove_if(self, hashed: Hashed, condition: impl FnOnce(u64) -> bool) -> bool {
        let mut writer = self.lock();
        match writer.find(hashed) {
            Some(slot) if condition(writer.value(slot)) => {
                writer.meta.empty(slot);
                writer.note_spills();
                true
            }
            _ => false,
        }
    }

    /// Removes all entries and ghosts; returns the number of entries.
    pub(crate) fn clear(self) -> u32 {
        // Skips a bucket that was never written: the system may not have allocated its page.
        if self.lines.0.iter().all(|line| line.word.load(Ordering::Acquire) == 0) {
            return 0;
        }
        let mut writer = self.lock();
        let entries = writer.meta.entries();
        writer.meta = Meta::default();
        entries
    }

    /// All entries, as they were at one moment. Waits for a writer that is inside.
    pub(crate) fn entries(self) -> ([Entry; SLOTS], usize) {
        let mut entries = [Entry { key: 0, value: 0, heat: 0 }; SLOTS];
        for _ in 0..READ_TRIES {
            let before = self.words(Ordering::Acquire);
            let count = self.copy_entries(Meta::of(before), &mut entries);
            // See `read_near`.
            fence(Ordering::Acquire);
            let after = self.words(Ordering::Relaxed);
            if before.into_iter().zip(after).all(|(before, after)| unchanged(before, after)) {
                return (entries, count);
            }
            spin_loop();
        }
        // After READ_TRIES failed reads, takes the lock, so that the listing is complete.
        let writer = self.lock();
        let count = self.copy_entries(writer.meta, &mut entries);
        (entries, count)
    }

    fn copy_entries(self, meta: Meta, entries: &mut [Entry; SLOTS]) -> usize {
        let mut count = 0;
        for slot in (0..SLOTS).filter(|&slot| meta.holds(slot)) {
            let (line, lane) = place(slot);
            entries[count] = Entry {
                key: self.hashed(slot).key(),
                value: self.lines.0[line].value(lane),
                heat: meta.heat(slot),
            };
            count += 1;
        }
        count
    }

    /// The whole hash of the key in `slot`.
    fn hashed(self, slot: usize) -> Hashed {
        let (line, lane) = place(slot);
        let tag = self.lines.0[line].tag(lane);
        match self.tops {
            Some(tops) => Hashed::from_parts(top(&tops[line], lane), tag),
            None => self.span.hash(tag),
        }
    }

    fn words(self, order: Ordering) -> [u64; LINES] {
        std::array::from_fn(|line| self.lines.0[line].word.load(order))
    }

    /// Checks the invariants of the bucket.
    pub(crate) fn validate(self) -> Result<(), &'static str> {
        let writer = self.lock();
        writer.meta.validate()?;
        let mut checked = writer.meta;
        for (line, spilled) in writer.spills().into_iter().enumerate() {
            checked.set_spilled(line, spilled);
        }
        if checked != writer.meta {
            return Err("the spill bit of a line is wrong");
        }
        let mut entries = [Entry { key: 0, value: 0, heat: 0 }; SLOTS];
        let count = self.copy_entries(writer.meta, &mut entries);
        for (at, entry) in entries[..count].iter().enumerate() {
            if entries[..at].iter().any(|other| other.key == entry.key) {
                return Err("a key is in two slots");
            }
        }
        Ok(())
    }

    /// Waits until no other writer is inside, and takes both lines.
    fn lock(self) -> Writer<'a> {
        let [first, second] = &self.lines.0;
        let mut checks = 0u32;
        loop {
            let word = load_before_lock(&first.word);
            if word & ODD == 0
                && first
                    .word
                    .compare_exchange_weak(word, word | ODD, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                let words = [word, second.word.fetch_or(ODD, Ordering::Relaxed)];
                // Orders the odd sequences before every word that this writer stores.
                fence(Ordering::Release);
                let sequences = words.map(|word| (word & SEQUENCE).wrapping_add(2 * ODD));
                return Writer { bucket: self, sequences, meta: Meta::of(words) };
            }
            if checks < SPINS_BEFORE_YIELD {
                checks += 1;
                spin_loop();
            } else {
                yield_now();
            }
        }
    }
}

/// The lane of the lowest bit, if any.
#[inline(always)]
fn first_lane(lanes: u64) -> Option<usize> {
    (lanes != 0).then(|| lanes.trailing_zeros() as usize / STRIDE)
}

/// Whether no writer was inside between two loads of a line's word.
#[inline(always)]
fn unchanged(before: u64, now: u64) -> bool {
    before & ODD == 0 && (before ^ now) & SEQUENCE == 0
}

fn load_before_lock(word: &AtomicU64) -> u64 {
    #[cfg(not(loom))]
    return word.load(Ordering::Relaxed);
    // Loom records only the last access to a word. A plain load here would replace the record of a
    // reader's load, and loom would never test that reader against the lock that follows. An
    // exchange that cannot succeed is the same load, and loom treats it as a possible write.
    #[cfg(loom)]
    match word.compare_exchange(u64::MAX, u64::MAX, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(word) | Err(word) => word,
    }
}

/// A writer inside a bucket. Its changes are published when it is dropped.
struct Writer<'a> {
    bucket: Bucket<'a>,
    /// The sequences to store at the end.
    sequences: [u64; LINES],
    /// The other half of the words to store at the end.
    meta: Meta,
}

impl Writer<'_> {
    fn find(&self, hashed: Hashed) -> Option<usize> {
        [hashed.home(), 1 - hashed.home()].into_iter().find_map(|line| {
            let half = Half::of(self.meta.half(line));
            let lane = first_lane(self.bucket.lanes_of(line, half, hashed))?;
            Some(slot(line, lane))
        })
    }

    fn value(&self, slot: usize) -> u64 {
        let (line, lane) = place(slot);
        self.bucket.lines.0[line].value(lane)
    }

    fn set_value(&mut self, slot: usize, value: u64) {
        let (line, lane) = place(slot);
        self.bucket.lines.0[line].set_value(lane, value);
    }

    fn set(&mut self, slot: usize, hashed: Hashed, value: u64) {
        let (line, lane) = place(slot);
        self.bucket.lines.0[line].set(lane, hashed.tag(), value);
        if let Some(tops) = self.bucket.tops {
            set_top(&tops[line], lane, hashed.top());
        }
    }

    /// Puts a new key into a vacant slot, or into the slot of the entry that the policy evicts.
    fn add(&mut self, hashed: Hashed, value: u64, policy: Policy) -> (usize, Insert) {
        let (mut slot, outcome) = match self.meta.vacant(hashed.home()) {
            Some(slot) => (slot, Insert::Inserted),
            None => {
                let slot = self.meta.victim(policy);
                let evicted = self.bucket.hashed(slot);
                self.meta.remember(evicted.hash());
                self.meta.empty(slot);
                (slot, Insert::Evicted { key: evicted.key(), value: self.value(slot) })
            }
        };
        if place(slot).0 != hashed.home() {
            slot = self.send_home(hashed.home(), slot).unwrap_or(slot);
        }
        self.set(slot, hashed, value);
        self.meta.fill(slot, hashed.hash(), policy);
        self.note_spills();
        (slot, outcome)
    }

    /// Moves an entry of this line whose home is the other line to the vacant slot there; returns
    /// the slot that becomes free.
    fn send_home(&mut self, line: usize, vacant: usize) -> Option<usize> {
        let from = self.strays(line).next()?;
        let (_, lane) = place(from);
        let (to_line, to_lane) = place(vacant);
        let lines = &self.bucket.lines.0;
        lines[to_line].set(to_lane, lines[line].tag(lane), lines[line].value(lane));
        if let Some(tops) = self.bucket.tops {
            set_top(&tops[to_line], to_lane, top(&tops[line], lane));
        }
        self.meta.relocate(from, vacant);
        Some(from)
    }

    /// The slots of a line whose keys have their home in the other line.
    fn strays(&self, line: usize) -> impl Iterator<Item = usize> + '_ {
        let tags = &self.bucket.lines.0[line];
        (0..LANES)
            .filter(move |&lane| home_of(tags.tag(lane)) != line)
            .map(move |lane| slot(line, lane))
            .filter(|&slot| self.meta.holds(slot))
    }

    /// For each line, whether a key of it is in the other line.
    fn spills(&self) -> [bool; LINES] {
        std::array::from_fn(|line| self.strays(1 - line).next().is_some())
    }

    /// Updates the spill bits of both lines.
    fn note_spills(&mut self) {
        for (line, spilled) in self.spills().into_iter().enumerate() {
            self.meta.set_spilled(line, spilled);
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // Line 0, which is the lock for both, is released last.
        for line in (0..LINES).rev() {
            let word = self.sequences[line] | self.meta.half(line);
            self.bucket.lines.0[line].word.store(word, Ordering::Release);
        }
    }
}

/// A model of one bucket, checked by loom in every interleaving that the memory model allows:
/// `just loom`. A line of the model holds one entry, so that both lines are soon in use.
#[cfg(all(test, loom))]
mod tests {
    use super::*;
    use crate::hash::TAGS_SUFFICE;
    use loom::sync::Arc;
    use loom::thread;

    /// A bucket that owns its memory.
    struct Owned {
        lines: Lines,
        tops: Option<[Tops; LINES]>,
    }

    impl Owned {
        fn new() -> Arc<Self> {
            Arc::new(Self { lines: Lines::default(), tops: None })
        }

        /// A bucket of a small table, which stores tops.
        fn small() -> Arc<Self> {
            Arc::new(Self {
                lines: Lines::default(),
                tops: Some(std::array::from_fn(|_| Tops::new(0))),
            })
        }

        /// The first bucket of a table: all hashes below 2^48 belong to it.
        fn bucket(&self) -> Bucket<'_> {
            let span = Span { bucket: 0, buckets: TAGS_SUFFICE };
            Bucket { lines: &self.lines, tops: self.tops.as_ref(), span }
        }

        fn insert(&self, tag: u64, value: u64) -> Insert {
            self.bucket().insert(key(tag), value, Policy::S3Fifo)
        }

        fn read(&self, tag: u64) -> Read {
            self.bucket().read(key(tag))
        }
    }

    /// The key with this tag. The home of even tags is line 0, of odd tags line 1.
    const fn key(tag: u64) -> Hashed {
        Hashed::from_parts(0, tag)
    }

    /// The value of a key. It shows any mixture of two entries.
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
    fn a_reader_sees_whole_entries_during_an_eviction() {
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
            // Two slots and three keys: exactly one writer found a vacant slot.
            let inserted = outcomes.iter().filter(|&&outcome| outcome == Insert::Inserted).count();
            assert_eq!(inserted, 1, "{outcomes:?}");
            assert_eq!(owned.bucket().entries().1, SLOTS);
            owned.bucket().validate().expect("whole");
        });
    }

    #[test]
    fn a_reader_never_sees_an_older_value_after_a_newer_one() {
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
            assert!(
                !(first == Read::Hit(11) && second == Read::Hit(10)),
                "the older value after the newer"
            );
            writer.join().expect("the writer ends");
            assert_eq!(owned.read(1), Read::Hit(11));
        });
    }

    #[test]
    fn a_key_that_moves_to_its_home_line_is_found() {
        model(3, || {
            let owned = Owned::new();
            // The home of 1 and 3 is line 1; 1 takes it, so 3 is in line 0. 3 has a hit, so 2
            // evicts 1, and 3 moves home to free line 0 for 2.
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
    fn keys_that_differ_only_in_their_tops_are_never_confused() {
        model(3, || {
            let owned = Owned::small();
            let [old, new] = [1, 2].map(|top| Hashed::from_parts(top, 4));
            owned.bucket().insert(old, 10, Policy::S3Fifo);
            let writer = {
                let owned = Arc::clone(&owned);
                thread::spawn(move || {
                    owned.bucket().remove_if(old, |_| true);
                    owned.bucket().insert(new, 20, Policy::S3Fifo);
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
    fn a_listing_shows_one_moment() {
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
            assert!(count <= 1, "1 and 2 were never in the bucket together");
            for entry in &entries[..count] {
                assert_eq!(entry.value, value_of(Hashed::new(entry.key).tag()));
            }
            writer.join().expect("the writer ends");
        });
    }
}
