//! Sixteen lanes as an array, for any processor: loops of a fixed length, which the compiler turns
//! into the target's vector instructions (SSE2 on x86-64).
//!
//! Where the target has no fused multiply-add, [`fused`] computes it in double precision.

use super::{Chunk, Kernel, LANES, Simd};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Portable;

impl Simd for Portable {
    type V = [f32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; LANES]
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V {
        from.map(f32::from)
    }

    #[inline(always)]
    fn load(self, from: &Chunk) -> Self::V {
        *from
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut Chunk) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        if HAS_FUSED { std::array::from_fn(|i| a[i].mul_add(b[i], c[i])) } else { fused(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        a.map(f32::sqrt)
    }
}

/// Whether `f32::mul_add` is an instruction of the target and not a call.
const HAS_FUSED: bool =
    cfg!(any(target_feature = "fma", target_arch = "aarch64", target_arch = "riscv64"));

/// `a * b + c`, rounded once, without an instruction for it.
///
/// The product of two `f32` is exact as an `f64`: 48 bits of 53. So the sum is rounded twice, to 53
/// bits and to 24, and that differs from rounding once only where the first rounding has left a
/// number half-way between two `f32` that the exact sum is not. Sums that may be such are computed
/// anew by [`f32::mul_add`], which is exact and slow:
///
/// * of the numbers that are normal as `f32`, those with a one and 28 zeros behind the 24 bits
///   kept;
/// * all below [`f32::MIN_POSITIVE`] but zero (which is exact), where fewer bits are kept.
///
/// (S. Boldo and G. Melquiond, "Emulation of FMA and Correctly Rounded Sums: Proved Algorithms
/// Using Rounding to Odd", IEEE Trans. Computers 57, 2008, show when double rounding is innocuous.)
#[inline(always)]
fn fused(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
    let sums: [f64; LANES] =
        std::array::from_fn(|i| f64::from(a[i]) * f64::from(b[i]) + f64::from(c[i]));
    let mut doubtful = 0;
    for sum in sums {
        doubtful |= is_doubtful(sum);
    }
    if doubtful == 0 { sums.map(|sum| sum as f32) } else { fused_slowly(a, b, c) }
}

/// Not zero for a sum whose second rounding may go the wrong way. Without a branch and in 32 bits,
/// of which SSE2 can compare four at a time.
#[inline(always)]
fn is_doubtful(sum: f64) -> u32 {
    /// The bits of an `f64` that an `f32` lacks, all of them in its lower half.
    const LOST: u32 = (1 << 29) - 1;
    const HALF: u32 = 1 << 28;
    /// Twice the upper half of the least normal `f32` as an `f64`: without its sign.
    const LEAST: u32 = (f32::MIN_POSITIVE as f64).to_bits().rotate_left(33) as u32;
    /// Makes zero the greatest of all, and unsigned numbers compare as signed ones.
    const TURN: u32 = (1_u32 << 31).wrapping_sub(2);
    let bits = sum.to_bits();
    let half_way = bits as u32 & LOST == HALF;
    let twice = ((bits >> 32) as u32) << 1;
    let small = (twice.wrapping_add(TURN) as i32) < LEAST.wrapping_add(TURN) as i32;
    u32::from(half_way) | u32::from(small)
}

#[cold]
#[inline(never)]
fn fused_slowly(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(a: f32, b: f32, c: f32) {
        let got = fused([a; LANES], [b; LANES], [c; LANES])[LANES - 1];
        let expected = a.mul_add(b, c);
        let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
        assert!(same, "{a:e} * {b:e} + {c:e}: {got:e}, expected {expected:e}");
    }

    #[test]
    fn fused_rounds_once_where_rounding_twice_goes_wrong() {
        // a·b is half a unit of c's last place, less so little that 53 bits of the sum do not show
        // it; c is odd, so rounding half-way to even goes away from it.
        let (more, less) = (1.0 + f32::EPSILON, 1.0 - f32::EPSILON);
        for (a, b, c) in [
            (more, less * 2.0_f32.powi(-24), 1.0 + f32::EPSILON),
            (
                more * 2.0_f32.powi(60),
                less * 2.0_f32.powi(40),
                (1.0 + f32::EPSILON) * 2.0_f32.powi(124),
            ),
            // The same among the subnormal numbers, where fewer bits are kept.
            (more * 2.0_f32.powi(-75), less * 2.0_f32.powi(-75), f32::from_bits(0x0040_0001)),
        ] {
            for (a, c) in [(a, c), (-a, -c)] {
                let twice = (f64::from(a) * f64::from(b) + f64::from(c)) as f32;
                assert_ne!(twice, a.mul_add(b, c), "{a:e}: this sum needs no care");
                check(a, b, c);
                check(-a, b, c);
            }
        }
    }

    #[test]
    fn sums_of_zero_and_exact_ones_are_not_doubtful() {
        // Most sums around a digit are of this kind.
        for sum in [0.0, -0.0, 1.0, -2.5, 255.0, f64::from(f32::MIN_POSITIVE), f64::from(f32::MAX)]
        {
            assert_eq!(is_doubtful(sum), 0, "{sum:e}");
        }
        let below = f64::from(f32::MIN_POSITIVE.next_down());
        for sum in [below, -below, 2.0_f64.powi(-298), 1.0 + 2.0_f64.powi(-24)] {
            assert_eq!(is_doubtful(sum), 1, "{sum:e}");
        }
    }

    #[test]
    fn fused_is_what_the_standard_library_computes() {
        let mut state = 7_u64;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 32) as u32
        };
        for round in 0..300_000 {
            let [a, b, c] = [next(), next(), next()].map(f32::from_bits);
            check(a, b, c);
            // c near −a·b and near the subnormal numbers, where things are difficult.
            check(a, b, f32::from_bits((-(a * b)).to_bits().wrapping_add(round % 5)));
            let small = f32::from_bits(next() & 0x80ff_ffff);
            check(f32::from_bits(next() & 0x1fff_ffff | 0x2000_0000), 1e-19, small);
        }
    }
}
