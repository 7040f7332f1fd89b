//! The first bytes of a connection: a `Hello`, or another protocol, which is rejected.

use afterimage_core::Tenant;

use super::end::Refusal;
use super::options::Rights;
use super::service::Service;
use super::shared::Shared;
use super::streams::longest_body;
use crate::proto::handshake::{OLDEST_VERSION, VERSION, Welcome};
use crate::proto::header::{
    HEADER_LEN, Header, MAX_HANDSHAKE_BODY, MAX_LARGE_BODY, MAX_VALUE, flags,
};
use crate::proto::infer::MAX_NAME_LEN;
use crate::proto::message::{BYTES_KEY_LEN, BYTES_WRITE_HEAD, MAX_CACHE_REQ, MAX_PING_LEN};
use crate::proto::{Frame, Kind, Message, Role, Status};

/// The meaning of the first bytes.
pub(super) enum Greeting {
    /// Too few bytes to decide.
    NeedMore,
    /// A valid `Hello` of this many bytes; the `Welcome` is in `out`.
    Welcomed { consumed: usize, serves: Serves, tenant: Tenant },
    /// The connection is refused; the reply is in `out`.
    Refused(Refusal),
}

/// The requests that the service behind a connection accepts, and the rights of its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Serves {
    pub(super) kind: Role,
    /// The protocol's version on this connection.
    pub(super) version: u16,
    /// [`Service::generation`] at the handshake.
    pub(super) generation: u64,
    /// Bytes of an input, if the model's shape is known.
    pub(super) input_len: Option<u32>,
    pub(super) rights: Rights,
}

impl Serves {
    /// The longest body of a frame with this header that needs to be read for its answer. `None` if
    /// only the server's limit applies.
    pub(super) fn longest_body(self, header: Header) -> Option<u32> {
        match header.kind {
            kind @ Kind::CacheReq if self.takes(kind) => Some(MAX_CACHE_REQ as u32),
            kind @ Kind::ClassifyReq if self.takes(kind) => self.input_len,
            Kind::Ping => Some(MAX_PING_LEN as u32),
            kind if self.takes_streams(kind) => Some(longest_body(kind)),
            kind if self.takes_alone(kind) => Some(match kind {
                Kind::BytesReq if header.flags & flags::WRITE != 0 => LONGEST_WRITE,
                Kind::BytesReq => BYTES_KEY_LEN as u32,
                Kind::FlushReq => LONGEST_FLUSH,
                _ => MAX_LARGE_BODY,
            }),
            // Their answer does not depend on the body, or they have none.
            _ => Some(0),
        }
    }

    pub(super) fn takes(self, kind: Kind) -> bool {
        match kind {
            Kind::CacheReq => self.kind == Role::Cache,
            Kind::ClassifyReq => self.kind.classifies(),
            _ => false,
        }
    }

    /// Whether frames of this kind go to the connection's streams. Every service may have streams.
    pub(super) fn takes_streams(self, kind: Kind) -> bool {
        kind.is_stream() && kind.since() <= self.version
    }

    /// Whether the service takes requests of this kind one by one, and not in a batch. So the
    /// batches of small requests stay as they are, and one batch holds at most one large body.
    pub(super) fn takes_alone(self, kind: Kind) -> bool {
        kind.since() <= self.version
            && match kind {
                Kind::BytesReq => self.kind == Role::Cache,
                Kind::InferReq => self.kind.classifies(),
                Kind::ForgetReq | Kind::FlushReq => self.kind == Role::Memo,
                _ => false,
            }
    }
}

/// The longest body of a `BytesReq` that writes.
const LONGEST_WRITE: u32 = (BYTES_WRITE_HEAD + MAX_VALUE) as u32;

/// The longest body of a `FlushReq`: a length and a name.
const LONGEST_FLUSH: u32 = 1 + MAX_NAME_LEN as u32;

const _: () = assert!(LONGEST_WRITE <= MAX_LARGE_BODY);

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
    let Some(version) = hello.common_version() else {
        let (min, max) = (hello.version_min, hello.version_max);
        let text = format!(
            "the client speaks protocol versions {min} to {max}; the server {OLDEST_VERSION} to \
             {VERSION}"
        );
        return refuse(out, header.id, Status::Unsupported, &text, Refusal::NoCommonVersion);
    };
    let Some((rights, tenant)) = shared.options.admit(hello.token) else {
        let text =
            if hello.token.is_empty() { "a token is required" } else { "the token is wrong" };
        return refuse(out, header.id, Status::Unauthenticated, text, Refusal::WrongToken);
    };
    // In this order: after a change in between, the connection counts as older, never as newer.
    let generation = shared.service.generation();
    let identity = shared.service.identity();
    let input_len = identity.shape.byte_len().and_then(|len| u32::try_from(len).ok());
    let serves = Serves { kind: identity.service, version, generation, input_len, rights };
    let welcome = Welcome {
        version,
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
    Greeting::Welcomed { consumed: HEADER_LEN + header.body_len as usize, serves, tenant }
}

fn refuse(out: &mut Vec<u8>, id: u64, status: Status, text: &str, refusal: Refusal) -> Greeting {
    Message::Error { status, text, connection: true }.encode(id, out);
    Greeting::Refused(refusal)
}

/// Answers browsers, `curl` and health checks in HTTP.
fn answer_http(service: Role, out: &mut Vec<u8>) {
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
