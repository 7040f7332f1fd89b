//! Exact mean, sum, minimum and maximum of numbers.

use serde_json::{Value, json};

use super::exact::ExactSum;
use super::{Corrupt, Fold, Saved, float};
use crate::record::{Rejected, number};

/// See the module's documentation. Each number is taken as the nearest `f64`.
#[derive(Debug)]
pub(super) struct Numbers {
    count: u64,
    sum: ExactSum,
    min: f64,
    max: f64,
}

impl Default for Numbers {
    fn default() -> Self {
        let sum = ExactSum::default();
        Numbers { count: 0, sum, min: f64::INFINITY, max: f64::NEG_INFINITY }
    }
}

impl Fold for Numbers {
    #[inline]
    fn update(&mut self, record: &[u8]) -> Result<(), Rejected> {
        // The sign of a zero would make minimum and maximum depend on the order.
        let number = number(record)? + 0.0;
        self.count = self.count.saturating_add(1);
        self.sum.add(number);
        self.min = if number < self.min { number } else { self.min };
        self.max = if number > self.max { number } else { self.max };
        Ok(())
    }

    fn save(&self, out: &mut Vec<u8>) {
        for number in [self.count, self.min.to_bits(), self.max.to_bits()] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        self.sum.save(out);
    }

    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt> {
        let mut saved = Saved(saved);
        let count = saved.u64()?;
        let (min, max) = (f64::from_bits(saved.u64()?), f64::from_bits(saved.u64()?));
        let sum = ExactSum::restore(saved.0).ok_or(Corrupt)?;
        if min.is_nan() || max.is_nan() {
            return Err(Corrupt);
        }
        self.count = self.count.checked_add(count).ok_or(Corrupt)?;
        self.sum.merge(&sum);
        self.min = self.min.min(min);
        self.max = self.max.max(max);
        Ok(())
    }

    fn value(&self) -> Value {
        if self.count == 0 {
            return json!({ "count": 0, "sum": 0.0, "mean": null, "min": null, "max": null });
        }
        json!({
            "count": self.count,
            "sum": float(self.sum.value()),
            "mean": float(self.sum.over(self.count)),
            "min": float(self.min),
            "max": float(self.max),
        })
    }
}
