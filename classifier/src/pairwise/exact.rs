//! LIBSVM's own operations in their order (`svm_predict_values`), for the votes that are in doubt.
//! However many they are, an image is compared with each vector once, as in LIBSVM.
//!
//! A product and the sum it goes into are rounded each, as in programs for any x86-64 processor.
//! Where a processor that is compiled for has a fused multiply-add (aarch64; x86-64 with
//! `-march=native`), GCC contracts the two to one rounding, if it is not told otherwise
//! (`-ffp-contract=off`); such a program differs from those in last bits, and so from us.

use super::Pairwise;
use super::votes::pair;

/// What they need room for.
#[derive(Debug, Default)]
pub(super) struct Exact {
    /// Features; empty until they are asked for.
    image: Vec<f64>,
    vector: Vec<f64>,
    /// The kernel's values of the vectors of each class, where they were asked for.
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
