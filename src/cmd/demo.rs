//! `afterimage demo`: the gain of a memo in front of a slow classifier, and in front of a fast one.
//!
//! Cache service, classifier and memo each have a socket and a thread, like three processes. The
//! digits come through a client's connection. Every hot answer is compared with the cold one.

mod proxy;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_bench::report::Summary;
use afterimage_bench::workload::{Access, Answers, Population};
use afterimage_bench::{Outcome, Plan, Report, Target};
use afterimage_cache::Capacity;
use afterimage_classifier::{DataError, Model, service};
use afterimage_core::{Failure, Origin, RowAnswer};
use afterimage_memo::{MemoOptions, Secret};
use afterimage_wire::Status;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Op, Service};
use anyhow::{Context, bail, ensure};
use tokio::sync::oneshot;

use super::bench;
use crate::args::Time;
use crate::config::{
    ClassifierConfig, Config, EngineConfig, ListenerConfig, MemoConfig, ModelConfig, PeerConfig,
    RemoteConfig, ReplicasConfig, StoreConfig, StoreServer, TableConfig,
};
use crate::format::{grouped, long_time, nanos};
use crate::print::say;
use crate::process::Process;
use crate::serving;

/// Fewer digits give no usable 99th percentile.
const MIN_IMAGES: usize = 50;

/// Digits for the built-in classifier without delay, which answers them in a fraction of a second.
const FAST_IMAGES: usize = 2_000;

/// Requests in flight when throughput is measured.
const DEPTH: usize = 256;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage demo
  afterimage demo --proxy
  afterimage demo --classifier-time 100ms --images 50")]
pub(crate) struct Args {
    /// Show a proxy in front of a model server of the Open Inference Protocol instead.
    #[arg(long)]
    proxy: bool,

    /// Time that the model server of --proxy takes for a row.
    #[arg(long, value_name = "TIME", default_value = "5ms")]
    row_time: Time,

    /// Time that the demo's classifier takes for an image.
    #[arg(long, value_name = "TIME", default_value = "20ms")]
    classifier_time: Time,

    /// Number of distinct digits, at least 50. Each is classified once, one after the other.
    #[arg(long, value_name = "N", default_value_t = 200)]
    images: usize,

    /// Take the digits from the MNIST test files in this folder instead of drawing them.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// Random seed of the drawn digits.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// Model file, or a built-in model: shipped or raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.proxy {
        return serving::runtime(1)?.block_on(proxy::run(args.row_time.0));
    }
    ensure!(
        args.images >= MIN_IMAGES,
        "--images is {}; it must be at least {MIN_IMAGES}",
        args.images
    );
    let population = match &args.data {
        None => Population::drawn(args.seed, args.images),
        Some(directory) => bench::mnist(directory, args.images)?,
    };
    let count = population.len();
    ensure!(count >= MIN_IMAGES, "{count} distinct digits are too few; {MIN_IMAGES} are needed");
    let source = if args.data.is_some() { "MNIST test digits" } else { "drawn digits" };
    let model = crate::config::model(&args.model)?;
    let time = args.classifier_time.0;
    say!("A memo in front of a classifier that takes {} an image.", nanos(time.as_nanos() as u64))?;
    let services = Services::start(&args.model, &model, time)?;
    say!("client → memo {} → cache {}", services.memo.addr, services.cache.addr)?;
    say!("                              → classifier {}\n", services.classifier.addr)?;
    let result = show_slow(&services, Arc::new(population), source);
    services.stop();
    result?;

    let services = Services::start(&args.model, &model, Duration::ZERO)?;
    let digits = Arc::new(Population::drawn(args.seed, FAST_IMAGES));
    let result = show_fast(&services, &digits);
    services.stop();
    result
}

/// Classifies every digit once, then again, then many at once, and prints what the memo gains.
fn show_slow(services: &Services, digits: Arc<Population>, source: &str) -> anyhow::Result<()> {
    let count = digits.len();
    let (mut plan, answers) = plan(services, &digits);
    let cold = measure(&plan, "cold")?;
    let hot = measure(&plan, "hot")?;
    plan.access = Access::Uniform;
    plan.depth = DEPTH;
    plan.warmup = afterimage_bench::Span::Time(Duration::from_millis(200));
    plan.stop = afterimage_bench::Span::Time(Duration::from_secs(2));
    let deep = measure(&plan, "hot, many at once")?;
    let stats = services.memo_stats()?;

    let (first, second) = (&cold.latency_from_sent, &hot.latency_from_sent);
    say!("{count} {source}, one at a time      p50         p99")?;
    say_latency("first time", first)?;
    say_latency("second time", second)?;
    let (p50, p99) = (speed_up(first.p50_ns, second.p50_ns), speed_up(first.p99_ns, second.p99_ns));
    say!("  {:<22}{p50:>12}{p99:>12}\n", "speed-up")?;
    say!("{DEPTH} in flight: {} answers/s from memory", grouped(deep.throughput_per_s as u64))?;
    let saved = |name| long_time(Duration::from_micros(stats.counter_value(name)));
    say!("waiting time saved: {}", saved("saved_time_us"))?;
    say!("classifier time saved: {}", saved("saved_classifier_time_us"))?;
    say!("second answers equal to the first: {count} of {count}")?;
    if let Some(labels) = digits.labels() {
        let is_wrong = |&i: &usize| answers.expected(i) != labels.get(i).copied();
        let wrong = (0..count).filter(is_wrong).count();
        say!("classification errors: {wrong} of {count}")?;
    }

    expect(&cold, Outcome::Miss, count as u64)?;
    expect(&hot, Outcome::Hit, count as u64)?;
    expect(&deep, Outcome::Hit, deep.answered)?;
    let counter = |name| stats.counter_value(name);
    if counter("misses") != count as u64 || counter("rejected_tags") != 0 {
        bail!("the memo counts {} misses for {count} digits", counter("misses"));
    }
    Ok(())
}

/// The same with the built-in classifier without delay, in one line.
fn show_fast(services: &Services, digits: &Arc<Population>) -> anyhow::Result<()> {
    let (plan, _) = plan(services, digits);
    let cold = measure(&plan, "cold, fast classifier")?.latency_from_sent.p50_ns;
    let hot = measure(&plan, "hot, fast classifier")?.latency_from_sent.p50_ns;
    say!(
        "\nThe built-in classifier without delay: first {}, second {} ({}).",
        nanos(cold),
        nanos(hot),
        speed_up(cold, hot)
    )?;
    say!("In front of a model as fast as this one, a memo gains little.")
}

/// A plan that asks about each digit once. A second run with it fails on an answer that differs
/// from the first.
fn plan(services: &Services, digits: &Arc<Population>) -> (Plan, Arc<Answers>) {
    let answers = Arc::new(Answers::first_come(digits.len()));
    let mut plan = Plan::classify(services.memo.addr, Arc::clone(digits));
    plan.target =
        Target::Classify { population: Arc::clone(digits), answers: Arc::clone(&answers) };
    plan.access = Access::EachOnce;
    plan.stop = afterimage_bench::Span::Requests(digits.len() as u64);
    (plan, answers)
}

fn speed_up(before_ns: u64, after_ns: u64) -> String {
    let ratio = before_ns as f64 / after_ns.max(1) as f64;
    if ratio < 10.0 { format!("{ratio:.1} ×") } else { format!("{} ×", grouped(ratio as u64)) }
}

fn measure(plan: &Plan, name: &str) -> anyhow::Result<Report> {
    let report =
        bench::measure(plan, &format!("{name}: ")).with_context(|| format!("the {name} run"))?;
    match &report.problems()[..] {
        [] => Ok(report),
        problems => bail!("the {name} run: {}", problems.join("; ")),
    }
}

/// Fails unless `count` answers have this origin.
fn expect(report: &Report, outcome: Outcome, count: u64) -> anyhow::Result<()> {
    let found = report.outcomes.get(&outcome).map_or(0, |outcome| outcome.from_sent.count);
    ensure!(found == count, "{found} of {count} answers were a {}", outcome.name());
    Ok(())
}

fn say_latency(name: &str, latency: &Summary) -> anyhow::Result<()> {
    say!("  {name:<22}{:>12}{:>12}", nanos(latency.p50_ns), nanos(latency.p99_ns))
}

/// A classifier that takes a given time for each image, and any number of images at once.
struct SlowClassifier {
    model: Arc<Model>,
    time: Duration,
}

impl Service for SlowClassifier {
    fn identity(&self) -> Identity {
        service::identity(&self.model)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            let Op::Classify { image } = batch.requests()[i].op else {
                batch.error(i, Status::Unsupported, "this classifier takes images only");
                continue;
            };
            let (image, model, time) = (image.to_vec(), Arc::clone(&self.model), self.time);
            let reply = batch.row_reply(i);
            tokio::spawn(async move {
                tokio::time::sleep(time).await;
                let label = model.classify(&image);
                let answer = label.map(|label| RowAnswer::label(label, Origin::Miss));
                let failure =
                    |error: DataError| Failure::new(Status::BadArgument, error.to_string());
                reply.send(answer.map_err(failure));
            });
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// The three services, each on a socket and a thread of its own.
struct Services {
    memo: Running,
    cache: Running,
    classifier: Running,
}

impl Services {
    /// Starts them; `name` is that of `model`. `time` is the classifier's time per image, zero for
    /// the built-in classifier as it is.
    fn start(name: &Path, model: &Arc<Model>, time: Duration) -> anyhow::Result<Self> {
        let cache = Running::start("cache", |listener| {
            let table =
                TableConfig { capacity: Capacity::Bytes(64 << 20), ..TableConfig::default() };
            Ok(Config { cache: vec![listener], table, ..Config::default() })
        })?;
        let slow = (!time.is_zero()).then(|| SlowClassifier { model: Arc::clone(model), time });
        let engine = EngineConfig { model: name.to_owned(), ..EngineConfig::default() };
        let classifier = Running::start("classifier", move |listener| {
            Ok(match slow {
                Some(slow) => {
                    Config { others: vec![(Box::new(slow), vec![listener])], ..Config::default() }
                }
                None => Config { classifier: vec![listener], engine, ..Config::default() },
            })
        })?;
        let server = StoreServer::Cache(cache.addr.to_string(), PeerConfig::default());
        let mut replicas = ReplicasConfig::new(vec![classifier.addr.to_string()]);
        replicas.options.timeout = Duration::from_secs(5) + 2 * time;
        let memo = Running::start("memo", move |listener| {
            let secret =
                Secret::random().context("cannot get random numbers from the operating system")?;
            // A busy machine must not turn hits into misses.
            let lookup_budget = Duration::from_secs(1);
            let memo = MemoConfig {
                listeners: vec![listener],
                options: MemoOptions::new(secret),
                store: StoreConfig::Remote(RemoteConfig { server, lookup_budget }),
                models: vec![ModelConfig::new("", ClassifierConfig::Remote(replicas))],
            };
            Ok(Config { memo: Some(memo), ..Config::default() })
        })?;
        let services = Services { memo, cache, classifier };
        services.wait_until_connected()?;
        Ok(services)
    }

    /// Waits until the memo's upstreams, which connect in the background, are connected.
    fn wait_until_connected(&self) -> anyhow::Result<()> {
        for _ in 0..1000 {
            let stats = self.memo_stats()?;
            let connected = ["store_connected", "classifier_connected"].iter().all(|name| {
                use afterimage_wire::proto::stats::Value;
                matches!(stats.get(name), Some(Value::Text(text)) if text == "yes")
            });
            if connected {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("the memo cannot connect to its cache and classifier")
    }

    fn memo_stats(&self) -> anyhow::Result<Stats> {
        Ok(afterimage_wire::blocking::Admin::connect(self.memo.addr, Default::default())?
            .stats()?)
    }

    fn stop(self) {
        for running in [self.memo, self.classifier, self.cache] {
            running.stop();
        }
    }
}

/// A process of one service on a thread of its own, with a free port of this machine.
struct Running {
    addr: SocketAddr,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Running {
    fn start(
        name: &str,
        config: impl FnOnce(ListenerConfig) -> anyhow::Result<Config> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (started, addr) = mpsc::channel();
        let serve = move || {
            let runtime = match serving::runtime(1) {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(error))),
            };
            runtime.block_on(async {
                let process = async {
                    let listener = ListenerConfig::new((Ipv4Addr::LOCALHOST, 0).into());
                    let process = Process::start(config(listener)?).await?;
                    let &(_, addr) = process.addresses().first().context("there is no listener")?;
                    anyhow::Ok((process, addr))
                };
                match process.await {
                    Err(error) => drop(started.send(Err(error))),
                    Ok((process, addr)) => {
                        let _ = started.send(Ok(addr));
                        drop(stopped.await);
                        // The demo keeps no snapshot, which alone can fail.
                        let _ = process.drain(Duration::MAX).await;
                    }
                }
            });
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(serve)?;
        let addr = addr.recv().context("the service's thread ended")??;
        Ok(Running { addr, stop, thread })
    }

    fn stop(self) {
        drop(self.stop);
        let _ = self.thread.join();
    }
}
