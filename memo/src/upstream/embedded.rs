//! A classifier in the memo's own process: the compute engine without a network before it.

use std::sync::Arc;

use afterimage_classifier::{Engine, Model, service};
use afterimage_wire::proto::stats::Stats;

use super::{Answer, Classifier, Failure, Job};
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

    fn classify(&self, jobs: Vec<Job>) {
        self.engine.submit_many(jobs.into_iter().map(|Job { image, reply }| {
            let model = Arc::clone(&self.model);
            afterimage_classifier::Job::new(image, move |label| {
                reply.send(match label {
                    Ok(label) => Ok(Answer { label, model }),
                    Err(error) => {
                        Err(Failure { status: service::status(&error), text: error.to_string() })
                    }
                });
            })
        }));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text("classifier", "embedded");
        service::engine_stats(&self.engine, stats);
    }
}
