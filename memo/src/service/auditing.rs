//! Asking about a hit again, to see whether the classifier still says the same.

use std::sync::Arc;
use std::time::Instant;

use super::Shared;
use super::completion::check_label;
use super::model_keys::Space;
use crate::audit::Audit;
use crate::key::{ImageHash, ModelId};
use crate::upstream::{Answer, Classifier, Failure, Job, Owner, Reply};

/// A question that nobody waits for.
struct Question<C> {
    shared: Arc<Shared<C>>,
    space: Arc<Space>,
    hash: ImageHash,
    request_id: u64,
    /// What was remembered, and answered.
    class: u16,
}

impl<C: Classifier> Shared<C> {
    /// Asks about a hit again, if the classifier has nothing else to do.
    #[cold]
    pub(super) fn audit(
        self: &Arc<Self>,
        audit: &Audit,
        space: &Arc<Space>,
        hash: ImageHash,
        request_id: u64,
        image: &[u8],
        class: u16,
    ) {
        if audit.begin(|| self.classifier.is_idle()) {
            let (shared, space) = (Arc::clone(self), Arc::clone(space));
            let reply = Reply::to(Question { shared, space, hash, request_id, class });
            self.classifier.classify(vec![Job { image: image.into(), reply }]);
        }
    }
}

impl<C: Classifier> Owner for Question<C> {
    fn model(&self) -> Option<&Arc<ModelId>> {
        Some(&self.space.model)
    }

    fn request_id(&self) -> u64 {
        self.request_id
    }

    fn answer(self: Box<Self>, answer: Result<Answer, Failure>, _: Instant) {
        let Question { shared, space, hash, request_id, class } = *self;
        let Some(audit) = &shared.audit else { return };
        // Another model's opinion says nothing about this one's answers.
        let label = match answer.and_then(check_label) {
            Ok(Answer { label, model }) if *model == *space.model => label,
            _ => return audit.end(None),
        };
        if label != class {
            let key = format_args!("{:016x}", hash.cache_key());
            tracing::error!(
                id = request_id, %key, remembered = class, computed = label,
                "a remembered answer is not the classifier's: the entry is put right"
            );
            shared.store.write(hash.cache_key(), space.keys.seal(hash, label));
        }
        audit.end(Some(label == class));
    }
}
