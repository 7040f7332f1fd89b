//! Sixteen lanes as four NEON registers, on 64-bit Arm.

use std::arch::aarch64::*;
use std::arch::is_aarch64_feature_detected;

use super::{Chunk, Kernel, LANES, Simd};

/// NEON, which every 64-bit Arm processor in use has.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Neon(());

impl Neon {
    /// The proof, if the processor has the instructions.
    pub(super) fn detect() -> Option<Self> {
        (is_aarch64_feature_detected!("neon")).then_some(Self(()))
    }
}

impl Simd for Neon {
    type V = [float32x4_t; 4];
    const WIDE: bool = false;

    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon")]
        fn inner<K: Kernel>(simd: Neon, kernel: K) -> K::Output {
            kernel.run(simd)
        }
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { inner(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { [vdupq_n_f32(value); 4] }
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; LANES]) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        // The pointer is good for the sixteen bytes of the reference.
        unsafe {
            let bytes = vld1q_u8(from.as_ptr());
            let halves = [vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)];
            let wide = |half| [vmovl_u16(vget_low_u16(half)), vmovl_high_u16(half)];
            let ([a, b], [c, d]) = (wide(halves[0]), wide(halves[1]));
            [a, b, c, d].map(|four| vcvtq_f32_u32(four))
        }
    }

    #[inline(always)]
    fn load(self, from: &Chunk) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        // Each pointer is good for four of the sixteen values of the reference.
        unsafe { std::array::from_fn(|i| vld1q_f32(from.as_ptr().add(4 * i))) }
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut Chunk) {
        // SAFETY: `self` exists only where `detect` found these features.
        // Each pointer is good for four of the sixteen values of the reference.
        unsafe {
            for (i, v) in v.into_iter().enumerate() {
                vst1q_f32(to.as_mut_ptr().add(4 * i), v);
            }
        }
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vaddq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vsubq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vmulq_f32(a[i], b[i])) }
    }

    #[inline(always)]
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vbslq_f32(vcgtq_f32(a[i], b[i]), a[i], b[i])) }
    }

    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { std::array::from_fn(|i| vsqrtq_f32(a[i])) }
    }
}
