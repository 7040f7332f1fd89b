//! Dot products of bytes on x86-64: by AVX-512 VNNI, which multiplies and adds four bytes in one
//! instruction, or by AVX2 in sixteen bits.

use std::arch::x86_64::*;

use super::bytes::{GROUP, Step, Task};

/// AVX2.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// AVX-512 with VNNI: Intel's servers since Cascade Lake (2019), AMD since Zen 4 (2022).
#[derive(Clone, Copy)]
pub(super) struct Vnni(());

impl Avx2 {
    /// The proof, if the processor has the instructions.
    pub(super) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    pub(super) fn dots(self, task: Task<'_>) {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { avx2(task) }
    }
}

impl Vnni {
    /// The proof, if the processor has the instructions.
    pub(super) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni"))
            .then_some(Self(()))
    }

    pub(super) fn dots(self, task: Task<'_>) {
        // SAFETY: `self` exists only where `detect` found these features.
        unsafe { vnni(task) }
    }
}

/// A task in tiles of `I` images and `G` groups; the rest one by one. `$tile` is generic over both.
macro_rules! in_tiles {
    ($task:ident, $tile:ident, $images:literal, $groups:literal, $alone:literal) => {{
        let Task { steps, words, data, biases, out } = $task;
        let row = biases.len();
        for (words, out) in words.chunks($images * steps).zip(out.chunks_mut($images * row)) {
            if words.len() == $images * steps {
                in_tiles!(@groups steps, words, data, biases, out, row, $tile, $images, $groups);
            } else {
                for (words, out) in words.chunks_exact(steps).zip(out.chunks_exact_mut(row)) {
                    in_tiles!(@groups steps, words, data, biases, out, row, $tile, 1, $alone);
                }
            }
        }
    }};
    (@groups $steps:ident, $words:ident, $data:ident, $biases:ident, $out:ident, $row:ident,
     $tile:ident, $images:literal, $groups:literal) => {{
        let mut at = 0;
        while at < $row {
            let data = &$data[at / GROUP * $steps..];
            let (biases, out) = (&$biases[at..], &mut $out[at..]);
            if at + $groups * GROUP <= $row {
                $tile::<$images, $groups>($steps, $words, data, biases, out, $row);
                at += $groups * GROUP;
            } else {
                $tile::<$images, 1>($steps, $words, data, biases, out, $row);
                at += GROUP;
            }
        }
    }};
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn vnni(task: Task<'_>) {
    in_tiles!(task, tile_vnni, 8, 2, 8);
}

/// `I` images with `G` groups; `stride` is the length of a row of `out`.
#[target_feature(enable = "avx512f,avx512vnni")]
fn tile_vnni<const I: usize, const G: usize>(
    steps: usize,
    words: &[u32],
    data: &[Step],
    biases: &[i32],
    out: &mut [i32],
    stride: usize,
) {
    let words: [&[u32]; I] = std::array::from_fn(|i| &words[i * steps..(i + 1) * steps]);
    let groups: [&[Step]; G] = std::array::from_fn(|g| &data[g * steps..(g + 1) * steps]);
    let biases = biases.as_chunks::<GROUP>().0;
    let mut sums = [[_mm512_setzero_si512(); G]; I];
    for g in 0..G {
        // SAFETY: the pointer is good for the sixteen values of the array.
        let bias = unsafe { _mm512_loadu_si512(biases[g].as_ptr().cast()) };
        for sums in &mut sums {
            sums[g] = bias;
        }
    }
    for k in 0..steps {
        let step: [__m512i; G] = std::array::from_fn(|g| {
            // SAFETY: the pointer is good for the 64 bytes of the step.
            unsafe { _mm512_loadu_si512(groups[g][k].0.as_ptr().cast()) }
        });
        for i in 0..I {
            let word = _mm512_set1_epi32(words[i][k].cast_signed());
            for g in 0..G {
                sums[i][g] = _mm512_dpbusd_epi32(sums[i][g], step[g], word);
            }
        }
    }
    for i in 0..I {
        for g in 0..G {
            let out = &mut out[i * stride + g * GROUP..][..GROUP];
            // SAFETY: the pointer is good for the sixteen values of the slice.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), sums[i][g]) };
        }
    }
}

#[target_feature(enable = "avx2")]
fn avx2(task: Task<'_>) {
    in_tiles!(task, tile_avx2, 4, 1, 2);
}

/// As [`tile_vnni`]. Bytes at even and at odd places are multiplied apart, in sixteen bits, where
/// nothing saturates.
#[target_feature(enable = "avx2")]
fn tile_avx2<const I: usize, const G: usize>(
    steps: usize,
    words: &[u32],
    data: &[Step],
    _biases: &[i32],
    out: &mut [i32],
    stride: usize,
) {
    let words: [&[u32]; I] = std::array::from_fn(|i| &words[i * steps..(i + 1) * steps]);
    let low = _mm256_set1_epi16(0xff);
    for g in 0..G {
        let group = &data[g * steps..(g + 1) * steps];
        let mut sums = [[_mm256_setzero_si256(); I]; 2];
        for k in 0..steps {
            for (half, sums) in sums.iter_mut().enumerate() {
                // SAFETY: either pointer is good for half of the 64 bytes of the step.
                let bytes =
                    unsafe { _mm256_loadu_si256(group[k].0.as_ptr().add(32 * half).cast()) };
                let (even, odd) = (_mm256_and_si256(bytes, low), _mm256_srli_epi16::<8>(bytes));
                for i in 0..I {
                    let word = _mm256_set1_epi32(words[i][k].cast_signed());
                    let x = (_mm256_and_si256(word, low), _mm256_srli_epi16::<8>(word));
                    let products =
                        _mm256_add_epi32(_mm256_madd_epi16(even, x.0), _mm256_madd_epi16(odd, x.1));
                    sums[i] = _mm256_add_epi32(sums[i], products);
                }
            }
        }
        for (half, sums) in sums.iter().enumerate() {
            for (i, &sum) in sums.iter().enumerate() {
                let out = &mut out[i * stride + g * GROUP + 8 * half..][..8];
                // SAFETY: the pointer is good for the eight values of the slice.
                unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), sum) };
            }
        }
    }
}
