//! Tools for the classifier: training, evaluation, import of other tools' models, and readers of
//! images and data sets. Only the command line and tests use them; a server links none of this.
#![deny(unsafe_code)]

pub mod train;

#[doc(hidden)]
pub mod input;

mod batch;
mod dataset;
mod eval;
mod image;
mod import;

pub use batch::classify_all;
pub use dataset::{Dataset, Split, read_images};
pub use eval::{
    ClassFigures, Evaluation, Example, MAX_SHEET_EXAMPLES, contact_sheet, wilson_interval,
};
pub use image::Image;
#[doc(hidden)]
pub use import::onnx_proto;
pub use import::{Agreement, ImportOptions, Imported, Sample, Scale};
pub use input::{MAX_DATASET_FILE_BYTES, MAX_IMAGE_FILE_BYTES};
