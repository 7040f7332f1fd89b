//! What a byte of an image is to an imported model: the number that stood in its training data.

use crate::error::ModelError;
use crate::tensors::{Tensor, Tensors, check_finite};

/// The features that an imported model sees: one for each byte of an image.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pixels {
    /// The same number for a byte wherever it stands.
    Table(Box<[f64; 256]>),
    /// A line for each place: `scale · byte + offset`.
    Lines {
        /// `[bytes of an image]`.
        scale: Vec<f64>,
        /// `[bytes of an image]`.
        offset: Vec<f64>,
    },
}

/// What the bytes of images mean, and which byte each of some values is.
pub(crate) type Learnt = (Pixels, Vec<u8>);

impl Pixels {
    const TABLE: &'static str = "pixels.table";
    const SCALE: &'static str = "pixels.scale";
    const OFFSET: &'static str = "pixels.offset";

    /// Bytes over `divisor`, in the arithmetic of `f64`; or rounded to `f32`, as ONNX models take them.
    pub(crate) fn divided(divisor: f64, single: bool) -> Result<Self, ModelError> {
        if !(1.0..=65_535.0).contains(&divisor) {
            return Err(ModelError::mismatch("divisor", "1 to 65535", divisor));
        }
        let value = |byte: usize| {
            let value = byte as f64 / divisor;
            if single { f64::from(value as f32) } else { value }
        };
        Ok(Self::Table(Box::new(std::array::from_fn(value))))
    }

    /// The table that values of training data (none of them zero) show: bytes over `divisor`, each as those values have
    /// it (`0.494118` where not all digits were written); and the byte of each value. `None` when some value is no byte
    /// over `divisor`, or a byte has two values.
    pub(crate) fn learnt(
        divisor: f64,
        single: bool,
        values: impl Iterator<Item = f64>,
    ) -> Result<Option<Learnt>, ModelError> {
        let Self::Table(mut table) = Self::divided(divisor, single)? else {
            unreachable!("bytes over a divisor make a table")
        };
        let mut seen = [false; 256];
        // What is zero is not among the values.
        seen[0] = true;
        let mut bytes = Vec::new();
        for value in values {
            let Some(byte) = nearest_byte(value * divisor) else { return Ok(None) };
            let slot = &mut table[usize::from(byte)];
            if seen[usize::from(byte)] && *slot != value {
                return Ok(None);
            }
            (*slot, seen[usize::from(byte)]) = (value, true);
            bytes.push(byte);
        }
        Ok(Some((Self::Table(table), bytes)))
    }

    /// The byte whose feature at any place is `value`, to within the last digits that somebody left out.
    pub(crate) fn byte(&self, at: usize, value: f64) -> Option<u8> {
        match self {
            Self::Table(table) => {
                nearest_byte((value - table[0]) / (table[255] - table[0]) * 255.0)
            }
            Self::Lines { scale, offset } => nearest_byte((value - offset[at]) / scale[at]),
        }
    }

    /// The least and the greatest feature there is at a place.
    pub(crate) fn range(&self, at: usize) -> (f64, f64) {
        let (a, b) = (self.value(at, 0), self.value(at, 255));
        (a.min(b), a.max(b))
    }

    /// A line for each place.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`].
    pub(crate) fn lines(scale: Vec<f64>, offset: Vec<f64>) -> Result<Self, ModelError> {
        check_finite(Self::SCALE, scale.iter().copied())?;
        check_finite(Self::OFFSET, offset.iter().copied())?;
        Ok(Self::Lines { scale, offset })
    }

    /// The feature that `byte` at place `at` is.
    #[inline]
    pub(crate) fn value(&self, at: usize, byte: u8) -> f64 {
        match self {
            Self::Table(table) => table[usize::from(byte)],
            Self::Lines { scale, offset } => scale[at] * f64::from(byte) + offset[at],
        }
    }

    /// The features of an image, in `out`.
    pub(crate) fn features(&self, image: &[u8], out: &mut Vec<f64>) {
        out.clear();
        out.extend(image.iter().enumerate().map(|(at, &byte)| self.value(at, byte)));
    }

    pub(crate) fn add_tensors(&self, tensors: &mut Tensors) {
        let mut insert = |name: &str, values: Vec<f64>| {
            tensors.insert(name.to_owned(), Tensor::new(&[values.len()], values));
        };
        match self {
            Self::Table(table) => insert(Self::TABLE, table.to_vec()),
            Self::Lines { scale, offset } => {
                insert(Self::SCALE, scale.clone());
                insert(Self::OFFSET, offset.clone());
            }
        }
    }

    /// The features of images of `len` bytes, taken out of `tensors`.
    pub(crate) fn from_tensors(len: usize, tensors: &mut Tensors) -> Result<Self, ModelError> {
        if tensors.contains_key(Self::SCALE) {
            let scale = Tensor::take(tensors, Self::SCALE, &[len])?;
            return Self::lines(scale, Tensor::take(tensors, Self::OFFSET, &[len])?);
        }
        let table: Vec<f64> = Tensor::take(tensors, Self::TABLE, &[256])?;
        let table = table.try_into().expect("`take` checked the length");
        Ok(Self::Table(table))
    }
}

/// How far a number may be from a byte and still stand for it: six digits of a number below 1 are enough.
const MAX_OFF: f64 = 0.01;

fn nearest_byte(value: f64) -> Option<u8> {
    let byte = value.round();
    let near = (value - byte).abs() <= MAX_OFF && (0.0..=255.0).contains(&byte);
    // Whole, and in range.
    near.then_some(byte as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_written_with_six_digits_are_learnt_as_they_stand() {
        let six = |byte: u8| (f64::from(byte) / 255.0 * 1e6).round() / 1e6;
        let values = [1, 126, 200, 255, 126].map(six);
        let (learnt, bytes) = Pixels::learnt(255.0, false, values.into_iter()).unwrap().unwrap();
        assert_eq!(bytes, [1, 126, 200, 255, 126]);
        assert_eq!(learnt.value(0, 126), 0.494118);
        assert_eq!(learnt.value(0, 127), 127.0 / 255.0);
        assert_eq!(learnt.byte(0, 0.494118), Some(126));
        assert_eq!(learnt.byte(0, 0.4955), None);
        assert_eq!(learnt.byte(0, 1.01), None);
    }

    #[test]
    fn values_that_are_no_bytes_or_differ_are_not_learnt() {
        for values in [
            [0.5, 0.1],
            [-1.0 / 255.0, 1.0],
            [256.0 / 255.0, 1.0],
            [1e-9, 1.0],
            [0.494118, 126.0 / 255.0],
        ] {
            assert_eq!(
                Pixels::learnt(255.0, false, values.into_iter()).unwrap(),
                None,
                "{values:?}"
            );
        }
        assert!(Pixels::learnt(0.5, false, [].into_iter()).is_err());
        assert!(Pixels::divided(f64::NAN, false).is_err());
    }

    #[test]
    fn lines_are_of_their_place() {
        let lines = Pixels::lines(vec![2.0, -0.5], vec![1.0, 3.0]).unwrap();
        let mut features = Vec::new();
        lines.features(&[10, 20], &mut features);
        assert_eq!(features, [21.0, -7.0]);
        assert_eq!((lines.byte(0, 21.0), lines.byte(1, -7.0)), (Some(10), Some(20)));
        assert_eq!(lines.range(1), (-124.5, 3.0));
        assert!(Pixels::lines(vec![f64::NAN], vec![0.0]).is_err());
    }
}
