//! The simplest feature map: the pixels themselves, divided by one number (255 for values from 0 to
//! 1).

use crate::error::ModelError;
use crate::kernels::{Chunk, Isa, Kernel, LANES, Simd, chunks};
use crate::shape::Shape;
use crate::tensors::{Tensor, Tensors};

/// Every pixel divided by one number; as many features as pixels.
#[derive(Clone, Debug)]
pub struct RawPixels {
    shape: Shape,
    divisor: f32,
    /// The feature of each pixel value.
    table: Box<[f32; 256]>,
    /// Whether [`divide`] gives the same values as the table.
    by_multiplying: bool,
}

impl RawPixels {
    pub const NAME: &'static str = "raw";
    const DIVISOR: &'static str = "pixels.divisor";

    /// Pixels of images of `shape`, each divided by `divisor`: 255 for features from 0 to 1, 1 for
    /// the bytes themselves.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when the divisor is not between 1 and 65,535.
    pub fn new(shape: Shape, divisor: f32) -> Result<Self, ModelError> {
        if !(1.0..=65_535.0).contains(&divisor) {
            return Err(ModelError::mismatch(Self::DIVISOR, "1 to 65535", divisor));
        }
        let table: Box<[f32; 256]> = Box::new(std::array::from_fn(|pixel| pixel as f32 / divisor));
        let quotients = Isa::best().run(AllQuotients { divisor });
        let by_multiplying = quotients.iter().zip(&*table).all(|(a, b)| a.to_bits() == b.to_bits());
        Ok(Self { shape, divisor, table, by_multiplying })
    }

    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The features of a block of images, `[images, chunks(pixels)]`.
    pub fn features(&self, isa: Isa, images: &[&[u8]], out: &mut [Chunk]) {
        let chunks = chunks(self.shape.len());
        for (image, out) in images.iter().zip(out.chunks_exact_mut(chunks)) {
            if self.by_multiplying {
                isa.run(Divide { image, divisor: self.divisor, out });
            } else {
                self.look_up(image, out);
            }
        }
    }

    fn look_up(&self, image: &[u8], out: &mut [Chunk]) {
        let (features, padding) = out.as_flattened_mut().split_at_mut(image.len());
        for (feature, &pixel) in features.iter_mut().zip(image) {
            *feature = self.table[usize::from(pixel)];
        }
        padding.fill(0.0);
    }

    pub fn tensors(&self) -> Tensors {
        Tensors::from([(Self::DIVISOR.to_owned(), Tensor::new(&[1], vec![self.divisor]))])
    }

    pub fn from_tensors(shape: Shape, tensors: &mut Tensors) -> Result<Self, ModelError> {
        let divisor = Tensor::take(tensors, Self::DIVISOR, &[1])?;
        Self::new(shape, divisor[0])
    }
}

/// The features of one image.
struct Divide<'a> {
    image: &'a [u8],
    divisor: f32,
    out: &'a mut [Chunk],
}

impl Kernel for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { image, divisor, out } = self;
        let (whole, rest) = image.as_chunks();
        let mut out = out.iter_mut();
        for (pixels, out) in whole.iter().zip(&mut out) {
            simd.store(divide(simd, simd.load_bytes(pixels), divisor), out);
        }
        if let Some(out) = out.next() {
            let mut pixels = [0; LANES];
            pixels[..rest.len()].copy_from_slice(rest);
            simd.store(divide(simd, simd.load_bytes(&pixels), divisor), out);
        }
    }
}

/// The quotients of all bytes.
struct AllQuotients {
    divisor: f32,
}

impl Kernel for AllQuotients {
    type Output = [f32; 256];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [f32; 256] {
        let mut quotients = [0.0; 256];
        for (i, out) in quotients.as_chunks_mut().0.iter_mut().enumerate() {
            let bytes = std::array::from_fn(|lane| (i * LANES + lane) as u8);
            simd.store(divide(simd, simd.load_bytes(&bytes), self.divisor), out);
        }
        quotients
    }
}

/// `x / divisor` by multiplying with the reciprocal, which is several times faster than a division.
/// The reciprocal is the sum of two numbers, since one alone is not exact enough (N. Brisebarre and
/// J.-M. Muller, "Correctly Rounded Multiplication by Arbitrary Precision Constants", IEEE Trans.
/// Computers 57, 2008). For nearly all divisors this gives the correctly rounded quotient;
/// [`RawPixels::new`] tests it.
#[inline(always)]
fn divide<S: Simd>(simd: S, x: S::V, divisor: f32) -> S::V {
    let exact = 1.0 / f64::from(divisor);
    let upper = exact as f32;
    let lower = (exact - f64::from(upper)) as f32;
    simd.mul_add(x, simd.splat(upper), simd.mul(x, simd.splat(lower)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_pixels_over_the_divisor_and_padding_is_zero() {
        let map = RawPixels::new(Shape::new(&[1, 3]).unwrap(), 255.0).unwrap();
        let mut out = [[9.0; 16]; 2];
        map.features(Isa::best(), &[&[0, 51, 255], &[1, 2, 3]], &mut out);
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
    #[test]
    fn features_are_quotients_rounded_once_with_every_isa() {
        let image: Vec<u8> = (0..=255).collect();
        let shape = Shape::new(&[256]).unwrap();
        let mut looked_up = 0;
        for i in 0..2000 {
            let divisor = if i < 300 { 1.0 + i as f32 } else { 1.0 + (i * i) as f32 / 71.3 };
            let map = RawPixels::new(shape, divisor).unwrap();
            looked_up += u32::from(!map.by_multiplying);
            for isa in Isa::available() {
                let mut out = [[9.0; LANES]; 16];
                map.features(isa, &[&image], &mut out);
                for (&pixel, feature) in image.iter().zip(out.as_flattened()) {
                    assert_eq!(feature.to_bits(), (f32::from(pixel) / divisor).to_bits());
                }
            }
        }
        assert!(looked_up < 200, "{looked_up} of 2000 divisors are not multiplied by");
        let map = RawPixels::new(shape, 255.0).unwrap();
        assert!(map.by_multiplying);
        let mut out = [[9.0; LANES]; 16];
        map.look_up(&image, &mut out);
        assert!(image.iter().zip(out.as_flattened()).all(|(&p, &f)| f == f32::from(p) / 255.0));
    }
}
