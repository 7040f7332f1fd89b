//! Sums of coefficients times kernel values, tile by tile.

use super::Pairwise;
use crate::kernels::{Kernel, Simd};

/// Lanes of the sums over vectors.
const LANES: usize = 8;

/// Adds a tile's products of coefficients and values to the sums of all images.
pub(super) struct WeighedSums<'a> {
    pub(super) model: &'a Pairwise,
    /// The first vector of the tile.
    pub(super) first: usize,
    /// Vectors of the tile.
    pub(super) count: usize,
    /// `[images, count]`.
    pub(super) values: &'a [f64],
    /// `[images, classes, classes − 1]`.
    pub(super) sums: &'a mut [f64],
}

impl Kernel for WeighedSums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { model, first, count, values, sums } = self;
        let classes = model.classes();
        let all = model.vectors();
        let row = classes * (classes - 1);
        // The class of the tile's first vector: the last that does not begin behind it.
        let from = model.starts.partition_point(|&start| start <= first) - 1;
        for class in from..classes {
            let start = model.starts[class].max(first);
            let end = model.starts[class + 1].min(first + count);
            if start >= first + count {
                break;
            }
            if start == end {
                continue;
            }
            for (values, sums) in values.chunks_exact(count).zip(sums.chunks_exact_mut(row)) {
                let values = &values[start - first..end - first];
                let sums = &mut sums[class * (classes - 1)..(class + 1) * (classes - 1)];
                for (sum, coefficients) in sums.iter_mut().zip(model.coefficients.chunks_exact(all))
                {
                    *sum += dot(values, &coefficients[start..end]);
                }
            }
        }
    }
}

/// A dot product in [`LANES`] sums, always added up in the same order.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    let [a, b, c, d, e, f, g, h] = sums;
    ((a + e) + (c + g)) + ((b + f) + (d + h))
}
