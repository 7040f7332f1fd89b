//! Dot products and distances of images with support vectors, a block of them at a time.

use super::super::function::KernelFunction;
use super::{Kind, Vectors, square_of_bytes, square_of_floats};
use crate::kernels::bytes::{ByteImages, GROUP};
use crate::kernels::{Chunks, Dots, Isa, Kernel, Simd, chunks};
use crate::pixels::Pixels;

/// A block of images, laid out.
#[derive(Debug, Default)]
pub(in crate::pairwise) struct Images {
    bytes: ByteImages,
    floats: Chunks,
    features: Vec<f64>,
    /// The squared length of each, as [`Vectors::squares`].
    squares: Vec<f64>,
    integers: Vec<i32>,
    products: Vec<f32>,
}

impl Vectors {
    /// Lays out a block of images for [`Vectors::compare`].
    pub(in crate::pairwise) fn lay_out(
        &self,
        isa: Isa,
        pixels: &Pixels,
        images: &[&[u8]],
        out: &mut Images,
    ) {
        out.squares.clear();
        match &self.kind {
            Kind::Bytes(panel, _) => {
                panel.lay_out(isa, images, &mut out.bytes);
                out.squares.extend(images.iter().map(|image| square_of_bytes(image)));
            }
            Kind::Floats(..) => {
                let row = chunks(self.dims);
                out.floats.set_len(images.len() * row);
                for (image, floats) in images.iter().zip(out.floats.chunks_exact_mut(row)) {
                    pixels.features(image, &mut out.features);
                    let (values, padding) = floats.as_flattened_mut().split_at_mut(self.dims);
                    for (value, &feature) in values.iter_mut().zip(&out.features) {
                        *value = feature as f32;
                    }
                    padding.fill(0.0);
                    out.squares.push(square_of_floats(floats));
                }
            }
        }
    }

    /// The length of an image that was laid out.
    pub(in crate::pairwise) fn length(&self, images: &Images, image: usize) -> f64 {
        (images.squares[image] * self.unit).sqrt()
    }

    /// The kernel's values of all images with `count` vectors from `first` (a multiple of
    /// [`GROUP`]) on, in `out`: `[images, count]`.
    pub(in crate::pairwise) fn compare(
        &self,
        isa: Isa,
        function: &KernelFunction,
        (first, count): (usize, usize),
        images: &mut Images,
        out: &mut Vec<f64>,
    ) {
        let Images { bytes, floats, squares, integers, products, .. } = images;
        out.resize(squares.len() * count, 0.0);
        let vectors = &self.squares[first..first + count];
        let unit = self.unit;
        match &self.kind {
            Kind::Bytes(panel, _) => {
                let row = count.next_multiple_of(GROUP);
                integers.resize(squares.len() * row, 0);
                panel.dots(isa, bytes, first / GROUP, integers);
                let products = &*integers;
                isa.run(Finish { function, unit, images: squares, vectors, products, row, out });
            }
            Kind::Floats(packed, _) => {
                let len = chunks(self.dims);
                products.resize(squares.len() * count, 0.0);
                let w = &packed[first * len..(first + count) * len];
                isa.run(Dots { row: len, x: floats, w, out: products });
                let products = &*products;
                let row = count;
                isa.run(Finish { function, unit, images: squares, vectors, products, row, out });
            }
        }
    }
}

/// Dot products into the kernel's values, by way of ‖x − s‖² = ‖x‖² + ‖s‖² − 2·x·s where it is of
/// the distance.
struct Finish<'a, T> {
    function: &'a KernelFunction,
    unit: f64,
    /// Squared lengths.
    images: &'a [f64],
    /// Squared lengths.
    vectors: &'a [f64],
    /// `[images, row]`.
    products: &'a [T],
    row: usize,
    /// `[images, vectors]`.
    out: &'a mut [f64],
}

impl<T: Copy + Into<f64>> Kernel for Finish<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        let Self { function, unit, images, vectors, products, row, out } = self;
        let rows = products.chunks_exact(row).zip(out.chunks_exact_mut(vectors.len()));
        for (image, (products, out)) in images.iter().zip(rows) {
            if function.is_of_distance() {
                for ((value, &product), vector) in out.iter_mut().zip(products).zip(vectors) {
                    *value = image + vector - 2.0 * product.into();
                }
            } else {
                for (value, &product) in out.iter_mut().zip(products) {
                    *value = product.into();
                }
            }
            function.fast(unit, out);
        }
    }
}
