//! Support vectors, laid out for comparison with images (`compare.rs`): as integers where they are
//! bytes, else as `f32`.

use super::function::{Accuracy, KernelFunction};
use crate::error::ModelError;
use crate::kernels::bytes::{ByteImages, BytePanel, GROUP, MAX_BYTES};
use crate::kernels::{Chunk, Chunks, Dots, Isa, Kernel, Simd, chunks};
use crate::pixels::{Pixels, Table, take_table};
use crate::tensors::{Element, Tensor, Tensors, Values};

/// Greatest value of a feature: the squares of the longest vectors still are `f32`.
const MAX_VALUE: f64 = 1e15;

/// Rounding of `f32` and of `f64`: half the distance of 1 to the next number.
const UNIT_F32: f64 = 1.0 / 16_777_216.0;
const UNIT_F64: f64 = f64::EPSILON / 2.0;

/// A feature so small that `f32` may lose it altogether, or its product with another as small: the
/// square is above the least number that `f32` has.
const TINY: f64 = 1e-22;

/// Support vectors as models and files hold them: `[vectors, bytes of an image]`.
#[derive(Clone, Debug, PartialEq)]
pub enum VectorValues {
    /// Bytes, and their features if these differ from the features of the same bytes in an image.
    U8(Vec<u8>, Option<Table>),
    /// Features.
    F32(Vec<f32>),
    /// Features.
    F64(Vec<f64>),
}

/// The same, laid out for scoring.
#[derive(Clone, Debug)]
pub(super) struct Vectors {
    count: usize,
    dims: usize,
    kind: Kind,
    /// The squared length of each, in units of `unit`.
    squares: Vec<f64>,
    /// The factor from a dot product of stored values to one of features.
    unit: f64,
    pub(super) accuracy: Accuracy,
}

#[derive(Clone, Debug)]
enum Kind {
    /// With the features of bytes, if these differ from those of images.
    Bytes(BytePanel, Option<Table>),
    /// `[vectors, chunks(dims)]`, and the features themselves where `f32` does not hold them.
    Floats(Chunks, Option<Vec<f64>>),
}

impl VectorValues {
    pub(super) const NAME: &'static str = "kernel.vectors";
    const TABLE: &'static str = "kernel.table";

    pub(super) fn len(&self) -> usize {
        match self {
            Self::U8(values, _) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }

    /// Removes the vectors from `tensors`, with any of their types.
    pub(super) fn from_tensors(
        count: usize,
        dims: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        fn take<T: Element>(tensors: &mut Tensors, shape: &[usize]) -> Result<Vec<T>, ModelError> {
            Tensor::take(tensors, VectorValues::NAME, shape)
        }
        let shape = [count, dims];
        match tensors.get(Self::NAME).map(|tensor| &tensor.values) {
            Some(Values::U8(_)) => {
                let table = match tensors.contains_key(Self::TABLE) {
                    true => Some(take_table(tensors, Self::TABLE)?),
                    false => None,
                };
                Ok(Self::U8(take(tensors, &shape)?, table))
            }
            Some(Values::F32(_)) => take(tensors, &shape).map(Self::F32),
            _ => take(tensors, &shape).map(Self::F64),
        }
    }

    /// Puts them into `tensors`, rows of `dims`.
    pub(super) fn add_tensors(self, dims: usize, tensors: &mut Tensors) {
        let shape = [self.len() / dims, dims];
        let vectors = match self {
            Self::U8(values, table) => {
                if let Some(table) = table {
                    let table = Tensor::new(&[table.len()], table.to_vec());
                    tensors.insert(Self::TABLE.to_owned(), table);
                }
                Tensor::new(&shape, values)
            }
            Self::F32(values) => Tensor::new(&shape, values),
            Self::F64(values) => Tensor::new(&shape, values),
        };
        tensors.insert(Self::NAME.to_owned(), vectors);
    }
}

impl Vectors {
    /// # Errors
    /// [`ModelError::Mismatch`] when values are too great or not finite, when there are too many
    /// bytes, or when the feature of a byte depends on its position.
    pub(super) fn new(
        values: VectorValues,
        dims: usize,
        pixels: &Pixels,
    ) -> Result<Self, ModelError> {
        let count = values.len() / dims;
        check_pixels(pixels)?;
        match values {
            VectorValues::U8(bytes, table) => Self::of_bytes(&bytes, table, dims, pixels),
            VectorValues::F32(values) => {
                let packed = pack(&values, dims);
                Self::of_floats(packed, None, count, dims)
            }
            VectorValues::F64(values) => {
                let packed =
                    pack(&values.iter().map(|&value| value as f32).collect::<Vec<_>>(), dims);
                Self::of_floats(packed, Some(values), count, dims)
            }
        }
    }

    fn of_bytes(
        bytes: &[u8],
        of_vectors: Option<Table>,
        dims: usize,
        pixels: &Pixels,
    ) -> Result<Self, ModelError> {
        let (Pixels::Table(table), true) = (pixels, dims <= MAX_BYTES) else {
            let expected = format!("at most {MAX_BYTES} bytes that mean the same at every place");
            return Err(ModelError::mismatch(VectorValues::NAME, expected, dims));
        };
        let most = of_vectors.as_deref().map_or(0.0, |table| greatest(table));
        check_greatest(VectorValues::TABLE, most)?;
        // Bytes stand for multiples of one step. Features may differ from them: by the rounding of
        // the tool that wrote the file, or by any amount in a forged file.
        let step = table[255] / 255.0;
        let root = (dims as f64).sqrt();
        let off = |table: &[f64; 256]| {
            let off = |(byte, value): (usize, &f64)| (value - step * byte as f64).abs();
            let deviation = table.iter().enumerate().map(off).fold(0.0, f64::max);
            (deviation + 4.0 * UNIT_F64 * greatest(table)) * root
        };
        let off_images = off(table);
        let off_vectors = of_vectors.as_deref().map_or(off_images, off);
        let squares: Vec<f64> = bytes.chunks_exact(dims).map(square_of_bytes).collect();
        let longest = squares.iter().copied().fold(0.0, f64::max).sqrt() * step.abs();
        let accuracy = Accuracy {
            longest: longest + off_vectors,
            of_vectors: off_vectors,
            of_images: 0.0,
            of_images_at_least: off_images,
            of_dots: 0.0,
            of_doubles: UNIT_F64 * (dims + 8) as f64,
        };
        let count = bytes.len() / dims;
        let kind = Kind::Bytes(BytePanel::new(bytes, dims), of_vectors);
        Ok(Self { count, dims, kind, squares, unit: step * step, accuracy })
    }

    fn of_floats(
        packed: Chunks,
        exact: Option<Vec<f64>>,
        count: usize,
        dims: usize,
    ) -> Result<Self, ModelError> {
        let most = packed.as_flattened().iter().fold(0.0, |a: f32, b| {
            // Keeps a NaN, which `max` would drop.
            if b.abs() <= a { a } else { b.abs() }
        });
        check_greatest(VectorValues::NAME, most.into())?;
        let row = chunks(dims);
        let squares: Vec<f64> = packed.chunks_exact(row).map(square_of_floats).collect();
        let longest = squares.iter().copied().fold(0.0, f64::max).sqrt();
        let rounded = if exact.is_some() { UNIT_F32 * longest } else { 0.0 };
        let terms = (row + 5) as f64;
        let tiny = TINY * (dims as f64).sqrt();
        let accuracy = Accuracy {
            longest: longest * (1.0 + 2.0 * UNIT_F32) + tiny,
            of_vectors: rounded + tiny,
            of_images: UNIT_F32,
            of_images_at_least: tiny,
            // N. J. Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1:
            // a sum of products along `row` fused steps in each lane, then four levels
            // of a tree.
            of_dots: terms * UNIT_F32 / (1.0 - terms * UNIT_F32),
            of_doubles: UNIT_F64 * (dims + 8) as f64,
        };
        let kind = Kind::Floats(packed, exact);
        Ok(Self { count, dims, kind, squares, unit: 1.0, accuracy })
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn are_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes(..))
    }

    /// The values as they were given.
    pub(super) fn values(&self) -> VectorValues {
        let all = |at: usize| (at / self.dims, at % self.dims);
        let places = (0..self.count * self.dims).map(all);
        match &self.kind {
            Kind::Bytes(panel, table) => {
                let bytes = places.map(|(row, at)| panel.byte(row, at)).collect();
                VectorValues::U8(bytes, table.clone())
            }
            Kind::Floats(_, Some(exact)) => VectorValues::F64(exact.clone()),
            Kind::Floats(packed, None) => VectorValues::F32(
                packed
                    .chunks_exact(chunks(self.dims))
                    .flat_map(|row| &row.as_flattened()[..self.dims])
                    .copied()
                    .collect(),
            ),
        }
    }

    /// The features of vector `row`, in `out`.
    pub(super) fn features(&self, row: usize, pixels: &Pixels, out: &mut Vec<f64>) {
        out.clear();
        match &self.kind {
            Kind::Bytes(panel, Some(table)) => {
                out.extend((0..self.dims).map(|at| table[usize::from(panel.byte(row, at))]));
            }
            Kind::Bytes(panel, None) => {
                out.extend((0..self.dims).map(|at| pixels.value(at, panel.byte(row, at))));
            }
            Kind::Floats(_, Some(exact)) => {
                out.extend_from_slice(&exact[row * self.dims..(row + 1) * self.dims]);
            }
            Kind::Floats(packed, None) => {
                let row = &packed[row * chunks(self.dims)..].as_flattened()[..self.dims];
                out.extend(row.iter().map(|&value| f64::from(value)));
            }
        }
    }
}

fn check_pixels(pixels: &Pixels) -> Result<(), ModelError> {
    let most = match pixels {
        Pixels::Table(table) => greatest(&**table),
        Pixels::Lines { scale, offset } => scale
            .iter()
            .zip(offset)
            .fold(0.0, |a: f64, (scale, offset)| a.max(255.0 * scale.abs() + offset.abs())),
        Pixels::Places { tables, .. } => {
            tables.iter().fold(0.0, |a: f64, table| a.max(greatest(&**table)))
        }
    };
    check_greatest("pixels", most)
}

fn check_greatest(what: &str, most: f64) -> Result<(), ModelError> {
    if most <= MAX_VALUE {
        return Ok(());
    }
    Err(ModelError::mismatch(what, format!("values up to {MAX_VALUE}"), most))
}

fn greatest(values: &[f64]) -> f64 {
    values.iter().fold(0.0, |a: f64, b| a.max(b.abs()))
}

/// Rows of `dims` values, each filled up with zeros to whole chunks.
fn pack(values: &[f32], dims: usize) -> Chunks {
    let mut packed = Chunks::zeros(values.len() / dims * chunks(dims));
    for (row, packed) in values.chunks_exact(dims).zip(packed.chunks_exact_mut(chunks(dims))) {
        packed.as_flattened_mut()[..dims].copy_from_slice(row);
    }
    packed
}

fn square_of_bytes(bytes: &[u8]) -> f64 {
    bytes.iter().map(|&byte| u64::from(byte) * u64::from(byte)).sum::<u64>() as f64
}

fn square_of_floats(row: &[Chunk]) -> f64 {
    row.as_flattened().iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

/// A block of images, laid out.
#[derive(Debug, Default)]
pub(super) struct Images {
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
    pub(super) fn lay_out(&self, isa: Isa, pixels: &Pixels, images: &[&[u8]], out: &mut Images) {
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
    pub(super) fn length(&self, images: &Images, image: usize) -> f64 {
        (images.squares[image] * self.unit).sqrt()
    }

    /// The kernel's values of all images with `count` vectors from `first` (a multiple of
    /// [`GROUP`]) on, in `out`: `[images, count]`.
    pub(super) fn compare(
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

/// Converts dot products to kernel values. For a function of the distance: ‖x − s‖² = ‖x‖² + ‖s‖² −
/// 2·x·s.
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
