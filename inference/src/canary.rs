//! Canaries: calls whose answers are known and that are asked again at each poll.
//!
//! A model that is replaced in place can keep its name, version, configuration and counters. Its
//! answers show it. A canary is a call of a client without credentials, with its answer. When a
//! server gives another answer twice, the model has changed. Two different answers to one question
//! show that the model's answers vary; then canaries prove nothing and are not used.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::BytePermit;
use bytes::Bytes;

use crate::compare::{Again, Comparison, Repeated};
use crate::content::Content;
use crate::forward::Replica;

/// The largest relative difference between two answers to one question that counts as rounding.
const ROUNDING: f64 = 1e-3;

/// Two answers may differ by this multiple of the rounding that was seen.
const MARGIN: f64 = 4.0;

/// A call with its known answers.
pub(crate) struct Canary {
    pub(crate) again: Again,
    pub(crate) content: Content,
    pub(crate) answers: Vec<Bytes>,
    /// The bytes in the budget of all canaries.
    pub(crate) permit: Option<BytePermit>,
}

/// The canaries of a model.
pub(crate) struct Canaries {
    most: usize,
    wants_more: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The next one to ask is the first.
    canaries: VecDeque<Arc<Canary>>,
    /// The model gives several answers to one question.
    varies: bool,
    /// The rounding between two answers to one question.
    rounding: f64,
}

/// What a server's answer to a canary shows.
enum Shown {
    Same,
    /// The server gives another answer than before.
    Changed,
    /// The server gives different answers.
    Varies,
    /// Its answers differ by this rounding.
    Rounds(f64),
}

impl Canaries {
    pub(crate) fn new(most: usize) -> Self {
        Canaries { most, wants_more: AtomicBool::new(most > 0), state: Mutex::default() }
    }

    /// Whether a further canary is of use.
    pub(crate) fn wants_more(&self) -> bool {
        self.wants_more.load(Relaxed)
    }

    /// Takes a canary over, unless there is one with the same question.
    pub(crate) fn add(&self, canary: Canary) {
        let mut state = self.lock();
        let is_known = state.canaries.iter().any(|known| known.again.body() == canary.again.body());
        if !is_known && !state.varies && state.canaries.len() < self.most {
            state.canaries.push_back(Arc::new(canary));
        }
        self.wants_more.store(!state.varies && state.canaries.len() < self.most, Relaxed);
    }

    /// The number of canaries; `None` if the model's answers vary.
    pub(crate) fn len(&self) -> Option<usize> {
        let state = self.lock();
        (!state.varies).then_some(state.canaries.len())
    }

    /// Deletes all canaries: the model has changed.
    pub(crate) fn clear(&self) {
        *self.lock() = State::default();
        self.wants_more.store(self.most > 0, Relaxed);
    }

    /// Asks each server again, one canary at least, and further ones within `budget`. Whether a
    /// server gives other answers than before, beyond `tolerance`.
    pub(crate) async fn have_changed<'a>(
        &self,
        replicas: impl Iterator<Item = &'a Replica> + Clone,
        tolerance: f64,
        budget: Duration,
        limit: usize,
    ) -> bool {
        let began = Instant::now();
        let count = self.lock().canaries.len();
        for _ in 0..count {
            let canary = {
                let mut state = self.lock();
                let Some(canary) = state.canaries.pop_front() else { return false };
                state.canaries.push_back(Arc::clone(&canary));
                canary
            };
            for replica in replicas.clone() {
                let tolerance = tolerance.max(self.lock().rounding * MARGIN);
                match canary.shows(replica, tolerance, limit).await {
                    Shown::Same => {}
                    Shown::Changed => return true,
                    Shown::Varies => {
                        let mut state = self.lock();
                        (state.varies, state.canaries) = (true, VecDeque::new());
                        self.wants_more.store(false, Relaxed);
                        return false;
                    }
                    Shown::Rounds(rounding) => {
                        let mut state = self.lock();
                        state.rounding = state.rounding.max(rounding);
                    }
                }
            }
            if began.elapsed() >= budget {
                return false;
            }
        }
        false
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before the next one, so a poisoned value is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Canary {
    async fn shows(&self, replica: &Replica, tolerance: f64, limit: usize) -> Shown {
        let ask = || self.again.ask(replica, &self.content, None, limit);
        let Repeated::Answers(first) = ask().await else { return Shown::Same };
        let known: Vec<&Bytes> = self.answers.iter().collect();
        let change = Comparison::of(&self.content, &known, &first);
        if change.greatest <= tolerance {
            return Shown::Same;
        }
        // Either the model is another one, or its answers vary.
        let Repeated::Answers(second) = ask().await else { return Shown::Same };
        let first: Vec<&Bytes> = first.iter().collect();
        let noise = Comparison::of(&self.content, &first, &second);
        if noise.disagreements == 0 || change.greatest > noise.greatest * MARGIN {
            return Shown::Changed;
        }
        if noise.relative <= ROUNDING { Shown::Rounds(noise.greatest) } else { Shown::Varies }
    }
}
