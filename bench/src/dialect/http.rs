//! Responses of HTTP/1.1 servers, cut out of the stream in place.

use std::borrow::Cow;

use afterimage_wire::Status;

use crate::outcome::Outcome;

/// The longest head of a response.
const MAX_HEAD: usize = 64 << 10;

/// The most headers of a response.
const MAX_HEADERS: usize = 64;

/// The longest accepted body of a response. A longer one means that the server is broken.
pub(crate) const MAX_BODY: usize = 64 << 20;

/// A whole response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response<'a> {
    /// The status code.
    pub(crate) code: u16,
    /// How a cache answered, from `Cache-Status`; without the header a miss.
    pub(crate) outcome: Outcome,
    /// The body without its transfer coding.
    pub(crate) body: Cow<'a, [u8]>,
}

/// The first response in `input` and its length; `None` if it is incomplete.
///
/// # Errors
/// One sentence about the part that is not HTTP/1.1, or above its limit.
pub(crate) fn cut(input: &[u8]) -> Result<Option<(Response<'_>, usize)>, String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let start = match head.parse(input) {
        Ok(httparse::Status::Complete(start)) => start,
        Ok(httparse::Status::Partial) if input.len() < MAX_HEAD => return Ok(None),
        Ok(httparse::Status::Partial) => {
            return Err(format!("the head of a response has more than {MAX_HEAD} bytes"));
        }
        Err(error) => return Err(format!("invalid response: {error}")),
    };
    let code = head.code.unwrap_or_default();
    if code < 200 {
        // An informational response precedes the final one.
        let rest = cut(&input[start..])?;
        return Ok(rest.map(|(response, len)| (response, start + len)));
    }
    let value = |name: &str| {
        let found = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| header.value)
    };
    let (body, len) = if value("transfer-encoding").is_some() {
        let Some((body, len)) = dechunked(&input[start..])? else { return Ok(None) };
        (Cow::Owned(body), start + len)
    } else if code == 204 || code == 304 {
        (Cow::Borrowed(&[][..]), start)
    } else {
        let length =
            value("content-length").and_then(|text| str::from_utf8(text).ok()?.parse().ok());
        let length: usize = length.ok_or("a response has no valid Content-Length")?;
        if length > MAX_BODY {
            return Err(format!(
                "the body of a response is {length} bytes; the limit is {MAX_BODY}"
            ));
        }
        let Some(body) = input.get(start..start + length) else { return Ok(None) };
        (Cow::Borrowed(body), start + length)
    };
    let outcome = value("cache-status").map_or(Outcome::Miss, outcome);
    Ok(Some((Response { code, outcome, body }, len)))
}

/// The body of a chunked message and its length with the chunk heads; `None` if it is incomplete.
fn dechunked(input: &[u8]) -> Result<Option<(Vec<u8>, usize)>, String> {
    let (mut body, mut at) = (Vec::new(), 0);
    loop {
        let size = match httparse::parse_chunk_size(&input[at..]) {
            Ok(httparse::Status::Complete((head, size))) => {
                at += head;
                usize::try_from(size).ok().filter(|&size| size <= MAX_BODY - body.len())
            }
            Ok(httparse::Status::Partial) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        let size = size.ok_or_else(|| format!("a response has more than {MAX_BODY} bytes"))?;
        if size == 0 {
            // Trailers end with an empty line; mostly there are none.
            let mut lines = input[at..].split_inclusive(|&byte| byte == b'\n');
            return loop {
                let Some(line) = lines.next().filter(|line| line.ends_with(b"\n")) else {
                    break Ok(None);
                };
                at += line.len();
                if line.trim_ascii().is_empty() {
                    break Ok(Some((body, at)));
                }
            };
        }
        let Some(chunk) = input.get(at..at + size + 2) else { return Ok(None) };
        body.extend_from_slice(&chunk[..size]);
        at += size + 2;
    }
}

/// The outcome that a `Cache-Status` (RFC 9211) describes. A request of several rows is a hit only
/// if no row was computed.
fn outcome(status: &[u8]) -> Outcome {
    let mut words = status.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
    if words.clone().any(|word| word == b"hit") {
        Outcome::Hit
    } else if words.any(|word| word == b"collapsed") {
        Outcome::Coalesced
    } else {
        Outcome::Miss
    }
}

/// The status of our protocol that is nearest to a status code of HTTP.
pub(crate) fn status(code: u16) -> Status {
    match code {
        401 => Status::Unauthenticated,
        403 => Status::Unauthorized,
        413 => Status::TooLarge,
        429 | 503 => Status::Overloaded,
        501 | 505 => Status::Unsupported,
        504 => Status::DeadlineExceeded,
        400..=499 => Status::BadArgument,
        _ => Status::UpstreamError,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(input: &[u8]) -> (u16, Outcome, Vec<u8>, usize) {
        let (response, len) = cut(input).unwrap().unwrap();
        (response.code, response.outcome, response.body.into_owned(), len)
    }

    #[test]
    fn every_cut_of_a_response_waits_for_the_rest() {
        let plain = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nCache-Status: afterimage; hit; age=1\r\n\r\nabc";
        let chunked =
            b"HTTP/1.1 500 No\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1;x=y\r\nc\r\n0\r\nT: 1\r\n\r\n";
        let after_hint = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 None\r\n\r\n";
        for whole in [&plain[..], chunked, after_hint] {
            for end in 0..whole.len() {
                assert_eq!(cut(&whole[..end]).unwrap(), None, "{end} bytes");
            }
            let twice = [whole, whole].concat();
            assert_eq!(cut(&twice).unwrap().unwrap().1, whole.len());
        }
        assert_eq!(response(plain), (200, Outcome::Hit, b"abc".to_vec(), plain.len()));
        assert_eq!(response(chunked), (500, Outcome::Miss, b"abc".to_vec(), chunked.len()));
    }

    #[test]
    fn cache_status_decides_the_outcome() {
        for (status, expected) in [
            ("afterimage; hit; age=0; ttl=60", Outcome::Hit),
            ("afterimage; fwd=miss; stored", Outcome::Miss),
            ("afterimage; fwd=miss; stored; collapsed", Outcome::Coalesced),
            ("afterimage; fwd=partial; stored; detail=\"1 of 2 rows\"", Outcome::Miss),
            ("afterimage; fwd=bypass; detail=credentials", Outcome::Miss),
        ] {
            assert_eq!(outcome(status.as_bytes()), expected, "{status}");
        }
    }

    #[test]
    fn other_bytes_than_http_are_refused() {
        for input in [
            &b"SSH-2.0-OpenSSH\r\n"[..],
            b"HTTP/1.1 200 OK\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        ] {
            assert!(cut(input).is_err(), "{}", input.escape_ascii());
        }
    }
}
