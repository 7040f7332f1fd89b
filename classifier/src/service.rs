//! The classifier as a network service: batches of requests become jobs of the compute engine.

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::{
    Failure, ModelId, Origin, Reply, Response, RowAnswer, RowReply, Rows, gather,
};
use afterimage_wire::Status;
use afterimage_wire::proto::{InferReq, Role, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Infer, Op, Service};

use crate::engine::{Engine, EngineError, Job, Labelled};
use crate::metrics;
use crate::model::Model;

/// Serves a [`Model`] to the network through an [`Engine`].
///
/// Nothing is computed on the thread that reads the socket: a `Ping` is answered while the cores
/// are busy. Connections are served in turn. A request's deadline goes with it: expired work is not
/// started, and neither is the work of a closed connection.
#[derive(Debug)]
pub struct ClassifierService {
    identity: Identity,
    model: Arc<ModelId>,
    engine: Arc<Engine>,
}

impl ClassifierService {
    /// A service of `model`, which `engine` scores with.
    pub fn new(model: &Model, engine: Arc<Engine>) -> Self {
        let identity = identity(model);
        let model =
            ModelId::labels(identity.digest, Some(identity.shape.clone()), identity.classes);
        ClassifierService { identity, model: Arc::new(model), engine }
    }

    /// The jobs of an `InferReq`, one for each row; the error text for another model.
    fn infer(
        &self,
        infer: &Infer<'_>,
        reply: impl FnOnce() -> Reply<Result<Response, Failure>>,
        now: Instant,
    ) -> Result<Vec<Job>, String> {
        let &InferReq { model, version, .. } = &**infer;
        if !(model.is_empty() && version.is_empty()) {
            let text = "this classifier has one model, without name and version";
            return Err(format!("model {model:?}, version {version:?}: {text}"));
        }
        let model = Arc::clone(&self.model);
        let combine = |rows: Vec<RowAnswer>| Response { model, rows: Rows::from_vec(rows) };
        let deadline = infer.budget().map(|budget| now + budget);
        let replies = gather(infer.rows.len(), reply(), combine);
        let job = |(row, reply): (&[u8], RowReply)| {
            Job::with_reply(row, labelled(reply)).with_deadline(deadline)
        };
        Ok(infer.rows.iter().zip(replies).map(job).collect())
    }
}

impl Service for ClassifierService {
    fn identity(&self) -> Identity {
        self.identity.clone()
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let (now, client) = (Instant::now(), batch.client());
        let mut jobs = Vec::new();
        for (i, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::Classify { image } => {
                    let job = Job::with_reply(image, labelled(batch.row_reply(i)));
                    jobs.push(job.of_client(client).with_deadline(request.deadline(now)));
                }
                Op::Infer(infer) => match self.infer(infer, || batch.response_reply(i), now) {
                    Ok(rows) => jobs.extend(rows.into_iter().map(|job| job.of_client(client))),
                    Err(text) => batch.error(i, Status::BadArgument, &text),
                },
                _ => {
                    let text = "this is a classifier; it classifies and stores nothing";
                    batch.error(i, Status::Unsupported, text);
                }
            }
        }
        self.engine.submit_many(jobs);
    }

    fn stats(&self, stats: &mut Stats) {
        engine_stats(&self.engine, stats);
    }
}

/// The reply of a connection as one of the engine.
fn labelled(reply: RowReply) -> Reply<Labelled> {
    reply.accept(|label: Labelled| match label {
        Ok(label) => Ok(RowAnswer::label(label, Origin::Miss)),
        Err(error) => Err(failure(&error)),
    })
}

/// The identity of a model in a `Welcome`.
///
/// # Panics
/// Never: a model's shape has at most four dimensions, as the wire's.
pub fn identity(model: &Model) -> Identity {
    Identity {
        service: Role::Classifier,
        digest: model.digest().0,
        classes: model.labels().iter().max().map_or(0, |&label| u32::from(label) + 1),
        shape: Shape::new(model.shape().dims()).expect("both allow four dimensions"),
    }
}

/// The failure that a client gets for an error of the engine.
pub fn failure(error: &EngineError) -> Failure {
    Failure::new(status(error), error.to_string())
}

/// The status code for an error of the engine.
pub fn status(error: &EngineError) -> Status {
    match error {
        EngineError::Overloaded { .. } => Status::Overloaded,
        EngineError::WrongSize { .. } => Status::BadArgument,
        // No caller reads the second one.
        EngineError::DeadlineExceeded | EngineError::Abandoned => Status::DeadlineExceeded,
        EngineError::ShuttingDown => Status::ShuttingDown,
        EngineError::Panicked | EngineError::Lost => Status::Internal,
    }
}

/// Adds an engine's counters to `stats`.
pub fn engine_stats(engine: &Engine, stats: &mut Stats) {
    let counters = engine.counters();
    stats.counter(&metrics::SCORED, counters.scored);
    stats.counter(&metrics::BATCHES, counters.batches);
    stats.counter(&metrics::OVERLOADED, counters.overloaded);
    stats.counter(&metrics::EXPIRED, counters.expired);
    stats.counter(&metrics::ABANDONED, counters.abandoned);
    stats.counter(&metrics::PANICKED, counters.panicked);
    stats.gauge(&metrics::QUEUED, counters.queued as u64);
    stats.counter(&metrics::BUSY, counters.busy.as_micros() as u64);
}

#[cfg(test)]
mod tests {
    use crate::EngineOptions;

    use super::*;

    #[test]
    fn every_described_metric_is_reported() {
        let engine = Engine::start(Model::raw(), EngineOptions::default());
        let mut stats = Stats::default();
        engine_stats(&engine, &mut stats);
        let mut reported: Vec<&str> = stats.entries.iter().map(|(name, _)| name.as_str()).collect();
        let mut described: Vec<&str> = metrics::METRICS.iter().map(|metric| metric.name).collect();
        reported.sort_unstable();
        described.sort_unstable();
        assert_eq!(reported, described);
    }
}
