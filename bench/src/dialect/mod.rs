//! Protocols of servers: Afterimage's own, Redis, memcached, HTTP of model servers, and an echo.
//!
//! Redis and memcached answer in the order of the requests, and a reply does not name its request.
//! A queue holds the requests ([`ordered`]); the replies are cut out of the stream ([`replies`])
//! and compared with the front of the queue.

pub(crate) mod http;
pub(crate) mod ordered;
pub(crate) mod replies;

use std::fmt;

/// The protocol that a server speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// Afterimage's own.
    #[default]
    Wire,
    /// The frames of a cache read without a handshake, which the server sends back unchanged: the
    /// cost of network and kernels alone. The program `cache_peers echo` is such a server.
    Echo,
    /// RESP of Redis and Valkey: `GET` or `MGET`, and `SET`. Keys and values are 8 raw bytes.
    Redis,
    /// memcached's text protocol: `get` of one or several keys, and `set`. Keys are 11 characters,
    /// since text keys exclude some bytes; values are 8 raw bytes.
    Memcached,
    /// memcached's meta protocol: `mg` and `ms`; keys and values as in the text protocol.
    MemcachedMeta,
    /// HTTP/1.1 of model servers: the Open Inference Protocol, and embeddings. A connection has one
    /// request in flight.
    Http,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Dialect; 6] = [
        Dialect::Wire,
        Dialect::Echo,
        Dialect::Redis,
        Dialect::Memcached,
        Dialect::MemcachedMeta,
        Dialect::Http,
    ];

    /// The scheme of its addresses.
    pub const fn scheme(self) -> &'static str {
        match self {
            Dialect::Wire => "tcp",
            Dialect::Echo => "echo",
            Dialect::Redis => "redis",
            Dialect::Memcached => "memcached",
            Dialect::MemcachedMeta => "memcached+meta",
            Dialect::Http => "http",
        }
    }

    /// The dialect of an address such as `redis://localhost:6379`, and the rest of the address.
    /// Without a scheme the dialect is Afterimage's own. `None` for an unknown scheme.
    pub fn split(address: &str) -> Option<(Dialect, &str)> {
        match address.split_once("://") {
            None => Some((Dialect::Wire, address)),
            Some((scheme, rest)) => {
                let dialect = Dialect::ALL.into_iter().find(|one| one.scheme() == scheme)?;
                Some((dialect, rest.trim_end_matches('/')))
            }
        }
    }

    /// Whether one command can ask for several keys.
    pub const fn takes_batches(self) -> bool {
        matches!(self, Dialect::Redis | Dialect::Memcached)
    }

    /// Whether replies come in the order of the requests, without ids.
    pub(crate) const fn is_ordered(self) -> bool {
        matches!(self, Dialect::Redis | Dialect::Memcached | Dialect::MemcachedMeta)
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.scheme())
    }
}

/// Characters of a key in text.
pub(crate) const KEY_TEXT_LEN: usize = 11;

/// The 64 digits of a key in text, without white space and control characters.
const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The two digits of every 12 bits.
static PAIRS: [[u8; 2]; 4096] = {
    let mut pairs = [[0; 2]; 4096];
    let mut bits = 0;
    while bits < pairs.len() {
        pairs[bits] = [DIGITS[bits & 63], DIGITS[bits >> 6]];
        bits += 1;
    }
    pairs
};

/// A key as text, lowest digit first: six bits in each character, so that it is as short as can be.
#[inline]
pub(crate) fn key_text(key: u64) -> [u8; KEY_TEXT_LEN] {
    let mut text = [0; KEY_TEXT_LEN];
    let (pairs, last) = text.as_chunks_mut::<2>();
    let mut rest = key;
    for pair in pairs {
        *pair = PAIRS[(rest & 0xfff) as usize];
        rest >>= 12;
    }
    last[0] = DIGITS[(rest & 63) as usize];
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn an_address_names_its_dialect() {
        assert_eq!(Dialect::split("localhost:1"), Some((Dialect::Wire, "localhost:1")));
        for dialect in Dialect::ALL {
            let address = format!("{dialect}://[::1]:7");
            assert_eq!(Dialect::split(&address), Some((dialect, "[::1]:7")));
        }
        assert_eq!(Dialect::split("redis://h:1/"), Some((Dialect::Redis, "h:1")));
        assert_eq!(Dialect::split("ftp://h:1"), None);
    }

    #[test]
    fn no_two_keys_have_one_text_and_none_has_a_space() {
        let keys = (0..64).flat_map(|bit| [0u64, u64::MAX].map(|key| key ^ 1 << bit));
        let keys: Vec<u64> = keys.chain([0, u64::MAX]).collect();
        let texts: HashSet<_> = keys.iter().map(|&key| key_text(key)).collect();
        assert_eq!(texts.len(), keys.len());
        assert!(texts.iter().flatten().all(u8::is_ascii_graphic));
        assert_eq!(&key_text(0), b"AAAAAAAAAAA");
        assert_eq!(&key_text(1 << 60), b"AAAAAAAAAAB");
    }
}
