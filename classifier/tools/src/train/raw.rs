//! Training on raw pixels. C is the value with the fewest errors on the validation images, among a
//! few.

use afterimage_classifier::features::FeatureScratch;
use afterimage_classifier::kernels::{Chunk, Isa};
use afterimage_classifier::{FeatureMap, RawPixels};
use afterimage_classifier::{LinearSvm, Metadata, Model};

use super::dual::{Problem, Rows, solve};
use super::{Progress, TrainError, TrainOptions, Trained, class_indices, validation_split};
use crate::dataset::Dataset;
use crate::eval::Evaluation;

/// The values of C to try.
const CANDIDATES: [f64; 6] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3];
/// LIBLINEAR's `-B 1`.
const BIAS: f32 = 1.0;
/// Passes. More passes change the validation error by less than its own uncertainty.
const EPOCHS: usize = 60;
/// LIBLINEAR's default for this solver is 0.1.
const TOLERANCE: f32 = 0.01;
/// Pixels 0 to 255 become features 0 to 1.
const DIVISOR: f32 = 255.0;

pub(super) fn train(
    options: &TrainOptions,
    train: &Dataset,
    labels: &[u16],
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Trained, TrainError> {
    if let Some(copies) = options.copies.filter(|&copies| copies > 0) {
        let range = "0 for raw pixels, whose training makes none";
        let value = copies.to_string();
        return Err(TrainError::Option { option: "number of copies", value, range });
    }
    let features = FeatureMap::Raw(RawPixels::new(train.shape(), DIVISOR)?);
    let (c, note) = match options.c {
        Some(c) => (c, String::new()),
        None => choose_c(options, train, labels, &features, progress)?,
    };
    let svm = solve_on(train, labels, &features, c, options.seed, "training", progress)?;
    Ok(Trained { features, svm, c, note })
}

fn choose_c(
    options: &TrainOptions,
    train: &Dataset,
    labels: &[u16],
    features: &FeatureMap,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<(f64, String), TrainError> {
    let (learn, validate) = validation_split(train);
    let mut best = (usize::MAX, CANDIDATES[0]);
    let mut tried = Vec::new();
    for c in CANDIDATES {
        let svm = solve_on(&learn, labels, features, c, options.seed, "choosing C", progress)?;
        let model = Model::new(features.clone(), svm, labels.to_vec(), Metadata::default())?;
        let wrong = Evaluation::of(&model, &validate)?.wrong();
        tried.push(format!("{c}: {wrong}"));
        // Of equal values the smaller C wins, because its machine is simpler.
        if wrong < best.0 {
            best = (wrong, c);
        }
    }
    let images = validate.len();
    Ok((
        best.1,
        format!("errors among the last {images} training images by C: {}", tried.join(", ")),
    ))
}

fn solve_on(
    data: &Dataset,
    labels: &[u16],
    features: &FeatureMap,
    c: f64,
    seed: u64,
    stage: &'static str,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<LinearSvm, TrainError> {
    let problem = Problem {
        rows: &Pixels { data, features },
        classes: &class_indices(data, labels),
        class_count: labels.len(),
        c,
        bias: BIAS,
        epochs: EPOCHS,
        tolerance: TOLERANCE,
        seed,
    };
    Ok(solve(&problem, stage, progress)?)
}

struct Pixels<'a> {
    data: &'a Dataset,
    features: &'a FeatureMap,
}

impl Rows for Pixels<'_> {
    fn dims(&self) -> usize {
        self.features.dims()
    }

    fn write(&self, isa: Isa, index: usize, row: &mut [Chunk]) {
        let image = self.data.image(index);
        self.features.features(isa, &[image], &mut FeatureScratch::default(), row);
    }

    fn squared_norm(&self, _: Isa, index: usize) -> f32 {
        // The sum is exact: at most 2²² squares below 2¹⁶ each.
        let sum: u64 = self.data.image(index).iter().map(|&p| u64::from(p) * u64::from(p)).sum();
        (sum as f64 / f64::from(DIVISOR * DIVISOR)) as f32
    }
}
