//! The convolutional feature map: deskew, one layer of learnt filters, pooling, projection, and all
//! products of two components. `docs/method.md` explains the method; each step has its file here.
//!
//! About 0.75 million multiply-adds per image, most of them in `convolve.rs`.

mod convolve;
mod deskew;
mod project;

use convolve::convolve;
pub use convolve::{FILTERS, Filters, PATCH, PLACES, POOLED, POOLED_CHUNKS, Statistics, TAPS};
use project::expand;
pub use project::{
    COMPONENT_CHUNKS, COMPONENTS, Components, EXPANDED, EXPANDED_CHUNKS, Pooled, Projection,
};

use crate::error::ModelError;
use crate::kernels::{Chunk, Isa, Kernel, LANES, Simd};
use crate::shape::Shape;
use crate::tensors::{Tensor, Tensors};

/// Learnt filters and a learnt projection; 28 × 28 pixels become 5150 features.
#[derive(Clone, Debug)]
pub struct ConvolutionalMap {
    filters: Filters,
    projection: Projection,
}

/// Buffers for computing these features.
#[derive(Debug, Default)]
pub struct ConvolutionalScratch {
    pooled: Vec<Pooled>,
    components: Vec<Components>,
}

impl ConvolutionalMap {
    pub const NAME: &'static str = "conv";
    const FILTERS: &'static str = "conv.filters";
    const PROJECTION: &'static str = "conv.projection";
    const OFFSET: &'static str = "conv.offset";

    pub fn new(filters: Filters, projection: Projection) -> Self {
        Self { filters, projection }
    }

    pub fn shape(&self) -> Shape {
        Shape::MNIST
    }

    pub fn dims(&self) -> usize {
        EXPANDED
    }

    /// The features of a block of images, `[images, EXPANDED_CHUNKS]`; each image is 784 bytes.
    pub fn features(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut ConvolutionalScratch,
        out: &mut [Chunk],
    ) {
        isa.run(Block { map: self, images, scratch, out });
    }

    pub fn tensors(&self) -> Tensors {
        let tensor =
            |name: &str, shape: &[usize], values| (name.to_owned(), Tensor::new(shape, values));
        Tensors::from([
            tensor(Self::FILTERS, &[FILTERS, TAPS], self.filters.to_vec()),
            tensor(Self::PROJECTION, &[POOLED, COMPONENTS], self.projection.matrix()),
            tensor(Self::OFFSET, &[COMPONENTS], self.projection.offset()),
        ])
    }

    pub fn from_tensors(shape: Shape, tensors: &mut Tensors) -> Result<Self, ModelError> {
        if shape != Shape::MNIST {
            return Err(ModelError::mismatch("shape for the conv map", Shape::MNIST, shape));
        }
        let filters = Tensor::take(tensors, Self::FILTERS, &[FILTERS, TAPS])?;
        let matrix = Tensor::take(tensors, Self::PROJECTION, &[POOLED, COMPONENTS])?;
        let offset = Tensor::take(tensors, Self::OFFSET, &[COMPONENTS])?;
        let filters = filters.as_chunks().0.try_into().expect("`take` checked the shape");
        Ok(Self::new(Filters::new(filters), Projection::new(&matrix, &offset)))
    }
}

/// An image deskewed, and moved by `shift` (rows, columns).
pub struct Deskew<'a> {
    pub from: &'a Plane,
    pub shift: [f32; 2],
    pub to: &'a mut Plane,
}

impl Kernel for Deskew<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        deskew::deskew(simd, self.from, self.shift, self.to);
    }
}

/// The pooled values of an image, deskewed and moved by `shift` (rows, columns) before.
pub struct Pool<'a> {
    pub filters: &'a Filters,
    pub from: &'a Plane,
    pub shift: [f32; 2],
    pub pooled: &'a mut Pooled,
}

impl Kernel for Pool<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut upright = Plane::ZERO;
        deskew::deskew(simd, self.from, self.shift, &mut upright);
        convolve(simd, self.filters, &upright, self.pooled);
    }
}

/// The components of a block of images, from their pooled values.
pub struct Project<'a> {
    pub projection: &'a Projection,
    pub pooled: &'a [Pooled],
    pub components: &'a mut [Components],
}

impl Kernel for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        self.projection.project(simd, self.pooled, self.components);
    }
}

/// The quadratic features of one image's components.
pub struct Expand<'a> {
    pub components: &'a Components,
    pub out: &'a mut [Chunk],
}

impl Kernel for Expand<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        expand(simd, self.components, self.out);
    }
}

/// The features of a block of images.
struct Block<'a> {
    map: &'a ConvolutionalMap,
    images: &'a [&'a [u8]],
    scratch: &'a mut ConvolutionalScratch,
    out: &'a mut [Chunk],
}

impl Kernel for Block<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let Self { map, images, scratch, out } = self;
        let ConvolutionalScratch { pooled, components } = scratch;
        pooled.resize(images.len(), [[0.0; LANES]; POOLED_CHUNKS]);
        components.resize(images.len(), [[0.0; LANES]; COMPONENT_CHUNKS]);
        let mut raw = Plane::ZERO;
        for (image, pooled) in images.iter().zip(&mut *pooled) {
            raw.set_bytes(image);
            Pool { filters: &map.filters, from: &raw, shift: [0.0; 2], pooled }.run(simd);
        }
        Project { projection: &map.projection, pooled, components }.run(simd);
        for (components, out) in components.iter().zip(out.chunks_exact_mut(EXPANDED_CHUNKS)) {
            expand(simd, components, out);
        }
    }
}

/// Rows and columns of an image.
pub const SIDE: usize = 28;

/// The middle of an image: 13.5 rows or columns from the centre of its first.
pub const MIDDLE: f32 = (SIDE as f32 - 1.0) / 2.0;

/// Chunks of a row.
pub(super) const ROW_CHUNKS: usize = 2;

/// Values of a row, with the padding.
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

    /// The values of row `y`, with the padding.
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
/// When fewer than sixteen follow.
#[inline(always)]
pub(super) fn chunk_at(values: &[f32], at: usize) -> &Chunk {
    values[at..].first_chunk().expect("the caller left room for a chunk")
}
