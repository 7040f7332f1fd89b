//! A classifier in the memo's own process: the compute engine without a network before it.

use std::sync::Arc;
use std::time::Instant;

use afterimage_classifier::{Caller, Engine, EngineError, Model, service};
use afterimage_wire::proto::stats::Stats;

use super::{Answer, Classifier, Failure, Job, Reply};
use crate::key::ModelId;

/// An engine and the model that it scores with.
#[derive(Debug)]
pub struct Embedded {
    model: Arc<ModelId>,
    engine: Arc<Engine>,
}

impl Embedded {
    /// A classifier that has `engine` score with `model`.
    pub fn new(model: &Model, engine: Arc<Engine>) -> Self {
        let identity = service::identity(model);
        let model =
            ModelId { digest: identity.digest, shape: identity.shape, classes: identity.classes };
        Embedded { model: Arc::new(model), engine }
    }
}

impl Classifier for Embedded {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    fn classify(&self, jobs: Vec<Job>) {
        self.engine.submit_many(jobs.into_iter().map(|Job { image, reply }| {
            let model = Arc::clone(&self.model);
            afterimage_classifier::Job::for_caller(image, Asker { model, reply })
        }));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text("classifier", "embedded");
        service::engine_stats(&self.engine, stats);
    }
}

/// A reply as the engine sees it.
struct Asker {
    model: Arc<ModelId>,
    reply: Reply,
}

impl Caller for Asker {
    fn is_late(&mut self, now: Instant) -> bool {
        !self.reply.is_wanted(now)
    }

    fn prefetch(&self) {
        self.reply.prefetch();
    }

    fn answer(self: Box<Self>, label: Result<u16, EngineError>, now: Instant) {
        let Asker { model, reply } = *self;
        let answer = match label {
            Ok(label) => Ok(Answer { label, model }),
            Err(error) => Err(Failure { status: service::status(&error), text: error.to_string() }),
        };
        reply.send_at(answer, now);
    }
}
