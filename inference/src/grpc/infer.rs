//! Inference calls over gRPC, answered from the memo.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use afterimage_core::{ClientId, Failure, Origin, Status};
use afterimage_http::{Peer, Respond};
use afterimage_memo::{Context, Request as MemoRequest};
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
use crate::access::{Entry, note};
use crate::content::{Answers, assembled};
use crate::identity::Source;
use crate::models::{Model, RAW, TYPED};
use crate::observe::Observer;
use crate::oip;
use crate::policy::{Bypass, CacheStatus, Directives};
use crate::proxy::{Inner, Probe, ROW, WHOLE, key};
use crate::purity::probe_rows;

/// An inference call that the memo can answer.
struct Asked {
    call: Arc<Call>,
    /// The model's path, as HTTP writes it.
    model: String,
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    id: Option<String>,
    /// The model, if the message has typed contents: the form of the reply is the server's choice.
    typed: Option<Arc<Model>>,
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
        let Some(model) = &self.typed else { return Some(oip::Form::Binary) };
        match model.typed_replies.load(Relaxed) {
            TYPED => Some(oip::Form::Typed),
            RAW => Some(oip::Form::Binary),
            _ => None,
        }
    }

    /// Notes the form that the server has chosen.
    fn learn_form(&self, reply: &Replied) {
        let (Some(model), Replied::Complete(reply)) = (&self.typed, reply) else { return };
        let response = message::of_reply(&reply.body).map(oip::Response::parse_grpc);
        let Some(Ok(response)) = response else { return };
        let Some(output) = response.outputs.first() else { return };
        let form = if output.form == oip::Form::Typed { TYPED } else { RAW };
        model.typed_replies.store(form, Relaxed);
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
        self.infer_into(parts, body, respond, peer, &mut entry).await;
        if let Some(entry) = &mut entry {
            entry.find_version(&self.models);
        }
    }

    async fn infer_into(
        self: &Arc<Self>,
        parts: Parts,
        mut body: RecvStream,
        respond: &mut Respond,
        peer: &Peer,
        entry: &mut Option<Entry>,
    ) {
        let path = parts.uri.path_and_query().cloned();
        let path = path.unwrap_or(PathAndQuery::from_static(super::INFER));
        let headers = parts.headers;
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
                    return self.bypass_grpc(call, reason, respond, entry).await;
                }
                Err(Uncollected::Stalled) => {
                    let text = "no part of the message arrived for 30 s";
                    return refuse(respond, status::CANCELLED, text).await;
                }
                Err(Uncollected::Reset) => return,
            };
        drop(body);
        let mut directives = match decided {
            Ok(directives) => directives,
            Err(reason) => {
                let call = Passing { path, headers, first: bytes, rest: None };
                return self.bypass_grpc(call, reason, respond, entry).await;
            }
        };
        let found = match self.parse_grpc(&headers, &bytes) {
            Ok((request, model, known_as)) => self
                .models
                .get(&known_as, &Source::Inference)
                .await
                .map(|found| (request, model, known_as, found)),
            Err(reason) => Err(reason),
        };
        let (request, model, known_as, found) = match found {
            Ok(found) => found,
            Err(reason) => {
                let call = Passing { path, headers, first: bytes, rest: None };
                return self.bypass_grpc(call, reason, respond, entry).await;
            }
        };
        let is_typed = !request.is_binary() && !request.inputs.is_empty();
        let typed = is_typed.then(|| Arc::clone(&found));
        let (rows, probe) = self.mode(&request, found);
        let prefix = std::mem::take(&mut directives.key);
        let keys = match &rows {
            None => vec![key(WHOLE, &prefix, &request.key_parts())],
            Some(rows) => {
                (0..rows.len()).map(|row| key(ROW, &prefix, &rows.key_parts(row))).collect()
            }
        };
        let mut headers = headers;
        // The memo reads the reply.
        ask_identity(&mut headers);
        let mut hasher = DefaultHasher::new();
        Some(peer.address.ip()).hash(&mut hasher);
        let client = ClientId::from(hasher.finish());
        let call = Arc::new(Call::new(path, headers, bytes, model, rows, permit));
        let (id, model) = (request.id, known_as);
        let asked = Asked { call, model, keys, probe, id, typed, directives, deadline, client };
        if let Some(entry) = entry {
            entry.asks(&asked.model, &asked.keys, asked.call.body.len());
        }
        if let Some(observer) = &self.observer {
            return self.observe_grpc(asked, observer, respond, entry).await;
        }
        // The client that has reset its stream waits for nothing.
        let answered = tokio::select! {
            biased;
            answered = self.ask_grpc(asked) => answered,
            () = respond.reset() => return,
        };
        match answered {
            Answered::Reply(Replied::Complete(complete), how) => {
                ends(entry, complete.code(), Some(&complete.body));
                let Reply { status, mut head, body, trailers } = complete;
                note(entry, how, &mut head);
                reply(respond, status, head, body, trailers).await;
            }
            Answered::Reply(Replied::TooLarge(mut head, first, rest), how) => {
                ends(entry, status::OK, None);
                note(entry, how, &mut head.headers);
                download(head, first, rest, respond).await;
            }
            Answered::Bypass(call, reason) => self.bypass_grpc(call, reason, respond, entry).await,
            Answered::Failed(code, text) => {
                ends(entry, code, None);
                refuse(respond, code, &text).await;
            }
        }
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
        let is_new_form = asked.form().is_none();
        let mut refreshed = asked.directives.refresh || is_new_form;
        loop {
            let mut request = MemoRequest::rows(asked.keys.iter().cloned());
            request.model.clone_from(&asked.model);
            request.client = asked.client;
            request.deadline = asked.deadline;
            request.directives.refresh = refreshed;
            request.context = Some(Context::new(Arc::clone(&asked.call)));
            let rows = match self.memo.ask(request).await {
                Ok(answered) => answered.rows,
                Err(failure) => return self.failed_grpc(&asked, failure, refreshed),
            };
            let count = |origin| rows.iter().filter(|row| row.origin == origin).count();
            let (hits, misses) = (count(Origin::Hit), count(Origin::Miss));
            let ages = rows.iter().filter(|row| row.origin == Origin::Hit).map(|row| row.age);
            let age = ages.max().unwrap_or_default();
            let is_old = asked.directives.max_age.is_some_and(|most| age > most);
            if hits > 0 && is_old && !refreshed {
                refreshed = true;
                continue;
            }
            let (collapsed, stored, status) = (misses == 0, true, StatusCode::OK);
            let note = match hits {
                0 => CacheStatus::Miss { collapsed, stored, refreshed, status },
                hits if hits == rows.len() => CacheStatus::Hit { age, ttl: self.ttl },
                hits => CacheStatus::Partial { hits, rows: rows.len() },
            };
            let is_new = misses == rows.len();
            let own = if is_new { asked.call.take_success() } else { None };
            let answer = match own.is_some() && asked.probe.is_none() {
                true => None,
                false => assembled(rows.into_iter().map(|row| row.answer)),
            };
            let probe = asked.probe.take().filter(|probe| is_new || probe.number.is_none());
            if let (Some(probe), Some(answer)) = (probe, &answer) {
                self.compare_grpc(probe, Arc::clone(&asked.call), answer.clone());
            }
            if let Some(own) = own {
                asked.learn_form(&own);
                return Answered::Reply(own, note);
            }
            let rendered = answer.and_then(|answer| rendered(&answer, &asked));
            return match rendered {
                Some(reply) => Answered::Reply(Replied::Complete(reply), note),
                None => Answered::Bypass(asked.passing(), Bypass::NotRendered),
            };
        }
    }

    /// A call that failed: with the server's own reply where there is one.
    fn failed_grpc(&self, asked: &Asked, failure: Failure, refreshed: bool) -> Answered {
        let (collapsed, stored, status) = (false, false, StatusCode::OK);
        let note = CacheStatus::Miss { collapsed, stored, refreshed, status };
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
            tracing::warn!(model = asked.model, "{text}");
        }
        Answered::Failed(code, text.to_owned())
    }

    /// Asks the server again about some rows of an answer, or about the whole batch.
    fn compare_grpc(self: &Arc<Self>, probe: Probe, call: Arc<Call>, answer: oip::Response) {
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let len = probe.rows.len();
            let asked =
                probe.number.map_or_else(|| (0..len).collect(), |number| probe_rows(number, len));
            let agreed = match answer.split_rows(len) {
                Some(rows) => inner.agrees_grpc(&probe.rows, &call, &rows, &asked).await,
                None => Some(false),
            };
            inner.conclude(probe, agreed);
        });
    }

    /// Whether the server gives the same answers to these rows; `None` without an answer.
    async fn agrees_grpc(
        &self,
        rows: &oip::Rows,
        call: &Call,
        answers: &[oip::Response],
        asked: &[usize],
    ) -> Option<bool> {
        let body = call.body_for(rows, asked)?;
        let mut headers = call.headers.clone();
        headers.remove("grpc-timeout");
        headers.insert("grpc-encoding", message::IDENTITY);
        let sent = self.channel()?.unary(&call.path, &headers, body, self.max_answer).await;
        let Ok(Replied::Complete(reply)) = sent else { return None };
        if reply.code() != status::OK {
            return None;
        }
        let response = oip::Response::parse_grpc(message::of_reply(&reply.body)?).ok()?;
        let Some(found) = response.split_rows(asked.len()) else { return Some(false) };
        let equal = |(found, row): (&oip::Response, &usize)| {
            answers.get(*row).is_some_and(|expected| found.to_bytes() == expected.to_bytes())
        };
        Some(found.iter().zip(asked).all(equal))
    }

    /// Forwards a call, and notes whether memory would have answered it.
    async fn observe_grpc(
        &self,
        asked: Asked,
        observer: &Observer,
        respond: &mut Respond,
        entry: &mut Option<Entry>,
    ) {
        let began = Instant::now();
        let call = &asked.call;
        let Some(channel) = self.channel() else { return };
        let sent = channel.unary(&call.path, &call.headers, call.body.clone(), self.max_answer);
        let sent = tokio::select! {
            biased;
            sent = sent => sent,
            () = respond.reset() => return,
        };
        match sent {
            Ok(Replied::Complete(complete)) => {
                ends(entry, complete.code(), Some(&complete.body));
                let Reply { status, mut head, body, trailers } = complete;
                let answer = message::of_reply(&body).map(oip::Response::parse_grpc);
                let rows = call.rows.as_ref().map(oip::Rows::len);
                let answers = answer.and_then(Result::ok).map(|answer| Answers::of(answer, rows));
                if let Some(Ok(Answers { answers, .. })) = answers {
                    let took = began.elapsed();
                    let noted = observer.note(&asked.model, &asked.keys, &answers, took);
                    note(entry, CacheStatus::Bypass(noted), &mut head);
                }
                reply(respond, status, head, body, trailers).await;
            }
            Ok(Replied::TooLarge(head, first, rest)) => download(head, first, rest, respond).await,
            Err(error) => {
                ends(entry, status::UNAVAILABLE, None);
                self.unforwarded(&error, respond).await;
            }
        }
    }

    /// Forwards a call without the memo.
    async fn bypass_grpc(
        &self,
        call: Passing,
        reason: Bypass,
        respond: &mut Respond,
        entry: &mut Option<Entry>,
    ) {
        self.bypassed.fetch_add(1, Relaxed);
        tracing::debug!(reason = reason.as_str(), "the answer to a gRPC call is not stored");
        let status = CacheStatus::Bypass(reason);
        if let Some(entry) = entry {
            entry.noted(status);
        }
        self.pass(call, respond, |head| status.add_to(head)).await;
    }
}

/// The result of a call to the memo.
enum Answered {
    Reply(Replied, CacheStatus),
    Bypass(Passing, Bypass),
    /// The status, and the text.
    Failed(u32, String),
}

/// Notes the status of a reply, and its message.
fn ends(entry: &mut Option<Entry>, code: u32, body: Option<&Bytes>) {
    if let Some(entry) = entry {
        entry.ends(code, body.map(|body| body.len() as u64));
    }
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
