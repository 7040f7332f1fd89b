//! The IDX format of the MNIST files (Y. LeCun, C. Cortes, C. Burges, "The MNIST database of
//! handwritten digits", the section "FILE FORMATS"):
//!
//! ```text
//! offset  bytes  what
//! 0       2      zero
//! 2       1      type of the values; 0x08 is an unsigned byte, the only one read here
//! 3       1      rank: number of dimensions
//! 4       4×rank dimensions, big-endian, slowest-varying first
//! ...            the values
//! ```

use afterimage_classifier::{DataError, MAX_RANK, Shape};

use crate::image::Image;

/// Type code of unsigned bytes.
const UNSIGNED_BYTE: u8 = 0x08;
/// Bytes before the dimensions.
const MAGIC_LEN: usize = 4;
/// Bytes of one dimension.
const DIMENSION_LEN: usize = 4;

/// An IDX file's dimensions, and its values borrowed from the file.
#[derive(Debug)]
pub struct Idx<'a> {
    pub dims: Vec<u32>,
    pub values: &'a [u8],
}

/// Reads the header, and checks that the file has exactly the announced values.
pub fn decode(bytes: &[u8]) -> Result<Idx<'_>, DataError> {
    let Some((&[0, 0, UNSIGNED_BYTE, rank], rest)) = bytes.split_first_chunk::<MAGIC_LEN>() else {
        return Err(DataError::not("an IDX file of unsigned bytes", bytes));
    };
    let rank = usize::from(rank);
    // One more dimension than a shape: the first dimension counts the items.
    if rank == 0 || rank > MAX_RANK + 1 {
        return Err(DataError::out_of_range("IDX rank", 1, MAX_RANK + 1, rank));
    }
    let Some((header, values)) = rest.split_at_checked(rank * DIMENSION_LEN) else {
        return Err(DataError::Truncated {
            what: "IDX header",
            needed: (MAGIC_LEN + rank * DIMENSION_LEN) as u64,
            have: bytes.len() as u64,
        });
    };
    #[expect(clippy::big_endian_bytes, reason = "IDX is the one big-endian format we read")]
    let dims: Vec<u32> = header
        .as_chunks()
        .0
        .iter()
        .map(|&dim: &[u8; DIMENSION_LEN]| u32::from_be_bytes(dim))
        .collect();

    let promised = dims.iter().fold(1_u64, |product, &dim| product.saturating_mul(u64::from(dim)));
    let have = values.len() as u64;
    if have < promised {
        return Err(DataError::Truncated { what: "IDX body", needed: promised, have });
    }
    if have > promised {
        return Err(DataError::Trailing { what: "IDX body", extra: have - promised });
    }
    Ok(Idx { dims, values })
}

/// Decodes an image file: a count of at least one, then the shape of an image. Returns the shape
/// and all pixels.
pub fn decode_images(bytes: &[u8]) -> Result<(Shape, &[u8]), DataError> {
    let idx = decode(bytes)?;
    match idx.dims.as_slice() {
        [] | [_] => Err(is_labels(&idx)),
        [0, ..] => Err(DataError::malformed("IDX image file", "it has no images")),
        [_, shape @ ..] => Ok((Shape::new(shape)?, idx.values)),
    }
}

fn is_labels(idx: &Idx<'_>) -> DataError {
    DataError::malformed(
        "IDX image file",
        format!("it is a label file (one dimension, {} labels)", idx.values.len()),
    )
}

/// Decodes a label file: one dimension.
pub fn decode_labels(bytes: &[u8]) -> Result<&[u8], DataError> {
    let idx = decode(bytes)?;
    if idx.dims.len() != 1 {
        return Err(DataError::malformed(
            "IDX label file",
            format!("it is an image file ({} dimensions)", idx.dims.len()),
        ));
    }
    Ok(idx.values)
}

/// Decodes a file of one image: rank 2, or rank 3 with a count of one.
pub fn decode_single_image(bytes: &[u8]) -> Result<Image, DataError> {
    let idx = decode(bytes)?;
    let dims = match idx.dims.as_slice() {
        [_] => return Err(is_labels(&idx)),
        [1, rows, columns] => &[*rows, *columns],
        [count, _, _] => {
            let count = *count as usize;
            return Err(DataError::out_of_range("images in a one-image IDX file", 1, 1, count));
        }
        dims => dims,
    };
    Image::new(Shape::new(dims)?, idx.values)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_BY_THREE: [u8; 18] = [0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6];

    #[test]
    fn reads_dimensions_big_endian_and_values_in_order() {
        let idx = decode(&TWO_BY_THREE).unwrap();
        assert_eq!(idx.dims, [2, 3]);
        assert_eq!(idx.values, [1, 2, 3, 4, 5, 6]);
        let image = decode_single_image(&TWO_BY_THREE).unwrap();
        assert_eq!(image.shape().to_string(), "2x3");
        assert_eq!(decode_images(&TWO_BY_THREE).unwrap().0.to_string(), "3");
    }

    #[test]
    fn rejects_every_truncation_and_any_trailing_byte() {
        for len in 0..TWO_BY_THREE.len() {
            assert!(decode(&TWO_BY_THREE[..len]).is_err(), "{len} bytes");
        }
        let mut longer = TWO_BY_THREE.to_vec();
        longer.push(0);
        assert!(matches!(decode(&longer), Err(DataError::Trailing { extra: 1, .. })));
    }

    #[test]
    fn a_header_promising_exabytes_allocates_nothing_and_is_refused() {
        let mut bytes = vec![0, 0, 8, 3];
        bytes.extend([0xff; 12]);
        let error = decode(&bytes).unwrap_err();
        assert!(matches!(error, DataError::Truncated { have: 0, .. }), "{error}");
    }

    #[test]
    fn tells_image_files_from_label_files() {
        const LABELS: [u8; 10] = [0, 0, 8, 1, 0, 0, 0, 2, 7, 2];
        assert_eq!(decode_labels(&LABELS).unwrap(), [7, 2]);
        let error = decode_labels(&TWO_BY_THREE).unwrap_err().to_string();
        assert!(error.contains("it is an image file (2 dimensions)"), "{error}");
        for error in
            [decode_images(&LABELS).unwrap_err(), decode_single_image(&LABELS).unwrap_err()]
        {
            let error = error.to_string();
            assert!(error.contains("it is a label file (one dimension, 2 labels)"), "{error}");
        }
    }

    #[test]
    fn an_image_file_without_images_is_refused() {
        let none = [0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2];
        let error = decode_images(&none).unwrap_err().to_string();
        assert!(error.contains("it has no images"), "{error}");
    }

    #[test]
    fn rejects_other_value_types_and_ranks() {
        assert!(decode(&[0, 0, 0x0d, 1, 0, 0, 0, 0]).is_err());
        assert!(decode(&[0, 0, 8, 0]).is_err());
        assert!(decode(&[0, 0, 8, 6]).is_err());
    }
}
