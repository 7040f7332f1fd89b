//! Time from an image's bytes to its label: `classifier-speed DATA_DIR [MODEL_FILE] [--json]`.
//!
//! Images are timed alone and in batches, with every instruction set, on one thread and on two, and
//! through the engine. The least possible time of the arithmetic is measured, too. A figure is the
//! fastest of many rounds, in CPU time of one core, because on a shared machine slower rounds
//! measure other load. Programs to compare run in turn. `bench/scripts/run.sh classifier` runs this
//! program and keeps the record.

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use afterimage_classifier::{Engine, EngineOptions, FeatureMap, Isa, Job, Model, Scratch};
use afterimage_classifier_tools::{Dataset, classify_all};
use ndarray::{Array2, ArrayView2};
use rayon::ThreadPool;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Map, Value, json};

/// Time limit for each figure.
const PATIENCE: Duration = Duration::from_millis(700);
/// Time limit for a group of figures that are compared.
const LONG_PATIENCE: Duration = Duration::from_secs(4);
const BATCHES: [usize; 4] = [1, 8, 64, 256];
const IMAGES: usize = 512;
/// Images of a round on several threads: some milliseconds of work, so that some rounds run
/// undisturbed.
const MANY: usize = 1024;
/// Rows and columns of the matrices whose product is timed: large compared with a cache line, small
/// compared with the caches.
const MATRIX: usize = 768;
/// Multiply-adds of the shipped model for an image without blank patches.
const CONV_MULTIPLY_ADDS: f64 = 750_000.0;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let (flags, arguments): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|argument| argument.starts_with("--"));
    let (data, model) = match arguments.as_slice() {
        [data] => (data, Model::shipped()),
        [data, model] => (data, Arc::new(Model::read(Path::new(model))?)),
        _ => return Err("usage: classifier-speed DATA_DIR [MODEL_FILE] [--json]".into()),
    };
    // Training images are enough, because no accuracy is measured.
    let data = Dataset::read(Path::new(data), "train")?;
    let images: Vec<&[u8]> = data.images().take(IMAGES).collect();
    let many = data.split_at(MANY).0;
    let mut figures = Map::new();
    figures.insert("features".into(), model.description().into());
    figures.insert("model".into(), model.digest().to_string().into());
    floor(&model, &mut figures);
    one_core(&model, &images, &mut figures)?;
    two_cores(&model, &many, &mut figures)?;
    through_the_engine(&model, &images, &mut figures)?;
    match flags.iter().any(|flag| flag == "--json") {
        true => println!("{:#}", Value::Object(figures)),
        false => figures.iter().for_each(|(name, value)| print(name, value)),
    }
    Ok(())
}

fn print(name: &str, value: &Value) {
    match value {
        Value::Object(values) => {
            for (under, value) in values {
                print(&format!("{name}, {under}"), value);
            }
        }
        Value::Number(number) => println!("{name:<55} {:10.2}", number.as_f64().unwrap_or(0.0)),
        Value::String(text) => println!("{name:<55} {text}"),
        other => println!("{name:<55} {other}"),
    }
}

/// The least possible time of the model's multiply-adds on this core.
fn floor(model: &Model, figures: &mut Map<String, Value>) {
    let work = match (model.features().map(FeatureMap::name), model.svm()) {
        (Some("conv"), _) => CONV_MULTIPLY_ADDS,
        (_, Some(svm)) => svm.weights().len() as f64,
        // The number of multiply-adds of an imported model is not known.
        _ => return,
    };
    figures.insert("million multiply-adds per image".into(), json!(work / 1e6));
    let (a, b) = (Array2::<f32>::ones([MATRIX; 2]), Array2::<f32>::ones([MATRIX; 2]));
    let seconds = fastest(PATIENCE, || drop(black_box(a.dot(&b))));
    let product = (MATRIX as f64).powi(3) / seconds;
    figures.insert(
        "ndarray's matrix product".into(),
        json!({ "billion multiply-adds a second": product / 1e9, "floor, µs": work / product * 1e6 }),
    );
    for isa in Isa::available() {
        let rounds = 20_000;
        let count = black_box(isa.multiply_adds(1)) as f64 * rounds as f64;
        let seconds = fastest(PATIENCE, || {
            black_box(isa.multiply_adds(rounds));
        });
        let (peak, least) = (count / seconds / 1e9, work / count * seconds * 1e6);
        figures.insert(
            format!("multiply-adds in registers, {}", isa.name()),
            json!({ "billion a second": peak, "floor, µs": least }),
        );
    }
}

fn one_core(model: &Model, images: &[&[u8]], figures: &mut Map<String, Value>) -> Result<()> {
    let expected = model.scores_with(Isa::available()[0], images)?;
    for isa in Isa::available() {
        // Every measurement checks its answers.
        assert_eq!(model.scores_with(isa, images)?, expected);
        let mut times = Map::new();
        for batch in BATCHES {
            let some = &images[..if isa.name() == "portable" { 256 } else { images.len() }];
            let seconds = fastest(PATIENCE, || {
                for images in some.chunks(batch) {
                    black_box(model.scores_with(isa, images).expect("right size"));
                }
            });
            let each = seconds / some.len() as f64 * 1e6;
            times.insert(format!("batches of {batch}"), each.into());
        }
        figures.insert(format!("µs per image, {}", isa.name()), times.into());
    }
    let (mut label, mut scratch) = ([0], Scratch::default());
    let alone = fastest(PATIENCE, || {
        for image in images {
            model.classify_batch(&[image], &mut scratch, &mut label).expect("right size");
        }
    });
    figures
        .insert("µs alone, nothing allocated".into(), (alone / images.len() as f64 * 1e6).into());
    Ok(())
}

/// The speed-up of two threads over one: for the model, and for plain multiply-adds, which shows
/// the limit of the machine.
fn two_cores(model: &Model, many: &Dataset, figures: &mut Map<String, Value>) -> Result<()> {
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pools = [pool(1)?, pool(2)?];
    let matrix: ArrayView2<'_, u8> = many.matrix();
    let expected = pools[0].install(|| classify_all(model, matrix))?;
    let isa = Isa::best();
    let mut rounds: Vec<[f64; 6]> = Vec::new();
    let began = Instant::now();
    while began.elapsed() < LONG_PATIENCE {
        let classify = |pool: &ThreadPool| {
            let (started, before) = (Instant::now(), spent(ClockId::ProcessCPUTime));
            let labels = pool.install(|| classify_all(model, matrix)).expect("right size");
            let work = spent(ClockId::ProcessCPUTime) - before;
            let seconds = started.elapsed().as_secs_f64();
            assert_eq!(labels, expected);
            [seconds, work.as_secs_f64()]
        };
        let multiply = |pool: &ThreadPool| {
            let started = Instant::now();
            pool.broadcast(|_| black_box(isa.multiply_adds(200_000)));
            started.elapsed().as_secs_f64() / pool.current_num_threads() as f64
        };
        let [one, two] = &pools;
        let ([a, b], [c, d]) = (classify(one), classify(two));
        rounds.push([a, c, multiply(one), multiply(two), b, d]);
    }
    let least = |i: usize| rounds.iter().map(|round| round[i]).fold(f64::INFINITY, f64::min);
    let mut ratios: Vec<f64> = rounds.iter().map(|round| round[0] / round[1]).collect();
    ratios.sort_by(f64::total_cmp);
    let count = many.len() as f64;
    figures.insert(
        "two threads".into(),
        json!({
            "µs per image on one": least(0) / count * 1e6,
            "µs per image on two": least(1) / count * 1e6,
            "times as fast": least(0) / least(1),
            "times as fast, median of the rounds": ratios[ratios.len() / 2],
            "multiply-adds in registers, times as fast": least(2) / least(3),
            "CPU time per image on one, µs": least(4) / count * 1e6,
            "CPU time per image on two, µs": least(5) / count * 1e6,
            "rounds": rounds.len(),
        }),
    );
    Ok(())
}

/// The time of single requests from submission to reply, which includes two changes of threads, and
/// the throughput of many, on one compute thread and on two.
fn through_the_engine(
    model: &Arc<Model>,
    images: &[&[u8]],
    figures: &mut Map<String, Value>,
) -> Result<()> {
    let engine = |threads| {
        let options = EngineOptions { threads, ..EngineOptions::default() };
        Engine::start(Arc::clone(model), options)
    };
    let engines = [engine(1), engine(2)];
    let mut times = Vec::new();
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        for image in images {
            let (sender, answers) = channel();
            let job = Job::new(*image, move |label| drop(sender.send(label)));
            let started = Instant::now();
            engines[0].submit(job)?;
            answers.recv()??;
            times.push(started.elapsed().as_secs_f64() * 1e6);
        }
    }
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[(share * (times.len() - 1) as f64) as usize];
    let flood = |engine: &Engine| {
        // Only the last reply wakes this thread. Otherwise it would take CPU time from the compute
        // threads.
        let (last, all_answered) = channel();
        let waiting = Arc::new(AtomicUsize::new(MANY));
        let job = |image: &&[u8]| {
            let (last, waiting) = (last.clone(), Arc::clone(&waiting));
            Job::new(*image, move |label| {
                assert!(label.is_ok());
                if waiting.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let _ = last.send(());
                }
            })
        };
        let jobs: Vec<Job> = images.iter().cycle().take(MANY).map(job).collect();
        let started = Instant::now();
        assert_eq!(engine.submit_many(jobs), 0, "the queue has room for all");
        all_answered.recv().expect("one reply each");
        started.elapsed().as_secs_f64() / MANY as f64
    };
    let mut least = [f64::INFINITY; 2];
    let began = Instant::now();
    while began.elapsed() < LONG_PATIENCE {
        for (least, engine) in least.iter_mut().zip(&engines) {
            *least = least.min(flood(engine));
        }
    }
    figures.insert(
        "engine".into(),
        json!({
            "one at a time, median, µs": at(0.5),
            "one at a time, 99 %, µs": at(0.99),
            "µs per image, one thread": least[0] * 1e6,
            "µs per image, two threads": least[1] * 1e6,
            "two threads, times as fast": least[0] / least[1],
        }),
    );
    Ok(())
}

/// CPU time of the fastest round, in seconds.
fn fastest(patience: Duration, mut round: impl FnMut()) -> f64 {
    let began = Instant::now();
    let mut fastest = Duration::MAX;
    while began.elapsed() < patience {
        let started = spent(ClockId::ThreadCPUTime);
        round();
        fastest = fastest.min(spent(ClockId::ThreadCPUTime) - started);
    }
    fastest.as_secs_f64()
}

/// CPU time of this thread or process.
fn spent(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}
