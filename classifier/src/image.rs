//! One image: bytes and their shape; and reading it from whatever file it comes in.

use std::fs::File;
use std::path::Path;

use crate::dataset::MAX_DATASET_FILE_BYTES;
use crate::error::DataError;
use crate::input::{bounded, idx, netpbm, png};
use crate::shape::Shape;

/// Largest image file read, in bytes: an uncompressed picture of [`crate::MAX_INPUT_LEN`] pixels in
/// 16-bit RGBA, and some room for its headers.
pub const MAX_IMAGE_FILE_BYTES: u64 = 8 * crate::MAX_INPUT_LEN as u64 + (1 << 16);

/// One grey image: bytes 0 (black) to 255 (white), row-major, of a known shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    shape: Shape,
    pixels: Box<[u8]>,
}

impl Image {
    /// An image of `pixels`, which must be `shape.len()` bytes.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when there are more or fewer bytes.
    pub fn new(shape: Shape, pixels: impl Into<Box<[u8]>>) -> Result<Self, DataError> {
        let pixels = pixels.into();
        if pixels.len() != shape.len() {
            return Err(DataError::Mismatch {
                what: "bytes in one image",
                expected: format!("{} ({shape})", shape.len()),
                found: pixels.len().to_string(),
            });
        }
        Ok(Self { shape, pixels })
    }

    /// Reads an image file: PNG, PGM (P2 or P5), or an IDX file holding exactly one image; the last
    /// two also gzipped. The pixels are taken as they are; see [`Image::invert`] for dark ink
    /// on light paper.
    ///
    /// # Errors
    /// [`DataError`], naming the file, when it cannot be read or is none of these.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        let bytes = bounded::read_at_most(file, MAX_IMAGE_FILE_BYTES, "image file")
            .and_then(|bytes| bounded::unpack(bytes, MAX_IMAGE_FILE_BYTES, "unpacked image file"))
            .map_err(|error| error.in_file(path))?;
        Self::decode(&bytes).map_err(|error| error.in_file(path))
    }

    /// Reads a file of images: all those of an IDX file, or the one of any other that
    /// [`Image::read`] takes.
    ///
    /// # Errors
    /// [`DataError`], naming the file, when it cannot be read or is none of these.
    pub fn read_all(path: &Path) -> Result<Vec<Self>, DataError> {
        let decode_all = |bytes: &[u8]| {
            if !bytes.starts_with(&[0, 0, 8]) {
                return Ok(vec![Self::decode(bytes)?]);
            }
            let (shape, pixels) = idx::decode_images(bytes)?;
            let images = pixels.chunks_exact(shape.len());
            Ok(images.map(|pixels| Self { shape, pixels: pixels.into() }).collect())
        };
        let file = File::open(path).map_err(|source| DataError::io(path, source))?;
        bounded::read_at_most(file, MAX_DATASET_FILE_BYTES, "image file")
            .and_then(|bytes| bounded::unpack(bytes, MAX_DATASET_FILE_BYTES, "unpacked image file"))
            .and_then(|bytes| decode_all(&bytes))
            .map_err(|error| error.in_file(path))
    }

    /// Decodes the bytes of an image file: PNG, PGM (P2 or P5), or IDX with one image; not gzipped.
    ///
    /// # Errors
    /// [`DataError::Format`] when it is none of these; other variants when it is broken.
    pub fn decode(bytes: &[u8]) -> Result<Self, DataError> {
        if bytes.starts_with(&png::SIGNATURE) {
            png::decode(bytes)
        } else if bytes.starts_with(b"P2") || bytes.starts_with(b"P5") {
            netpbm::decode(bytes)
        } else if bytes.starts_with(&[0, 0, 8]) {
            idx::decode_single_image(bytes)
        } else {
            Err(DataError::not("a PNG, PGM or IDX image", bytes))
        }
    }

    /// The same image with light and dark exchanged: every pixel `p` becomes `255 - p`. MNIST is
    /// light ink on a dark ground; a scan of pencil on paper is the other way round, and only
    /// its owner knows.
    #[must_use]
    pub fn invert(mut self) -> Self {
        for pixel in &mut self.pixels {
            *pixel = 255 - *pixel;
        }
        self
    }

    /// The shape.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The bytes, `shape().len()` of them, row-major.
    #[must_use]
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The bytes, given away.
    #[must_use]
    pub fn into_pixels(self) -> Box<[u8]> {
        self.pixels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inverting_twice_changes_nothing() {
        let shape = Shape::new(&[1, 3]).unwrap();
        let image = Image::new(shape, vec![0, 7, 255]).unwrap();
        assert_eq!(image.clone().invert().pixels(), [255, 248, 0]);
        assert_eq!(image.clone().invert().invert(), image);
    }

    #[test]
    fn rejects_a_wrong_number_of_bytes() {
        let error = Image::new(Shape::MNIST, vec![0; 783]).unwrap_err().to_string();
        assert!(error.contains("784") && error.contains("783"), "{error}");
    }

    #[test]
    fn says_what_an_unknown_file_starts_with() {
        let error = Image::decode(b"GIF89a etc").unwrap_err().to_string();
        assert!(error.contains("GIF89a"), "{error}");
        assert!(Image::decode(b"").unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn names_the_file_that_cannot_be_read() {
        let error = Image::read(Path::new("/nowhere/at/all.png")).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all.png"), "{error}");
    }
}
