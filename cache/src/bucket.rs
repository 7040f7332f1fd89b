//! One bucket: seven entries in two cache lines, behind a sequence lock.
//!
//! ```text
//! line 0   sequence | key 0 | key 1 | key 2 | key 3 | key 4 | key 5 | key 6
//! line 1   meta     | val 0 | val 1 | val 2 | val 3 | val 4 | val 5 | val 6
//! ```
//!
//! The sequence is odd while a writer is inside and grows by two with each writer, so 2^63 writes pass
//! before it repeats. A reader takes it, reads what it needs, and takes it again: the same even number
//! twice means that no writer was inside between the two. Every word is an atomic, so a reader that loses
//! that race has read old or new words, never undefined ones, and throws them away (Boehm, "Can seqlocks
//! get along with programming language memory models?", MSPC 2012, whose fences these are).
//!
//! `meta` also takes marks from readers, at any time, by compare-and-swap: they touch eviction bits only,
//! and a mark lost to a writer is a hit not counted. A key that stands in a vacant slot means nothing, so
//! no key is reserved; a key that matches nowhere is a miss without a look at line 1.

use crate::eviction::{Meta, Policy, STRIDE};
use crate::hash::Hashed;
use crate::sync::{AtomicU64, Ordering, fence, spin_loop, yield_now};

/// Entries in a bucket. A model needs two: one to keep and one to evict.
pub(crate) const SLOTS: usize = if cfg!(loom) { 2 } else { 7 };

/// How often a reader starts over before it reports that it was kept out. A writer is inside for some tens
/// of nanoseconds; one that has been inside for all of this has lost its core, and will be back in
/// milliseconds, which is longer than whoever asks a cache wants to wait.
const READ_TRIES: u32 = if cfg!(loom) { 2 } else { 128 };

/// How often a writer looks at a taken lock before it offers its core to others between looks.
const SPINS_BEFORE_YIELD: u32 = if cfg!(loom) { 0 } else { 128 };

/// What a reader found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    Hit(u64),
    Miss,
    /// Writers were inside at each try.
    KeptOut,
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

/// See the [module](self).
#[cfg_attr(not(loom), repr(C, align(128)))]
pub(crate) struct Bucket {
    sequence: AtomicU64,
    keys: [AtomicU64; SLOTS],
    meta: AtomicU64,
    values: [AtomicU64; SLOTS],
}

#[cfg(not(loom))]
const _: () = assert!(size_of::<Bucket>() == 128 && align_of::<Bucket>() == 128);

impl Bucket {
    /// Looks `key` up, and marks the entry as hit if it is there.
    #[inline]
    pub(crate) fn read(&self, key: u64) -> Read {
        // The first try stands apart so that the common case is straight-line code.
        match self.try_read(key) {
            Some(read) => read,
            None => self.read_again(key),
        }
    }

    #[cold]
    #[inline(never)]
    fn read_again(&self, key: u64) -> Read {
        for _ in 1..READ_TRIES {
            spin_loop();
            if let Some(read) = self.try_read(key) {
                return read;
            }
        }
        Read::KeptOut
    }

    /// One try, `None` if a writer was inside. Always inlined: its result, handed through memory, and the
    /// call took a fifth of a lookup.
    #[inline(always)]
    fn try_read(&self, key: u64) -> Option<Read> {
        let before = self.sequence.load(Ordering::Acquire);
        let mut found = 0u64;
        for (slot, stored) in self.keys.iter().enumerate() {
            found |= u64::from(stored.load(Ordering::Relaxed) == key) << (STRIDE * slot);
        }
        if found == 0 {
            return self.unchanged_since(before).then_some(Read::Miss);
        }
        let meta = Meta(self.meta.load(Ordering::Relaxed));
        found &= meta.occupied();
        let slot = found.trailing_zeros() as usize / STRIDE;
        let Some(value) = self.values.get(slot) else {
            // Only vacant slots matched.
            return self.unchanged_since(before).then_some(Read::Miss);
        };
        let value = value.load(Ordering::Relaxed);
        if !self.unchanged_since(before) {
            return None;
        }
        if let Some(marked) = meta.hit(slot) {
            // A mark that fails was overtaken by another reader's or by a writer; neither is worth a retry.
            let _ =
                self.meta.compare_exchange(meta.0, marked.0, Ordering::Relaxed, Ordering::Relaxed);
        }
        Some(Read::Hit(value))
    }

    /// Whether no writer was inside since the sequence was read as `before`.
    #[inline]
    fn unchanged_since(&self, before: u64) -> bool {
        // Orders the loads of the words before the load of the sequence: whoever has seen one word of a
        // writer sees that writer's odd sequence.
        fence(Ordering::Acquire);
        before & 1 == 0 && self.sequence.load(Ordering::Relaxed) == before
    }

    /// Stores `value` under the key.
    pub(crate) fn insert(&self, hashed: Hashed, value: u64, policy: Policy) -> Insert {
        let mut writer = self.lock();
        if let Some(slot) = writer.find(hashed.key()) {
            let old = writer.value(slot);
            writer.set_value(slot, value);
            writer.meta = writer.meta.hit(slot).unwrap_or(writer.meta);
            return Insert::Updated { old };
        }
        writer.add(hashed, value, policy).1
    }

    /// Stores an entry that a snapshot kept. One that is here already, being newer, stays as it is.
    pub(crate) fn restore(
        &self,
        hashed: Hashed,
        value: u64,
        heat: u8,
        policy: Policy,
    ) -> Option<Insert> {
        let mut writer = self.lock();
        if writer.find(hashed.key()).is_some() {
            return None;
        }
        let (slot, outcome) = writer.add(hashed, value, policy);
        writer.meta.set_heat(slot, heat);
        Some(outcome)
    }

    /// Removes the entry of `key` if there is one and `condition` holds of its value; says whether it did.
    pub(crate) fn remove_if(&self, key: u64, condition: impl FnOnce(u64) -> bool) -> bool {
        let mut writer = self.lock();
        match writer.find(key) {
            Some(slot) if condition(writer.value(slot)) => {
                writer.meta.empty(slot);
                true
            }
            _ => false,
        }
    }

    /// Removes everything, also the memory of evicted keys, and says how many entries there were.
    pub(crate) fn clear(&self) -> u32 {
        // A bucket that was never written is not written now either: its page may not exist yet.
        if self.sequence.load(Ordering::Acquire) == 0 {
            return 0;
        }
        let mut writer = self.lock();
        let entries = writer.meta.entries();
        writer.meta = Meta::default();
        entries
    }

    /// All entries, as they stood at one moment. Waits for a writer that is inside.
    pub(crate) fn entries(&self) -> ([Entry; SLOTS], usize) {
        let mut entries = [Entry { key: 0, value: 0, heat: 0 }; SLOTS];
        for _ in 0..READ_TRIES {
            let before = self.sequence.load(Ordering::Acquire);
            let count = self.copy_entries(&mut entries);
            if self.unchanged_since(before) {
                return (entries, count);
            }
            spin_loop();
        }
        // Nobody may be left out of a snapshot for want of luck: shut the writers out instead.
        let _writer = self.lock();
        let count = self.copy_entries(&mut entries);
        (entries, count)
    }

    fn copy_entries(&self, entries: &mut [Entry; SLOTS]) -> usize {
        let meta = Meta(self.meta.load(Ordering::Relaxed));
        let mut count = 0;
        for (slot, (key, value)) in self.keys.iter().zip(&self.values).enumerate() {
            if meta.holds(slot) {
                entries[count] = Entry {
                    key: key.load(Ordering::Relaxed),
                    value: value.load(Ordering::Relaxed),
                    heat: meta.heat(slot),
                };
                count += 1;
            }
        }
        count
    }

    /// What is wrong with the bucket, if anything.
    pub(crate) fn validate(&self) -> Result<(), &'static str> {
        let writer = self.lock();
        writer.meta.validate()?;
        let (entries, count) = {
            let mut entries = [Entry { key: 0, value: 0, heat: 0 }; SLOTS];
            let count = self.copy_entries(&mut entries);
            (entries, count)
        };
        for (at, entry) in entries[..count].iter().enumerate() {
            if entries[..at].iter().any(|other| other.key == entry.key) {
                return Err("a key stands in two slots");
            }
        }
        Ok(())
    }

    /// Waits until no other writer is inside, and enters.
    fn lock(&self) -> Writer<'_> {
        let mut looks = 0u32;
        loop {
            let sequence = self.look_before_lock();
            if sequence & 1 == 0
                && self
                    .sequence
                    .compare_exchange_weak(
                        sequence,
                        sequence + 1,
                        Ordering::Acquire,
                        Ordering::Relaxed,
                    )
                    .is_ok()
            {
                // Orders the odd sequence before every word that this writer stores.
                fence(Ordering::Release);
                let meta = Meta(self.meta.load(Ordering::Relaxed));
                return Writer { bucket: self, sequence: sequence + 2, meta };
            }
            if looks < SPINS_BEFORE_YIELD {
                looks += 1;
                spin_loop();
            } else {
                yield_now();
            }
        }
    }

    fn look_before_lock(&self) -> u64 {
        #[cfg(not(loom))]
        return self.sequence.load(Ordering::Relaxed);
        // Loom remembers one last access of a word only. A plain load here would make it forget the load
        // of a reader, and then never try that reader against the lock that follows. An exchange that
        // cannot succeed is the same load, and loom takes it for a possible write.
        #[cfg(loom)]
        match self.sequence.compare_exchange(
            u64::MAX,
            u64::MAX,
            Ordering::Relaxed,
            Ordering::Relaxed,
        ) {
            Ok(sequence) | Err(sequence) => sequence,
        }
    }
}

/// A writer inside a bucket. What it changed is published when it is dropped.
struct Writer<'a> {
    bucket: &'a Bucket,
    /// The sequence to leave behind.
    sequence: u64,
    /// The word to leave behind.
    meta: Meta,
}

impl Writer<'_> {
    fn find(&self, key: u64) -> Option<usize> {
        (0..SLOTS).find(|&slot| self.meta.holds(slot) && self.key(slot) == key)
    }

    fn key(&self, slot: usize) -> u64 {
        self.bucket.keys[slot].load(Ordering::Relaxed)
    }

    fn value(&self, slot: usize) -> u64 {
        self.bucket.values[slot].load(Ordering::Relaxed)
    }

    fn set_value(&mut self, slot: usize, value: u64) {
        self.bucket.values[slot].store(value, Ordering::Relaxed);
    }

    /// Puts a key that is not there into a vacant slot, or into that of the entry that is worth least.
    fn add(&mut self, hashed: Hashed, value: u64, policy: Policy) -> (usize, Insert) {
        let (slot, outcome) = match self.meta.vacant() {
            Some(slot) => (slot, Insert::Inserted),
            None => {
                let slot = self.meta.victim(policy);
                let key = self.key(slot);
                self.meta.remember(Hashed::new(key).hash());
                (slot, Insert::Evicted { key, value: self.value(slot) })
            }
        };
        self.bucket.keys[slot].store(hashed.key(), Ordering::Relaxed);
        self.set_value(slot, value);
        self.meta.fill(slot, hashed.hash(), policy);
        (slot, outcome)
    }
}

impl Drop for Writer<'_> {
    fn drop(&mut self) {
        self.bucket.meta.store(self.meta.0, Ordering::Relaxed);
        self.bucket.sequence.store(self.sequence, Ordering::Release);
    }
}

#[cfg(all(test, loom))]
impl Bucket {
    /// An empty bucket. Those of a table are born from zeroed memory instead.
    pub(crate) fn new() -> Self {
        Self {
            sequence: AtomicU64::new(0),
            keys: std::array::from_fn(|_| AtomicU64::new(0)),
            meta: AtomicU64::new(0),
            values: std::array::from_fn(|_| AtomicU64::new(0)),
        }
    }
}
