//! Models: how an image is scored, and the label of each class.

use std::fmt;
use std::sync::{Arc, OnceLock};

use ndarray::Array2;
use sha2::{Digest, Sha256};

use crate::error::{DataError, ModelError};
use crate::features::FeatureMap;
use crate::kernels::Isa;
use crate::scoring::Scoring;
pub use crate::scoring::Scratch;
use crate::shape::Shape;
use crate::svm::LinearSvm;

/// The `format` of a model file.
pub(crate) const FORMAT: &str = "afterimage-model";
/// The format version of models that are trained here.
pub(crate) const VERSION: &str = "1";
/// The format version of imported models.
pub(crate) const IMPORTED_VERSION: &str = "2";

/// A trained classifier. It never changes, so threads share it as `Arc<Model>`.
#[derive(Clone, Debug)]
pub struct Model {
    shape: Shape,
    scoring: Scoring,
    labels: Vec<u16>,
    metadata: Metadata,
    digest: ModelDigest,
}

/// The origin of a model, for people. It changes no answer and is not part of the digest.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Metadata {
    /// The command that makes this file, without paths.
    pub command: String,
    /// The seed all its random numbers come from.
    pub seed: Option<u64>,
    /// The SVMs' parameter C.
    pub c: Option<f64>,
    /// The training data.
    pub dataset: String,
    /// Images of the test set answered wrongly, and how many there were.
    pub test_errors: Option<(usize, usize)>,
    /// Anything else.
    pub note: String,
}

/// SHA-256 over everything that decides an answer; see [`Model::digest`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelDigest(pub [u8; 32]);

impl Model {
    /// A model whose machine `i` stands for `labels[i]`.
    ///
    /// # Errors
    /// [`ModelError::Mismatch`] when the features, machines and labels do not fit, or a label
    /// stands twice.
    pub fn new(
        features: FeatureMap,
        svm: LinearSvm,
        labels: Vec<u16>,
        metadata: Metadata,
    ) -> Result<Self, ModelError> {
        if svm.dims() != features.dims() {
            return Err(ModelError::mismatch("features per class", features.dims(), svm.dims()));
        }
        Self::of(features.shape(), Scoring::Features(features, svm), labels, metadata)
    }

    /// A model whose class `i` stands for `labels[i]`.
    #[doc(hidden)]
    pub fn of(
        shape: Shape,
        scoring: Scoring,
        labels: Vec<u16>,
        metadata: Metadata,
    ) -> Result<Self, ModelError> {
        scoring.has_classes(labels.len())?;
        let mut sorted = labels.clone();
        sorted.sort_unstable();
        if let Some(twice) = sorted.windows(2).find(|two| two[0] == two[1]) {
            return Err(ModelError::mismatch("labels", "each once", format!("{} twice", twice[0])));
        }
        let digest = digest(shape, &scoring, &labels);
        Ok(Self { shape, scoring, labels, metadata, digest })
    }

    /// The built-in convolutional model.
    #[must_use]
    pub fn shipped() -> Arc<Self> {
        static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
        embedded(&MODEL, include_bytes!("../models/conv.safetensors"))
    }

    /// The built-in linear model on raw pixels, for comparison.
    #[must_use]
    pub fn raw() -> Arc<Self> {
        static MODEL: OnceLock<Arc<Model>> = OnceLock::new();
        embedded(&MODEL, include_bytes!("../models/raw-linear.safetensors"))
    }

    /// 32 bytes that differ as soon as any answer may: SHA-256 over the name of its kind, the
    /// shape, the labels, and every tensor's name, shape and values. The metadata is not in it.
    /// Two models with the same digest give the same answers, so a stored answer belongs to a
    /// digest.
    #[must_use]
    pub fn digest(&self) -> ModelDigest {
        self.digest
    }

    /// The shape of the images it takes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The label of each class, in the model's own order.
    #[must_use]
    pub fn labels(&self) -> &[u16] {
        &self.labels
    }

    /// The kind of model, in a few words for people.
    #[must_use]
    pub fn description(&self) -> String {
        self.scoring.description()
    }

    /// The feature map, in a model that was trained here.
    #[must_use]
    pub fn features(&self) -> Option<&FeatureMap> {
        match &self.scoring {
            Scoring::Features(map, _) => Some(map),
            Scoring::Weights(_) | Scoring::Pairwise(_) => None,
        }
    }

    /// The machines that weigh its features, in a model that was trained here.
    #[must_use]
    pub fn svm(&self) -> Option<&LinearSvm> {
        match &self.scoring {
            Scoring::Features(_, svm) => Some(svm),
            Scoring::Weights(_) | Scoring::Pairwise(_) => None,
        }
    }

    /// The number of support vectors of a kernel model.
    #[must_use]
    pub fn support_vectors(&self) -> Option<usize> {
        match &self.scoring {
            Scoring::Pairwise(pairwise) => Some(pairwise.vectors()),
            Scoring::Features(..) | Scoring::Weights(_) => None,
        }
    }

    pub(crate) fn scoring(&self) -> &Scoring {
        &self.scoring
    }

    /// Where it comes from.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The same model with other metadata; the digest stays.
    #[must_use]
    pub fn with_metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// The label of one image of `shape().len()` bytes, row-major.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when the image is of another size.
    pub fn classify(&self, image: &[u8]) -> Result<u16, DataError> {
        let mut label = [0];
        self.classify_batch(&[image], &mut Scratch::default(), &mut label)?;
        Ok(label[0])
    }

    /// The labels of a batch, on the calling thread. `labels` gets one per image. An image's label
    /// does not depend on the others.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when an image is of another size; no label is written then.
    ///
    /// # Panics
    /// When `labels` is not as long as `images`.
    pub fn classify_batch(
        &self,
        images: &[&[u8]],
        scratch: &mut Scratch,
        labels: &mut [u16],
    ) -> Result<(), DataError> {
        assert_eq!(images.len(), labels.len(), "one label per image");
        self.check_sizes(images)?;
        let label = |class: usize| self.labels[class];
        self.scoring.classify(Isa::best(), images, scratch, label, labels);
        Ok(())
    }

    /// The scores `[images, classes]` of a batch, on the calling thread. The class with the
    /// greatest one is the answer, of equals the first: votes, where pairs of classes vote; and
    /// but for what the rounding to `f32` makes equal. (A single machine for two classes
    /// answers with the second at zero.)
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when an image is of another size.
    pub fn scores(&self, images: &[&[u8]]) -> Result<Array2<f32>, DataError> {
        self.scores_with(Isa::best(), images)
    }

    /// As [`Model::scores`], with an instruction set of your choice; the result has the same bits
    /// with any.
    ///
    /// # Errors
    /// [`DataError::Mismatch`] when an image is of another size.
    pub fn scores_with(&self, isa: Isa, images: &[&[u8]]) -> Result<Array2<f32>, DataError> {
        self.check_sizes(images)?;
        let scores = self.scoring.scores(isa, images);
        Ok(Array2::from_shape_vec((images.len(), self.labels.len()), scores)
            .expect("every image has a score for each class"))
    }

    fn check_sizes(&self, images: &[&[u8]]) -> Result<(), DataError> {
        let expected = self.shape().len();
        match images.iter().find(|image| image.len() != expected) {
            None => Ok(()),
            Some(image) => Err(DataError::Mismatch {
                what: "bytes in one image",
                expected: format!("{expected} ({})", self.shape()),
                found: image.len().to_string(),
            }),
        }
    }
}

/// SHA-256 over, in this order, lengths and integers as 64-bit little-endian:
///
/// 1. the text `afterimage-model 1` (or 2: the file's version) and a zero byte;
/// 2. the name of its `features` (length, bytes); in version 2, for `kernel` features, the kernel's
///    as well;
/// 3. the shape (rank, dimensions);
/// 4. the labels (count, each);
/// 5. every tensor in the order of names: name (length, bytes), in version 2 the name of its type
///    (length, bytes), shape (rank, dimensions), values (little-endian).
fn digest(shape: Shape, scoring: &Scoring, labels: &[u16]) -> ModelDigest {
    let version = version(scoring);
    let mut hash = Sha256::new();
    hash.update(format!("{FORMAT} {version}\0"));
    let number = |hash: &mut Sha256, value: u64| hash.update(value.to_le_bytes());
    let text = |hash: &mut Sha256, text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    text(&mut hash, scoring.name());
    if let Scoring::Pairwise(pairwise) = scoring {
        text(&mut hash, pairwise.function().name());
    }
    number(&mut hash, shape.dims().len() as u64);
    shape.dims().iter().for_each(|&dim| number(&mut hash, u64::from(dim)));
    number(&mut hash, labels.len() as u64);
    labels.iter().for_each(|&label| number(&mut hash, u64::from(label)));
    for (name, tensor) in scoring.tensors() {
        text(&mut hash, &name);
        if version != VERSION {
            text(&mut hash, tensor.values.type_name());
        }
        number(&mut hash, tensor.shape.len() as u64);
        tensor.shape.iter().for_each(|&dim| number(&mut hash, dim as u64));
        tensor.values.for_each_bytes(|bytes| hash.update(bytes));
    }
    ModelDigest(hash.finalize().into())
}

/// The format version that a model of this kind needs.
pub(crate) fn version(scoring: &Scoring) -> &'static str {
    match scoring {
        Scoring::Features(..) => VERSION,
        Scoring::Weights(_) | Scoring::Pairwise(_) => IMPORTED_VERSION,
    }
}

fn embedded(cell: &OnceLock<Arc<Model>>, bytes: &[u8]) -> Arc<Model> {
    let read = || Arc::new(Model::from_bytes(bytes).expect("a test reads every embedded model"));
    Arc::clone(cell.get_or_init(read))
}

impl fmt::Display for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ModelDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelDigest({self})")
    }
}
