//! Requests, as every front end makes them.

use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Rows};
use bytes::Bytes;

/// Rows of one request. A larger batch is a mistake, or an attack.
pub const MAX_ROWS: usize = 1 << 16;

/// Rows to answer with one model.
///
/// ```
/// use std::time::Duration;
/// use afterimage_memo::Request;
///
/// let one = Request::row("an input");
/// let batch = Request::rows(["first", "second"]).model("resnet").fresh();
/// assert_eq!(batch.rows.len(), 2);
/// # drop(one);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Request {
    /// The model's name; empty for the only model, or the one that was added without a name.
    pub model: String,
    /// The model's version; empty for the one that the upstream has.
    pub version: String,
    /// The inputs, 1 to [`MAX_ROWS`]. Equal bytes are equal inputs.
    pub rows: Rows<Bytes>,
    /// The time when the client stops waiting.
    pub deadline: Option<Instant>,
    /// How to use the store.
    pub directives: Directives,
    /// The client, for fair queues: a connection, a token or a tenant.
    pub client: ClientId,
    /// The client's id of the request, for logs.
    pub id: u64,
}

/// How a request uses the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    /// Compute, also when the store has an answer. The new answer replaces it.
    pub refresh: bool,
    /// Store nothing for this request.
    pub no_store: bool,
    /// Keep the answer for this time; `None` for the model's.
    pub ttl: Option<Duration>,
}

impl Request {
    /// A request of one row.
    pub fn row(row: impl Into<Bytes>) -> Self {
        Request::rows([row])
    }

    /// A request of several rows.
    pub fn rows<B: Into<Bytes>>(rows: impl IntoIterator<Item = B>) -> Self {
        Request { rows: rows.into_iter().map(Into::into).collect(), ..Request::default() }
    }

    /// The same for the model of this name.
    #[must_use]
    pub fn model(mut self, name: impl Into<String>) -> Self {
        self.model = name.into();
        self
    }

    /// The same with a deadline.
    #[must_use]
    pub fn deadline(mut self, deadline: Instant) -> Self {
        self.deadline = Some(deadline);
        self
    }

    /// The same, computed also when the store has an answer.
    #[must_use]
    pub fn fresh(mut self) -> Self {
        self.directives.refresh = true;
        self
    }

    /// The same, without storing the answers.
    #[must_use]
    pub fn no_store(mut self) -> Self {
        self.directives.no_store = true;
        self
    }
}
