//! Imported linear machines: weights in `f64`, added up in the order in which LIBLINEAR's `predict`
//! adds them, so that scores have the bits of the original's, if that rounds products and sums each
//! (`pairwise/votes.rs`).

use crate::error::ModelError;
use crate::kernels::{Isa, Kernel, Simd};
use crate::pixels::Pixels;
use crate::svm::MAX_CLASSES;
use crate::tensors::{Tensor, Tensors, check_finite};

/// Machines whose sums are made side by side.
const LANES: usize = 8;

type Lanes = [f64; LANES];

/// One machine for each class, of which the greatest score answers; or a single one for two
/// classes, whose score answers with the first label above zero, else with the second.
#[derive(Clone, Debug)]
pub struct Weights {
    machines: usize,
    dims: usize,
    pixels: Pixels,
    /// `[dims, machines / LANES]`, the last lanes filled up with zeros.
    packed: Vec<Lanes>,
    intercepts: Vec<f64>,
}

/// Buffers for scoring.
#[derive(Debug, Default)]
pub struct WeightsScratch {
    features: Vec<f64>,
    sums: Vec<Lanes>,
}

impl Weights {
    const WEIGHTS: &'static str = "linear.weights";
    const INTERCEPTS: &'static str = "linear.intercepts";

    /// `weights` are `[machines, dims]`, `dims` being the bytes of an image.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when they do not fit, [`ModelError::NotFinite`] when a number is
    /// not finite.
    pub fn new(
        pixels: Pixels,
        dims: usize,
        weights: &[f64],
        intercepts: Vec<f64>,
    ) -> Result<Self, ModelError> {
        let machines = intercepts.len();
        if !(1..=MAX_CLASSES).contains(&machines) {
            return Err(ModelError::mismatch("machines", format!("1 to {MAX_CLASSES}"), machines));
        }
        if machines.checked_mul(dims) != Some(weights.len()) {
            let expected = format!("{machines} times {dims}");
            return Err(ModelError::mismatch(Self::WEIGHTS, expected, weights.len()));
        }
        check_finite(Self::WEIGHTS, weights.iter().copied())?;
        check_finite(Self::INTERCEPTS, intercepts.iter().copied())?;
        let row = machines.div_ceil(LANES);
        let mut packed = vec![[0.0; LANES]; dims * row];
        for (machine, weights) in weights.chunks_exact(dims).enumerate() {
            for (j, &weight) in weights.iter().enumerate() {
                packed[j * row + machine / LANES][machine % LANES] = weight;
            }
        }
        Ok(Self { machines, dims, pixels, packed, intercepts })
    }

    pub fn machines(&self) -> usize {
        self.machines
    }

    /// The scores of one image, `[machines]`.
    pub fn scores<'s>(&self, isa: Isa, image: &[u8], scratch: &'s mut WeightsScratch) -> &'s [f64] {
        let WeightsScratch { features, sums } = scratch;
        self.pixels.features(image, features);
        sums.clear();
        sums.resize(self.machines.div_ceil(LANES), [0.0; LANES]);
        isa.run(Sums { features, packed: &self.packed, sums });
        let scores = &mut sums.as_flattened_mut()[..self.machines];
        for (score, intercept) in scores.iter_mut().zip(&self.intercepts) {
            *score += intercept;
        }
        scores
    }

    pub fn add_tensors(&self, tensors: &mut Tensors) {
        self.pixels.add_tensors(tensors);
        let row = self.machines.div_ceil(LANES);
        let weight =
            |machine: usize, j: usize| self.packed[j * row + machine / LANES][machine % LANES];
        let weights = (0..self.machines)
            .flat_map(|machine| (0..self.dims).map(move |j| weight(machine, j)))
            .collect::<Vec<_>>();
        let shape = [self.machines, self.dims];
        tensors.insert(Self::WEIGHTS.to_owned(), Tensor::new(&shape, weights));
        let intercepts = Tensor::new(&[self.machines], self.intercepts.clone());
        tensors.insert(Self::INTERCEPTS.to_owned(), intercepts);
    }

    /// The machines of `classes` classes over images of `dims` bytes, taken out of `tensors`.
    pub fn from_tensors(
        classes: usize,
        dims: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        let one = tensors.get(Self::INTERCEPTS).is_some_and(|tensor| tensor.shape == [1]);
        let machines = if one && classes == 2 { 1 } else { classes };
        let pixels = Pixels::from_tensors(dims, tensors)?;
        let weights: Vec<f64> = Tensor::take(tensors, Self::WEIGHTS, &[machines, dims])?;
        Self::new(pixels, dims, &weights, Tensor::take(tensors, Self::INTERCEPTS, &[machines])?)
    }
}

/// The class that scores answer with; see [`Weights`].
pub fn answer(scores: &[f64]) -> usize {
    if let &[score] = scores {
        return usize::from(score.is_nan() || score <= 0.0);
    }
    let mut best = (0, f64::NEG_INFINITY);
    for (class, &score) in scores.iter().enumerate() {
        if score > best.1 {
            best = (class, score);
        }
    }
    best.0
}

/// `sums[machine] += Σ features[j] · packed[j][machine]`: over `j` in turn, product and sum rounded
/// each.
struct Sums<'a> {
    features: &'a [f64],
    packed: &'a [Lanes],
    sums: &'a mut [Lanes],
}

impl Kernel for Sums<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { features, packed, sums } = self;
        for (&feature, weights) in features.iter().zip(packed.chunks_exact(sums.len())) {
            // Most of an image is nothing, and adding nothing changes no bit.
            if feature == 0.0 {
                continue;
            }
            for (sums, weights) in sums.iter_mut().zip(weights) {
                for (sum, weight) in sums.iter_mut().zip(weights) {
                    *sum += weight * feature;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(count: usize) -> Vec<f64> {
        let mut state = 5_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state) / f64::from(u32::MAX) - 0.5
        };
        (0..count).map(|_| next() * 10.0_f64.powf(8.0 * next())).collect()
    }

    #[test]
    fn scores_have_the_bits_of_plain_sums_with_every_isa() {
        for machines in [1, 3, 8, 11] {
            let dims = 50;
            let (weights, intercepts) = (noise(machines * dims), noise(machines));
            let pixels = Pixels::divided(255.0, false).unwrap();
            let model = Weights::new(pixels, dims, &weights, intercepts.clone()).unwrap();
            let image: Vec<u8> =
                (0..50).map(|j| (j * 97 % 256) as u8 * u8::from(j % 3 > 0)).collect();
            for isa in Isa::available() {
                let mut scratch = WeightsScratch::default();
                let scores = model.scores(isa, &image, &mut scratch);
                for (machine, score) in scores.iter().enumerate() {
                    let mut sum = 0.0;
                    for (j, &byte) in image.iter().enumerate() {
                        sum += weights[machine * dims + j] * (f64::from(byte) / 255.0);
                    }
                    assert_eq!(score.to_bits(), (sum + intercepts[machine]).to_bits(), "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn a_single_machine_gives_the_first_label_above_zero() {
        for (score, class) in [(1.0, 0), (0.0, 1), (-0.0, 1), (-1.0, 1), (f64::NAN, 1)] {
            assert_eq!(answer(&[score]), class, "{score}");
        }
        assert_eq!(answer(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(answer(&[f64::NAN, f64::NEG_INFINITY]), 0);
    }

    #[test]
    fn what_does_not_fit_or_is_not_finite_is_refused() {
        let pixels = || Pixels::divided(1.0, false).unwrap();
        assert!(Weights::new(pixels(), 2, &[1.0, 2.0], vec![0.0]).is_ok());
        assert!(Weights::new(pixels(), 2, &[1.0], vec![0.0]).is_err());
        assert!(Weights::new(pixels(), 2, &[], vec![]).is_err());
        assert!(Weights::new(pixels(), 2, &[1.0, f64::NAN], vec![0.0]).is_err());
        assert!(Weights::new(pixels(), 2, &[1.0, 2.0], vec![f64::INFINITY]).is_err());
    }
}
