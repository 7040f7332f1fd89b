//! The gRPC side of a proxy: the same models and the same memory as its HTTP side.
//!
//! [`Proxy`] is a [`StreamService`]: the listener gives it streams of HTTP/2. `infer` answers
//! `ModelInfer` from the memo, and `endpoint` asks a server in the client's own message. `pump`
//! forwards all other calls with their metadata, messages and trailers as they come, also streams.
//! `channel` keeps the connections to the servers.

mod call;
mod channel;
mod endpoint;
mod infer;
#[doc(hidden)]
pub mod message;
mod pump;
pub mod status;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use afterimage_http::{Peer, Respond, StreamService};
use afterimage_memo::pool::Attempt;
use bytes::Bytes;
use h2::RecvStream;
use hyper::header::{CONTENT_TYPE, HeaderValue, VIA};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, StatusCode};

pub(crate) use call::Call;
pub use channel::{Channel, GrpcTarget, GrpcTargetError};

use crate::endpoint::Inner as EndpointInner;
use crate::forward::ForwardError;
use crate::headers::is_loop;
use crate::proxy::{Inner, Proxy};
use crate::statistics::{self, Hits};
use pump::{Passing, refuse};

/// The path of inference calls.
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// The longest time between two parts of a unary call's message.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// The value of `via` that this proxy adds to calls.
const OWN_VIA: HeaderValue = HeaderValue::from_static("2.0 afterimage");

/// Whether a call loads or unloads a model: of Triton's service, or of MLServer's.
fn changes_models(path: &str) -> bool {
    path.starts_with("/inference.")
        && (path.ends_with("/RepositoryModelLoad") || path.ends_with("/RepositoryModelUnload"))
}

/// Asks the server for replies without compression.
fn ask_identity(headers: &mut HeaderMap) {
    headers.insert("grpc-accept-encoding", message::IDENTITY);
}

impl StreamService for Proxy {
    fn call(
        &self,
        request: Request<RecvStream>,
        mut respond: Respond,
        peer: &Arc<Peer>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let (inner, peer) = (Arc::clone(&self.inner), Arc::clone(peer));
        async move { inner.serve_call(request, &mut respond, &peer).await }
    }
}

impl Inner {
    async fn serve_call(
        self: &Arc<Self>,
        request: Request<RecvStream>,
        respond: &mut Respond,
        peer: &Peer,
    ) {
        let (mut parts, body) = request.into_parts();
        let content = parts.headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
        let is_grpc = content.is_some_and(|content| content.starts_with(b"application/grpc"));
        if parts.method != Method::POST || !is_grpc {
            let (status, empty) = (StatusCode::UNSUPPORTED_MEDIA_TYPE, HeaderMap::new());
            return pump::reply(respond, status, empty, Bytes::new(), None).await;
        }
        if is_loop(&parts.headers) {
            let text = "the call has passed this proxy several times; its URL points back to it";
            return refuse(respond, status::INTERNAL, text).await;
        }
        parts.headers.append(VIA, OWN_VIA);
        if parts.uri.path() == INFER {
            return self.infer(parts, body, respond, peer).await;
        }
        self.passed.fetch_add(1, Relaxed);
        let is_change = changes_models(parts.uri.path());
        if is_change {
            self.models.change_all();
        }
        let hits = match parts.uri.path() {
            statistics::GRPC_PATH => Hits::of(&self.models),
            _ => Vec::new(),
        };
        let path = parts.uri.path_and_query().cloned();
        let path = path.unwrap_or(PathAndQuery::from_static("/"));
        let call = Passing { path, headers: parts.headers, first: Bytes::new(), rest: Some(body) };
        if !hits.is_empty() {
            return self.pass_statistics(call, &hits, respond).await;
        }
        if !is_change {
            return self.pass(call, respond, |_| {}).await;
        }
        // The answers of the time in between are of either model. The client may end the call
        // early, and the server continues.
        let after = Changed(Arc::clone(self));
        let Some(channel) = self.channel() else { return };
        let Passing { path, headers, rest, .. } = call;
        let Some(mut rest) = rest else { return };
        let collected = pump::collect(&mut rest, self.max_body, &self.memory).await;
        let bytes = match collected {
            Ok(pump::Collected { bytes, .. }) => bytes,
            Err(pump::Uncollected::Bypass(_, first)) => {
                let call = Passing { path, headers, first, rest: Some(rest) };
                return self.pass(call, respond, |_| {}).await;
            }
            Err(_) => return,
        };
        let mut unary = pin!(channel.unary(&path, &headers, bytes, self.max_answer));
        let replied = tokio::select! {
            biased;
            replied = unary.as_mut() => replied,
            () = respond.reset() => unary.await,
        };
        match replied {
            Ok(channel::Replied::Complete(reply)) => {
                self.models.load_called().await;
                self.models.examine_all().await;
                let channel::Reply { status, head, body, trailers } = reply;
                pump::reply(respond, status, head, body, trailers).await;
            }
            Ok(channel::Replied::TooLarge(head, first, rest)) => {
                pump::download(head, first, rest, respond).await;
            }
            Err(error) => self.unforwarded(&error, respond).await,
        }
        drop(after);
    }

    /// Forwards a call for statistics, and adds hits to the reply.
    async fn pass_statistics(&self, call: Passing, hits: &[Hits], respond: &mut Respond) {
        let Passing { path, mut headers, rest, .. } = call;
        let (Some(channel), Some(mut rest)) = (self.channel(), rest) else { return };
        let bytes = match pump::collect(&mut rest, self.max_body, &self.memory).await {
            Ok(pump::Collected { bytes, .. }) => bytes,
            Err(pump::Uncollected::Bypass(_, first)) => {
                let call = Passing { path, headers, first, rest: Some(rest) };
                return self.pass(call, respond, |_| {}).await;
            }
            Err(_) => return,
        };
        ask_identity(&mut headers);
        match channel.unary(&path, &headers, bytes, self.max_answer).await {
            Ok(channel::Replied::Complete(reply)) => {
                let channel::Reply { status, head, mut body, trailers } = reply;
                let message = message::of_reply(&body);
                if let Some(added) = message.and_then(|m| statistics::add_to_message(&m, hits)) {
                    body = message::framed(&added);
                }
                pump::reply(respond, status, head, body, trailers).await;
            }
            Ok(channel::Replied::TooLarge(head, first, rest)) => {
                pump::download(head, first, rest, respond).await;
            }
            Err(error) => self.unforwarded(&error, respond).await,
        }
    }

    /// The server of the next call.
    fn channel(&self) -> Option<&Channel> {
        let number = self.next.fetch_add(1, Relaxed) % self.replicas.len();
        self.replicas[number].grpc()
    }

    /// Forwards a call. `note` is added to the metadata of the reply.
    async fn pass(&self, call: Passing, respond: &mut Respond, note: impl FnOnce(&mut HeaderMap)) {
        let Some(channel) = self.channel() else {
            let text = "the model server has no grpc:// URL";
            return refuse(respond, status::UNIMPLEMENTED, text).await;
        };
        if let Err(error) = pump::forward(channel, call, respond, note).await {
            self.unforwarded(&error, respond).await;
        }
    }

    async fn unforwarded(&self, error: &ForwardError, respond: &mut Respond) {
        self.unreachable.fetch_add(1, Relaxed);
        tracing::warn!("{error}");
        refuse(respond, status::UNAVAILABLE, &error.to_string()).await;
    }
}

/// Deletes all answers when it is dropped: a model was loaded or unloaded.
struct Changed(Arc<Inner>);

impl Drop for Changed {
    fn drop(&mut self) {
        self.0.models.change_all();
    }
}

/// Starts an attempt over gRPC. Returns the attempt if its context is not of gRPC.
pub(crate) fn start(inner: &Arc<EndpointInner>, attempt: Attempt) -> Option<Attempt> {
    let call = attempt.context().and_then(|context| context.get::<Call>());
    let Some(call) = call else { return Some(attempt) };
    let (inner, asked) = (Arc::clone(inner), Arc::clone(attempt.model()));
    tokio::spawn(async move {
        let limit = attempt.timeout();
        let positions = attempt.positions().clone();
        let asking = inner.ask_grpc(&call, &positions, &asked, limit);
        let asked = tokio::time::timeout(limit, asking).await;
        attempt.end(asked.unwrap_or_else(|_| Err(inner.late(limit))));
    });
    None
}
