//! Bodies of requests: streamed with a time limit, or collected within limits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use afterimage_core::{ByteBudget, BytePermit};
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::HeaderMap;
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep_until};

/// The first allocation of a body that comes in parts. The stated length of a body that never
/// comes takes no more.
const FIRST_BYTES: usize = 256 << 10;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StallError {
    /// The client sent no part of the body for this time.
    #[error("no part of the request's body arrived for {0:?}")]
    Stalled(Duration),
    /// The connection failed, or the client broke the rules of HTTP.
    #[error(transparent)]
    Http(#[from] hyper::Error),
}

/// The body of a request as it arrives. It fails when no part arrives for `body_timeout`.
pub struct RequestBody {
    inner: Incoming,
    stalled: Option<Pin<Box<Sleep>>>,
    body_timeout: Duration,
}

impl RequestBody {
    pub(crate) fn new(inner: Incoming, body_timeout: Duration) -> Self {
        RequestBody { inner, stalled: None, body_timeout }
    }
}

impl std::fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestBody").finish_non_exhaustive()
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = StallError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StallError>>> {
        let RequestBody { inner, stalled, body_timeout } = &mut *self;
        if let Poll::Ready(frame) = Pin::new(inner).poll_frame(context) {
            *stalled = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(StallError::from)));
        }
        let late = || Box::pin(sleep_until(Instant::now() + *body_timeout));
        let stalled = stalled.get_or_insert_with(late);
        stalled.as_mut().poll(context).map(|()| Some(Err(StallError::Stalled(*body_timeout))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A request's body in memory.
#[derive(Debug)]
pub struct Collected {
    /// The bytes.
    pub bytes: Bytes,
    /// Trailer fields, if the body had some.
    pub trailers: Option<HeaderMap>,
    /// The bytes in the budget.
    pub permit: BytePermit,
}

/// Why a body was not collected.
#[derive(Debug)]
pub enum Uncollected {
    /// It exceeds the limit of one body, or the budget of all. It can still be forwarded.
    TooLarge(Rest),
    /// It ended early.
    Failed(StallError),
}

/// A body of which the first part was read already.
#[derive(Debug)]
pub struct Rest {
    /// Whether the limit of one body was exceeded; else the budget of all.
    pub exceeds_limit: bool,
    first: Option<Bytes>,
    second: Option<Bytes>,
    body: RequestBody,
}

impl Body for Rest {
    type Data = Bytes;
    type Error = StallError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, StallError>>> {
        let this = &mut *self;
        if let Some(bytes) = this.first.take().or_else(|| this.second.take()) {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        Pin::new(&mut this.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.second.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let read = [&self.first, &self.second].into_iter().flatten().map(Bytes::len).sum::<usize>();
        let mut hint = self.body.size_hint();
        match hint.exact() {
            Some(left) => hint.set_exact(left + read as u64),
            None => hint.set_lower(hint.lower() + read as u64),
        }
        hint
    }
}

impl Collected {
    /// Reads the whole body. A body that arrives in one part is not copied.
    ///
    /// # Errors
    /// [`Uncollected::TooLarge`] with the body, when it has more than `limit` bytes or `budget` has
    /// no place for it; [`Uncollected::Failed`] when it ended early.
    pub async fn read(
        mut body: RequestBody,
        limit: usize,
        budget: &ByteBudget,
    ) -> Result<Self, Uncollected> {
        let mut permit = budget.take(0).expect("0 bytes fit in any budget");
        let expected = body.size_hint().exact();
        if expected.is_some_and(|expected| expected > limit as u64) {
            let rest = Rest { exceeds_limit: true, first: None, second: None, body };
            return Err(Uncollected::TooLarge(rest));
        }
        let (mut first, mut parts, mut trailers) = (None::<Bytes>, BytesMut::new(), None);
        while let Some(frame) = body.frame().await {
            let part = match frame.map_err(Uncollected::Failed)?.into_data() {
                Ok(part) => part,
                Err(frame) => {
                    trailers = frame.into_trailers().ok();
                    continue;
                }
            };
            if part.is_empty() {
                continue;
            }
            let len = permit.bytes() + part.len();
            let exceeds_limit = len > limit;
            if exceeds_limit || !permit.resize(len) {
                let read = first.unwrap_or_else(|| parts.freeze());
                let first = (!read.is_empty()).then_some(read);
                let rest = Rest { exceeds_limit, first, second: Some(part), body };
                return Err(Uncollected::TooLarge(rest));
            }
            match first.take() {
                None if parts.is_empty() => first = Some(part),
                before => {
                    if let Some(before) = before {
                        let stated = expected.map_or(0, |expected| expected as usize);
                        parts.reserve(stated.clamp(len, FIRST_BYTES.max(len)));
                        parts.extend_from_slice(&before);
                    }
                    parts.extend_from_slice(&part);
                }
            }
        }
        let bytes = first.unwrap_or_else(|| parts.freeze());
        Ok(Collected { bytes, trailers, permit })
    }
}
