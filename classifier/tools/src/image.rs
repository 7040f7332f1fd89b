//! A grey image: bytes and their shape. The readers of image files are in `input`.

use afterimage_classifier::{DataError, Shape};

/// A grey image: bytes from 0 (black) to 255 (white), row by row, and their shape.
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
    /// [`DataError::Mismatch`] if there are more or fewer bytes.
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

    /// Whether the file has transparent pixels and was composited on white, so that it has dark ink
    /// on a light background. `false` again after [`Image::invert`].
    #[must_use]
    pub fn is_on_white_ground(&self) -> bool {
        self.on_white_ground
    }

    pub(crate) fn on_white_ground(mut self) -> Self {
        self.on_white_ground = true;
        self
    }

    /// The image with light and dark exchanged: every pixel `p` becomes `255 - p`. MNIST has light
    /// ink on a dark background, and a scan of pencil on paper is dark on light.
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

    /// The `shape().len()` bytes, row by row.
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
}
