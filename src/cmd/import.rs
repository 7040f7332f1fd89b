//! `afterimage import`: convert a model of another tool.

use std::path::PathBuf;

use afterimage_classifier::Shape;
use afterimage_classifier_tools::{ImportOptions, Imported, Sample, Scale};
use anyhow::Context;

use crate::print::{self, say};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage import digits.model --out model.safetensors
  afterimage import svc.onnx --sample data/mnist

Use the model with: afterimage serve --model model.safetensors")]
pub(crate) struct Args {
    /// Model file to write (safetensors).
    #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,

    /// Shape of the model's images, outermost dimension first [default: 28x28, or the features of
    /// an ONNX model].
    #[arg(long, value_name = "DIMS", value_parser = shape)]
    shape: Option<Shape>,

    /// Divisor from bytes to features; 255 for features from 0 to 1 [default: derived from
    /// the support vectors or the scaler, else 255 with a note].
    #[arg(long, value_name = "N")]
    divisor: Option<f64>,

    /// Range file of `svm-scale -s`, for a model trained on scaled features (LIBSVM, LIBLINEAR). A
    /// text sample must then be scaled, too.
    #[arg(long, value_name = "FILE")]
    scale: Option<PathBuf>,

    /// Labels to answer with, in the model's order; needed if its own are not numbers from 0 to
    /// 65535.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    labels: Option<Vec<u16>>,

    /// Labelled images to test the model on: a text file for `svm-predict`, or a folder with the
    /// MNIST test files.
    #[arg(long, value_name = "PATH")]
    sample: Option<PathBuf>,

    /// The original tool's predictions for the sample, one label a line.
    #[arg(long, value_name = "FILE", requires = "sample")]
    predictions: Option<PathBuf>,

    /// Model of LIBSVM or LIBLINEAR, or an ONNX file with an SVM or a linear classifier.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { out, shape, divisor, scale, labels, sample, predictions, file } = args;
    let scale = scale.as_deref().map(Scale::read).transpose()?;
    let imported = Imported::read(&file, &ImportOptions { shape, divisor, labels, scale })?;
    say!("{imported}")?;
    for warning in &imported.warnings {
        print::note(format_args!("warning: {warning}"));
    }
    if let Some(path) = sample {
        let sample = Sample::read(&path, &imported)?;
        say!("accuracy on the sample: {}", sample.agreement(&imported)?)?;
        if let Some(path) = predictions {
            let predicted =
                sample.with_predictions(&path).with_context(|| path.display().to_string())?;
            say!("agreement with the original tool: {}", predicted.agreement(&imported)?)?;
        }
    }
    imported.model.write(&out)?;
    say!("wrote {} ({} bytes)", out.display(), std::fs::metadata(&out)?.len())
}

fn shape(text: &str) -> Result<Shape, String> {
    let dims: Result<Vec<u32>, _> = text.split('x').map(str::parse).collect();
    let dims = dims.map_err(|_| "expected numbers with an x between them: 28x28".to_owned())?;
    Shape::new(&dims).map_err(|error| error.to_string())
}
