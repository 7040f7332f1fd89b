//! How far a fast decision value may be from LIBSVM's.
//!
//! LIBSVM computes in `f64`, in an order of its own; the fast way computes in integers or `f32` and
//! in another order. A label may differ only where a decision value is so near to zero that its
//! sign is in doubt. So each value comes with a bound of the difference between the two, and where
//! the value is not beyond it, the sign is found by LIBSVM's own operations (`Pairwise::exact`).
//! **Agreement hangs on the bound alone**; here is why it holds.
//!
//! Write `x`, `s` for an image's and a vector's features, `x̂`, `ŝ` for what the fast way has in
//! their place (multiples of the step of a byte; `f32`), `X`, `S` for upper bounds of all the
//! lengths, `D = X + S`, `η` for `‖x − x̂‖ + ‖s − ŝ‖`, `g` for the rounding of a dot product as a
//! share of `X·S`, and `w` for the same of LIBSVM's sums and of our sums in `f64`: `(n + 8)·u`
//! with `u = 2⁻⁵³`, `n` features (Higham, section 3.1; where both round, twice that).
//!
//! * a dot product differs by at most `η·D + (g + 2w)·X·S` (Cauchy and Schwarz);
//! * a squared distance by `η·(2D + η) + 2g·X·S + 4w·D²`: the distances differ by at most `η`
//!   (triangle);
//! * `exp(−γ·d²)` by the factor `exp(±γ·Δd²)`, a polynomial by `degree · T^(degree − 1) · Δt` (mean
//!   value), `tanh` by `Δt`; each and its own rounding;
//! * a sum of `N` products `α·K` by `Σ|α|·ΔK` and `2·(N + 16)·u·Σ|α·K|` for both roundings.
//!
//! `Σ|α·K|` need not be summed for a kernel that is nowhere negative: the coefficients of one class
//! against another have one sign, in every model that LIBSVM trains, so it is `|Σα·K|` of the one
//! class and of the other, which are there.

use super::function::{EXP_ERROR, EXP_UNDERFLOW, KernelFunction};
use super::vectors::Accuracy;

const UNIT: f64 = f64::EPSILON / 2.0;

/// Beyond all that is derived above: for the roundings of the bounds themselves.
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

/// The greatest value of `gamma · dot + coef0` with a dot product up to `dot`, and how far it may
/// be off with one that is off by `error`.
fn affine(gamma: f64, coef0: f64, dot: f64, error: f64) -> (f64, f64) {
    let greatest = gamma * (dot + error) + coef0.abs();
    (greatest * SLACK, (gamma * error + 8.0 * UNIT * greatest) * SLACK)
}
