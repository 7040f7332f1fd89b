//! `afterimage eval`: judge a model by a test set.

use std::path::PathBuf;

use afterimage_classifier::{Dataset, Evaluation};

use crate::args;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a file, or one of those inside this program: shipped, raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,

    /// The folder with the MNIST test files, plain or .gz.
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let model = args::model(&args.model)?;
    let test = Dataset::read(&args.data, "t10k")?;
    println!("model {} ({} features)", model.digest(), model.features().name());
    println!("{}", Evaluation::of(&model, &test)?);
    Ok(())
}
