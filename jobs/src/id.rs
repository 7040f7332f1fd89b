//! Ids of jobs: 128 bits, ordered by time, unique within a store.
//!
//! An id is a UUID of version 7. Its first 63 free bits are the submission time in milliseconds and
//! a counter, so they alone are unique in a store: [`JobId::key`] is the primary key of a job. The
//! other 59 bits are random, so an id cannot be guessed from another one.

use std::fmt;
use std::str::FromStr;

use crate::Timestamp;

/// Bits of the counter within a millisecond.
const COUNTER_BITS: u32 = 15;

/// The id of a job. Its text form is that of a UUID.
///
/// ```
/// use afterimage_jobs::JobId;
///
/// let id: JobId = "0192f3c1-0a2b-7000-8000-000000000001".parse()?;
/// assert_eq!(id.to_string(), "0192f3c1-0a2b-7000-8000-000000000001");
/// # Ok::<(), afterimage_jobs::InvalidId>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u128);

/// A text that is not the id of a job.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not the id of a job; expected 32 hexadecimal digits in 5 groups")]
pub struct InvalidId(String);

impl JobId {
    /// The id with these 128 bits.
    #[must_use]
    pub const fn from_bits(bits: u128) -> Self {
        JobId(bits)
    }

    /// Its 128 bits.
    #[must_use]
    pub const fn bits(self) -> u128 {
        self.0
    }

    /// Time and counter: unique in a store, and in the order of submission.
    #[must_use]
    pub const fn key(self) -> i64 {
        let millis = (self.0 >> 80) as i64;
        let high = (self.0 >> 64) as i64 & 0xfff;
        let low = (self.0 >> 59) as i64 & 0b111;
        (millis << COUNTER_BITS) | (high << 3) | low
    }

    /// The random bits.
    #[must_use]
    pub const fn tail(self) -> i64 {
        (self.0 as i64) & ((1 << 59) - 1)
    }

    /// The id of a key and its random bits.
    #[must_use]
    pub const fn of(key: i64, tail: i64) -> Self {
        let (key, tail) = (key as u128 & (i64::MAX as u128), tail as u128 & ((1 << 59) - 1));
        let (millis, counter) = (key >> COUNTER_BITS, key & ((1 << COUNTER_BITS) - 1));
        let (high, low) = (counter >> 3, counter & 0b111);
        JobId((millis << 80) | (7 << 76) | (high << 64) | (0b10 << 62) | (low << 59) | tail)
    }

    /// The time of submission.
    #[must_use]
    pub const fn time(self) -> Timestamp {
        Timestamp((self.0 >> 80) as u64)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |shift: u32, digits: u32| (self.0 >> shift) & ((1 << (4 * digits)) - 1);
        let parts = (part(96, 8), part(80, 4), part(64, 4), part(48, 4), part(0, 12));
        write!(
            f,
            "{:08x}-{:04x}-{:04x}-{:04x}-{:012x}",
            parts.0, parts.1, parts.2, parts.3, parts.4
        )
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for JobId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId(text.chars().take(64).collect());
        let groups: Vec<&str> = text.split('-').collect();
        let lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
        let hex = groups.concat();
        let is_hex = hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        if lengths != [8, 4, 4, 4, 12] || !is_hex {
            return Err(invalid());
        }
        u128::from_str_radix(&hex, 16).map(JobId).map_err(|_| invalid())
    }
}

/// The source of new ids. Ids increase, also when the clock goes back.
#[derive(Debug, Default)]
pub struct Ids {
    last: i64,
}

impl Ids {
    /// A source whose ids follow `last`, the highest key so far.
    #[must_use]
    pub fn after(last: i64) -> Self {
        Ids { last }
    }

    /// The next id. More than 32,768 ids of one millisecond continue in the next one.
    pub fn next(&mut self, now: Timestamp, random: u64) -> JobId {
        self.last = (self.last + 1).max((now.0 as i64) << COUNTER_BITS);
        JobId::of(self.last, random as i64)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_survives_text_and_key(key in 0..i64::MAX, tail in 0_i64..1 << 59) {
            let id = JobId::of(key, tail);
            prop_assert_eq!((id.key(), id.tail()), (key, tail));
            prop_assert_eq!(id.to_string().parse::<JobId>(), Ok(id));
            prop_assert_eq!(id.bits() >> 76 & 0xf, 7, "the version of a UUID");
            prop_assert_eq!(id.bits() >> 62 & 0b11, 0b10, "the variant of a UUID");
        }

        #[test]
        fn ids_increase_with_any_clock(times in prop::collection::vec(0_u64..1 << 40, 1..200)) {
            let mut ids = Ids::default();
            let made: Vec<JobId> =
                times.iter().map(|&time| ids.next(Timestamp(time), time * 77)).collect();
            prop_assert!(made.windows(2).all(|pair| pair[0] < pair[1]));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        let good = "0192f3c1-0a2b-7000-8000-000000000001";
        for bad in ["", "7", &good[1..], &good.replace('-', ""), &good.replace("c1", "+1")] {
            assert!(bad.parse::<JobId>().is_err(), "{bad}");
        }
    }
}
