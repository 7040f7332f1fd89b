//! `afterimage bench`: put load on a running service and measure it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::workload::{Access, Keys, Population};
use afterimage_bench::{Arrivals, Dialect, Mode, Plan, Progress, Report, Span};
use afterimage_classifier::Dataset;
use anyhow::{Context, bail};
use clap::ValueEnum;

use crate::args::{ClientArgs, Time};
use crate::progress::Bar;
use crate::serving;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service to put load on: host:port. A cache may also be redis://host:port,
    /// memcached://host:port (its text protocol) or memcached+meta://host:port.
    #[arg(value_name = "ADDR", default_value = "127.0.0.1:7400")]
    server: String,

    /// What to ask for; of Redis and memcached always keys.
    #[arg(long, value_enum, default_value_t = Target::Classify)]
    target: Target,

    /// Connections in all.
    #[arg(long, value_name = "N", default_value_t = 1)]
    connections: usize,

    /// Load threads.
    #[arg(long, value_name = "N", default_value_t = 1)]
    load_threads: usize,

    /// Requests in flight on each connection; several depths, with commas, are measured in turn.
    #[arg(long, value_name = "N", default_value = "1", value_delimiter = ',')]
    depth: Vec<usize>,

    /// Keys that one command asks for, of Redis (MGET) and of memcached (get).
    #[arg(long, value_name = "N", default_value_t = 1)]
    batch: usize,

    /// Requests a second, whether or not earlier ones are answered (an open loop). Without it the
    /// next request follows when an answer is there.
    #[arg(long, value_name = "N")]
    rate: Option<f64>,

    /// Requests of an open loop come at random moments instead of evenly spaced ones.
    #[arg(long)]
    poisson: bool,

    /// How long to measure.
    #[arg(long, value_name = "TIME", default_value = "10s", conflicts_with = "count")]
    duration: Time,

    /// How many requests to measure, instead of how long.
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// How long to run before measuring.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    warmup: Time,

    /// Ask about each image, or write each key, once before.
    #[arg(long)]
    prefill: bool,

    /// Images or keys to choose from.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    population: u32,

    /// Take the images from the MNIST test files in this folder instead of drawing them.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Choose by Zipf's law with this exponent; 0 chooses each alike.
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    zipf: f64,

    /// The share of requests to a cache that read.
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    read_share: f64,

    /// CPUs to tie the load threads to, in turn.
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pin: Vec<usize>,

    /// What all random numbers come from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Print the reports as JSON, one after another.
    #[arg(long)]
    json: bool,

    /// Also write a record into this folder: the reports, the command, the commit, the machine.
    #[arg(long, value_name = "DIR")]
    record: Option<PathBuf>,

    /// What the record is about, in a word; part of its file's name.
    #[arg(long, value_name = "NAME", default_value = "run")]
    record_name: String,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Images, of a memo or a classifier.
    Classify,
    /// Keys, of a cache.
    Cache,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let machine = Machine::here();
    let (mut plan, mut runs, mut problems) = (plan(&args)?, Vec::new(), Vec::new());
    for (i, &depth) in args.depth.iter().enumerate() {
        plan.depth = depth;
        // What the first run has written or made remembered is there for the others.
        plan.prefill = args.prefill && i == 0;
        let report = measure(&plan)?;
        if args.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            println!("{report}");
        }
        problems.extend(report.problems());
        runs.push(Run { name: format!("depth {depth}"), report });
    }
    if let Some(folder) = &args.record {
        let record = Record::new(&args.record_name, Path::new("."), machine, runs);
        let path = record.write(folder).with_context(|| format!("in {}", folder.display()))?;
        println!("recorded in {}", path.display());
    }
    match &problems[..] {
        [] => Ok(()),
        problems => bail!("{}", problems.join("; ")),
    }
}

/// Runs a plan under a progress bar.
pub(crate) fn measure(plan: &Plan) -> anyhow::Result<Report> {
    let bar = Bar::new(0);
    let report = afterimage_bench::run(plan, &mut |progress: Progress| {
        let (done, steps) = match plan.stop {
            Span::Requests(count) => (progress.answered, count),
            Span::Time(time) => (progress.elapsed.as_secs(), time.as_secs()),
        };
        bar.set(&format!("{:.0} answers/s", progress.rate), done.min(steps), steps);
    });
    Ok(report?)
}

fn plan(args: &Args) -> anyhow::Result<Plan> {
    let Some((dialect, place)) = Dialect::split(&args.server) else {
        let known = Dialect::ALL.map(Dialect::scheme).join("://, ");
        bail!("{} is none of {known}:// or host:port", args.server);
    };
    let addr = serving::resolve(place)?;
    let mut plan = match args.target {
        Target::Classify if dialect == Dialect::Wire => {
            Plan::classify(addr, Arc::new(population(args)?))
        }
        _ => {
            let (count, read_share) = (args.population, args.read_share);
            Plan::cache(addr, Keys { count, read_share, salt: args.seed })
        }
    };
    (plan.dialect, plan.batch) = (dialect, args.batch);
    plan.token = args.client.token()?;
    plan.timeout = args.client.timeout();
    plan.connections = args.connections;
    plan.threads = args.load_threads;
    plan.access = match args.zipf {
        0.0 => Access::Uniform,
        exponent => Access::Zipf { exponent },
    };
    // Not by clap's `requires`, which does not see what the settings file says.
    if args.poisson && args.rate.is_none() {
        bail!("--poisson needs --rate: how many requests a second?");
    }
    if let Some(rate) = args.rate {
        let arrivals = if args.poisson { Arrivals::Poisson } else { Arrivals::Constant };
        plan.mode = Mode::Open { rate, arrivals };
    }
    plan.stop = args.count.map_or(Span::Time(args.duration.0), Span::Requests);
    plan.warmup = Span::Time(args.warmup.0);
    plan.pin = args.pin.clone();
    plan.seed = args.seed;
    Ok(plan)
}

fn population(args: &Args) -> anyhow::Result<Population> {
    let count = args.population as usize;
    match &args.data {
        None => Ok(Population::drawn(args.seed, count)),
        Some(directory) => mnist(directory, count),
    }
}

/// The first `count` images of the MNIST test set that differ from those before them.
pub(crate) fn mnist(directory: &Path, count: usize) -> anyhow::Result<Population> {
    let test = Dataset::read(directory, "t10k")?;
    let (mut seen, mut bytes, mut labels) = (HashSet::new(), Vec::new(), Vec::new());
    for (image, &label) in test.images().zip(test.labels()) {
        if labels.len() < count && seen.insert(image) {
            bytes.extend_from_slice(image);
            labels.push(label);
        }
    }
    Population::new(bytes, test.shape().len(), Some(labels))
        .with_context(|| format!("the test images in {}", directory.display()))
}
