//! The extent of a model's input.

use std::fmt;

use arrayvec::ArrayVec;

/// Dimensions of the largest [`Shape`]: batch, channel, row and column of images.
pub const MAX_DIMS: usize = 4;

/// The extent of an input array of bytes, outermost dimension first: `[28, 28]` for a digit.
/// A shape without dimensions means "not known".
///
/// ```
/// let shape = afterimage_core::Shape::new(&[28, 28]).unwrap();
/// assert_eq!((shape.byte_len(), shape.to_string().as_str()), (Some(784), "28×28"));
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub struct Shape(ArrayVec<u32, MAX_DIMS>);

impl Shape {
    /// A shape of these dimensions; `None` for more than [`MAX_DIMS`] of them.
    pub fn new(dims: &[u32]) -> Option<Self> {
        ArrayVec::try_from(dims).ok().map(Shape)
    }

    /// The dimensions, outermost first.
    pub fn dims(&self) -> &[u32] {
        &self.0
    }

    /// Bytes of one input of this shape; `None` when the shape is not known, or the number exceeds
    /// a `usize`.
    pub fn byte_len(&self) -> Option<usize> {
        if self.0.is_empty() {
            return None;
        }
        self.0.iter().try_fold(1usize, |len, &dim| len.checked_mul(dim as usize))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, dim) in self.0.iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { "×" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Shape({:?})", self.dims())
    }
}
