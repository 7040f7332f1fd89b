//! Header fields of one connection, which a proxy does not forward (RFC 9110, 7.6.1).

use hyper::HeaderMap;
use hyper::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
    VIA,
};

/// The name of this proxy in `Via` and `Cache-Status`.
pub(crate) const NAME: &str = "afterimage";

/// The value of `Via` that this proxy adds to requests.
pub(crate) const OWN_VIA: HeaderValue = HeaderValue::from_static("1.1 afterimage");

/// Passes of one request through proxies of this name, before it counts as a loop. Two memos in a
/// row are legitimate.
const MAX_PASSES: usize = 4;

/// Removes the fields that belong to the connection of a request or a response.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let trailers = headers.get_all(TE).iter().any(|value| lists(value, "trailers"));
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let of_connection = [CONNECTION, TE, TRANSFER_ENCODING, UPGRADE];
    remove(headers, |name| {
        of_connection.contains(name)
            || named.contains(name)
            || ["keep-alive", "proxy-connection"].contains(&name.as_str())
    });
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
}

/// Removes some fields. The others keep their order, which removing one by one does not.
pub(crate) fn remove(headers: &mut HeaderMap, is_removed: impl Fn(&HeaderName) -> bool) {
    if !headers.keys().any(&is_removed) {
        return;
    }
    let mut last = None;
    for (name, value) in std::mem::take(headers) {
        // Further values of a field come without its name.
        last = name.or(last);
        if let Some(name) = last.as_ref().filter(|name| !is_removed(name)) {
            headers.append(name, value);
        }
    }
}

/// Prepares the fields of a request for the server.
///
/// # Errors
/// Why the request is refused: two servers could disagree about its end, or it goes in circles.
pub(crate) fn prepare_request(headers: &mut HeaderMap) -> Result<(), &'static str> {
    let encodings: Vec<_> = headers.get_all(TRANSFER_ENCODING).iter().collect();
    if !encodings.is_empty() {
        if headers.contains_key(CONTENT_LENGTH) {
            return Err("the request has both Content-Length and Transfer-Encoding");
        }
        if encodings.len() > 1 || !encodings[0].as_bytes().eq_ignore_ascii_case(b"chunked") {
            return Err("the request has a Transfer-Encoding other than chunked");
        }
    }
    if headers.get_all(CONTENT_LENGTH).iter().count() > 1 {
        return Err("the request has more than one Content-Length");
    }
    if is_loop(headers) {
        return Err("the request has passed this proxy several times; its URL points back to it");
    }
    remove_hop_by_hop(headers);
    // The listener has answered it: the body is on its way.
    remove(headers, |name| *name == EXPECT);
    headers.append(VIA, OWN_VIA);
    Ok(())
}

/// Whether a request has passed this proxy several times.
pub(crate) fn is_loop(headers: &HeaderMap) -> bool {
    let passes = headers.get_all(VIA).iter().filter_map(|value| value.to_str().ok());
    passes.map(|value| value.matches(NAME).count()).sum::<usize>() >= MAX_PASSES
}

/// The field that has the length of the JSON before binary tensors.
pub(crate) const JSON_LENGTH: HeaderName =
    HeaderName::from_static("inference-header-content-length");

/// The length of the JSON before binary tensors.
///
/// # Errors
/// When the field is there and is not one number.
pub(crate) fn json_len(headers: &HeaderMap) -> Result<Option<usize>, ()> {
    let mut values = headers.get_all(JSON_LENGTH).iter();
    match (values.next(), values.next()) {
        (None, _) => Ok(None),
        (Some(value), None) => {
            let digits = value.to_str().map_err(drop)?;
            let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
            if is_number { digits.parse().map(Some).map_err(drop) } else { Err(()) }
        }
        (Some(_), Some(_)) => Err(()),
    }
}

/// Whether a field's value lists a token.
pub(crate) fn lists(value: &HeaderValue, token: &str) -> bool {
    let value = value.to_str().unwrap_or_default();
    value.split(',').any(|part| {
        let name = part.split(';').next().unwrap_or_default();
        name.trim().eq_ignore_ascii_case(token)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    #[test]
    fn fields_of_the_connection_are_removed_and_others_stay() {
        let mut found = headers(&[
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "gzip, trailers;q=0.5"),
            ("trailer", "checksum"),
            ("authorization", "Bearer a"),
        ]);
        prepare_request(&mut found).unwrap();
        let expected = headers(&[
            ("trailer", "checksum"),
            ("authorization", "Bearer a"),
            ("te", "trailers"),
            ("via", "1.1 afterimage"),
        ]);
        assert_eq!(found, expected);
    }

    #[test]
    fn ambiguous_lengths_and_loops_are_refused() {
        for fields in [
            &[("transfer-encoding", "chunked"), ("content-length", "5")][..],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("content-length", "5"), ("content-length", "5")],
            &[("via", "1.1 afterimage, 1.1 afterimage"), ("via", "1.1 afterimage, 2 afterimage")],
        ] {
            assert!(prepare_request(&mut headers(fields)).is_err(), "{fields:?}");
        }
        assert!(prepare_request(&mut headers(&[("transfer-encoding", "Chunked")])).is_ok());
    }
}
