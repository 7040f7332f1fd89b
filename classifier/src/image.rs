//! One image: bytes and their shape, and its readers for PNG, PGM and IDX files.

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
    on_white_ground: bool,
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
        Ok(Self { shape, pixels, on_white_ground: false })
    }

    /// Reads an image file: PNG, PGM (P2 or P5), or an IDX file with exactly one image. PGM and IDX
    /// may be gzipped. The pixels stay as they are; see [`Image::invert`] for dark ink on light
    /// paper. A transparent PNG is composited on white, see [`Image::is_on_white_ground`].
    ///
    /// # Errors
    /// [`DataError`], naming the file, when it cannot be read or is of another format.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let file = bounded::open(path).map_err(|source| DataError::io(path, source))?;
        let bytes = bounded::read_at_most(file, MAX_IMAGE_FILE_BYTES, "image file")
            .and_then(|bytes| bounded::unpack(bytes, MAX_IMAGE_FILE_BYTES, "unpacked image file"))
            .map_err(|error| error.in_file(path))?;
        Self::decode(&bytes).map_err(|error| error.in_file(path))
    }

    /// Reads all images of an IDX file (at least one), or the single image of another file that
    /// [`Image::read`] takes.
    ///
    /// # Errors
    /// [`DataError`], naming the file, when it cannot be read or is of another format.
    pub fn read_all(path: &Path) -> Result<Vec<Self>, DataError> {
        let decode_all = |bytes: &[u8]| {
            if !bytes.starts_with(&[0, 0, 8]) {
                return Ok(vec![Self::decode(bytes)?]);
            }
            let (shape, pixels) = idx::decode_images(bytes)?;
            let images = pixels.chunks_exact(shape.len());
            images.map(|pixels| Self::new(shape, pixels)).collect()
        };
        let file = bounded::open(path).map_err(|source| DataError::io(path, source))?;
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

    /// Whether the file has transparent pixels and was composited on white: dark ink on a light
    /// ground, then. `false` again once it is inverted.
    #[must_use]
    pub fn is_on_white_ground(&self) -> bool {
        self.on_white_ground
    }

    pub(crate) fn on_white_ground(mut self) -> Self {
        self.on_white_ground = true;
        self
    }

    /// The same image with light and dark exchanged: every pixel `p` becomes `255 - p`. MNIST has
    /// light ink on a dark ground; a scan of pencil on paper is dark on light.
    #[must_use]
    pub fn invert(mut self) -> Self {
        self.on_white_ground = false;
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

    /// The bytes, moved out of the image.
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

    #[test]
    fn a_folder_is_refused_as_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        for error in
            [Image::read(folder.path()).unwrap_err(), Image::read_all(folder.path()).unwrap_err()]
        {
            let error = error.to_string();
            assert!(error.ends_with(": it is a folder; give a file"), "{error}");
        }
    }
}
