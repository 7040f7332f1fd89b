//! Sums of coefficients times kernel values: fast, tile by tile, or in LIBSVM's own order.
//!
//! LIBSVM's operations in their order (`svm_predict_values`) decide the votes in doubt. For any
//! number of these votes an image is compared with each vector once, as in LIBSVM.
//!
//! A product and the sum it goes into are rounded separately, as in programs for any x86-64
//! processor. GCC contracts the two to one rounding if it compiles for a processor with fused
//! multiply-add (aarch64; x86-64 with `-march=native`), unless `-ffp-contract=off` is set. The
//! results of such a program differ in their last bits from LIBSVM's usual build, and from ours.

use super::Pairwise;
use super::votes::pair;
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

/// Buffers for LIBSVM's operations.
#[derive(Debug, Default)]
pub(super) struct Exact {
    /// Features; empty until the first use.
    image: Vec<f64>,
    vector: Vec<f64>,
    /// The kernel's values of the vectors of each class, computed on first use.
    of_class: Vec<Vec<f64>>,
}

impl Exact {
    /// Begins with another image.
    pub(super) fn clear(&mut self) {
        self.image.clear();
    }
}

impl Pairwise {
    /// The decision value of a pair, by the operations of LIBSVM in their order.
    pub(super) fn exact(
        &self,
        exact: &mut Exact,
        image: &[u8],
        first: usize,
        second: usize,
    ) -> f64 {
        if exact.image.is_empty() {
            self.pixels.features(image, &mut exact.image);
            exact.of_class.resize(self.classes(), Vec::new());
            exact.of_class.iter_mut().for_each(Vec::clear);
        }
        let mut sum = 0.0;
        for (class, other) in [(first, second), (second, first)] {
            if exact.of_class[class].is_empty() {
                let vectors = self.starts[class]..self.starts[class + 1];
                let Exact { image, vector, of_class } = exact;
                of_class[class].extend(vectors.map(|at| {
                    self.vectors.features(at, &self.pixels, vector);
                    self.function.exact(product(self.function.is_of_distance(), image, vector))
                }));
            }
            for (coefficient, value) in self.of(class, other).iter().zip(&exact.of_class[class]) {
                sum += coefficient * value;
            }
        }
        sum - self.rho[pair(self.classes(), first, second)]
    }
}

/// The dot product or the squared distance, feature by feature, as LIBSVM computes it. A
/// feature that is zero in both adds zero here; LIBSVM skips it.
fn product(distance: bool, x: &[f64], s: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (x, s) in x.iter().zip(s) {
        sum += if distance { (x - s) * (x - s) } else { x * s };
    }
    sum
}
