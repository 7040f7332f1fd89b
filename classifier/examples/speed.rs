//! Time from an image's bytes to its label: alone and in batches, with every instruction set, on one thread and on
//! two: `speed DATA_DIR [MODEL_FILE]`. Figures are the fastest of many rounds: on a shared machine the others
//! measure the neighbours.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_classifier::{Dataset, Engine, EngineOptions, Job, Level, Model, Scratch};

/// How long each figure may take.
const PATIENCE: Duration = Duration::from_millis(1500);
const IMAGES: usize = 128;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (data, model) = match arguments.as_slice() {
        [data] => (data, Model::shipped()),
        [data, model] => (data, Arc::new(Model::read(Path::new(model))?)),
        _ => return Err("usage: speed DATA_DIR [MODEL_FILE]".into()),
    };
    // The first training images: no figure about errors comes out of this, so no need for the test set.
    let data = Dataset::read(Path::new(data), "train")?;
    let images: Vec<&[u8]> = data.images().take(IMAGES).collect();
    println!("model {} ({})", model.features().name(), model.digest());
    let expected = model.scores_with(Level::available()[0], &images)?;

    for level in Level::available() {
        // Every measurement checks its answers.
        assert_eq!(model.scores_with(level, &images)?, expected);
        for batch in [1, 8, 64, 128] {
            let time = fastest(|| {
                for images in images.chunks(batch) {
                    std::hint::black_box(model.scores_with(level, images).expect("right size"));
                }
            });
            println!("{:>8}, batches of {batch:>3}: {time:5.1} µs per image", level.name());
        }
    }
    let mut labels = vec![0; IMAGES];
    let mut scratch = Scratch::default();
    let alone = fastest(|| {
        for (image, label) in images.iter().zip(&mut labels) {
            model
                .classify_batch(&[image], &mut scratch, std::slice::from_mut(label))
                .expect("right size");
        }
    });
    println!("alone, nothing allocated: {alone:.1} µs");
    let one = fastest(|| model.classify_batch(&images, &mut scratch, &mut labels).expect("size"));
    let two = fastest(|| {
        let (first, last) = images.split_at(IMAGES / 2);
        std::thread::scope(|scope| {
            for images in [first, last] {
                let model = &model;
                scope.spawn(move || {
                    let mut labels = vec![0; images.len()];
                    let mut scratch = Scratch::default();
                    model.classify_batch(images, &mut scratch, &mut labels).expect("size");
                });
            }
        });
    });
    println!("one thread {one:.1} µs, two threads {two:.1} µs per image: {:.2} times", one / two);
    through_the_engine(&model, &images)
}

/// One request at a time from submission to reply: the label's own time and two changes of threads.
fn through_the_engine(model: &Arc<Model>, images: &[&[u8]]) -> Result<(), Box<dyn Error>> {
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    let engine = Engine::start(Arc::clone(model), options);
    let (sender, answers) = std::sync::mpsc::channel();
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        for image in images {
            let sender = sender.clone();
            let job = Job::new(*image, move |label| {
                // The receiver outlives the engine.
                let _ = sender.send(label);
            });
            let started = Instant::now();
            engine.submit(job)?;
            answers.recv()??;
            times.push(started.elapsed());
        }
    }
    times.sort_unstable();
    let at = |share: f64| times[(share * (times.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
    let (median, high) = (at(0.5), at(0.99));
    println!("engine, one at a time: least {:.1}, median {median:.1}, 99 % {high:.1} µs", at(0.0));
    Ok(())
}

/// Microseconds per image in the fastest round.
fn fastest(mut round: impl FnMut()) -> f64 {
    let began = Instant::now();
    let mut fastest = Duration::MAX;
    while began.elapsed() < PATIENCE {
        let started = Instant::now();
        round();
        fastest = fastest.min(started.elapsed());
    }
    fastest.as_secs_f64() * 1e6 / IMAGES as f64
}
