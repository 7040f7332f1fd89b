//! One-vs-rest linear support vector machines: one weight vector and one intercept per class. The
//! class whose score `w·x + b` is greatest is the answer (R. Rifkin and A. Klautau, "In Defense of
//! One-Vs-All Classification", JMLR 5, 2004).

use ndarray::{Array1, Array2, ArrayView1, ArrayView2};

use crate::error::ModelError;
use crate::kernels::{Chunk, Chunks, Dots, Isa, chunks};
use crate::tensors::check_finite;

/// Most classes a model may have; answers are `u16` labels.
pub const MAX_CLASSES: usize = 65_535;

/// Weights `[classes, dims]` and intercepts `[classes]`.
#[derive(Clone, Debug)]
pub struct LinearSvm {
    weights: Array2<f32>,
    intercepts: Array1<f32>,
    /// The weights for the kernel, each row padded with zeros to whole chunks.
    packed: Chunks,
}

impl LinearSvm {
    /// One machine per row of `weights` (`[classes, dims]`), with its intercept.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when there are no classes or more than [`MAX_CLASSES`], no
    /// dimensions, or not one intercept per class; [`ModelError::NotFinite`] when a number is
    /// not finite.
    pub fn new(weights: Array2<f32>, intercepts: Array1<f32>) -> Result<Self, ModelError> {
        let (classes, dims) = weights.dim();
        if classes == 0 || classes > MAX_CLASSES {
            return Err(ModelError::mismatch("classes", format!("1 to {MAX_CLASSES}"), classes));
        }
        if dims == 0 {
            return Err(ModelError::mismatch("svm.weights", "at least one dimension", 0));
        }
        if intercepts.len() != classes {
            return Err(ModelError::mismatch("svm.intercepts", classes, intercepts.len()));
        }
        check_finite("svm.weights", weights.iter().copied())?;
        check_finite("svm.intercepts", intercepts.iter().copied())?;
        let mut packed = Chunks::zeros(classes * chunks(dims));
        for (row, packed) in weights.outer_iter().zip(packed.chunks_exact_mut(chunks(dims))) {
            for (value, slot) in row.iter().zip(packed.as_flattened_mut()) {
                *slot = *value;
            }
        }
        Ok(Self { weights, intercepts, packed })
    }

    /// Number of classes.
    #[must_use]
    pub fn classes(&self) -> usize {
        self.intercepts.len()
    }

    /// Number of features each class weighs.
    #[must_use]
    pub fn dims(&self) -> usize {
        self.weights.ncols()
    }

    /// The weights, `[classes, dims]`.
    #[must_use]
    pub fn weights(&self) -> ArrayView2<'_, f32> {
        self.weights.view()
    }

    /// The intercepts, `[classes]`.
    #[must_use]
    pub fn intercepts(&self) -> ArrayView1<'_, f32> {
        self.intercepts.view()
    }

    /// Scores of a block of inputs: the matrix product `x · weightsᵀ + intercepts`.
    ///
    /// `x` holds `[inputs, chunks(dims)]` chunks, zero in the padding; `scores` `[inputs,
    /// classes]`. Every score is summed in the same order, at any position of its input in a block
    /// of any size.
    #[doc(hidden)]
    pub fn scores(&self, isa: Isa, x: &[Chunk], scores: &mut [f32]) {
        isa.run(Dots { row: chunks(self.dims()), x, w: &self.packed, out: &mut *scores });
        for scores in scores.chunks_exact_mut(self.classes()) {
            for (score, intercept) in scores.iter_mut().zip(&self.intercepts) {
                *score += intercept;
            }
        }
    }
}

/// The index of the greatest score, and the first of equal scores. A NaN is never the greatest. If
/// no score is greater than minus infinity, the answer is 0.
#[must_use]
pub fn argmax(scores: &[f32]) -> usize {
    let mut best = (0, f32::NEG_INFINITY);
    for (i, &score) in scores.iter().enumerate() {
        if score > best.1 {
            best = (i, score);
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;
    use crate::kernels::LANES;

    #[test]
    fn ties_go_to_the_lowest_class() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0, 2.0]), 1);
        assert_eq!(argmax(&[0.0, -0.0]), 0);
        assert_eq!(argmax(&[f32::NAN, -1.0, f32::NAN]), 1);
        assert_eq!(argmax(&[f32::NAN, f32::NAN]), 0);
    }

    #[test]
    fn scores_are_the_matrix_product_plus_intercepts() {
        let weights = Array2::from_shape_fn((3, 20), |(c, j)| (c * 20 + j) as f32 * 0.25);
        let svm = LinearSvm::new(weights.clone(), array![1.0, -2.0, 0.5]).unwrap();
        let x = Array2::from_shape_fn((2, 20), |(i, j)| i as f32 + j as f32 * 0.5);
        let mut block = vec![[0.0; LANES]; 4];
        for (i, row) in x.outer_iter().enumerate() {
            for (j, &value) in row.iter().enumerate() {
                block[i * 2 + j / LANES][j % LANES] = value;
            }
        }
        let mut scores = [0.0; 6];
        svm.scores(Isa::best(), &block, &mut scores);
        // Small multiples of 1/8: exact in any order.
        let expected = x.dot(&weights.t()) + &array![1.0, -2.0, 0.5];
        assert_eq!(scores.as_slice(), expected.as_slice().unwrap());
    }

    #[test]
    fn rejects_what_is_not_finite_or_does_not_fit() {
        let error = LinearSvm::new(array![[1.0, f32::NAN]], array![0.0]).unwrap_err().to_string();
        assert!(error.contains("svm.weights") && error.contains("index 1"), "{error}");
        assert!(LinearSvm::new(array![[1.0]], array![f32::INFINITY]).is_err());
        assert!(LinearSvm::new(array![[1.0]], array![0.0, 1.0]).is_err());
        assert!(LinearSvm::new(Array2::zeros((0, 4)), Array1::zeros(0)).is_err());
        assert!(LinearSvm::new(Array2::zeros((2, 0)), Array1::zeros(2)).is_err());
        let many = MAX_CLASSES + 1;
        assert!(LinearSvm::new(Array2::zeros((many, 1)), Array1::zeros(many)).is_err());
    }
}
