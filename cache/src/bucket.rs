//! One bucket: eight entries in two cache lines, each behind a sequence lock of its own.
//!
//! ```text
//! line 0   word | tags 0 to 3 | value 0 | value 1 | value 2 | value 3
//! line 1   word | tags 4 to 7 | value 4 | value 5 | value 6 | value 7
//! ```
//!
//! A bit of the hash says in which line a key is looked for first, its *home*. There it is put
//! while there is room, and as long as none of its keys had to go to the other line (which a bit of
//! the word tells) nobody looks there. So a lookup mostly takes one line from memory.
//!
//! A line's sequence is odd while a writer is inside and grows by two with each writer. A reader
//! takes it, reads what it needs, and takes it again: the same even number
//! twice means that no writer was inside between the two. Every word is an atomic, so a reader that
//! loses that race has read old or new words, never undefined ones, and throws them away (Boehm,
//! "Can seqlocks get along with programming language memory models?", MSPC 2012, whose fences these
//! are). Whoever has looked into both lines and found nothing looks at both sequences at the end:
//! then there was a moment at which the key was in neither. A sequence has 32 bits: a reader would
//! have to lose its core in the middle of some twenty instructions, and while it is away 2^31
//! writers, not one more or less, would have to pass through this one bucket, which takes them a
//! minute or more.
//!
//! The sequence shares its word with the line's half of the eviction state. Readers mark hits
//! there, at any time but while a writer is inside, by compare-and-swap: so a mark is for the very
//! entry that was read. A mark lost to another one is a hit not counted. Such an exchange continues
//! the release sequence of the writer before, so who reads a marked word has synchronised with that
//! writer all the same.
//!
//! Line 0 is locked first; line 1, which only the holder of line 0 locks, needs no waiting. A tag
//! that stands in a vacant slot means nothing, so no key is reserved.

use crate::eviction::{Half, LINES, Meta, Policy, SLOTS, STRIDE, place, slot};
use crate::hash::{Hashed, Span, home_of};
use crate::line::{LANES, Line, Tops, lanes_with_top, set_top, top};
use crate::sync::{AtomicU64, Ordering, fence, spin_loop, yield_now};

/// How often a reader starts over before it reports that it was kept out. A writer is inside for
/// some tens of nanoseconds; one that has been inside for all of this has lost its core, and will
/// be back in milliseconds, which is longer than whoever asks a cache wants to wait.
const READ_TRIES: u32 = if cfg!(loom) { 2 } else { 128 };

/// How often a writer looks at a taken lock before it offers its core to others between looks.
const SPINS_BEFORE_YIELD: u32 = if cfg!(loom) { 0 } else { 128 };

/// The lowest bit of the sequence in a line's word, and set while a writer is inside.
const ODD: u64 = 1 << 32;
/// The sequence's bits.
const SEQUENCE: u64 = !(ODD - 1);

/// What a reader found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Hit(u64),
    Miss,
    /// Writers were inside at each try.
    KeptOut,
}

/// What a reader found that looked into one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Near {
    Hit(u64),
    Miss,
    /// It may stand in the other line; the home line's word was this.
    Spilled(u64),
    /// A writer was inside.
    Busy,
}

/// An entry as a scan of the table finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: u64,
    /// The value last written under the key.
    pub value: u64,
    /// How much the entry is worth keeping: 0 (new and never hit) to 5.
    pub heat: u8,
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Insert {
    /// The key was not there; there was room.
    Inserted,
    /// The key was there, with the value `old`.
    Updated {
        /// The value until now.
        old: u64,
    },
    /// The key was not there; another entry had to go.
    Evicted {
        /// The key of the entry that went.
        key: u64,
        /// Its value.
        value: u64,
    },
}

/// The lines of a bucket. All bytes zero is an empty one.
#[cfg_attr(not(loom), repr(C, align(128)))]
pub(crate) struct Lines(pub(crate) [Line; LINES]);

#[cfg(not(loom))]
const _: () = assert!(size_of::<Lines>() == 128 && align_of::<Lines>() == 128);

/// A bucket where it stands: with what it takes to tell its keys. See the [module](self).
#[derive(Clone, Copy)]
pub(crate) struct Bucket<'a> {
    pub(crate) lines: &'a Lines,
    /// The tops of its entries, line by line, if tags do not suffice.
    pub(crate) tops: Option<&'a [Tops; LINES]>,
    pub(crate) span: Span,
}

impl<'a> Bucket<'a> {
    /// Looks a key up, and marks the entry as hit if it is there.
    #[inline]
    pub(crate) fn read(self, hashed: Hashed) -> Read {
        // The first try stands apart so that the common case is straight-line code.
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

    /// Looks a key up in its home line. Always inlined: its result, handed through memory, and the
    /// call took a fifth of a lookup.
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
        // Orders the loads of the tags before the load of the sequence: whoever has seen one word
        // of a writer sees that writer's odd sequence.
        fence(Ordering::Acquire);
        if !unchanged(before, line.word.load(Ordering::Relaxed)) {
            Near::Busy
        } else if Half::of(before).spilled() {
            Near::Spilled(before)
        } else {
            Near::Miss
        }
    }

    /// One try in both lines, `None` if a writer was inside.
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

    /// Looks for a key in one line, whose word was `before`, and marks a hit. `None` if it does not
    /// seem to be there, `Some(None)` if it does but a writer was inside.
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
            // A mark that fails was overtaken by another reader's or by a writer; neither is worth
            // a retry.
            let marked = word ^ mark;
            let _ = line.word.compare_exchange(word, marked, Ordering::Relaxed, Ordering::Relaxed);
        }
        Some(Some(value))
    }

    /// The lanes of a line that hold the key: one bit each, and one lane at most, but while a
    /// writer is inside.
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

    /// Stores an entry that a snapshot kept. One that is here already, being newer, stays as it is.
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

    /// Removes the entry of a key if there is one and `condition` holds of its value; says whether
    /// it did.
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

    /// Removes everything, also the memory of evicted keys, and says how many entries there were.
    pub(crate) fn clear(self) -> u32 {
        // A bucket that was never written is not written now either: its page may not exist yet.
        if self.lines.0.iter().all(|line| line.word.load(Ordering::Acquire) == 0) {
            return 0;
        }
        let mut writer = self.lock();
        let entries = writer.meta.entries();
        writer.meta = Meta::default();
        entries
    }

    /// All entries, as they stood at one moment. Waits for a writer that is inside.
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
        // Nobody may be left out of a snapshot for want of luck: shut the writers out instead.
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

    /// What is wrong with the bucket, if anything.
    pub(crate) fn validate(self) -> Result<(), &'static str> {
        let writer = self.lock();
        writer.meta.validate()?;
        let mut checked = writer.meta;
        for (line, spilled) in writer.spills().into_iter().enumerate() {
            checked.set_spilled(line, spilled);
        }
        if checked != writer.meta {
            return Err("a line does not say whether its keys stand in the other one");
        }
        let mut entries = [Entry { key: 0, value: 0, heat: 0 }; SLOTS];
        let count = self.copy_entries(writer.meta, &mut entries);
        for (at, entry) in entries[..count].iter().enumerate() {
            if entries[..at].iter().any(|other| other.key == entry.key) {
                return Err("a key stands in two slots");
            }
        }
        Ok(())
    }

    /// Waits until no other writer is inside, and enters.
    fn lock(self) -> Writer<'a> {
        let [first, second] = &self.lines.0;
        let mut looks = 0u32;
        loop {
            let word = look_before_lock(&first.word);
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
            if looks < SPINS_BEFORE_YIELD {
                looks += 1;
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

/// Whether no writer was inside since a line's word was `before`.
#[inline(always)]
fn unchanged(before: u64, now: u64) -> bool {
    before & ODD == 0 && (before ^ now) & SEQUENCE == 0
}

fn look_before_lock(word: &AtomicU64) -> u64 {
    #[cfg(not(loom))]
    return word.load(Ordering::Relaxed);
    // Loom remembers one last access of a word only. A plain load here would make it forget the
    // load of a reader, and then never try that reader against the lock that follows. An
    // exchange that cannot succeed is the same load, and loom takes it for a possible write.
    #[cfg(loom)]
    match word.compare_exchange(u64::MAX, u64::MAX, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(word) | Err(word) => word,
    }
}

/// A writer inside a bucket. What it changed is published when it is dropped.
struct Writer<'a> {
    bucket: Bucket<'a>,
    /// The sequences to leave behind.
    sequences: [u64; LINES],
    /// The rest of the words to leave behind.
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

    /// Puts a key that is not there into a vacant slot, or into that of the entry that is worth
    /// least.
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

    /// Moves an entry that stands in this line and has its home in the other one to the vacant slot
    /// there, and says which slot it left.
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

    /// The slots of a line whose keys have their home in the other one.
    fn strays(&self, line: usize) -> impl Iterator<Item = usize> + '_ {
        let tags = &self.bucket.lines.0[line];
        (0..LANES)
            .filter(move |&lane| home_of(tags.tag(lane)) != line)
            .map(move |lane| slot(line, lane))
            .filter(|&slot| self.meta.holds(slot))
    }

    /// Whether keys of each line stand in the other one.
    fn spills(&self) -> [bool; LINES] {
        std::array::from_fn(|line| self.strays(1 - line).next().is_some())
    }

    /// Lets each line say whether keys of its own stand in the other one.
    fn note_spills(&mut self) {
        for (line, spilled) in self.spills().into_iter().enumerate() {
            self.meta.set_spilled(line, spilled);
        }
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        // Line 0, which is the lock for both, comes last.
        for line in (0..LINES).rev() {
            let word = self.sequences[line] | self.meta.half(line);
            self.bucket.lines.0[line].word.store(word, Ordering::Release);
        }
    }
}

#[cfg(all(test, loom))]
impl Lines {
    /// An empty bucket's lines. Those of a table are born from zeroed memory instead.
    pub(crate) fn new() -> Self {
        Self(std::array::from_fn(|_| Line::new()))
    }
}
