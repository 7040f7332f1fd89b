//! The built-in image classifier: models (SVMs on features, and imported ones), their training and
//! files, the compute engine, and the service.
#![deny(unsafe_code)]

pub mod service;
pub mod train;

mod dataset;
mod engine;
mod error;
mod eval;
mod features;
mod image;
mod import;
#[doc(hidden)]
pub mod input;
mod kernels;
mod model;
mod model_file;
mod pairwise;
mod pixels;
mod scoring;
mod shape;
mod svm;
mod tensors;
mod weights;

pub use dataset::{Dataset, Split, read_images};
pub use engine::{
    Caller, Engine, EngineCounters, EngineError, EngineOptions, Job, MAX_LINGER, Scorer,
};
pub use error::{DataError, ModelError};
pub use eval::{
    ClassFigures, Evaluation, Example, MAX_SHEET_EXAMPLES, contact_sheet, wilson_interval,
};
pub use features::{ConvolutionalMap, FeatureMap, Features, RawPixels};
pub use image::Image;
pub use import::{Agreement, ImportOptions, Imported, Sample, Scale};
pub use input::{MAX_DATASET_FILE_BYTES, MAX_IMAGE_FILE_BYTES};
pub use kernels::Isa;
pub use model::{Metadata, Model, ModelDigest, Scratch};
pub use model_file::MAX_MODEL_FILE_BYTES;
pub use pairwise::{KernelFunction, MAX_DEGREE};
pub use service::ClassifierService;
pub use shape::{MAX_INPUT_LEN, MAX_RANK, Shape};
pub use svm::{LinearSvm, MAX_CLASSES, argmax};
