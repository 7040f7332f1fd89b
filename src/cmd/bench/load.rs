//! The plan of a run, from flags and a workload file.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use afterimage_bench::workload::spec::{DEFAULT_POPULATION, Order, Spacing};
use afterimage_bench::workload::{Calls, Keys, Population, Protocol, Spec, recorded};
use afterimage_bench::{Address, Dialect, Peer, Plan, redacted};
use afterimage_classifier_tools::{Dataset, read_images};
use afterimage_wire::proto::Role;
use anyhow::{Context, anyhow, bail};
use clap::ValueEnum;

use crate::args::{ClientArgs, Time};
use crate::net;

/// The largest population of images. Each takes 784 bytes or more of memory.
const MAX_IMAGES: usize = 20_000_000;

/// The default number of different calls of an HTTP server: a real model computes them in seconds.
const DEFAULT_CALLS: u32 = 100;

/// The images that need no file.
const DRAWN: &str = "drawn";

/// The server to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct TargetArgs {
    /// Server to measure [default: 127.0.0.1:7400]
    ///
    /// HOST:PORT of a memo, a classifier or a cache service;
    /// redis://[USER:PASSWORD@]HOST[:PORT][/DB]; memcached://HOST[:PORT] for its text
    /// protocol, or memcached+meta://HOST[:PORT]; a model server, or a proxy in front of it, as
    /// http://HOST[:PORT]/v2/models/NAME or http://HOST[:PORT]/v1/embeddings.
    #[arg(value_name = "TARGET")]
    server: Option<String>,

    /// The same as TARGET.
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

/// The workload and the connection options.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Workload")]
pub(crate) struct LoadArgs {
    /// TOML file with the settings below; flags override it. Its keys are the flags without
    /// dashes.
    #[arg(long, value_name = "FILE")]
    workload: Option<PathBuf>,

    /// Number of different images or keys [default: 10000]
    #[arg(long, value_name = "N")]
    population: Option<u32>,

    /// Images to send: `drawn`, an IDX file, or a folder with the MNIST test files [default:
    /// drawn]
    ///
    /// For an http:// target: a file with one body a line, or an HTTP archive (HAR); without it,
    /// random inputs of the shape that the model declares.
    #[arg(long, value_name = "SOURCE", visible_alias = "inputs")]
    images: Option<String>,

    /// Order of the requests [default: uniform]
    #[arg(long, value_enum)]
    access: Option<Access>,

    /// Choose images or keys by Zipf's law with this exponent
    #[arg(long, value_name = "S")]
    zipf: Option<f64>,

    /// Share of requests to a cache that read; the others write [default: 1]
    #[arg(long, value_name = "SHARE")]
    read_share: Option<f64>,

    /// Share of reads from the population; the others use new images or keys [default: 1]
    #[arg(long, value_name = "SHARE")]
    hit_ratio: Option<f64>,

    /// Send each image, or write each key, once before the warm-up
    #[arg(long)]
    prefill: bool,

    /// Length of the warm-up [default: 1s]
    #[arg(long, value_name = "TIME", alias = "warmup")]
    warm_up: Option<Time>,

    /// Length of the measurement [default: 10s]
    #[arg(long, value_name = "TIME", conflicts_with = "count")]
    duration: Option<Time>,

    /// Number of requests to measure, instead of --duration
    #[arg(long, value_name = "N")]
    count: Option<u64>,

    /// Number of connections [default: 1]
    #[arg(long, value_name = "N")]
    connections: Option<usize>,

    /// Requests in flight per connection; several values (1,64) are measured in turn [default: 1]
    ///
    /// A connection of HTTP has one request in flight: the depth is a number of connections.
    #[arg(long, value_name = "N", value_delimiter = ',')]
    depth: Option<Vec<usize>>,

    /// Keys per command of Redis (MGET) or memcached (get) [default: 1]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,

    /// Requests per second on a schedule (open loop). Without it each answer triggers the next
    /// request (closed loop)
    #[arg(long, value_name = "N")]
    rate: Option<f64>,

    /// Random arrivals (Poisson process) instead of evenly spaced ones; needs --rate
    #[arg(long)]
    poisson: bool,

    /// Random seed [default: 1]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,

    /// Number of load threads [default: 1]
    #[arg(long, value_name = "N")]
    load_threads: Option<usize>,

    /// CPUs to pin the load threads to, in turn
    #[arg(long, value_name = "CPU", value_delimiter = ',')]
    pin: Vec<usize>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Access {
    /// All equally likely
    Uniform,
    /// By Zipf's law: the first few far more often than the others
    Zipf,
    /// In order, repeatedly
    Scan,
    /// In order, each once
    Once,
}

impl LoadArgs {
    /// The settings of the flags over those of the workload file.
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
            // --zipf overrides the access of the file.
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
        let text = afterimage_core::file::read_text(path)
            .with_context(|| format!("cannot read the workload file {file}"))?;
        let below = Spec::parse(&text).map_err(|error| anyhow::anyhow!("{file}, {error}"))?;
        Ok(flags.over(below))
    }

    /// The plan for the service at `address`, and its workload.
    pub(crate) fn plan(&self, address: &Address) -> anyhow::Result<(Plan, Spec)> {
        let spec = self.spec()?;
        // Clap's `requires` does not see the settings file.
        if self.poisson && spec.rate.is_none() {
            bail!("--poisson needs --rate, the number of requests per second");
        }
        self.plan_for(address, spec)
    }

    /// The same for this workload.
    pub(crate) fn plan_for(&self, address: &Address, spec: Spec) -> anyhow::Result<(Plan, Spec)> {
        let timeout = self.client.timeout();
        let Address { dialect, place, path, login, password } = address;
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
        if dialect == Dialect::Http {
            let calls = calls(&spec, peer, place, path)?;
            let mut plan = Plan::call(addr, Arc::new(calls));
            plan.timeout = timeout;
            spec.apply(&mut plan)?;
            return Ok((plan, spec));
        }
        // Before the images are drawn: the kind of service decides whether there are any.
        let service = match spec.images {
            // A wrong file is reported also without a server.
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

/// The calls of a model server: recorded ones, or random ones of the shape that the model declares.
fn calls(spec: &Spec, peer: Peer<'_>, host: &str, path: &str) -> anyhow::Result<Calls> {
    if spec.read_share.is_some() || spec.batch.is_some_and(|batch| batch > 1) {
        bail!("--read-share and --batch work with a cache service, redis:// and memcached:// only");
    }
    let count = spec.population.unwrap_or(DEFAULT_CALLS) as usize;
    let bodies = match spec.images.as_deref() {
        Some(source) => {
            let text = std::fs::read_to_string(source)
                .with_context(|| format!("cannot read the inputs {source}"))?;
            let mut bodies = recorded(&text, path).map_err(|error| anyhow!("{source}: {error}"))?;
            bodies.truncate(spec.population.map_or(usize::MAX, |_| count));
            bodies
        }
        None => {
            let protocol = Protocol::of(path).map_err(|error| anyhow!(error))?;
            let description = afterimage_bench::describe(peer, host, &protocol.description())?;
            protocol.bodies(&description, count, spec.seed()).map_err(|error| anyhow!(error))?
        }
    };
    Calls::new(host, path, bodies).map_err(|error| anyhow!(error))
}

/// Refuses flags for images with a cache, and flags for keys with a memo or classifier.
fn hint_at_wrong_flags(spec: &Spec, peer: Peer<'_>) -> anyhow::Result<()> {
    let Peer { addr, dialect, .. } = peer;
    let service = afterimage_bench::greet(peer)?;
    if !service.is_some_and(Role::classifies) {
        let name = match service {
            Some(service) => format!("a {service}"),
            None => format!("a {dialect} server"),
        };
        bail!("{addr} is {name}, which stores keys and no images; remove --images");
    }
    if spec.read_share.is_some() || spec.batch.is_some_and(|batch| batch > 1) {
        let service = service.map(|service| service.to_string()).unwrap_or_default();
        bail!(
            "{addr} is a {service}, which classifies images; --read-share and --batch work with a cache \
             service, redis:// and memcached:// only"
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

/// The first `count` distinct images of an IDX file.
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

/// The first `count` distinct images of the MNIST test set.
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
