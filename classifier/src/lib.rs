//! The built-in image classifier: models (SVMs on features, and imported ones), their files, the
//! compute engine, and the service. Training, import and evaluation are in
//! `afterimage-classifier-tools`; the hidden modules are public for it.
#![deny(unsafe_code)]

#[doc(hidden)]
pub mod bounded;
#[doc(hidden)]
pub mod features;
#[doc(hidden)]
pub mod kernels;
pub mod metrics;
#[doc(hidden)]
pub mod pairwise;
#[doc(hidden)]
pub mod pixels;
#[doc(hidden)]
pub mod scoring;
pub mod service;
#[doc(hidden)]
pub mod tensors;
#[doc(hidden)]
pub mod weights;

mod engine;
mod error;
mod model;
mod model_file;
mod shape;
mod svm;

pub use engine::{
    Engine, EngineCounters, EngineError, EngineOptions, Job, Labelled, MAX_LINGER, Scorer,
};
pub use error::{DataError, ModelError};
pub use features::{ConvolutionalMap, FeatureMap, Features, RawPixels};
pub use kernels::Isa;
pub use model::{Metadata, Model, ModelDigest, Scratch};
pub use model_file::MAX_MODEL_FILE_BYTES;
pub use pairwise::{KernelFunction, MAX_DEGREE};
pub use service::ClassifierService;
pub use shape::{MAX_INPUT_LEN, MAX_RANK, Shape};
pub use svm::{LinearSvm, MAX_CLASSES, argmax};
