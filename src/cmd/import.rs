//! `afterimage import`: a model of another tool in, a model file out.

use std::path::PathBuf;

use afterimage_classifier::{ImportOptions, Model, Sample, Scale, Shape};
use anyhow::Context;

use crate::print::{self, say};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model to write (safetensors).
    #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,

    /// The images that the model looks at, outermost dimension first [default: 28x28, or what an
    /// ONNX model declares].
    #[arg(long, value_name = "DIMS", value_parser = shape)]
    shape: Option<Shape>,

    /// What bytes were divided by to make the model's inputs: 255 where they went from 0 to 1
    /// [default: what support vectors or a scaler show, else 255, and then it is said so].
    #[arg(long, value_name = "N")]
    divisor: Option<f64>,

    /// The range file that `svm-scale -s` wrote, of a model that was trained on what it scaled
    /// (LIBSVM, LIBLINEAR). A sample in text is then the scaled one.
    #[arg(long, value_name = "FILE")]
    scale: Option<PathBuf>,

    /// Labels to answer with, in the order of the model's own, where those are not numbers from 0
    /// to 65535.
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    labels: Option<Vec<u16>>,

    /// Images to try the model on: a text file as `svm-predict` takes it, or a folder with the
    /// MNIST test files.
    #[arg(long, value_name = "PATH")]
    sample: Option<PathBuf>,

    /// What the original tool predicts of the sample: its output file, a label on a line.
    #[arg(long, value_name = "FILE", requires = "sample")]
    predictions: Option<PathBuf>,

    /// A model of LIBSVM or LIBLINEAR, or an ONNX file with an SVM or a linear classifier.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let Args { out, shape, divisor, scale, labels, sample, predictions, file } = args;
    let scale = scale.as_deref().map(Scale::read).transpose()?;
    let imported = Model::import(&file, &ImportOptions { shape, divisor, labels, scale })?;
    say!("{imported}")?;
    for warning in &imported.warnings {
        print::note(format_args!("warning: {warning}"));
    }
    if let Some(path) = sample {
        let sample = Sample::read(&path, &imported)?;
        say!("answers that are the sample's labels: {}", sample.agreement(&imported)?)?;
        if let Some(path) = predictions {
            let predicted =
                sample.with_predictions(&path).with_context(|| path.display().to_string())?;
            say!("answers that are the predictions: {}", predicted.agreement(&imported)?)?;
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
