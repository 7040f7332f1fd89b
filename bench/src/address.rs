//! Servers under load: their addresses as users write them, how to connect, and how they introduce
//! themselves. Texts about them contain no secrets.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use afterimage_wire::client::host_and_port;
use afterimage_wire::proto::Welcome;
use afterimage_wire::tls::ClientTls;

use crate::dialect::Dialect;
use crate::workload::Protocol;

/// The text that replaces a secret.
const HIDDEN: &str = "***";

/// A server's address, such as `127.0.0.1:7400` or `redis://:PASSWORD@localhost:6379/2`.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    /// The protocol.
    pub dialect: Dialect,
    /// Host and port.
    pub place: String,
    /// The path of a model at an HTTP server, with its slash; else empty.
    pub path: String,
    /// User and password of Redis; both may be empty.
    pub login: Login,
    /// The password, which the server gets as a token; empty for none.
    pub password: String,
}

/// The user and the database of a Redis server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Login {
    /// The user; empty for the default one.
    pub user: String,
    /// The number of the database.
    pub database: u32,
}

/// A server and how to connect to it.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// Its address.
    pub addr: SocketAddr,
    /// Its protocol.
    pub dialect: Dialect,
    /// The token for the handshake, or the password of Redis; empty for none.
    pub token: &'a [u8],
    /// The user and the database of Redis.
    pub login: &'a Login,
    /// TLS; `None` for none.
    pub tls: Option<&'a ClientTls>,
    /// The limit for connecting, and for each answer of the handshake.
    pub timeout: Duration,
}

/// How a server introduces itself.
#[derive(Debug)]
pub(crate) enum Introduction {
    /// A server of the Afterimage protocol.
    Welcome(Welcome),
    /// Another server: name and version.
    Name(String),
    /// A model server: name and version.
    Model(String),
}

impl Address {
    /// Reads an address. Without a scheme the protocol is Afterimage's own; Redis and memcached
    /// have default ports.
    ///
    /// # Errors
    /// One sentence that names the wrong part. It never contains a password.
    pub fn parse(text: &str) -> Result<Self, String> {
        let shown = redacted(text);
        let (dialect, rest) = Dialect::split(text).ok_or_else(|| {
            let known = Dialect::ALL.map(Dialect::scheme).join("://, ");
            format!("{shown} has an unknown scheme; use host:port or one of {known}://")
        })?;
        if let Some(extra) = rest.find(['?', '#']).filter(|_| dialect != Dialect::Wire) {
            let encode = if rest[extra..].contains('@') {
                "; in a password write % and two hexadecimal digits for it"
            } else {
                ""
            };
            let sign = &rest[extra..=extra];
            return Err(format!("{shown} has an unexpected {sign:?}{encode}"));
        }
        let (userinfo, rest) = match rest.rsplit_once('@') {
            Some((userinfo, rest)) => (Some(userinfo), rest),
            None => (None, rest),
        };
        let (place, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut address = Address {
            dialect,
            place: with_port(dialect, place),
            path: String::new(),
            login: Login::default(),
            password: String::new(),
        };
        if let Some(userinfo) = userinfo {
            if dialect != Dialect::Redis {
                return Err(format!(
                    "{shown} has a user or password, which only redis:// takes; use --token-file"
                ));
            }
            if userinfo.contains('/') {
                return Err(format!("{shown}: write %2F for a / in the password"));
            }
            let (user, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
            let decode = |part| {
                decoded(part).ok_or_else(|| {
                    format!("{shown}: write a % in user or password as %25, and use UTF-8")
                })
            };
            (address.login.user, address.password) = (decode(user)?, decode(password)?);
        }
        if dialect == Dialect::Http {
            address.path = format!("/{path}");
            Protocol::of(&address.path).map_err(|error| format!("{shown}: {error}"))?;
        } else if !path.is_empty() {
            let database = path.parse().ok().filter(|_| dialect == Dialect::Redis);
            address.login.database = database.ok_or_else(|| {
                format!("{shown}: {path:?} after the port is not a database number")
            })?;
        }
        Ok(address)
    }

    /// The first address of the host that accepts a connection. A host with one address is not
    /// tried.
    ///
    /// # Errors
    /// When the name has no address, or no address accepts a connection: the reason of each.
    pub fn reachable(&self, timeout: Duration) -> io::Result<SocketAddr> {
        let place = &self.place;
        let failed = |kind, text: String| Err(io::Error::new(kind, text));
        let Some(host_and_port) = host_and_port(place) else {
            let text = format!("{place:?} is not HOST:PORT, for example 127.0.0.1:7400");
            return failed(io::ErrorKind::InvalidInput, text);
        };
        let found = match host_and_port.to_socket_addrs() {
            Ok(found) => found.collect::<Vec<_>>(),
            Err(error) => return failed(error.kind(), format!("cannot resolve {place}: {error}")),
        };
        match found[..] {
            [] => failed(io::ErrorKind::NotFound, format!("{place} has no address")),
            [only] => Ok(only),
            _ => first_open(&found, timeout).map_err(|reasons| {
                io::Error::other(format!("cannot connect to {place} ({reasons})"))
            }),
        }
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// The address without its password.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.dialect {
            Dialect::Wire => f.write_str(&self.place),
            dialect => write!(f, "{dialect}://{}{}", self.place, self.path),
        }
    }
}

/// The first address that accepts a connection, or the reason of each refusal.
fn first_open(addrs: &[SocketAddr], timeout: Duration) -> Result<SocketAddr, String> {
    let mut reasons = Vec::new();
    for addr in addrs {
        match TcpStream::connect_timeout(addr, timeout) {
            Ok(_) => return Ok(*addr),
            Err(error) => reasons.push(format!("{addr}: {error}")),
        }
    }
    Err(reasons.join("; "))
}

/// Adds the default port of Redis, memcached and HTTP to a host without a port.
fn with_port(dialect: Dialect, place: &str) -> String {
    let port = match dialect {
        Dialect::Redis => 6379,
        Dialect::Memcached | Dialect::MemcachedMeta => 11211,
        Dialect::Http => 80,
        Dialect::Wire | Dialect::Echo => return place.to_owned(),
    };
    // The colons of an IPv6 address are inside its brackets.
    let after_brackets = place.rsplit(']').next().unwrap_or(place);
    if place.is_empty() || after_brackets.contains(':') {
        place.to_owned()
    } else {
        format!("{place}:{port}")
    }
}

/// A percent-encoded text decoded; `None` for a wrong code or for bytes that are not UTF-8.
fn decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digit = |byte: u8| char::from(byte).to_digit(16);
                (digit(rest.next()?)? << 4 | digit(rest.next()?)?) as u8
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// The text without user and password, wherever its author may have put the `@`.
pub fn redacted(text: &str) -> String {
    let Some((before, place)) = text.rsplit_once('@') else { return text.to_owned() };
    let scheme =
        before.split_once("://").map_or(String::new(), |(scheme, _)| format!("{scheme}://"));
    format!("{scheme}{HIDDEN}@{place}")
}

/// A command line without the secrets in it: tokens, and passwords in addresses.
pub fn redacted_command(arguments: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut is_token = false;
    let redact = |argument: String| {
        if std::mem::replace(&mut is_token, argument == "--token") {
            return HIDDEN.to_owned();
        }
        match argument.split_once('=') {
            Some(("--token", _)) => format!("--token={HIDDEN}"),
            Some((flag, value)) if flag.starts_with("--") => format!("{flag}={}", redacted(value)),
            _ => redacted(&argument),
        }
    };
    arguments.into_iter().map(redact).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        Address::parse(text).unwrap_err()
    }

    #[test]
    fn an_address_has_protocol_place_login_and_database() {
        let parse = |text| Address::parse(text).unwrap();
        let plain = parse("127.0.0.1:7400");
        assert_eq!((plain.dialect, plain.place.as_str()), (Dialect::Wire, "127.0.0.1:7400"));
        let redis = parse("redis://us%40er:p%2Fw%25@[::1]/2");
        assert_eq!(redis.place, "[::1]:6379");
        assert_eq!((redis.login.user.as_str(), redis.password.as_str()), ("us@er", "p/w%"));
        assert_eq!(redis.login.database, 2);
        let only_password = parse("redis://:secret@host");
        assert_eq!(only_password.place, "host:6379");
        assert_eq!(
            (only_password.login.user, only_password.password.as_str()),
            (String::new(), "secret")
        );
        assert_eq!(parse("memcached+meta://h/").place, "h:11211");
        assert_eq!(parse("redis://h:1").place, "h:1");
    }

    #[test]
    fn an_error_names_the_part_and_hides_the_password() {
        for (text, named) in [
            ("redis://:se/cret@host", "%2F"),
            ("redis://:se#cret@host", "\"#\""),
            ("redis://:se?cret@host", "\"?\""),
            ("redis://:se%zzcret@host", "%25"),
            ("redis://:secret@host?db=3", "\"?\""),
            ("redis://:secret@host/cret", "not a database number"),
            ("memcached://:secret@host", "only redis://"),
            (":secret@host:6379", "only redis://"),
            ("ftp://:secret@host", "unknown scheme"),
            ("http://:secret@host/v2/models/m", "only redis://"),
            ("http://host/v1/chat", "/v2/models/NAME"),
            ("rediss://:secret@host", "unknown scheme"),
        ] {
            let error = refused(text);
            assert!(error.contains(named), "{text}: {error}");
            assert!(
                !error.contains("secret") && !error.contains("se/") && !error.contains("se#"),
                "{error}"
            );
        }
        let address = Address::parse("redis://:secret@host").unwrap();
        assert_eq!(
            format!("{address} {address:?}"),
            "redis://host:6379 Address(redis://host:6379)"
        );
    }

    #[test]
    fn a_command_line_is_shown_without_secrets() {
        let command = [
            "bench",
            "--token",
            "secret",
            "--token=secret",
            "redis://:secret@h",
            "--target=redis://u:sec@ret@h",
            "--depth=1",
        ];
        let shown = redacted_command(command.map(str::to_owned));
        assert_eq!(
            shown,
            [
                "bench",
                "--token",
                "***",
                "--token=***",
                "redis://***@h",
                "--target=redis://***@h",
                "--depth=1"
            ]
        );
    }

    #[test]
    fn every_address_of_a_name_is_tried() {
        let bind = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (open, timeout) = (bind(), Duration::from_secs(5));
        let (open_addr, closed) = (open.local_addr().unwrap(), bind().local_addr().unwrap());
        assert_eq!(first_open(&[closed, open_addr], timeout), Ok(open_addr));
        let reasons = first_open(&[closed, closed], timeout).unwrap_err();
        assert_eq!(reasons.matches(&closed.to_string()).count(), 2, "{reasons}");
        let here = Address::parse(&format!("localhost:{}", open_addr.port())).unwrap();
        assert_eq!(here.reachable(timeout).unwrap(), open_addr);
        let wrong = Address::parse("7400").unwrap().reachable(timeout).unwrap_err().to_string();
        assert!(wrong.contains("HOST:PORT"), "{wrong}");
    }
}
