//! `afterimage eval`: measure a model's errors and speed on a test set.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use afterimage_classifier_tools::{
    Dataset, Evaluation, Example, MAX_SHEET_EXAMPLES, contact_sheet,
};
use anyhow::bail;
use serde_json::json;

use super::bench::OutFile;
use crate::print::{self, say};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage eval --data data/mnist
  afterimage eval --model model.safetensors --worst worst.png")]
pub(crate) struct Args {
    /// Model file, or a built-in model: shipped, raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,

    /// Folder with the MNIST test files, plain or .gz.
    #[arg(long, value_name = "DIR", default_value = "data/mnist")]
    data: PathBuf,

    /// Write the worst examples as a picture (PNG).
    ///
    /// Wrong answers come first, then right answers with the smallest margin. The text under an
    /// image: label, answer, index in the data set (from 0), and margin (-inf if the model does
    /// not have the label). The images belong to the data set: check its licence
    /// before you publish them.
    #[arg(long, value_name = "PNG")]
    worst: Option<PathBuf>,

    /// Number of examples to draw, at most 1000.
    #[arg(long, value_name = "N", default_value = "64")]
    worst_count: NonZeroUsize,

    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let model = crate::config::model(&args.model)?;
    let count = args.worst_count.get();
    if count > MAX_SHEET_EXAMPLES {
        bail!("--worst-count is {count}; the limit is {MAX_SHEET_EXAMPLES}");
    }
    let sheet = args.worst.as_deref().map(OutFile::open).transpose()?;
    let test = Dataset::read(&args.data, "t10k")?;
    let evaluation = Evaluation::of(&model, &test)?;
    let mut worst = None;
    if let (Some(path), Some(file)) = (&args.worst, sheet) {
        let examples = evaluation.worst(&model, &test, count)?;
        let sheet = contact_sheet(&test, &examples)?;
        file.write(|out| out.write_all(&sheet))?;
        worst = Some((path, examples));
    }
    if args.json {
        let mut report = evaluation.to_json();
        report["model"] = json!(model.digest().to_string());
        report["features"] = json!(model.description());
        if let Some((_, examples)) = worst {
            report["worst"] = examples.iter().map(example).collect();
        }
        return print::json(&format!("{report:#}"));
    }
    say!("model {} ({})", model.digest(), model.description())?;
    say!("{evaluation}")?;
    if let Some((path, examples)) = worst {
        say!("\nwrote {}: the {} worst of {}", path.display(), examples.len(), test.len())?;
    }
    Ok(())
}

fn example(example: &Example) -> serde_json::Value {
    let Example { index, label, answer, margin } = example;
    json!({ "index": index, "label": label, "answer": answer, "margin": margin })
}
