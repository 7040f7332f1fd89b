//! The first bytes of a connection: a `Hello`, or another protocol, which is rejected.

use super::end::Refusal;
use super::options::Rights;
use super::service::Service;
use super::shared::Shared;
use crate::proto::handshake::{VERSION, Welcome};
use crate::proto::header::{HEADER_LEN, Header, MAX_HANDSHAKE_BODY};
use crate::proto::message::{MAX_CACHE_REQ, MAX_PING_LEN};
use crate::proto::{Frame, Kind, Message, Status};

/// The meaning of the first bytes.
pub(super) enum Greeting {
    /// Too few bytes to decide.
    NeedMore,
    /// A valid `Hello` of this many bytes; the `Welcome` is in `out`.
    Welcomed { consumed: usize, serves: Serves },
    /// The connection is refused; the reply is in `out`.
    Refused(Refusal),
}

/// The requests that the service behind a connection accepts, and the rights of its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serves {
    pub(super) kind: crate::proto::Role,
    /// [`Service::generation`] at the handshake.
    pub(super) generation: u64,
    /// Bytes of an input, if the model's shape is known.
    pub(super) input_len: Option<u32>,
    pub(super) rights: Rights,
}

impl Serves {
    /// The longest body of this kind that needs to be read for its answer. `None` if only the
    /// server's limit applies.
    pub(super) fn longest_body(self, kind: Kind) -> Option<u32> {
        match kind {
            Kind::CacheReq if self.takes(kind) => Some(MAX_CACHE_REQ as u32),
            Kind::ClassifyReq if self.takes(kind) => self.input_len,
            Kind::Ping => Some(MAX_PING_LEN as u32),
            // Their answer does not depend on the body, or they have none.
            _ => Some(0),
        }
    }

    pub(super) fn takes(self, kind: Kind) -> bool {
        match kind {
            Kind::CacheReq => self.kind == crate::proto::Role::Cache,
            Kind::ClassifyReq => self.kind.classifies(),
            _ => false,
        }
    }
}

/// The first four bytes of HTTP requests. No `Hello` begins with them.
const HTTP_METHODS: [&[u8; 4]; 10] =
    [b"GET ", b"HEAD", b"POST", b"PUT ", b"DELE", b"OPTI", b"PATC", b"CONN", b"TRAC", b"PRI "];

/// Whether a connection begins with TLS: a handshake record of some version. No `Hello` matches: if
/// its length has these first two bytes, its third byte is zero.
pub(super) fn begins_tls(input: &[u8]) -> bool {
    let at = |i: usize, expected: std::ops::RangeInclusive<u8>| {
        input.get(i).is_none_or(|byte| expected.contains(byte))
    };
    at(0, 0x16..=0x16) && at(1, 3..=3) && at(2, 1..=4)
}

/// Answers the first bytes into `out`. `lacks_tls`: the server demands TLS, and they came without.
pub(super) fn greet<S: Service>(
    shared: &Shared<S>,
    lacks_tls: bool,
    input: &[u8],
    out: &mut Vec<u8>,
) -> Greeting {
    if let Some(start) = input.first_chunk::<4>()
        && HTTP_METHODS.contains(&start)
    {
        answer_http(shared.service.identity().service, out);
        return Greeting::Refused(Refusal::Http);
    }
    let Some(header) = Header::decode(input) else {
        return Greeting::NeedMore;
    };
    if begins_tls(input) {
        let text = "this port does not speak TLS: connect without it";
        return refuse(out, header.id, Status::Unsupported, text, Refusal::TlsToPlainPort);
    }
    if lacks_tls {
        let text = "this port speaks TLS: connect with it";
        return refuse(out, header.id, Status::Unsupported, text, Refusal::PlainToTlsPort);
    }
    if header.kind != Kind::Hello || header.body_len > MAX_HANDSHAKE_BODY {
        let text = "this is an Afterimage port: a connection begins with a Hello frame of at most \
                    4096 bytes of body";
        return refuse(out, header.id, Status::BadArgument, text, Refusal::NotHello);
    }
    let Ok(Some(frame)) = Frame::decode(input, MAX_HANDSHAKE_BODY) else {
        return Greeting::NeedMore;
    };
    let hello = match Message::decode(frame) {
        Ok(Message::Hello(hello)) => hello,
        Ok(_) => unreachable!("a frame of kind Hello decodes to a Hello"),
        Err(error) => {
            let text = format!("malformed Hello: {error}");
            return refuse(out, header.id, error.status(), &text, Refusal::MalformedHello);
        }
    };
    if hello.common_version().is_none() {
        let (min, max) = (hello.version_min, hello.version_max);
        let text =
            format!("the client speaks protocol versions {min} to {max}; the server {VERSION}");
        return refuse(out, header.id, Status::Unsupported, &text, Refusal::NoCommonVersion);
    }
    let Some(rights) = shared.options.rights(hello.token) else {
        let text =
            if hello.token.is_empty() { "a token is required" } else { "the token is wrong" };
        return refuse(out, header.id, Status::Unauthenticated, text, Refusal::WrongToken);
    };
    // In this order: after a change in between, the connection counts as older, never as newer.
    let generation = shared.service.generation();
    let identity = shared.service.identity();
    let input_len = identity.shape.byte_len().and_then(|len| u32::try_from(len).ok());
    let serves = Serves { kind: identity.service, generation, input_len, rights };
    let welcome = Welcome {
        version: VERSION,
        service: identity.service,
        features: 0,
        max_body: shared.options.max_body,
        window: shared.options.window,
        classes: identity.classes,
        digest: identity.digest,
        shape: identity.shape,
        name: shared.options.name.clone(),
    };
    Message::Welcome(welcome).encode(header.id, out);
    Greeting::Welcomed { consumed: HEADER_LEN + header.body_len as usize, serves }
}

fn refuse(out: &mut Vec<u8>, id: u64, status: Status, text: &str, refusal: Refusal) -> Greeting {
    Message::Error { status, text, connection: true }.encode(id, out);
    Greeting::Refused(refusal)
}

/// Answers browsers, `curl` and health checks in HTTP.
fn answer_http(service: crate::proto::Role, out: &mut Vec<u8>) {
    let body = format!(
        "This is the port of an Afterimage {service}. It speaks a binary protocol, not HTTP: use \
         an Afterimage client.\n"
    );
    let head = format!(
        "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(head.as_bytes());
    out.extend_from_slice(body.as_bytes());
}
