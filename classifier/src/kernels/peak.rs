//! The peak arithmetic speed of a core: a lower bound for every measured time.

use std::hint::black_box;

use super::{Isa, Kernel, LANES, Simd};

/// Multiply-adds in registers, in enough independent chains for a core to start one or two in every
/// cycle.
struct Chains {
    rounds: u64,
}

impl Kernel for Chains {
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        if S::WIDE { chains::<S, 16>(simd, self.rounds) } else { chains::<S, 6>(simd, self.rounds) }
    }
}

#[inline(always)]
fn chains<S: Simd, const C: usize>(simd: S, rounds: u64) -> u64 {
    // Each chain tends to 1: no number grows, vanishes or becomes subnormal.
    let (factor, term) = (simd.splat(black_box(0.7)), simd.splat(black_box(0.3)));
    let mut values: [S::V; C] = std::array::from_fn(|c| simd.splat(c as f32));
    for _ in 0..rounds {
        for value in &mut values {
            *value = simd.mul_add(*value, factor, term);
        }
    }
    for value in values {
        black_box(simd.sum(value));
    }
    rounds * (C * LANES) as u64
}

impl Isa {
    /// Runs only multiply-adds of `f32`, as fast as this instruction set can, and returns their
    /// number: about a hundred for each of the `rounds`. It measures the peak speed of a core.
    #[must_use]
    pub fn multiply_adds(self, rounds: u64) -> u64 {
        self.run(Chains { rounds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn does_as_many_as_it_says_in_proportion_to_the_rounds() {
        for isa in Isa::available() {
            let one = isa.multiply_adds(1);
            assert!(one >= 96, "{isa:?}");
            assert_eq!(isa.multiply_adds(1000), 1000 * one);
        }
    }
}
