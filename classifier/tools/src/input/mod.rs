//! Decoders of image file formats. They do not trust headers: the size of the file and a named
//! limit bound all allocations.

use std::path::Path;

use afterimage_classifier::bounded::read_at_most;
use afterimage_classifier::{DataError, bounded};
use flate2::bufread::GzDecoder;

use crate::image::Image;

pub mod idx;
pub mod netpbm;
pub mod png;

/// Largest image file, in bytes: an uncompressed picture of
/// [`MAX_INPUT_LEN`](afterimage_classifier::MAX_INPUT_LEN) pixels in 16-bit RGBA, with its headers.
pub const MAX_IMAGE_FILE_BYTES: u64 = 8 * afterimage_classifier::MAX_INPUT_LEN as u64 + (1 << 16);

/// Largest data-set file, in bytes, before and after decompression. MNIST has 47 MB, EMNIST 550 MB.
pub const MAX_DATASET_FILE_BYTES: u64 = 1 << 30;

impl Image {
    /// Reads an image file: PNG, PGM (P2 or P5), or an IDX file with exactly one image. PGM and IDX
    /// may be gzipped. The pixels stay as they are; see [`Image::invert`] for dark ink on light
    /// paper. A transparent PNG is composited on white, see [`Image::is_on_white_ground`].
    ///
    /// # Errors
    /// [`DataError`], naming the file, when it cannot be read or is of another format.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let file = bounded::open(path).map_err(|source| DataError::io(path, source))?;
        let bytes = read_at_most(file, MAX_IMAGE_FILE_BYTES, "image file")
            .and_then(|bytes| unpack(bytes, MAX_IMAGE_FILE_BYTES, "unpacked image file"))
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
        read_at_most(file, MAX_DATASET_FILE_BYTES, "image file")
            .and_then(|bytes| unpack(bytes, MAX_DATASET_FILE_BYTES, "unpacked image file"))
            .and_then(|bytes| decode_all(&bytes))
            .map_err(|error| error.in_file(path))
    }

    /// Decodes the bytes of an image file: PNG, PGM (P2 or P5), or IDX with one image; not gzipped.
    ///
    /// # Errors
    /// [`DataError::Format`] when it has another format; other variants when it is damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, DataError> {
        if bytes.starts_with(&png::SIGNATURE) {
            png::decode(bytes)
        } else if bytes.starts_with(b"P2") || bytes.starts_with(b"P5") {
            netpbm::decode(bytes)
        } else if bytes.starts_with(&[0, 0, 8]) {
            idx::decode_single_image(bytes)
        } else if let Some((name, _)) = OTHER_FORMATS.iter().find(|(_, is)| is(bytes)) {
            let detail = format!("the file is {name}; convert it to PNG");
            Err(DataError::malformed("PNG, PGM or IDX image", detail))
        } else {
            Err(DataError::not("a PNG, PGM or IDX image", bytes))
        }
    }
}

/// Whether a file begins as one of a format does.
type BeginsLike = fn(&[u8]) -> bool;

/// Formats that are not read, by their first bytes.
const OTHER_FORMATS: [(&str, BeginsLike); 6] = [
    ("a JPEG image", |bytes| bytes.starts_with(b"\xff\xd8\xff")),
    ("a GIF image", |bytes| bytes.starts_with(b"GIF8")),
    ("a WebP image", |bytes| bytes.starts_with(b"RIFF") && bytes.get(8..12) == Some(b"WEBP")),
    ("a TIFF image", |bytes| bytes.starts_with(b"II*\0") || bytes.starts_with(b"MM\0*")),
    ("a BMP image", |bytes| bytes.starts_with(b"BM") && bytes.get(6..10) == Some(&[0; 4])),
    (
        "a PPM or PBM image",
        |bytes| matches!(bytes, [b'P', b'1' | b'3' | b'4' | b'6' | b'7', after, ..] if after.is_ascii_whitespace()),
    ),
];

/// The first two bytes of a gzip file (RFC 1952, section 2.3.1).
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Whether these bytes are gzipped.
fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(&GZIP_MAGIC)
}

/// Decompresses gzip, up to `limit` decompressed bytes. Returns other bytes unchanged.
///
/// As with `gunzip`, a file may have several members, and zero bytes may follow the last one (tapes
/// and block devices pad with them). Other bytes after the last member are an error.
pub fn unpack(bytes: Vec<u8>, limit: u64, what: &'static str) -> Result<Vec<u8>, DataError> {
    if !is_gzip(&bytes) {
        return Ok(bytes);
    }
    let mut rest = bytes.as_slice();
    let mut unpacked = Vec::new();
    while is_gzip(rest) {
        let mut decoder = GzDecoder::new(rest);
        let left = limit - unpacked.len() as u64;
        let member = read_at_most(&mut decoder, left, what).map_err(|error| match error {
            // The limit applies to all members together.
            DataError::TooLarge { .. } => DataError::TooLarge { what, limit },
            error => error,
        })?;
        unpacked.extend(member);
        rest = decoder.into_inner();
    }
    match rest.iter().position(|&byte| byte != 0) {
        None => Ok(unpacked),
        Some(padding) => Err(DataError::Trailing { what, extra: (rest.len() - padding) as u64 }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn says_what_an_unknown_file_starts_with() {
        let error = Image::decode(b"%PDF-1.7").unwrap_err().to_string();
        assert!(error.contains("%PDF-1.7"), "{error}");
        assert!(Image::decode(b"").unwrap_err().to_string().contains("empty"));
    }

    #[test]
    fn names_the_format_of_other_pictures() {
        for (start, name) in [
            (&b"GIF89a"[..], "a GIF image"),
            (b"\xff\xd8\xff\xe0", "a JPEG image"),
            (b"RIFF\x1a\0\0\0WEBPVP8L", "a WebP image"),
            (b"II*\0\x08\0", "a TIFF image"),
            (b"BM\x46\x07\0\0\0\0\0\0", "a BMP image"),
            (b"P6\n28 28\n255\n", "a PPM or PBM image"),
        ] {
            let error = Image::decode(start).unwrap_err().to_string();
            assert!(error.contains(name) && error.contains("convert it to PNG"), "{error}");
        }
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

    fn valid_files() -> Vec<Vec<u8>> {
        let mut png = Vec::new();
        let mut encoder = ::png::Encoder::new(&mut png, 5, 3);
        encoder.set_color(::png::ColorType::Rgb);
        let mut writer = encoder.write_header().unwrap();
        writer.write_image_data(&[77; 45]).unwrap();
        writer.finish().unwrap();
        vec![
            png,
            b"P5 2 2 255\n1234".to_vec(),
            b"P2 2 2 9\n1 2 3 4\n".to_vec(),
            vec![0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4],
        ]
    }

    #[test]
    fn the_files_that_are_mutated_below_are_valid() {
        for file in valid_files() {
            Image::decode(&file).unwrap();
        }
    }

    proptest! {
        #[test]
        fn no_mutation_of_a_valid_file_panics(
            which in 0..4_usize,
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut file = valid_files().swap_remove(which);
            for (at, byte) in edits {
                let at = at.index(file.len());
                file[at] = byte;
            }
            let _ = Image::decode(&file);
            file.truncate(cut.index(file.len()));
            let _ = Image::decode(&file);
        }
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn unpacks_gzip_and_returns_other_bytes_unchanged() {
        assert_eq!(unpack(gzip(b"hello"), 5, "test").unwrap(), b"hello");
        assert_eq!(unpack(b"hello".to_vec(), 5, "test").unwrap(), b"hello");
    }

    #[test]
    fn several_members_and_zero_padding_are_accepted() {
        let two = [gzip(b"hel"), gzip(b"lo")].concat();
        assert_eq!(unpack(two.clone(), 5, "test").unwrap(), b"hello");
        assert!(unpack(two.clone(), 4, "test").is_err());
        let padded = [&two[..], &[0; 512]].concat();
        assert_eq!(unpack(padded.clone(), 5, "test").unwrap(), b"hello");
        for garbage in [&b"x"[..], b"\0\0x", &gzip(b"x")[..3]] {
            let file = [&padded[..], garbage].concat();
            let error = unpack(file, 100, "test").unwrap_err();
            assert!(matches!(error, DataError::Trailing { .. }), "{error}");
        }
    }

    #[test]
    fn a_gzip_bomb_stops_at_the_limit() {
        let bomb = gzip(&vec![0; 10_000_000]);
        assert!(bomb.len() < 20_000);
        let error = unpack(bomb, 1000, "test file").unwrap_err().to_string();
        assert_eq!(error, "test file has more than 1000 bytes, the limit");
    }

    #[test]
    fn a_cut_gzip_file_is_an_error() {
        let whole = gzip(&[7; 1000]);
        for len in 2..whole.len() {
            assert!(unpack(whole[..len].to_vec(), 2000, "test").is_err(), "{len} bytes");
        }
    }
}
