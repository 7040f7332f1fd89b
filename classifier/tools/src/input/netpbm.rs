//! The grey netpbm format PGM: `P5` (binary) and `P2` (text), as in `pgm(5)` of the netpbm manual.

use afterimage_classifier::{DataError, Shape};

use crate::image::Image;

/// Largest sample value of the format.
const MAX_SAMPLE: u32 = 65_535;

/// Decodes a PGM file of either kind. Samples from 0 to maxval become bytes from 0 to 255, rounded
/// to the nearest.
pub(crate) fn decode(bytes: &[u8]) -> Result<Image, DataError> {
    let binary = match bytes.get(..2) {
        Some(b"P5") => true,
        Some(b"P2") => false,
        _ => return Err(DataError::not("a PGM image", bytes)),
    };
    let mut reader = Reader { bytes, at: 2 };
    let columns = reader.number("PGM width", u32::MAX)?;
    let rows = reader.number("PGM height", u32::MAX)?;
    let maxval = reader.number("PGM maxval", MAX_SAMPLE)?;
    if maxval == 0 {
        return Err(DataError::out_of_range("PGM maxval", 1, MAX_SAMPLE as usize, 0));
    }
    let shape = Shape::new(&[rows, columns])?;
    let pixels = if binary {
        decode_binary(reader.rest_after_one_blank()?, shape.len(), maxval)?
    } else {
        decode_text(reader, shape.len(), maxval)?
    };
    Image::new(shape, pixels)
}

fn decode_binary(body: &[u8], count: usize, maxval: u32) -> Result<Vec<u8>, DataError> {
    let sample_len = if maxval < 256 { 1 } else { 2 };
    let needed = count * sample_len;
    if body.len() < needed {
        return Err(DataError::Truncated {
            what: "PGM body",
            needed: needed as u64,
            have: body.len() as u64,
        });
    }
    if body.len() > needed {
        return Err(DataError::Trailing { what: "PGM body", extra: (body.len() - needed) as u64 });
    }
    body.chunks_exact(sample_len)
        // The most significant byte comes first. A sample of one byte is this byte.
        .map(|sample| sample.iter().fold(0, |value, &byte| value << 8 | u32::from(byte)))
        .map(|sample| scale(sample, maxval))
        .collect()
}

fn decode_text(mut reader: Reader<'_>, count: usize, maxval: u32) -> Result<Vec<u8>, DataError> {
    // A sample takes at least two bytes, a digit and a blank, so the text limits the allocation.
    let mut pixels = Vec::with_capacity(count.min(reader.bytes.len() / 2));
    for _ in 0..count {
        pixels.push(scale(reader.number("PGM sample", MAX_SAMPLE)?, maxval)?);
    }
    reader.skip_blanks_and_comments();
    match reader.bytes.len() - reader.at {
        0 => Ok(pixels),
        extra => Err(DataError::Trailing { what: "PGM body", extra: extra as u64 }),
    }
}

fn scale(sample: u32, maxval: u32) -> Result<u8, DataError> {
    if sample > maxval {
        return Err(DataError::out_of_range("PGM sample", 0, maxval as usize, sample as usize));
    }
    // At most (65535 × 255 + 32767) / 65535 = 255.
    Ok(((sample * 255 + maxval / 2) / maxval) as u8)
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn skip_blanks_and_comments(&mut self) {
        while let Some(&byte) = self.bytes.get(self.at) {
            if byte == b'#' {
                while self.bytes.get(self.at).is_some_and(|&byte| byte != b'\n') {
                    self.at += 1;
                }
            } else if byte.is_ascii_whitespace() {
                self.at += 1;
            } else {
                break;
            }
        }
    }

    fn number(&mut self, what: &'static str, max: u32) -> Result<u32, DataError> {
        self.skip_blanks_and_comments();
        let start = self.at;
        let mut value = 0_u64;
        while let Some(digit) = self.bytes.get(self.at).filter(|byte| byte.is_ascii_digit()) {
            value = (value * 10 + u64::from(digit - b'0')).min(u64::from(u32::MAX) + 1);
            self.at += 1;
        }
        if self.at == start {
            return Err(match self.bytes.get(self.at) {
                None => DataError::Truncated {
                    what,
                    needed: self.at as u64 + 1,
                    have: self.bytes.len() as u64,
                },
                Some(byte) => DataError::malformed(
                    what,
                    format!(
                        "expected a digit at byte {}, found \"{}\"",
                        start,
                        byte.escape_ascii()
                    ),
                ),
            });
        }
        u32::try_from(value).ok().filter(|&value| value <= max).ok_or(DataError::OutOfRange {
            what,
            min: 0,
            max: u64::from(max),
            value,
        })
    }

    /// The binary body: the bytes after the single blank behind maxval.
    fn rest_after_one_blank(&self) -> Result<&'a [u8], DataError> {
        match self.bytes.get(self.at) {
            Some(byte) if byte.is_ascii_whitespace() => {
                Ok(self.bytes.get(self.at + 1..).unwrap_or_default())
            }
            _ => Err(DataError::malformed("PGM header", "no blank after maxval")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_binary_and_text_alike_with_comments() {
        let binary = decode(b"P5\n# made by hand\n3 1\n255\n\x00\x80\xff").unwrap();
        let text = decode(b"P2 3 # width\n1\n255 0 128\n255\n").unwrap();
        assert_eq!(binary, text);
        assert_eq!(binary.shape().dims(), [1, 3]);
        assert_eq!(binary.pixels(), [0, 128, 255]);
    }

    #[test]
    fn scales_maxval_to_255_rounding_to_nearest() {
        assert_eq!(decode(b"P2 4 1 3 0 1 2 3").unwrap().pixels(), [0, 85, 170, 255]);
        let wide = decode(b"P5 2 1 65535\n\xff\xff\x80\x00").unwrap();
        assert_eq!(wide.pixels(), [255, 128]);
    }

    #[test]
    fn rejects_samples_above_maxval_and_maxval_zero() {
        let error = decode(b"P2 1 1 7 8").unwrap_err().to_string();
        assert_eq!(error, "PGM sample is 8; the range is 0 to 7");
        assert!(decode(b"P2 1 1 0 0").is_err());
        assert!(decode(b"P2 1 1 65536 0").is_err());
    }

    #[test]
    fn rejects_truncated_trailing_and_absurd_files() {
        for file in [
            b"P5".as_slice(),
            b"P5 2 2 255",
            b"P5 2 2 255\n\x01\x02\x03",
            b"P5 2 2 255\n\x01\x02\x03\x04\x05",
            b"P2 2 1 255 3",
            b"P2 2 1 255 3 4 5",
            b"P2 2 1 255 3 x",
            b"P5 99999999999999999999 1 255\n",
            b"P5 4294967295 4294967295 255\n",
            b"P5 0 4 255\n",
        ] {
            assert!(decode(file).is_err(), "{}", file.escape_ascii());
        }
    }
}
