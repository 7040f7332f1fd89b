//! Inference: rows for a model, and its answers.

use std::num::NonZeroU16;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::RowAnswer;
use afterimage_core::model::DIGEST_LEN;
use bytes::Bytes;

use super::connection_error::Violation;
use super::error::CallError;
use super::request::EncodedRequest;
use crate::proto::infer::{MAX_NAME_LEN, MAX_ROWS, Rows};
use crate::proto::{InferReq, Kind};

/// Rows to answer with one model.
///
/// ```no_run
/// # async fn example(client: afterimage_wire::Client) -> Result<(), afterimage_wire::CallError> {
/// use afterimage_wire::client::Infer;
///
/// let answers = client.infer(&Infer::rows("resnet", ["first row", "second row"])).await?;
/// for row in answers.rows {
///     println!("{:?}, {:?}", row.origin, row.answer);
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Infer {
    model: String,
    version: String,
    refresh: bool,
    no_store: bool,
    ttl: Option<Duration>,
    count: usize,
    /// The encoded rows.
    rows: Vec<u8>,
}

impl Infer {
    /// Rows for the model of this name; empty for the model of the Welcome. Equal bytes are
    /// equal rows.
    ///
    /// # Panics
    /// If a row has 4 GiB or more.
    pub fn rows<B: AsRef<[u8]>>(
        model: impl Into<String>,
        rows: impl IntoIterator<Item = B>,
    ) -> Self {
        let (mut encoded, mut count) = (Vec::new(), 0);
        for row in rows {
            Rows::put(&mut encoded, row.as_ref());
            count += 1;
        }
        Infer {
            model: model.into(),
            version: String::new(),
            refresh: false,
            no_store: false,
            ttl: None,
            count,
            rows: encoded,
        }
    }

    /// The same for this version of the model; without it, the server's present version answers.
    #[must_use]
    pub fn version(mut self, version: impl Into<String>) -> Self {
        self.version = version.into();
        self
    }

    /// The same, computed also when the store has the answers. The new answers replace them.
    #[must_use]
    pub fn refresh(mut self) -> Self {
        self.refresh = true;
        self
    }

    /// The same, without storing the answers.
    #[must_use]
    pub fn no_store(mut self) -> Self {
        self.no_store = true;
        self
    }

    /// The same with answers that are stored for this time, in whole seconds, at least one.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Flags and body of its frame, and where the budget is in the body.
    pub(super) fn encode(&self, timeout: Duration) -> Result<Encoded, CallError> {
        for (what, name) in [("model", &self.model), ("version", &self.version)] {
            check_name(what, name)?;
        }
        if !(1..=MAX_ROWS as usize).contains(&self.count) {
            let reason = format!("{} rows; the range is 1 to {MAX_ROWS}", self.count);
            return Err(CallError::Invalid { reason: reason.into() });
        }
        let rows = Rows::new(self.count as u32, &self.rows).expect("`rows` has encoded them");
        let request = InferReq {
            model: &self.model,
            version: &self.version,
            refresh: self.refresh,
            no_store: self.no_store,
            ttl_s: ttl_s(self.ttl),
            // A time that the field cannot hold is no limit.
            budget_ms: u32::try_from(timeout.as_millis()).unwrap_or(0),
            rows,
        };
        let mut body = Vec::with_capacity(request.body_len());
        request.encode(&mut body);
        Ok(Encoded { flags: request.flags(), body: body.into(), budget_at: request.budget_at() })
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }
}

/// An encoded request.
pub(super) struct Encoded {
    pub(super) flags: u8,
    pub(super) body: Bytes,
    pub(super) budget_at: NonZeroU16,
}

impl Encoded {
    pub(super) fn request(&self) -> EncodedRequest<&Bytes> {
        let Encoded { flags, ref body, budget_at } = *self;
        let (kind, budget_at) = (Kind::InferReq, Some(budget_at));
        EncodedRequest { kind, flags, has_budget: false, budget_at, body }
    }
}

/// The answers to an [`Infer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inference {
    /// The digest of the model that computed the answers.
    pub digest: [u8; DIGEST_LEN],
    /// One answer for each row, in order.
    pub rows: Vec<RowAnswer>,
}

impl Inference {
    /// The inference, if it has an answer for each row.
    pub(super) fn check(self, rows: usize, server: &Arc<str>) -> Result<Self, CallError> {
        let answers = self.rows.len();
        if answers == rows {
            return Ok(self);
        }
        let violation = Violation::WrongAnswers { answers, rows };
        Err(CallError::Protocol { server: Arc::clone(server), violation })
    }
}

/// A time to live on the wire: whole seconds, at least 1; 0 for none.
pub(super) fn ttl_s(ttl: Option<Duration>) -> u32 {
    ttl.map_or(0, |ttl| u32::try_from(ttl.as_secs().max(1)).unwrap_or(u32::MAX))
}

/// Checks the length of a model's name or version.
pub(super) fn check_name(what: &str, name: &str) -> Result<(), CallError> {
    let bytes = name.len();
    if bytes > MAX_NAME_LEN {
        let reason = format!("the {what} has {bytes} bytes; the limit is {MAX_NAME_LEN}");
        return Err(CallError::Invalid { reason: reason.into() });
    }
    Ok(())
}
