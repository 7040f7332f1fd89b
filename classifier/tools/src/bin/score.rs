//! Measurement of one model, as JSON: the time of an image alone and in batches, and the labels.
//! `bench/scripts/run.sh classifier` compares them with other programs.
//!
//! Usage: `classifier-score DATA_DIR MODEL SECONDS`; the model is `shipped`, `raw` or a file.
//!
//! Times are CPU time, because other load on the machine changes it less than wall time. The images
//! are the first 10,000 training images, so the labels do not measure accuracy.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_classifier::{Model, Scratch};
use afterimage_classifier_tools::Dataset;
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

const IMAGES: usize = 10_000;
/// Images of a timed pass, as for the other programs.
const PASS: usize = 200;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [data, model, seconds] = arguments.as_slice() else {
        return Err("usage: classifier-score DATA_DIR MODEL SECONDS".into());
    };
    let model = match model.as_str() {
        "shipped" => Model::shipped(),
        "raw" => Model::raw(),
        file => Arc::new(Model::read(Path::new(file))?),
    };
    let patience = Duration::from_secs_f64(seconds.parse()?);
    let data = Dataset::read(Path::new(data), "train")?;
    let images: Vec<&[u8]> = data.images().take(IMAGES).collect();
    let mut labels = vec![0; images.len()];
    let mut scratch = Scratch::default();
    let mut time = |batch: usize| {
        let pass = batch.max(PASS) / batch * batch;
        let began = Instant::now();
        let mut least = Duration::MAX;
        for images in images.chunks_exact(pass.min(images.len())).cycle() {
            let started = spent();
            for images in images.chunks(batch) {
                let labels = &mut labels[..images.len()];
                model.classify_batch(images, &mut scratch, labels).expect("MNIST's own shape");
            }
            least = least.min(spent() - started);
            if began.elapsed() > patience {
                break;
            }
        }
        least.as_secs_f64() * 1e6 / pass as f64
    };
    let times = [1, 64, 256, IMAGES].map(|batch| (batch.to_string(), json!(time(batch))));
    model.classify_batch(&images, &mut scratch, &mut labels)?;
    let times: serde_json::Map<_, _> = times.into_iter().collect();
    println!("{}", json!({ "us": times, "labels": labels }));
    Ok(())
}

/// CPU time of this thread.
fn spent() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
