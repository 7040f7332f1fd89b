//! Labelled images in memory, read from the four files of MNIST's format.

use std::io::ErrorKind;
use std::path::Path;

use afterimage_classifier::{DataError, Shape, bounded};
use ndarray::ArrayView2;

use crate::input::{MAX_DATASET_FILE_BYTES, idx, unpack};

/// Images of one shape and their labels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    shape: Shape,
    images: Vec<u8>,
    labels: Vec<u16>,
}

/// A training set and a test set of the same shape.
#[derive(Clone, Debug)]
pub struct Split {
    /// The images for training.
    pub train: Dataset,
    /// The images for the test.
    pub test: Dataset,
}

impl Split {
    /// Reads a folder with the four MNIST files. Each has its usual name
    /// (`train-images-idx3-ubyte`) or the name with a dot (`train-images.idx3-ubyte`), plain or
    /// with `.gz`.
    ///
    /// # Errors
    /// [`DataError`], naming the file, when one is missing, broken or does not fit the others.
    pub fn read_dir(directory: &Path) -> Result<Self, DataError> {
        let split = Self {
            train: Dataset::read(directory, "train")?,
            test: Dataset::read(directory, "t10k")?,
        };
        if split.train.shape != split.test.shape {
            return Err(DataError::Mismatch {
                what: "shape of the test images",
                expected: split.train.shape.to_string(),
                found: split.test.shape.to_string(),
            }
            .in_file(directory));
        }
        Ok(split)
    }
}

impl Dataset {
    /// A data set of these images, one after the other, and an equal number of labels.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when the bytes are not `labels.len()` images of `shape`.
    pub fn new(shape: Shape, images: Vec<u8>, labels: Vec<u16>) -> Result<Self, DataError> {
        if Some(images.len()) != shape.len().checked_mul(labels.len()) {
            return Err(DataError::Mismatch {
                what: "bytes of images",
                expected: format!("{} images of {shape} for as many labels", labels.len()),
                found: images.len().to_string(),
            });
        }
        Ok(Self { shape, images, labels })
    }

    /// Reads one half of a data set; `prefix` is `train` or `t10k`.
    ///
    /// # Errors
    /// As [`Split::read_dir`].
    pub fn read(directory: &Path, prefix: &str) -> Result<Self, DataError> {
        let (shape, images) =
            read_idx(directory, &format!("{prefix}-images"), "idx3-ubyte", |bytes| {
                idx::decode_images(bytes).map(|(shape, pixels)| (shape, pixels.to_vec()))
            })?;
        let labels = read_idx(directory, &format!("{prefix}-labels"), "idx1-ubyte", |bytes| {
            idx::decode_labels(bytes)
                .map(|labels| labels.iter().map(|&label| u16::from(label)).collect::<Vec<_>>())
        })?;
        Self::new(shape, images, labels).map_err(|error| error.in_file(directory))
    }

    /// The number of images.
    #[must_use]
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// Whether the data set is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.labels.is_empty()
    }

    /// The shape of the images.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The bytes of image `index`, row by row.
    ///
    /// # Panics
    /// If `index` is not below [`Dataset::len`].
    #[must_use]
    pub fn image(&self, index: usize) -> &[u8] {
        let len = self.shape.len();
        &self.images[index * len..(index + 1) * len]
    }

    /// The bytes of each image, in order.
    pub fn images(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.images.chunks_exact(self.shape.len())
    }

    /// All images as a matrix `[images, bytes of one]`.
    #[must_use]
    pub fn matrix(&self) -> ArrayView2<'_, u8> {
        ArrayView2::from_shape((self.len(), self.shape.len()), &self.images)
            .expect("`new` checked the number of bytes")
    }

    /// The labels, one per image.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// The distinct labels, ascending.
    #[must_use]
    pub fn classes(&self) -> Vec<u16> {
        let mut classes = self.labels.clone();
        classes.sort_unstable();
        classes.dedup();
        classes
    }

    /// The first `count` images and the rest.
    ///
    /// # Panics
    /// If there are fewer than `count`.
    #[must_use]
    pub fn split_at(&self, count: usize) -> (Self, Self) {
        let (first_images, last_images) = self.images.split_at(count * self.shape.len());
        let (first_labels, last_labels) = self.labels.split_at(count);
        let part = |images: &[u8], labels: &[u16]| Self {
            shape: self.shape,
            images: images.to_vec(),
            labels: labels.to_vec(),
        };
        (part(first_images, first_labels), part(last_images, last_labels))
    }
}

fn read_idx<T>(
    directory: &Path,
    stem: &str,
    suffix: &str,
    decode: impl FnOnce(&[u8]) -> Result<T, DataError>,
) -> Result<T, DataError> {
    let names = [
        format!("{stem}-{suffix}"),
        format!("{stem}-{suffix}.gz"),
        format!("{stem}.{suffix}"),
        format!("{stem}.{suffix}.gz"),
    ];
    for name in &names {
        let path = directory.join(name);
        let file = match bounded::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(DataError::io(&path, error)),
        };
        return decode_file(file, decode).map_err(|error| error.in_file(&path));
    }
    Err(DataError::Missing { directory: directory.to_owned(), names: names.join(", ") })
}

/// Reads a file, plain or gzipped, and decodes its contents.
fn decode_file<T>(
    file: impl std::io::Read,
    decode: impl FnOnce(&[u8]) -> Result<T, DataError>,
) -> Result<T, DataError> {
    let bytes = bounded::read_at_most(file, MAX_DATASET_FILE_BYTES, "data-set file")?;
    let bytes = unpack(bytes, MAX_DATASET_FILE_BYTES, "unpacked data-set file")?;
    decode(&bytes)
}

/// Reads an IDX file of images, plain or gzipped. Returns their shape, and the pixels of all
/// images.
///
/// # Errors
/// [`DataError`], naming the file, when it cannot be read or holds no images.
pub fn read_images(path: &Path) -> Result<(Shape, Vec<u8>), DataError> {
    let file = bounded::open(path).map_err(|error| DataError::io(path, error))?;
    decode_file(file, |bytes| {
        idx::decode_images(bytes).map(|(shape, pixels)| (shape, pixels.to_vec()))
    })
    .map_err(|error| error.in_file(path))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    const IMAGES: [u8; 20] = [0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 9, 8, 7, 6];
    const LABELS: [u8; 10] = [0, 0, 8, 1, 0, 0, 0, 2, 5, 3];

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn reads_plain_dotted_and_gzipped_names() {
        let directory = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
        write("train-images-idx3-ubyte", &IMAGES);
        write("train-labels.idx1-ubyte", &LABELS);
        write("t10k-images.idx3-ubyte.gz", &gzip(&IMAGES));
        write("t10k-labels-idx1-ubyte.gz", &gzip(&LABELS));
        let split = Split::read_dir(directory.path()).unwrap();
        assert_eq!(split.train, split.test);
        assert_eq!(split.train.labels(), [5, 3]);
        assert_eq!(split.train.classes(), [3, 5]);
        assert_eq!(split.train.image(1), [7, 6]);
        assert_eq!(split.train.matrix()[[1, 0]], 7);
        let (first, last) = split.train.split_at(1);
        assert_eq!((first.labels(), last.labels()), (&[5][..], &[3][..]));
    }

    #[test]
    fn names_what_is_missing_and_which_file_is_broken() {
        let directory = tempfile::tempdir().unwrap();
        let error = Split::read_dir(directory.path()).unwrap_err().to_string();
        assert!(error.contains("train-images-idx3-ubyte.gz"), "{error}");
        fs::write(directory.path().join("train-images-idx3-ubyte"), &IMAGES[..19]).unwrap();
        let error = Split::read_dir(directory.path()).unwrap_err().to_string();
        assert!(error.contains("train-images-idx3-ubyte: IDX body needs 4 bytes"), "{error}");
    }

    #[test]
    fn rejects_more_labels_than_images() {
        assert!(Dataset::new(Shape::MNIST, vec![0; 784], vec![1, 2]).is_err());
    }
}
