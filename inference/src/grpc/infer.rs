//! Inference calls over gRPC, answered from the memo.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use afterimage_core::{ClientId, Failure, Status};
use afterimage_http::{Peer, Respond};
use afterimage_memo::Context;
use bytes::Bytes;
use h2::RecvStream;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, StatusCode};

use super::call::{Call, Payload};
use super::channel::{Replied, Reply};
use super::pump::{Collected, Passing, Uncollected, collect, download, refuse, reply};
use super::{ask_identity, message, status};
use crate::access::Entry;
use crate::answer::{Rows, inference_keys};
use crate::compare::{Again, Probe};
use crate::content::{Answers, assembled};
use crate::identity::Source;
use crate::models::{Model, RAW, TYPED};
use crate::observe::Observer;
use crate::oip;
use crate::policy::{Bypass, CacheStatus, Directives, credentials};
use crate::proxy::Inner;

/// An inference call that the memo can answer.
struct Asked {
    call: Arc<Call>,
    model: Arc<Model>,
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    id: Option<String>,
    /// The message has typed contents: the form of the reply is the server's choice.
    is_typed: bool,
    directives: Directives,
    deadline: Option<Instant>,
    client: ClientId,
}

impl Asked {
    fn passing(&self) -> Passing {
        let Call { path, headers, body, .. } = &*self.call;
        let (path, headers, first) = (path.clone(), headers.clone(), body.clone());
        Passing { path, headers, first, rest: None }
    }

    /// The form of the reply. Raw contents get raw contents from every server. `None` if the server
    /// has not shown its choice yet.
    fn form(&self) -> Option<oip::Form> {
        if !self.is_typed {
            return Some(oip::Form::Binary);
        }
        match self.model.typed_replies.load(Relaxed) {
            TYPED => Some(oip::Form::Typed),
            RAW => Some(oip::Form::Binary),
            _ => None,
        }
    }

    /// Notes the form that the server has chosen.
    fn learn_form(&self, reply: &Replied) {
        let (true, Replied::Complete(reply)) = (self.is_typed, reply) else { return };
        let response = message::of_reply(&reply.body).map(oip::Response::parse_grpc);
        let Some(Ok(response)) = response else { return };
        let Some(output) = response.outputs.first() else { return };
        let form = if output.form == oip::Form::Typed { TYPED } else { RAW };
        self.model.typed_replies.store(form, Relaxed);
    }
}

/// The path of a model in HTTP; `None` for a name that has no equal one there.
fn path_of(name: &str, version: Option<&str>) -> Option<String> {
    let is_plain = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte))
    };
    match version {
        _ if !is_plain(name) => None,
        None => Some(name.to_owned()),
        Some(version) if is_plain(version) => Some(format!("{name}/versions/{version}")),
        Some(_) => None,
    }
}

impl Inner {
    /// Answers an inference call.
    pub(super) async fn infer(
        self: &Arc<Self>,
        parts: Parts,
        body: RecvStream,
        respond: &mut Respond,
        peer: &Peer,
    ) {
        self.calls.fetch_add(1, Relaxed);
        let client = Some(peer.address.ip());
        let mut entry = self.access.as_ref().map(|log| log.begin("grpc", client));
        let answered = match self.understand_grpc(parts, body, peer).await {
            Ok(asked) => {
                if let Some(entry) = &mut entry {
                    entry.asks(&asked.model.path, &asked.keys, asked.call.body.len());
                }
                let answering = async {
                    match &self.observer {
                        Some(observer) => self.observe_grpc(asked, observer).await,
                        None => self.ask_grpc(asked).await,
                    }
                };
                // The client that has reset its stream waits for nothing.
                tokio::select! {
                    biased;
                    answered = answering => answered,
                    () = respond.reset() => return,
                }
            }
            Err(answered) => answered,
        };
        self.send(answered, respond, &mut entry).await;
        if let Some(entry) = &mut entry {
            entry.find_version(&self.models);
        }
    }

    /// Sends the result of a call to the client, and notes it.
    async fn send(&self, answered: Answered, respond: &mut Respond, entry: &mut Option<Entry>) {
        let mut ends = |code, bytes, note| {
            if let Some(entry) = entry {
                entry.ends(code, bytes, note);
            }
        };
        match answered {
            Answered::Reply(Replied::Complete(complete), note) => {
                ends(complete.code(), Some(complete.body.len() as u64), note);
                let Reply { status, mut head, body, trailers } = complete;
                note.iter().for_each(|note| note.add_to(&mut head));
                reply(respond, status, head, body, trailers).await;
            }
            Answered::Reply(Replied::TooLarge(mut head, first, rest), note) => {
                ends(status::OK, None, note);
                note.iter().for_each(|note| note.add_to(&mut head.headers));
                download(head, first, rest, respond).await;
            }
            Answered::Bypass(call, reason) => {
                self.bypassed.fetch_add(1, Relaxed);
                let name = reason.as_str();
                tracing::debug!(reason = name, "the answer to a gRPC call is not stored");
                let note = CacheStatus::Bypass(reason);
                ends(status::OK, None, Some(note));
                self.pass(call, respond, |head| note.add_to(head)).await;
            }
            Answered::Failed(code, text) => {
                ends(code, None, None);
                refuse(respond, code, &text).await;
            }
            Answered::Left => {}
        }
    }

    /// Reads a call, and decides whether the memo may answer it.
    async fn understand_grpc(
        &self,
        parts: Parts,
        mut body: RecvStream,
        peer: &Peer,
    ) -> Result<Asked, Answered> {
        let path = parts.uri.path_and_query().cloned();
        let path = path.unwrap_or(PathAndQuery::from_static(super::INFER));
        let mut headers = parts.headers;
        let decided = self.policy.decide(&headers, path.query(), Some(peer));
        let deadline = status::timeout(&headers);
        let deadline = deadline.and_then(|limit| Instant::now().checked_add(limit));
        // A call that bypasses the memo is complete first, too. A stream that its client resets
        // early must not use the connections to the servers, which all clients share.
        let Collected { bytes, permit } =
            match collect(&mut body, self.max_body, &self.memory).await {
                Ok(collected) => collected,
                Err(Uncollected::Bypass(reason, first)) => {
                    let reason = decided.err().unwrap_or(reason);
                    let call = Passing { path, headers, first, rest: Some(body) };
                    return Err(Answered::Bypass(call, reason));
                }
                Err(Uncollected::Stalled) => {
                    let text = "no part of the message arrived for 30 s".to_owned();
                    return Err(Answered::Failed(status::CANCELLED, text));
                }
                Err(Uncollected::Reset) => return Err(Answered::Left),
            };
        drop(body);
        let read = async {
            let directives = decided?;
            let (request, names, path) = self.parse_grpc(&headers, &bytes)?;
            let model = self.models.get(&path, &Source::Inference).await?;
            Ok((directives, request, names, model))
        };
        let (mut directives, request, names, model) = match read.await {
            Ok(read) => read,
            Err(reason) => {
                let call = Passing { path, headers, first: bytes, rest: None };
                return Err(Answered::Bypass(call, reason));
            }
        };
        let is_typed = !request.is_binary() && !request.inputs.is_empty();
        let (content, probe) = self.mode(&request, &model);
        let keys = inference_keys(&request, &content, &std::mem::take(&mut directives.key));
        // The memo reads the reply.
        ask_identity(&mut headers);
        let mut hasher = DefaultHasher::new();
        Some(peer.address.ip()).hash(&mut hasher);
        let client = ClientId::from(hasher.finish());
        let call = Arc::new(Call::new(path, headers, bytes, names, content, permit));
        let id = request.id;
        Ok(Asked { call, model, keys, probe, id, is_typed, directives, deadline, client })
    }

    /// Reads the message of a call: the request, the model as the message names it, and its path.
    #[expect(clippy::type_complexity, reason = "name and version as the message has them")]
    fn parse_grpc(
        &self,
        headers: &HeaderMap,
        body: &Bytes,
    ) -> Result<(oip::Request, (Option<String>, Option<String>), String), Bypass> {
        let message = message::of_request(headers, body, self.max_body)?;
        let mut request = oip::Request::parse_grpc(message).map_err(|error| {
            tracing::debug!(%error, "cannot read a gRPC call; forwarded it unchanged");
            Bypass::NotUnderstood
        })?;
        if let Some(refusal) = request.refusal() {
            return Err(Bypass::Refused(refusal));
        }
        let model = request.take_model();
        let path = model.0.as_deref().and_then(|name| path_of(name, model.1.as_deref()));
        let path = path.ok_or(Bypass::UnknownModel)?;
        Ok((request, model, path))
    }

    /// Asks the memo.
    async fn ask_grpc(self: &Arc<Self>, mut asked: Asked) -> Answered {
        // A server that the proxy has not seen answer typed contents chooses the form now.
        let refresh = asked.directives.refresh || asked.form().is_none();
        let context = || Context::new(Arc::clone(&asked.call));
        let (model, keys) = (&asked.model, &asked.keys);
        let rows = self.look_up(model, keys, &asked.directives, refresh, context, |request| {
            (request.client, request.deadline) = (asked.client, asked.deadline);
        });
        let Rows { answers, status, is_new } = match rows.await {
            Ok(rows) => rows,
            Err((failure, refreshed)) => return self.failed_grpc(&asked, failure, refreshed),
        };
        if model.canaries.wants_more() && credentials(&asked.call.headers).next().is_none() {
            let again = || Again::Grpc(Arc::new(asked.call.copied()));
            self.sample(model, again, &asked.call.content, &answers);
        }
        if let Some(probe) = asked.probe.take().filter(|probe| is_new || probe.number.is_none()) {
            self.compare(probe, Again::Grpc(Arc::clone(&asked.call)), &answers);
        }
        let own = if is_new { asked.call.take_success() } else { None };
        if let Some(own) = own {
            asked.learn_form(&own);
            return Answered::Reply(own, Some(status));
        }
        match assembled(answers.into_iter()).and_then(|answer| rendered(&answer, &asked)) {
            Some(reply) => Answered::Reply(Replied::Complete(reply), Some(status)),
            None => Answered::Bypass(asked.passing(), Bypass::NotRendered),
        }
    }

    /// A call that failed: with the server's own reply where there is one.
    fn failed_grpc(&self, asked: &Asked, failure: Failure, refreshed: bool) -> Answered {
        let (collapsed, stored, status) = (false, false, StatusCode::OK);
        let note = Some(CacheStatus::Miss { collapsed, stored, refreshed, status });
        match failure.payload.as_ref().and_then(Payload::read) {
            Some(Payload::Shared(mut head)) => {
                head.insert(CONTENT_TYPE, status::GRPC);
                let (body, trailers) = (Bytes::new(), None);
                let reply = Reply { status, head, body, trailers };
                return Answered::Reply(Replied::Complete(reply), note);
            }
            Some(Payload::Own) => {
                return match asked.call.take_own() {
                    Some(reply) => Answered::Reply(reply, note),
                    None => Answered::Bypass(asked.passing(), Bypass::NotShared),
                };
            }
            None => {}
        }
        let code = match failure.status {
            // The memo is at its limit, or has just removed the model. The server is not.
            Status::Overloaded => return Answered::Bypass(asked.passing(), Bypass::Overloaded),
            Status::BadArgument | Status::ShuttingDown => {
                return Answered::Bypass(asked.passing(), Bypass::UnknownModel);
            }
            Status::UpstreamCrashed => status::UNAVAILABLE,
            Status::UpstreamError | Status::DeadlineExceeded => status::DEADLINE_EXCEEDED,
            _ => status::INTERNAL,
        };
        let text = failure.text.strip_prefix("classifier: ").unwrap_or(&failure.text);
        if failure.status != Status::DeadlineExceeded {
            self.unreachable.fetch_add(1, Relaxed);
            tracing::warn!(model = &*asked.model.path, "{text}");
        }
        Answered::Failed(code, text.to_owned())
    }

    /// Forwards a call, and notes whether memory would have answered it.
    async fn observe_grpc(&self, asked: Asked, observer: &Observer) -> Answered {
        let began = Instant::now();
        let call = &asked.call;
        let Some(channel) = self.channel() else {
            return Answered::Bypass(asked.passing(), Bypass::UnknownModel);
        };
        let sent = channel.unary(&call.path, &call.headers, call.body.clone(), self.max_answer);
        let complete = match sent.await {
            Ok(Replied::Complete(complete)) => complete,
            Ok(large) => return Answered::Reply(large, None),
            Err(error) => {
                self.unreachable.fetch_add(1, Relaxed);
                tracing::warn!("{error}");
                return Answered::Failed(status::UNAVAILABLE, error.to_string());
            }
        };
        let answer = message::of_reply(&complete.body).map(oip::Response::parse_grpc);
        let rows = call.content.rows();
        let answers = answer.and_then(Result::ok).map(|answer| Answers::of(answer, rows));
        let note = answers.and_then(Result::ok).map(|Answers { answers, .. }| {
            let took = began.elapsed();
            CacheStatus::Bypass(observer.note(&asked.model.path, &asked.keys, &answers, took))
        });
        Answered::Reply(Replied::Complete(complete), note)
    }
}

/// The result of a call.
enum Answered {
    /// A reply. Some have no note: the proxy observes only.
    Reply(Replied, Option<CacheStatus>),
    Bypass(Passing, Bypass),
    /// The status, and the text.
    Failed(u32, String),
    /// The client has reset the stream.
    Left,
}

/// The reply of an answer.
fn rendered(answer: &oip::Response, asked: &Asked) -> Option<Reply> {
    let body = message::framed(&answer.render_grpc(asked.id.as_deref(), asked.form()?)?);
    let (mut head, mut trailers) = (HeaderMap::with_capacity(2), HeaderMap::with_capacity(1));
    head.insert(CONTENT_TYPE, status::GRPC);
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    Some(Reply { status: StatusCode::OK, head, body, trailers: Some(trailers) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_has_the_path_that_http_has() {
        assert_eq!(path_of("m-1.x", None).as_deref(), Some("m-1.x"));
        assert_eq!(path_of("m", Some("3")).as_deref(), Some("m/versions/3"));
        for (name, version) in [("a/b", None), ("m/versions/3", None), ("", None), ("a b", None)] {
            assert_eq!(path_of(name, version), None, "{name:?}");
        }
        assert_eq!(path_of("m%20", None), None);
        assert_eq!(path_of("m", Some("3/infer")), None);
    }
}
