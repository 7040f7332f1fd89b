//! The embedded classifier: the compute engine as a memo's upstream, without a network between.

use std::sync::Arc;
use std::time::Instant;

use afterimage_classifier::{Caller, Engine, EngineError, Model, service};
use afterimage_wire::proto::stats::Stats;

use afterimage_memo::upstream::{Answer, Failure, Job, Reply};
use afterimage_memo::{Classifier, ModelId};

/// An engine and its model.
#[derive(Debug)]
pub struct Embedded {
    model: Arc<ModelId>,
    engine: Arc<Engine>,
}

impl Embedded {
    /// A classifier that scores with `engine`, which has `model`.
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
            afterimage_classifier::Job::for_caller(image, EngineReply { model, reply })
        }));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text("classifier", "embedded");
        service::engine_stats(&self.engine, stats);
    }
}

/// A memo's reply behind the engine's interface.
struct EngineReply {
    model: Arc<ModelId>,
    reply: Reply,
}

impl Caller for EngineReply {
    fn is_late(&mut self, now: Instant) -> bool {
        !self.reply.is_wanted(now)
    }

    fn prefetch(&self) {
        self.reply.prefetch();
    }

    fn answer(self: Box<Self>, label: Result<u16, EngineError>, now: Instant) {
        let EngineReply { model, reply } = *self;
        let answer = match label {
            Ok(label) => Ok(Answer { label, model }),
            Err(error) => Err(Failure { status: service::status(&error), text: error.to_string() }),
        };
        reply.send_at(answer, now);
    }
}
