//! Requests, as every front end makes them.

use std::any::Any;
use std::fmt;
use std::sync::Arc;
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
    /// A value for the endpoints of the model. It is not part of the key.
    pub context: Option<Context>,
    /// The bytes of the buffer that all rows are parts of; 0 if each row has memory of its own. A
    /// few rows that wait are copied, so that they do not keep a large buffer in memory.
    pub shared_len: usize,
}

/// A value that a front end sends along with a request to its own endpoints, for example the
/// client's request as it arrived.
///
/// It must not change the answer: equal rows share a call with any contexts.
#[derive(Clone)]
pub struct Context(Arc<dyn Any + Send + Sync>);

impl Context {
    /// A context with this value.
    pub fn new<T: Any + Send + Sync>(value: Arc<T>) -> Self {
        Context(value)
    }

    /// The value, if it has this type.
    pub fn get<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        Arc::clone(&self.0).downcast().ok()
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// How a request uses the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Directives {
    /// Compute, also when the store has an answer. The new answer replaces it.
    pub refresh: bool,
    /// Store nothing for this request.
    pub no_store: bool,
    /// Use the answer for this time, if the model's is not shorter; `None` for the model's.
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

    /// The same with a value for the endpoints of the model.
    #[must_use]
    pub fn context(mut self, context: Context) -> Self {
        self.context = Some(context);
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
