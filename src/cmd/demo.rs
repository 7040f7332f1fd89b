//! `afterimage demo`: the whole system on loopback TCP, cold then hot, with the figures.
//!
//! Cache, classifier and memo each listen on a socket and have a thread of their own, as three
//! processes would; the digits come through a client's connection. Every hot answer is held
//! against the cold one.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use afterimage_bench::report::Summary;
use afterimage_bench::workload::{Access, Answers, Population};
use afterimage_bench::{Outcome, Plan, Report, Span, Target};
use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_classifier::{ClassifierService, Engine, EngineOptions, Model};
use afterimage_memo::pool::Pool;
use afterimage_memo::store::{RemoteStore, StoreOptions};
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_wire::Client;
use afterimage_wire::client::Expect;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Server, ServerOptions, Service};
use anyhow::{Context, bail, ensure};
use tokio::sync::oneshot;

use super::bench;
use crate::cmd::memo::upstream_options;
use crate::print::say;
use crate::{args, serving};

/// Fewer digits say nothing about a tail.
const MIN_IMAGES: usize = 2_000;

/// Requests in flight when throughput is measured.
const DEPTH: usize = 256;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Distinct digits to ask about, at least 2000.
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    images: usize,

    /// Take the digits from the MNIST test files in this folder instead of drawing them.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,

    /// What the drawn digits come from.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// The model: a file, or one of those inside this program: shipped, raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.images >= MIN_IMAGES, "--images is {}; at least {MIN_IMAGES}", args.images);
    let population = match &args.data {
        None => Population::drawn(args.seed, args.images),
        Some(directory) => bench::mnist(directory, args.images)?,
    };
    ensure!(population.len() >= MIN_IMAGES, "only {} distinct digits", population.len());
    let source = if args.data.is_some() { "MNIST test digits" } else { "drawn digits" };
    let model = args::model(&args.model)?;
    say!("{} distinct {source}, model {}…", population.len(), &model.digest().to_string()[..16])?;

    let house = House::start(&model)?;
    say!("client → memo {} → cache {}", house.memo.addr, house.cache.addr)?;
    say!("                              → classifier {}\n", house.classifier.addr)?;
    let result = show(&house, Arc::new(population));
    house.stop();
    result
}

/// Asks about every digit cold, then hot, then hot and many at once, and prints what came of it.
fn show(house: &House, population: Arc<Population>) -> anyhow::Result<()> {
    let count = population.len() as u64;
    let answers = Arc::new(Answers::first_come(population.len()));
    let mut plan = Plan::classify(house.memo.addr, Arc::clone(&population));
    // The same answers for all three runs: a hot answer that is not the cold one fails its run.
    plan.target =
        Target::Classify { population: Arc::clone(&population), answers: answers.clone() };
    plan.access = Access::EachOnce;
    plan.stop = Span::Requests(count);
    let cold = measure(&plan, "cold")?;
    let hot = measure(&plan, "hot")?;
    plan.access = Access::Uniform;
    plan.depth = DEPTH;
    plan.warmup = Span::Time(Duration::from_millis(200));
    plan.stop = Span::Time(Duration::from_secs(2));
    let deep = measure(&plan, "hot, many at once")?;
    let stats = house.memo_stats()?;

    say!("one at a time        p50       p90       p99")?;
    say_latency("cold", &cold.latency_from_sent)?;
    say_latency("hot", &hot.latency_from_sent)?;
    let ratio = |of: fn(&Summary) -> u64| {
        of(&cold.latency_from_sent) as f64 / of(&hot.latency_from_sent).max(1) as f64
    };
    say!(
        "{:<14}{:>9.2}×{:>9.2}×{:>9.2}×\n",
        "speed-up",
        ratio(|s| s.p50_ns),
        ratio(|s| s.p90_ns),
        ratio(|s| s.p99_ns)
    )?;
    say!("{DEPTH} in flight, hot: {:.0} answers a second\n", deep.throughput_per_s)?;
    let counter = |name| stats.counter_value(name);
    say!("memo: {} hits, {} misses", counter("hits"), counter("misses"))?;
    say!("every hot answer equals the cold one: {count} of {count}")?;
    if let Some(labels) = population.labels() {
        let wrong = (0..population.len())
            .filter(|&i| answers.expected(i) != labels.get(i).copied())
            .count();
        let rate = wrong as f64 / labels.len() as f64 * 100.0;
        say!("classification errors: {wrong} of {} ({rate:.2} %)", labels.len())?;
    }

    expect(&cold, Outcome::Miss, count)?;
    expect(&hot, Outcome::Hit, count)?;
    expect(&deep, Outcome::Hit, deep.answered)?;
    if counter("misses") != count || counter("rejected_tags") != 0 {
        bail!("the memo counts {} misses for {count} digits", counter("misses"));
    }
    Ok(())
}

fn measure(plan: &Plan, name: &str) -> anyhow::Result<Report> {
    let report =
        bench::measure(plan, &format!("{name}: ")).with_context(|| format!("the {name} run"))?;
    match &report.problems()[..] {
        [] => Ok(report),
        problems => bail!("the {name} run: {}", problems.join("; ")),
    }
}

/// Fails unless `count` answers came about in this way.
fn expect(report: &Report, outcome: Outcome, count: u64) -> anyhow::Result<()> {
    let found = report.outcomes.get(&outcome).map_or(0, |outcome| outcome.from_sent.count);
    ensure!(found == count, "{found} of {count} answers were a {}", outcome.name());
    Ok(())
}

fn say_latency(name: &str, latency: &Summary) -> anyhow::Result<()> {
    let us = |ns: u64| ns as f64 / 1e3;
    let (p50, p90, p99) = (us(latency.p50_ns), us(latency.p90_ns), us(latency.p99_ns));
    say!("{name:<14}{p50:>7.1} µs{p90:>7.1} µs{p99:>7.1} µs")
}

/// The three services, each on a socket and a thread of its own.
struct House {
    memo: Running,
    cache: Running,
    classifier: Running,
}

impl House {
    fn start(model: &Arc<Model>) -> anyhow::Result<Self> {
        let cache = Running::start("cache", || {
            let table = Table::new(Capacity::Bytes(64 << 20))?;
            Ok(CacheService::new(Arc::new(table)))
        })?;
        let model = Arc::clone(model);
        let classifier = Running::start("classifier", move || {
            let engine = Engine::start(Arc::clone(&model), EngineOptions::default());
            Ok(ClassifierService::new(&model, Arc::new(engine)))
        })?;
        let (cache_addr, classifier_addr) = (cache.addr.to_string(), classifier.addr.to_string());
        let memo = Running::start("memo", move || {
            let client = Client::connect_lazy(cache_addr, upstream_options(Expect::Cache));
            // Nothing here is about a slow cache, and a busy laptop must not turn hits into misses.
            let lookup_budget = Duration::from_secs(1);
            let options = StoreOptions { lookup_budget, ..StoreOptions::default() };
            let store = Store::Remote(RemoteStore::new(client, options));
            let options = upstream_options(Expect::Classify);
            let client = Client::connect_lazy(classifier_addr, options);
            let classifier = Pool::new(client, Duration::from_secs(5));
            let secret = Secret::random().context("the operating system gives no randomness")?;
            Ok(MemoService::new(store, classifier, MemoOptions::new(secret)))
        })?;
        let house = House { memo, cache, classifier };
        house.wait_until_connected()?;
        Ok(house)
    }

    /// The memo's upstreams connect in the background; a demo waits for them.
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
        bail!("the memo does not reach its cache and classifier")
    }

    fn memo_stats(&self) -> anyhow::Result<Stats> {
        Ok(afterimage_wire::blocking::Client::connect(self.memo.addr, Default::default())?
            .stats()?)
    }

    fn stop(self) {
        for running in [self.memo, self.classifier, self.cache] {
            running.stop();
        }
    }
}

/// A service that listens on a free port of this machine.
struct Running {
    addr: SocketAddr,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Running {
    fn start<S: Service>(
        name: &str,
        build: impl FnOnce() -> anyhow::Result<S> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (started, addr) = mpsc::channel();
        let serve = move || {
            let runtime = match serving::runtime(1) {
                Ok(runtime) => runtime,
                Err(error) => return drop(started.send(Err(error))),
            };
            runtime.block_on(async {
                let bound = async {
                    let service = Arc::new(build()?);
                    let options = ServerOptions::default();
                    let server = Server::bind("127.0.0.1:0", service, options).await?;
                    let addr = server.local_addr()?;
                    anyhow::Ok((server, addr))
                };
                match bound.await {
                    Err(error) => drop(started.send(Err(error))),
                    Ok((server, addr)) => {
                        let _ = started.send(Ok(addr));
                        server.serve(async { drop(stopped.await) }).await;
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
