//! `afterimage train`: train a model on IDX files.

use std::path::PathBuf;

use afterimage_classifier::Model;
use afterimage_classifier_tools::train::{FeatureKind, TrainOptions, run_to_file};

use crate::print::say;
use crate::progress::Bar;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage train --data data/mnist --out model.safetensors
  afterimage train --features raw --out raw.safetensors

The default features take minutes to train.")]
pub(crate) struct Args {
    /// Folder with the four MNIST files, plain or .gz.
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,

    /// Model file to write (safetensors).
    #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,

    /// Features: raw (the pixels) or conv (a convolutional map).
    #[arg(long, value_name = "NAME", default_value = "conv")]
    features: FeatureKind,

    /// Seed of all random numbers. The same seed, options and data give the same file.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// SVM parameter C [default: 0.5 for conv; for raw chosen on the last 10,000 training images].
    #[arg(long, value_name = "C")]
    c: Option<f64>,

    /// Distorted copies of each training image [default: 23 for conv, 0 for raw].
    #[arg(long, value_name = "N")]
    copies: Option<usize>,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut options = TrainOptions::new(args.features, args.seed);
    options.data = args.data;
    options.out = args.out;
    options.c = args.c;
    options.copies = args.copies;
    Model::check_path(&options.out)?;
    let bar = Bar::new(0);
    let (model, evaluation) = run_to_file(&options, &|progress| {
        bar.set(progress.stage, progress.done, progress.total);
    })?;
    drop(bar);
    say!("{evaluation}")?;
    say!("wrote {}, model {}", options.out.display(), model.digest())
}
