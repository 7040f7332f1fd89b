//! What a cache speaks: Afterimage's protocol, or that of one of its peers.
//!
//! Redis and memcached answer in the order of the requests, so nothing in a reply names its
//! request. What was asked stands in a queue ([`ordered`]); the replies are cut out of the stream
//! ([`replies`]) and each is held against the front of that queue.

pub(crate) mod ordered;
pub(crate) mod replies;

use std::fmt;

/// The protocol that a server speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dialect {
    /// Afterimage's own.
    #[default]
    Wire,
    /// The frames of a cache read, without a handshake, which the server sends back as they came:
    /// what the network and the two kernels cost by themselves. See the example `echo`.
    Echo,
    /// RESP, of Redis and Valkey: `GET` or `MGET`, and `SET`. Keys and values are 8 bytes as they
    /// are.
    Redis,
    /// memcached's text protocol: `get`, of several keys if the plan says so, and `set`. Keys are
    /// 11 characters, since text keys cannot be any bytes; values are 8 bytes as they are.
    Memcached,
    /// memcached's meta protocol: `mg` and `ms`; keys and values as in the text protocol.
    MemcachedMeta,
}

impl Dialect {
    /// All of them.
    pub const ALL: [Dialect; 5] =
        [Dialect::Wire, Dialect::Echo, Dialect::Redis, Dialect::Memcached, Dialect::MemcachedMeta];

    /// What stands before the `://` of an address.
    pub const fn scheme(self) -> &'static str {
        match self {
            Dialect::Wire => "tcp",
            Dialect::Echo => "echo",
            Dialect::Redis => "redis",
            Dialect::Memcached => "memcached",
            Dialect::MemcachedMeta => "memcached+meta",
        }
    }

    /// The dialect and the host and port in `address`, such as `redis://localhost:6379`; without a
    /// scheme it is Afterimage's own. `None` when the scheme is none of these.
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

    /// Whether replies come in the order of the requests and name none.
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

/// The 64 digits of a key in text: none of them is white space or a control character.
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
        assert_eq!(Dialect::split("http://h:1"), None);
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
