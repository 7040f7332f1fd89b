//! Parts of a report: latencies in eight numbers, the intervals of a run, what the generator
//! used.

use std::time::{Duration, SystemTime};

use afterimage_wire::text::escape_text;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::address::Introduction;
use crate::plan::{Arrivals, Mode, Plan, Span, Target};
use crate::timeline::Timeline;
use crate::workload::Access;

/// A part of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// When it begins, in seconds after the measurement did. The last ones may begin after its
    /// end, when late answers were waited for.
    pub start_s: f64,
    /// Its length in seconds.
    pub length_s: f64,
    /// Requests that were over in it: answered, failed, or a write confirmed.
    pub closed: u64,
    /// Hits among them.
    pub hits: u64,
    /// Error replies among them.
    pub failed: u64,
    /// Latencies from due of the proper answers that came in it.
    pub from_due: Summary,
    /// The same in full; only in the process that measured it.
    #[serde(skip)]
    pub histogram: Option<Histogram<u64>>,
}

/// A latency histogram in eight numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// How many latencies these are.
    pub count: u64,
    /// Their mean.
    pub mean_ns: f64,
    /// Half are no longer.
    pub p50_ns: u64,
    /// 90 % are no longer.
    pub p90_ns: u64,
    /// 99 % are no longer.
    pub p99_ns: u64,
    /// 99.9 % are no longer.
    pub p999_ns: u64,
    /// 99.99 % are no longer.
    pub p9999_ns: u64,
    /// None is longer.
    pub max_ns: u64,
}

/// The latencies of requests that were answered in one way.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct OutcomeReport {
    /// From the moment a request was due.
    pub from_due: Summary,
    /// From the moment it was handed to the kernel.
    pub from_sent: Summary,
}

/// CPU time and context switches of a load thread during the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadUse {
    /// When its measurement began.
    pub(crate) started: SystemTime,
    /// Length of its measurement.
    pub(crate) measured: Duration,
    /// Whether it was cancelled.
    pub(crate) interrupted: bool,
    /// The same with the wait for the last answers.
    pub(crate) wall: Duration,
    /// CPU time.
    pub(crate) cpu: Duration,
}

/// The load of the generator itself. Near 1 in a closed loop, the figures are the generator's and
/// not the server's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Generator {
    /// CPU time of each load thread, as a share of the time it ran.
    pub cpu_share: Vec<f64>,
    /// CPU time of all load threads for each request that was answered, in nanoseconds, system
    /// calls included. A load thread can drive no more than 10⁹ over this a second.
    pub cpu_ns_per_request: f64,
    /// Nanoseconds from a request's due time to its hand-over, at the 99th percentile, as the
    /// difference of the two latencies' 99th percentiles: what the generator, its window or the
    /// kernel's buffers held back.
    pub held_back_p99_ns: u64,
    /// Nanoseconds that the generator itself was late in an open loop, at the 99th percentile:
    /// from a request's due time, or from when its window had space, until it was sent. Delays
    /// below 60 µs count as 0.
    #[serde(default)]
    pub late_p99_ns: u64,
}

impl Summary {
    pub(super) fn new(histogram: &Histogram<u64>) -> Self {
        Summary {
            count: histogram.len(),
            mean_ns: histogram.mean(),
            p50_ns: histogram.value_at_quantile(0.5),
            p90_ns: histogram.value_at_quantile(0.9),
            p99_ns: histogram.value_at_quantile(0.99),
            p999_ns: histogram.value_at_quantile(0.999),
            p9999_ns: histogram.value_at_quantile(0.9999),
            max_ns: histogram.max(),
        }
    }
}

/// The parts of a measurement in their order.
pub(super) fn intervals(timeline: Timeline) -> Vec<Interval> {
    let length_s = timeline.width_ns() as f64 / 1e9;
    let intervals = timeline.into_intervals().into_iter().enumerate();
    intervals
        .map(|(i, interval)| Interval {
            start_s: i as f64 * length_s,
            length_s,
            closed: interval.closed,
            hits: interval.hits,
            failed: interval.failed,
            from_due: Summary::new(&interval.from_due),
            histogram: Some(interval.from_due),
        })
        .collect()
}

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
