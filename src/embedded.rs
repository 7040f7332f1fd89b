//! The embedded classifier: the compute engine as a memo's upstream, without a network between.

use std::sync::Arc;
use std::time::Instant;

use afterimage_classifier::{Caller, Engine, EngineError, Job, Model, service};
use afterimage_core::{Answer, Computed, Failure, ModelId, Reply, Rows};
use afterimage_memo::Upstream;
use afterimage_memo::upstream::Call;
use afterimage_wire::proto::stats::Stats;

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
        let model = ModelId::labels(identity.digest, Some(identity.shape), identity.classes);
        Embedded { model: Arc::new(model), engine }
    }
}

impl Upstream for Embedded {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn is_idle(&self) -> bool {
        self.engine.is_idle()
    }

    fn compute(&self, calls: Vec<Call>) {
        self.engine.submit_many(calls.into_iter().flat_map(Call::scatter).map(|call| {
            let (model, input) = (Arc::clone(&self.model), call.row().clone());
            Job::for_caller(Vec::from(input), EngineReply { model, reply: call.reply })
                .of_client(call.client)
        }));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text(&afterimage_memo::metrics::CLASSIFIER, "embedded");
        service::engine_stats(&self.engine, stats);
    }
}

/// A memo's reply behind the engine's interface.
struct EngineReply {
    model: Arc<ModelId>,
    reply: Reply<Result<Computed, Failure>>,
}

impl Caller for EngineReply {
    fn is_wanted(&self, now: Instant) -> bool {
        self.reply.is_wanted(now)
    }

    fn prefetch(&self) {
        self.reply.prefetch();
    }

    fn answer(self: Box<Self>, label: Result<u16, EngineError>, now: Instant) {
        let EngineReply { model, reply } = *self;
        let computed = match label {
            Ok(label) => Ok(Computed { model, answers: Rows::from_elem(Answer::Label(label), 1) }),
            Err(error) => Err(service::failure(&error)),
        };
        reply.send_at(computed, now);
    }
}
