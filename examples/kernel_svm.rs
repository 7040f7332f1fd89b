//! Measurement of an imported kernel model beside `svm-predict`: an RBF model of LIBSVM with at
//! least 9,000 support vectors. The two score the MNIST test set in turns of a thousand images, on
//! the core that the process is pinned to. Every label is compared.
//!
//! Usage: `kernel_svm DATA_DIR RECORDS_DIR [MODEL]`; without a text model, one is trained.
//!
//! Times are CPU time: other load on the machine changes their ratio less than that of wall times.
//! The time in which `svm-predict` reads its model is subtracted.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use afterimage_bench::record::{Machine, Record};
use afterimage_classifier::Scratch;
use afterimage_classifier_tools::{Dataset, ImportOptions, Imported};
use anyhow::{Context, bail, ensure};
use rustix::time::{ClockId, clock_gettime};

/// Training images: enough for more than [`LEAST_VECTORS`] support vectors with these settings.
const TRAIN: usize = 13_000;
const SETTINGS: [&str; 9] = ["-q", "-m", "1000", "-t", "2", "-g", "0.08", "-c", "10"];
const LEAST_VECTORS: usize = 9_000;

/// Images of a turn.
const TURN: usize = 1000;

/// Images that are scored one by one.
const ALONE: usize = 200;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (data, records, model) = match arguments.as_slice() {
        [data, records] => (Path::new(data), Path::new(records), None),
        [data, records, model] => (Path::new(data), Path::new(records), Some(PathBuf::from(model))),
        _ => bail!("usage: kernel_svm DATA_DIR RECORDS_DIR [MODEL]"),
    };
    let machine = Machine::here();
    let directory = tempfile::tempdir()?;
    let text = match model {
        Some(text) => text,
        None => train(data, directory.path())?,
    };
    let imported = Imported::read(&text, &ImportOptions::default())?;
    let model = imported.model;
    println!("{}, {}", imported.origin, model.description());
    let vectors = model.support_vectors().context("it is no kernel model")?;
    ensure!(vectors >= LEAST_VECTORS, "{vectors} support vectors; {LEAST_VECTORS} are wanted");

    let test = Dataset::read(data, "t10k")?;
    let loading = loading(&text, &test, directory.path())?;
    let (mut theirs, mut ours, mut agree) = (0.0, 0.0, 0);
    let mut ratios = Vec::new();
    let mut scratch = Scratch::default();
    for start in (0..test.len()).step_by(TURN) {
        let images: Vec<&[u8]> = test.images().skip(start).take(TURN).collect();
        let (predicted, time) = predict(&text, &images, directory.path())?;
        let their_time = time - loading;
        let mut labels = vec![0; images.len()];
        let began = processor_time();
        model.classify_batch(&images, &mut scratch, &mut labels)?;
        let our_time = processor_time() - began;
        agree += labels.iter().zip(&predicted).filter(|(ours, theirs)| ours == theirs).count();
        println!(
            "images from {start:>4}: svm-predict {:7.1} µs, ours {:6.2} µs each, {:.1} times",
            1e6 * their_time / images.len() as f64,
            1e6 * our_time / images.len() as f64,
            their_time / our_time
        );
        ratios.push(their_time / our_time);
        (theirs, ours) = (theirs + their_time, ours + our_time);
    }
    let began = processor_time();
    for image in test.images().take(ALONE) {
        model.classify_batch(&[image], &mut scratch, &mut [0])?;
    }
    let alone = 1e6 * (processor_time() - began) / ALONE as f64;
    ratios.sort_by(f64::total_cmp);
    let images = test.len() as f64;
    let lines = [
        format!("{}: {vectors} support vectors", imported.origin),
        format!("labels that agree: {agree} of {}", test.len()),
        format!(
            "svm-predict {:.1} µs an image, reading the model ({loading:.2} s) not counted",
            1e6 * theirs / images
        ),
        format!("ours {:.2} µs an image in batches, {alone:.1} µs alone", 1e6 * ours / images),
        format!(
            "ratio {:.1}; of the turns least {:.1}, median {:.1}",
            theirs / ours,
            ratios[0],
            ratios[ratios.len() / 2]
        ),
    ];
    lines.iter().for_each(|line| println!("{line}"));
    let mut record = Record::new("kernel-svm", Path::new("."), machine, Vec::new());
    // The record does not contain the local path of the data.
    record.command = ["bench/scripts/run.sh", "kernel-svm", "MNIST_DIR"].map(String::from).to_vec();
    record.figures = [
        ("support_vectors", vectors as f64),
        ("images", images),
        ("labels_that_agree", agree as f64),
        ("svm_predict_us_per_image", 1e6 * theirs / images),
        ("ours_us_per_image", 1e6 * ours / images),
        ("ours_alone_us_per_image", alone),
        ("ratio", theirs / ours),
        ("ratio_least", ratios[0]),
        ("ratio_median", ratios[ratios.len() / 2]),
    ]
    .map(|(name, figure)| (name.to_owned(), figure))
    .into();
    record.text = lines.to_vec();
    println!("record {}", record.write(records)?.display());
    ensure!(agree == test.len(), "labels differ");
    Ok(())
}

/// Trains with `svm-train` on the first training images, bytes over 255.
fn train(data: &Path, directory: &Path) -> anyhow::Result<PathBuf> {
    let (images, _) = Dataset::read(data, "train")?.split_at(TRAIN);
    let (text, model) = (directory.join("train"), directory.join("model"));
    let rows: Vec<&[u8]> = images.images().collect();
    fs::write(&text, lines(&rows, images.labels()))?;
    println!("svm-train {} on {TRAIN} images …", SETTINGS.join(" "));
    let status = Command::new("svm-train").args(SETTINGS).args([&text, &model]).status()?;
    ensure!(status.success(), "svm-train: {status}");
    Ok(model)
}

/// LIBSVM's text format.
fn lines(images: &[&[u8]], labels: &[u16]) -> String {
    let features: Vec<String> =
        (0..=255_u8).map(|byte| (f64::from(byte) / 255.0).to_string()).collect();
    let mut text = String::new();
    for (image, label) in images.iter().zip(labels) {
        write!(text, "{label}").expect("a string takes all");
        for (at, &byte) in image.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            write!(text, " {}:{}", at + 1, features[usize::from(byte)])
                .expect("a string takes all");
        }
        text.push('\n');
    }
    text
}

/// The labels that `svm-predict` gives, and its processor time in seconds.
fn predict(model: &Path, images: &[&[u8]], directory: &Path) -> anyhow::Result<(Vec<u16>, f64)> {
    let (text, output) = (directory.join("test"), directory.join("predictions"));
    fs::write(&text, lines(images, &vec![0; images.len()]))?;
    let timed = Command::new("bash")
        .args(["-c", "TIMEFORMAT='%3U %3S'; time svm-predict -q \"$@\"", "svm-predict"])
        .args([text.as_path(), model, &output])
        .stdout(Stdio::null())
        .output()?;
    ensure!(timed.status.success(), "svm-predict: {}", String::from_utf8_lossy(&timed.stderr));
    let times = String::from_utf8(timed.stderr)?;
    let times: Vec<f64> = times
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .context(times.clone())?;
    let labels = fs::read_to_string(&output)?;
    let labels = labels.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    Ok((labels, times.iter().sum()))
}

/// Time of `svm-predict` for a single image, mostly for reading the model; the least of three.
fn loading(model: &Path, test: &Dataset, directory: &Path) -> anyhow::Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..3 {
        least = least.min(predict(model, &[test.image(0)], directory)?.1);
    }
    Ok(least)
}

/// This thread's processor time, in seconds.
fn processor_time() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
