//! Functions of a real number by additions and multiplications alone. The functions of the standard
//! library differ in their last bits between systems, and a trained model must not.

use std::f64::consts::PI;

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
    use super::*;

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
