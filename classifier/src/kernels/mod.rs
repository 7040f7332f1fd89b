//! The arithmetic of all scoring, for every instruction set.
//!
//! A kernel is written once, over [`Simd`]: sixteen `f32` lanes and the few operations on them that
//! IEEE 754 rounds in exactly one way (addition, multiplication, fused multiply-add, comparison,
//! square root). Each instruction set keeps the lanes in registers of its own width; the kernel
//! fixes the order of operations. So **every instruction set gives the same bits**; they differ in
//! speed only. Sums over lanes use one fixed tree.
//!
//! This is the only module of the crate with `unsafe`: it executes instructions that a processor
//! may lack. A [`Simd`] value proves that the processor has them, and only detection creates one.
#![allow(unsafe_code)]

use std::fmt;
use std::hint::black_box;
use std::sync::OnceLock;

pub use aligned::Chunks;
pub use bytes::MAX_BYTES;
pub use dense::{AddScaled, Affine, Dots};

mod aligned;
pub(crate) mod bytes;
mod dense;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;
#[cfg(target_arch = "x86_64")]
mod x86_bytes;

/// Lanes of a vector.
pub const LANES: usize = 16;

/// Sixteen values in memory.
pub type Chunk = [f32; LANES];

/// An instruction set to compute with. All give the same bits; they differ in speed only.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Isa(Kind);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Portable(portable::Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(x86::Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(x86::Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

impl Isa {
    /// The fastest set of this processor, detected once.
    #[must_use]
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().pop().expect("the portable one is always there"))
    }

    /// All sets of this processor, the fastest last.
    #[must_use]
    pub fn available() -> Vec<Self> {
        let mut isas = vec![Self(Kind::Portable(portable::Portable))];
        #[cfg(target_arch = "x86_64")]
        {
            isas.extend(x86::Avx2::detect().map(|simd| Self(Kind::Avx2(simd))));
            isas.extend(x86::Avx512::detect().map(|simd| Self(Kind::Avx512(simd))));
        }
        #[cfg(target_arch = "aarch64")]
        isas.extend(neon::Neon::detect().map(|simd| Self(Kind::Neon(simd))));
        isas
    }

    /// Its usual name: `portable`, `avx2`, `avx512` or `neon`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable(_) => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(_) => "neon",
        }
    }

    /// Runs a kernel with this instruction set.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Kind::Portable(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Kind::Neon(simd) => simd.run(kernel),
        }
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isa({})", self.name())
    }
}

/// A computation for any instruction set. `run` must be `#[inline(always)]`, so that it is compiled
/// inside [`Simd::run`], where the instructions are enabled.
pub trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Sixteen lanes of `f32`. A value of an implementing type proves that the processor has its
/// instructions.
pub trait Simd: Copy {
    /// Sixteen lanes in registers.
    type V: Copy;

    /// Whether sixteen lanes are one register of thirty-two, so that tiles may be large.
    const WIDE: bool;

    /// Runs `kernel` compiled with these instructions.
    fn run<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, value: f32) -> Self::V;
    /// The numbers of the bytes.
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V;
    fn load(self, from: &Chunk) -> Self::V;
    fn store(self, v: Self::V, to: &mut Chunk);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a` where `a > b`, else `b`.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;

    /// The sum of the lanes: halves onto halves, always in this order.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }
}

/// Chunks that hold `len` values.
pub const fn chunks(len: usize) -> usize {
    len.div_ceil(LANES)
}

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

    /// Values of many magnitudes, so that another order of summation changes the result.
    pub(super) fn noise(count: usize, seed: u32) -> Vec<Chunk> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 65536.0 - 128.0
        };
        (0..count).map(|_| std::array::from_fn(|_| next() * next())).collect()
    }

    #[test]
    fn every_isa_gives_the_same_bits_for_every_operation() {
        struct All<'a>(&'a [Chunk]);
        impl Kernel for All<'_> {
            type Output = Vec<u32>;
            #[inline(always)]
            fn run<S: Simd>(self, simd: S) -> Vec<u32> {
                let mut bits = Vec::new();
                for three in self.0.chunks_exact(3) {
                    let [a, b, c] = [0, 1, 2].map(|i| simd.load(&three[i]));
                    let results = [
                        simd.add(a, b),
                        simd.sub(a, b),
                        simd.mul(a, b),
                        simd.mul_add(a, b, c),
                        simd.max(a, b),
                        simd.sqrt(simd.mul(a, a)),
                        simd.splat(simd.sum(a)),
                        simd.load_bytes(&three[0].map(|value| value.to_bits() as u8)),
                    ];
                    for v in results {
                        let mut lanes = [0.0; LANES];
                        simd.store(v, &mut lanes);
                        bits.extend(lanes.map(f32::to_bits));
                    }
                }
                bits
            }
        }
        let mut values = noise(300, 5);
        values[0] = [0.0; LANES];
        values[1] = [-0.0; LANES];
        values[4][3] = f32::INFINITY;
        values[5][3] = f32::NEG_INFINITY;
        let expected = Isa::available()[0].run(All(&values));
        for isa in Isa::available() {
            assert_eq!(isa.run(All(&values)), expected, "{isa:?}");
        }
    }

    #[test]
    fn does_as_many_as_it_says_in_proportion_to_the_rounds() {
        for isa in Isa::available() {
            let one = isa.multiply_adds(1);
            assert!(one >= 96, "{isa:?}");
            assert_eq!(isa.multiply_adds(1000), 1000 * one);
        }
    }
}
