//! The number of distinct records, estimated: HyperLogLog with 16,384 registers, and Ertl's
//! estimator (2017), which needs no table of corrections.

use highway::{HighwayHash, HighwayHasher, Key};
use serde_json::{Value, json};

use super::{Corrupt, Fold};
use crate::record::Rejected;

/// Bits of a hash that choose the register.
const PRECISION: u32 = 14;
const REGISTERS: usize = 1 << PRECISION;
/// The largest value of a register: all other bits are zeros.
const HIGHEST: u8 = (64 - PRECISION + 1) as u8;

/// Saved states are merged, so all instances hash alike.
const KEY: Key =
    Key([0x6166_7465_7269_6d61, 0x6765_2064_6973_7469, 0x6e63_7420_7265_636f, 0x7264_7300]);

/// See the module's documentation. Two records are equal if their bytes are.
pub(super) struct Distinct(Box<[u8]>);

impl Default for Distinct {
    fn default() -> Self {
        Distinct(vec![0; REGISTERS].into())
    }
}

impl Fold for Distinct {
    fn update(&mut self, record: &[u8]) -> Result<(), Rejected> {
        let hash = HighwayHasher::new(KEY).hash64(record);
        let register = (hash >> (64 - PRECISION)) as usize;
        let rank = ((hash << PRECISION) | 1 << (PRECISION - 1)).leading_zeros() as u8 + 1;
        self.0[register] = self.0[register].max(rank);
        Ok(())
    }

    fn save(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn merge(&mut self, saved: &[u8]) -> Result<(), Corrupt> {
        if saved.len() != REGISTERS || saved.iter().any(|rank| *rank > HIGHEST) {
            return Err(Corrupt);
        }
        for (register, other) in self.0.iter_mut().zip(saved) {
            *register = (*register).max(*other);
        }
        Ok(())
    }

    fn value(&self) -> Value {
        let mut counts = [0_u32; HIGHEST as usize + 1];
        for rank in &self.0 {
            counts[*rank as usize] += 1;
        }
        let registers = REGISTERS as f64;
        let highest = HIGHEST as usize;
        let mut z = registers * tau(1.0 - f64::from(counts[highest]) / registers);
        for rank in (1..highest).rev() {
            z = 0.5 * (z + f64::from(counts[rank]));
        }
        z += registers * sigma(f64::from(counts[0]) / registers);
        // 1 / (2 ln 2)
        let estimate = 0.721_347_520_444_481_7 * registers * registers / z;
        json!({ "distinct": if estimate.is_finite() { estimate.round() as u64 } else { 0 } })
    }
}

/// The share of registers that are zero, as a contribution to the estimate.
fn sigma(mut x: f64) -> f64 {
    if x == 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before {
            return z;
        }
    }
}

/// The share of registers at their highest value, as a contribution to the estimate.
fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z == before {
            return z / 3.0;
        }
    }
}
