//! Validation of training options: trains on all but the last 10,000 training images and evaluates
//! on those. The test set is not read.
//!
//! Usage: `classifier-validate FEATURES SEED DATA_DIR [C [COPIES [OUT_FILE]]]`.

use std::error::Error;
use std::path::Path;
use std::time::Instant;

use afterimage_classifier_tools::Dataset;
use afterimage_classifier_tools::train::{self, TrainOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [features, seed, data, rest @ ..] = arguments.as_slice() else {
        return Err(
            "usage: classifier-validate FEATURES SEED DATA_DIR [C [COPIES [OUT_FILE]]]".into()
        );
    };
    let mut options = TrainOptions::new(features.parse()?, seed.parse()?);
    options.c = rest.first().map(|c| c.parse()).transpose()?;
    options.copies = rest.get(1).map(|copies| copies.parse()).transpose()?;
    let train = Dataset::read(Path::new(data), "train")?;
    let started = Instant::now();
    let report = |p: train::Progress| {
        if p.done == p.total {
            eprintln!("{:6.1} s: {} done", started.elapsed().as_secs_f32(), p.stage);
        }
    };
    let (model, evaluation) = train::validate(&options, &train, &report)?;
    if let Some(out) = rest.get(2) {
        model.write(Path::new(out))?;
    }
    println!("{evaluation}");
    Ok(())
}
