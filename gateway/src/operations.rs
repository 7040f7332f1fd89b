//! Routes for operators: metrics and probes.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::Metric;
use afterimage_http::HttpOptions;
use afterimage_wire::prometheus;
use afterimage_wire::proto::stats::Stats;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::openapi::Asks;
use crate::problem::Problem;
use crate::{Pending, Shared};

/// The longest time that the check of `/readyz` may take.
const READY_WITHIN: Duration = Duration::from_secs(2);

/// Statistics for Prometheus
#[utoipa::path(get, path = "/metrics", tag = "operate", responses(
    (status = 200, description = "All statistics in the text format of Prometheus",
        body = String, content_type = "text/plain"),
    Asks,
))]
pub(crate) async fn metrics(
    State(shared): State<Arc<Shared>>,
) -> Result<impl IntoResponse, Problem> {
    let services = shared.source.stats().await?;
    Ok(exposition(&services, shared.options.describe))
}

/// The description of a metric of the services that each gateway has behind it.
pub(crate) fn describe(name: &str) -> Option<&'static Metric> {
    use afterimage_wire::server::metrics as server;
    let all =
        [server::METRICS, afterimage_memo::metrics::METRICS, afterimage_cache::metrics::METRICS];
    all.into_iter().flatten().find(|metric| metric.has_name(name))
}

/// The services of a process, as an operator sees them.
pub trait Operated: Send + Sync + 'static {
    /// The statistics of each service.
    fn stats(&self) -> Pending<'_, Vec<Stats>>;

    /// The description of a metric.
    fn describe(&self, name: &str) -> Option<&'static Metric>;

    /// Why the process cannot answer requests now; `None` if it can.
    fn obstacle(&self) -> Pin<Box<dyn Future<Output = Option<String>> + Send + '_>>;
}

/// Serves `/metrics`, `/livez` and `/readyz` of any service on `socket` until `stop` is cancelled.
pub async fn serve_admin(
    socket: TcpListener,
    operated: Arc<dyn Operated>,
    http: HttpOptions,
    stop: CancellationToken,
) {
    let routes = Router::new()
        .route("/metrics", get(all_metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(no_obstacle))
        .fallback(Problem::no_such_path)
        .method_not_allowed_fallback(Problem::wrong_method)
        .with_state(operated);
    afterimage_http::serve(socket, TowerToHyperService::new(routes), http, stop).await;
}

async fn all_metrics(
    State(operated): State<Arc<dyn Operated>>,
) -> Result<impl IntoResponse, Problem> {
    let services = operated.stats().await?;
    Ok(exposition(&services, |name| operated.describe(name)))
}

async fn no_obstacle(State(operated): State<Arc<dyn Operated>>) -> Result<&'static str, Problem> {
    match tokio::time::timeout(READY_WITHIN, operated.obstacle()).await {
        Ok(None) => Ok("ok\n"),
        Ok(Some(obstacle)) => Err(unready(obstacle)),
        Err(_) => Err(unready(format!("the check takes longer than {READY_WITHIN:?}"))),
    }
}

/// Statistics in the text format of Prometheus.
fn exposition<'m>(
    services: &[Stats],
    describe: impl Fn(&str) -> Option<&'m Metric>,
) -> ([(HeaderName, &'static str); 1], String) {
    let text = prometheus::text(services, describe);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn unready(why: String) -> Problem {
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", why)
}

/// Whether the process answers
#[utoipa::path(get, path = "/livez", tag = "operate", security(()), responses(
    (status = 200, description = "It does", body = String, content_type = "text/plain"),
))]
pub(crate) async fn livez() -> &'static str {
    "ok\n"
}

/// Whether requests can be answered
#[utoipa::path(get, path = "/readyz", tag = "operate", security(()), responses(
    (status = 200, description = "They can", body = String, content_type = "text/plain"),
    (status = 503, description = "Not yet; `detail` has the reason", body = Problem,
        content_type = "application/problem+json"),
))]
pub(crate) async fn readyz(State(shared): State<Arc<Shared>>) -> Result<&'static str, Problem> {
    match tokio::time::timeout(READY_WITHIN, shared.source.ready()).await {
        Ok(Ok(())) => Ok("ok\n"),
        Ok(Err(failure)) => Err(unready(failure.text.to_string())),
        Err(_) => Err(unready(format!("a test input has no answer after {READY_WITHIN:?}"))),
    }
}
