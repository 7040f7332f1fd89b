//! Whom to ask, and what: flags and a workload file become a plan.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_bench::workload::spec::{DEFAULT_POPULATION, Order, Spacing};
use afterimage_bench::workload::{Keys, Population, Spec};
use afterimage_bench::{Address, Dialect, Peer, Plan, redacted};
use afterimage_classifier::{Dataset, read_images};
use afterimage_wire::proto::Role;
use anyhow::{Context, anyhow, bail};
use clap::ValueEnum;

use crate::args::{ClientArgs, Time};
use crate::net;

/// The largest population of images. Each takes 784 bytes or more of memory.
const MAX_IMAGES: usize = 20_000_000;

/// The images that need no file.
const DRAWN: &str = "drawn";

/// Which service to put load on.
#[derive(Debug, clap::Args)]
pub(crate) struct TargetArgs {
    /// The service: host:port or tcp://host:port of a memo, a classifier or a cache, which say
    /// themselves what they are; redis://host:port; memcached://host:port (its text protocol),
    /// memcached+meta://host:port. [default: 127.0.0.1:7400]
    #[arg(value_name = "TARGET")]
    server: Option<String>,

    /// The same as a flag.
    #[arg(long, value_name = "URL", conflicts_with = "server")]
    target: Option<String>,
}

impl TargetArgs {
    pub(crate) fn address(&self) -> anyhow::Result<Address> {
        let text = self.server.as_deref().or(self.target.as_deref());
        address(text.unwrap_or("127.0.0.1:7400"))
    }
}

/// Reads a server's address. The error contains no password.
pub(super) fn address(text: &str) -> anyhow::Result<Address> {
    let address = Address::parse(text).map_err(|error| anyhow!("invalid address: {error}"))?;
    net::parse(&address.place)
        .map_err(|expected| anyhow!("invalid address {}: {expected}", redacted(text)))?;
    Ok(address)
}

/// The workload and the connection: all but whom to ask.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Workload")]
pub(crate) struct LoadArgs {
    /// A TOML file that says all of the below; flags beat it. Its keys are the flags without the
    /// dashes, and access = "uniform", "zipf", "scan" or "once"; arrivals = "constant" or
    /// "poisson".
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,

    /// Images or keys to choose from. [default: 10000]
    #[arg(long, value_name = "N")]
    population: Option<u32>,

    /// Where images come from: drawn, an IDX file, or the folder of the MNIST files (the test
    /// images). [default: drawn]
    #[arg(long, value_name = "SOURCE")]
    images: Option<String>,

    /// In which order they are asked about. [default: uniform]
    #[arg(long, value_enum)]
    access: Option<Access>,

    /// Choose by Zipf's law with this exponent.
    #[arg(long, value_name = "S")]
    zipf: Option<f64>,

    /// The share of requests to a cache that read; the others write. [default: 1]
    #[arg(long, value_name = "SHARE")]
    read_share: Option<f64>,

    /// The share of reads that are about the population; the others are about images or keys that
    /// nobody has asked about before. [default: 1]
    #[arg(long, value_name = "SHARE")]
    hit_ratio: Option<f64>,

    /// Ask about each image, or write each key, once before.
    #[arg(long)]
    prefill: bool,

    /// How long to run before measuring. [default: 1s]
    #[arg(long, value_name = "TIME", alias = "warmup")]
    warm_up: Option<Time>,

    /// How long to measure. [default: 10s]
    #[arg(long, value_name = "TIME", conflicts_with = "count")]
    duration: Option<Time>,

    /// How many requests to measure, instead of how long.
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// Connections in all. [default: 1]
    #[arg(long, value_name = "N")]
    connections: Option<usize>,

    /// Requests in flight on each connection; several depths, with commas, are measured in turn.
    /// [default: 1]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    depth: Option<Vec<usize>>,

    /// Keys that one command asks for, of Redis (MGET) and of memcached (get). [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,

    /// Requests a second, whether or not earlier ones are answered (an open loop). Without it the
    /// next request follows when an answer is there.
    #[arg(long, value_name = "N")]
    rate: Option<f64>,

    /// Requests of an open loop come at random moments instead of evenly spaced ones.
    #[arg(long)]
    poisson: bool,

    /// What all random numbers come from. [default: 1]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Load threads. [default: 1]
    #[arg(long, value_name = "N")]
    load_threads: Option<usize>,

    /// CPUs to tie the load threads to, in turn.
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pin: Vec<usize>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Access {
    /// Each one as likely as another.
    Uniform,
    /// The first few far more often than the others.
    Zipf,
    /// One after another, over and over.
    Scan,
    /// One after another, each once.
    Once,
}

impl LoadArgs {
    /// What the flags say, over what the workload file says.
    pub(crate) fn spec(&self) -> anyhow::Result<Spec> {
        let access = self.access.map(|access| match access {
            Access::Uniform => Order::Uniform,
            Access::Zipf => Order::Zipf,
            Access::Scan => Order::Scan,
            Access::Once => Order::Once,
        });
        let flags = Spec {
            population: self.population,
            images: self.images.clone(),
            // An exponent on the command line is Zipf's, whatever the file says.
            access: access.or(self.zipf.map(|_| Order::Zipf)),
            exponent: self.zipf,
            read_share: self.read_share,
            hit_ratio: self.hit_ratio,
            prefill: self.prefill.then_some(true),
            warm_up: self.warm_up.map(|time| time.0),
            duration: self.duration.map(|time| time.0),
            count: self.count,
            connections: self.connections,
            threads: self.load_threads,
            depth: self.depth.clone(),
            batch: self.batch,
            rate: self.rate,
            arrivals: self.poisson.then_some(Spacing::Poisson),
            seed: self.seed,
            pin: (!self.pin.is_empty()).then(|| self.pin.clone()),
        };
        let spec = self.over_the_file(flags)?;
        spec.check()?;
        Ok(spec)
    }

    /// These flags over the workload file.
    fn over_the_file(&self, flags: Spec) -> anyhow::Result<Spec> {
        let Some(path) = &self.workload else { return Ok(flags) };
        let file = path.display();
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read the workload file {file}"))?;
        let below = Spec::parse(&text).map_err(|error| anyhow::anyhow!("{file}, {error}"))?;
        Ok(flags.over(below))
    }

    /// The plan for the service at `address`, and its workload.
    pub(crate) fn plan(&self, address: &Address) -> anyhow::Result<(Plan, Spec)> {
        let spec = self.spec()?;
        // Not by clap's `requires`, which does not see what the settings file says.
        if self.poisson && spec.rate.is_none() {
            bail!("--poisson needs --rate, the number of requests per second");
        }
        self.plan_for(address, spec)
    }

    /// The same for this workload.
    pub(crate) fn plan_for(&self, address: &Address, spec: Spec) -> anyhow::Result<(Plan, Spec)> {
        let timeout = self.client.timeout();
        let Address { dialect, place, login, password } = address;
        let (dialect, tls) = (*dialect, self.client.tls_to(place)?);
        if tls.is_some() && dialect != Dialect::Wire {
            bail!("--tls works with the Afterimage protocol only, not with {address}");
        }
        let token = match &password[..] {
            "" => self.client.token()?,
            password => password.as_bytes().to_vec(),
        };
        // Also where the flags are wrong: a name may have several addresses.
        let addr = address.reachable(timeout)?;
        let peer = Peer { addr, dialect, token: &token, login, tls: tls.as_ref(), timeout };
        // Before the images are drawn: the kind of service decides whether there are any.
        let service = match spec.images {
            // A wrong file is said to be one also when nobody listens.
            Some(_) => None,
            None => afterimage_bench::greet(peer)?,
        };
        let images = spec.images.is_some() || service.is_some_and(Role::classifies);
        let mut plan = if images {
            let population = Arc::new(population(&spec)?);
            hint_at_wrong_flags(&spec, peer)?;
            Plan::classify(addr, population)
        } else {
            let (count, read_share) =
                (spec.population.unwrap_or(DEFAULT_POPULATION), spec.read_share.unwrap_or(1.0));
            Plan::cache(addr, Keys { count, read_share, salt: spec.seed() })
        };
        let login = login.clone();
        (plan.dialect, plan.token, plan.tls, plan.timeout) = (dialect, token, tls, timeout);
        plan.login = login;
        spec.apply(&mut plan)?;
        Ok((plan, spec))
    }
}

/// Refuses a workload for images where keys are asked for, and the other way round, with a hint.
fn hint_at_wrong_flags(spec: &Spec, peer: Peer<'_>) -> anyhow::Result<()> {
    let Peer { addr, dialect, .. } = peer;
    let service = afterimage_bench::greet(peer)?;
    if !service.is_some_and(Role::classifies) {
        let name = match service {
            Some(service) => format!("a {service}"),
            None => format!("a cache that speaks {dialect}"),
        };
        bail!("{addr} is {name}: it is asked for keys and knows no images; leave --images away");
    }
    if spec.read_share.is_some() || spec.batch.is_some_and(|batch| batch > 1) {
        let service = service.map(|service| service.to_string()).unwrap_or_default();
        bail!(
            "{addr} is a {service}: it is asked about images; --read-share and --batch are for caches \
             (the host:port of an `afterimage cache`, redis://, memcached://)"
        );
    }
    Ok(())
}

fn population(spec: &Spec) -> anyhow::Result<Population> {
    let count = spec.population.unwrap_or(DEFAULT_POPULATION) as usize;
    if count > MAX_IMAGES {
        bail!("population is {count}; the limit for images is {MAX_IMAGES}");
    }
    match spec.images.as_deref() {
        None | Some(DRAWN) => Ok(Population::drawn(spec.seed(), count)),
        Some(source) => {
            let path = Path::new(source);
            if path.is_dir() { mnist(path, count) } else { idx(path, count) }
        }
    }
}

/// The first `count` images of an IDX file that differ from those before them.
fn idx(path: &Path, count: usize) -> anyhow::Result<Population> {
    let (shape, pixels) = read_images(path)?;
    let (mut seen, mut bytes) = (HashSet::new(), Vec::new());
    for image in pixels.chunks_exact(shape.len()) {
        if seen.len() < count && seen.insert(image) {
            bytes.extend_from_slice(image);
        }
    }
    Population::new(bytes, shape.len(), None)
        .with_context(|| format!("the images in {}", path.display()))
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
