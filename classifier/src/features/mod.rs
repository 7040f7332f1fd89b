//! Feature maps: functions from the bytes of an image to the features that the machines weigh. A
//! trained map does not change; the same bytes always give the same bits.

pub mod conv;
mod raw;

pub use conv::ConvolutionalMap;
pub use raw::RawPixels;

use crate::error::ModelError;
use crate::kernels::{Chunk, Chunks, Isa, LANES, chunks};
use crate::shape::Shape;
use crate::tensors::Tensors;

/// A feature map of a known kind.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum FeatureMap {
    /// Every pixel divided by one number.
    Raw(RawPixels),
    /// Deskewing, learnt filters, a projection, and the products of its components.
    Conv(Box<ConvolutionalMap>),
}

/// Buffers for computing features, kept between calls so that nothing is allocated.
#[derive(Debug, Default)]
pub struct FeatureScratch {
    conv: conv::ConvolutionalScratch,
}

/// Computes the features of one block of images after another, in the same buffers.
#[derive(Debug)]
pub struct Features<'a> {
    map: &'a FeatureMap,
    scratch: FeatureScratch,
    block: Chunks,
}

impl<'a> Features<'a> {
    /// Nothing is computed yet.
    #[must_use]
    pub fn new(map: &'a FeatureMap) -> Self {
        Features { map, scratch: FeatureScratch::default(), block: Chunks::default() }
    }

    /// The features of these images, [`FeatureMap::dims`] of each.
    ///
    /// # Panics
    /// When an image does not have the length of the map's shape.
    pub fn of(&mut self, images: &[&[u8]]) -> impl Iterator<Item = &[f32]> {
        let (len, dims) = (self.map.shape().len(), self.map.dims());
        assert!(images.iter().all(|image| image.len() == len), "images of {len} bytes");
        self.block.set_len(images.len() * chunks(dims));
        self.map.features(Isa::best(), images, &mut self.scratch, &mut self.block);
        let rows = self.block.as_flattened().chunks_exact(chunks(dims) * LANES);
        rows.map(move |row| &row[..dims])
    }
}

impl FeatureMap {
    /// The name in files and on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Raw(_) => RawPixels::NAME,
            Self::Conv(_) => ConvolutionalMap::NAME,
        }
    }

    /// The shape of its images.
    #[must_use]
    pub fn shape(&self) -> Shape {
        match self {
            Self::Raw(map) => map.shape(),
            Self::Conv(map) => map.shape(),
        }
    }

    /// The number of features.
    #[must_use]
    pub fn dims(&self) -> usize {
        match self {
            Self::Raw(map) => map.shape().len(),
            Self::Conv(map) => map.dims(),
        }
    }

    /// The features of a block of images: `out` is `[images, chunks(dims)]`, its padding set to
    /// zero. Each image is `shape().len()` bytes.
    pub fn features(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut FeatureScratch,
        out: &mut [Chunk],
    ) {
        match self {
            Self::Raw(map) => map.features(isa, images, out),
            Self::Conv(map) => map.features(isa, images, &mut scratch.conv, out),
        }
    }

    /// The tensors of the map, by name.
    pub fn tensors(&self) -> Tensors {
        match self {
            Self::Raw(map) => map.tensors(),
            Self::Conv(map) => map.tensors(),
        }
    }

    /// The map called `name`, from tensors that are removed from `tensors`.
    pub fn from_tensors(
        name: &str,
        shape: Shape,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        match name {
            RawPixels::NAME => RawPixels::from_tensors(shape, tensors).map(Self::Raw),
            ConvolutionalMap::NAME => {
                ConvolutionalMap::from_tensors(shape, tensors).map(|map| Self::Conv(Box::new(map)))
            }
            _ => Err(ModelError::mismatch("feature map", "raw or conv", format!("{name:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;

    #[test]
    fn the_features_of_an_image_are_the_same_alone_and_among_others() {
        for model in [Model::shipped(), Model::raw()] {
            let map = model.features().unwrap();
            let pixels: Vec<u8> = (0..3 * map.shape().len()).map(|i| (i % 251) as u8).collect();
            let images: Vec<&[u8]> = pixels.chunks_exact(map.shape().len()).collect();
            let together: Vec<Vec<f32>> =
                Features::new(map).of(&images).map(<[f32]>::to_vec).collect();
            let mut alone = Features::new(map);
            for (image, expected) in images.iter().zip(&together) {
                let features: Vec<&[f32]> = alone.of(&[image]).collect();
                assert_eq!(features, [&expected[..]]);
                assert_eq!(expected.len(), map.dims());
            }
        }
    }
}
