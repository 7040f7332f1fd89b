//! Trains a model and writes its file: `train raw SEED DATA_DIR OUT_FILE [C]`. What `afterimage
//! train` does, without the bar.

use std::error::Error;

use afterimage_classifier::train::{self, TrainOptions};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [features, seed, data, out, rest @ ..] = arguments.as_slice() else {
        return Err("usage: train FEATURES SEED DATA_DIR OUT_FILE [C]".into());
    };
    let mut options = TrainOptions::new(features.parse()?, seed.parse()?);
    options.data = data.into();
    options.out = out.into();
    options.c = rest.first().map(|c| c.parse()).transpose()?;
    let report = |p: train::Progress| eprint!("\r\x1b[K{}: {} of {}", p.stage, p.done, p.total);
    let (model, evaluation) = train::run_to_file(&options, &report)?;
    let metadata = model.metadata();
    eprintln!();
    println!("{}\nC {:?}; {}", metadata.command, metadata.c, metadata.note);
    println!("digest {}\n{evaluation}", model.digest());
    Ok(())
}
