//! The settings of a run and the introduction of its server.

use afterimage_wire::text::escape_text;
use serde::{Deserialize, Serialize};

use crate::address::Introduction;
use crate::plan::{Arrivals, Mode, Plan, Span, Target};
use crate::workload::Access;

/// A plan without its secrets, for the record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Where the server listens.
    pub addr: String,
    /// Its protocol: `tcp` for Afterimage's own.
    #[serde(default)]
    pub dialect: String,
    /// Keys that one command asks for at most, where there are such commands.
    #[serde(default)]
    pub batch: usize,
    /// `classify`, `cache` or `call`.
    pub target: String,
    /// How many images or keys there are.
    pub population: u64,
    /// The share of requests that read; 1 in a classification.
    pub read_share: f64,
    /// The share of reads from the population; the others use new images or keys.
    #[serde(default)]
    pub known_share: Option<f64>,
    /// `uniform`, `zipf(s)`, `sequential` or `each once`.
    pub access: String,
    /// Connections in all.
    pub connections: usize,
    /// Load threads.
    pub threads: usize,
    /// Requests in flight on each connection, at most.
    pub depth: usize,
    /// `closed`, or `open` and how the arrivals are spaced.
    pub mode: String,
    /// Requests a second that were due, in an open loop.
    pub rate_per_s: Option<f64>,
    /// Whether everything was asked about, or written, once before.
    pub prefill: bool,
    /// The warm-up.
    pub warmup: String,
    /// The measurement.
    pub stop: String,
    /// Milliseconds after which a request has timed out.
    pub timeout_ms: u64,
    /// The CPUs that the load threads were tied to.
    pub pin: Vec<usize>,
    /// The seed of every random choice.
    pub seed: u64,
}

/// The introduction of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Server {
    /// Name and version.
    pub name: String,
    /// The kind of service.
    pub service: String,
    /// Requests it works on at once for a connection. A depth beyond it does not reach the server.
    pub window: u32,
    /// SHA-256 of its model in hexadecimal; all zeros for none or not known.
    pub model: String,
}

impl Settings {
    pub(super) fn new(plan: &Plan) -> Self {
        let (target, read_share) = match &plan.target {
            Target::Classify { .. } => ("classify", 1.0),
            Target::Cache(keys) => ("cache", keys.read_share),
            Target::Call(_) => ("call", 1.0),
        };
        let access = match plan.access {
            Access::Uniform => "uniform".into(),
            Access::Zipf { exponent } => format!("zipf({exponent})"),
            Access::Sequential => "sequential".into(),
            Access::EachOnce => "each once".into(),
        };
        let (mode, rate_per_s) = match plan.mode {
            Mode::Closed => ("closed", None),
            Mode::Open { rate, arrivals: Arrivals::Constant } => ("open, constant", Some(rate)),
            Mode::Open { rate, arrivals: Arrivals::Poisson } => ("open, Poisson", Some(rate)),
        };
        let span = |span: Span| match span {
            Span::Time(time) => format!("{time:?}"),
            Span::Requests(count) => format!("{count} requests"),
        };
        Settings {
            addr: plan.addr.to_string(),
            dialect: plan.dialect.to_string(),
            batch: plan.batch,
            target: target.into(),
            population: plan.subjects().into(),
            read_share,
            known_share: plan.hit_ratio,
            access,
            connections: plan.connections,
            threads: plan.threads,
            depth: plan.depth,
            mode: mode.into(),
            rate_per_s,
            prefill: plan.prefill,
            warmup: span(plan.warmup),
            stop: span(plan.stop),
            timeout_ms: u64::try_from(plan.timeout.as_millis()).unwrap_or(u64::MAX),
            pin: plan.pin.clone(),
            seed: plan.seed,
        }
    }
}

impl Server {
    pub(super) fn new(introduction: Introduction) -> Self {
        let welcome = match introduction {
            Introduction::Welcome(welcome) => welcome,
            Introduction::Model(name) => {
                let name = escape_text(&name).into_owned();
                return Server { name, service: "model server".into(), ..Server::default() };
            }
            Introduction::Name(name) => {
                let name = escape_text(&name).into_owned();
                return Server { name, service: "cache".into(), ..Server::default() };
            }
        };
        Server {
            name: escape_text(&welcome.name).into_owned(),
            service: welcome.service.to_string(),
            window: welcome.window,
            model: welcome.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}
