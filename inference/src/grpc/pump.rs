//! Bodies between two streams of HTTP/2, and calls that pass through.

use std::future::poll_fn;

use afterimage_core::{ByteBudget, BytePermit};
use afterimage_http::Respond;
use bytes::{Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Response, StatusCode};
use tokio::time::timeout;

use super::channel::{Channel, Opened};
use super::{BODY_TIMEOUT, status};
use crate::forward::ForwardError;
use crate::policy::Bypass;

/// Bytes that are sent without waiting for the receiver's window. The stream keeps them.
const SMALL: usize = 16 << 10;

/// The first allocation of a body in several parts.
const FIRST_BYTES: usize = 256 << 10;

/// Sends bytes as fast as the receiver's window allows. Fails when the receiver resets the stream.
pub(crate) async fn send_all(
    stream: &mut SendStream<Bytes>,
    mut bytes: Bytes,
    ends: bool,
) -> Result<(), h2::Error> {
    while bytes.len() > SMALL {
        stream.reserve_capacity(bytes.len());
        let capacity = poll_fn(|context| stream.poll_capacity(context)).await;
        let capacity = capacity.ok_or(h2::Error::from(Reason::CANCEL))??;
        if capacity == 0 {
            continue;
        }
        let part = bytes.split_to(capacity.min(bytes.len()));
        let is_last = ends && bytes.is_empty();
        stream.send_data(part, is_last)?;
        if is_last {
            return Ok(());
        }
    }
    if ends || !bytes.is_empty() {
        stream.send_data(bytes, ends)?;
    }
    Ok(())
}

/// A request's body in memory.
pub(crate) struct Collected {
    pub(crate) bytes: Bytes,
    pub(crate) permit: BytePermit,
}

/// Why a body was not collected.
pub(crate) enum Uncollected {
    /// The reason, and the part of the body that was read. The call can still be forwarded.
    Bypass(Bypass, Bytes),
    /// The client sent nothing for [`BODY_TIMEOUT`].
    Stalled,
    /// The client reset the stream, or its connection ended.
    Reset,
}

/// Reads the body of a unary call, within the limit of one body and the budget of all.
pub(crate) async fn collect(
    stream: &mut RecvStream,
    limit: usize,
    budget: &ByteBudget,
) -> Result<Collected, Uncollected> {
    let mut permit = budget.take(0).expect("0 bytes fit in any budget");
    let (mut first, mut parts) = (None::<Bytes>, BytesMut::new());
    loop {
        let part = match timeout(BODY_TIMEOUT, stream.data()).await {
            Ok(Some(Ok(part))) => part,
            Ok(None) => break,
            Ok(Some(Err(_))) => return Err(Uncollected::Reset),
            Err(_) => return Err(Uncollected::Stalled),
        };
        if stream.flow_control().release_capacity(part.len()).is_err() {
            return Err(Uncollected::Reset);
        }
        let len = permit.bytes() + part.len();
        let fits = permit.resize(len);
        match first.take() {
            None if parts.is_empty() => first = Some(part),
            before => {
                if let Some(before) = before {
                    parts.reserve(FIRST_BYTES.max(len));
                    parts.extend_from_slice(&before);
                }
                parts.extend_from_slice(&part);
            }
        }
        if len > limit || !fits {
            let reason = if len > limit { Bypass::TooLarge } else { Bypass::Memory };
            return Err(Uncollected::Bypass(reason, first.unwrap_or_else(|| parts.freeze())));
        }
    }
    let bytes = first.unwrap_or_else(|| parts.freeze());
    match stream.trailers().await {
        Ok(None) => Ok(Collected { bytes, permit }),
        Ok(Some(_)) => Err(Uncollected::Bypass(Bypass::Trailers, bytes)),
        Err(_) => Err(Uncollected::Reset),
    }
}

/// A call on its way to a server, with metadata that is ready to be sent.
pub(crate) struct Passing {
    pub(crate) path: PathAndQuery,
    pub(crate) headers: HeaderMap,
    /// The part of the body that was read already.
    pub(crate) first: Bytes,
    /// The rest of the body; `None` if there is none.
    pub(crate) rest: Option<RecvStream>,
}

/// Forwards a call in both directions until both ends are reached. `note` is added to the metadata
/// of the reply. An error means that no reply was sent; the caller sends one.
pub(crate) async fn forward(
    channel: &Channel,
    call: Passing,
    respond: &mut Respond,
    note: impl FnOnce(&mut HeaderMap),
) -> Result<(), ForwardError> {
    let Passing { path, headers, first, rest } = call;
    let opened = tokio::select! {
        biased;
        opened = channel.open(&path, &headers) => opened?,
        () = respond.reset() => return Ok(()),
    };
    let Opened { response, mut body, .. } = opened;
    let up = async {
        if upload(first, rest, &mut body).await.is_err() {
            // The server's own end of the call says why, if the client is still there.
            body.send_reset(Reason::CANCEL);
        }
        std::future::pending::<()>().await;
    };
    let down = async {
        let response = tokio::select! {
            biased;
            response = response => response.map_err(|error| channel.failed(error.to_string()))?,
            () = respond.reset() => return Ok(()),
        };
        let (mut head, body) = response.into_parts();
        note(&mut head.headers);
        download(head, Bytes::new(), body, respond).await;
        Ok(())
    };
    tokio::select! {
        biased;
        done = down => done,
        () = up => unreachable!("the upload does not end"),
    }
}

async fn upload(
    first: Bytes,
    rest: Option<RecvStream>,
    to: &mut SendStream<Bytes>,
) -> Result<(), h2::Error> {
    let Some(mut from) = rest else { return send_all(to, first, true).await };
    if from.is_end_stream() {
        return send_all(to, first, true).await;
    }
    send_all(to, first, false).await?;
    while let Some(part) = from.data().await {
        let part = part?;
        let len = part.len();
        let ends = from.is_end_stream();
        send_all(to, part, ends).await?;
        from.flow_control().release_capacity(len)?;
        if ends {
            return Ok(());
        }
    }
    match from.trailers().await? {
        Some(trailers) => to.send_trailers(trailers),
        None => to.send_data(Bytes::new(), true),
    }
}

/// Sends a server's reply to the client: its head, `first`, and the rest of its body. Ends when the
/// client resets the stream.
pub(crate) async fn download(
    head: hyper::http::response::Parts,
    first: Bytes,
    mut from: RecvStream,
    respond: &mut Respond,
) {
    let ends = first.is_empty() && from.is_end_stream();
    let Ok(mut to) = respond.send_response(Response::from_parts(head, ()), ends) else { return };
    if ends {
        return;
    }
    if !first.is_empty() && send_all(&mut to, first, false).await.is_err() {
        return;
    }
    loop {
        let part = tokio::select! {
            biased;
            part = from.data() => part,
            _ = poll_fn(|context| to.poll_reset(context)) => return,
        };
        let sent = match part {
            Some(Ok(part)) => {
                let len = part.len();
                let sent = send_all(&mut to, part, false).await;
                sent.and_then(|()| from.flow_control().release_capacity(len))
            }
            Some(Err(error)) => Err(error),
            None => break,
        };
        if let Err(error) = sent {
            return to.send_reset(error.reason().unwrap_or(Reason::INTERNAL_ERROR));
        }
    }
    let sent = match from.trailers().await {
        Ok(Some(trailers)) => to.send_trailers(trailers),
        Ok(None) => to.send_data(Bytes::new(), true),
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        to.send_reset(error.reason().unwrap_or(Reason::INTERNAL_ERROR));
    }
}

/// Sends a complete reply.
pub(crate) async fn reply(
    respond: &mut Respond,
    status: StatusCode,
    head: HeaderMap,
    body: Bytes,
    trailers: Option<HeaderMap>,
) {
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.headers_mut() = head;
    let ends = trailers.is_none() && body.is_empty();
    let Ok(mut stream) = respond.send_response(response, ends) else { return };
    if ends {
        return;
    }
    let Some(trailers) = trailers else {
        let _ = send_all(&mut stream, body, true).await;
        return;
    };
    if !body.is_empty() && send_all(&mut stream, body, false).await.is_err() {
        return;
    }
    let _ = stream.send_trailers(trailers);
}

/// Sends an error of the proxy itself.
pub(crate) async fn refuse(respond: &mut Respond, code: u32, text: &str) {
    reply(respond, StatusCode::OK, status::error(code, text), Bytes::new(), None).await;
}
