//! The number of digits in a training file, derived from the numbers of its support vectors.

use super::Table;

/// Digits of the support vectors that LIBSVM writes (`svm_save_model`: `%.8g`), for any training
/// file.
pub(super) const LIBSVM_DIGITS: usize = 8;

/// Most digits to try. With one more, every `f64` is read back unchanged, which is
/// [`Writing::Full`].
const MOST_DIGITS: usize = 16;

/// A way to write a byte over a divisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writing {
    /// All digits of the quotient.
    Full,
    /// All digits of the product with the divisor's inverse, as some scale images.
    Product,
    /// So many digits, zeros in front not among them: C's `%g` writes six.
    Significant(usize),
    /// So many digits behind the point: C's `%f` writes six.
    Decimals(usize),
}

impl Writing {
    /// How the values seen of some bytes were written; of several ways the one with most digits.
    /// `None` when it is in none of these.
    pub(super) fn of(seen: &[Option<f64>; 256], divisor: f64, single: bool) -> Option<Self> {
        let digits = || (1..=MOST_DIGITS).rev();
        [Self::Full, Self::Product]
            .into_iter()
            .chain(digits().map(Self::Significant))
            .chain(digits().map(Self::Decimals))
            .find(|writing| {
                let mut known =
                    (0..=255).zip(seen).filter_map(|(byte, seen)| Some((byte, (*seen)?)));
                known.all(|(byte, value)| writing.value(byte, divisor, single) == value)
            })
    }

    /// What every byte is in this way.
    pub(super) fn table(self, divisor: f64, single: bool) -> Table {
        // There are as many bytes as places.
        Box::new(std::array::from_fn(|byte| self.value(byte as u8, divisor, single)))
    }

    /// The value read from a byte over `divisor` written in this way; `single` if it is read as
    /// `f32`.
    fn value(self, byte: u8, divisor: f64, single: bool) -> f64 {
        let quotient = f64::from(byte) / divisor;
        let value = match self {
            Self::Full => quotient,
            Self::Product if single => f64::from(f32::from(byte) * (1.0 / divisor) as f32),
            Self::Product => f64::from(byte) * (1.0 / divisor),
            Self::Significant(digits) => read(&format!("{quotient:.*e}", digits - 1)),
            Self::Decimals(digits) => read(&format!("{quotient:.digits$}")),
        };
        if single { f64::from(value as f32) } else { value }
    }
}

fn read(text: &str) -> f64 {
    text.parse().expect("a formatted number can be parsed")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_printf() {
        for (writing, text) in [
            (Writing::Significant(6), ["0.00392157", "0.0980392", "0.494118", "1"]),
            (Writing::Significant(8), ["0.0039215686", "0.098039216", "0.49411765", "1"]),
            (Writing::Decimals(6), ["0.003922", "0.098039", "0.494118", "1.000000"]),
            (
                Writing::Full,
                ["0.00392156862745098", "0.09803921568627451", "0.49411764705882355", "1"],
            ),
        ] {
            for (byte, text) in [1, 25, 126, 255].into_iter().zip(text) {
                assert_eq!(writing.value(byte, 255.0, false), read(text), "{writing:?}");
            }
        }
    }

    #[test]
    fn the_way_with_most_digits_is_found_that_gives_all_values() {
        let of = |values: &[(u8, f64)]| {
            let mut seen = [None; 256];
            values.iter().for_each(|&(byte, value)| seen[usize::from(byte)] = Some(value));
            Writing::of(&seen, 255.0, false)
        };
        assert_eq!(of(&[]), Some(Writing::Full));
        assert_eq!(of(&[(0, 0.0), (255, 1.0), (51, 0.2)]), Some(Writing::Full));
        assert_eq!(of(&[(126, 0.494118), (51, 0.2)]), Some(Writing::Significant(6)));
        assert_eq!(of(&[(126, 0.494118), (1, 0.003922)]), Some(Writing::Decimals(6)));
        assert_eq!(of(&[(126, 0.494118), (1, 0.00392)]), None);
    }
}
