//! The shape of one input: up to four dimensions, the slowest-varying first.

use std::fmt;

use crate::error::DataError;

/// Most values one input may have. Four million bytes is an image of 2048 × 2048; larger
/// images need another feature map first.
pub const MAX_INPUT_LEN: usize = 1 << 22;

/// Most dimensions a shape may have: channels, depth, rows and columns.
pub const MAX_RANK: usize = 4;

/// The shape of one input, row-major: `28x28` is 28 rows of 28 columns.
///
/// Every dimension is at least 1, and the product is at most [`MAX_INPUT_LEN`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    dims: [u32; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// The shape of an MNIST image: 28 rows of 28 columns.
    pub const MNIST: Self = Self { dims: [28, 28, 1, 1], rank: 2 };

    /// A shape of one to four dimensions.
    ///
    /// # Errors
    /// [`DataError::OutOfRange`] when there are none or more than [`MAX_RANK`] dimensions, when one
    /// of them is 0, or when their product exceeds [`MAX_INPUT_LEN`].
    pub fn new(dims: &[u32]) -> Result<Self, DataError> {
        if dims.is_empty() || dims.len() > MAX_RANK {
            return Err(DataError::out_of_range("number of dimensions", 1, MAX_RANK, dims.len()));
        }
        let mut padded = [1_u32; MAX_RANK];
        let mut len = 1_u64;
        for (slot, &dim) in padded.iter_mut().zip(dims) {
            if dim == 0 {
                return Err(DataError::out_of_range("dimension", 1, MAX_INPUT_LEN, 0));
            }
            *slot = dim;
            len = len.saturating_mul(u64::from(dim));
        }
        if len > MAX_INPUT_LEN as u64 {
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            return Err(DataError::out_of_range("values in one input", 1, MAX_INPUT_LEN, len));
        }
        // `dims.len()` is at most MAX_RANK here.
        Ok(Self { dims: padded, rank: dims.len() as u8 })
    }

    /// The dimensions, slowest-varying first; one to four of them.
    #[must_use]
    pub fn dims(&self) -> &[u32] {
        &self.dims[..usize::from(self.rank)]
    }

    /// The number of values (bytes) in one input.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "no shape is empty: every dimension is >= 1")]
    pub fn len(&self) -> usize {
        self.dims.iter().map(|&dim| dim as usize).product()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, dim) in self.dims().iter().enumerate() {
            if i > 0 {
                f.write_str("x")?;
            }
            write!(f, "{dim}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shape({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_length_and_prints_itself() {
        let shape = Shape::new(&[3, 28, 28]).unwrap();
        assert_eq!(shape.len(), 3 * 28 * 28);
        assert_eq!(shape.dims(), [3, 28, 28]);
        assert_eq!(shape.to_string(), "3x28x28");
        assert_eq!(Shape::new(&[28, 28]).unwrap(), Shape::MNIST);
    }

    #[test]
    fn rejects_no_zero_too_many_and_too_large_dimensions() {
        assert!(Shape::new(&[]).is_err());
        assert!(Shape::new(&[28, 0]).is_err());
        assert!(Shape::new(&[1, 1, 1, 1, 1]).is_err());
        assert!(Shape::new(&[u32::MAX; 4]).is_err());
        assert!(Shape::new(&[2048, 2048]).is_ok());
        let error = Shape::new(&[2048, 2049]).unwrap_err().to_string();
        assert!(error.contains("4196352") && error.contains("4194304"), "{error}");
    }
}
