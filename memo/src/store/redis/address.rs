//! Addresses of Redis servers and clusters: parsing of their URLs.

use redis::{ProtocolVersion, RedisConnectionInfo};

use afterimage_wire::text::Escaped;

/// The port of a server whose URL names none.
const DEFAULT_PORT: u16 = 6379;

/// Where a Redis server or cluster is, and the login.
#[derive(Clone)]
pub(super) struct Address {
    pub(super) has_tls: bool,
    pub(super) is_cluster: bool,
    user: Option<String>,
    pub(super) password: Option<String>,
    pub(super) hosts: Vec<(String, u16)>,
    database: i64,
    pub(super) protocol: ProtocolVersion,
}

impl Address {
    /// Parses `SCHEME://[USER:PASSWORD@]HOST[:PORT][/DATABASE][?protocol=2|3]`. A cluster may have
    /// several hosts, separated by commas.
    ///
    /// # Errors
    /// The reason, without any secret.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong_scheme)?;
        let (has_tls, is_cluster) = match scheme {
            "redis" => (false, false),
            "rediss" => (true, false),
            "redis+cluster" => (false, true),
            "rediss+cluster" => (true, true),
            _ => return Err(wrong_scheme()),
        };
        let (login, rest) = match rest.rsplit_once('@') {
            Some((login, rest)) => (Some(login), rest),
            None => (None, rest),
        };
        let (user, password) = login.map(parse_login).transpose()?.unwrap_or_default();
        if rest.contains('#') {
            return Err("the address ends in a fragment (`#…`), which has no meaning here".into());
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let protocol = parse_query(query)?;
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let database =
            match path {
                "" => 0,
                path => path.parse().ok().filter(|&database| database >= 0).ok_or(
                    "the path must be the number of a database, as in redis://HOST:PORT/2",
                )?,
            };
        if is_cluster && database != 0 {
            return Err("a cluster has database 0 only; remove the path".into());
        }
        let hosts = hosts.split(',').map(parse_host).collect::<Result<Vec<_>, _>>()?;
        if !is_cluster && hosts.len() > 1 {
            return Err(format!("several hosts are a cluster's; write {scheme}+cluster://"));
        }
        Ok(Address { has_tls, is_cluster, user, password, hosts, database, protocol })
    }

    /// The settings of a login.
    pub(super) fn login(&self) -> RedisConnectionInfo {
        let mut login =
            RedisConnectionInfo::default().set_db(self.database).set_protocol(self.protocol);
        if let Some(user) = &self.user {
            login = login.set_username(user);
        }
        if let Some(password) = &self.password {
            login = login.set_password(password);
        }
        login
    }
}

/// The address for messages: without a login, and without text that could be a part of one.
pub(super) fn for_messages(url: &str) -> String {
    let scheme = url.split_once("://").map_or("redis", |(scheme, _)| scheme);
    let Ok(Address { user, password, hosts, database, .. }) = Address::parse(url) else {
        return format!("{}://…", Escaped(scheme));
    };
    let login = if user.is_some() || password.is_some() { "…@" } else { "" };
    let host = |(host, port): &(String, u16)| match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    let hosts = hosts.iter().map(host).collect::<Vec<_>>().join(",");
    let database = if database == 0 { String::new() } else { format!("/{database}") };
    Escaped(format!("{scheme}://{login}{hosts}{database}")).to_string()
}

fn wrong_scheme() -> String {
    "it must begin with redis://, rediss://, redis+cluster:// or rediss+cluster://".into()
}

/// User and password of `USER:PASSWORD`, `USER` or `:PASSWORD`.
fn parse_login(login: &str) -> Result<(Option<String>, Option<String>), String> {
    for char in ['#', '?', '/', ' '] {
        if login.contains(char) {
            return Err(format!(
                "the user or the password contains {char:?}; percent-encode it as %{:02X}",
                u32::from(char)
            ));
        }
    }
    let (user, password) = login.split_once(':').map_or((login, None), |(u, p)| (u, Some(p)));
    let user = (!user.is_empty()).then(|| decode(user)).transpose()?;
    Ok((user, password.map(decode).transpose()?))
}

/// Decodes `%XX`.
fn decode(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [byte, after @ ..] = rest {
        rest = after;
        bytes.push(match (byte, after) {
            (b'%', [high, low, after @ ..]) => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                let (Some(high), Some(low)) = (digit(high), digit(low)) else {
                    return Err(lone_percent());
                };
                rest = after;
                (high << 4 | low) as u8
            }
            (b'%', _) => return Err(lone_percent()),
            _ => *byte,
        });
    }
    String::from_utf8(bytes).map_err(|_| "the user or the password is not UTF-8".into())
}

fn lone_percent() -> String {
    "the user or the password contains a '%' without two hexadecimal digits; percent-encode it as \
     %25"
    .into()
}

fn parse_host(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => rest.split_once(']').ok_or("an IPv6 address lacks its ']'")?,
        None => text.find(':').map_or((text, ""), |colon| text.split_at(colon)),
    };
    let port = match port {
        "" => DEFAULT_PORT,
        port => port
            .strip_prefix(':')
            .and_then(|port| port.parse().ok())
            .filter(|&port| port > 0)
            .ok_or("a port is not a number from 1 to 65535")?,
    };
    match host {
        "" => Err("it names no host".into()),
        "0.0.0.0" | "::" => Err(format!("{host} is not the address of a server")),
        host => Ok((host.to_owned(), port)),
    }
}

fn parse_query(query: &str) -> Result<ProtocolVersion, String> {
    let mut protocol = ProtocolVersion::RESP2;
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        protocol = match (name, value) {
            ("protocol", "2" | "resp2") => ProtocolVersion::RESP2,
            ("protocol", "3" | "resp3") => ProtocolVersion::RESP3,
            ("protocol", _) => return Err("the parameter `protocol` must be 2 or 3".into()),
            ("db", _) => {
                return Err("unknown parameter `db`; the only one is `protocol`. Write the \
                            database as a path: redis://HOST:PORT/2"
                    .into());
            }
            _ => {
                let name = Escaped(name);
                return Err(format!("unknown parameter `{name}`; the only one is `protocol`"));
            }
        };
    }
    Ok(protocol)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(url: &str) -> String {
        Address::parse(url).err().unwrap_or_else(|| panic!("{url} is taken"))
    }

    #[test]
    fn reads_every_part_of_an_address() {
        let address =
            Address::parse("rediss://me:p%40ss%2F%C3%BC@[::1]:7000/2?protocol=3").unwrap();
        assert!(address.has_tls && !address.is_cluster);
        assert_eq!(address.user.as_deref(), Some("me"));
        assert_eq!(address.password.as_deref(), Some("p@ss/ü"));
        assert_eq!(address.hosts, [("::1".to_owned(), 7000)]);
        assert_eq!((address.database, address.protocol), (2, ProtocolVersion::RESP3));

        let address = Address::parse("redis+cluster://:word@a:1,b").unwrap();
        assert!(address.is_cluster && address.user.is_none());
        assert_eq!(address.hosts, [("a".to_owned(), 1), ("b".to_owned(), DEFAULT_PORT)]);
    }

    #[test]
    fn raw_characters_of_a_password_are_to_be_percent_encoded() {
        for (char, code) in [('#', "%23"), ('?', "%3F"), ('/', "%2F"), (' ', "%20")] {
            let error = error(&format!("redis://:hunter{char}2@localhost"));
            assert!(error.contains("percent-encode") && error.contains(code), "{error}");
        }
        assert!(error("redis://:100%@localhost").contains("%25"));
        // The last `@` ends the login, so that a raw one needs no encoding.
        let address = Address::parse("redis://:p@ss@localhost").unwrap();
        assert_eq!(address.password.as_deref(), Some("p@ss"));
    }

    #[test]
    fn unknown_parameters_are_refused_with_the_known_ones() {
        for url in ["redis://h?db=3", "redis://h:1/2?timeout=5", "redis+cluster://h?protocol=3&x"] {
            let error = error(url);
            assert!(error.contains("unknown") && error.contains("`protocol`"), "{error}");
        }
        assert!(error("redis://h?db=3").contains("redis://HOST:PORT/2"));
        assert!(error("rediss://h#insecure").contains("fragment"));
    }

    #[test]
    fn other_mistakes_are_named() {
        for (url, part) in [
            ("http://h", "redis://"),
            ("h:6379", "redis://"),
            ("redis://", "no host"),
            ("redis://u:hunter2@", "no host"),
            ("redis://h:0", "port"),
            ("redis://h:70000", "port"),
            ("redis://[::1", "']'"),
            ("redis://0.0.0.0", "0.0.0.0"),
            ("redis://h/x", "database"),
            ("redis://h/-1", "database"),
            ("redis://a,b", "redis+cluster://"),
            ("redis+cluster://a,b/1", "database 0"),
            ("redis+cluster://a,", "no host"),
            ("redis://h?protocol=4", "2 or 3"),
        ] {
            assert!(error(url).contains(part), "{url}: {}", error(url));
        }
    }

    #[test]
    fn messages_never_contain_a_password() {
        for url in [
            "redis://:hunter2@localhost",
            "redis://hunter2@localhost",
            "redis://u:hunter2",
            "redis://u:hunter2@",
            "redis://u:hunter2#@h",
            "redis://h/hunter2",
            "redis://h:hunter2",
            "hunter2",
        ] {
            let message = for_messages(url);
            let reason = Address::parse(url).err().unwrap_or_default();
            assert!(!message.contains("hunter2") && !reason.contains("hunter2"), "{message}");
        }
        assert_eq!(for_messages("redis://u:p@h:1/2"), "redis://…@h:1/2");
        assert_eq!(for_messages("redis+cluster://[::1],b"), "redis+cluster://[::1]:6379,b:6379");
    }
}
