//! An inference call over gRPC on its way through the memo: the client's message, and the server's
//! reply that is for this client alone.

use std::sync::{Mutex, PoisonError};

use afterimage_core::BytePermit;
use bytes::{BufMut, Bytes, BytesMut};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, StatusCode};

use super::channel::Replied;
use super::message::framed;
use crate::call::{self, GRPC};
use crate::oip;

/// A call of a client, with its message in memory. Endpoints get it as the context of the request.
pub(crate) struct Call {
    pub(crate) path: PathAndQuery,
    /// The metadata, as the server gets it.
    pub(crate) headers: HeaderMap,
    /// The message with its prefix, as the client sent it.
    pub(crate) body: Bytes,
    /// The name and the version of the model in the message.
    pub(crate) model: (Option<String>, Option<String>),
    /// The rows of the message, if the memo answers each for itself.
    pub(crate) rows: Option<oip::Rows>,
    /// The reply to a call that succeeded, as the server sent it.
    success: Mutex<Option<Replied>>,
    /// A reply that only this client may have.
    own: Mutex<Option<Replied>>,
    /// The message's bytes in the budget.
    _memory: BytePermit,
}

impl Call {
    pub(crate) fn new(
        path: PathAndQuery,
        headers: HeaderMap,
        body: Bytes,
        model: (Option<String>, Option<String>),
        rows: Option<oip::Rows>,
        memory: BytePermit,
    ) -> Self {
        let (success, own) = (Mutex::default(), Mutex::default());
        Call { path, headers, body, model, rows, success, own, _memory: memory }
    }

    /// The message about some of the rows, with its prefix. `None` if it has no form in gRPC.
    pub(crate) fn body_for(&self, rows: &oip::Rows, asked: &[usize]) -> Option<Bytes> {
        let mut request = rows.select(asked);
        (request.model, request.version) = self.model.clone();
        Some(framed(&request.to_grpc()?))
    }

    pub(crate) fn set_success(&self, reply: Replied) {
        *self.success.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
    }

    pub(crate) fn take_success(&self) -> Option<Replied> {
        self.success.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn set_own(&self, reply: Replied) {
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = Some(reply);
    }

    pub(crate) fn take_own(&self) -> Option<Replied> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The payload of a failed call for its waiters over gRPC.
pub(crate) enum Payload {
    /// The reply is in the call that was made, or it is one of HTTP. Other waiters ask for
    /// themselves.
    Own,
    /// The server's error, for all waiters: its trailers.
    Shared(HeaderMap),
}

impl Payload {
    /// The bytes of [`Payload::Shared`].
    pub(crate) fn shared(trailers: &HeaderMap) -> Bytes {
        let mut out = BytesMut::new();
        out.put_u8(GRPC);
        out.put_slice(&call::Payload::shared(StatusCode::OK, trailers, b""));
        out.freeze()
    }

    /// Reads a payload that an endpoint of this crate has written.
    pub(crate) fn read(bytes: &Bytes) -> Option<Self> {
        if *bytes.first()? != GRPC {
            return Some(Payload::Own);
        }
        match call::Payload::read(bytes.slice(1..))? {
            call::Payload::Shared(response) => {
                Some(Payload::Shared(response.into_parts().0.headers))
            }
            call::Payload::Own => None,
        }
    }
}
