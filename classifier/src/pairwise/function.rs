//! Kernel functions: as LIBSVM computes them, and fast.

use crate::error::ModelError;

/// A kernel function: compares an image with a support vector.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KernelFunction {
    /// `x·s`.
    Linear,
    /// `(gamma · x·s + coef0)^degree`.
    Polynomial {
        /// The factor of the dot product; not negative.
        gamma: f64,
        /// The number added to it.
        coef0: f64,
        /// At most [`MAX_DEGREE`].
        degree: u32,
    },
    /// `exp(−gamma · ‖x − s‖²)`.
    Rbf {
        /// The factor of the squared distance; not negative.
        gamma: f64,
    },
    /// `tanh(gamma · x·s + coef0)`.
    Sigmoid {
        /// The factor of the dot product; not negative.
        gamma: f64,
        /// The number added to it.
        coef0: f64,
    },
}

/// Highest degree of a polynomial: far above any in use, and its bounds stay numbers.
pub const MAX_DEGREE: u32 = 100;

/// Greatest exponent of [`exp_of_minus`]; results of greater ones count as 0.
const MAX_EXPONENT: f64 = 690.0;

/// Relative error of [`exp_of_minus`], rounded up: the first omitted term of the series is below
/// `0.3466¹⁰/10! < 7·10⁻¹²`, and two dozen roundings are below 10⁻¹⁴.
pub(super) const EXP_ERROR: f64 = 1e-11;

/// Absolute error of [`exp_of_minus`] beyond [`MAX_EXPONENT`]: `e⁻⁶⁹⁰`, rounded up.
pub(super) const EXP_UNDERFLOW: f64 = 1e-299;

impl KernelFunction {
    /// The name in model files.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Polynomial { .. } => "polynomial",
            Self::Rbf { .. } => "rbf",
            Self::Sigmoid { .. } => "sigmoid",
        }
    }

    /// The function of this name. Parameters that it does not use may have any value.
    pub(super) fn named(
        name: &str,
        gamma: f64,
        coef0: f64,
        degree: f64,
    ) -> Result<Self, ModelError> {
        Ok(match name {
            "linear" => Self::Linear,
            "polynomial" => Self::Polynomial { gamma, coef0, degree: whole_degree(degree)? },
            "rbf" => Self::Rbf { gamma },
            "sigmoid" => Self::Sigmoid { gamma, coef0 },
            _ => {
                let expected = "linear, polynomial, rbf or sigmoid";
                return Err(ModelError::mismatch("kernel", expected, format!("{name:?}")));
            }
        })
    }

    /// Its gamma, coef0 and degree; 0 for a parameter that it does not use.
    pub(super) fn parameters(&self) -> (f64, f64, u32) {
        match *self {
            Self::Linear => (0.0, 0.0, 0),
            Self::Polynomial { gamma, coef0, degree } => (gamma, coef0, degree),
            Self::Rbf { gamma } => (gamma, 0.0, 0),
            Self::Sigmoid { gamma, coef0 } => (gamma, coef0, 0),
        }
    }

    /// # Errors
    /// [`ModelError::Mismatch`] when a parameter is out of its range.
    pub(super) fn check(&self) -> Result<(), ModelError> {
        let (gamma, coef0, degree) = self.parameters();
        if !(gamma >= 0.0 && gamma.is_finite()) {
            return Err(ModelError::mismatch("gamma", "a finite number, not negative", gamma));
        }
        if !coef0.is_finite() {
            return Err(ModelError::mismatch("coef0", "a finite number", coef0));
        }
        whole_degree(degree.into()).map(drop)
    }

    /// Whether it is a function of the distance, not of the dot product.
    pub(super) fn is_of_distance(&self) -> bool {
        matches!(self, Self::Rbf { .. })
    }

    /// Its value from the dot product or the squared distance, by the operations of LIBSVM's
    /// `svm-predict` in their order.
    #[doc(hidden)]
    #[must_use]
    pub fn exact(&self, of: f64) -> f64 {
        match *self {
            Self::Linear => of,
            Self::Polynomial { gamma, coef0, degree } => power(gamma * of + coef0, degree),
            Self::Rbf { gamma } => (-gamma * of).exp(),
            Self::Sigmoid { gamma, coef0 } => (gamma * of + coef0).tanh(),
        }
    }

    /// Converts dot products or squared distances, in units of `unit`, to kernel values. Plain
    /// operations in one order: the same bits with every instruction set.
    #[inline(always)]
    pub(super) fn fast(&self, unit: f64, values: &mut [f64]) {
        match *self {
            Self::Linear => values.iter_mut().for_each(|value| *value *= unit),
            Self::Polynomial { gamma, coef0, degree } => {
                let gamma = gamma * unit;
                values.iter_mut().for_each(|value| *value = power(gamma * *value + coef0, degree));
            }
            Self::Rbf { gamma } => {
                let gamma = gamma * unit;
                values.iter_mut().for_each(|value| *value = exp_of_minus(gamma * *value));
            }
            Self::Sigmoid { gamma, coef0 } => {
                let gamma = gamma * unit;
                values.iter_mut().for_each(|value| {
                    let of = gamma * *value + coef0;
                    let e = exp_of_minus(2.0 * of.abs());
                    *value = ((1.0 - e) / (1.0 + e)).copysign(of);
                });
            }
        }
    }
}

/// The degree from a file, where it is a number with a fraction.
pub fn whole_degree(degree: f64) -> Result<u32, ModelError> {
    // Exact: whole numbers up to MAX_DEGREE.
    let whole = degree as u32;
    if f64::from(whole) == degree && whole <= MAX_DEGREE {
        return Ok(whole);
    }
    let expected = format!("a whole number up to {MAX_DEGREE}");
    Err(ModelError::mismatch("degree of the polynomial", expected, degree))
}

/// `base^degree` by squaring, in LIBSVM's order.
#[inline(always)]
fn power(base: f64, degree: u32) -> f64 {
    let (mut square, mut power) = (base, 1.0);
    let mut left = degree;
    while left > 0 {
        if left % 2 == 1 {
            power *= square;
        }
        square *= square;
        left /= 2;
    }
    power
}

/// `e^−z` for `z` from 0 to [`MAX_EXPONENT`]. Smaller values count as 0, greater ones as the
/// greatest; NaN stays NaN.
///
/// `z = n·ln 2 − r` with `|r| ≤ ln 2 / 2`, the series of `e^r` to its ninth power, and `2⁻ⁿ` put
/// into the exponent's bits (J.-M. Muller, "Elementary Functions", 3rd ed., chapter 11). No branch,
/// so that it is computed eight at a time.
#[inline(always)]
fn exp_of_minus(z: f64) -> f64 {
    /// 1.5 · 2⁵²: a number near it has its integer part in the low bits.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    /// ln 2 in two parts. The first has so few bits that its product with `n` is exact.
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 1/9!, 1/8!, … 1/2!.
    const TERMS: [f64; 8] = [
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
    ];
    let z = if z < 0.0 { 0.0 } else { z };
    let z = if z > MAX_EXPONENT { MAX_EXPONENT } else { z };
    let shifted = SHIFT - z * std::f64::consts::LOG2_E;
    let n = shifted - SHIFT;
    let r = (-z - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = TERMS[0];
    for term in &TERMS[1..] {
        series = series * r + term;
    }
    let series = (series * r + 1.0) * r + 1.0;
    f64::from_bits(series.to_bits().wrapping_add(shifted.to_bits() << 52))
}

const UNIT: f64 = f64::EPSILON / 2.0;

/// Covers the rounding errors of the bounds themselves.
const SLACK: f64 = 1.001;

/// The bound for one image: of decision values, in two parts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Tolerance {
    /// As a share of `Σ|α·K|`.
    pub(super) relative: f64,
    /// As a share of `Σ|α|`.
    pub(super) absolute: f64,
}

impl Tolerance {
    /// The tolerance for an image whose `x̂` has this length, among `vectors` support vectors.
    pub(super) fn of(
        function: &KernelFunction,
        accuracy: &Accuracy,
        length: f64,
        vectors: usize,
    ) -> Self {
        let Accuracy { longest, of_vectors, of_images, of_images_at_least, of_dots, of_doubles } =
            *accuracy;
        let off = of_images * length * SLACK + of_images_at_least;
        let x = (length + off) * SLACK;
        let s = (longest + of_vectors) * SLACK;
        let (eta, d) = (off + of_vectors, x + s);
        let dot = eta * d + (of_dots + 2.0 * of_doubles) * x * s;
        let sum = 4.0 * (vectors + 16) as f64 * UNIT;
        let (relative, absolute) = match *function {
            KernelFunction::Linear => (0.0, dot + sum * (x * s + dot)),
            KernelFunction::Rbf { gamma } => {
                let square =
                    eta * (2.0 * d + eta) + 2.0 * of_dots * x * s + 4.0 * of_doubles * d * d;
                ((gamma * square).exp_m1() + 2.0 * EXP_ERROR + sum, EXP_UNDERFLOW)
            }
            KernelFunction::Polynomial { gamma, coef0, degree } => {
                let (t, error) = affine(gamma, coef0, x * s, dot);
                let slope = f64::from(degree) * t.powi(degree.saturating_sub(1).cast_signed());
                let rounding = 8.0 * f64::from(degree) * UNIT + sum;
                (0.0, slope * error + rounding * t.powi(degree.cast_signed()))
            }
            KernelFunction::Sigmoid { gamma, coef0 } => {
                (0.0, affine(gamma, coef0, x * s, dot).1 + 2.0 * EXP_ERROR + sum)
            }
        };
        Self { relative: relative * SLACK, absolute: absolute * SLACK }
    }

    /// The bound of a decision value: `first` and `second` are the sums over the two classes,
    /// `weights` is `Σ|α|`, and `one_signed` says that the coefficients of either have one sign
    /// and the kernel is not negative.
    pub(super) fn bound(
        &self,
        first: f64,
        second: f64,
        rho: f64,
        weights: f64,
        one_signed: bool,
    ) -> f64 {
        // No kernel with a relative part has values above 1.
        let values = if one_signed { first.abs() + second.abs() } else { weights };
        let joined = 8.0 * UNIT * (first.abs() + second.abs() + rho.abs());
        self.relative * values * SLACK + self.absolute * weights + joined
    }
}

/// The greatest value of `gamma · dot + coef0` with a dot product up to `dot`, and its error if the
/// dot product has this `error`.
fn affine(gamma: f64, coef0: f64, dot: f64, error: f64) -> (f64, f64) {
    let greatest = gamma * (dot + error) + coef0.abs();
    (greatest * SLACK, (gamma * error + 8.0 * UNIT * greatest) * SLACK)
}

/// The terms of the error bounds; lengths in the units of features.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accuracy {
    /// The largest length of a vector.
    pub(super) longest: f64,
    /// The distance between a vector and the approximation that is used for it.
    pub(super) of_vectors: f64,
    /// The same for an image, as a share of its length.
    pub(super) of_images: f64,
    /// The same in absolute terms, for an image of any length.
    pub(super) of_images_at_least: f64,
    /// Error of a dot product as a share of the product of the lengths.
    pub(super) of_dots: f64,
    /// The same in `f64`, here and in LIBSVM.
    pub(super) of_doubles: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fast_exponential_keeps_its_promises() {
        for i in 0..400_000 {
            let z = f64::from(i) * 0.001_725;
            let (fast, exact) = (exp_of_minus(z), (-z).exp());
            assert!((fast - exact).abs() <= EXP_ERROR * exact, "{z}: {fast} {exact}");
        }
        assert_eq!(exp_of_minus(0.0), 1.0);
        assert_eq!(exp_of_minus(-3.0), 1.0);
        assert!(exp_of_minus(f64::INFINITY) < EXP_UNDERFLOW);
        assert!(exp_of_minus(f64::NAN).is_nan());
    }

    #[test]
    fn fast_values_are_near_the_exact_ones() {
        let functions = [
            KernelFunction::Linear,
            KernelFunction::Polynomial { gamma: 0.25, coef0: -1.0, degree: 5 },
            KernelFunction::Rbf { gamma: 0.125 },
            KernelFunction::Sigmoid { gamma: 0.5, coef0: -0.25 },
        ];
        for function in functions {
            for value in [0.0, 0.5, 1.0, 3.0, 17.0, 80.0] {
                let mut fast = [value * 4.0];
                function.fast(0.25, &mut fast);
                let exact = function.exact(value);
                let error = (fast[0] - exact).abs();
                assert!(error <= 2e-11 * exact.abs().max(1.0), "{function:?} of {value}: {error}");
            }
        }
    }

    #[test]
    fn powers_are_taken_by_squaring() {
        assert_eq!(power(3.0, 0), 1.0);
        assert_eq!(power(-2.0, 7), -128.0);
        assert_eq!(power(1.5, 10).to_bits(), (1.5_f64.powi(10)).to_bits());
    }
}
