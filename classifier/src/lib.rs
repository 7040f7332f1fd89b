//! Images, features, ten one-vs-rest SVMs, their training and files, and the classifier service.

mod dataset;
mod error;
mod image;
mod input;
mod shape;

pub use dataset::{Dataset, MAX_DATASET_FILE_BYTES, Split};
pub use error::{DataError, ModelError};
pub use image::{Image, MAX_IMAGE_FILE_BYTES};
pub use shape::{MAX_INPUT_LEN, MAX_RANK, Shape};
