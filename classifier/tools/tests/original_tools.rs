//! Imported models beside the tools that trained them: `svm-train` and `svm-predict`,
//! `liblinear-train` and `liblinear-predict` (Debian's libsvm-tools and liblinear-tools),
//! scikit-learn through skl2onnx and ONNX Runtime (PyPI). Missing tools are skipped, with a
//! message.
//!
//! The ordinary run makes up its images, trains on some hundreds of them and tries some hundreds,
//! many of them halfway between two classes; `--ignored` trains on MNIST and tries all 10,000
//! images of its test set, with the models of two classes too (TEST_MNIST names the folder):
//!
//! ```text
//! TEST_MNIST=data/mnist cargo test --release -p afterimage-classifier-tools \
//!     --test original_tools -- --ignored
//! ```

#![allow(clippy::unwrap_used, reason = "a test: what goes wrong may end it")]

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use afterimage_classifier::{Model, Shape};
use afterimage_classifier_tools::{Dataset, ImportOptions, Imported, Sample, Scale};

/// How bytes are written as features.
#[derive(Clone, Copy)]
enum Writing {
    /// Bytes over 255, all digits.
    Exact,
    /// The same with six digits, as `%g` prints them.
    Six,
    /// Bytes.
    Raw,
}

impl Writing {
    fn feature(self, byte: u8) -> String {
        let value = f64::from(byte) / 255.0;
        match self {
            Self::Exact => value.to_string(),
            // Six significant digits: below 0.1 a decimal more, below 0.01 two.
            Self::Six => {
                let decimals = 6 + usize::from(value < 0.1) + usize::from(value < 0.01);
                format!("{value:.decimals$}")
            }
            Self::Raw => byte.to_string(),
        }
    }
}

/// Images to train on and to try.
struct Images {
    train: Dataset,
    test: Dataset,
}

fn mnist() -> Option<PathBuf> {
    std::env::var_os("TEST_MNIST").map(PathBuf::from)
}

/// MNIST: five thousand images to train on, and the whole test set to try.
fn mnist_images() -> Images {
    let path = mnist().expect("set TEST_MNIST to the folder with the MNIST files");
    let train = Dataset::read(&path, "train").expect("MNIST can be read");
    let test = Dataset::read(&path, "t10k").expect("MNIST can be read");
    Images { train: train.split_at(5000).0, test }
}

/// Images of ten classes, each around one that is its class's centre, two fifths of them between
/// two centres: no class is far from another, and votes are close. Four fifths of the bytes are
/// zero, as in MNIST.
fn made_up() -> Images {
    let mut state = 1_u32;
    let mut next = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 24
    };
    let centres: Vec<Vec<u32>> = (0..10)
        .map(|_| (0..784).map(|_| if next() < 200 { 0 } else { next() }).collect())
        .collect();
    let count = 600;
    let mut images = Vec::new();
    let labels: Vec<u16> = (0..count).map(|_| (next() % 10) as u16).collect();
    for (place, label) in labels.iter().enumerate() {
        let (own, other) = (&centres[usize::from(*label)], &centres[next() as usize % 10]);
        let share = if place % 5 < 2 { 100 + next() % 56 } else { 256 };
        for (own, other) in own.iter().zip(other) {
            let noise = if next() < 200 { 0 } else { next() / 2 };
            images.push(((own * share + other * (256 - share)) / 256 + noise).min(255) as u8);
        }
    }
    let all = Dataset::new(Shape::MNIST, images, labels).expect("as many images as labels");
    let (train, test) = all.split_at(300);
    Images { train, test }
}

fn write_text(path: &Path, data: &Dataset, writing: Writing) {
    let features: Vec<String> = (0..=255).map(|byte| writing.feature(byte)).collect();
    let mut text = String::new();
    for (image, label) in data.images().zip(data.labels()) {
        write!(text, "{label}").unwrap();
        for (at, &byte) in image.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            write!(text, " {}:{}", at + 1, features[usize::from(byte)]).unwrap();
        }
        text.push('\n');
    }
    fs::write(path, text).unwrap();
}

/// Prints past the test harness, which hides the output of passing tests.
fn skipped(why: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {why}");
}

/// Whether these programs are installed; prints a note if not.
fn have(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| {
        let run = Command::new(program).stdout(Stdio::null()).stderr(Stdio::null()).status();
        run.is_err()
    });
    if let Some(missing) = missing {
        skipped(&format!("there is no {missing}"));
    }
    missing.is_none()
}

fn run(program: &str, arguments: &[&str], paths: &[&Path]) {
    let output = Command::new(program).args(arguments).args(paths).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The answers of an imported model, and of the same written to a file and read again, are the
/// predictions.
fn agree(what: &str, model: &Path, options: &ImportOptions, data: &Dataset, predictions: &Path) {
    let imported = Imported::read(model, options).unwrap();
    let sample = Sample::of(data, &imported).unwrap();
    let agreement = sample.with_predictions(predictions).unwrap().agreement(&imported).unwrap();
    println!("{what}: {agreement}");
    assert_eq!(agreement.agree, data.len(), "{what}: {agreement}");
    let written = model.with_extension("safetensors");
    imported.model.write(&written).unwrap();
    let read = Model::read(&written).unwrap();
    assert_eq!(read.digest(), imported.model.digest());
    let mut again: Imported = imported;
    again.model = read;
    let agreement = sample.with_predictions(predictions).unwrap().agreement(&again).unwrap();
    assert_eq!(agreement.agree, data.len(), "{what}, read again: {agreement}");
}

/// Trains and predicts with two programs, and compares.
fn try_tool(programs: [&str; 2], cases: &[(&str, Writing)], images: &Images) {
    if !have(&programs) {
        return;
    }
    let [train, predict] = programs;
    let directory = tempfile::tempdir().unwrap();
    let [learn, test, model, predictions] =
        ["train", "test", "model", "predictions"].map(|name| directory.path().join(name));
    for &(arguments, writing) in cases {
        write_text(&learn, &images.train, writing);
        write_text(&test, &images.test, writing);
        let flags: Vec<&str> = std::iter::once("-q").chain(arguments.split(' ')).collect();
        run(train, &flags, &[&learn, &model]);
        run(predict, &["-q"], &[&test, &model, &predictions]);
        let options = ImportOptions::default();
        agree(&format!("{train} {arguments}"), &model, &options, &images.test, &predictions);
    }
}

fn libsvm(images: &Images) {
    let two = of_two(images);
    let programs = ["svm-train", "svm-predict"];
    try_tool(
        programs,
        &[
            ("-t 0 -c 0.1", Writing::Exact),
            ("-t 1 -g 0.01 -r 1 -d 3 -c 10", Writing::Exact),
            ("-t 2 -g 0.02 -c 10", Writing::Exact),
            ("-t 2 -g 0.02 -c 10", Writing::Six),
            ("-t 2 -g 4e-7 -c 10", Writing::Raw),
            ("-t 3 -g 0.002 -r -0.5 -c 10", Writing::Exact),
            ("-s 1 -n 0.1 -t 2 -g 0.02", Writing::Exact),
        ],
        images,
    );
    try_tool(programs, &[("-t 2 -g 0.02 -c 10 -b 1", Writing::Exact)], &two);
}

fn liblinear(images: &Images) {
    let programs = ["liblinear-train", "liblinear-predict"];
    let cases: Vec<String> = (0..8)
        .map(|solver| {
            format!("-s {solver} -c 0.1 -e 0.1 -B {}", if solver % 2 == 0 { -1 } else { 1 })
        })
        .collect();
    let cases: Vec<_> = cases.iter().map(|case| (case.as_str(), Writing::Exact)).collect();
    try_tool(programs, &cases, images);
    try_tool(programs, &[cases[1], cases[4]], &of_two(images));
}

/// The training images of two classes, and all test images: each of them gets one of two labels.
fn of_two(images: &Images) -> Images {
    Images { train: of_labels(&images.train, &[3, 8]), test: images.test.clone() }
}

/// The same with features that `svm-scale` brought to −1 to 1: it writes their ranges when it
/// scales what is trained on, and reads them when it scales what is predicted.
fn scaled(images: &Images) {
    if !have(&["svm-scale", "svm-train", "svm-predict", "liblinear-train", "liblinear-predict"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [plain, learn, test, ranges, model, predictions] =
        ["plain", "train", "test", "ranges", "model", "predictions"]
            .map(|name| directory.path().join(name));
    for writing in [Writing::Raw, Writing::Exact, Writing::Six] {
        for (data, flag, out) in [(&images.train, "-s", &learn), (&images.test, "-r", &test)] {
            write_text(&plain, data, writing);
            let output =
                Command::new("svm-scale").arg(flag).args([&ranges, &plain]).output().unwrap();
            assert!(output.status.success(), "svm-scale: {output:?}");
            fs::write(out, output.stdout).unwrap();
        }
        let options = ImportOptions {
            scale: Some(Scale::read(&ranges).unwrap()),
            ..ImportOptions::default()
        };
        for (train, flags, predict) in [
            ("svm-train", "-q -t 2 -g 0.002 -c 10", "svm-predict"),
            ("liblinear-train", "-q -s 1 -c 0.01 -e 0.1 -B 1", "liblinear-predict"),
        ] {
            run(train, &flags.split(' ').collect::<Vec<_>>(), &[&learn, &model]);
            run(predict, &["-q"], &[&test, &model, &predictions]);
            let what = format!("svm-scale, {train} {flags}");
            agree(&what, &model, &options, &images.test, &predictions);
        }
    }
}

fn of_labels(data: &Dataset, labels: &[u16]) -> Dataset {
    let of = |index: &usize| labels.contains(&data.labels()[*index]);
    let places: Vec<usize> = (0..data.len()).filter(of).collect();
    let images = places.iter().flat_map(|&index| data.image(index)).copied().collect();
    let labels = places.iter().map(|&index| data.labels()[index]).collect();
    Dataset::new(data.shape(), images, labels).unwrap()
}

/// Python with the packages: TEST_PYTHON, or the one on the path.
fn python() -> Option<String> {
    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let imports = "import sklearn, skl2onnx, onnxruntime";
    let run = Command::new(&python).args(["-c", imports]).stderr(Stdio::null()).status();
    if run.is_ok_and(|status| status.success()) {
        return Some(python);
    }
    skipped("no Python with scikit-learn, skl2onnx and onnxruntime (TEST_PYTHON)");
    None
}

fn onnx(images: &Images) {
    let Some(python) = python() else { return };
    let directory = tempfile::tempdir().unwrap();
    for (name, data) in [("train", &images.train), ("test", &images.test)] {
        let bytes: Vec<u8> = data.images().flatten().copied().collect();
        fs::write(directory.path().join(name), bytes).unwrap();
        let labels: Vec<u8> = data.labels().iter().map(|&label| label as u8).collect();
        fs::write(directory.path().join(format!("{name}.labels")), labels).unwrap();
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scikit_models.py");
    run(&python, &[], &[&script, directory.path()]);
    let mut models = 0;
    let mut files: Vec<_> =
        fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    for model in files.iter().filter(|file| file.extension().is_some_and(|end| end == "onnx")) {
        let name = model.file_stem().unwrap().to_str().unwrap();
        // Names that are no numbers get theirs: d0 is 0.
        let labels = name.contains("names").then(|| (0..10).collect());
        // Weights on bytes look like weights on anything.
        let divisor = (name == "two_logistic_bytes").then_some(1.0);
        let options = ImportOptions { labels, divisor, ..ImportOptions::default() };
        agree(
            &format!("scikit-learn, {name}"),
            model,
            &options,
            &images.test,
            &model.with_extension("txt"),
        );
        models += 1;
    }
    assert_eq!(models, 24, "the models that the script writes");
}

#[test]
fn libsvms_predictions_are_ours() {
    libsvm(&made_up());
}

#[test]
fn liblinears_predictions_are_ours() {
    liblinear(&made_up());
}

#[test]
fn predictions_of_scaled_features_are_ours() {
    scaled(&made_up());
}

#[test]
fn onnx_runtimes_predictions_are_ours() {
    onnx(&made_up());
}

#[test]
#[ignore = "minutes; needs MNIST"]
fn libsvms_predictions_of_the_whole_test_set_are_ours() {
    libsvm(&mnist_images());
}

#[test]
#[ignore = "minutes; needs MNIST"]
fn liblinears_predictions_of_the_whole_test_set_are_ours() {
    liblinear(&mnist_images());
}

#[test]
#[ignore = "minutes; needs MNIST"]
fn scaled_predictions_equal_ours_on_the_whole_test_set() {
    scaled(&mnist_images());
}

#[test]
#[ignore = "minutes; needs MNIST"]
fn onnx_runtimes_predictions_of_the_whole_test_set_are_ours() {
    onnx(&mnist_images());
}
