//! `afterimage import`: a model of another tool in, a model file out.

use std::path::PathBuf;

use afterimage_classifier::{ImportOptions, Model, Shape};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model to write (safetensors).
    #[arg(long, value_name = "FILE", default_value = "model.safetensors")]
    out: PathBuf,

    /// The images that the model looks at, outermost dimension first.
    #[arg(long, value_name = "DIMS", default_value = "28x28", value_parser = shape)]
    shape: Shape,

    /// What bytes were divided by to make the model's inputs: 255 where they went from 0 to 1.
    #[arg(long, value_name = "N", default_value_t = 255.0)]
    divisor: f32,

    /// A linear model as LIBLINEAR writes it, or one of two classes as LIBSVM does.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let options = ImportOptions { shape: args.shape, divisor: args.divisor };
    let model = Model::import(&args.file, &options)?;
    model.write(&args.out)?;
    println!("a linear model of {} classes over {}", model.labels().len(), model.shape());
    println!("wrote {}, model {}", args.out.display(), model.digest());
    Ok(())
}

fn shape(text: &str) -> Result<Shape, String> {
    let dims: Result<Vec<u32>, _> = text.split('x').map(str::parse).collect();
    let dims = dims.map_err(|_| "expected numbers with an x between them: 28x28".to_owned())?;
    Shape::new(&dims).map_err(|error| error.to_string())
}
