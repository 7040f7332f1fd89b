//! Training of a model from labelled images. [`run`] gives the same bytes for the same options and
//! data, on any number of threads.

mod conv;
mod distort;
mod dual;
mod eigen;
mod filters;
mod project;
#[doc(hidden)]
pub mod random;
mod raw;

use std::fmt;
use std::path::PathBuf;

use afterimage_classifier::{DataError, Metadata, Model, ModelError};

use crate::dataset::{Dataset, Split};
use crate::eval::Evaluation;

/// Images at the end of the training set that are used for choices: MNIST's last 10,000, or a sixth
/// of a smaller set.
pub const VALIDATION_IMAGES: usize = 10_000;

/// Most distorted copies of every image.
pub const MAX_COPIES: usize = 100;

/// Options of a training.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TrainOptions {
    /// The feature map.
    pub features: FeatureKind,
    /// The seed of all random numbers.
    pub seed: u64,
    /// The parameter C of the SVMs; with `None` the feature map's own method finds one.
    pub c: Option<f64>,
    /// Distorted copies of every image; `None` takes the feature map's own number.
    pub copies: Option<usize>,
    /// The folder of the data set, for [`run_to_file`].
    pub data: PathBuf,
    /// The model file, for [`run_to_file`].
    pub out: PathBuf,
}

/// The feature maps that can be trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FeatureKind {
    /// The pixels themselves.
    Raw,
    /// The convolutional map.
    Conv,
}

/// The progress of a training, for a progress bar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// The name of the current stage.
    pub stage: &'static str,
    /// Completed steps of this stage.
    pub done: u64,
    /// All steps of this stage.
    pub total: u64,
}

/// An error of a training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The data cannot be read or used for training.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The model is inconsistent or cannot be written.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// An option is outside its range.
    #[error("{option} is {value}; it must be {range}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: String,
        /// Its allowed range.
        range: &'static str,
    },
}

impl TrainOptions {
    /// Options for a feature map and a seed; [`run_to_file`] also needs `data` and `out`.
    #[must_use]
    pub fn new(features: FeatureKind, seed: u64) -> Self {
        Self { features, seed, c: None, copies: None, data: PathBuf::new(), out: PathBuf::new() }
    }

    /// The command line with these options, without the paths: the same options and data give the
    /// same file in any folder, and a model file does not show its folder.
    #[must_use]
    pub fn command(&self) -> String {
        let c = self.c.map(|c| format!(" --c {c}")).unwrap_or_default();
        let copies = self.copies.map(|copies| format!(" --copies {copies}")).unwrap_or_default();
        format!("afterimage train --features {} --seed {}{c}{copies}", self.features, self.seed)
    }
}

/// Trains a model on `train`. Any thread may call `progress` from time to time.
///
/// # Errors
/// [`TrainError`] when there are fewer than two classes or an option is out of range.
pub fn run(
    options: &TrainOptions,
    train: &Dataset,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Model, TrainError> {
    let labels = train.classes();
    if labels.len() < 2 {
        let what = "classes in the training set";
        let max = afterimage_classifier::MAX_CLASSES;
        return Err(DataError::out_of_range(what, 2, max, labels.len()).into());
    }
    if let Some(c) = options.c.filter(|c| !(c.is_finite() && *c > 0.0)) {
        let range = "a finite number above 0";
        return Err(TrainError::Option { option: "C", value: c.to_string(), range });
    }
    if let Some(copies) = options.copies.filter(|&copies| copies > MAX_COPIES) {
        let (value, range) = (copies.to_string(), "at most 100");
        return Err(TrainError::Option { option: "number of copies", value, range });
    }
    let trained = match options.features {
        FeatureKind::Raw => raw::train(options, train, &labels, progress)?,
        FeatureKind::Conv => conv::train(options, train, &labels, progress)?,
    };
    let mut metadata = Metadata::default();
    metadata.command = options.command();
    metadata.seed = Some(options.seed);
    metadata.c = Some(trained.c);
    metadata.dataset =
        format!("{} images of {}, {} classes", train.len(), train.shape(), labels.len());
    metadata.note = trained.note;
    Ok(Model::new(trained.features, trained.svm, labels, metadata)?)
}

/// Trains on all of `train` except its last [`VALIDATION_IMAGES`], and evaluates on those. Options
/// are chosen by this, so that the test set influences no choice.
///
/// # Errors
/// [`TrainError`], as [`run`].
pub fn validate(
    options: &TrainOptions,
    train: &Dataset,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(Model, Evaluation), TrainError> {
    let (learn, validate) = validation_split(train);
    let model = run(options, &learn, progress)?;
    let evaluation = Evaluation::of(&model, &validate)?;
    Ok((model, evaluation))
}

/// Runs the whole command: reads the data set at `options.data`, trains, reads the test set once,
/// records the result and writes the model to `options.out`.
///
/// # Errors
/// [`TrainError`].
pub fn run_to_file(
    options: &TrainOptions,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(Model, Evaluation), TrainError> {
    // Checked before the training, which takes minutes.
    let folder = options.out.parent().filter(|folder| !folder.as_os_str().is_empty());
    if folder.is_some_and(|folder| !folder.is_dir()) {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(ModelError::Io { path: options.out.clone(), source }.into());
    }
    let split = Split::read_dir(&options.data)?;
    if split.test.is_empty() {
        return Err(DataError::malformed("test set", "it has no images").into());
    }
    let model = run(options, &split.train, progress)?;
    let evaluation = Evaluation::of(&model, &split.test)?;
    let mut metadata = model.metadata().clone();
    metadata.test_errors = Some((evaluation.wrong(), evaluation.images()));
    let model = model.with_metadata(metadata);
    model.write(&options.out)?;
    Ok((model, evaluation))
}

/// The result of one kind of training.
struct Trained {
    features: afterimage_classifier::features::FeatureMap,
    svm: afterimage_classifier::LinearSvm,
    c: f64,
    note: String,
}

/// The images for training, and those for choices.
fn validation_split(train: &Dataset) -> (Dataset, Dataset) {
    train.split_at(train.len() - VALIDATION_IMAGES.min(train.len() / 6))
}

/// The index of each image's label in the sorted `labels`.
fn class_indices(data: &Dataset, labels: &[u16]) -> Vec<u16> {
    let index = |label| labels.binary_search(label).expect("`labels` are all that occur");
    data.labels().iter().map(|label| index(label) as u16).collect()
}

impl fmt::Display for FeatureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Conv => "conv",
        })
    }
}

impl std::str::FromStr for FeatureKind {
    type Err = TrainError;

    fn from_str(name: &str) -> Result<Self, TrainError> {
        match name {
            "raw" => Ok(Self::Raw),
            "conv" => Ok(Self::Conv),
            _ => Err(TrainError::Option {
                option: "feature map",
                value: name.to_owned(),
                range: "raw or conv",
            }),
        }
    }
}
