//! Bounds of the difference between a fast decision value and LIBSVM's.
//!
//! LIBSVM computes in `f64`, in an order of its own; the fast path computes in integers or `f32`,
//! in another order. A label can differ only if a decision value is so near to zero that its sign
//! is in doubt. So each value has a bound of the difference. If the value is not above its bound,
//! LIBSVM's own operations decide its sign (`Pairwise::exact`). **The agreement of all labels
//! depends on this bound.** The proof:
//!
//! Write `x`, `s` for an image's and a vector's features, `x̂`, `ŝ` for their approximations in the
//! fast path (multiples of the step of a byte; `f32`), `X`, `S` for upper bounds of all lengths, `D
//! = X + S`, `η` for `‖x − x̂‖ + ‖s − ŝ‖`, `g` for the rounding error of a dot product relative to
//! `X·S`, and `w` for that of LIBSVM's sums and of our sums in `f64`: `(n + 8)·u` with `u = 2⁻⁵³`,
//! `n` features (Higham, section 3.1; where both round, twice that).
//!
//! * a dot product differs by at most `η·D + (g + 2w)·X·S` (Cauchy and Schwarz);
//! * a squared distance by `η·(2D + η) + 2g·X·S + 4w·D²`: the distances differ by at most `η`
//!   (triangle);
//! * `exp(−γ·d²)` by the factor `exp(±γ·Δd²)`, a polynomial by `degree · T^(degree − 1) · Δt` (mean
//!   value), `tanh` by `Δt`; each and its own rounding;
//! * a sum of `N` products `α·K` by `Σ|α|·ΔK` and `2·(N + 16)·u·Σ|α·K|` for both roundings.
//!
//! `Σ|α·K|` needs no sum of its own for a kernel without negative values. In every model that
//! LIBSVM trains, the coefficients of one class against another have one sign. So `Σ|α·K|` is
//! `|Σα·K|` of the first class plus that of the second, and both are known.

use super::function::{EXP_ERROR, EXP_UNDERFLOW, KernelFunction};
use super::vectors::Accuracy;

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
