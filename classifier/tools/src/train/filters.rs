//! Learning of the filters without labels: random patches of the deskewed images are normalized and
//! whitened, and spherical k-means finds 32 directions near most of them (A. Coates and A. Y. Ng,
//! "Learning Feature Representations with K-means", 2012, with its whitening and damped update).

use afterimage_classifier::features::conv::{
    Deskew, FILTERS, Filters, PATCH, PLACES, Plane, Statistics, TAPS,
};
use afterimage_classifier::{DataError, Isa};
use rayon::prelude::*;

use super::eigen::symmetric_eigen;
use super::random::Random;
use super::{Progress, TrainError};
use crate::dataset::Dataset;

/// Patches for the learning.
const PATCHES: usize = 200_000;
/// Least variance of a patch, in pixels from 0 to 1. Other patches are blank.
const LEAST_VARIANCE: f32 = 1e-3;
/// Limit of draws for a patch that is not blank.
const MAX_DRAWS: usize = 10_000;
/// Added to the eigenvalues of the covariance, so that whitening does not amplify noise.
const WHITENING_FLOOR: f64 = 0.3;
/// Rounds of k-means.
const ROUNDS: usize = 15;
/// Patches of a task. They are part of the result, because each task makes its own sum.
const TASK: usize = 4096;

type Patch = [f32; TAPS];

/// Learns the filters from the images of `train`.
pub(super) fn learn(
    train: &Dataset,
    seed: u64,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Filters, TrainError> {
    let report = |done| {
        progress(Progress { stage: "learning filters", done, total: ROUNDS as u64 + 1 });
    };
    let draw = |place| draw_patch(train, seed, place as u64);
    let mut patches: Vec<Patch> =
        (0..PATCHES).into_par_iter().map(draw).collect::<Result<_, DataError>>()?;
    let whitening = whitening(&patches);
    patches.par_iter_mut().for_each(|patch| *patch = product(&whitening, patch));
    report(1);
    let mut centres = random_centres(seed);
    for round in 0..ROUNDS {
        centres = improve(&patches, &centres);
        report(round as u64 + 2);
    }
    // A filter is a whitened direction for a patch that is not whitened: F = T·d, because T is
    // symmetric.
    let filters = centres.map(|centre| product(&whitening, &centre));
    Ok(Filters::new(&filters))
}

/// A random patch of a deskewed image, normalized.
fn draw_patch(train: &Dataset, seed: u64, place: u64) -> Result<Patch, DataError> {
    let mut random = Random::new(seed, b"patches.", place);
    let isa = Isa::best();
    let (mut raw, mut upright) = (Plane::ZERO, Plane::ZERO);
    for _ in 0..MAX_DRAWS {
        raw.set_bytes(train.image(random.below(train.len())));
        isa.run(Deskew { from: &raw, shift: [0.0; 2], to: &mut upright });
        let (y, x) = (random.below(PLACES), random.below(PLACES));
        let statistics = Statistics::of_row(&upright, y);
        let (mean, scale) = (statistics.means[x], statistics.scales[x]);
        if statistics.variances[x] > LEAST_VARIANCE {
            let pixel = |t| upright.row(y + t / PATCH)[x + t % PATCH];
            return Ok(std::array::from_fn(|t| (pixel(t) - mean) * scale));
        }
    }
    Err(DataError::malformed("training set", "its images are almost empty"))
}

/// T = V·diag(1/√(e + 0.3))·Vᵀ of the covariance V·diag(e)·Vᵀ of the patches. This whitening keeps
/// the appearance of patches (ZCA).
fn whitening(patches: &[Patch]) -> [Patch; TAPS] {
    let count = patches.len() as f64;
    let mut mean = [0.0; TAPS];
    let mut products = vec![vec![0.0; TAPS]; TAPS];
    for patch in patches {
        let patch = patch.map(f64::from);
        for i in 0..TAPS {
            mean[i] += patch[i] / count;
            for j in 0..TAPS {
                products[i][j] += patch[i] * patch[j] / count;
            }
        }
    }
    for (i, row) in products.iter_mut().enumerate() {
        for (j, product) in row.iter_mut().enumerate() {
            *product -= mean[i] * mean[j];
        }
    }
    let eigen = symmetric_eigen(products);
    std::array::from_fn(|i| {
        std::array::from_fn(|j| {
            let part = |(value, vector): (&f64, &Vec<f64>)| {
                vector[i] * vector[j] / (value + WHITENING_FLOOR).sqrt()
            };
            eigen.values.iter().zip(&eigen.vectors).map(part).sum::<f64>() as f32
        })
    })
}

fn product(matrix: &[Patch; TAPS], patch: &Patch) -> Patch {
    matrix.map(|row| row.iter().zip(patch).map(|(a, b)| a * b).sum())
}

fn random_centres(seed: u64) -> [Patch; FILTERS] {
    let mut random = Random::new(seed, b"centres.", 0);
    std::array::from_fn(|_| unit(std::array::from_fn(|_| random.normal())))
}

/// One round of k-means: every patch belongs to the centre with the largest absolute projection,
/// and moves it by that projection.
fn improve(patches: &[Patch], centres: &[Patch; FILTERS]) -> [Patch; FILTERS] {
    let mut by_tap = [[0.0_f32; FILTERS]; TAPS];
    for (k, centre) in centres.iter().enumerate() {
        for (t, &value) in centre.iter().enumerate() {
            by_tap[t][k] = value;
        }
    }
    let pulls = |patches: &[Patch]| {
        let mut pulls = [[0.0_f64; TAPS]; FILTERS];
        for patch in patches {
            let mut along = [0.0_f32; FILTERS];
            for (&value, row) in patch.iter().zip(&by_tap) {
                for (along, centre) in along.iter_mut().zip(row) {
                    *along += value * centre;
                }
            }
            let mut best = 0;
            for (k, value) in along.iter().enumerate() {
                if value.abs() > along[best].abs() {
                    best = k;
                }
            }
            for (pull, &value) in pulls[best].iter_mut().zip(patch) {
                *pull += f64::from(along[best] * value);
            }
        }
        pulls
    };
    let tasks: Vec<_> = patches.par_chunks(TASK).map(pulls).collect();
    std::array::from_fn(|k| {
        // The old centre is added, so a centre without patches does not move.
        let mut sum = centres[k].map(f64::from);
        for task in &tasks {
            sum.iter_mut().zip(&task[k]).for_each(|(sum, pull)| *sum += pull);
        }
        unit(sum)
    })
}

fn unit(v: [f64; TAPS]) -> Patch {
    let length = v.iter().map(|v| v * v).sum::<f64>().sqrt();
    v.map(|v| (v / length) as f32)
}

#[cfg(test)]
mod tests {
    use afterimage_classifier::Shape;

    use super::*;

    fn noise(count: u64) -> Vec<Patch> {
        let mut random = Random::new(2, b"a test..", count);
        (0..count).map(|_| std::array::from_fn(|_| random.normal() as f32)).collect()
    }

    #[test]
    fn whitening_makes_the_covariance_what_it_should_be() {
        // Taps of very different sizes: e becomes e / (e + 0.3).
        let mut patches = noise(5000);
        for patch in &mut patches {
            patch.iter_mut().enumerate().for_each(|(t, value)| *value *= 0.1 + t as f32 / 5.0);
        }
        let t = whitening(&patches);
        for tap in 0..TAPS {
            let spread = |patches: &[Patch]| {
                let square = |patch: &Patch| f64::from(patch[tap] * patch[tap]);
                patches.iter().map(square).sum::<f64>() / patches.len() as f64
            };
            let white: Vec<Patch> = patches.iter().map(|patch| product(&t, patch)).collect();
            let before = spread(&patches);
            let expected = before / (before + WHITENING_FLOOR);
            assert!((spread(&white) - expected).abs() < 0.02, "tap {tap}");
        }
    }

    #[test]
    fn k_means_finds_directions_whatever_their_sign() {
        // Patches along eight axes, either way, with a little noise.
        let mut patches = noise(10_000);
        for (i, patch) in patches.iter_mut().enumerate() {
            patch.iter_mut().for_each(|value| *value *= 0.02);
            patch[i % 8] += if i % 3 == 0 { 1.0 } else { -1.0 };
        }
        let mut centres = random_centres(1);
        for _ in 0..ROUNDS {
            centres = improve(&patches, &centres);
        }
        for axis in 0..8 {
            assert!(centres.iter().any(|centre| centre[axis].abs() > 0.99), "axis {axis}");
        }
        for centre in centres {
            assert!((centre.iter().map(|v| v * v).sum::<f32>() - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn empty_images_are_refused_and_not_searched_for_ever() {
        let blank = Dataset::new(Shape::MNIST, vec![0; 784 * 2], vec![0, 1]).unwrap();
        let error = draw_patch(&blank, 1, 0).unwrap_err().to_string();
        assert!(error.contains("almost empty"), "{error}");
    }
}
