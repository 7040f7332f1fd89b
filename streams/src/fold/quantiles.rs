//! Quantiles of numbers: a DDSketch (Masson, 2019) with 64 buckets for each power of two.
//!
//! A bucket is the numbers with equal exponent and equal highest six bits of the fraction. So its
//! number is a shift of the bits, and the same on every machine. The middle of a bucket is within
//! 1/128 of each of its numbers.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{Corrupt, Fold, Saved, float};
use crate::record::{Rejected, number};

/// Bits of a number behind its bucket.
const SHIFT: u32 = 52 - 6;

/// The quantiles of the result.
const SHOWN: [(&str, f64); 7] = [
    ("p1", 0.01),
    ("p10", 0.1),
    ("p50", 0.5),
    ("p90", 0.9),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("p99.99", 0.9999),
];

/// See the module's documentation. At most 262,144 buckets.
#[derive(Debug, Default)]
pub(super) struct Quantiles {
    count: u64,
    /// By bucket, in the order of the numbers: see [`bucket`].
    buckets: BTreeMap<i32, u64>,
    /// The bucket of the last number and its count, which are not in `buckets`: numbers that
    /// follow each other are often similar.
    last: (i32, u64),
}

/// The bucket of a number, ordered as the numbers.
fn bucket(number: f64) -> i32 {
    let magnitude = (number.abs().to_bits() >> SHIFT) as i32;
    if number < 0.0 { -magnitude - 1 } else { magnitude }
}

/// The middle of a bucket.
fn middle(bucket: i32) -> f64 {
    let (magnitude, sign) = if bucket < 0 { (-bucket - 1, -1.0) } else { (bucket, 1.0) };
    let lowest = (magnitude as u64) << SHIFT;
    if lowest == 0 {
        // Zero, and numbers below 2^-1028.
        return 0.0;
    }
    sign * f64::from_bits(lowest | 1 << (SHIFT - 1))
}

impl Quantiles {
    fn settle(&mut self) {
        let (bucket, count) = std::mem::take(&mut self.last);
        if count > 0 {
            *self.buckets.entry(bucket).or_default() += count;
        }
    }

    fn settled(&self) -> BTreeMap<i32, u64> {
        let mut buckets = self.buckets.clone();
        let (bucket, count) = self.last;
        if count > 0 {
            *buckets.entry(bucket).or_default() += count;
        }
        buckets
    }
}

impl Fold for Quantiles {
    fn update(&mut self, record: &[u8]) -> Result<(), Rejected> {
        let bucket = bucket(number(record)?);
        self.count = self.count.saturating_add(1);
        if self.last.0 != bucket {
            self.settle();
            self.last.0 = bucket;
        }
        self.last.1 = self.last.1.saturating_add(1);
        Ok(())
    }

    fn save(&self, out: &mut Vec<u8>) {
        for (bucket, count) in self.settled() {
            out.extend_from_slice(&bucket.to_le_bytes());
            out.extend_from_slice(&count.to_le_bytes());
        }
    }

    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt> {
        let (mut saved, mut others, mut total) = (Saved(saved), Vec::new(), self.count);
        while !saved.0.is_empty() {
            let (bucket, count) = (saved.u32()?.cast_signed(), saved.u64()?);
            let magnitude = if bucket < 0 { -(bucket + 1) } else { bucket };
            let is_finite = magnitude < (f64::INFINITY.to_bits() >> SHIFT) as i32;
            let is_sorted = others.last().is_none_or(|(before, _)| *before < bucket);
            total = total.checked_add(count).ok_or(Corrupt)?;
            if !is_finite || !is_sorted || count == 0 {
                return Err(Corrupt);
            }
            others.push((bucket, count));
        }
        self.settle();
        for (bucket, count) in others {
            *self.buckets.entry(bucket).or_default() += count;
        }
        self.count = total;
        Ok(())
    }

    fn value(&self) -> Value {
        let buckets = self.settled();
        let mut value = Map::new();
        value.insert("count".into(), self.count.into());
        for (name, share) in SHOWN {
            let rank = (share * (self.count.saturating_sub(1)) as f64) as u64;
            let mut below = 0;
            let found = buckets.iter().find(|(_, count)| {
                below += **count;
                below > rank
            });
            value.insert(
                name.into(),
                found.map_or(json!(null), |(bucket, _)| float(middle(*bucket))),
            );
        }
        Value::Object(value)
    }
}
