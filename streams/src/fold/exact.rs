//! The exact sum of any number of `f64`, and its correctly rounded sum and mean.
//!
//! The sum is a fixed-point number with all bits of the range of `f64`, in limbs of 32 bits (Neal's
//! small superaccumulator, 2015). It has no rounding, so it depends neither on the order of the
//! numbers nor on how they are divided among accumulators.

/// Limbs: the largest place is 2045, its mantissa needs two limbs more, and 2^64 numbers another
/// two.
const LIMBS: usize = (2045 >> 5) + 1 + 2 + 2;

/// Bits of a limb.
const BITS: usize = 32;

/// Numbers between two passes of carries: each adds less than 2^53 to a limb of 63 bits.
const PATIENCE: u32 = 1 << 9;

/// Bytes of a saved sum.
pub const SAVED_LEN: usize = 8 * LIMBS;

/// An exact sum.
///
/// ```
/// use afterimage_streams::fold::exact::ExactSum;
///
/// let mut sum = ExactSum::default();
/// for number in [1e16, 1.0, 1.0, -1e16] {
///     sum.add(number);
/// }
/// assert_eq!(sum.value(), 2.0);
/// assert_eq!(sum.over(4), 0.5);
/// ```
#[derive(Clone, Debug)]
pub struct ExactSum {
    /// The sum is that of `limbs[i] × 2^(32 i - 1074)`.
    limbs: [i64; LIMBS],
    /// Numbers that may be added before the next pass of carries.
    left: u32,
}

impl Default for ExactSum {
    fn default() -> Self {
        ExactSum { limbs: [0; LIMBS], left: PATIENCE }
    }
}

impl ExactSum {
    /// Adds a number, which must be finite.
    #[inline]
    pub fn add(&mut self, number: f64) {
        debug_assert!(number.is_finite());
        if self.left == 0 {
            self.carry();
        }
        self.left -= 1;
        let bits = number.to_bits();
        let exponent = (bits >> 52) as usize & 0x7FF;
        let fraction = bits & ((1 << 52) - 1);
        // Numbers below the normal ones have the lowest place and no implicit bit.
        let (mantissa, place) = match exponent {
            0 => (fraction, 0),
            _ => (fraction | 1 << 52, exponent - 1),
        };
        let (limb, shift) = (place / BITS, place % BITS);
        let low = (mantissa << shift) & u64::from(u32::MAX);
        let high = mantissa >> (BITS - shift);
        // The sign as 0 or -1 negates without a branch.
        let sign = bits.cast_signed() >> 63;
        self.limbs[limb] += (low.cast_signed() ^ sign) - sign;
        self.limbs[limb + 1] += (high.cast_signed() ^ sign) - sign;
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: &ExactSum) {
        let mut other = other.clone();
        other.carry();
        self.carry();
        for (limb, other) in self.limbs.iter_mut().zip(other.limbs) {
            *limb += other;
        }
        self.carry();
    }

    /// Brings all limbs but the highest into 0..2^32. The result is the only such form of the sum.
    fn carry(&mut self) {
        let mut carry = 0;
        let (highest, lower) = self.limbs.split_last_mut().expect("there are limbs");
        for limb in lower {
            let sum = *limb + carry;
            carry = sum >> BITS;
            *limb = sum & i64::from(u32::MAX);
        }
        *highest += carry;
        self.left = PATIENCE;
    }

    /// The sign and the magnitude, in limbs of 32 bits.
    fn magnitude(&self) -> (bool, [u32; LIMBS + 1]) {
        let mut sum = self.clone();
        sum.carry();
        let is_negative = sum.limbs[LIMBS - 1] < 0;
        if is_negative {
            for limb in &mut sum.limbs {
                *limb = -*limb;
            }
            sum.carry();
        }
        let mut magnitude = [0; LIMBS + 1];
        for (limb, value) in magnitude.iter_mut().zip(sum.limbs) {
            *limb = value as u32;
        }
        magnitude[LIMBS] = (sum.limbs[LIMBS - 1] >> BITS) as u32;
        (is_negative, magnitude)
    }

    /// The `f64` that is nearest to the sum; of two, the even one. Infinite if it is too large.
    pub fn value(&self) -> f64 {
        self.over(1)
    }

    /// The `f64` that is nearest to the sum divided by `count`; zero if `count` is zero.
    pub fn over(&self, count: u64) -> f64 {
        if count == 0 {
            return 0.0;
        }
        let (is_negative, magnitude) = self.magnitude();
        // Long division. Two limbs more give the bits behind the lowest place of the sum.
        const EXTRA: usize = 2;
        let mut quotient = [0_u32; LIMBS + 1 + EXTRA];
        let mut rest = 0_u128;
        for i in (0..quotient.len()).rev() {
            let limb = i.checked_sub(EXTRA).map_or(0, |i| magnitude[i]);
            rest = rest << BITS | u128::from(limb);
            quotient[i] = (rest / u128::from(count)) as u32;
            rest %= u128::from(count);
        }
        let value = round(&quotient, -1074 - (BITS * EXTRA) as i32, rest != 0);
        if is_negative { -value } else { value }
    }

    /// Appends the sum in [`SAVED_LEN`] bytes. Equal sums have equal bytes.
    pub fn save(&self, out: &mut Vec<u8>) {
        let mut sum = self.clone();
        sum.carry();
        for limb in sum.limbs {
            out.extend_from_slice(&limb.to_le_bytes());
        }
    }

    /// The sum of these bytes; `None` if they are no saved sum.
    pub fn restore(saved: &[u8]) -> Option<Self> {
        if saved.len() != SAVED_LEN {
            return None;
        }
        let mut sum = ExactSum::default();
        for (limb, bytes) in sum.limbs.iter_mut().zip(saved.chunks_exact(8)) {
            *limb = i64::from_le_bytes(bytes.try_into().ok()?);
        }
        let (highest, lower) = sum.limbs.split_last()?;
        let is_canonical = lower.iter().all(|limb| (0..1 << BITS).contains(limb));
        (is_canonical && highest.unsigned_abs() < 1 << 62).then_some(sum)
    }
}

/// The `f64` nearest to `limbs × 2^lowest`, plus something less than its lowest bit if `has_rest`.
fn round(limbs: &[u32], lowest: i32, has_rest: bool) -> f64 {
    let bit = |at: i32| at >= 0 && limbs[at as usize / BITS] >> (at as usize % BITS) & 1 != 0;
    let Some(top_limb) = limbs.iter().rposition(|limb| *limb != 0) else {
        return 0.0;
    };
    let top = (BITS * top_limb) as i32 + 31 - limbs[top_limb].leading_zeros() as i32;
    // The place of the result's lowest bit: 53 bits, and not below the lowest place of an f64.
    let place = (top - 52).max(-1074 - lowest);
    let mut mantissa = 0_u64;
    for at in (place..=top).rev() {
        mantissa = mantissa << 1 | u64::from(bit(at));
    }
    let half = bit(place - 1);
    let below_half = || has_rest || (0..place - 1).any(bit);
    if half && (mantissa & 1 != 0 || below_half()) {
        mantissa += 1;
    }
    // An f64's bits are its exponent above its fraction, so that a carry out of the fraction raises
    // the exponent.
    let exponent = (place + lowest + 1074) as u64;
    f64::from_bits(((exponent << 52) + mantissa).min(f64::INFINITY.to_bits()))
}
