//! Answers of models, and how they came about.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use smallvec::SmallVec;

use crate::model::ModelId;
use crate::reply::Reply;
use crate::status::Failure;

/// The answer of a model for one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A class of a classifier, below its number of classes. The fast case.
    Label(u16),
    /// Any other answer: a tensor, an embedding, an image. Only the model knows its meaning.
    Bytes(Bytes),
}

impl Answer {
    /// The label, if the answer is one.
    pub fn label(&self) -> Option<u16> {
        match self {
            Answer::Label(label) => Some(*label),
            Answer::Bytes(_) => None,
        }
    }
}

/// How a row was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// The model computed the answer for this request.
    Miss,
    /// The model computed the answer once, for this request and an identical one in flight.
    Coalesced,
    /// The answer came from the store.
    Hit,
}

/// The answer of one row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowAnswer {
    /// The answer.
    pub answer: Answer,
    /// How it came about.
    pub origin: Origin,
    /// Time since the model computed it, in whole seconds; zero unless `origin` is a hit. The
    /// label table keeps no times: its hits have zero, too.
    pub age: Duration,
}

impl RowAnswer {
    /// A label, with no age.
    pub fn label(label: u16, origin: Origin) -> Self {
        RowAnswer { answer: Answer::Label(label), origin, age: Duration::ZERO }
    }
}

/// The duty to answer one row.
pub type RowReply = Reply<Result<RowAnswer, Failure>>;

/// One for most requests, without an allocation.
pub type Rows<T> = SmallVec<[T; 1]>;

/// The answers of a request, in the order of its rows.
#[derive(Clone, Debug)]
pub struct Response {
    /// The model that computed the answers.
    pub model: Arc<ModelId>,
    /// One for each row of the request.
    pub rows: Rows<RowAnswer>,
}

/// The answers that a model computed for the rows of one call, in order.
#[derive(Clone, Debug)]
pub struct Computed {
    /// The model that computed them.
    pub model: Arc<ModelId>,
    /// One for each row of the call.
    pub answers: Rows<Answer>,
}
