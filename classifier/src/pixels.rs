//! The features of an imported model: the numbers of its training data, one for each byte of an
//! image.

use crate::error::ModelError;
use crate::tensors::{Tensor, Tensors, check_finite};

/// The number of each byte.
pub type Table = Box<[f64; 256]>;

/// The features that an imported model sees: one for each byte of an image.
#[derive(Clone, Debug, PartialEq)]
pub enum Pixels {
    /// One number for each byte, at all positions.
    Table(Table),
    /// A linear function for each position: `scale · byte + offset`.
    Lines {
        /// `[bytes of an image]`.
        scale: Vec<f64>,
        /// `[bytes of an image]`.
        offset: Vec<f64>,
    },
    /// A table for each position; positions share tables.
    Places {
        /// At most [`MAX_TABLES`].
        tables: Vec<Table>,
        /// `[bytes of an image]`: the table of each position.
        places: Vec<u32>,
    },
}

/// The most tables, 32 MiB. There is one for each range of a feature. Most images have some
/// hundreds: the least value is 0, the greatest one of 255.
pub const MAX_TABLES: usize = 1 << 14;

/// Features derived from the values of support vectors.
#[derive(Debug, PartialEq)]
pub struct Learnt {
    /// The features of images' bytes.
    pub pixels: Pixels,
    /// The features of vectors' bytes, where they differ.
    pub of_vectors: Option<Table>,
    /// The byte of each value.
    pub bytes: Vec<u8>,
}

impl Pixels {
    const TABLE: &'static str = "pixels.table";
    const SCALE: &'static str = "pixels.scale";
    const OFFSET: &'static str = "pixels.offset";
    const TABLES: &'static str = "pixels.tables";
    const PLACES: &'static str = "pixels.places";

    /// Bytes over `divisor`, in the arithmetic of `f64`; or rounded to `f32`, as ONNX models take
    /// them.
    pub fn divided(divisor: f64, single: bool) -> Result<Self, ModelError> {
        if !(1.0..=65_535.0).contains(&divisor) {
            return Err(ModelError::mismatch("divisor", "1 to 65535", divisor));
        }
        Ok(Self::Table(Writing::Full.table(divisor, single)))
    }

    /// Derives bytes from values of training data other than zero: the byte over `divisor` of each
    /// value, and the number format of the training file (for example `0.494118`, with six digits).
    /// The format applies to absent bytes, too. `None` when a value is not a byte over `divisor`,
    /// or a byte has two values.
    ///
    /// LIBSVM writes support vectors with eight digits for any training data. If values have eight
    /// digits, images get all digits, as in `svm-predict`, and vectors get eight.
    pub fn learnt(
        divisor: f64,
        single: bool,
        values: impl Iterator<Item = f64>,
    ) -> Result<Option<Learnt>, ModelError> {
        let full = Self::divided(divisor, single)?;
        let mut seen = [None; 256];
        // Zeros are not among the values.
        seen[0] = Some(0.0);
        let mut bytes = Vec::new();
        for value in values {
            let Some(byte) = nearest_byte(value * divisor) else { return Ok(None) };
            if seen[usize::from(byte)].is_some_and(|known| known != value) {
                return Ok(None);
            }
            seen[usize::from(byte)] = Some(value);
            bytes.push(byte);
        }
        let (pixels, of_vectors) = match Writing::of(&seen, divisor, single) {
            Some(Writing::Significant(LIBSVM_DIGITS)) if !single => {
                (full, Some(Writing::Significant(LIBSVM_DIGITS).table(divisor, single)))
            }
            Some(writing) => (Self::Table(writing.table(divisor, single)), None),
            // In no known form: each byte with its number in the file, the absent bytes with all
            // digits.
            None => {
                let value = |byte: usize| seen[byte].unwrap_or(full.value(0, byte as u8));
                (Self::Table(Box::new(std::array::from_fn(value))), None)
            }
        };
        Ok(Some(Learnt { pixels, of_vectors, bytes }))
    }

    /// The byte whose feature at this place is `value`, within the rounding of written digits.
    pub fn byte(&self, at: usize, value: f64) -> Option<u8> {
        match self {
            Self::Table(table) => {
                nearest_byte((value - table[0]) / (table[255] - table[0]) * 255.0)
            }
            Self::Lines { scale, offset } => nearest_byte((value - offset[at]) / scale[at]),
            Self::Places { tables, places } => byte_in(&tables[places[at] as usize], value),
        }
    }

    /// The least and the greatest feature at a position.
    pub fn range(&self, at: usize) -> (f64, f64) {
        let (a, b) = (self.value(at, 0), self.value(at, 255));
        (a.min(b), a.max(b))
    }

    /// A linear function for each position.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`].
    pub fn lines(scale: Vec<f64>, offset: Vec<f64>) -> Result<Self, ModelError> {
        check_finite(Self::SCALE, scale.iter().copied())?;
        check_finite(Self::OFFSET, offset.iter().copied())?;
        Ok(Self::Lines { scale, offset })
    }

    /// Tables, and the table of each position.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when there are too many tables or a position has no table,
    /// [`ModelError::NotFinite`].
    pub fn places(tables: Vec<Table>, places: Vec<u32>) -> Result<Self, ModelError> {
        if tables.len() > MAX_TABLES {
            let expected = format!("at most {MAX_TABLES} (ranges that differ, and one)");
            return Err(ModelError::mismatch(Self::TABLES, expected, tables.len()));
        }
        check_finite(Self::TABLES, tables.iter().flat_map(|table| table.iter().copied()))?;
        if let Some(place) = places.iter().find(|place| **place as usize >= tables.len()) {
            let expected = format!("tables below {}", tables.len());
            return Err(ModelError::mismatch(Self::PLACES, expected, place));
        }
        Ok(Self::Places { tables, places })
    }

    /// The feature of `byte` at position `at`.
    #[inline]
    pub fn value(&self, at: usize, byte: u8) -> f64 {
        match self {
            Self::Table(table) => table[usize::from(byte)],
            Self::Lines { scale, offset } => scale[at] * f64::from(byte) + offset[at],
            Self::Places { tables, places } => tables[places[at] as usize][usize::from(byte)],
        }
    }

    /// The features of an image, in `out`.
    pub fn features(&self, image: &[u8], out: &mut Vec<f64>) {
        out.clear();
        out.extend(image.iter().enumerate().map(|(at, &byte)| self.value(at, byte)));
    }

    pub fn add_tensors(&self, tensors: &mut Tensors) {
        let row = |values: &[f64]| Tensor::new(&[values.len()], values.to_vec());
        let mut insert = |name: &str, tensor: Tensor| tensors.insert(name.to_owned(), tensor);
        match self {
            Self::Table(table) => drop(insert(Self::TABLE, row(&table[..]))),
            Self::Lines { scale, offset } => {
                insert(Self::SCALE, row(scale));
                insert(Self::OFFSET, row(offset));
            }
            Self::Places { tables, places } => {
                let values = tables.iter().flat_map(|table| table.iter().copied()).collect();
                insert(Self::TABLES, Tensor::new::<f64>(&[tables.len(), 256], values));
                insert(Self::PLACES, Tensor::new(&[places.len()], places.clone()));
            }
        }
    }

    /// The features of images of `len` bytes, removed from `tensors`.
    pub fn from_tensors(len: usize, tensors: &mut Tensors) -> Result<Self, ModelError> {
        if tensors.contains_key(Self::SCALE) {
            let scale = Tensor::take(tensors, Self::SCALE, &[len])?;
            return Self::lines(scale, Tensor::take(tensors, Self::OFFSET, &[len])?);
        }
        if let Some(tables) = tensors.get(Self::TABLES) {
            let count = tables.shape.first().copied().unwrap_or_default();
            let values: Vec<f64> = Tensor::take(tensors, Self::TABLES, &[count, 256])?;
            let tables = values.as_chunks().0.iter().map(|&table| Box::new(table)).collect();
            return Self::places(tables, Tensor::take(tensors, Self::PLACES, &[len])?);
        }
        Ok(Self::Table(take_table(tensors, Self::TABLE)?))
    }
}

/// A table, removed from `tensors`.
pub fn take_table(tensors: &mut Tensors, name: &str) -> Result<Table, ModelError> {
    let table: Vec<f64> = Tensor::take(tensors, name, &[256])?;
    Ok(table.try_into().expect("`take` checked the length"))
}

/// The largest difference between a number and the byte that it represents. Six digits of a number
/// below 1 are within it.
const MAX_OFF: f64 = 0.01;

/// The byte with the value nearest to `value` in a non-decreasing table, if it is within
/// [`MAX_OFF`].
fn byte_in(table: &[f64; 256], value: f64) -> Option<u8> {
    let step = (table[255] - table[0]) / 255.0;
    let behind = table.partition_point(|&of| of < value);
    let near = |byte: &usize| (table[*byte] - value).abs() <= MAX_OFF * step;
    // Below 256.
    [behind.min(255), behind.saturating_sub(1)].into_iter().find(near).map(|byte| byte as u8)
}

fn nearest_byte(value: f64) -> Option<u8> {
    let byte = value.round();
    let near = (value - byte).abs() <= MAX_OFF && (0.0..=255.0).contains(&byte);
    // Whole, and in range.
    near.then_some(byte as u8)
}

/// Digits of the support vectors that LIBSVM writes (`svm_save_model`: `%.8g`), for any training
/// file.
pub(super) const LIBSVM_DIGITS: usize = 8;

/// Most digits to try. With one more, every `f64` is read back unchanged, which is
/// [`Writing::Full`].
const MOST_DIGITS: usize = 16;

/// A number format for a byte over a divisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writing {
    /// All digits of the quotient.
    Full,
    /// All digits of the product with the divisor's inverse, as some scale images.
    Product,
    /// This number of digits, without leading zeros: C's `%g` writes six.
    Significant(usize),
    /// This number of digits after the point: C's `%f` writes six.
    Decimals(usize),
}

impl Writing {
    /// The format of the values of some bytes; of several possible formats the one with most
    /// digits. `None` for an unknown format.
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

    /// The number of every byte in this form.
    pub(super) fn table(self, divisor: f64, single: bool) -> Table {
        // There are as many bytes as places.
        Box::new(std::array::from_fn(|byte| self.value(byte as u8, divisor, single)))
    }

    /// The value read from a byte over `divisor` in this format; `single` if it is read as
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

    fn learn(values: &[f64]) -> Learnt {
        Pixels::learnt(255.0, false, values.iter().copied()).unwrap().unwrap()
    }

    #[test]
    fn values_written_with_six_digits_are_learnt_for_all_bytes() {
        // 126, 200 and 1, as `%g` prints them.
        let Learnt { pixels, of_vectors, bytes } = learn(&[0.494118, 0.784314, 0.00392157, 1.0]);
        assert_eq!((bytes, of_vectors), (vec![126, 200, 1, 255], None));
        assert_eq!((pixels.value(0, 126), pixels.value(0, 2)), (0.494118, 0.00784314));
        assert_eq!((pixels.value(0, 127), pixels.value(0, 51)), (0.498039, 0.2));
        assert_eq!(pixels.byte(0, 0.494118), Some(126));
        assert_eq!(pixels.byte(0, 0.4955), None);
        assert_eq!(pixels.byte(0, 1.01), None);
        // With six decimals, 1 is no more than four digits.
        let pixels = learn(&[0.494118, 0.003922]).pixels;
        assert_eq!((pixels.value(0, 2), pixels.value(0, 127)), (0.007843, 0.498039));
    }

    #[test]
    fn of_libsvms_eight_digits_vectors_have_eight_and_images_all() {
        let Learnt { pixels, of_vectors, .. } = learn(&[0.49411765, 0.0039215686]);
        assert_eq!(pixels, Pixels::divided(255.0, false).unwrap());
        let of_vectors = of_vectors.unwrap();
        assert_eq!((of_vectors[126], of_vectors[127]), (0.49411765, 0.49803922));
        // All digits, or values with at most eight: then all forms agree.
        for values in [[126.0 / 255.0, 1.0 / 255.0], [0.2, 0.4]] {
            let Learnt { pixels, of_vectors, .. } = learn(&values);
            assert_eq!((pixels, of_vectors), (Pixels::divided(255.0, false).unwrap(), None));
        }
    }

    #[test]
    fn what_is_written_in_no_way_we_know_is_taken_as_it_stands() {
        // The one of six digits, the other of five.
        let Learnt { pixels, of_vectors, .. } = learn(&[0.494118, 0.49804]);
        assert_eq!((pixels.value(0, 126), pixels.value(0, 127)), (0.494118, 0.49804));
        assert_eq!((pixels.value(0, 128), of_vectors), (128.0 / 255.0, None));
    }

    #[test]
    fn of_single_numbers_a_quotient_is_told_from_a_product() {
        let (third, by) = (3.0_f32, 1.0_f32 / 255.0);
        let quotient: Vec<f32> = (1..=255).map(|byte| f32::from(byte as u8) / 255.0).collect();
        let product: Vec<f32> = (1..=255).map(|byte| f32::from(byte as u8) * by).collect();
        assert_ne!(quotient, product);
        for (all, some) in [(&quotient, third / 255.0), (&product, third * by)] {
            let values = all[..200].iter().map(|&value| f64::from(value));
            let Learnt { pixels, of_vectors, .. } =
                Pixels::learnt(255.0, true, values).unwrap().unwrap();
            assert_eq!((pixels.value(0, 3), of_vectors), (some.into(), None));
            let values = (1..=255).map(|byte| pixels.value(0, byte));
            assert!(values.eq(all.iter().map(|&value| f64::from(value))));
        }
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

    #[test]
    fn places_share_tables_which_go_into_files_and_come_back() {
        let table = |by: f64| Box::new(std::array::from_fn(|byte| by * byte as f64));
        let tables = || vec![table(0.0), table(0.5), table(2.0)];
        let pixels = Pixels::places(tables(), vec![2, 0, 1, 2]).unwrap();
        let mut features = Vec::new();
        pixels.features(&[3, 200, 5, 0], &mut features);
        assert_eq!(features, [6.0, 0.0, 2.5, 0.0]);
        assert_eq!((pixels.range(2), pixels.range(1)), ((0.0, 127.5), (0.0, 0.0)));
        assert_eq!(
            [6.0, 6.01, 7.0, 511.0].map(|value| pixels.byte(0, value)),
            [Some(3), Some(3), None, None]
        );
        let mut tensors = Tensors::new();
        pixels.add_tensors(&mut tensors);
        let mut copy = tensors.clone();
        assert_eq!(Pixels::from_tensors(4, &mut copy).unwrap(), pixels);
        assert!(copy.is_empty());
        assert!(Pixels::from_tensors(3, &mut tensors.clone()).is_err());
        for (change, part) in [
            (Tensor::new(&[4], vec![2_u32, 0, 1, 3]), "tables below 3"),
            (Tensor::new(&[4], vec![2.0_f64, 0.0, 1.0, 2.0]), "expected U32"),
        ] {
            tensors.insert("pixels.places".to_owned(), change);
            let error = Pixels::from_tensors(4, &mut tensors.clone()).unwrap_err().to_string();
            assert!(error.contains(part), "{error:?} should contain {part:?}");
        }
        assert!(Pixels::places(vec![table(0.0); MAX_TABLES + 1], vec![]).is_err());
        assert!(Pixels::places(vec![table(f64::NAN)], vec![0]).is_err());
    }

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
