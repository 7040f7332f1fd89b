//! Waiters: futures and replies that get the outcome of a request.

use std::sync::{Arc, Mutex, PoisonError};

use afterimage_core::{Outcome, Reply};
use bytes::Bytes;
use tokio::sync::oneshot;

use super::connection_error::Violation;
use super::error::CallError;
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

/// The outcome of a classification: the label, and the [`Welcome`] of its connection.
pub type Classified = Result<(Classification, Arc<Welcome>), CallError>;

/// The outcome of an inference: the answers, and the [`Welcome`] of its connection.
pub type Inferred = Result<(Inference, Arc<Welcome>), CallError>;

/// The outcome of many reads: the values, in the order of the keys.
pub type Values = Result<Vec<Option<i64>>, CallError>;

/// The outcome of a read of bytes, if the key has some.
pub type BytesRead = Result<Option<Bytes>, CallError>;

/// The outcome of a write of bytes.
pub type Written = Result<(), CallError>;

/// The receiver of a request's outcome. It gets exactly one.
pub(super) enum Waiter {
    /// A future.
    Future(oneshot::Sender<Result<Answer, CallError>>),
    /// A reply that also gets the `Welcome` of the connection.
    Classify(Reply<Classified>),
    /// The same for an inference of this number of rows.
    Infer(Reply<Inferred>, usize),
    /// One of many reads, by its index.
    One(Arc<Many>, u32),
    /// The reply to a read of bytes.
    BytesRead(Reply<BytesRead>),
    /// The reply to a write of bytes.
    Written(Reply<Written>),
    /// No receiver: a cache write.
    None,
}

impl Outcome for CallError {
    fn abandoned() -> Self {
        CallError::Closed
    }
}

impl Waiter {
    /// Delivers the server's answer. `welcome` is that of the connection that brought it.
    pub(super) fn answer(self, answer: Answer, server: &Arc<str>, welcome: &Arc<Welcome>) {
        match (self, answer) {
            (Waiter::Future(sender), answer) => drop(sender.send(Ok(answer))),
            (Waiter::Classify(reply), Answer::Classification(label)) => {
                reply.send(Ok((label, Arc::clone(welcome))));
            }
            (Waiter::Infer(reply, rows), Answer::Inference(inference)) => {
                let checked = inference.check(rows, server);
                reply.send(checked.map(|inference| (inference, Arc::clone(welcome))));
            }
            (Waiter::Infer(reply, _), answer) => {
                reply.send(Err(answer.is_wrong_for("InferReq", server)));
            }
            (Waiter::One(many, index), Answer::Value(value)) => many.one_more(index, value),
            (Waiter::BytesRead(reply), Answer::Bytes(value)) => drop(reply.send(Ok(value))),
            (Waiter::Written(reply), Answer::Bytes(_)) => drop(reply.send(Ok(()))),
            (Waiter::Classify(reply), answer) => {
                reply.send(Err(answer.is_wrong_for("ClassifyReq", server)));
            }
            (Waiter::One(many, _), answer) => many.fail(answer.is_wrong_for("CacheReq", server)),
            (Waiter::BytesRead(reply), answer) => {
                reply.send(Err(answer.is_wrong_for("BytesReq", server)));
            }
            (Waiter::Written(reply), answer) => {
                reply.send(Err(answer.is_wrong_for("BytesReq", server)));
            }
            (Waiter::None, _) => {}
        }
    }

    /// Delivers an error.
    pub(super) fn fail(self, error: CallError) {
        match self {
            Waiter::Future(sender) => drop(sender.send(Err(error))),
            Waiter::Classify(reply) => drop(reply.send(Err(error))),
            Waiter::Infer(reply, _) => drop(reply.send(Err(error))),
            Waiter::One(many, _) => many.fail(error),
            Waiter::BytesRead(reply) => drop(reply.send(Err(error))),
            Waiter::Written(reply) => drop(reply.send(Err(error))),
            Waiter::None => {}
        }
    }

    /// Whether this is one of these reads.
    pub(super) fn is_one_of(&self, many: &Arc<Many>) -> bool {
        matches!(self, Waiter::One(own, _) if Arc::ptr_eq(own, many))
    }
}

/// Many reads with one outcome: one allocation and one reply for all.
pub(super) struct Many(Mutex<ManyState>);

struct ManyState {
    values: Vec<Option<i64>>,
    missing: usize,
    reply: Option<Reply<Values>>,
}

impl Many {
    /// Waits for `reads` values, at least one.
    pub(super) fn new(reads: usize, reply: Reply<Values>) -> Arc<Self> {
        debug_assert!(reads > 0, "no reads are never answered");
        Arc::new(Many(Mutex::new(ManyState {
            values: vec![None; reads],
            missing: reads,
            reply: Some(reply),
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
            && let Some(reply) = state.reply.take()
        {
            let values = std::mem::take(&mut state.values);
            drop(state);
            reply.send(Ok(values));
        }
    }

    /// Fails all reads: one error is the outcome, and later answers are dropped.
    pub(super) fn fail(&self, error: CallError) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let reply = state.reply.take();
        drop(state);
        if let Some(reply) = reply {
            reply.send(Err(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn many_reads_that_fail_one_by_one_fail_once() {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let reply = Reply::call(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let many = Many::new(3, reply);
        many.one_more(1, Some(1));
        many.fail(CallError::Closed);
        many.fail(CallError::Closed);
        many.one_more(0, None);
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_dropped_reply_says_that_the_client_is_closed() {
        let (sender, outcome) = std::sync::mpsc::channel();
        drop(Many::new(1, Reply::call(move |values| sender.send(values).unwrap())));
        assert!(matches!(outcome.recv().unwrap(), Err(CallError::Closed)));
    }
}
