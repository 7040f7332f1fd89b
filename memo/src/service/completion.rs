//! What becomes of a flight: the call to the classifier, and the answer to all who wait.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use afterimage_wire::Status;
use afterimage_wire::corked;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::server::Request;
use afterimage_wire::text::escape_text;

use super::Shared;
use super::model_keys::Space;
use super::waiting::Waiter;
use crate::key::{ImageHash, ModelId};
use crate::sync;
use crate::upstream::{Answer, Classifier, Failure, Job, Owner, Reply, Wanted};

/// The request that began a flight.
pub(super) struct First {
    pub(super) hash: ImageHash,
    pub(super) request_id: u64,
    /// How long it waits, if not as long as it takes.
    pub(super) deadline: Option<Instant>,
    pub(super) image: Box<[u8]>,
}

impl First {
    pub(super) fn new(
        request: &Request<'_>,
        since: Instant,
        hash: ImageHash,
        image: &[u8],
    ) -> Self {
        let deadline = request.deadline(since);
        First { hash, request_id: request.id, deadline, image: image.into() }
    }
}

/// The call that lands the flight of an image.
struct Call<C> {
    shared: Arc<Shared<C>>,
    space: Arc<Space>,
    hash: ImageHash,
    request_id: u64,
    /// How long the first on the flight waits, if not as long as it takes. Until then it is on it,
    /// and nobody else need be looked for.
    deadline: Option<Instant>,
    asked_at: Instant,
}

impl<C: Classifier> Owner for Call<C> {
    fn wanted(&self, now: Instant) -> Wanted {
        match self.deadline {
            None => Wanted::Always,
            Some(_) => self.shared.wanted(self.hash, now),
        }
    }

    fn is_wanted(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now < deadline) || self.wanted(now) != Wanted::NoMore
    }

    fn prefetch(&self) {
        self.shared.store.prefetch_write(self.hash.cache_key());
    }

    fn model(&self) -> Option<&Arc<ModelId>> {
        Some(&self.space.model)
    }

    fn request_id(&self) -> u64 {
        self.request_id
    }

    fn answer(self: Box<Self>, answer: Result<Answer, Failure>, now: Instant) {
        let took = answer.is_ok().then(|| now.saturating_duration_since(self.asked_at));
        self.shared.call_time.end(now, took);
        self.shared.land_computed(&self.space, self.hash, answer, now);
    }
}

impl<C: Classifier> Shared<C> {
    /// The call to the classifier that lands the flight which `first` began.
    pub(super) fn job(
        self: &Arc<Self>,
        space: &Arc<Space>,
        first: First,
        asked_at: Instant,
    ) -> Job {
        let First { hash, request_id, deadline, image } = first;
        let (shared, space) = (Arc::clone(self), Arc::clone(space));
        let call = Call { shared, space, hash, request_id, deadline, asked_at };
        Job { image, reply: Reply::to(call) }
    }

    pub(super) fn call(&self, jobs: Vec<Job>) {
        if !jobs.is_empty() {
            self.counters.classifier_calls.fetch_add(jobs.len() as u64, Relaxed);
            self.call_time.start(jobs.len() as u64, sync::now());
            self.classifier.classify(jobs);
        }
    }

    /// All on the flight get what the store remembered.
    pub(super) fn land_remembered(&self, hash: ImageHash, class: u16) {
        let waiters = self.flights.land(hash.identity());
        self.counters.hits.fetch_add(waiters.len() as u64, Relaxed);
        for Waiter { later, since, span, .. } in waiters {
            span.in_scope(|| tracing::trace!(class, "remembered"));
            self.latencies.record(Origin::Hit, sync::now() - since, 1);
            later.label(Classification { label: class, origin: Origin::Hit });
        }
    }

    /// All on the flight get what the classifier said; the store gets it first, so that whoever
    /// comes after the landing finds it there.
    fn land_computed(
        &self,
        space: &Space,
        hash: ImageHash,
        answer: Result<Answer, Failure>,
        now: Instant,
    ) {
        let answer = answer.and_then(check_label).and_then(|answer| {
            // The model may have changed on the way. These are not its keys, and those who wait
            // were told of the other model when they connected: they shall ask again.
            if answer.model == space.model { Ok(answer) } else { Err(Failure::model_changed()) }
        });
        if let Ok(Answer { label, .. }) = &answer {
            self.counters.store_writes.fetch_add(1, Relaxed);
            self.store.write(hash.cache_key(), space.keys.seal(hash, *label));
        }
        let waiters = self.flights.land(hash.identity());
        match answer {
            Ok(Answer { label: class, .. }) => {
                self.counters.misses.fetch_add(1, Relaxed);
                if waiters.len() > 1 {
                    self.counters.coalesced.fetch_add(waiters.len() as u64 - 1, Relaxed);
                }
                let mut origin = Origin::Miss;
                corked(|| {
                    for Waiter { later, since, span, .. } in waiters {
                        let took = now.saturating_duration_since(since);
                        span.in_scope(|| tracing::debug!(class, ?origin, ?took, "answered"));
                        self.latencies.record(origin, took, 1);
                        later.label(Classification { label: class, origin });
                        origin = Origin::Coalesced;
                    }
                });
            }
            Err(Failure { status, text }) => {
                let text = escape_text(&text);
                self.counters.classifier_failures.fetch_add(1, Relaxed);
                corked(|| {
                    for Waiter { later, span, .. } in waiters {
                        span.in_scope(|| tracing::debug!(%status, %text, "failed"));
                        later.error(status, &text);
                    }
                });
            }
        }
    }
}

/// Refuses a label that the model cannot have given.
pub(super) fn check_label(answer: Answer) -> Result<Answer, Failure> {
    let (label, classes) = (answer.label, answer.model.classes);
    if u32::from(label) < classes {
        return Ok(answer);
    }
    let text =
        format!("the classifier answered with label {label}; its model has {classes} classes");
    Err(Failure { status: Status::UpstreamCorrupt, text })
}
