//! `afterimage train`: IDX files in, a model out.

use std::path::PathBuf;

use afterimage_classifier::train::{FeatureKind, TrainOptions, run_to_file};

use crate::print::say;
use crate::progress::Bar;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The folder with the four MNIST files, plain or .gz.
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,

    /// The model to write (safetensors).
    #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,

    /// What the machines look at: raw (the pixels themselves) or conv (a convolutional map).
    #[arg(long, value_name = "NAME", default_value = "conv")]
    features: FeatureKind,

    /// What all random numbers come from: the same seed makes the same file, byte for byte.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// The price of an error in training. Chosen on the last 10,000 training images if not given.
    #[arg(long, value_name = "C")]
    c: Option<f64>,

    /// Distorted copies of every image to learn from. The features' own number if not given.
    #[arg(long, value_name = "N")]
    copies: Option<usize>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut options = TrainOptions::new(args.features, args.seed);
    options.data = args.data;
    options.out = args.out;
    options.c = args.c;
    options.copies = args.copies;
    let bar = Bar::new(0);
    let (model, evaluation) = run_to_file(&options, &|progress| {
        bar.set(progress.stage, progress.done, progress.total);
    })?;
    drop(bar);
    say!("{evaluation}")?;
    say!("wrote {}, model {}", options.out.display(), model.digest())
}
