//! Scores of the built-in models: the same bits in any batch and with every instruction set.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use afterimage_classifier::{FeatureMap, Isa, LinearSvm, Metadata, Model, RawPixels, Shape};
use ndarray::{Array1, Array2};

/// Images of noise, of every density.
fn noise_images(count: usize) -> Vec<Vec<u8>> {
    let mut state = 9_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..count)
        .map(|i| (0..784).map(|_| next().saturating_sub(next().wrapping_mul(i as u8))).collect())
        .collect()
}

fn bits(scores: &Array2<f32>) -> Vec<u32> {
    scores.iter().map(|score| score.to_bits()).collect()
}

#[test]
fn scores_are_bit_equal_in_any_batch_and_with_every_isa() {
    let model = Model::shipped();
    let images = noise_images(19);
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    let together = model.scores(&images).unwrap();
    for isa in Isa::available() {
        assert_eq!(bits(&model.scores_with(isa, &images).unwrap()), bits(&together), "{isa:?}");
        for (i, image) in images.iter().enumerate() {
            let alone = model.scores_with(isa, &[image]).unwrap();
            assert_eq!(bits(&alone), bits(&together)[i * 10..(i + 1) * 10], "{isa:?}, image {i}");
        }
        for size in [2, 3, 5, 8, 9, 16] {
            let batches = images.chunks(size).map(|images| model.scores(images).unwrap());
            let batches: Vec<u32> = batches.flat_map(|scores| bits(&scores)).collect();
            assert_eq!(batches, bits(&together), "batches of {size}");
        }
    }
}

#[test]
fn raw_scores_are_bit_equal_in_any_batch_and_with_every_isa() {
    let model = Model::raw();
    let images = noise_images(21);
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    let together = model.scores(&images).unwrap();
    for isa in Isa::available() {
        assert_eq!(bits(&model.scores_with(isa, &images).unwrap()), bits(&together), "{isa:?}");
        for (i, image) in images.iter().enumerate() {
            let alone = model.scores_with(isa, &[image]).unwrap();
            assert_eq!(bits(&alone), bits(&together)[i * 10..(i + 1) * 10], "{isa:?}, image {i}");
        }
    }
}

#[test]
fn the_shipped_model_is_the_convolutional_one_and_small() {
    let model = Model::shipped();
    assert_eq!(model.features().unwrap().name(), "conv");
    assert_eq!(model.labels(), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert!(model.to_bytes().len() < 1_000_000);
    let (wrong, images) = model.metadata().test_errors.unwrap();
    assert_eq!(images, 10_000);
    assert!(wrong <= 40, "{wrong} wrong");
    assert_eq!(Model::raw().features().unwrap().name(), "raw");
}

#[test]
fn refuses_images_of_another_size() {
    let model = Model::shipped();
    let error = model.classify(&[0; 783]).unwrap_err().to_string();
    assert_eq!(error, "bytes in one image: expected 784 (28x28), found 783");
    assert_eq!(model.scores(&[]).unwrap().dim(), (0, 10));
}

#[test]
fn parts_that_do_not_fit_make_no_model() {
    let map = || FeatureMap::Raw(RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
    let svm = |dims| LinearSvm::new(Array2::ones((2, dims)), Array1::zeros(2)).unwrap();
    assert!(Model::new(map(), svm(2), vec![1, 2], Metadata::default()).is_ok());
    assert!(Model::new(map(), svm(3), vec![1, 2], Metadata::default()).is_err());
    assert!(Model::new(map(), svm(2), vec![1], Metadata::default()).is_err());
    assert!(Model::new(map(), svm(2), vec![1, 1], Metadata::default()).is_err());
}
