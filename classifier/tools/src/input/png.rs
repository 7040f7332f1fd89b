//! PNG images, decoded to grey bytes by the `png` crate.

use std::io::Cursor;

use ::png::{ColorType, Decoder, DecodingError, Info, Limits, Transformations};

use afterimage_classifier::{DataError, Shape};
use afterimage_core::transparency::{self, Ground};

use crate::image::Image;

/// The first eight bytes of every PNG file.
pub const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// The highest compression ratio of DEFLATE is 1032 to 1 (zlib's technical notes). A header that
/// announces more than this times the file's length is invalid.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// Decodes a PNG of any colour type and bit depth.
///
/// 16-bit samples keep their upper byte. Colours become grey by the weights of ITU-R BT.601 (0.299
/// R + 0.587 G + 0.114 B). A transparent image (an alpha channel, or a `tRNS` chunk of any colour
/// type) is composited on white, and [`Image::invert`] then makes it light on dark. Light ink, and
/// a picture with a dark ground of its own, are composited on black: see
/// [`transparency::composite`].
pub fn decode(bytes: &[u8]) -> Result<Image, DataError> {
    if !bytes.starts_with(&SIGNATURE) {
        return Err(DataError::not("a PNG image", bytes));
    }
    let limits = Limits { bytes: 8 * afterimage_classifier::MAX_INPUT_LEN };
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let info = reader.info();
    let key = transparent_grey(info);
    // Checks the number of pixels, too.
    let shape = Shape::new(&[info.height, info.width])?;
    let promised = info.raw_bytes() as u64;
    let possible = (bytes.len() as u64).saturating_mul(MAX_DEFLATE_RATIO);
    if promised > possible {
        return Err(DataError::Truncated {
            what: "PNG image data",
            needed: promised.div_ceil(MAX_DEFLATE_RATIO),
            have: bytes.len() as u64,
        });
    }
    let size = reader
        .output_buffer_size()
        .ok_or_else(|| DataError::malformed("PNG image", "its size overflows"))?;
    let mut samples = vec![0; size];
    let frame = reader.next_frame(&mut samples).map_err(broken)?;
    let samples = samples.get(..frame.buffer_size()).unwrap_or_default();
    let alpha = |grey| if Some(grey) == key { 0 } else { 255 };
    let pixels: Vec<u8> = match frame.color_type {
        ColorType::Grayscale => samples.to_vec(),
        ColorType::GrayscaleAlpha if key.is_some() => {
            let samples = samples.as_chunks().0.iter();
            return composite(shape, samples.map(|&[grey, _]| [grey, alpha(grey)]).collect());
        }
        ColorType::GrayscaleAlpha => return composite(shape, samples.as_chunks().0.to_vec()),
        ColorType::Rgb => samples.as_chunks().0.iter().map(|&rgb| luma(rgb)).collect(),
        ColorType::Rgba => {
            let samples = samples.as_chunks().0.iter();
            let grey = samples.map(|&[r, g, b, alpha]| [luma([r, g, b]), alpha]).collect();
            return composite(shape, grey);
        }
        ColorType::Indexed => {
            return Err(DataError::malformed("PNG image", "its palette was not expanded"));
        }
    };
    Image::new(shape, pixels)
}

/// The grey that a `tRNS` chunk makes transparent, as an 8-bit value, in a file with fewer than 8
/// bits per pixel. Only the low bits of the chunk count (PNG specification, 11.3.2.1), and some
/// programs set the others. The `png` crate compares all of them.
fn transparent_grey(info: &Info<'_>) -> Option<u8> {
    let bits = info.bit_depth as u8;
    let low = match info.trns.as_deref() {
        Some([low] | [_, low]) if info.color_type == ColorType::Grayscale && bits < 8 => *low,
        _ => return None,
    };
    let most = (1 << bits) - 1;
    Some((low & most) * (255 / most))
}

fn luma([r, g, b]: [u8; 3]) -> u8 {
    // The sum of the three weights is 65536, so white stays white.
    ((19_595 * u32::from(r) + 38_470 * u32::from(g) + 7_471 * u32::from(b) + 32_768) >> 16) as u8
}

/// The image of pixels `[grey, alpha]` on a ground.
fn composite(shape: Shape, pixels: Vec<[u8; 2]>) -> Result<Image, DataError> {
    let width = shape.dims().last().map_or(1, |&width| width as usize);
    let (pixels, ground) = transparency::composite(width, &pixels);
    let image = Image::new(shape, pixels)?;
    Ok(if ground == Ground::White { image.on_white_ground() } else { image })
}

fn broken(error: DecodingError) -> DataError {
    DataError::malformed("PNG image", error.to_string())
}

#[cfg(test)]
mod tests {
    use ::png::{BitDepth, Encoder};

    use super::*;

    fn encode(color: ColorType, depth: BitDepth, width: u32, data: &[u8]) -> Vec<u8> {
        encode_with(color, depth, width, data, &[])
    }

    /// With a `tRNS` chunk, if it is not empty.
    fn encode_with(
        color: ColorType,
        depth: BitDepth,
        width: u32,
        data: &[u8],
        transparency: &'static [u8],
    ) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, width, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette(vec![0, 0, 0, 255, 255, 255, 255, 0, 0]);
        }
        if !transparency.is_empty() {
            encoder.set_trns(transparency);
        }
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(data).unwrap();
        writer.finish().unwrap();
        file
    }

    #[test]
    fn every_colour_type_and_depth_becomes_grey_bytes() {
        use BitDepth::{Eight, One, Sixteen, Two};
        for (color, depth, width, data, grey) in [
            (ColorType::Grayscale, Eight, 2, &[7, 200][..], &[7, 200][..]),
            (ColorType::Grayscale, One, 3, &[0b1010_0000], &[255, 0, 255]),
            (ColorType::Grayscale, Sixteen, 2, &[0xab, 0xcd, 0, 0xff], &[0xab, 0]),
            (ColorType::GrayscaleAlpha, Eight, 2, &[200, 255, 100, 255], &[200, 100]),
            (ColorType::Rgb, Eight, 2, &[255, 255, 255, 255, 0, 0], &[255, 76]),
            (ColorType::Rgb, Sixteen, 1, &[0, 0, 255, 0, 0, 0], &[150]),
            (ColorType::Rgba, Eight, 2, &[9, 9, 9, 255, 8, 8, 8, 255], &[9, 8]),
            (ColorType::Indexed, Two, 3, &[0b0001_1000], &[0, 255, 76]),
        ] {
            let image = decode(&encode(color, depth, width, data)).unwrap();
            assert_eq!(image.pixels(), grey, "{color:?} {depth:?}");
            assert_eq!(image.shape().dims(), [1, width]);
            assert!(!image.is_on_white_ground(), "{color:?}: nothing is transparent");
        }
    }

    #[test]
    fn black_on_transparent_is_black_on_white_in_every_type() {
        use BitDepth::{Eight, Four, One, Sixteen, Two};
        use ColorType::{Grayscale, GrayscaleAlpha, Indexed, Rgb, Rgba};
        // Two pixels: black, and one that is transparent.
        for (color, depth, data, transparency) in [
            (GrayscaleAlpha, Eight, &[0, 255, 0, 0][..], &[][..]),
            (GrayscaleAlpha, Sixteen, &[0, 0, 255, 255, 0, 0, 0, 0], &[]),
            (Rgba, Eight, &[0, 0, 0, 255, 0, 0, 0, 0], &[]),
            (Rgba, Sixteen, &[0, 0, 0, 0, 0, 0, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0], &[]),
            (Grayscale, One, &[0b0100_0000], &[0, 1]),
            (Grayscale, Two, &[0b0010_0000], &[0, 2]),
            // With high bits set, as Pillow writes the value 255 of a 1-bit image.
            (Grayscale, One, &[0b0100_0000], &[0, 255]),
            (Grayscale, Two, &[0b0011_0000], &[255, 255]),
            (Grayscale, Four, &[0x0f], &[0, 255]),
            (Grayscale, Four, &[0x09], &[0, 9]),
            (Grayscale, Eight, &[0, 90], &[0, 90]),
            (Grayscale, Sixteen, &[0, 0, 90, 7], &[90, 7]),
            (Rgb, Eight, &[0, 0, 0, 1, 2, 3], &[0, 1, 0, 2, 0, 3]),
            (Rgb, Sixteen, &[0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6], &[1, 2, 3, 4, 5, 6]),
            (Indexed, One, &[0b0100_0000], &[255, 0]),
            (Indexed, Eight, &[0, 2], &[255, 255, 0]),
        ] {
            let image = decode(&encode_with(color, depth, 2, data, transparency)).unwrap();
            assert_eq!(image.pixels(), [0, 255], "{color:?} {depth:?}");
            assert!(image.is_on_white_ground(), "{color:?} {depth:?}");
        }
    }

    #[test]
    fn a_light_drawing_on_transparent_is_put_on_black() {
        let data = [255, 255, 200, 128, 0, 0];
        let light = decode(&encode(ColorType::GrayscaleAlpha, BitDepth::Eight, 3, &data)).unwrap();
        assert_eq!(light.pixels(), [255, 100, 0]);
        assert!(!light.is_on_white_ground());
    }

    #[test]
    fn rejects_every_truncation() {
        let whole = encode(ColorType::Grayscale, BitDepth::Eight, 4, &[1, 2, 3, 4]);
        // The last 12 bytes are the IEND chunk, without which all the pixels are still there.
        for len in 0..whole.len() - 12 {
            assert!(decode(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
        }
    }

    #[test]
    fn a_header_promising_more_than_deflate_could_hold_is_refused() {
        let mut file = encode(ColorType::Grayscale, BitDepth::Eight, 4, &[1, 2, 3, 4]);
        // Width and height stand at bytes 16 to 23, their chunk's checksum at 29 to 32.
        file[16..24].copy_from_slice(&[0, 0, 8, 0, 0, 0, 8, 0]);
        let mut crc = flate2::Crc::new();
        crc.update(&file[12..29]);
        let checksum = crc.sum();
        for (at, shift) in (29..33).zip([24, 16, 8, 0]) {
            file[at] = (checksum >> shift) as u8;
        }
        let error = decode(&file).unwrap_err();
        assert!(matches!(error, DataError::Truncated { .. }), "{error}");
    }
}
