//! What a model promises: equal bits however it is asked, files that are read back and hostile ones that are not.

use ndarray::{Array1, array};

use super::*;
use crate::tensors::{self, Tensor, Tensors, Texts};

/// Images that look like nothing, of every density.
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

fn parts() -> (Tensors, Texts) {
    tensors::decode(include_bytes!("../../models/raw-linear.safetensors")).unwrap()
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
fn scores_have_the_same_bits_alone_in_any_batch_and_at_every_level() {
    let model = Model::shipped();
    let images = noise_images(19);
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    let together = model.scores(&images).unwrap();
    for level in Level::available() {
        assert_eq!(bits(&model.scores_with(level, &images).unwrap()), bits(&together), "{level:?}");
        for (i, image) in images.iter().enumerate() {
            let alone = model.scores_with(level, &[image]).unwrap();
            assert_eq!(bits(&alone), bits(&together)[i * 10..(i + 1) * 10], "{level:?}, image {i}");
        }
        for size in [2, 3, 5, 8, 9, 16] {
            let batches = images.chunks(size).map(|images| model.scores(images).unwrap());
            let batches: Vec<u32> = batches.flat_map(|scores| bits(&scores)).collect();
            assert_eq!(batches, bits(&together), "batches of {size}");
        }
    }
}

#[test]
fn the_raw_model_has_the_same_bits_alone_in_any_batch_and_at_every_level() {
    let model = Model::raw();
    let images = noise_images(21);
    let images: Vec<&[u8]> = images.iter().map(Vec::as_slice).collect();
    let together = model.scores(&images).unwrap();
    for level in Level::available() {
        assert_eq!(bits(&model.scores_with(level, &images).unwrap()), bits(&together), "{level:?}");
        for (i, image) in images.iter().enumerate() {
            let alone = model.scores_with(level, &[image]).unwrap();
            assert_eq!(bits(&alone), bits(&together)[i * 10..(i + 1) * 10], "{level:?}, image {i}");
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
fn a_convolutional_file_with_a_wrong_shape_or_tensor_is_refused() {
    let bytes = include_bytes!("../../models/conv.safetensors");
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
fn labels_are_the_same_on_any_number_of_threads_and_in_any_memory_order() {
    let model = Model::shipped();
    let images = noise_images(130);
    let matrix = Array2::from_shape_fn((130, 784), |(i, p)| images[i][p]);
    let alone: Vec<u16> = images.iter().map(|image| model.classify(image).unwrap()).collect();
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let labels = pool.install(|| model.classify_all(matrix.view()).unwrap());
        assert_eq!(labels, alone, "{threads} threads");
    }
    let columns = matrix.t().as_standard_layout().into_owned();
    assert_eq!(model.classify_all(columns.t()).unwrap(), alone);
    assert!(alone.iter().any(|label| *label != alone[0]));
}

#[test]
fn refuses_images_of_another_size() {
    let model = Model::shipped();
    let error = model.classify(&[0; 783]).unwrap_err().to_string();
    assert_eq!(error, "bytes in one image: expected 784 (28x28), found 783");
    assert!(model.classify_all(ArrayView2::from_shape((2, 0), &[]).unwrap()).is_err());
    assert_eq!(model.scores(&[]).unwrap().dim(), (0, 10));
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
    assert_eq!(Model::raw().to_bytes(), include_bytes!("../../models/raw-linear.safetensors"));
    assert_eq!(Model::shipped().to_bytes(), include_bytes!("../../models/conv.safetensors"));
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
        &|tensors, _| tensors.get_mut("svm.weights").unwrap().f32s()[7839] += 0.25,
        &|tensors, _| tensors.get_mut("svm.intercepts").unwrap().f32s()[0] += 0.25,
        &|tensors, _| tensors.get_mut("pixels.divisor").unwrap().f32s()[0] = 254.0,
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
    let map = FeatureMap::Raw(crate::RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
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
                tensors.get_mut("pixels.divisor").unwrap().f32s()[0] = 0.0;
            }),
            "1 to 65535",
        ),
        (
            error_after(|tensors, _| {
                tensors.get_mut("svm.weights").unwrap().f32s()[5] = f32::NAN;
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
    let map = FeatureMap::Raw(crate::RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
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
    std::fs::File::create(&path).unwrap().set_len(crate::MAX_MODEL_FILE_BYTES + 1).unwrap();
    let error = Model::read(&path).unwrap_err().to_string();
    assert!(error.contains("1073741825 bytes; the limit is 1073741824"), "{error}");
    let missing = Model::read(&directory.path().join("missing")).unwrap_err().to_string();
    assert!(missing.contains("missing"), "{missing}");
}

#[test]
fn parts_that_do_not_fit_make_no_model() {
    let map = || FeatureMap::Raw(crate::RawPixels::new(Shape::new(&[2]).unwrap(), 1.0).unwrap());
    let svm = |dims| LinearSvm::new(Array2::ones((2, dims)), Array1::zeros(2)).unwrap();
    assert!(Model::new(map(), svm(2), vec![1, 2], Metadata::default()).is_ok());
    assert!(Model::new(map(), svm(3), vec![1, 2], Metadata::default()).is_err());
    assert!(Model::new(map(), svm(2), vec![1], Metadata::default()).is_err());
    assert!(Model::new(map(), svm(2), vec![1, 1], Metadata::default()).is_err());
}

/// The text of a small kernel model of LIBSVM's, bytes and numbers as its vectors.
fn imported() -> Vec<Model> {
    let rbf = "svm_type c_svc\nkernel_type rbf\ngamma 0.5\nnr_class 3\ntotal_sv 4\nrho 0.1 0 0\n\
        label 4 9 2\nnr_sv 2 1 1\nSV\n0.5 1 1:0.2 2:1 \n0.25 0 \n-1 0.5 2:0.4 \n-1 -0.5 1:0.6 \n";
    let linear = "solver_type L2R_LR\nnr_class 2\nlabel 1 0\nnr_feature 2\nbias -1\nw\n1 \n-1 \n";
    let shape = Some(Shape::new(&[2]).unwrap());
    let options = crate::ImportOptions { shape, ..crate::ImportOptions::default() };
    let import = |text: &str| Model::import_bytes(text.as_bytes(), &options).unwrap().model;
    vec![import(rbf), import(&rbf.replace("0.4 ", "0.4011 ")), import(linear)]
}

#[test]
fn an_imported_model_is_read_back_whole_and_its_digest_is_over_all_of_it() {
    let mut digests = Vec::new();
    for model in imported() {
        let bytes = model.to_bytes();
        let read = Model::from_bytes(&bytes).unwrap();
        assert_eq!((read.digest(), read.to_bytes()), (model.digest(), bytes.clone()));
        assert_eq!(read.metadata(), model.metadata());
        assert!(read.metadata().note.starts_with("imported from LIB"));
        let (tensors, texts) = tensors::decode(&bytes).unwrap();
        assert_eq!(texts["format_version"], "2");
        digests.push(model.digest());
        for name in tensors.keys() {
            let mut changed = tensors.clone();
            let tensor = changed.get_mut(name).unwrap();
            match &mut tensor.values {
                // A vector more in one class and one fewer in the next.
                tensors::Values::U32(values) => values.swap(0, 1),
                tensors::Values::U8(values) => values[0] ^= 1,
                tensors::Values::F64(values) => values[0] += 0.125,
                tensors::Values::F32(_) => unreachable!("none of these"),
            }
            let other = Model::from_bytes(&tensors::encode(&changed, &texts)).unwrap();
            digests.push(other.digest());
        }
        for (name, value) in [("kernel", "sigmoid"), ("shape", "1x2")] {
            let mut changed = texts.clone();
            if changed.contains_key(name) {
                changed.insert(name.to_owned(), value.to_owned());
                digests.push(
                    Model::from_bytes(&tensors::encode(&tensors, &changed)).unwrap().digest(),
                );
            }
        }
    }
    let all = digests.len();
    digests.sort_unstable_by_key(|digest| digest.0);
    digests.dedup();
    assert_eq!(digests.len(), all);
}

#[test]
fn an_imported_file_that_is_broken_is_refused_with_what_is_wrong() {
    type Change<'a> = &'a dyn Fn(&mut Tensors, &mut Texts);
    let model = imported().swap_remove(0);
    let (tensors, texts) = tensors::decode(&model.to_bytes()).unwrap();
    let text = |name: &'static str, value: &'static str| {
        move |_: &mut Tensors, texts: &mut Texts| {
            texts.insert(name.into(), value.into());
        }
    };
    let changes: [(Change<'_>, &str); 10] = [
        (&text("format_version", "1"), "expected raw or conv"),
        (&text("features", "conv"), "expected weights or kernel"),
        (&text("features", "weights"), "linear.weights"),
        (&text("kernel", "cubic"), "linear, polynomial, rbf or sigmoid"),
        (&text("shape", "3"), "[4, 3]"),
        (&text("labels", "1,2"), "kernel.counts"),
        (&text("labels", "1"), "2 to 65535"),
        (&|tensors, _| drop(tensors.remove("pixels.table")), "pixels.table"),
        (
            &|tensors, _| {
                let counts = vec![u32::MAX; 3];
                tensors.insert("kernel.counts".into(), Tensor::new(&[3], counts));
            },
            "[12884901885, 2]",
        ),
        (
            &|tensors, _| {
                tensors.insert("kernel.rho".into(), Tensor::new(&[3], vec![0_f32; 3]));
            },
            "expected F64, found F32",
        ),
    ];
    for (change, part) in changes {
        let (mut tensors, mut texts) = (tensors.clone(), texts.clone());
        change(&mut tensors, &mut texts);
        let error = Model::from_bytes(&tensors::encode(&tensors, &texts)).unwrap_err().to_string();
        assert!(error.contains(part) && !error.contains('\n'), "{error:?} should contain {part:?}");
    }
    for model in imported() {
        let bytes = model.to_bytes();
        for at in 0..bytes.len() {
            assert!(Model::from_bytes(&bytes[..at]).is_err(), "{at} bytes");
            if at % 7 == 0 {
                let mut mutated = bytes.clone();
                mutated[at] ^= 0xff;
                let _ = Model::from_bytes(&mutated);
            }
        }
    }
}
