//! Routes for operators: metrics and probes.

use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::prometheus;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use bytes::Bytes;

use crate::problem::Problem;
use crate::{Shared, Wish};

/// The longest time that a test input may take for `/readyz`.
const READY_WITHIN: Duration = Duration::from_secs(2);

/// `GET /metrics`: all statistics in the text format of Prometheus.
pub(crate) async fn metrics(
    State(shared): State<Arc<Shared>>,
) -> Result<impl IntoResponse, Problem> {
    let services = shared.source.stats().await?;
    let text = prometheus::text(&services, metric);
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text))
}

/// The description of a metric.
fn metric(name: &str) -> Option<&'static afterimage_core::Metric> {
    use afterimage_wire::server::metrics as server;
    let all =
        [server::METRICS, afterimage_memo::metrics::METRICS, afterimage_cache::metrics::METRICS];
    all.into_iter().flatten().find(|metric| metric.has_name(name))
}

/// `GET /livez`: the process answers.
pub(crate) async fn livez() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: a test input, of zeros, is answered. Its answer is stored like others, so a memo
/// that was ready stays ready while its model is away: it still answers hits.
pub(crate) async fn readyz(State(shared): State<Arc<Shared>>) -> Result<&'static str, Problem> {
    let unready = |why: String| Problem::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", why);
    let model = shared.source.model();
    let Some(model) = model else {
        return Err(unready("the model is not known yet; its server cannot be reached".into()));
    };
    // A model without a shape takes any input; there is none to test with.
    let Some(len) = model.input_len() else { return Ok("ok\n") };
    let answer = shared.source.classify(vec![Bytes::from(vec![0; len])], Wish::default());
    match tokio::time::timeout(READY_WITHIN, answer).await {
        Ok(Ok(_)) => Ok("ok\n"),
        Ok(Err(failure)) => Err(unready(failure.to_string())),
        Err(_) => Err(unready(format!("a test input has no answer after {READY_WITHIN:?}"))),
    }
}
