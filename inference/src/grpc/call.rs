//! An inference call over gRPC on its way through the memo: the client's message, and the server's
//! reply that is for this client alone.

use std::sync::{Mutex, PoisonError};

use afterimage_core::BytePermit;
use bytes::{BufMut, Bytes, BytesMut};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, StatusCode};

use super::channel::Replied;
use super::message::{self, framed};
use super::status;
use crate::call::{self, GRPC};
use crate::compare::Repeated;
use crate::content::{Answers, Content};
use crate::forward::Replica;
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
    /// What the message asks for.
    pub(crate) content: Content,
    /// The reply to a call that succeeded, as the server sent it.
    success: Mutex<Option<Replied>>,
    /// A reply that only this client may have.
    own: Mutex<Option<Replied>>,
    /// The message's bytes in the budget.
    _memory: Option<BytePermit>,
}

impl Call {
    pub(crate) fn new(
        path: PathAndQuery,
        headers: HeaderMap,
        body: Bytes,
        model: (Option<String>, Option<String>),
        content: Content,
        memory: BytePermit,
    ) -> Self {
        let (success, own) = (Mutex::default(), Mutex::default());
        Call { path, headers, body, model, content, success, own, _memory: Some(memory) }
    }

    /// The same call without its share in the budget and without its reply.
    pub(crate) fn copied(&self) -> Self {
        let Call { path, headers, body, model, content, .. } = self;
        Call {
            path: path.clone(),
            headers: headers.clone(),
            body: body.clone(),
            model: model.clone(),
            content: content.clone(),
            success: Mutex::default(),
            own: Mutex::default(),
            _memory: None,
        }
    }

    /// The message about some of the rows, with its prefix. `None` if it has no form in gRPC.
    pub(crate) fn part(&self, content: &Content, positions: &[u32]) -> Option<Bytes> {
        let Content::Rows(rows) = content else { return None };
        let asked: Vec<usize> = positions.iter().map(|row| *row as usize).collect();
        let mut request = rows.select(&asked);
        (request.model, request.version) = self.model.clone();
        Some(framed(&request.to_grpc()?))
    }

    /// Asks a server again about some rows of `content`, or about the whole call.
    pub(crate) async fn repeat(
        &self,
        replica: &Replica,
        content: &Content,
        positions: Option<&[u32]>,
        limit: usize,
    ) -> Option<Repeated> {
        let mut headers = self.headers.clone();
        headers.remove("grpc-timeout");
        let part = positions.filter(|positions| !content.is_all(positions));
        let body = match part {
            None => self.body.clone(),
            Some(positions) => {
                headers.insert("grpc-encoding", message::IDENTITY);
                self.part(content, positions)?
            }
        };
        let sent = replica.grpc()?.unary(&self.path, &headers, body, limit).await;
        let Ok(Replied::Complete(reply)) = sent else { return None };
        match reply.code() {
            status::OK => {}
            status::INVALID_ARGUMENT => return Some(Repeated::Refused),
            _ => return None,
        }
        let response = oip::Response::parse_grpc(message::of_reply(&reply.body)?).ok()?;
        let rows = content.rows().map(|rows| positions.map_or(rows, <[u32]>::len));
        Some(Repeated::of(Answers::of(response, rows)))
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
