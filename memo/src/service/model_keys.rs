//! Whose answers are remembered: the keys of the classifier's present model, and who hears of a
//! change.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_wire::Status;
use afterimage_wire::server::Watchers;
use afterimage_wire::text::escape_text;
use arc_swap::{ArcSwapOption, Guard};

use crate::key::{KeySpace, ModelId, Secret};
use crate::upstream::Classifier;

/// The keys of one model.
#[derive(Debug)]
pub(super) struct Space {
    /// As the classifier gave it: the same `Arc` means the same model without a look at it.
    pub(super) model: Arc<ModelId>,
    pub(super) keys: KeySpace,
    /// The generation that began with this model.
    pub(super) generation: u64,
}

/// The present space, and the way to the next one.
#[derive(Debug)]
pub(super) struct ModelKeys {
    secret: Secret,
    present: ArcSwapOption<Space>,
    /// Held while the present is changed; the model for which there are no keys, and why.
    refused: Mutex<Option<(Arc<ModelId>, String)>>,
    /// Goes up with every change of the present.
    generation: AtomicU64,
    met: AtomicU64,
    pub(super) watchers: Watchers,
}

impl ModelKeys {
    pub(super) fn new(secret: Secret) -> Self {
        ModelKeys {
            secret,
            present: ArcSwapOption::empty(),
            refused: Mutex::new(None),
            generation: AtomicU64::new(0),
            met: AtomicU64::new(0),
            watchers: Watchers::default(),
        }
    }

    /// The present space, as it was at the last [`refresh`](Self::refresh).
    #[inline]
    pub(super) fn present(&self) -> Guard<Option<Arc<Space>>> {
        self.present.load()
    }

    /// Models that were met so far.
    pub(super) fn met(&self) -> u64 {
        self.met.load(Relaxed)
    }

    /// Brings the space up to the classifier's present model and gives the generation. Whoever was
    /// told of an older one is told of a change.
    #[inline]
    pub(super) fn refresh(&self, classifier: &impl Classifier) -> u64 {
        let Some(model) = classifier.model() else {
            return self.generation.load(Relaxed);
        };
        match &*self.present() {
            Some(space) if Arc::ptr_eq(&space.model, &model) => space.generation,
            _ => self.change(classifier),
        }
    }

    /// One at a time, and with another look: two threads that meet a new model must not count it
    /// twice, nor the slower one bring an older one back.
    #[cold]
    fn change(&self, classifier: &impl Classifier) -> u64 {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.generation.load(Relaxed);
        let Some(model) = classifier.model() else { return before };
        let present = self.present.load_full();
        let is_known = |known: &Arc<ModelId>| Arc::ptr_eq(known, &model);
        if present.as_ref().is_some_and(|space| is_known(&space.model))
            || refused.as_ref().is_some_and(|(known, _)| is_known(known))
        {
            return before;
        }
        let generation = before + 1;
        let next = match KeySpace::new(&self.secret, (*model).clone()) {
            Ok(keys) => {
                *refused = None;
                self.met.fetch_add(1, Relaxed);
                if present.is_some() {
                    tracing::info!("the classifier has another model; its answers have other keys");
                }
                Some(Arc::new(Space { model, keys, generation }))
            }
            Err(why) => {
                tracing::warn!("answers cannot be stored: {why}");
                *refused = Some((model, why));
                None
            }
        };
        // In this order: a thread that reads the new generation must find the new keys.
        self.present.store(next);
        self.generation.store(generation, Relaxed);
        drop(refused);
        self.watchers.notify();
        generation
    }

    /// The generation, without a look at the classifier.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// Why there are no keys: the status and the text for clients.
    pub(super) fn why_none(&self, classifier: &impl Classifier) -> (Status, String) {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*refused, classifier.trouble()) {
            (Some((_, why)), _) => (Status::UpstreamError, why.clone()),
            (None, Some(trouble)) => {
                let trouble = escape_text(&trouble);
                (Status::UpstreamCrashed, format!("cannot connect to the classifier: {trouble}"))
            }
            (None, None) => (Status::UpstreamCrashed, "not connected to a classifier yet".into()),
        }
    }
}
