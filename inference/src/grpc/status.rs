//! Statuses of gRPC, in trailers, and the time limits of calls.

use std::time::Duration;

use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, StatusCode};

/// The status of a call that succeeded.
pub(crate) const OK: u32 = 0;
pub(crate) const CANCELLED: u32 = 1;
pub(crate) const UNKNOWN: u32 = 2;
pub(crate) const INVALID_ARGUMENT: u32 = 3;
pub(crate) const DEADLINE_EXCEEDED: u32 = 4;
pub(crate) const PERMISSION_DENIED: u32 = 7;
pub(crate) const RESOURCE_EXHAUSTED: u32 = 8;
pub(crate) const UNIMPLEMENTED: u32 = 12;
pub(crate) const INTERNAL: u32 = 13;
pub(crate) const UNAVAILABLE: u32 = 14;
pub(crate) const UNAUTHENTICATED: u32 = 16;

pub(crate) const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

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

/// The fields of a reply that is an error of the proxy itself.
pub(crate) fn error(code: u32, text: &str) -> HeaderMap {
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
pub(crate) fn timeout(headers: &HeaderMap) -> Option<Duration> {
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
