//! Attempts over gRPC at the server of an endpoint.

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use afterimage_core::{Computed, ModelId, Status};
use afterimage_memo::pool::{EndpointError, Outcome, Retry};

use super::call::{Call, Payload};
use super::channel::{Channel, Replied, Reply};
use super::{message, status};
use crate::call::Payload as HttpPayload;
use crate::endpoint::{Inner, whole_only};
use crate::forward::ForwardError;
use crate::oip;

/// Gives a reply to the client of the call alone.
fn own(call: &Call, reply: Replied, reason: &str) -> EndpointError {
    call.set_own(reply);
    let (outcome, retry) = (Outcome::Answered, Retry::Never);
    let (text, payload) = (reason.to_owned(), Some(HttpPayload::own()));
    EndpointError { status: Status::UpstreamError, text, outcome, retry, payload }
}

impl Inner {
    /// Sends a call, and reads the reply. `positions` are the rows that are asked for; a call of
    /// all rows has the client's own bytes.
    pub(crate) async fn ask_grpc(
        &self,
        call: &Call,
        positions: &[u32],
        asked: &Arc<ModelId>,
        limit: std::time::Duration,
    ) -> Result<Computed, EndpointError> {
        let content = &call.content;
        let part = (!content.is_all(positions)).then_some(positions);
        let body = match part {
            None => Some(call.body.clone()),
            Some(positions) => call.part(content, positions),
        };
        let body = body.ok_or_else(|| whole_only("the rows have no form"))?;
        let Some(channel) = self.replica.grpc() else {
            return Err(whole_only("the server has no gRPC"));
        };
        let mut headers = call.headers.clone();
        if part.is_some() {
            headers.insert("grpc-encoding", message::IDENTITY);
        }
        // The time of the longest waiter.
        headers.insert("grpc-timeout", status::timeout_value(limit));
        self.started.fetch_add(1, SeqCst);
        // A whole answer has some bytes more than the message: the prefix and the names.
        let most = self.max_answer_bytes.saturating_add(message::PREFIX);
        let mut sent = channel.unary(&call.path, &headers, body.clone(), most).await;
        if matches!(sent, Err(ForwardError::Failed { .. })) {
            // A server may close a connection while the call is on its way. A call has no effects,
            // so it can be repeated.
            sent = channel.unary(&call.path, &headers, body, most).await;
        }
        let reply = match sent.map_err(|error| self.unsent(&error))? {
            Replied::Complete(reply) => reply,
            Replied::TooLarge(..) if part.is_some() => {
                return Err(whole_only("the response is too large"));
            }
            large => return Err(own(call, large, "the response is too large")),
        };
        match reply.code() {
            status::OK => {}
            // The error for some rows is not the error for the client's batch.
            _ if part.is_some() => return Err(whole_only("the server refused some of the rows")),
            code => return Err(self.refused_grpc(call, reply, code, channel)),
        }
        self.answered.fetch_add(1, SeqCst);
        let answers = match message::of_reply(&reply.body).map(oip::Response::parse_grpc) {
            None => Err("the response is not one message"),
            Some(Err(_)) => Err("the response is not understood"),
            Some(Ok(response)) => self.stored(response, content.rows().is_some(), positions.len()),
        };
        let own_reply = |reason| match part {
            Some(_) => whole_only(reason),
            None => own(call, Replied::Complete(reply.clone()), reason),
        };
        let answers = answers.map_err(own_reply)?;
        // The model may have changed while it computed.
        let present = self.model.load();
        if present.as_ref().is_none_or(|present| present.digest != asked.digest) {
            return Err(own_reply("the model has changed"));
        }
        if part.is_none() {
            call.set_success(Replied::Complete(reply));
        }
        Ok(Computed { model: Arc::clone(asked), answers })
    }

    /// A reply with an error.
    fn refused_grpc(
        &self,
        call: &Call,
        reply: Reply,
        code: u32,
        channel: &Channel,
    ) -> EndpointError {
        match code {
            // Another client may be allowed to ask.
            status::UNAUTHENTICATED | status::PERMISSION_DENIED => {
                return own(call, Replied::Complete(reply), "the server refused the client");
            }
            status::CANCELLED => {
                return own(call, Replied::Complete(reply), "the server cancelled the call");
            }
            _ => {}
        }
        tracing::debug!(server = %channel.target(), code, "the model server refused a call");
        let text = format!("the model server answered with gRPC status {code}");
        // A model's own error says nothing about the server's health.
        let retry = match code {
            status::UNAVAILABLE | status::RESOURCE_EXHAUSTED => Retry::Budgeted,
            _ => Retry::Never,
        };
        let payload = if reply.status.is_success() {
            Payload::shared(reply.trailers.as_ref().unwrap_or(&reply.head))
        } else {
            return own(call, Replied::Complete(reply), "the server speaks no gRPC");
        };
        let (status, outcome) = (Status::UpstreamError, Outcome::Refused);
        EndpointError { status, text, outcome, retry, payload: Some(payload) }
    }
}
