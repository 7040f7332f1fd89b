//! Eigenvalues and eigenvectors of a symmetric matrix: Householder's reduction to a tridiagonal
//! one, then the QL algorithm with implicit shifts (G. H. Golub and C. F. Van Loan, "Matrix
//! Computations", 4th edition, sections 8.3.1 and 8.3.3; H. Bowdler, R. S. Martin, C. Reinsch, J.
//! H. Wilkinson, "The QR and QL algorithms for symmetric matrices", Numerische Mathematik 11,
//! 1968).
//!
//! Vectors are rows, so that the inner loops run along memory.

use std::f64::consts::PI;

/// Eigenvalues in descending order, and their eigenvectors: unit length, largest entry positive.
#[derive(Debug)]
pub(crate) struct Eigen {
    pub(crate) values: Vec<f64>,
    /// `[n][n]`, a vector per row.
    pub(crate) vectors: Vec<Vec<f64>>,
}

/// Limit of steps for an eigenvalue. A matrix that needs more has a fault, for example a NaN. A
/// usual limit is 30, and few eigenvalues need 5.
const MAX_STEPS: usize = 100;

/// Decomposes a symmetric matrix, given as rows of equal length. Numbers that are not finite give a
/// useless result, but no endless loop.
pub(crate) fn symmetric_eigen(mut a: Vec<Vec<f64>>) -> Eigen {
    let n = a.len();
    let (mut diagonal, mut beside, reflectors) = tridiagonalize(&mut a);
    let mut vectors = accumulate(n, &reflectors);
    implicit_ql(&mut diagonal, &mut beside, &mut vectors);

    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]).then(i.cmp(&j)));
    let sorted = order.iter().map(|&i| {
        let mut vector = std::mem::take(&mut vectors[i]);
        let greatest = vector.iter().fold(0.0_f64, |g, &v| if v.abs() > g.abs() { v } else { g });
        if greatest < 0.0 {
            vector.iter_mut().for_each(|v| *v = -*v);
        }
        vector
    });
    let vectors = sorted.collect();
    Eigen { values: order.iter().map(|&i| diagonal[i]).collect(), vectors }
}

/// A reflection I − 2·v·vᵀ with |v| = 1; `None` if no reflection is needed.
type Reflector = Option<Vec<f64>>;

/// Reduces `a` to T = Qᵀ·A·Q. Returns its diagonal, the entries beside the diagonal, and the
/// reflectors whose product is Q.
fn tridiagonalize(a: &mut [Vec<f64>]) -> (Vec<f64>, Vec<f64>, Vec<Reflector>) {
    let n = a.len();
    let mut reflectors = Vec::new();
    for k in 0..n.saturating_sub(2) {
        // Reflects the part of column k below the diagonal onto its first entry. The matrix is
        // symmetric, so row k has the column.
        let mut v = vec![0.0; n];
        v[k + 1..].copy_from_slice(&a[k][k + 1..]);
        let length = dot(&v, &v).sqrt();
        let rest = dot(&v[k + 2..], &v[k + 2..]);
        if rest == 0.0 {
            reflectors.push(None);
            continue;
        }
        v[k + 1] += if v[k + 1] < 0.0 { -length } else { length };
        let scale = 1.0 / dot(&v, &v).sqrt();
        v.iter_mut().for_each(|v| *v *= scale);
        // A ← A − v·wᵀ − w·vᵀ with w = 2·(A·v − (vᵀ·A·v)·v).
        let mut w: Vec<f64> =
            a.iter().enumerate().map(|(i, row)| if i < k { 0.0 } else { dot(row, &v) }).collect();
        let along = dot(&w, &v);
        w.iter_mut().zip(&v).for_each(|(w, v)| *w = 2.0 * (*w - along * v));
        for (i, row) in a.iter_mut().enumerate().skip(k) {
            let (vi, wi) = (v[i], w[i]);
            for ((entry, v), w) in row[k..].iter_mut().zip(&v[k..]).zip(&w[k..]) {
                *entry -= vi * w + wi * v;
            }
        }
        reflectors.push(Some(v));
    }
    let diagonal = (0..n).map(|i| a[i][i]).collect();
    let beside = (1..n).map(|i| a[i - 1][i]).collect();
    (diagonal, beside, reflectors)
}

/// Qᵀ, the product of the reflectors. Row i becomes the i-th eigenvector.
fn accumulate(n: usize, reflectors: &[Reflector]) -> Vec<Vec<f64>> {
    let mut rows: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let mut row = vec![0.0; n];
            row[i] = 1.0;
            row
        })
        .collect();
    // Q = H₀·H₁·…, so the rows of Qᵀ are the unit vectors, reflected by the last reflector first:
    // row·Hₖ, starting with the last k.
    for v in reflectors.iter().rev().flatten() {
        for row in &mut rows {
            let twice = 2.0 * dot(row, v);
            if twice != 0.0 {
                row.iter_mut().zip(v).for_each(|(entry, v)| *entry -= twice * v);
            }
        }
    }
    rows
}

/// Diagonalizes the tridiagonal matrix and applies the rotations to the rows of `vectors`.
fn implicit_ql(diagonal: &mut [f64], beside: &mut Vec<f64>, vectors: &mut [Vec<f64>]) {
    let n = diagonal.len();
    beside.push(0.0);
    for low in 0..n {
        for _ in 0..MAX_STEPS {
            // The block from `low` ends at the first entry that is practically zero.
            let high = (low..n - 1)
                .find(|&i| {
                    let scale = diagonal[i].abs() + diagonal[i + 1].abs();
                    beside[i].abs() <= f64::EPSILON * scale
                })
                .unwrap_or(n - 1);
            if high == low {
                break;
            }
            // Wilkinson's shift: the eigenvalue of the upper 2 × 2 block nearer to its first entry.
            let mut g = (diagonal[low + 1] - diagonal[low]) / (2.0 * beside[low]);
            let r = hypotenuse(g, 1.0);
            let signed = if g < 0.0 { -r } else { r };
            g = diagonal[high] - diagonal[low] + beside[low] / (g + signed);
            let (mut sine, mut cosine, mut shift) = (1.0, 1.0, 0.0);
            let mut broke_off = false;
            for i in (low..high).rev() {
                let f = sine * beside[i];
                let b = cosine * beside[i];
                let r = hypotenuse(f, g);
                beside[i + 1] = r;
                if r == 0.0 {
                    // The block splits here. Continue with its parts.
                    diagonal[i + 1] -= shift;
                    beside[high] = 0.0;
                    broke_off = true;
                    break;
                }
                sine = f / r;
                cosine = g / r;
                g = diagonal[i + 1] - shift;
                let r = (diagonal[i] - g) * sine + 2.0 * cosine * b;
                shift = sine * r;
                diagonal[i + 1] = g + shift;
                g = cosine * r - b;
                let (first, second) = vectors.split_at_mut(i + 1);
                for (u, v) in first[i].iter_mut().zip(&mut second[0]) {
                    let old = *v;
                    *v = sine * *u + cosine * old;
                    *u = cosine * *u - sine * old;
                }
            }
            if !broke_off {
                diagonal[low] -= shift;
                beside[low] = g;
                beside[high] = 0.0;
            }
        }
    }
}

fn hypotenuse(a: f64, b: f64) -> f64 {
    (a * a + b * b).sqrt()
}

/// Adds in eight fixed lanes, for speed and a reproducible result.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0.0; 8];
    let (a_chunks, a_rest) = a.as_chunks::<8>();
    let (b_chunks, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

/// e^x, for |x| up to about 1.
pub(crate) fn exp(x: f64) -> f64 {
    series(x, 1.0, 1.0, 0)
}

/// sin x, for |x| up to 2π.
pub(crate) fn sin(x: f64) -> f64 {
    series(-x * x, x, 2.0, 1)
}

/// cos x, for |x| up to 2π.
pub(crate) fn cos(x: f64) -> f64 {
    series(-x * x, 1.0, 2.0, 0)
}

/// cos(π·k/n). The angle is reduced to one turn while it is still a fraction.
pub(crate) fn cos_pi(k: usize, n: usize) -> f64 {
    cos(PI * (k % (2 * n)) as f64 / n as f64)
}

/// The fifth root of `x`, 0 < x ≤ 1, by Newton's method from above.
pub(crate) fn fifth_root(x: f64) -> f64 {
    let mut root = 1.0;
    // From 1 to the root of the smallest normal number there are about 650 steps by a factor of
    // 4/5. The last steps double the digits.
    for _ in 0..800 {
        let next = (4.0 * root + x / (root * root * root * root)) / 5.0;
        if next >= root {
            break;
        }
        root = next;
    }
    root
}

/// The Taylor series whose terms start at `first` and grow by `x / ((i + 1) … (i + step))`.
fn series(x: f64, first: f64, step: f64, start: u32) -> f64 {
    let mut term = first;
    let mut sum = first;
    let mut i = f64::from(start);
    for _ in 0..40 {
        let mut divisor = i + 1.0;
        if step == 2.0 {
            divisor *= i + 2.0;
        }
        term *= x / divisor;
        sum += term;
        i += step;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::super::random::Random;
    use super::*;

    fn random_symmetric(n: usize) -> Vec<Vec<f64>> {
        let mut random = Random::new(n as u64, b"a test..", 0);
        let half: Vec<Vec<f64>> =
            (0..n).map(|_| (0..n).map(|_| random.uniform() - 0.5).collect()).collect();
        (0..n).map(|i| (0..n).map(|j| half[i.max(j)][i.min(j)]).collect()).collect()
    }

    fn check(a: Vec<Vec<f64>>) {
        let n = a.len();
        let eigen = symmetric_eigen(a.clone());
        assert!(eigen.values.is_sorted_by(|x, y| x >= y));
        for (i, (value, vector)) in eigen.values.iter().zip(&eigen.vectors).enumerate() {
            for (row, entry) in a.iter().zip(vector) {
                let residual = dot(row, vector) - value * entry;
                assert!(residual.abs() < 1e-11 * n as f64, "A·v − λ·v = {residual}");
            }
            for (j, other) in eigen.vectors.iter().enumerate() {
                let expected = if i == j { 1.0 } else { 0.0 };
                assert!((dot(vector, other) - expected).abs() < 1e-11 * n as f64);
            }
            let greatest = vector.iter().map(|v| v.abs()).fold(0.0, f64::max);
            assert!(vector.contains(&greatest), "the greatest entry is positive");
        }
    }

    #[test]
    fn vectors_are_orthonormal_and_satisfy_the_equation() {
        for n in [1, 2, 3, 25, 60] {
            check(random_symmetric(n));
        }
    }

    #[test]
    fn repeated_zero_and_already_diagonal_values_are_no_trouble() {
        check(vec![vec![0.0; 4]; 4]);
        check((0..5).map(|i| (0..5).map(|j| if i == j { 2.0 } else { 0.0 }).collect()).collect());
        check(vec![vec![1.0; 6]; 6]);
        check(vec![vec![0.0, 1.0, 0.0], vec![1.0, 0.0, 0.0], vec![0.0, 0.0, -3.0]]);
    }

    #[test]
    fn a_nan_ends_too() {
        let mut a = random_symmetric(5);
        a[2][3] = f64::NAN;
        assert_eq!(symmetric_eigen(a).values.len(), 5);
    }

    #[test]
    fn agree_with_the_standard_library_to_twelve_digits() {
        for i in -60..=60 {
            let x = f64::from(i) / 10.0;
            assert!((sin(x) - x.sin()).abs() < 1e-12, "sin {x}");
            assert!((cos(x) - x.cos()).abs() < 1e-12, "cos {x}");
            let small = x / 6.0;
            assert!((exp(small) - small.exp()).abs() < 1e-14, "exp {small}");
        }
        for k in 0..300 {
            assert!((cos_pi(k, 56) - (PI * k as f64 / 56.0).cos()).abs() < 1e-12, "{k}");
        }
    }

    #[test]
    fn the_fifth_power_of_the_fifth_root_is_the_number() {
        for x in [1.0, 0.5, 1e-3, 1e-9, 1e-300] {
            assert!((fifth_root(x).powi(5) / x - 1.0).abs() < 1e-13, "{x}");
        }
    }
}
