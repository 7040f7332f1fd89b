//! The classifier as a network service: batches of requests become jobs of the compute engine.

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::{Failure, Origin, RowAnswer};
use afterimage_wire::Status;
use afterimage_wire::proto::{Role, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Service};

use crate::engine::{Engine, EngineError, Job};
use crate::model::Model;

/// Serves a [`Model`] to the network through an [`Engine`].
///
/// Nothing is computed on the thread that reads the socket: a `Ping` is answered while the cores
/// are busy. A request's deadline goes with it: expired work is not started.
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
        let now = Instant::now();
        let mut jobs = Vec::new();
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else {
                batch.error(i, Status::Unsupported, "this is a classifier; it takes images only");
                continue;
            };
            let reply = batch.row_reply(i);
            let job = Job::new(image, move |label| {
                let answer = label.map(|label| RowAnswer::label(label, Origin::Miss));
                reply.send(answer.map_err(|error| Failure::new(status(&error), error.to_string())));
            });
            jobs.push(job.with_deadline(request.deadline(now)));
        }
        self.engine.submit_many(jobs);
    }

    fn stats(&self, stats: &mut Stats) {
        engine_stats(&self.engine, stats);
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

/// The status code for an error of the engine.
pub fn status(error: &EngineError) -> Status {
    match error {
        EngineError::Overloaded { .. } => Status::Overloaded,
        EngineError::WrongSize { .. } => Status::BadArgument,
        EngineError::DeadlineExceeded => Status::DeadlineExceeded,
        EngineError::ShuttingDown => Status::ShuttingDown,
        EngineError::Panicked | EngineError::Lost => Status::Internal,
    }
}

/// Adds an engine's counters to `stats`.
pub fn engine_stats(engine: &Engine, stats: &mut Stats) {
    let counters = engine.counters();
    stats.counter("engine_scored", counters.scored);
    stats.counter("engine_batches", counters.batches);
    stats.counter("engine_overloaded", counters.overloaded);
    stats.counter("engine_expired", counters.expired);
    stats.counter("engine_panicked", counters.panicked);
    stats.gauge("engine_queued", counters.queued as u64);
    stats.counter("engine_busy_us", counters.busy.as_micros() as u64);
}
