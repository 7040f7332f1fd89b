//! Statuses of gRPC, in trailers, and the time limits of calls.

use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, StatusCode};

/// The status of a call that succeeded.
pub const OK: u32 = 0;
/// The client has given up.
pub const CANCELLED: u32 = 1;
/// The status is missing or has no meaning.
pub const UNKNOWN: u32 = 2;
/// The client sent something wrong.
pub const INVALID_ARGUMENT: u32 = 3;
/// The time limit has passed.
pub const DEADLINE_EXCEEDED: u32 = 4;
/// There is no such thing.
pub const NOT_FOUND: u32 = 5;
/// The client is known and may not do this.
pub const PERMISSION_DENIED: u32 = 7;
/// A limit is reached.
pub const RESOURCE_EXHAUSTED: u32 = 8;
/// The server has no such method.
pub const UNIMPLEMENTED: u32 = 12;
/// The server or the call is at fault.
pub const INTERNAL: u32 = 13;
/// The server cannot answer now; try again.
pub const UNAVAILABLE: u32 = 14;
/// The credentials are missing or wrong.
pub const UNAUTHENTICATED: u32 = 16;

/// The content type of calls and replies.
pub const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// The status of a reply: in its trailers, or else that of its HTTP status.
pub(crate) fn of(status: StatusCode, fields: &HeaderMap) -> u32 {
    let code = fields.get("grpc-status").and_then(|value| value.to_str().ok());
    match code {
        Some(code) => code.parse().unwrap_or(UNKNOWN),
        None => match status.as_u16() {
            400 => INTERNAL,
            401 => UNAUTHENTICATED,
            403 => PERMISSION_DENIED,
            404 => UNIMPLEMENTED,
            429 | 502..=504 => UNAVAILABLE,
            _ => UNKNOWN,
        },
    }
}

/// The fields of a reply that is an error of Afterimage itself.
pub fn error(code: u32, text: &str) -> HeaderMap {
    let mut fields = HeaderMap::new();
    fields.insert(CONTENT_TYPE, GRPC);
    fields.insert("grpc-status", HeaderValue::from(code));
    let text = escaped(&format!("afterimage: {text}"));
    if let Ok(text) = HeaderValue::from_str(&text) {
        fields.insert("grpc-message", text);
    }
    fields
}

/// A text for `grpc-message`: printable ASCII without `%`, all other bytes as `%XX`.
fn escaped(text: &str) -> String {
    use std::fmt::Write as _;

    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

/// The time limit of a call, in `grpc-timeout`: at most eight digits and a unit.
pub fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get("grpc-timeout")?.as_bytes();
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    match unit {
        b'H' => Some(Duration::from_secs(number * 3600)),
        b'M' => Some(Duration::from_secs(number * 60)),
        b'S' => Some(Duration::from_secs(number)),
        b'm' => Some(Duration::from_millis(number)),
        b'u' => Some(Duration::from_micros(number)),
        b'n' => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

/// A time limit for `grpc-timeout`, in milliseconds.
pub(crate) fn timeout_value(limit: Duration) -> HeaderValue {
    let millis = limit.as_millis().clamp(1, 99_999_999);
    HeaderValue::try_from(format!("{millis}m")).expect("digits and a letter are visible ASCII")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_limits_have_eight_digits_and_a_unit() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", HeaderValue::from_static(text));
            timeout(&headers)
        };
        assert_eq!(read("100m"), Some(Duration::from_millis(100)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(read("5S"), Some(Duration::from_secs(5)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        for wrong in ["", "5", "S", "123456789S", "-1S", "5s", "1.5S", "+1S"] {
            assert_eq!(read(wrong), None, "{wrong:?}");
        }
        assert_eq!(timeout(&HeaderMap::new()), None);
        assert_eq!(timeout_value(Duration::from_secs(120)), "120000m");
        assert_eq!(timeout_value(Duration::ZERO), "1m");
        assert_eq!(timeout_value(Duration::MAX), "99999999m");
    }

    #[test]
    fn statuses_come_from_trailers_or_from_http() {
        assert_eq!(of(StatusCode::OK, &error(7, "no")), 7);
        assert_eq!(of(StatusCode::BAD_GATEWAY, &HeaderMap::new()), UNAVAILABLE);
        assert_eq!(of(StatusCode::OK, &HeaderMap::new()), UNKNOWN);
        let mut odd = HeaderMap::new();
        odd.insert("grpc-status", HeaderValue::from_static("x"));
        assert_eq!(of(StatusCode::OK, &odd), UNKNOWN);
        assert_eq!(error(14, "50 % \u{fc}")["grpc-message"], "afterimage: 50 %25 %C3%BC");
    }
}
