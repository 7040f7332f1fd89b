//! Waiters: futures and callbacks that get the outcome of a request.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::oneshot;

use super::error::{CallError, Violation};
use super::infer::Inference;
use crate::proto::message::Classification;
use crate::proto::stats::Stats;
use crate::proto::{Kind, Snapshot, Welcome};

/// The content of a reply.
#[derive(Debug)]
pub(super) enum Answer {
    Classification(Classification),
    Value(Option<i64>),
    Pong,
    Stats(Box<Stats>),
    Snapshot(Snapshot),
    Bytes(Option<Bytes>),
    Inference(Box<Inference>),
    Forgotten(u64),
    Flushed,
    /// A kind that answers no request.
    Other(Kind),
}

impl Answer {
    /// The error of a caller that sent a request of another kind.
    pub(super) fn is_wrong_for(&self, request: &'static str, server: &Arc<str>) -> CallError {
        let kind = match self {
            Answer::Classification(_) => Kind::ClassifyResp,
            Answer::Value(_) => Kind::CacheResp,
            Answer::Pong => Kind::Pong,
            Answer::Stats(_) => Kind::StatsResp,
            Answer::Snapshot(_) => Kind::SnapshotResp,
            Answer::Bytes(_) => Kind::BytesResp,
            Answer::Inference(_) => Kind::InferResp,
            Answer::Forgotten(_) => Kind::ForgetResp,
            Answer::Flushed => Kind::FlushResp,
            Answer::Other(kind) => *kind,
        };
        let (server, violation) = (Arc::clone(server), Violation::WrongReply { request, kind });
        CallError::Protocol { server, violation }
    }
}

/// The argument of a classification's callback.
pub(super) type Classified = Result<(Classification, Arc<Welcome>), CallError>;

/// The argument of the callback of many reads.
pub(super) type Values = Result<Vec<Option<i64>>, CallError>;

/// The argument of the callback of one read or write of bytes.
pub(super) type BytesOutcome = Result<Option<Bytes>, CallError>;

/// The argument of an inference's callback.
pub(super) type Inferred = Result<(Inference, Arc<Welcome>), CallError>;

/// The receiver of a request's outcome. It gets exactly one.
pub(super) enum Waiter {
    /// A future.
    Future(oneshot::Sender<Result<Answer, CallError>>),
    /// A callback that also gets the `Welcome` of the connection.
    Classify(Callback<Classified>),
    /// One of many reads, by its index.
    One(Arc<Many>, u32),
    /// The same for an inference.
    Infer(Callback<Inferred>),
    /// A callback for bytes.
    Bytes(Callback<BytesOutcome>),
    /// No receiver: a cache write.
    None,
}

impl Waiter {
    /// Delivers the server's answer. `welcome` is that of the connection that brought it.
    pub(super) fn answer(self, answer: Answer, server: &Arc<str>, welcome: &Arc<Welcome>) {
        match (self, answer) {
            (Waiter::Future(sender), answer) => drop(sender.send(Ok(answer))),
            (Waiter::Classify(callback), Answer::Classification(label)) => {
                callback.call(Ok((label, Arc::clone(welcome))));
            }
            (Waiter::One(many, index), Answer::Value(value)) => many.one_more(index, value),
            (Waiter::Bytes(callback), Answer::Bytes(value)) => callback.call(Ok(value)),
            (Waiter::Infer(callback), Answer::Inference(inference)) => {
                callback.call(Ok((*inference, Arc::clone(welcome))));
            }
            (Waiter::Infer(callback), answer) => {
                callback.call(Err(answer.is_wrong_for("InferReq", server)));
            }
            (Waiter::Classify(callback), answer) => {
                callback.call(Err(answer.is_wrong_for("ClassifyReq", server)));
            }
            (Waiter::One(many, _), answer) => many.fail(answer.is_wrong_for("CacheReq", server)),
            (Waiter::Bytes(callback), answer) => {
                callback.call(Err(answer.is_wrong_for("BytesReq", server)));
            }
            (Waiter::None, _) => {}
        }
    }

    /// Delivers an error.
    pub(super) fn fail(self, error: CallError) {
        match self {
            Waiter::Future(sender) => drop(sender.send(Err(error))),
            Waiter::Classify(callback) => callback.call(Err(error)),
            Waiter::One(many, _) => many.fail(error),
            Waiter::Infer(callback) => callback.call(Err(error)),
            Waiter::Bytes(callback) => callback.call(Err(error)),
            Waiter::None => {}
        }
    }

    /// Whether this is one of these reads.
    pub(super) fn is_one_of(&self, many: &Arc<Many>) -> bool {
        matches!(self, Waiter::One(own, _) if Arc::ptr_eq(own, many))
    }
}

/// A function that is called exactly once. If it is dropped uncalled, it gets
/// [`CallError::Closed`].
pub(super) struct Callback<R: FromClosed>(Option<Box<dyn FnOnce(R) + Send>>);

/// An outcome with a value for "the client is closed".
pub(super) trait FromClosed {
    fn closed() -> Self;
}

impl<T> FromClosed for Result<T, CallError> {
    fn closed() -> Self {
        Err(CallError::Closed)
    }
}

impl<R: FromClosed> Callback<R> {
    pub(super) fn new(function: impl FnOnce(R) + Send + 'static) -> Self {
        Callback(Some(Box::new(function)))
    }

    pub(super) fn call(mut self, outcome: R) {
        self.spend(outcome);
    }

    fn spend(&mut self, outcome: R) {
        if let Some(function) = self.0.take() {
            // A panic in one callback must not end the connection of all other callers.
            if catch_unwind(AssertUnwindSafe(|| function(outcome))).is_err() {
                tracing::error!("a reply callback panicked");
            }
        }
    }
}

impl<R: FromClosed> Drop for Callback<R> {
    fn drop(&mut self) {
        if self.0.is_some() {
            self.spend(R::closed());
        }
    }
}

/// Many reads with one outcome: one allocation and one callback for all.
pub(super) struct Many(Mutex<ManyState>);

struct ManyState {
    values: Vec<Option<i64>>,
    missing: usize,
    callback: Option<Callback<Values>>,
}

impl Many {
    /// Waits for `reads` values, at least one.
    pub(super) fn new(reads: usize, callback: Callback<Values>) -> Arc<Self> {
        debug_assert!(reads > 0, "no reads are never answered");
        Arc::new(Many(Mutex::new(ManyState {
            values: vec![None; reads],
            missing: reads,
            callback: Some(callback),
        })))
    }

    /// Whether every read has its value.
    pub(super) fn is_answered(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).missing == 0
    }

    fn one_more(&self, index: u32, value: Option<i64>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(place) = state.values.get_mut(index as usize) {
            *place = value;
        }
        state.missing = state.missing.saturating_sub(1);
        if state.missing == 0
            && let Some(callback) = state.callback.take()
        {
            let values = std::mem::take(&mut state.values);
            drop(state);
            callback.call(Ok(values));
        }
    }

    /// Fails all reads: one error is the outcome, and later answers are dropped.
    pub(super) fn fail(&self, error: CallError) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let callback = state.callback.take();
        drop(state);
        if let Some(callback) = callback {
            callback.call(Err(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn counting(calls: &Arc<AtomicUsize>) -> Callback<Values> {
        let calls = Arc::clone(calls);
        Callback::new(move |_| {
            calls.fetch_add(1, Ordering::SeqCst);
        })
    }

    #[test]
    fn a_callback_is_called_when_it_is_dropped() {
        let calls = Arc::new(AtomicUsize::new(0));
        drop(counting(&calls));
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        counting(&calls).call(Ok(Vec::new()));
        assert_eq!(calls.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_panic_in_a_callback_stays_there() {
        Callback::<Values>::new(|_| panic!("on purpose")).call(Ok(Vec::new()));
    }

    #[test]
    fn many_reads_that_fail_one_by_one_fail_once() {
        let calls = Arc::new(AtomicUsize::new(0));
        let many = Many::new(3, counting(&calls));
        many.one_more(1, Some(1));
        many.fail(CallError::Closed);
        many.fail(CallError::Closed);
        many.one_more(0, None);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }
}
