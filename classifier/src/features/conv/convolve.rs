//! The convolution: 32 filters over all 24 × 24 patches of 5 × 5 pixels, each patch normalised by
//! its own mean and variance; both signs of every response above a threshold; pooled by triangles
//! to 4 × 4 places; square roots. 28 × 28 pixels become 4 × 4 × 64 = 1024 values.
//!
//! After A. Coates and A. Y. Ng, "Learning Feature Representations with K-means" (Neural Networks:
//! Tricks of the Trade, 2012); the two-sided threshold after the same authors' "The Importance of
//! Encoding Versus Training with Sparse Coding and Vector Quantization" (ICML 2011).
//!
//! Filters are linear, so the normalisation p ← (p − mean)/√(var + 0.01) of a patch is done after
//! them, on 32 numbers and not on 25: F·p ← (F·p − mean·ΣF)/√(var + 0.01).

use std::ops::Range;

use super::{Plane, ROW_LEN, SIDE};
use crate::kernels::{Chunk, LANES, Simd};

/// Rows and columns of a patch.
pub const PATCH: usize = 5;
/// Pixels of a patch.
pub const TAPS: usize = PATCH * PATCH;
/// Places of a patch in a row or column.
pub const PLACES: usize = SIDE - PATCH + 1;
/// Filters.
pub const FILTERS: usize = 32;
/// Responses to a patch: of each filter, both signs.
pub(super) const CHANNELS: usize = 2 * FILTERS;
/// Places that are pooled to, in a row or column.
pub(super) const POOLS: usize = 4;
/// Values of the result.
pub const POOLED: usize = POOLS * POOLS * CHANNELS;
/// Added to a patch's variance, so that faint patches stay faint.
pub(super) const VARIANCE_FLOOR: f32 = 0.01;

/// A smaller response of a filter counts as zero.
const THRESHOLD: f32 = 1.0;
const FILTER_CHUNKS: usize = FILTERS / LANES;
const CHANNEL_CHUNKS: usize = CHANNELS / LANES;
/// Chunks of the result.
pub const POOLED_CHUNKS: usize = POOLED / LANES;

/// Weight of each place in each pool along one direction: `max(0, 1 − |i − c|/6)` around c = 6(g +
/// ½) − ½.
const TRIANGLES: [[f32; PLACES]; POOLS] = {
    let mut weights = [[0.0; PLACES]; POOLS];
    let mut g = 0;
    while g < POOLS {
        let mut i = 0;
        while i < PLACES {
            // In twelfths, with whole numbers only: |i − c|/6 = |2i − 12g − 5|/12.
            let distance = (2 * i as i32 - 12 * g as i32 - 5).abs();
            if distance < 12 {
                weights[g][i] = (12 - distance) as f32 / 12.0;
            }
            i += 1;
        }
        g += 1;
    }
    weights
};

/// The places with a weight in each pool: the first, and one past the last.
const REACH: [[usize; 2]; POOLS] = {
    let mut reach = [[0; 2]; POOLS];
    let mut g = 0;
    while g < POOLS {
        let mut i = 0;
        while TRIANGLES[g][i] == 0.0 {
            i += 1;
        }
        reach[g][0] = i;
        while i < PLACES && TRIANGLES[g][i] > 0.0 {
            i += 1;
        }
        reach[g][1] = i;
        g += 1;
    }
    reach
};

/// The filters, as the kernel reads them.
#[derive(Clone, Debug)]
#[repr(align(64))]
pub struct Filters {
    /// `[tap][filter]`.
    taps: [[Chunk; FILTER_CHUNKS]; TAPS],
    /// The sum of each filter's taps.
    sums: [Chunk; FILTER_CHUNKS],
}

impl Filters {
    /// From `[filter][tap]`, a filter's taps row by row.
    pub fn new(filters: &[[f32; TAPS]; FILTERS]) -> Self {
        let mut packed = Self {
            taps: [[[0.0; LANES]; FILTER_CHUNKS]; TAPS],
            sums: [[0.0; LANES]; FILTER_CHUNKS],
        };
        for (k, filter) in filters.iter().enumerate() {
            for (t, &tap) in filter.iter().enumerate() {
                packed.taps[t][k / LANES][k % LANES] = tap;
            }
            packed.sums[k / LANES][k % LANES] = filter.iter().sum();
        }
        packed
    }

    /// The filters again: `[filter][tap]`, one after the other.
    pub fn to_vec(&self) -> Vec<f32> {
        (0..FILTERS)
            .flat_map(|k| (0..TAPS).map(move |t| (k, t)))
            .map(|(k, t)| self.taps[t][k / LANES][k % LANES])
            .collect()
    }
}

/// The 1024 pooled values of an image, `[row][column][channel]` of the pools; channels are the
/// filters' positive responses, then their negative ones.
#[inline(always)]
pub(super) fn convolve<S: Simd>(
    simd: S,
    filters: &Filters,
    plane: &Plane,
    pooled: &mut [Chunk; POOLED_CHUNKS],
) {
    pooled.fill([0.0; LANES]);
    let mut answers = Answers([[[0.0; LANES]; CHANNEL_CHUNKS]; PLACES]);
    for y in 0..PLACES {
        let statistics = Statistics::of_row(plane, y);
        if statistics.blank(0..PLACES) {
            continue;
        }
        if S::WIDE {
            for x in (0..PLACES).step_by(6) {
                answer::<S, 6>(simd, filters, plane, &statistics, [y, x], &mut answers.0);
            }
        } else {
            for x in (0..PLACES).step_by(3) {
                answer::<S, 3>(simd, filters, plane, &statistics, [y, x], &mut answers.0);
            }
        }
        for g in 0..POOLS {
            if statistics.blank(REACH[g][0]..REACH[g][1]) {
                continue;
            }
            let mut sums = [simd.splat(0.0); CHANNEL_CHUNKS];
            let [from, to] = REACH[g];
            for (weight, answers) in TRIANGLES[g][from..to].iter().zip(&answers.0[from..to]) {
                let weight = simd.splat(*weight);
                for (sum, answer) in sums.iter_mut().zip(answers) {
                    *sum = simd.mul_add(weight, simd.load(answer), *sum);
                }
            }
            for (row, triangle) in TRIANGLES.iter().enumerate() {
                if triangle[y] > 0.0 {
                    let weight = simd.splat(triangle[y]);
                    let at = (row * POOLS + g) * CHANNEL_CHUNKS;
                    for (pool, sum) in pooled[at..at + CHANNEL_CHUNKS].iter_mut().zip(sums) {
                        simd.store(simd.mul_add(weight, sum, simd.load(pool)), pool);
                    }
                }
            }
        }
    }
    for pool in pooled {
        simd.store(simd.sqrt(simd.load(pool)), pool);
    }
}

/// The responses to the patches of a row, at the beginning of a cache line.
#[repr(align(64))]
struct Answers([[Chunk; CHANNEL_CHUNKS]; PLACES]);

/// The thresholded responses to the patches at `(y, x)` to `(y, x + P − 1)`.
#[inline(always)]
fn answer<S: Simd, const P: usize>(
    simd: S,
    filters: &Filters,
    plane: &Plane,
    statistics: &Statistics,
    [y, x]: [usize; 2],
    answers: &mut [[Chunk; CHANNEL_CHUNKS]; PLACES],
) {
    // Many patches around a digit are blank, and the response to a blank patch is exactly zero.
    if statistics.blank(x..x + P) {
        answers[x..x + P].fill([[0.0; LANES]; CHANNEL_CHUNKS]);
        return;
    }
    let mut sums = [[simd.splat(0.0); FILTER_CHUNKS]; P];
    for dy in 0..PATCH {
        // All the pixels this row of the patches needs, so that the loop below checks no bounds.
        let pixels = &plane.row(y + dy)[x..x + P + PATCH - 1];
        for dx in 0..PATCH {
            let taps: [S::V; FILTER_CHUNKS] =
                std::array::from_fn(|i| simd.load(&filters.taps[dy * PATCH + dx][i]));
            for p in 0..P {
                let pixel = simd.splat(pixels[p + dx]);
                for i in 0..FILTER_CHUNKS {
                    sums[p][i] = simd.mul_add(pixel, taps[i], sums[p][i]);
                }
            }
        }
    }
    let zero = simd.splat(0.0);
    let threshold = simd.splat(THRESHOLD);
    for p in 0..P {
        let mean = simd.splat(-statistics.means[x + p]);
        let scale = simd.splat(statistics.scales[x + p]);
        for i in 0..FILTER_CHUNKS {
            let centred = simd.mul_add(mean, simd.load(&filters.sums[i]), sums[p][i]);
            let answer = simd.mul(centred, scale);
            let positive = simd.max(simd.sub(answer, threshold), zero);
            let negative = simd.max(simd.sub(simd.sub(zero, answer), threshold), zero);
            simd.store(positive, &mut answers[x + p][i]);
            simd.store(negative, &mut answers[x + p][FILTER_CHUNKS + i]);
        }
    }
}

/// Mean, variance and 1/√(variance + 0.01) of the patches of one row of places.
pub struct Statistics {
    pub means: [f32; PLACES],
    pub variances: [f32; PLACES],
    pub scales: [f32; PLACES],
}

impl Statistics {
    /// Whether all pixels of these places' patches are zero. No pixel is negative, so the mean is
    /// zero only then. (If the sum of tiny pixels underflows, the response is zero, too.)
    #[inline(always)]
    fn blank(&self, places: Range<usize>) -> bool {
        self.means[places].iter().all(|&mean| mean == 0.0)
    }

    /// The statistics of the patches with upper row `y`.
    #[inline(always)]
    pub fn of_row(plane: &Plane, y: usize) -> Self {
        let [mut sums, mut squares] = [[0.0_f32; ROW_LEN]; 2];
        for y in y..y + PATCH {
            for ((sum, square), &pixel) in sums.iter_mut().zip(&mut squares).zip(plane.row(y)) {
                *sum += pixel;
                *square += pixel * pixel;
            }
        }
        let zero = [0.0; PLACES];
        let mut statistics = Self { means: zero, variances: zero, scales: zero };
        for x in 0..PLACES {
            let five = |v: &[f32; ROW_LEN]| v[x] + v[x + 1] + v[x + 2] + v[x + 3] + v[x + 4];
            let mean = five(&sums) / TAPS as f32;
            // Rounding can make a flat patch's variance negative.
            let variance = (five(&squares) / TAPS as f32 - mean * mean).max(0.0);
            statistics.means[x] = mean;
            statistics.variances[x] = variance;
            statistics.scales[x] = 1.0 / (variance + VARIANCE_FLOOR).sqrt();
        }
        statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Isa, Kernel};

    struct Convolve<'a>(&'a Filters, &'a Plane);

    impl Kernel for Convolve<'_> {
        type Output = [Chunk; POOLED_CHUNKS];
        #[inline(always)]
        fn run<S: Simd>(self, simd: S) -> Self::Output {
            let mut pooled = [[7.0; LANES]; POOLED_CHUNKS];
            convolve(simd, self.0, self.1, &mut pooled);
            pooled
        }
    }

    fn example() -> ([[f32; TAPS]; FILTERS], Plane) {
        let mut state = 11_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let filters = std::array::from_fn(|_| std::array::from_fn(|_| 2.0 * next() - 1.0));
        let mut plane = Plane::ZERO;
        for y in 3..25 {
            for x in 5..23 {
                plane.row_mut(y)[x] = (next() * 1.5 - 0.25).clamp(0.0, 1.0);
            }
        }
        (filters, plane)
    }

    /// The steps at the top, one after the other, in double precision.
    fn reference(filters: &[[f32; TAPS]; FILTERS], plane: &Plane) -> Vec<f64> {
        let mut pooled = vec![0.0; POOLED];
        for y in 0..24 {
            for x in 0..24 {
                let patch: Vec<f64> =
                    (0..25).map(|t| f64::from(plane.row(y + t / 5)[x + t % 5])).collect();
                let mean = patch.iter().sum::<f64>() / 25.0;
                let variance = patch.iter().map(|p| (p - mean).powi(2)).sum::<f64>() / 25.0;
                for (k, filter) in filters.iter().enumerate() {
                    let dot: f64 =
                        filter.iter().zip(&patch).map(|(&f, p)| f64::from(f) * (p - mean)).sum();
                    let answer = dot / (variance + 0.01).sqrt();
                    for (sign, channel) in [(1.0, k), (-1.0, 32 + k)] {
                        let value = (sign * answer - 1.0).max(0.0);
                        for gy in 0..4 {
                            for gx in 0..4 {
                                let weight = |i: usize, g: usize| {
                                    let centre = 6.0 * (g as f64 + 0.5) - 0.5;
                                    (1.0 - (i as f64 - centre).abs() / 6.0).max(0.0)
                                };
                                pooled[(gy * 4 + gx) * 64 + channel] +=
                                    weight(y, gy) * weight(x, gx) * value;
                            }
                        }
                    }
                }
            }
        }
        pooled.into_iter().map(f64::sqrt).collect()
    }

    #[test]
    fn is_what_the_steps_say() {
        let (filters, dense) = example();
        // Single pixels far from each other: a skipped patch must really be blank.
        let mut sparse = Plane::ZERO;
        for (y, x) in [(0, 0), (3, 14), (14, 2), (15, 27), (27, 13)] {
            sparse.row_mut(y)[x] = 0.5;
        }
        for (plane, least) in [(dense, 500), (sparse, 50)] {
            let got = Isa::best().run(Convolve(&Filters::new(&filters), &plane));
            let expected = reference(&filters, &plane);
            assert!(expected.iter().filter(|&&value| value > 0.1).count() > least);
            for (i, (got, expected)) in got.as_flattened().iter().zip(expected).enumerate() {
                // A square root near zero magnifies rounding errors.
                assert!((f64::from(*got) - expected).abs() < 2e-3, "{i}: {got}, {expected}");
            }
        }
    }

    #[test]
    fn every_isa_gives_the_same_bits() {
        let (filters, plane) = example();
        let filters = Filters::new(&filters);
        let expected = Isa::available()[0].run(Convolve(&filters, &plane));
        for isa in Isa::available() {
            assert_eq!(isa.run(Convolve(&filters, &plane)), expected, "{isa:?}");
        }
    }

    #[test]
    fn filters_come_back_as_they_went_in() {
        let (filters, _) = example();
        assert_eq!(Filters::new(&filters).to_vec(), filters.as_flattened());
    }

    #[test]
    fn triangles_are_those_of_the_formula() {
        for (g, triangle) in TRIANGLES.iter().enumerate() {
            for (i, &weight) in triangle.iter().enumerate() {
                let centre = 6.0 * (g as f32 + 0.5) - 0.5;
                let expected = (1.0 - (i as f32 - centre).abs() / 6.0).max(0.0);
                assert!((weight - expected).abs() < 1e-6, "pool {g}, place {i}");
            }
        }
    }
}
