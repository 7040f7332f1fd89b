//! The embedded classifier: the compute engine as a memo's upstream, without a network between.

use std::sync::Arc;

use afterimage_classifier::{Engine, Job, Labelled, Model, argmax, service};
use afterimage_core::{Answer, Computed, Failure, ModelId, Rows, Status};
use afterimage_memo::Upstream;
use afterimage_memo::upstream::{Call, Function};
use afterimage_wire::proto::stats::Stats;

/// The name of the model that answers with scores.
pub(crate) const SCORES: &str = "scores";

/// The scores of a model as answers of bytes: the label as a `u16`, then an `f32` for each class,
/// all little-endian.
pub(crate) fn scores_of(model: Arc<Model>) -> Function {
    let mut id = ModelId::bytes(SCORES, model.digest().0);
    id.input = Some(service::identity(&model).shape);
    Function::new(id, 1, move |rows| {
        let images: Vec<&[u8]> = rows.iter().map(|row| &row[..]).collect();
        let scores = model.scores(&images);
        let scores =
            scores.map_err(|error| Failure::new(Status::BadArgument, error.to_string()))?;
        let answer = |scores: &[f32]| {
            let label = model.labels()[argmax(scores)];
            let scores = scores.iter().flat_map(|score| score.to_le_bytes());
            Answer::Bytes(label.to_le_bytes().into_iter().chain(scores).collect())
        };
        Ok(scores.rows().into_iter().filter_map(|row| row.as_slice().map(answer)).collect())
    })
}

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
            let (model, input) = (Arc::clone(&self.model), Vec::from(call.row().clone()));
            let reply = call.reply.accept(|label: Labelled| match label {
                Ok(label) => {
                    Ok(Computed { model, answers: Rows::from_elem(Answer::Label(label), 1) })
                }
                Err(error) => Err(service::failure(&error)),
            });
            Job::with_reply(input, reply).of_client(call.client)
        }));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.text(&afterimage_memo::metrics::CLASSIFIER, "embedded");
        service::engine_stats(&self.engine, stats);
    }
}
