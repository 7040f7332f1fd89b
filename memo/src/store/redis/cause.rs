//! Causes of Redis errors in the operator's words, with a remedy where there is one.

use afterimage_wire::text::Escaped;
use redis::{ErrorKind, RedisError, ServerErrorKind};

/// What failed, and what to do about it. The text is safe to print.
pub(super) fn cause(error: &RedisError) -> String {
    with_remedy(remedy(error, &error.to_string()), error)
}

/// The same for an attempt to connect, with TLS or without.
pub(super) fn cause_of_no_connection(error: &RedisError, has_tls: bool) -> String {
    let text = error.to_string();
    let closed = ["reset by peer", "end of file", "Broken pipe"];
    let remedy = match remedy(error, &text) {
        "" if has_tls && text.contains("timed out") => {
            "no TLS connection in time; if the server does not speak TLS, write redis://"
        }
        "" if !has_tls && closed.iter().any(|part| text.contains(part)) => {
            "the server closed the connection; if it requires TLS, write rediss://"
        }
        "" if !has_tls && text.contains("invalid reply") => {
            "this may be no Redis server; if it requires TLS, write rediss://"
        }
        remedy => remedy,
    };
    with_remedy(remedy, error)
}

fn with_remedy(remedy: &str, error: &RedisError) -> String {
    let text = Escaped(error);
    if remedy.is_empty() { text.to_string() } else { format!("{remedy} ({text})") }
}

fn remedy(error: &RedisError, text: &str) -> &'static str {
    let has = |part: &str| text.contains(part);
    match error.kind() {
        ErrorKind::Server(ServerErrorKind::Moved | ServerErrorKind::CrossSlot) => {
            "the server belongs to a cluster; write redis+cluster:// or rediss+cluster://"
        }
        ErrorKind::AuthenticationFailed => "wrong user or password",
        // Inside an error of a cluster, only the text is left.
        _ if has("WRONGPASS") || has("AuthenticationFailed") => "wrong user or password",
        _ if has("NOAUTH") => "the server requires a password",
        _ if has("DB index is out of range") => "the server has no database of this number",
        _ if has("cluster support disabled") => {
            "the server does not belong to a cluster; write redis:// or rediss://"
        }
        _ if has("InvalidContentType") => {
            "the server does not speak TLS; write redis:// instead of rediss://"
        }
        _ => "",
    }
}
