//! One image as the convolutional map computes with it: 28 rows of 32 `f32`, the last four of a row
//! always zero.

use crate::kernels::{Chunk, LANES};

/// Rows and columns of an image.
pub const SIDE: usize = 28;

/// The middle of an image: 13.5 rows or columns from the centre of its first.
pub const MIDDLE: f32 = (SIDE as f32 - 1.0) / 2.0;

/// Chunks of a row.
pub(super) const ROW_CHUNKS: usize = 2;

/// Values of a row, the padding with them.
pub(super) const ROW_LEN: usize = ROW_CHUNKS * LANES;

/// Pixels from 0 to 1, `[28][2]` chunks.
#[derive(Clone, Debug, PartialEq)]
#[repr(align(64))]
pub struct Plane(pub(crate) [[Chunk; ROW_CHUNKS]; SIDE]);

impl Plane {
    pub const ZERO: Self = Self([[[0.0; LANES]; ROW_CHUNKS]; SIDE]);

    /// Bytes over 255. The padding is left as it is: zero since [`Plane::ZERO`].
    #[inline(always)]
    pub fn set_bytes(&mut self, image: &[u8]) {
        for (row, pixels) in self.0.iter_mut().zip(image.as_chunks::<SIDE>().0) {
            for (value, &pixel) in row.as_flattened_mut().iter_mut().zip(pixels) {
                *value = f32::from(pixel) / 255.0;
            }
        }
    }

    /// The values of row `y`, padding and all.
    #[inline(always)]
    pub fn row(&self, y: usize) -> &[f32] {
        self.0[y].as_flattened()
    }

    #[inline(always)]
    pub fn row_mut(&mut self, y: usize) -> &mut [f32] {
        self.0[y].as_flattened_mut()
    }
}

/// Sixteen values from `at`.
///
/// # Panics
/// When there are not as many.
#[inline(always)]
pub(super) fn chunk_at(values: &[f32], at: usize) -> &Chunk {
    values[at..].first_chunk().expect("the caller left room for a chunk")
}
