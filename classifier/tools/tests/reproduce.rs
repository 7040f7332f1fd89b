//! Byte-for-byte reproduction of the built-in models by the commands in their metadata.
//!
//! Needs the training set and minutes, so the tests are ignored by default. The test set is not
//! read: its recorded figure is copied.
//!
//! ```text
//! AFTERIMAGE_MNIST=data/mnist cargo test --release -p afterimage-classifier-tools \
//!     --test reproduce -- --ignored
//! ```

use std::path::Path;

use afterimage_classifier::Model;
use afterimage_classifier_tools::Dataset;
use afterimage_classifier_tools::train::{TrainOptions, run};

#[test]
#[ignore = "needs MNIST's training set in AFTERIMAGE_MNIST"]
fn the_raw_model_is_reproduced_on_one_and_three_threads() {
    reproduce(&Model::raw(), &[1, 3]);
}

#[test]
#[ignore = "needs MNIST's training set in AFTERIMAGE_MNIST, and minutes"]
fn the_shipped_model_is_what_its_command_makes() {
    reproduce(&Model::shipped(), &[2]);
}

fn reproduce(model: &Model, thread_counts: &[usize]) {
    let data = std::env::var("AFTERIMAGE_MNIST").expect("AFTERIMAGE_MNIST names a directory");
    let train = Dataset::read(Path::new(&data), "train").expect("it holds MNIST");
    let options = parse(&model.metadata().command);
    assert_eq!(options.command(), model.metadata().command);
    for &threads in thread_counts {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        let made = pool.install(|| run(&options, &train, &|_| {}).expect("it trains"));
        assert_eq!(made.digest(), model.digest(), "{threads} threads");
        let mut metadata = made.metadata().clone();
        metadata.test_errors = model.metadata().test_errors;
        assert!(made.with_metadata(metadata).to_bytes() == model.to_bytes());
    }
}

/// Reads a command as the command line would.
fn parse(command: &str) -> TrainOptions {
    let words: Vec<&str> = command.split(' ').collect();
    assert_eq!(words[..2], ["afterimage", "train"]);
    let value = |name: &str| {
        let at = words.iter().position(|word| *word == name).expect("every option is there");
        words[at + 1]
    };
    let features = value("--features").parse().expect("a feature map");
    TrainOptions::new(features, value("--seed").parse().expect("a number"))
}
