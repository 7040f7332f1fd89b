//! The plainest feature map: the pixels themselves, divided by one number (255 for values from 0 to 1).

use crate::error::ModelError;
use crate::kernels::{Chunk, chunks};
use crate::shape::Shape;
use crate::tensors::{Tensor, Tensors};

/// Every pixel divided by one number; as many features as pixels.
#[derive(Clone, Debug)]
pub struct RawPixels {
    shape: Shape,
    divisor: f32,
    /// The feature each pixel value becomes.
    table: Box<[f32; 256]>,
}

impl RawPixels {
    pub(crate) const NAME: &'static str = "raw";
    const DIVISOR: &'static str = "pixels.divisor";

    /// Pixels of images of `shape`, each divided by `divisor`: 255 for features from 0 to 1, 1 for the bytes
    /// themselves.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when the divisor is not between 1 and 65,535.
    pub fn new(shape: Shape, divisor: f32) -> Result<Self, ModelError> {
        if !(1.0..=65_535.0).contains(&divisor) {
            return Err(ModelError::mismatch(Self::DIVISOR, "1 to 65535", divisor));
        }
        let table = Box::new(std::array::from_fn(|pixel| pixel as f32 / divisor));
        Ok(Self { shape, divisor, table })
    }

    pub(crate) fn shape(&self) -> Shape {
        self.shape
    }

    pub(crate) fn features(&self, images: &[&[u8]], out: &mut [Chunk]) {
        let len = self.shape.len();
        for (image, out) in images.iter().zip(out.chunks_exact_mut(chunks(len))) {
            let (features, padding) = out.as_flattened_mut().split_at_mut(len);
            for (feature, &pixel) in features.iter_mut().zip(*image) {
                *feature = self.table[usize::from(pixel)];
            }
            padding.fill(0.0);
        }
    }

    pub(crate) fn tensors(&self) -> Tensors {
        Tensors::from([(Self::DIVISOR.to_owned(), Tensor::new(&[1], vec![self.divisor]))])
    }

    pub(crate) fn from_tensors(shape: Shape, tensors: &mut Tensors) -> Result<Self, ModelError> {
        let divisor = Tensor::take(tensors, Self::DIVISOR, &[1])?;
        Self::new(shape, divisor[0])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_pixels_over_the_divisor_and_padding_is_zero() {
        let map = RawPixels::new(Shape::new(&[1, 3]).unwrap(), 255.0).unwrap();
        let mut out = [[9.0; 16]; 2];
        map.features(&[&[0, 51, 255], &[1, 2, 3]], &mut out);
        assert_eq!(out[0][..4], [0.0, 0.2, 1.0, 0.0]);
        assert_eq!(out[1][..4], [1.0 / 255.0, 2.0 / 255.0, 3.0 / 255.0, 0.0]);
        assert_eq!(out[1][3..], [0.0; 13]);
    }

    #[test]
    fn rejects_divisors_that_would_blow_features_up() {
        for divisor in [0.0, 0.5, -255.0, f32::NAN, f32::INFINITY] {
            assert!(RawPixels::new(Shape::MNIST, divisor).is_err(), "{divisor}");
        }
    }
}
