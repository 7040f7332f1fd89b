//! Addresses and connections: the form HOST:PORT, and errors that say what to do.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use afterimage_wire::client::{CallError, ConnectionError, Report, host_and_port};
use afterimage_wire::{ClientOptions, Connection, Status};
use anyhow::{Context, anyhow};

/// The host of HOST:PORT.
pub(crate) fn host(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _port)| host)
}

/// Whether traffic to HOST:PORT stays on this machine.
pub(crate) fn is_local(address: &str) -> bool {
    let host = host(address).trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The first address of HOST:PORT.
pub(crate) fn resolve(address: &str) -> anyhow::Result<SocketAddr> {
    parse(address).map_err(|expected| anyhow!("invalid address {address:?}: {expected}"))?;
    let place = host_and_port(address).unwrap_or((address, 0));
    let mut found = place.to_socket_addrs().with_context(|| format!("cannot resolve {address}"))?;
    found.next().with_context(|| format!("{address} resolves to no address"))
}

/// Checks that a text has the form HOST:PORT; the error states the expected form.
pub(crate) fn parse(text: &str) -> Result<String, String> {
    const EXAMPLE: &str = "for example 127.0.0.1:7400";
    // Before the errors that quote a part of the text: it may be a password.
    if text.contains('@') {
        return Err(format!("it takes no user and no password; expected HOST:PORT, {EXAMPLE}"));
    }
    if text.starts_with("unix:") || text.starts_with('/') {
        return Err(format!("Unix sockets are not supported; expected HOST:PORT, {EXAMPLE}"));
    }
    if text.contains("://") {
        return Err(format!("expected HOST:PORT without a scheme, {EXAMPLE}"));
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(format!("expected HOST:PORT, {EXAMPLE}"));
    };
    if host.is_empty() {
        return Err(format!("the host is missing; expected HOST:PORT, for example 0.0.0.0{text}"));
    }
    if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
        return Err("an IPv6 address needs brackets, for example [::1]:7400".into());
    }
    if port.parse::<u16>().is_err() {
        return Err(format!(
            "the port {port:?} is not a number from 0 to 65535; expected HOST:PORT, {EXAMPLE}"
        ));
    }
    Ok(text.to_owned())
}

/// Connects to a service. The error names its address and says what to do.
pub(crate) async fn connect(address: &str, options: ClientOptions) -> anyhow::Result<Connection> {
    Connection::connect(address, options).await.map_err(|error| explained(address, &error))
}

/// The error of a call to the service at `address`, for people.
pub(crate) fn explained(address: &str, error: &CallError) -> anyhow::Error {
    use ConnectionError::{Connect, ConnectTimeout, HandshakeTimeout, Rejected};
    let cause = match error {
        CallError::Unavailable { last_error: cause, .. }
        | CallError::Refused { reason: cause, .. }
        | CallError::ConnectionLost { cause, .. }
        | CallError::DeadlineExceeded { last_error: Some(cause), .. } => cause,
        CallError::Server { status: Status::Unauthorized, .. } => {
            return anyhow!("{}; give it with --token-file", Report(error));
        }
        error => return anyhow!("{}", Report(error)),
    };
    match &**cause {
        Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused => anyhow!(
            "cannot connect to {address} (connection refused); start a server with: afterimage serve"
        ),
        Connect(error) => anyhow!("cannot connect to {address}: {}", without_code(error)),
        ConnectTimeout { after } => anyhow!("cannot connect to {address} within {after:?}"),
        HandshakeTimeout { after } => anyhow!(
            "{address} accepted the connection and sent no Welcome within {after:?}; is it an \
             Afterimage server?"
        ),
        Rejected { status: Status::Unauthenticated, text } => {
            anyhow!("{address} refused the connection: {text}; give its token with --token-file")
        }
        Rejected { status, text } => anyhow!("{address} refused the connection: {status}: {text}"),
        _ => anyhow!("{}", Report(error)),
    }
}

/// The system's text without its error number, which the text makes redundant.
fn without_code(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((text, _)) => text.to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_error_says_what_is_expected() {
        for good in ["127.0.0.1:7400", "[::1]:0", "localhost:7400", "memo.example.net:1"] {
            assert_eq!(parse(good).as_deref(), Ok(good));
        }
        for (wrong, expected) in [
            ("7400", "expected HOST:PORT, for example 127.0.0.1:7400"),
            ("localhost", "expected HOST:PORT"),
            ("", "expected HOST:PORT"),
            (":19030", "the host is missing; expected HOST:PORT, for example 0.0.0.0:19030"),
            ("unix:/run/afterimage", "Unix sockets are not supported"),
            ("http://127.0.0.1:7400", "without a scheme"),
            ("::1:7400", "an IPv6 address needs brackets"),
            ("127.0.0.1:http", "the port \"http\" is not a number from 0 to 65535"),
            ("127.0.0.1:65536", "the port \"65536\" is not a number"),
            ("redis:hunter2@h", "it takes no user and no password"),
            (":hunter2@h:1", "it takes no user and no password"),
        ] {
            let error = parse(wrong).unwrap_err();
            assert!(error.contains(expected), "{wrong:?}: {error}");
            assert!(error.contains("for example"), "{wrong:?}: {error}");
            assert!(!error.contains("hunter2"), "{wrong:?}: {error}");
        }
        let error = resolve("7400").unwrap_err().to_string();
        assert!(error.starts_with("invalid address \"7400\": expected HOST:PORT"), "{error}");
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_ipv6_address_may_have_a_zone() {
        for address in ["[fe80::1%lo]:7400", "[fe80::1%1]:7400"] {
            match resolve(address).unwrap() {
                SocketAddr::V6(found) => assert_eq!((found.scope_id(), found.port()), (1, 7400)),
                SocketAddr::V4(found) => panic!("{found}"),
            }
        }
        assert!(resolve("[fe80::1%nowhere]:7400").is_err());
    }

    #[test]
    fn loopback_traffic_stays_on_this_machine() {
        for address in ["127.0.0.1:1", "[::1]:1", "localhost:1"] {
            assert!(is_local(address), "{address}");
        }
        assert!(!is_local("192.0.2.1:1") && !is_local("memo.example.net:1"));
        assert_eq!(host("[::1]:7400"), "[::1]");
    }
}
