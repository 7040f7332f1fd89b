//! One-vs-one kernel machines, as LIBSVM trains them: a machine for each pair of classes votes for
//! one of the two, and the class with most votes is the answer (C.-C. Chang and C.-J. Lin, "LIBSVM:
//! a library for support vector machines", ACM TIST 2, 2011, section 7). Machines share their
//! support vectors, so an image is compared with each vector once.
//!
//! Images are compared in blocks with blocks of vectors, by fast operations. A vote is in doubt if
//! its value is nearer to zero than the error of these operations may be (`bounds.rs`). If the
//! answer depends on such a vote (`votes.rs`), LIBSVM's own operations decide (`sums.rs`). So the
//! answer equals LIBSVM's, even where the last bit decides.

mod function;
mod vectors;
mod votes;

use function::Tolerance;
pub use function::{KernelFunction, MAX_DEGREE, whole_degree};
pub use vectors::VectorValues;
use vectors::{Images, Vectors};
use votes::{Exact, WeighedSums};
use votes::{Votes, pairs};

use crate::error::ModelError;
use crate::kernels::Isa;
use crate::pixels::Pixels;
use crate::svm::MAX_CLASSES;
use crate::tensors::{Tensor, Tensors, check_finite};

/// Vectors of a block: their bytes stay in the L2 cache while the images pass.
const TILE: usize = 256;

/// Most images of a block: they share each read of the vectors.
const BLOCK: usize = 32;

/// Most sums of a block of images; with many classes a block has fewer images.
const MAX_SUMS: usize = 1 << 19;

/// The parts of a model.
#[derive(Clone, Debug)]
pub struct Parts {
    /// The features of an image's bytes.
    pub pixels: Pixels,
    pub function: KernelFunction,
    /// Bytes of an image.
    pub dims: usize,
    /// `[vectors, dims]`, class by class.
    pub vectors: VectorValues,
    /// Vectors of each class.
    pub counts: Vec<u32>,
    /// `[classes − 1, vectors]`: in the column of a vector of class `c`, the row `o` (`o < c`) or
    /// `o − 1` (`o > c`) is its coefficient against class `o`.
    pub coefficients: Vec<f64>,
    /// `[pairs]`, the number subtracted from the sum of each.
    pub rho: Vec<f64>,
}

/// Machines of all pairs of classes over common support vectors.
#[derive(Clone, Debug)]
pub struct Pairwise {
    pixels: Pixels,
    function: KernelFunction,
    dims: usize,
    vectors: Vectors,
    /// The first vector of each class, and the number of vectors.
    starts: Vec<usize>,
    coefficients: Vec<f64>,
    rho: Vec<f64>,
    /// `Σ|α|` of each pair.
    weights: Vec<f64>,
    /// Whether the kernel is not negative and the coefficients of a class against another have one
    /// sign.
    one_signed: bool,
}

/// Buffers for scoring.
#[derive(Debug, Default)]
pub struct PairwiseScratch {
    images: Images,
    /// `[images, TILE]`.
    values: Vec<f64>,
    /// `[images, classes, classes − 1]`: `Σα·K` of each class against each other class.
    sums: Vec<f64>,
    votes: Votes,
    exact: Exact,
}

impl Pairwise {
    /// # Errors
    /// [`ModelError`] when the parts do not fit or a number is not finite.
    pub fn new(parts: Parts) -> Result<Self, ModelError> {
        let Parts { pixels, function, dims, vectors, counts, coefficients, rho } = parts;
        let classes = counts.len();
        if !(2..=MAX_CLASSES).contains(&classes) {
            return Err(ModelError::mismatch("classes", format!("2 to {MAX_CLASSES}"), classes));
        }
        let mut starts = vec![0];
        for &count in &counts {
            starts.push(starts[starts.len() - 1] + count as usize);
        }
        let count = starts[classes];
        if count == 0 || dims == 0 {
            return Err(ModelError::mismatch("support vectors", "at least one of one byte", 0));
        }
        for (what, expected, found) in [
            (VectorValues::NAME, count.checked_mul(dims), vectors.len()),
            (Self::COEFFICIENTS, count.checked_mul(classes - 1), coefficients.len()),
            (Self::RHO, Some(pairs(classes)), rho.len()),
        ] {
            if expected != Some(found) {
                let expected = expected.map_or("fewer".to_owned(), |expected| expected.to_string());
                return Err(ModelError::mismatch(format!("numbers in {what}"), expected, found));
            }
        }
        check_finite(Self::COEFFICIENTS, coefficients.iter().copied())?;
        check_finite(Self::RHO, rho.iter().copied())?;
        function.check()?;
        let vectors = Vectors::new(vectors, dims, &pixels)?;
        let mut model = Self {
            pixels,
            function,
            dims,
            vectors,
            starts,
            coefficients,
            rho,
            weights: Vec::new(),
            one_signed: false,
        };
        model.weigh();
        Ok(model)
    }

    /// Computes the sums of coefficients for the bounds.
    fn weigh(&mut self) {
        let classes = self.classes();
        let mut one_signed = self.function.is_of_distance();
        let mut weights = Vec::with_capacity(pairs(classes));
        for first in 0..classes {
            for second in first + 1..classes {
                let mut sum = 0.0;
                for coefficients in [self.of(first, second), self.of(second, first)] {
                    let negative = |value: &f64| *value < 0.0;
                    let positive = |value: &f64| *value > 0.0;
                    one_signed &=
                        !(coefficients.iter().any(negative) && coefficients.iter().any(positive));
                    sum += coefficients.iter().map(|value| value.abs()).sum::<f64>();
                }
                weights.push(sum);
            }
        }
        (self.weights, self.one_signed) = (weights, one_signed);
    }

    pub fn classes(&self) -> usize {
        self.starts.len() - 1
    }

    /// The number of support vectors.
    pub fn vectors(&self) -> usize {
        self.vectors.count()
    }

    pub fn function(&self) -> &KernelFunction {
        &self.function
    }

    /// Whether the vectors are kept as bytes.
    pub fn is_of_bytes(&self) -> bool {
        self.vectors.are_bytes()
    }

    /// The coefficients of the vectors of `class` against `other`.
    fn of(&self, class: usize, other: usize) -> &[f64] {
        let row = if other < class { other } else { other - 1 };
        let row = &self.coefficients[row * self.vectors()..(row + 1) * self.vectors()];
        &row[self.starts[class]..self.starts[class + 1]]
    }

    /// Calls `answer(index, class)` for each image.
    pub fn classify(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        mut answer: impl FnMut(usize, usize),
    ) {
        self.for_each(isa, images, scratch, |place, votes, exact, image| {
            answer(
                place,
                votes.winner(|first, second| self.exact(exact, image, first, second) > 0.0),
            );
        });
    }

    /// Adds the votes of each class to `out`, `[images, classes]`.
    pub fn votes(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        out: &mut Vec<f32>,
    ) {
        self.for_each(isa, images, scratch, |_, votes, exact, image| {
            let votes = votes.count(|first, second| self.exact(exact, image, first, second) > 0.0);
            out.extend(votes.iter().map(|&votes| votes as f32));
        });
    }

    /// Calls back for each image with its votes, the doubtful ones open, and the means to decide
    /// them.
    fn for_each(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        mut take: impl FnMut(usize, &mut Votes, &mut Exact, &[u8]),
    ) {
        let sums = 2 * pairs(self.classes());
        let block = (MAX_SUMS / sums).clamp(1, BLOCK);
        for (number, images) in images.chunks(block).enumerate() {
            self.sum_up(isa, images, scratch);
            let PairwiseScratch { images: block_images, sums: all_sums, votes, exact, .. } =
                scratch;
            for (at, (image, sums)) in images.iter().zip(all_sums.chunks_exact(sums)).enumerate() {
                let length = self.vectors.length(block_images, at);
                self.vote(length, sums, votes);
                exact.clear();
                take(number * block + at, votes, exact, image);
            }
        }
    }

    /// The sums of all classes of a block of images.
    fn sum_up(&self, isa: Isa, images: &[&[u8]], scratch: &mut PairwiseScratch) {
        let PairwiseScratch { images: block, values, sums, .. } = scratch;
        sums.clear();
        sums.resize(images.len() * 2 * pairs(self.classes()), 0.0);
        self.vectors.lay_out(isa, &self.pixels, images, block);
        for first in (0..self.vectors()).step_by(TILE) {
            let count = TILE.min(self.vectors() - first);
            self.vectors.compare(isa, &self.function, (first, count), block, values);
            isa.run(WeighedSums { model: self, first, count, values, sums });
        }
    }

    /// Votes of all pairs, from the sums of one image whose length is `length`.
    fn vote(&self, length: f64, sums: &[f64], votes: &mut Votes) {
        votes.clear(self.classes());
        self.decide(length, sums, |first, second, value, bound| {
            // A NaN passes neither comparison.
            if value > bound {
                votes.vote(first);
            } else if value < -bound {
                votes.vote(second);
            } else {
                votes.leave_open(first, second);
            }
        });
    }

    /// The fast decision value of each pair, and the bound of its distance from LIBSVM's:
    /// `take(first, second, value, bound)`.
    fn decide(&self, length: f64, sums: &[f64], mut take: impl FnMut(usize, usize, f64, f64)) {
        let classes = self.classes();
        let accuracy = &self.vectors.accuracy;
        let tolerance = Tolerance::of(&self.function, accuracy, length, self.vectors());
        let mut place = 0;
        for first in 0..classes {
            for second in first + 1..classes {
                let of_first = sums[first * (classes - 1) + second - 1];
                let of_second = sums[second * (classes - 1) + first];
                let (rho, weights) = (self.rho[place], self.weights[place]);
                let value = of_first + of_second - rho;
                let bound = tolerance.bound(of_first, of_second, rho, weights, self.one_signed);
                take(first, second, value, bound);
                place += 1;
            }
        }
    }

    /// The fast decision value of each pair for one image, and the bound of its distance from
    /// LIBSVM's. Tests check the bounds.
    #[must_use]
    pub fn decisions(&self, image: &[u8]) -> Vec<(f64, f64)> {
        let mut scratch = PairwiseScratch::default();
        self.sum_up(Isa::best(), &[image], &mut scratch);
        let length = self.vectors.length(&scratch.images, 0);
        let mut decisions = Vec::new();
        self.decide(length, &scratch.sums, |_, _, value, bound| decisions.push((value, bound)));
        decisions
    }
}

/// Tensors of model files.
impl Pairwise {
    pub(super) const COEFFICIENTS: &'static str = "kernel.coefficients";
    pub(super) const RHO: &'static str = "kernel.rho";
    const COUNTS: &'static str = "kernel.counts";
    const PARAMETERS: &'static str = "kernel.parameters";

    pub fn add_tensors(&self, tensors: &mut Tensors) {
        self.pixels.add_tensors(tensors);
        let mut insert = |name: &str, tensor: Tensor| tensors.insert(name.to_owned(), tensor);
        let (classes, count) = (self.classes(), self.vectors());
        let counts = self.starts.windows(2).map(|two| (two[1] - two[0]) as u32).collect();
        insert(Self::COUNTS, Tensor::new::<u32>(&[classes], counts));
        insert(Self::RHO, Tensor::new(&[self.rho.len()], self.rho.clone()));
        let coefficients = self.coefficients.clone();
        insert(Self::COEFFICIENTS, Tensor::new(&[classes - 1, count], coefficients));
        let (gamma, coef0, degree) = self.function.parameters();
        insert(Self::PARAMETERS, Tensor::new(&[3], vec![gamma, coef0, f64::from(degree)]));
        self.vectors.values().add_tensors(self.dims, tensors);
    }

    /// The machines of `classes` classes over images of `dims` bytes with the kernel of this name,
    /// removed from `tensors`.
    pub fn from_tensors(
        kernel: &str,
        classes: usize,
        dims: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        if !(2..=MAX_CLASSES).contains(&classes) {
            return Err(ModelError::mismatch("classes", format!("2 to {MAX_CLASSES}"), classes));
        }
        let parameters: Vec<f64> = Tensor::take(tensors, Self::PARAMETERS, &[3])?;
        let function = KernelFunction::named(kernel, parameters[0], parameters[1], parameters[2])?;
        let counts: Vec<u32> = Tensor::take(tensors, Self::COUNTS, &[classes])?;
        let count = counts.iter().map(|&count| count as usize).sum();
        Self::new(Parts {
            pixels: Pixels::from_tensors(dims, tensors)?,
            function,
            dims,
            vectors: VectorValues::from_tensors(count, dims, tensors)?,
            counts,
            coefficients: Tensor::take(tensors, Self::COEFFICIENTS, &[classes - 1, count])?,
            rho: Tensor::take(tensors, Self::RHO, &[pairs(classes)])?,
        })
    }
}
