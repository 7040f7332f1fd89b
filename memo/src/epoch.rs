//! Epochs: how a flush deletes all answers of a model in constant time, in every memo that
//! shares the store, and beyond a restart.
//!
//! The epoch of a model is a number that is part of all its keys: 0, or the time of the last flush.
//! A flush takes a higher one, so that no older answer is found again. Because it is a time, it is
//! also higher than epochs that the store has dropped and no memo knows. The number itself is
//! an entry of the store, sealed like a label:
//!
//! * A memo with a store in this process reads the entry when it meets the model.
//! * Memos that share a store across the network read it along with their first lookup, and then
//!   along with one lookup each [`CHECK_EVERY`]. Values of a lookup count only if the epoch that
//!   came with them is the present one. So a flush reaches each memo within that time.
//! * A memo that flushes takes new keys at once, and then reads the entry: two memos that flush at
//!   the same time agree on an epoch that is new to both.
//!
//! A flush also raises the **floor** of the model's name, a second entry that is read with the
//! first. Epochs of models of this name are not below it. So a model that the name had before, in
//! an earlier process or in another memo, has no older answers either when it returns.
//!
//! A store may drop any entry. A memo that finds its epoch missing writes it again. Only a store
//! that drops the entry and keeps older answers while no memo runs brings those answers back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_cache::Hashed;
use afterimage_core::{AnswerKind, ModelId};
use bytes::Bytes;

use crate::key::{Secret, derive, shape_bytes};
use crate::store::{Keep, Store, StoreOfBytes, Stores};
use crate::sync;

/// The longest time until a flush by another memo is noticed, while requests arrive.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);

const EPOCH_DOMAIN: &[u8] = b"afterimage epoch v2";
const FLOOR_DOMAIN: &[u8] = b"afterimage floor v1";

/// Bits of the entry's value that hold the epoch; the rest is the tag.
const EPOCH_BITS: u32 = 40;

/// The highest epoch: in the year 2054.
pub(crate) const MAX_EPOCH: u64 = (1 << EPOCH_BITS) - 1;

/// The time before the first epoch, since 1970: the start of 2020.
const ZERO: Duration = Duration::from_secs(1_577_836_800);

/// The epoch of a flush at this time since 1970, above `present`; `None` if there is none left. A
/// clock far in the future does not use the epochs up.
pub(crate) fn next(present: u64, since_1970: Duration) -> Option<u64> {
    let time = u64::try_from(since_1970.saturating_sub(ZERO).as_millis()).unwrap_or(u64::MAX);
    let time = if time < MAX_EPOCH / 4 * 3 { time } else { 0 };
    Some(time.max(present + 1)).filter(|&epoch| epoch <= MAX_EPOCH)
}

/// Where the epoch of one model is stored, and how the value is sealed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EpochEntry {
    hash: [u64; 4],
    /// The epoch is kept where the answers are.
    answers: AnswerKind,
}

impl EpochEntry {
    pub(crate) fn new(secret: &Secret, model: &ModelId) -> Self {
        let shape = shape_bytes(model);
        let hash = derive(secret, EPOCH_DOMAIN, &[&model.digest, &shape]);
        EpochEntry { hash, answers: model.answers }
    }

    /// The floor of all models of this name whose answers are of this kind.
    pub(crate) fn floor(secret: &Secret, name: &str, answers: AnswerKind) -> Self {
        EpochEntry { hash: derive(secret, FLOOR_DOMAIN, &[name.as_bytes()]), answers }
    }

    /// The key in a store of labels.
    pub(crate) fn store_key(self) -> u64 {
        self.hash[0]
    }

    /// The key in a store of bytes.
    pub(crate) fn identity(self) -> u128 {
        u128::from(self.hash[1]) << 64 | u128::from(self.hash[0])
    }

    /// The value of an epoch: its tag, then its number. The tag is a label's of 24 bits (module
    /// [`key`](crate::key)): a forgery succeeds with probability 2⁻²⁴, and can only flush.
    pub(crate) fn seal(self, epoch: u64) -> i64 {
        debug_assert!(epoch <= MAX_EPOCH);
        let [.., a, b] = self.hash;
        let tag = a.wrapping_mul(epoch).wrapping_add(b) >> EPOCH_BITS << EPOCH_BITS;
        (tag | epoch).cast_signed()
    }

    /// The epoch in a stored value; 0, the first one, without a value or when its seal is wrong.
    pub(crate) fn open(self, value: Option<i64>) -> u64 {
        let Some(value) = value else { return 0 };
        let epoch = value.cast_unsigned() & MAX_EPOCH;
        if self.seal(epoch) == value { epoch } else { 0 }
    }
}

/// The entries of a model: its own epoch, and the floor of its name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EpochEntries {
    pub(crate) own: EpochEntry,
    pub(crate) floor: EpochEntry,
}

/// The epochs in these entries.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredEpochs {
    pub(crate) own: u64,
    pub(crate) floor: u64,
}

impl StoredEpochs {
    /// The lowest epoch that the model may have.
    pub(crate) fn least(self) -> u64 {
        self.own.max(self.floor)
    }
}

impl EpochEntries {
    pub(crate) fn new(secret: &Secret, name: &str, model: &ModelId) -> Self {
        let floor = EpochEntry::floor(secret, name, model.answers);
        EpochEntries { own: EpochEntry::new(secret, model), floor }
    }

    /// The epochs in stored values.
    pub(crate) fn open(self, own: Option<i64>, floor: Option<i64>) -> StoredEpochs {
        StoredEpochs { own: self.own.open(own), floor: self.floor.open(floor) }
    }
}

/// Whether the epoch of some keys is known to be the present one.
#[derive(Debug)]
pub(crate) struct Freshness {
    since: Instant,
    /// The last check in units of 2²⁰ ns (about a millisecond) after `since`, plus one; 0 for none.
    checked: AtomicU64,
    /// A flush chose this epoch without having read the stored one.
    provisional: AtomicBool,
}

impl Freshness {
    /// Of an epoch that was read now.
    pub(crate) fn read(now: Instant) -> Self {
        Freshness { since: now, checked: AtomicU64::new(1), provisional: AtomicBool::new(false) }
    }

    /// Of an epoch that is to be read with the first lookup. `provisional` if a flush chose it.
    pub(crate) fn unread(now: Instant, provisional: bool) -> Self {
        let provisional = AtomicBool::new(provisional);
        Freshness { since: now, checked: AtomicU64::new(0), provisional }
    }

    /// Whether the stored epoch is to be read along with a lookup now.
    #[inline]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        let checked = self.checked.load(Relaxed);
        checked == 0 || self.ticks(now).saturating_sub(checked) >= CHECK_EVERY.as_nanos() as u64 >> 20
    }

    /// Whether another memo may have chosen the same epoch.
    pub(crate) fn is_provisional(&self) -> bool {
        self.provisional.load(Relaxed)
    }

    /// Notes that the epoch was read and is the present one.
    pub(crate) fn confirm(&self, now: Instant) {
        self.provisional.store(false, Relaxed);
        self.checked.store(self.ticks(now), Relaxed);
    }

    fn ticks(&self, now: Instant) -> u64 {
        (now.saturating_duration_since(self.since).as_nanos() as u64 >> 20) + 1
    }
}

impl Stores {
    /// The stored epochs, if the store is in this process.
    pub(crate) fn epochs_here(&self, entries: EpochEntries) -> Option<StoredEpochs> {
        let own = self.epoch_here(entries.own)?;
        Some(StoredEpochs { own, floor: self.epoch_here(entries.floor)? })
    }

    fn epoch_here(&self, entry: EpochEntry) -> Option<u64> {
        let value = match (entry.answers, &self.bytes, &self.labels) {
            (AnswerKind::Bytes, StoreOfBytes::None, _) => None,
            (AnswerKind::Bytes, StoreOfBytes::Embedded(bytes), _) => bytes
                .get(entry.identity(), sync::now())
                .and_then(|stored| value_of(&stored.value)),
            (AnswerKind::Label { .. }, _, Store::Embedded(table, _)) => {
                table.read(Hashed::new(entry.store_key())).map(u64::cast_signed)
            }
            (AnswerKind::Bytes, StoreOfBytes::Remote(_), _)
            | (AnswerKind::Label { .. }, _, Store::Remote(_)) => return None,
        };
        Some(entry.open(value))
    }

    /// Writes an epoch.
    pub(crate) fn write_epoch(&self, entry: EpochEntry, epoch: u64) {
        let value = entry.seal(epoch);
        let bytes = || Bytes::copy_from_slice(&value.to_le_bytes());
        match (entry.answers, &self.bytes) {
            (AnswerKind::Label { .. }, _) => {
                self.labels.write(entry.store_key(), value, Keep::Epoch);
            }
            (AnswerKind::Bytes, StoreOfBytes::Embedded(store)) => {
                store.insert(entry.identity(), bytes(), None, sync::now());
            }
            (AnswerKind::Bytes, StoreOfBytes::Remote(remote)) => {
                remote.write(entry.identity(), bytes(), Keep::Epoch);
            }
            (AnswerKind::Bytes, StoreOfBytes::None) => {}
        }
    }

    /// Reads the epoch of `entry` in the store across the network, apart from any lookup.
    pub(crate) fn read_epoch(
        self: &Arc<Self>,
        entry: EpochEntry,
        then: impl FnOnce(Option<i64>) + Send + 'static,
    ) {
        match (entry.answers, &self.labels, &self.bytes) {
            (AnswerKind::Label { .. }, Store::Remote(remote), _) => {
                remote.lookup(&[entry.store_key()], move |values, _| {
                    if let Some(values) = values {
                        then(values.first().copied().flatten());
                    }
                });
            }
            (AnswerKind::Bytes, _, StoreOfBytes::Remote(remote)) => {
                remote.lookup(&[entry.identity()], move |values, _| {
                    if let Some(values) = values {
                        then(values.first().and_then(|value| value_of(value.as_ref()?)));
                    }
                });
            }
            _ => {}
        }
    }
}

/// The value of an epoch in a store of bytes.
pub(crate) fn value_of(bytes: &Bytes) -> Option<i64> {
    bytes[..].try_into().ok().map(i64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    #[test]
    fn an_epoch_is_the_time_and_always_higher() {
        let first = next(0, NOW).unwrap();
        assert_eq!(first, 222_163_200_000);
        assert_eq!(next(first, NOW), Some(first + 1), "another flush at the same time");
        assert_eq!(next(first, Duration::ZERO), Some(first + 1), "a clock that was set back");
        assert_eq!(next(first, Duration::MAX), Some(first + 1), "a clock in the far future");
        assert_eq!(next(MAX_EPOCH, NOW), None);
    }

    #[test]
    fn a_sealed_epoch_is_found_and_a_forged_one_is_none() {
        let model = ModelId::labels([1; 32], None, 10);
        let entry = EpochEntry::new(&Secret::new([7; 32]), &model);
        for epoch in [0, 1, next(0, NOW).unwrap(), MAX_EPOCH] {
            assert_eq!(entry.open(Some(entry.seal(epoch))), epoch);
            let forged = entry.seal(epoch) ^ 1 << 50;
            assert_eq!(entry.open(Some(forged)), 0);
        }
        assert_eq!(entry.open(None), 0);
    }
}
