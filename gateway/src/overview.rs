//! What the page shows: sums since the start, latencies, and the last minutes as a series.

#![expect(unused_qualifications, reason = "in code that utoipa generates")]

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use afterimage_cache::metrics as cache;
use afterimage_core::{Failure, Metric, ModelId};
use afterimage_inference::{ModelReport, RowsMode};
use afterimage_memo::metrics as memo;
use afterimage_wire::proto::stats::{Quantiles, Stats, Value};
use axum::Json;
use axum::extract::State;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};
use tokio::sync::watch;
use utoipa::{IntoParams, ToSchema};

use crate::Shared;
use crate::extract::Params;
use crate::openapi::{Asks, Reads};
use crate::problem::Problem;

/// Time between two points of the series.
const EVERY: Duration = Duration::from_secs(1);

/// Points that are kept: a quarter of an hour.
const POINTS: usize = 900;

/// What the page shows.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Overview {
    version: &'static str,
    uptime_s: u64,
    /// `serving`, or `degraded` with the reason in `trouble`.
    state: &'static str,
    trouble: Option<String>,
    model: Option<Model>,
    requests: u64,
    hits: u64,
    misses: u64,
    coalesced: u64,
    /// Of the requests since the start, the share that was answered without a call; `null` before
    /// the first.
    hit_ratio: Option<f64>,
    /// Waiting time that hits saved.
    saved_s: f64,
    /// Time of the model that hits saved.
    saved_model_s: f64,
    latency_us: Latencies,
    store: Store,
    waiting: i64,
    /// Sums once a second, the oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    series: Vec<Point>,
}

/// A model and its identity.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct Model {
    name: String,
    version: String,
    digest: String,
    input: Vec<u32>,
    classes: u32,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
struct Latencies {
    hit: Option<Latency>,
    miss: Option<Latency>,
}

/// Quantiles in microseconds.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
struct Latency {
    p50: f64,
    p99: f64,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct Store {
    kind: String,
    entries: i64,
    capacity: i64,
    bytes: i64,
    evictions: u64,
}

/// Sums since the start, at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Point {
    /// Seconds since the start of the gateway.
    t: u64,
    hits: u64,
    misses: u64,
    coalesced: u64,
}

/// The series of the page, and the newest overview for all that watch.
pub(crate) struct History {
    points: Mutex<VecDeque<Point>>,
    newest: watch::Sender<Option<Arc<str>>>,
}

impl Default for History {
    fn default() -> Self {
        History { points: Mutex::default(), newest: watch::Sender::new(None) }
    }
}

impl History {
    fn points(&self) -> MutexGuard<'_, VecDeque<Point>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the statistics once a second until the router is dropped.
pub(crate) async fn keep_history(shared: Weak<Shared>) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let overview = shared.read().await;
        if overview.trouble.is_none() {
            let Overview { uptime_s: t, hits, misses, coalesced, .. } = overview;
            let mut points = shared.history.points();
            if points.len() == POINTS {
                points.pop_front();
            }
            points.push_back(Point { t, hits, misses, coalesced });
        }
        let text = serde_json::to_string(&overview).unwrap_or_default();
        shared.history.newest.send_replace(Some(text.into()));
    }
}

impl Shared {
    /// The overview at this time, without the series.
    async fn read(&self) -> Overview {
        let read = self.source.stats().await;
        let model = self.source.model();
        self.overview(read, model)
    }

    fn overview(&self, read: Result<Vec<Stats>, Failure>, model: Option<Arc<ModelId>>) -> Overview {
        let (services, failure) = match read {
            Ok(services) => (services, None),
            Err(failure) => (Vec::new(), Some(failure)),
        };
        let values = Values(&services);
        let trouble = match (&failure, &model) {
            (Some(failure), _) => Some(failure.text.to_string()),
            (None, None) => Some("the model cannot be reached".to_owned()),
            (None, Some(_)) => values.trouble(),
        };
        let [hits, misses, coalesced] =
            [&cache::HITS, &cache::MISSES, &memo::COALESCED].map(|metric| values.sum(metric));
        let requests = hits + misses + coalesced;
        let seconds = |metric: &Metric| values.sum(metric) as f64 / metric.unit.per_base();
        Overview {
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: self.started.elapsed().as_secs(),
            state: if trouble.is_some() { "degraded" } else { "serving" },
            trouble,
            model: model.as_deref().map(Model::of),
            requests,
            hits,
            misses,
            coalesced,
            hit_ratio: (requests > 0).then(|| (hits + coalesced) as f64 / requests as f64),
            saved_s: seconds(&memo::SAVED_TIME),
            saved_model_s: seconds(&memo::SAVED_CLASSIFIER_TIME),
            latency_us: Latencies {
                hit: values.latency(&memo::HIT_LATENCY),
                miss: values.latency(&memo::MISS_LATENCY),
            },
            store: Store {
                kind: values.text(&memo::STORE).unwrap_or("none").to_owned(),
                entries: values.gauge(&memo::STORE_ENTRIES)
                    + values.gauge(&cache::BYTE_STORE_ENTRIES),
                capacity: values.gauge(&memo::STORE_CAPACITY),
                bytes: values.gauge(&memo::STORE_MEMORY) + values.gauge(&cache::BYTE_STORE_BYTES),
                evictions: values.sum(&memo::STORE_EVICTIONS)
                    + values.sum(&cache::BYTE_STORE_EVICTIONS),
            },
            waiting: values.gauge(&memo::WAITING),
            series: Vec::new(),
        }
    }
}

impl Model {
    fn of(model: &ModelId) -> Self {
        Model {
            name: model.name.clone(),
            version: model.version.clone(),
            digest: model.digest.iter().map(|byte| format!("{byte:02x}")).collect(),
            input: model.input.as_ref().map_or_else(Vec::new, |shape| shape.dims().to_vec()),
            classes: model.classes(),
        }
    }
}

/// Values of the statistics of several services.
struct Values<'a>(&'a [Stats]);

impl<'a> Values<'a> {
    fn all(&self, metric: &Metric) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter_map(|stats| stats.get(metric.name))
    }

    fn sum(&self, metric: &Metric) -> u64 {
        self.0.iter().map(|stats| stats.counter_value(metric.name)).sum()
    }

    fn gauge(&self, metric: &Metric) -> i64 {
        let gauge = |value: &Value| if let Value::Gauge(value) = value { *value } else { 0 };
        self.all(metric).map(gauge).sum()
    }

    fn text(&self, metric: &Metric) -> Option<&'a str> {
        self.all(metric).find_map(|value| match value {
            Value::Text(text) => Some(&**text),
            _ => None,
        })
    }

    fn latency(&self, metric: &Metric) -> Option<Latency> {
        let buckets = self.all(metric).find_map(|value| match value {
            Value::Histogram(buckets) => Some(buckets),
            _ => None,
        })?;
        let quantiles = Quantiles::of(buckets);
        let micros = |value: u64| value as f64 / metric.unit.per_base() * 1e6;
        (quantiles.count > 0)
            .then(|| Latency { p50: micros(quantiles.p50), p99: micros(quantiles.p99) })
    }

    /// The fault of the store or the classifier, if there is one.
    fn trouble(&self) -> Option<String> {
        if self.text(&memo::CLASSIFIER_CONNECTED) == Some("no") {
            return Some("the classifier cannot be reached; hits are still answered".to_owned());
        }
        let store_is_away = self.text(&memo::STORE_CONNECTED) == Some("no")
            || self.text(&memo::STORE_BREAKER) == Some("open");
        store_is_away.then(|| {
            "the store cannot be reached; requests go to the model, no answer is lost".to_owned()
        })
    }
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(crate) struct Watch {
    /// With any value, the response is a stream of server-sent events, one a second.
    #[param(required = false)]
    watch: Option<String>,
}

/// A server-sent event with the overview of one second.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(crate) struct Update {
    /// An `Overview` as JSON, without the series.
    data: String,
}

/// The models that answer.
#[derive(Serialize, ToSchema)]
pub(crate) struct Models {
    models: Vec<Model>,
    /// The models behind a proxy that clients have asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    proxied: Vec<Proxied>,
}

/// A model behind a proxy.
#[derive(Serialize, ToSchema)]
pub(crate) struct Proxied {
    /// `NAME` or `NAME/versions/VERSION`; for embeddings the name and the path of the call.
    name: String,
    /// The version in the last response.
    version: Option<String>,
    /// Why no answer is stored; `null` if answers are.
    refusal: Option<&'static str>,
    rows: RowsVerdict,
    epoch: u64,
    /// The last change; `null` before the first.
    changed: Option<Changed>,
    /// Questions that are asked again at each poll; `null` if the model's answers vary.
    canaries: Option<usize>,
    /// Calls that the memo answered.
    calls: u64,
    /// Calls that were answered from the store alone.
    hits: u64,
    /// The rows of all calls.
    asked_rows: u64,
    /// Rows that were answered from the store.
    row_hits: u64,
}

/// Whether the rows of a model depend on each other, with the evidence.
#[derive(Serialize, ToSchema)]
pub(crate) struct RowsVerdict {
    /// The operator's choice: `whole`, `auto` or `within`.
    mode: &'static str,
    /// The limit of `within`.
    limit: Option<f64>,
    /// `unknown`, `rows`, `within`, `within offered` or `whole`.
    verdict: &'static str,
    probes: u32,
    audits: u32,
    /// Rows that were compared.
    compared: u64,
    disagreements: u64,
    /// The greatest difference between two numbers; `null` if other parts differ.
    greatest_difference: Option<f64>,
}

/// A change of a model.
#[derive(Serialize, ToSchema)]
pub(crate) struct Changed {
    /// Seconds since the change.
    ago_s: u64,
    why: &'static str,
}

impl Proxied {
    fn of(report: ModelReport) -> Self {
        let (mode, limit) = match report.mode {
            RowsMode::Auto => ("auto", None),
            RowsMode::Within(limit) => ("within", Some(limit)),
            _ => ("whole", None),
        };
        let evidence = report.evidence;
        let changed = report.changed.map(|(at, why)| {
            let ago_s = at.elapsed().unwrap_or_default().as_secs();
            Changed { ago_s, why: why.as_str() }
        });
        Proxied {
            name: report.name,
            version: report.version,
            refusal: report.refusal,
            rows: RowsVerdict {
                mode,
                limit,
                verdict: report.verdict.as_str(),
                probes: evidence.probes,
                audits: evidence.audits,
                compared: evidence.rows,
                disagreements: evidence.disagreements,
                greatest_difference: Some(evidence.greatest).filter(|most| most.is_finite()),
            },
            epoch: report.epoch,
            changed,
            canaries: report.canaries,
            calls: report.calls,
            hits: report.hits,
            asked_rows: report.rows,
            row_hits: report.row_hits,
        }
    }
}

/// The statistics of the services behind the gateway.
#[derive(Serialize, ToSchema)]
pub(crate) struct Services {
    /// The values of each service by name: a number, a text, or the buckets of a histogram.
    services: Vec<Map<String, serde_json::Value>>,
}

/// Numbers of the page
///
/// Sums since the start, latencies, and the last quarter of an hour as a series.
#[utoipa::path(get, path = "/v1/overview", tag = "observe", params(Watch), responses(
    (status = 200, description = "The numbers; with `watch`, an event for each second", content(
        (Overview = "application/json"), (Update = "text/event-stream"),
    )),
    Reads,
))]
pub(crate) async fn overview(
    State(shared): State<Arc<Shared>>,
    Params(Watch { watch }): Params<Watch>,
) -> Response {
    if watch.is_some() {
        let start = (shared.history.newest.subscribe(), shared);
        let updates = stream::unfold(start, async |(mut newest, shared)| {
            shared.stop.run_until_cancelled(newest.changed()).await?.ok()?;
            let text = newest.borrow_and_update().clone().unwrap_or_default();
            Some((Ok::<_, Infallible>(Event::default().data(text)), (newest, shared)))
        });
        return Sse::new(updates).keep_alive(KeepAlive::default()).into_response();
    }
    let mut overview = shared.read().await;
    overview.series = shared.history.points().iter().copied().collect();
    Json(overview).into_response()
}

/// Models that answer
#[utoipa::path(get, path = "/v1/models", tag = "observe", responses(
    (status = 200, description = "The models; none before it is known", body = Models),
    Reads,
))]
pub(crate) async fn models(State(shared): State<Arc<Shared>>) -> Json<Models> {
    let models = shared.source.model().as_deref().map(Model::of).into_iter().collect();
    let proxied = shared.source.proxied().into_iter().map(Proxied::of).collect();
    Json(Models { models, proxied })
}

/// All statistics
#[utoipa::path(get, path = "/v1/stats", tag = "observe", responses(
    (status = 200, description = "The values of each service", body = Services),
    Asks,
))]
pub(crate) async fn stats(State(shared): State<Arc<Shared>>) -> Result<Json<Services>, Problem> {
    let services = shared.source.stats().await?;
    let values = services.iter().map(|stats| {
        let values = stats.entries.iter().filter_map(|(name, value)| {
            let value = match value {
                Value::Counter(value) => json!(value),
                Value::Gauge(value) => json!(value),
                Value::Text(text) => json!(text),
                Value::Histogram(buckets) => json!(buckets),
                _ => return None,
            };
            Some((name.clone(), value))
        });
        values.collect::<Map<_, _>>()
    });
    Ok(Json(Services { services: values.collect() }))
}
