//! Training on small made-up data sets: bars in four directions, in noise. Two more tests train the
//! built-in models on MNIST by the commands in their metadata. They take minutes, so they are
//! ignored by default:
//!
//! ```text
//! TEST_MNIST=data/mnist cargo test --release -p afterimage-classifier-tools \
//!     --test training -- --ignored
//! ```

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;
use std::path::Path;
use std::sync::Mutex;

use afterimage_classifier::{Model, Shape};
use afterimage_classifier_tools::train::random::Random;
use afterimage_classifier_tools::train::{FeatureKind, TrainOptions, run, run_to_file};
use afterimage_classifier_tools::{Dataset, Evaluation};

fn bars(count: usize) -> Dataset {
    let mut noise = Random::new(5, b"a test..", 0);
    let shape = Shape::new(&[6, 6]).unwrap();
    let mut images = Vec::new();
    let mut labels = Vec::new();
    for i in 0..count {
        let label = (i % 4) as u16;
        let at = noise.below(6);
        for y in 0..6 {
            for x in 0..6 {
                let on = match label {
                    0 => y == at,
                    1 => x == at,
                    2 => (x + y) % 6 == at,
                    _ => (x + 6 - y) % 6 == at,
                };
                images.push(noise.below(60) as u8 + if on { 150 } else { 0 });
            }
        }
        labels.push(label + 10);
    }
    Dataset::new(shape, images, labels).unwrap()
}

fn options() -> TrainOptions {
    TrainOptions::new(FeatureKind::Raw, 4)
}

fn changed(mut options: TrainOptions, change: impl FnOnce(&mut TrainOptions)) -> TrainOptions {
    change(&mut options);
    options
}

#[test]
fn the_same_seed_gives_the_same_file_on_any_number_of_threads() {
    let data = bars(400);
    let bytes_on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(&options(), &data, &|_| {}).unwrap().to_bytes())
    };
    let bytes = bytes_on(1);
    assert_eq!(bytes_on(2), bytes);
    assert_eq!(bytes_on(5), bytes);
    let other = changed(options(), |options| options.seed = 5);
    assert_ne!(run(&other, &data, &|_| {}).unwrap().to_bytes(), bytes);
}

/// Strokes of four slopes, 28 × 28: enough for the convolutional map to learn from.
fn strokes(count: usize) -> Dataset {
    let mut noise = Random::new(6, b"a test..", 0);
    let mut images = Vec::new();
    for i in 0..count {
        let (across, down) = [(1.0, 0.0), (0.0, 1.0), (0.7, 0.7), (0.9, -0.4)][i % 4];
        let (left, top) = (noise.below(8) as f64 + 10.0, noise.below(8) as f64 + 10.0);
        for y in 0..28 {
            for x in 0..28 {
                let (dy, dx) = (f64::from(y) - top, f64::from(x) - left);
                let (along, beside) = (across * dx + down * dy, across * dy - down * dx);
                let on = along.abs() < 8.0 && beside.abs() < 1.5;
                images.push(if on { 200 + noise.below(56) as u8 } else { 0 });
            }
        }
    }
    Dataset::new(Shape::MNIST, images, (0..count).map(|i| (i % 4) as u16).collect()).unwrap()
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes without optimization")]
fn convolutional_training_does_not_depend_on_threads() {
    let data = strokes(240);
    let options = changed(options(), |options| {
        options.features = FeatureKind::Conv;
        options.copies = Some(2);
    });
    let bytes_on = |options: &TrainOptions, threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| run(options, &data, &|_| {}).unwrap().to_bytes())
    };
    let bytes = bytes_on(&options, 1);
    assert_eq!(bytes_on(&options, 2), bytes);
    assert_eq!(bytes_on(&options, 3), bytes);
    assert_ne!(bytes_on(&changed(options.clone(), |options| options.seed = 9), 2), bytes);
    let model = Model::from_bytes(&bytes).unwrap();
    let wrong = Evaluation::of(&model, &strokes(100)).unwrap().wrong();
    assert!(wrong <= 10, "{wrong} of 100 strokes");
    assert!(model.metadata().command.ends_with(" --copies 2"));
}

#[test]
fn options_that_mean_nothing_are_refused() {
    let copies = changed(options(), |options| options.copies = Some(2));
    assert!(run(&copies, &bars(40), &|_| {}).unwrap_err().to_string().contains("copies"));
    let many = changed(options(), |options| {
        options.features = FeatureKind::Conv;
        options.copies = Some(101);
    });
    assert!(run(&many, &strokes(8), &|_| {}).unwrap_err().to_string().contains("at most 100"));
    let small = changed(options(), |options| options.features = FeatureKind::Conv);
    let error = run(&small, &bars(8), &|_| {}).unwrap_err().to_string();
    assert_eq!(error, "shape of the images for the conv map: expected 28x28, found 6x6");
    assert!("convolutional".parse::<FeatureKind>().is_err());
    assert_eq!("conv".parse::<FeatureKind>().unwrap(), FeatureKind::Conv);
}

#[test]
fn the_command_has_every_option_and_no_path() {
    let mut options = options();
    options.data = "data/mnist".into();
    options.out = "m.safetensors".into();
    let command = options.command();
    let expected = "afterimage train --features raw --seed 4";
    assert_eq!(command, expected);
    options.c = Some(0.25);
    assert!(options.command().ends_with(" --c 0.25"));
}

#[test]
fn learns_more_than_chance_and_keeps_the_labels() {
    let data = bars(800);
    let model = run(&options(), &data, &|_| {}).unwrap();
    assert_eq!(model.labels(), [10, 11, 12, 13]);
    let error = Evaluation::of(&model, &data).unwrap().error_rate();
    assert!(error < 0.5, "error {error} of four classes");
    assert!(model.metadata().note.contains("last 133 training images"));
}

#[test]
fn progress_grows_within_a_stage_up_to_its_total() {
    let seen = Mutex::new(Vec::new());
    let c = changed(options(), |options| options.c = Some(0.1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| run(&c, &bars(100), &|p| seen.lock().unwrap().push(p)).unwrap());
    let seen = seen.into_inner().unwrap();
    assert!(!seen.is_empty());
    assert!(seen.is_sorted_by_key(|p| p.done));
    assert!(seen.iter().all(|p| p.stage == "training" && p.done <= p.total));
}

#[test]
fn refuses_one_class_and_a_c_that_is_no_number() {
    let one = Dataset::new(Shape::new(&[1]).unwrap(), vec![1, 2], vec![3, 3]).unwrap();
    let error = run(&options(), &one, &|_| {}).unwrap_err().to_string();
    assert_eq!(error, "classes in the training set is 1; the range is 2 to 65535");
    for c in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(
            run(&changed(options(), |options| options.c = Some(c)), &bars(40), &|_| {}).is_err()
        );
    }
}

#[test]
fn training_records_the_test_set_and_writes_its_model() {
    let directory = tempfile::tempdir().unwrap();
    write_idx(directory.path(), "train", &bars(120));
    write_idx(directory.path(), "t10k", &bars(40));
    let out = directory.path().join("model.safetensors");
    let options = changed(options(), |options| {
        options.data = directory.path().into();
        options.out = out.clone();
    });
    let (model, evaluation) = run_to_file(&options, &|_| {}).unwrap();
    assert_eq!(model.metadata().test_errors, Some((evaluation.wrong(), 40)));
    assert_eq!(fs::read(&out).unwrap(), model.to_bytes());
    let read = Model::read(&out).unwrap();
    assert_eq!(read.metadata(), model.metadata());
    assert_eq!(read.digest(), model.digest());
}

fn write_idx(directory: &Path, prefix: &str, data: &Dataset) {
    let count = data.len() as u8;
    let dims = data.shape().dims().to_vec();
    let mut images =
        vec![0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, dims[0] as u8, 0, 0, 0, dims[1] as u8];
    data.images().for_each(|image| images.extend_from_slice(image));
    let mut labels = vec![0, 0, 8, 1, 0, 0, 0, count];
    labels.extend(data.labels().iter().map(|&label| label as u8));
    fs::write(directory.join(format!("{prefix}-images-idx3-ubyte")), images).unwrap();
    fs::write(directory.join(format!("{prefix}-labels-idx1-ubyte")), labels).unwrap();
}

#[test]
#[ignore = "needs MNIST's training set in TEST_MNIST"]
fn the_raw_model_is_reproduced_on_one_and_three_threads() {
    reproduce(&Model::raw(), &[1, 3]);
}

#[test]
#[ignore = "needs MNIST's training set in TEST_MNIST, and minutes"]
fn the_shipped_model_is_reproduced_on_two_threads() {
    reproduce(&Model::shipped(), &[2]);
}

/// Trains the model again on MNIST and compares every byte of its file. The test set is not read:
/// its recorded figure is copied.
fn reproduce(model: &Model, thread_counts: &[usize]) {
    let data = std::env::var("TEST_MNIST").expect("TEST_MNIST names a directory");
    let train = Dataset::read(Path::new(&data), "train").expect("it holds MNIST");
    let options = parse(&model.metadata().command);
    assert_eq!(options.command(), model.metadata().command);
    for &threads in thread_counts {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let made = pool.install(|| run(&options, &train, &|_| {}).expect("it trains"));
        assert_eq!(made.digest(), model.digest(), "{threads} threads");
        let mut metadata = made.metadata().clone();
        metadata.test_errors = model.metadata().test_errors;
        assert!(made.with_metadata(metadata).to_bytes() == model.to_bytes());
    }
}

/// Reads a command as the command line would.
fn parse(command: &str) -> TrainOptions {
    let words: Vec<&str> = command.split(' ').collect();
    assert_eq!(words[..2], ["afterimage", "train"]);
    let value = |name: &str| {
        let at = words.iter().position(|word| *word == name).expect("every option is there");
        words[at + 1]
    };
    let features = value("--features").parse().expect("a feature map");
    TrainOptions::new(features, value("--seed").parse().expect("a number"))
}
