//! Pictures of any kind as inputs of a model of digits.
//!
//! MNIST's digits were scaled into a box of 20×20 pixels with their aspect ratio, with grey levels
//! from anti-aliasing, and placed in a field of 28×28 with their centre of mass in its centre
//! (LeCun, Cortes and Burges, "The MNIST database of handwritten digits"). [`Picture::like_mnist`]
//! does the same to a picture.

use std::io::Cursor;

use afterimage_core::transparency::{Ground, composite};
use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

/// The longest side of a picture in pixels.
pub const MAX_SIDE: u32 = 8192;

/// Memory that the decoder of a picture may take.
const MAX_DECODED: u64 = 64 << 20;

/// Share of the contrast below which a pixel counts as background, in 255ths.
const NOISE: u8 = 24;

/// A grey picture: 0 is black.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
    /// What a transparent picture was composited on.
    ground: Ground,
}

/// Why a picture cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PictureError {
    /// The bytes are of no known format.
    #[error("the image is not PNG, JPEG, WebP or PNM (PGM, PPM)")]
    Format,
    /// The decoder refused it.
    #[error("the image cannot be decoded")]
    Decode(#[source] image::ImageError),
    /// It is too large.
    #[error("the image is larger than {MAX_SIDE} × {MAX_SIDE} pixels, or than 64 MiB in memory")]
    TooLarge,
    /// It has nothing on it.
    #[error("the image has one colour; a digit must stand out from its background")]
    Blank,
}

/// The format of an encoded picture, by its first bytes; `None` for anything else.
fn format(encoded: &[u8]) -> Option<ImageFormat> {
    let format = image::guess_format(encoded).ok()?;
    let known = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Pnm];
    known.contains(&format).then_some(format)
}

impl Picture {
    /// Whether these bytes begin like a picture that [`decode`](Self::decode) reads.
    pub fn is_encoded(bytes: &[u8]) -> bool {
        format(bytes).is_some()
    }

    /// A picture from a file in memory, turned as its EXIF data ask for. A transparent picture is
    /// composited on white, or on black if its ink is light: see
    /// [`transparency::composite`](composite).
    ///
    /// # Errors
    /// When the format is not known, the file is damaged, or the picture is too large.
    pub fn decode(encoded: &[u8]) -> Result<Self, PictureError> {
        let format = format(encoded).ok_or(PictureError::Format)?;
        let mut reader = ImageReader::with_format(Cursor::new(encoded), format);
        let mut limits = Limits::default();
        limits.max_image_width = Some(MAX_SIDE);
        limits.max_image_height = Some(MAX_SIDE);
        limits.max_alloc = Some(MAX_DECODED);
        reader.limits(limits.clone());
        let decode = || {
            let mut decoder = reader.into_decoder()?;
            limits.reserve(decoder.total_bytes())?;
            decoder.set_limits(limits)?;
            let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
            // Grey first: a turn makes a copy.
            let mut image = match DynamicImage::from_decoder(decoder)? {
                image if image.color().has_alpha() => image.into_luma_alpha8().into(),
                image => DynamicImage::from(image.into_luma8()),
            };
            image.apply_orientation(orientation);
            Ok(image)
        };
        let decoded = decode().map_err(|error| match error {
            image::ImageError::Limits(_) => PictureError::TooLarge,
            error => PictureError::Decode(error),
        })?;
        Ok(Picture::from_image(&decoded))
    }

    fn from_image(image: &DynamicImage) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        let (pixels, ground) = match image.color().has_alpha() {
            false => (image.to_luma8().into_raw(), Ground::Own),
            true => {
                let pixels: Vec<_> = image.to_luma_alpha8().pixels().map(|pixel| pixel.0).collect();
                composite(width, &pixels)
            }
        };
        Picture { width, height, pixels, ground }
    }

    /// Width and height in pixels.
    pub fn size(&self) -> (usize, usize) {
        (self.width, self.height)
    }

    /// The pixels, row by row, for a model of light ink on black. A transparent picture shows by
    /// itself whether its ink is dark, and is inverted then; any other stays as it is.
    pub fn into_pixels(self) -> Vec<u8> {
        match self.ground {
            Ground::White => self.pixels.iter().map(|pixel| 255 - pixel).collect(),
            Ground::Own | Ground::Black => self.pixels,
        }
    }

    /// The digit on this picture as MNIST would have it: light on black, scaled and centred, in a
    /// field of `side` × `side` pixels. Of `side`, 20/28 are the box of the digit.
    ///
    /// # Errors
    /// When nothing stands out from the background.
    pub fn like_mnist(&self, side: usize) -> Result<Vec<u8>, PictureError> {
        let ink = self.ink()?;
        let (left, top, width, height) = self.bounds(&ink);
        let scale = side as f64 * 20.0 / 28.0 / width.max(height) as f64;
        let size = |length: usize| ((length as f64 * scale).round() as usize).max(1);
        let (columns, rows) = (size(width), size(height));

        let mut digit = vec![0.0; columns * rows];
        for row in 0..rows {
            let down = span(row, rows, height);
            for column in 0..columns {
                let across = span(column, columns, width);
                let (mut sum, mut area) = (0.0, 0.0);
                for &(y, share_y) in &down {
                    for &(x, share_x) in &across {
                        let at = (top + y) * self.width + left + x;
                        sum += f64::from(ink[at]) * share_x * share_y;
                        area += share_x * share_y;
                    }
                }
                digit[row * columns + column] = sum / area;
            }
        }
        Ok(centred(&digit, columns, side))
    }

    /// How far each pixel stands out from the background: 0 to 255, noise removed.
    fn ink(&self) -> Result<Vec<u8>, PictureError> {
        let background = self.background();
        let away = |pixel: &u8| pixel.abs_diff(background);
        let strongest = self.pixels.iter().map(away).max().unwrap_or(0);
        if strongest <= NOISE {
            return Err(PictureError::Blank);
        }
        let stretched = |pixel: &u8| {
            let ink = (u32::from(away(pixel)) * 255 / u32::from(strongest)) as u8;
            if ink <= NOISE { 0 } else { ink }
        };
        Ok(self.pixels.iter().map(stretched).collect())
    }

    /// The median of the pixels on the border.
    fn background(&self) -> u8 {
        let (width, height) = (self.width, self.height);
        let is_border = |at: usize| {
            let (x, y) = (at % width, at / width);
            x == 0 || y == 0 || x + 1 == width || y + 1 == height
        };
        let mut counts = [0usize; 256];
        for (at, &pixel) in self.pixels.iter().enumerate() {
            if is_border(at) {
                counts[usize::from(pixel)] += 1;
            }
        }
        let half = counts.iter().sum::<usize>().div_ceil(2);
        let mut seen = 0;
        let median = counts.iter().position(|&count| {
            seen += count;
            seen >= half
        });
        median.unwrap_or(0) as u8
    }

    /// Left, top, width and height of the part that has ink.
    fn bounds(&self, ink: &[u8]) -> (usize, usize, usize, usize) {
        let (mut left, mut right, mut top, mut bottom) = (self.width, 0, self.height, 0);
        for (at, _) in ink.iter().enumerate().filter(|(_, ink)| **ink > 0) {
            let (x, y) = (at % self.width, at / self.width);
            (left, right) = (left.min(x), right.max(x));
            (top, bottom) = (top.min(y), bottom.max(y));
        }
        (left, top, right + 1 - left, bottom + 1 - top)
    }
}

/// The pixels of `from` that pixel `at` of `to` covers, each with its share: averaging over areas.
fn span(at: usize, to: usize, from: usize) -> Vec<(usize, f64)> {
    let scale = from as f64 / to as f64;
    let (begin, end) = (at as f64 * scale, (at + 1) as f64 * scale);
    let first = begin as usize;
    let last = (end.ceil() as usize).min(from);
    (first..last)
        .map(|pixel| (pixel, end.min((pixel + 1) as f64) - begin.max(pixel as f64)))
        .filter(|&(_, share)| share > 1e-9)
        .collect()
}

/// The digit in a field, its centre of mass in the centre, its brightest pixel white.
fn centred(digit: &[f64], columns: usize, side: usize) -> Vec<u8> {
    let (mut mass, mut x_mass, mut y_mass, mut brightest) = (0.0, 0.0, 0.0, 0.0f64);
    for (at, &ink) in digit.iter().enumerate() {
        mass += ink;
        x_mass += ink * ((at % columns) as f64 + 0.5);
        y_mass += ink * ((at / columns) as f64 + 0.5);
        brightest = brightest.max(ink);
    }
    let middle = side as f64 / 2.0;
    let right = (middle - x_mass / mass).round() as isize;
    let down = (middle - y_mass / mass).round() as isize;
    let mut field = vec![0; side * side];
    for (at, &ink) in digit.iter().enumerate() {
        let x = (at % columns) as isize + right;
        let y = (at / columns) as isize + down;
        let inside = 0..side as isize;
        if inside.contains(&x) && inside.contains(&y) {
            field[y as usize * side + x as usize] = (ink * 255.0 / brightest).round() as u8;
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bar of ink from (30, 20) to (50, 80) on a field of 100 × 100.
    fn bar(ink: u8, background: u8) -> Picture {
        let mut pixels = vec![background; 100 * 100];
        for y in 20..80 {
            for x in 30..50 {
                pixels[y * 100 + x] = ink;
            }
        }
        Picture { width: 100, height: 100, pixels, ground: Ground::Own }
    }

    /// A file of one row of pixels, grey and alpha.
    fn row(pixels: &[[u8; 2]], format: ImageFormat) -> Vec<u8> {
        let width = pixels.len() as u32;
        let image = image::GrayAlphaImage::from_raw(width, 1, pixels.concat()).unwrap();
        let mut file = Cursor::new(Vec::new());
        // The encoder of WebP takes no grey.
        let image = DynamicImage::from(DynamicImage::from(image).to_rgba8());
        image.write_to(&mut file, format).unwrap();
        file.into_inner()
    }

    #[test]
    fn ink_on_transparent_is_light_on_black_in_every_format() {
        for format in [ImageFormat::Png, ImageFormat::WebP] {
            for ink in [0, 255] {
                let file = row(&[[ink, 0], [ink, 255], [ink, 0]], format);
                let picture = Picture::decode(&file).unwrap();
                assert!(picture.like_mnist(28).is_ok(), "{ink} {format:?}");
                assert_eq!(picture.into_pixels(), [0, 255, 0], "{ink} {format:?}");
            }
        }
    }

    #[test]
    fn an_opaque_picture_is_not_inverted() {
        let file = row(&[[255, 255], [0, 255], [255, 255]], ImageFormat::Png);
        assert_eq!(Picture::decode(&file).unwrap().into_pixels(), [255, 0, 255]);
    }

    #[test]
    fn a_picture_is_turned_as_its_exif_data_say() {
        use image::ImageEncoder;
        // TIFF, little-endian, one field: orientation (0x112), a short, one value.
        let exif = |orientation: u8| {
            let mut data = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
            data.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
            data
        };
        for (orientation, size, pixels) in [
            (1, (3, 1), [10, 20, 30]),
            (2, (3, 1), [30, 20, 10]),
            (3, (3, 1), [30, 20, 10]),
            (6, (1, 3), [10, 20, 30]),
            (8, (1, 3), [30, 20, 10]),
        ] {
            let mut file = Vec::new();
            let mut encoder = image::codecs::png::PngEncoder::new(&mut file);
            encoder.set_exif_metadata(exif(orientation)).unwrap();
            encoder.write_image(&[10, 20, 30], 3, 1, image::ExtendedColorType::L8).unwrap();
            let picture = Picture::decode(&file).unwrap();
            assert_eq!(picture.size(), size, "orientation {orientation}");
            assert_eq!(picture.into_pixels(), pixels, "orientation {orientation}");
        }
    }

    #[test]
    fn ink_is_white_whatever_its_colour_was() {
        let dark = bar(0, 255).like_mnist(28).unwrap();
        let light = bar(255, 0).like_mnist(28).unwrap();
        let grey = bar(60, 140).like_mnist(28).unwrap();
        assert_eq!((&dark, &dark), (&light, &grey));
        assert_eq!(dark.iter().max(), Some(&255));
        assert_eq!(dark[0], 0);
    }

    #[test]
    fn a_digit_fills_the_box_and_its_mass_is_in_the_centre() {
        let field = bar(0, 255).like_mnist(28).unwrap();
        let rows: Vec<_> =
            (0..28).filter(|y| field[y * 28..][..28].iter().any(|&p| p > 0)).collect();
        assert_eq!((rows[0], rows.len()), (4, 20));
        let columns = (0..28).filter(|x| (0..28).any(|y| field[y * 28 + x] > 0)).count();
        assert_eq!(columns, 7);
        let mass: u64 = field.iter().map(|&p| u64::from(p)).sum();
        let moment: u64 = (0..784).map(|at| u64::from(field[at]) * (at as u64 % 28)).sum();
        let centre = moment as f64 / mass as f64 + 0.5;
        assert!((13.5..=14.5).contains(&centre), "{centre}");
    }

    #[test]
    fn a_blank_picture_is_refused() {
        assert!(matches!(bar(200, 200).like_mnist(28), Err(PictureError::Blank)));
        assert!(matches!(bar(200, 210).like_mnist(28), Err(PictureError::Blank)));
    }

    #[test]
    fn a_picture_of_one_pixel_and_a_line_are_scaled() {
        let mut pixels = vec![255; 9];
        pixels[4] = 0;
        let dot = Picture { width: 3, height: 3, pixels, ground: Ground::Own };
        let field = dot.like_mnist(28).unwrap();
        assert_eq!(field.iter().filter(|&&p| p == 255).count(), 400);
    }

    #[test]
    fn other_bytes_are_no_picture() {
        assert!(!Picture::is_encoded(b""));
        assert!(!Picture::is_encoded(&[0; 784]));
        assert!(matches!(Picture::decode(b"GIF89a..."), Err(PictureError::Format)));
        let cut = Picture::decode(b"\x89PNG\r\n\x1a\n");
        assert!(matches!(cut, Err(PictureError::Decode(_))));
    }
}
