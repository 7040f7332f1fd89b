//! The classifier as a network service: batches of requests become jobs of the compute engine.

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::{Failure, Origin, RowAnswer, RowReply};
use afterimage_wire::Status;
use afterimage_wire::proto::{Role, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Service};

use crate::engine::{Caller, Engine, EngineError, Job};
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
    engine: Arc<Engine>,
}

impl ClassifierService {
    /// A service of `model`, which `engine` scores with.
    pub fn new(model: &Model, engine: Arc<Engine>) -> Self {
        ClassifierService { identity: identity(model), engine }
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
            let Op::Classify { image } = request.op else {
                batch.error(i, Status::Unsupported, "this is a classifier; it takes images only");
                continue;
            };
            let job = Job::for_caller(image, ConnectionReply(batch.row_reply(i)));
            jobs.push(job.of_client(client).with_deadline(request.deadline(now)));
        }
        self.engine.submit_many(jobs);
    }

    fn stats(&self, stats: &mut Stats) {
        engine_stats(&self.engine, stats);
    }
}

/// A connection's reply behind the engine's interface.
struct ConnectionReply(RowReply);

impl Caller for ConnectionReply {
    fn is_wanted(&self, now: Instant) -> bool {
        self.0.is_wanted(now)
    }

    fn prefetch(&self) {
        self.0.prefetch();
    }

    fn answer(self: Box<Self>, label: Result<u16, EngineError>, now: Instant) {
        let answer = match label {
            Ok(label) => Ok(RowAnswer::label(label, Origin::Miss)),
            Err(error) => Err(failure(&error)),
        };
        self.0.send_at(answer, now);
    }
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
