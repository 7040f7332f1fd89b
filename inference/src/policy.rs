//! The decision whether the answer to a call may be stored, and its `Cache-Status`.

use std::fmt::Write as _;
use std::time::Duration;

use afterimage_http::Peer;
use afterimage_wire::server::Token;
use bytes::{BufMut, BytesMut};
use hyper::header::{
    AUTHORIZATION, CACHE_CONTROL, COOKIE, HeaderName, HeaderValue, PROXY_AUTHORIZATION,
};
use hyper::{HeaderMap, StatusCode};
use sha2::{Digest, Sha256};

use crate::headers::NAME;
use crate::oip::Refusal;

/// Fields that identify a client, besides the standard ones.
const KEY_FIELDS: [&str; 8] = [
    "api-key",
    "x-api-key",
    "x-auth-token",
    "x-access-token",
    "x-goog-api-key",
    "x-amz-security-token",
    "x-forwarded-access-token",
    "x-forwarded-user",
];

/// Fields that routers in front of several models read: they choose the model.
pub(crate) const ROUTING_FIELDS: [&str; 5] = [
    "mm-model-id",
    "mm-vmodel-id",
    "seldon-model",
    "seldon-internal-model",
    "x-gateway-model-name",
];

/// How answers are shared among clients with credentials. A hit skips the server's authorization.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Sharing {
    /// Calls with credentials pass through, and their answers are not stored.
    #[default]
    Refuse,
    /// All clients share all answers.
    Shared,
    /// Clients with equal credentials share answers: by this field, or by all credentials.
    Partition(Option<HeaderName>),
    /// Clients with this bearer token, or with a certificate that the listener has verified, share
    /// all answers. Calls of others pass through.
    Verify(Option<Token>),
}

/// One table makes the names, the texts and the list of the reasons.
macro_rules! bypasses {
    ($($(#[$doc:meta])* $variant:ident = $name:literal;)*) => {
        /// Why a call is forwarded without the memo. The name is in `Cache-Status`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Bypass {
            $($(#[$doc])* $variant,)*
            /// The answer to the call itself cannot be stored.
            Refused(Refusal),
        }

        impl Bypass {
            /// The reasons that do not come from the call's content.
            pub const ALL: &[Bypass] = &[$(Bypass::$variant,)*];

            /// One word for `Cache-Status`, logs and metrics.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Bypass::$variant => $name,)*
                    Bypass::Refused(refusal) => refusal.as_str(),
                }
            }
        }
    };
}

bypasses! {
    /// The request carries credentials, and no policy allows to share its answer.
    Credentials = "credentials";
    /// The request has no valid token and no certificate.
    Unverified = "unverified";
    /// The client does not want its answer stored.
    NoStore = "no-store";
    /// The URL has a query. Its meaning is not known.
    Query = "query";
    /// The body has trailer fields. Their meaning is not known.
    Trailers = "trailers";
    /// The body has an encoding other than gzip and deflate.
    Encoding = "encoding";
    /// The body is larger than the limit for bodies in memory.
    TooLarge = "too-large";
    /// Bodies in memory have reached their limit together.
    Memory = "memory";
    /// The body is not understood. The server decides.
    NotUnderstood = "not-understood";
    /// The server does not know the model, or gives no metadata about it.
    UnknownModel = "unknown-model";
    /// The model keeps state between requests, by its configuration.
    SequenceModel = "sequence-model";
    /// The model sends several responses for a request, by its configuration.
    Decoupled = "decoupled";
    /// The limit of models is reached, and all of them are in use.
    TooManyModels = "too-many-models";
    /// Too many calls wait already.
    Overloaded = "overloaded";
    /// The stored answer cannot be written in the encoding that the client asked for.
    NotRendered = "not-rendered";
    /// The proxy observes only. It would have answered from memory.
    ObservedHit = "observed-hit";
    /// The proxy observes only. It would have asked the server.
    ObservedMiss = "observed-miss";
    /// Probes have shown that an input's embedding depends on the other inputs of its call.
    RowsDepend = "rows-depend";
    /// An equal call gave a response that only its own client may have.
    NotShared = "not-shared";
}

/// What the head of a call says about the memo.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Directives {
    /// Compute the answer now.
    pub(crate) refresh: bool,
    /// A stored answer must not be older.
    pub(crate) max_age: Option<Duration>,
    /// What of the head is part of the key.
    pub(crate) key: Vec<u8>,
}

/// The rules of a proxy.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) sharing: Sharing,
    /// Fields that are part of the key.
    pub(crate) key_fields: Vec<HeaderName>,
}

impl Policy {
    /// Decides by the head of a call.
    pub(crate) fn decide(
        &self,
        headers: &HeaderMap,
        query: Option<&str>,
        peer: Option<&Peer>,
    ) -> Result<Directives, Bypass> {
        if query.is_some() {
            return Err(Bypass::Query);
        }
        let mut directives = Directives::default();
        for value in headers.get_all(CACHE_CONTROL) {
            let value = value.to_str().unwrap_or_default();
            for part in value.split(',').map(|part| part.trim().to_ascii_lowercase()) {
                match part.split_once('=').unwrap_or((&part, "")) {
                    ("no-store", _) => return Err(Bypass::NoStore),
                    ("no-cache", _) => directives.refresh = true,
                    ("max-age", seconds) => {
                        let seconds = seconds.trim_matches('"').parse().unwrap_or(0);
                        directives.max_age = Some(Duration::from_secs(seconds));
                    }
                    _ => {}
                }
            }
        }
        let partition = match &self.sharing {
            Sharing::Refuse if credentials(headers).next().is_some() => {
                return Err(Bypass::Credentials);
            }
            Sharing::Verify(token) => {
                let has_certificate = peer.is_some_and(|peer| peer.has_certificate);
                let bearer = headers.get(AUTHORIZATION).and_then(bearer);
                let is_known = token.as_ref().zip(bearer).is_some_and(|(t, b)| t.matches(b));
                if !has_certificate && !is_known {
                    return Err(Bypass::Unverified);
                }
                None
            }
            Sharing::Refuse | Sharing::Shared => None,
            Sharing::Partition(None) => digest(credentials(headers)),
            Sharing::Partition(Some(name)) => {
                digest(headers.get_all(name).iter().map(|value| (name, value)))
            }
        };
        directives.key = self.key(headers, partition);
        Ok(directives)
    }

    /// The part of the key that comes from the head: it differs for different values.
    fn key(&self, headers: &HeaderMap, partition: Option<[u8; 32]>) -> Vec<u8> {
        let mut key = BytesMut::with_capacity(2);
        key.put_u8(u8::from(partition.is_some()));
        key.put_slice(partition.as_ref().map_or(&[], |digest| &digest[..]));
        for (number, name) in self.key_fields.iter().enumerate() {
            for value in headers.get_all(name) {
                key.put_u16_le(number as u16 + 1);
                key.put_u64_le(value.len() as u64);
                key.put_slice(value.as_bytes());
            }
        }
        key.put_u16_le(0);
        key.to_vec()
    }
}

fn bearer(value: &HeaderValue) -> Option<&[u8]> {
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token.trim_ascii())
}

/// The fields of a request that identify its client.
pub(crate) fn credentials(
    headers: &HeaderMap,
) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
    headers.iter().filter(|(name, _)| {
        [AUTHORIZATION, PROXY_AUTHORIZATION, COOKIE].contains(name)
            || KEY_FIELDS.contains(&name.as_str())
    })
}

/// One digest of some fields; `None` without any.
fn digest<'a>(fields: impl Iterator<Item = (&'a HeaderName, &'a HeaderValue)>) -> Option<[u8; 32]> {
    let mut all: Vec<_> = fields.map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
    if all.is_empty() {
        return None;
    }
    all.sort_unstable();
    let mut hasher = Sha256::new();
    for part in all.into_iter().flat_map(|(name, value)| [name.as_bytes(), value]) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    Some(hasher.finalize().into())
}

/// How a call was answered, for `Cache-Status` (RFC 9211).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CacheStatus {
    Hit {
        age: Duration,
        ttl: Option<Duration>,
    },
    /// The server computed the answer.
    Miss {
        /// For this call and an equal one before it.
        collapsed: bool,
        stored: bool,
        /// The client did not want a stored answer.
        refreshed: bool,
        status: StatusCode,
    },
    /// Some rows were stored; the server computed the others.
    Partial {
        hits: usize,
        rows: usize,
    },
    Bypass(Bypass),
}

impl CacheStatus {
    pub(crate) fn add_to(self, headers: &mut HeaderMap) {
        let mut text = String::from(NAME);
        match self {
            CacheStatus::Hit { age, ttl } => {
                let _ = write!(text, "; hit; age={}", age.as_secs());
                if let Some(ttl) = ttl {
                    let _ = write!(text, "; ttl={}", ttl.saturating_sub(age).as_secs());
                }
            }
            CacheStatus::Miss { collapsed, stored, refreshed, status } => {
                text.push_str(if refreshed { "; fwd=request" } else { "; fwd=miss" });
                if status != StatusCode::OK {
                    let _ = write!(text, "; fwd-status={}", status.as_u16());
                }
                text.push_str(if stored { "; stored" } else { "" });
                text.push_str(if collapsed { "; collapsed" } else { "" });
            }
            CacheStatus::Partial { hits, rows } => {
                let _ = write!(text, "; fwd=partial; stored; detail=\"{hits} of {rows} rows\"");
            }
            CacheStatus::Bypass(reason) => {
                let _ = write!(text, "; fwd=bypass; detail={}", reason.as_str());
            }
        }
        if let Ok(value) = HeaderValue::try_from(text) {
            headers.append("cache-status", value);
        }
    }
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

    fn decide(
        sharing: Sharing,
        fields: &[(&'static str, &'static str)],
    ) -> Result<Directives, Bypass> {
        let key_fields = vec![HeaderName::from_static("mm-model-id")];
        Policy { sharing, key_fields }.decide(&headers(fields), None, None)
    }

    #[test]
    fn credentials_are_refused_without_a_policy() {
        for name in ["authorization", "cookie", "x-api-key", "api-key", "proxy-authorization"] {
            assert_eq!(decide(Sharing::Refuse, &[(name, "a")]), Err(Bypass::Credentials), "{name}");
            assert!(decide(Sharing::Shared, &[(name, "a")]).is_ok(), "{name}");
        }
        assert!(decide(Sharing::Refuse, &[("accept", "a")]).is_ok());
    }

    #[test]
    fn partitions_differ_by_credentials_alone() {
        let key = |sharing: &Sharing, fields: &[_]| decide(sharing.clone(), fields).unwrap().key;
        let all = Sharing::Partition(None);
        let (a, b) = (("authorization", "Bearer a"), ("authorization", "Bearer b"));
        assert_eq!(key(&all, &[a, ("accept", "x")]), key(&all, &[("accept", "y"), a]));
        assert_ne!(key(&all, &[a]), key(&all, &[b]));
        assert_ne!(key(&all, &[a]), key(&all, &[]));
        assert_ne!(key(&all, &[a]), key(&all, &[a, ("cookie", "c")]));
        let one = Sharing::Partition(Some(HeaderName::from_static("x-tenant")));
        assert_eq!(key(&one, &[a]), key(&one, &[b]));
        assert_ne!(key(&one, &[("x-tenant", "1")]), key(&one, &[("x-tenant", "2")]));
        let routed = |model| key(&Sharing::Shared, &[("mm-model-id", model)]);
        assert_ne!(routed("one"), routed("two"));
        assert_ne!(routed("one"), key(&Sharing::Shared, &[]));
    }

    #[test]
    fn only_verified_clients_share() {
        let verify = || Sharing::Verify(Token::new(b"secret".to_vec()));
        assert!(decide(verify(), &[("authorization", "Bearer secret")]).is_ok());
        for wrong in ["Bearer wrong", "secret", "Basic secret", ""] {
            let found = decide(verify(), &[("authorization", wrong)]);
            assert_eq!(found, Err(Bypass::Unverified), "{wrong:?}");
        }
        assert_eq!(decide(verify(), &[]), Err(Bypass::Unverified));
    }

    #[test]
    fn cache_control_is_obeyed() {
        let found = |value| decide(Sharing::Refuse, &[("cache-control", value)]);
        assert_eq!(found("no-store"), Err(Bypass::NoStore));
        assert!(found("max-age=7, No-Cache").unwrap().refresh);
        assert_eq!(found("max-age=7").unwrap().max_age, Some(Duration::from_secs(7)));
        let policy = Policy { sharing: Sharing::Refuse, key_fields: Vec::new() };
        assert_eq!(policy.decide(&HeaderMap::new(), Some("a=b"), None), Err(Bypass::Query));
    }

    #[test]
    fn the_status_has_the_words_of_the_standard() {
        let text = |status: CacheStatus| {
            let mut headers = HeaderMap::new();
            status.add_to(&mut headers);
            headers["cache-status"].to_str().unwrap().to_owned()
        };
        let seconds = Duration::from_secs;
        let hit = CacheStatus::Hit { age: seconds(5), ttl: Some(seconds(60)) };
        assert_eq!(text(hit), "afterimage; hit; age=5; ttl=55");
        let miss = |collapsed, stored, refreshed, status| {
            text(CacheStatus::Miss { collapsed, stored, refreshed, status })
        };
        assert_eq!(miss(false, true, false, StatusCode::OK), "afterimage; fwd=miss; stored");
        let failed = miss(true, false, true, StatusCode::BAD_REQUEST);
        assert_eq!(failed, "afterimage; fwd=request; fwd-status=400; collapsed");
        let partial = text(CacheStatus::Partial { hits: 3, rows: 8 });
        assert_eq!(partial, "afterimage; fwd=partial; stored; detail=\"3 of 8 rows\"");
        let bypass = CacheStatus::Bypass(Bypass::Refused(Refusal::Sequence));
        assert_eq!(text(bypass), "afterimage; fwd=bypass; detail=sequence");
    }
}
