//! PNG to grey bytes, through the `png` crate.

use std::io::Cursor;

use ::png::{ColorType, Decoder, DecodingError, Limits, Transformations};

use crate::error::DataError;
use crate::image::Image;
use crate::shape::Shape;

/// The first eight bytes of every PNG file.
pub const SIGNATURE: [u8; 8] = *b"\x89PNG\r\n\x1a\n";

/// DEFLATE packs no better than 1032 to 1 (zlib's technical notes), so a file whose header promises
/// more than this times its length is lying.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// Decodes a PNG of any colour type and bit depth.
///
/// 16-bit samples keep their upper byte; colours become grey by the weights of ITU-R BT.601 (0.299
/// R + 0.587 G + 0.114 B); what is transparent lets black through, MNIST's own ground.
pub fn decode(bytes: &[u8]) -> Result<Image, DataError> {
    if !bytes.starts_with(&SIGNATURE) {
        return Err(DataError::not("a PNG image", bytes));
    }
    let limits = Limits { bytes: 8 * crate::MAX_INPUT_LEN };
    let mut decoder = Decoder::new_with_limits(Cursor::new(bytes), limits);
    decoder.set_transformations(Transformations::normalize_to_color8());
    let mut reader = decoder.read_info().map_err(broken)?;
    let info = reader.info();
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
    let pixels: Vec<u8> = match frame.color_type {
        ColorType::Grayscale => samples.to_vec(),
        ColorType::GrayscaleAlpha => {
            samples.as_chunks().0.iter().map(|&[grey, alpha]| over_black(grey, alpha)).collect()
        }
        ColorType::Rgb => samples.as_chunks().0.iter().map(|&rgb| luma(rgb)).collect(),
        ColorType::Rgba => samples
            .as_chunks()
            .0
            .iter()
            .map(|&[r, g, b, alpha]| over_black(luma([r, g, b]), alpha))
            .collect(),
        ColorType::Indexed => {
            return Err(DataError::malformed("PNG image", "its palette was not expanded"));
        }
    };
    Image::new(shape, pixels)
}

fn luma([r, g, b]: [u8; 3]) -> u8 {
    // The three weights add up to 65536, so white stays white.
    ((19_595 * u32::from(r) + 38_470 * u32::from(g) + 7_471 * u32::from(b) + 32_768) >> 16) as u8
}

fn over_black(grey: u8, alpha: u8) -> u8 {
    ((u32::from(grey) * u32::from(alpha) + 127) / 255) as u8
}

fn broken(error: DecodingError) -> DataError {
    DataError::malformed("PNG image", error.to_string())
}

#[cfg(test)]
mod tests {
    use ::png::{BitDepth, Encoder};

    use super::*;

    fn encode(color: ColorType, depth: BitDepth, width: u32, data: &[u8]) -> Vec<u8> {
        let mut file = Vec::new();
        let mut encoder = Encoder::new(&mut file, width, 1);
        encoder.set_color(color);
        encoder.set_depth(depth);
        if color == ColorType::Indexed {
            encoder.set_palette(vec![0, 0, 0, 255, 255, 255, 255, 0, 0]);
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
            (ColorType::GrayscaleAlpha, Eight, 2, &[200, 255, 200, 0], &[200, 0]),
            (ColorType::Rgb, Eight, 2, &[255, 255, 255, 255, 0, 0], &[255, 76]),
            (ColorType::Rgb, Sixteen, 1, &[0, 0, 255, 0, 0, 0], &[150]),
            (ColorType::Rgba, Eight, 2, &[9, 9, 9, 255, 9, 9, 9, 0], &[9, 0]),
            (ColorType::Indexed, Two, 3, &[0b0001_1000], &[0, 255, 76]),
        ] {
            let image = decode(&encode(color, depth, width, data)).unwrap();
            assert_eq!(image.pixels(), grey, "{color:?} {depth:?}");
            assert_eq!(image.shape().dims(), [1, width]);
        }
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
