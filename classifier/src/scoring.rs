//! Scoring: the kinds of models, and how each gets from an image to a class.

use crate::error::ModelError;
use crate::features::{FeatureMap, FeatureScratch};
use crate::kernels::{Chunks, Isa, chunks};
use crate::pairwise::{Pairwise, PairwiseScratch};
use crate::svm::{LinearSvm, argmax};
use crate::tensors::{Tensor, Tensors};
use crate::weights::{self, Weights, WeightsScratch};

/// Images scored in one go by way of features: as many as the kernels share each read of the
/// weights among; more would only push features and weights out of the nearest cache.
const BLOCK: usize = 4;

/// Images, a feature map or none, machines, a decision.
#[derive(Clone, Debug)]
pub enum Scoring {
    /// A feature map and one-vs-rest machines in `f32`, as `train` makes them.
    Features(FeatureMap, LinearSvm),
    /// Imported linear machines.
    Weights(Weights),
    /// Imported kernel machines, one for each pair of classes.
    Pairwise(Box<Pairwise>),
}

/// Buffers for scoring, kept between calls so that nothing is allocated.
#[derive(Debug, Default)]
pub struct Scratch {
    features: FeatureScratch,
    block: Chunks,
    scores: Vec<f32>,
    weights: WeightsScratch,
    pairwise: PairwiseScratch,
}

impl Scoring {
    const WEIGHTS: &'static str = "svm.weights";
    const INTERCEPTS: &'static str = "svm.intercepts";

    /// The name of its `features` in files, of which the first version knows those of
    /// [`FeatureMap`] only.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Features(map, _) => map.name(),
            Self::Weights(_) => "weights",
            Self::Pairwise(_) => "kernel",
        }
    }

    /// A description for people.
    pub fn description(&self) -> String {
        match self {
            Self::Features(map, _) => format!("linear, {} features", map.name()),
            Self::Weights(weights) if weights.machines() == 1 => "linear, one machine".to_owned(),
            Self::Weights(_) => "linear, one machine for each class".to_owned(),
            Self::Pairwise(pairwise) => format!(
                "{} kernel, one machine for each pair of classes, {} support vectors{}",
                pairwise.function().name(),
                pairwise.vectors(),
                if pairwise.is_of_bytes() { " (bytes)" } else { "" }
            ),
        }
    }

    /// Whether it can be of so many classes.
    pub fn has_classes(&self, classes: usize) -> Result<(), ModelError> {
        let fitting = match self {
            Self::Features(_, svm) => svm.classes(),
            Self::Weights(weights) if weights.machines() == 1 => 2,
            Self::Weights(weights) => weights.machines(),
            Self::Pairwise(pairwise) => pairwise.classes(),
        };
        if fitting == classes {
            return Ok(());
        }
        Err(ModelError::mismatch("labels", fitting, classes))
    }

    /// The class of each image, `classes` as long as `images`.
    pub fn classify(
        &self,
        isa: Isa,
        images: &[&[u8]],
        scratch: &mut Scratch,
        classes: impl Fn(usize) -> u16,
        labels: &mut [u16],
    ) {
        match self {
            Self::Features(map, svm) => {
                for (images, labels) in images.chunks(BLOCK).zip(labels.chunks_mut(BLOCK)) {
                    let scores = score_block(map, svm, isa, images, scratch);
                    for (label, scores) in labels.iter_mut().zip(scores.chunks_exact(svm.classes()))
                    {
                        *label = classes(argmax(scores));
                    }
                }
            }
            Self::Weights(weights) => {
                for (image, label) in images.iter().zip(labels) {
                    let scores = weights.scores(isa, image, &mut scratch.weights);
                    *label = classes(weights::answer(scores));
                }
            }
            Self::Pairwise(pairwise) => {
                pairwise.classify(isa, images, &mut scratch.pairwise, |place, class| {
                    labels[place] = classes(class);
                });
            }
        }
    }

    /// The scores of a batch, `[images, classes]`, for people: see [`crate::Model::scores`].
    pub fn scores(&self, isa: Isa, images: &[&[u8]]) -> Vec<f32> {
        let mut scratch = Scratch::default();
        let mut all = Vec::new();
        match self {
            Self::Features(map, svm) => {
                for images in images.chunks(BLOCK) {
                    all.extend_from_slice(score_block(map, svm, isa, images, &mut scratch));
                }
            }
            Self::Weights(weights) => {
                for image in images {
                    match *weights.scores(isa, image, &mut scratch.weights) {
                        [score] => all.extend([score as f32, -score as f32]),
                        ref scores => all.extend(scores.iter().map(|&score| score as f32)),
                    }
                }
            }
            Self::Pairwise(pairwise) => {
                pairwise.votes(isa, images, &mut scratch.pairwise, &mut all);
            }
        }
        all
    }

    /// The numbers that make it what it is, by name.
    pub fn tensors(&self) -> Tensors {
        let mut tensors = Tensors::new();
        match self {
            Self::Features(map, svm) => {
                tensors = map.tensors();
                let weights = Tensor::new::<f32>(
                    &[svm.classes(), svm.dims()],
                    svm.weights().iter().copied().collect(),
                );
                tensors.insert(Self::WEIGHTS.to_owned(), weights);
                let intercepts = Tensor::new(&[svm.classes()], svm.intercepts().to_vec());
                tensors.insert(Self::INTERCEPTS.to_owned(), intercepts);
            }
            Self::Weights(weights) => weights.add_tensors(&mut tensors),
            Self::Pairwise(pairwise) => pairwise.add_tensors(&mut tensors),
        }
        tensors
    }

    /// Machines on a feature map, taken out of `tensors`.
    pub fn from_features(
        map: FeatureMap,
        classes: usize,
        tensors: &mut Tensors,
    ) -> Result<Self, ModelError> {
        let dims = map.dims();
        let weights: Vec<f32> = Tensor::take(tensors, Self::WEIGHTS, &[classes, dims])?;
        let weights = ndarray::Array2::from_shape_vec((classes, dims), weights)
            .map_err(|error| ModelError::mismatch(Self::WEIGHTS, "a matrix", error))?;
        let intercepts: Vec<f32> = Tensor::take(tensors, Self::INTERCEPTS, &[classes])?;
        Ok(Self::Features(map, LinearSvm::new(weights, intercepts.into())?))
    }
}

/// Scores `[images, classes]` of at most [`BLOCK`] images of the right size.
fn score_block<'s>(
    map: &FeatureMap,
    svm: &LinearSvm,
    isa: Isa,
    images: &[&[u8]],
    scratch: &'s mut Scratch,
) -> &'s [f32] {
    let Scratch { features, block, scores, .. } = scratch;
    block.set_len(images.len() * chunks(map.dims()));
    scores.resize(images.len() * svm.classes(), 0.0);
    map.features(isa, images, features, block);
    svm.scores(isa, block, scores);
    scores
}
