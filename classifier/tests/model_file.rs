//! Files of trained models, valid and invalid, and their digests.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use afterimage_classifier::tensors::{self, Tensor, Tensors, Texts, Values};
use afterimage_classifier::{
    FeatureMap, LinearSvm, MAX_MODEL_FILE_BYTES, Metadata, Model, RawPixels, Shape,
};
use ndarray::array;

fn parts() -> (Tensors, Texts) {
    tensors::decode(include_bytes!("../models/raw-linear.safetensors")).unwrap()
}

/// The numbers of a tensor of `f32`.
fn f32s<'t>(tensors: &'t mut Tensors, name: &str) -> &'t mut [f32] {
    match &mut tensors.get_mut(name).unwrap().values {
        Values::F32(values) => values,
        other => panic!("{name} has the type {}", other.type_name()),
    }
}

/// The error of the raw model's file after a change.
fn error_after(change: impl FnOnce(&mut Tensors, &mut Texts)) -> String {
    let (mut tensors, mut texts) = parts();
    change(&mut tensors, &mut texts);
    let error = Model::from_bytes(&tensors::encode(&tensors, &texts)).unwrap_err().to_string();
    assert!(!error.contains('\n'), "one line: {error}");
    error
}

#[test]
fn a_convolutional_file_with_a_wrong_shape_or_tensor_is_refused() {
    let bytes = include_bytes!("../models/conv.safetensors");
    let (tensors, texts) = tensors::decode(bytes).unwrap();
    let refused = |tensors: &Tensors, texts: &Texts| {
        Model::from_bytes(&tensors::encode(tensors, texts)).unwrap_err().to_string()
    };
    let mut other = texts.clone();
    other.insert("shape".into(), "784".into());
    assert!(refused(&tensors, &other).contains("expected 28x28, found 784"));
    for name in ["conv.filters", "conv.projection", "conv.offset", "svm.weights"] {
        let mut without = tensors.clone();
        let tensor = without.remove(name).unwrap();
        assert!(refused(&without, &texts).contains(name));
        let flat = Tensor { shape: vec![1, tensor.shape.iter().product()], ..tensor };
        without.insert(name.into(), flat);
        assert!(refused(&without, &texts).contains(name));
    }
}

#[test]
fn a_file_is_read_back_whole_and_written_alike() {
    for model in [Model::raw(), Model::shipped()] {
        let bytes = model.to_bytes();
        let read = Model::from_bytes(&bytes).unwrap();
        assert_eq!(read.digest(), model.digest());
        assert_eq!(read.metadata(), model.metadata());
        assert_eq!(read.to_bytes(), bytes);
        assert!(model.metadata().command.starts_with("afterimage train --features "));
    }
    assert_eq!(Model::raw().to_bytes(), include_bytes!("../models/raw-linear.safetensors"));
    assert_eq!(Model::shipped().to_bytes(), include_bytes!("../models/conv.safetensors"));
}

#[test]
fn the_digest_is_over_what_decides_answers_and_nothing_else() {
    type Change<'a> = &'a dyn Fn(&mut Tensors, &mut Texts);
    let digest_after = |change: Change<'_>| {
        let (mut tensors, mut texts) = parts();
        change(&mut tensors, &mut texts);
        Model::from_bytes(&tensors::encode(&tensors, &texts)).unwrap().digest()
    };
    let digest = Model::raw().digest();
    let note = |_: &mut Tensors, texts: &mut Texts| {
        texts.insert("note".into(), "another".into());
    };
    assert_eq!(digest_after(&note), digest);
    let changes: [Change<'_>; 4] = [
        &|tensors, _| f32s(tensors, "svm.weights")[7839] += 0.25,
        &|tensors, _| f32s(tensors, "svm.intercepts")[0] += 0.25,
        &|tensors, _| f32s(tensors, "pixels.divisor")[0] = 254.0,
        &|_, texts| {
            texts.insert("labels".into(), "1,0,2,3,4,5,6,7,8,9".into());
        },
    ];
    for change in changes {
        assert_ne!(digest_after(change), digest);
    }
    let shape = |_: &mut Tensors, texts: &mut Texts| {
        texts.insert("shape".into(), "784".into());
    };
    assert_ne!(digest_after(&shape), digest);
    assert_eq!(digest.to_string().len(), 64);
}

#[test]
fn the_digest_is_the_documented_one() {
    use sha2::{Digest, Sha256};
    let map = FeatureMap::Raw(RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
    let svm = LinearSvm::new(array![[1.0, 2.0], [3.0, 4.0]], array![5.0, 6.0]).unwrap();
    let model = Model::new(map, svm, vec![0, 513], Metadata::default()).unwrap();
    let mut hash = Sha256::new();
    let numbers = |hash: &mut Sha256, numbers: &[u64]| {
        numbers.iter().for_each(|number| hash.update(number.to_le_bytes()));
    };
    let floats = |hash: &mut Sha256, floats: &[f32]| {
        floats.iter().for_each(|float| hash.update(float.to_le_bytes()));
    };
    hash.update(b"afterimage-model 1\0");
    numbers(&mut hash, &[3]);
    hash.update(b"raw");
    numbers(&mut hash, &[1, 2, 2, 0, 513, 14]);
    hash.update(b"pixels.divisor");
    numbers(&mut hash, &[1, 1]);
    floats(&mut hash, &[1.0]);
    numbers(&mut hash, &[14]);
    hash.update(b"svm.intercepts");
    numbers(&mut hash, &[1, 2]);
    floats(&mut hash, &[5.0, 6.0]);
    numbers(&mut hash, &[11]);
    hash.update(b"svm.weights");
    numbers(&mut hash, &[2, 2, 2]);
    floats(&mut hash, &[1.0, 2.0, 3.0, 4.0]);
    assert_eq!(model.digest().0, <[u8; 32]>::from(hash.finalize()));
}

#[test]
fn hostile_files_are_refused_with_what_is_wrong() {
    let text = |name: &'static str, value: &'static str| {
        move |_: &mut Tensors, texts: &mut Texts| {
            texts.insert(name.into(), value.into());
        }
    };
    for (error, part) in [
        (error_after(text("format", "pytorch")), "afterimage-model"),
        (error_after(|_, texts| texts.clear()), "afterimage-model"),
        (error_after(text("format_version", "3")), "format version is \"3\""),
        (error_after(text("features", "magic")), "magic"),
        (error_after(text("shape", "28y28")), "28y28"),
        (error_after(text("shape", "4294967295x4294967295")), "4194304"),
        (error_after(text("shape", "1x1x1x1x1x1x1x1")), "number of dimensions"),
        (error_after(text("shape", "28x29")), "[10, 812]"),
        (error_after(text("labels", "0,1")), "[2, 784]"),
        (error_after(text("labels", "0,1,2,3,4,5,6,7,8,8")), "8 twice"),
        (error_after(text("labels", "0,1,2,3,4,5,6,7,8,65536")), "labels"),
        (error_after(text("seed", "x")), "seed"),
        (error_after(text("test_errors", "none")), "test_errors"),
        (error_after(|tensors, _| drop(tensors.remove("svm.weights"))), "no such tensor"),
        (error_after(|tensors, _| drop(tensors.remove("pixels.divisor"))), "pixels.divisor"),
        (
            error_after(|tensors, _| {
                f32s(tensors, "pixels.divisor")[0] = 0.0;
            }),
            "1 to 65535",
        ),
        (
            error_after(|tensors, _| {
                f32s(tensors, "svm.weights")[5] = f32::NAN;
            }),
            "NaN at index 5",
        ),
        (
            error_after(|tensors, _| {
                tensors.insert("extra".into(), Tensor::new(&[1], vec![1.0]));
            }),
            "extra",
        ),
    ] {
        assert!(error.contains(part), "{error:?} should contain {part:?}");
    }
}

#[test]
fn no_truncation_and_no_mutation_of_a_file_panics() {
    let map = FeatureMap::Raw(RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
    let svm = LinearSvm::new(array![[1.0, 2.0], [3.0, 4.0]], array![5.0, 6.0]).unwrap();
    let bytes = Model::new(map, svm, vec![0, 1], Metadata::default()).unwrap().to_bytes();
    Model::from_bytes(&bytes).unwrap();
    for at in 0..bytes.len() {
        assert!(Model::from_bytes(&bytes[..at]).is_err(), "{at} bytes");
        for value in [0, 0xff, b'9', b'"', bytes[at] ^ 1] {
            let mut mutated = bytes.clone();
            mutated[at] = value;
            let _ = Model::from_bytes(&mutated);
        }
    }
}

#[test]
fn a_file_larger_than_any_model_is_not_read() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("large");
    std::fs::File::create(&path).unwrap().set_len(MAX_MODEL_FILE_BYTES + 1).unwrap();
    let error = Model::read(&path).unwrap_err().to_string();
    assert!(error.contains("1073741825 bytes; the limit is 1073741824"), "{error}");
    let missing = Model::read(&directory.path().join("missing")).unwrap_err().to_string();
    assert!(missing.contains("missing"), "{missing}");
}

#[test]
fn a_file_that_cannot_be_put_in_its_place_leaves_nothing_behind() {
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("place");
    std::fs::create_dir(&place).unwrap();
    std::fs::write(place.join("occupied"), "").unwrap();
    let error = Model::raw().write(&place).unwrap_err().to_string();
    assert!(error.contains("place: "), "{error}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
}
