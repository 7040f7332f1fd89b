//! One-vs-one kernel machines, as LIBSVM trains them: a machine for each pair of classes votes for one of the two, and
//! the class with most votes is the answer (C.-C. Chang and C.-J. Lin, "LIBSVM: a library for support vector
//! machines", ACM TIST 2, 2011, section 7). Machines share their support vectors, so an image is compared with each
//! vector once.
//!
//! Images are compared in blocks with blocks of vectors, fast; where a vote hangs on a value that is nearer to zero than
//! the fast way is exact (`bounds.rs`), and the answer hangs on that vote (`votes.rs`), LIBSVM's own operations
//! decide. So the answer is LIBSVM's, also where it is a matter of the last bit.

mod bounds;
mod function;
mod vectors;
mod votes;

pub use function::{KernelFunction, MAX_DEGREE};
pub(crate) use vectors::VectorValues;

use crate::error::ModelError;
use crate::kernels::{Kernel, Level, Simd};
use crate::pixels::Pixels;
use crate::svm::MAX_CLASSES;
use crate::tensors::{Tensor, Tensors, check_finite};
use bounds::Tolerance;
use vectors::{Images, Vectors};
use votes::{Votes, pair, pairs};

/// Vectors of a block: their bytes stay in the second-level cache while the images pass.
const TILE: usize = 256;

/// Most images of a block: so many share each read of the vectors.
const BLOCK: usize = 32;

/// Most sums of a block of images; with many classes a block has fewer images.
const MAX_SUMS: usize = 1 << 19;

/// Lanes of the sums over vectors.
const LANES: usize = 8;

/// What a model is made of.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// What the bytes of an image mean.
    pub(crate) pixels: Pixels,
    pub(crate) function: KernelFunction,
    /// Bytes of an image.
    pub(crate) dims: usize,
    /// `[vectors, dims]`, class by class.
    pub(crate) vectors: VectorValues,
    /// Vectors of each class.
    pub(crate) counts: Vec<u32>,
    /// `[classes − 1, vectors]`: in the column of a vector of class `c`, the row `o` (`o < c`) or `o − 1` (`o > c`) is its
    /// coefficient against class `o`.
    pub(crate) coefficients: Vec<f64>,
    /// `[pairs]`, what is taken off the sum of each.
    pub(crate) rho: Vec<f64>,
}

/// Machines of all pairs of classes over common support vectors.
#[derive(Clone, Debug)]
pub(crate) struct Pairwise {
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
    /// Whether the kernel is not negative and the coefficients of a class against another have one sign.
    one_signed: bool,
}

/// Room for scoring.
#[derive(Debug, Default)]
pub(crate) struct PairwiseScratch {
    images: Images,
    /// `[images, TILE]`.
    values: Vec<f64>,
    /// `[images, classes, classes − 1]`: of each class against each other, `Σα·K`.
    sums: Vec<f64>,
    votes: Votes,
    exact: Exact,
}

/// What LIBSVM's own operations need room for.
#[derive(Debug, Default)]
struct Exact {
    image: Vec<f64>,
    vector: Vec<f64>,
    /// The kernel's values of the vectors of each class, where they were asked for.
    of_class: Vec<Vec<f64>>,
}

impl Pairwise {
    const COEFFICIENTS: &'static str = "kernel.coefficients";
    const RHO: &'static str = "kernel.rho";
    const COUNTS: &'static str = "kernel.counts";
    const PARAMETERS: &'static str = "kernel.parameters";

    /// # Errors
    /// [`ModelError`] when the parts do not fit or a number is not finite.
    pub(crate) fn new(parts: Parts) -> Result<Self, ModelError> {
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
        check_function(&function)?;
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

    /// Sums up what the bounds need of the coefficients.
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

    pub(crate) fn classes(&self) -> usize {
        self.starts.len() - 1
    }

    /// The number of support vectors.
    pub(crate) fn vectors(&self) -> usize {
        self.vectors.count()
    }

    pub(crate) fn function(&self) -> &KernelFunction {
        &self.function
    }

    /// Whether the vectors are kept as bytes.
    pub(crate) fn is_of_bytes(&self) -> bool {
        self.vectors.are_bytes()
    }

    /// The coefficients of the vectors of `class` against `other`.
    fn of(&self, class: usize, other: usize) -> &[f64] {
        let row = if other < class { other } else { other - 1 };
        let row = &self.coefficients[row * self.vectors()..(row + 1) * self.vectors()];
        &row[self.starts[class]..self.starts[class + 1]]
    }

    /// The class that each image belongs to: `answer(image's place, class)`.
    pub(crate) fn classify(
        &self,
        level: Level,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        mut answer: impl FnMut(usize, usize),
    ) {
        self.for_each(level, images, scratch, |place, votes, exact, image| {
            answer(
                place,
                votes.winner(|first, second| self.exact(exact, image, first, second) > 0.0),
            );
        });
    }

    /// The votes `[images, classes]` that each class gets, added to `out`.
    pub(crate) fn votes(
        &self,
        level: Level,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        out: &mut Vec<f32>,
    ) {
        self.for_each(level, images, scratch, |_, votes, exact, image| {
            let votes = votes.count(|first, second| self.exact(exact, image, first, second) > 0.0);
            out.extend(votes.iter().map(|&votes| votes as f32));
        });
    }

    /// Takes each image's votes, the doubtful ones open, and what may decide them.
    fn for_each(
        &self,
        level: Level,
        images: &[&[u8]],
        scratch: &mut PairwiseScratch,
        mut take: impl FnMut(usize, &mut Votes, &mut Exact, &[u8]),
    ) {
        let sums = 2 * pairs(self.classes());
        let block = (MAX_SUMS / sums).clamp(1, BLOCK);
        for (number, images) in images.chunks(block).enumerate() {
            self.sum_up(level, images, scratch);
            let PairwiseScratch { images: block_images, sums: all_sums, votes, exact, .. } =
                scratch;
            for (at, (image, sums)) in images.iter().zip(all_sums.chunks_exact(sums)).enumerate() {
                let length = self.vectors.length(block_images, at);
                self.vote(length, sums, votes);
                exact.image.clear();
                take(number * block + at, votes, exact, image);
            }
        }
    }

    /// The sums of all classes of a block of images.
    fn sum_up(&self, level: Level, images: &[&[u8]], scratch: &mut PairwiseScratch) {
        let PairwiseScratch { images: block, values, sums, .. } = scratch;
        sums.clear();
        sums.resize(images.len() * 2 * pairs(self.classes()), 0.0);
        self.vectors.lay_out(level, &self.pixels, images, block);
        for first in (0..self.vectors()).step_by(TILE) {
            let count = TILE.min(self.vectors() - first);
            self.vectors.compare(level, &self.function, (first, count), block, values);
            level.run(WeighedSums { model: self, first, count, values, sums });
        }
    }

    /// Votes of all pairs, from the sums of one image whose length is `length`.
    fn vote(&self, length: f64, sums: &[f64], votes: &mut Votes) {
        let classes = self.classes();
        let accuracy = &self.vectors.accuracy;
        let tolerance = Tolerance::of(&self.function, accuracy, length, self.vectors());
        votes.clear(classes);
        let mut place = 0;
        for first in 0..classes {
            for second in first + 1..classes {
                let of_first = sums[first * (classes - 1) + second - 1];
                let of_second = sums[second * (classes - 1) + first];
                let (rho, weights) = (self.rho[place], self.weights[place]);
                let value = of_first + of_second - rho;
                let bound = tolerance.bound(of_first, of_second, rho, weights, self.one_signed);
                // What is no number is beyond nothing.
                if value > bound {
                    votes.vote(first);
                } else if value < -bound {
                    votes.vote(second);
                } else {
                    votes.leave_open(first, second);
                }
                place += 1;
            }
        }
    }

    /// The decision value of a pair, by the operations of LIBSVM in their order.
    fn exact(&self, exact: &mut Exact, image: &[u8], first: usize, second: usize) -> f64 {
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

    pub(crate) fn add_tensors(&self, tensors: &mut Tensors) {
        self.pixels.add_tensors(tensors);
        let mut insert = |name: &str, tensor: Tensor| tensors.insert(name.to_owned(), tensor);
        let (classes, count) = (self.classes(), self.vectors());
        let counts = self.starts.windows(2).map(|two| (two[1] - two[0]) as u32).collect();
        insert(Self::COUNTS, Tensor::new::<u32>(&[classes], counts));
        insert(Self::RHO, Tensor::new(&[self.rho.len()], self.rho.clone()));
        let coefficients = self.coefficients.clone();
        insert(Self::COEFFICIENTS, Tensor::new(&[classes - 1, count], coefficients));
        let (gamma, coef0, degree) = match self.function {
            KernelFunction::Linear => (0.0, 0.0, 0),
            KernelFunction::Polynomial { gamma, coef0, degree } => (gamma, coef0, degree),
            KernelFunction::Rbf { gamma } => (gamma, 0.0, 0),
            KernelFunction::Sigmoid { gamma, coef0 } => (gamma, coef0, 0),
        };
        insert(Self::PARAMETERS, Tensor::new(&[3], vec![gamma, coef0, f64::from(degree)]));
        let shape = [count, self.dims];
        let vectors = match self.vectors.values() {
            VectorValues::U8(values) => Tensor::new(&shape, values),
            VectorValues::F32(values) => Tensor::new(&shape, values),
            VectorValues::F64(values) => Tensor::new(&shape, values),
        };
        insert(VectorValues::NAME, vectors);
    }

    /// The machines of `classes` classes over images of `dims` bytes with the kernel of this name, taken out of
    /// `tensors`.
    pub(crate) fn from_tensors(
        kernel: &str,
        classes: usize,
        dims: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        if !(2..=MAX_CLASSES).contains(&classes) {
            return Err(ModelError::mismatch("classes", format!("2 to {MAX_CLASSES}"), classes));
        }
        let parameters: Vec<f64> = Tensor::take(tensors, Self::PARAMETERS, &[3])?;
        let (gamma, coef0, degree) = (parameters[0], parameters[1], parameters[2]);
        let function = match kernel {
            "linear" => KernelFunction::Linear,
            "rbf" => KernelFunction::Rbf { gamma },
            "sigmoid" => KernelFunction::Sigmoid { gamma, coef0 },
            "polynomial" => {
                KernelFunction::Polynomial { gamma, coef0, degree: whole_degree(degree)? }
            }
            _ => {
                let expected = "linear, polynomial, rbf or sigmoid";
                return Err(ModelError::mismatch("kernel", expected, format!("{kernel:?}")));
            }
        };
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

/// A degree that stands in a file as a number with a fraction.
pub(crate) fn whole_degree(degree: f64) -> Result<u32, ModelError> {
    // Exact: whole numbers up to MAX_DEGREE.
    let whole = degree as u32;
    if f64::from(whole) == degree && whole <= MAX_DEGREE {
        return Ok(whole);
    }
    let expected = format!("a whole number up to {MAX_DEGREE}");
    Err(ModelError::mismatch("degree of the polynomial", expected, degree))
}

fn check_function(function: &KernelFunction) -> Result<(), ModelError> {
    let (gamma, coef0, degree) = match *function {
        KernelFunction::Linear => (0.0, 0.0, 0),
        KernelFunction::Polynomial { gamma, coef0, degree } => (gamma, coef0, degree),
        KernelFunction::Rbf { gamma } => (gamma, 0.0, 0),
        KernelFunction::Sigmoid { gamma, coef0 } => (gamma, coef0, 0),
    };
    if !(gamma >= 0.0 && gamma.is_finite()) {
        return Err(ModelError::mismatch("gamma", "a finite number, not negative", gamma));
    }
    if !coef0.is_finite() {
        return Err(ModelError::mismatch("coef0", "a finite number", coef0));
    }
    whole_degree(degree.into()).map(drop)
}

/// The dot product or the squared distance, feature by feature, as LIBSVM computes it. What is nought in both adds
/// nothing here and is left out there.
fn product(distance: bool, x: &[f64], s: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (x, s) in x.iter().zip(s) {
        sum += if distance { (x - s) * (x - s) } else { x * s };
    }
    sum
}

/// Adds a tile's products of coefficients and values to the sums of all images.
struct WeighedSums<'a> {
    model: &'a Pairwise,
    first: usize,
    count: usize,
    /// `[images, count]`.
    values: &'a [f64],
    /// `[images, classes, classes − 1]`.
    sums: &'a mut [f64],
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

#[cfg(test)]
mod tests;
