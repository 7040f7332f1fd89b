//! Options of a client and of a single call.

use std::fmt;
use std::time::Duration;

use crate::proto::Role;
use crate::proto::header::{MAX_LARGE_BODY, MAX_MAX_BODY};
#[cfg(feature = "tls")]
use crate::tls::ClientTls;

/// Default time limit of a call.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// Default number of requests in flight: a megabyte of cache replies, three of digits. A deeper
/// pipeline only adds waiting.
pub const DEFAULT_MAX_IN_FLIGHT: usize = 4096;

/// Default of bytes that are accepted but not sent: twenty thousand digits, little beside the
/// images that such a program holds.
pub const DEFAULT_MAX_QUEUED_BYTES: usize = 16 << 20;

/// Without any wait, failing attempts would keep two machines busy.
const MIN_BACKOFF: Duration = Duration::from_millis(1);

/// A shorter interval would be below the round-trip time.
const MIN_KEEPALIVE: Duration = Duration::from_millis(10);

/// A year: longer than any program waits, and short enough to add to a clock reading.
pub(super) const FAR_FUTURE: Duration = Duration::from_secs(365 * 24 * 3600);

/// Settings of a [`Client`](super::Client).
#[derive(Clone)]
#[non_exhaustive]
pub struct ClientOptions {
    /// The token that the server may demand; empty for none.
    pub token: Vec<u8>,
    /// TLS for every connection; `None` for plain TCP.
    #[cfg(feature = "tls")]
    pub tls: Option<ClientTls>,
    /// Time limit of a call, from the call to the answer, with connecting and queueing.
    pub timeout: Duration,
    /// Time limit of one attempt to reach one address.
    pub connect_timeout: Duration,
    /// Time limit from the connection to the `Welcome`, TLS included.
    pub handshake_timeout: Duration,
    /// Ceiling of the first wait before a new attempt to connect; it doubles with each.
    pub backoff_min: Duration,
    /// Highest ceiling of the waits before a new attempt to connect.
    pub backoff_max: Duration,
    /// Requests in flight at once. The server's window applies, too; the smaller one counts.
    pub max_in_flight: usize,
    /// Bytes of requests that may wait to be sent. Above it, calls fail with `QueueFull`.
    pub max_queued_bytes: usize,
    /// The largest body, in bytes, that is accepted from the server.
    pub max_body: u32,
    /// The same for a server whose model answers with labels. Its replies are short, so a client
    /// in front of a server that it does not trust sets less.
    pub max_label_body: u32,
    /// Time without a byte from the server after which the client sends a `Ping`; after the same
    /// time again, it closes the connection. `None` for never.
    pub keepalive: Option<Duration>,
    /// While there is no connection, fail calls at once with the last connection's error, instead
    /// of waiting until their deadline. Calls still wait for the very first attempt, and for
    /// the new connection after a `GoAway`.
    pub fail_fast: bool,
    /// The kind of service that must answer; `None` for any.
    pub expect: Option<Expect>,
    /// Seed of the random waits between attempts to connect; `None` for a random one. For
    /// simulations that must be repeatable: clients with the same seed reconnect at the same
    /// times.
    pub backoff_seed: Option<u64>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            token: Vec::new(),
            #[cfg(feature = "tls")]
            tls: None,
            timeout: DEFAULT_TIMEOUT,
            connect_timeout: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(2),
            backoff_min: Duration::from_millis(20),
            backoff_max: Duration::from_secs(1),
            max_in_flight: DEFAULT_MAX_IN_FLIGHT,
            max_queued_bytes: DEFAULT_MAX_QUEUED_BYTES,
            max_body: MAX_LARGE_BODY,
            max_label_body: MAX_LARGE_BODY,
            keepalive: Some(Duration::from_secs(15)),
            fail_fast: false,
            expect: None,
            backoff_seed: None,
        }
    }
}

impl ClientOptions {
    /// The default options.
    pub fn new() -> Self {
        ClientOptions::default()
    }

    /// Sets the token.
    #[must_use]
    pub fn token(mut self, token: impl Into<Vec<u8>>) -> Self {
        self.token = token.into();
        self
    }

    /// Sets TLS for every connection.
    #[cfg(feature = "tls")]
    #[must_use]
    pub fn tls(mut self, tls: ClientTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Sets the time limit of a call.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets the time limit of one attempt to reach one address.
    #[must_use]
    pub fn connect_timeout(mut self, timeout: Duration) -> Self {
        self.connect_timeout = timeout;
        self
    }

    /// Sets the time limit from the connection to the `Welcome`.
    #[must_use]
    pub fn handshake_timeout(mut self, timeout: Duration) -> Self {
        self.handshake_timeout = timeout;
        self
    }

    /// Sets the first and the highest ceiling of the waits between attempts to connect.
    #[must_use]
    pub fn backoff(mut self, min: Duration, max: Duration) -> Self {
        (self.backoff_min, self.backoff_max) = (min, max);
        self
    }

    /// Sets the seed of the random waits between attempts to connect.
    #[must_use]
    pub fn backoff_seed(mut self, seed: u64) -> Self {
        self.backoff_seed = Some(seed);
        self
    }

    /// Sets the number of requests in flight at once; at least 1.
    #[must_use]
    pub fn max_in_flight(mut self, requests: usize) -> Self {
        self.max_in_flight = requests.max(1);
        self
    }

    /// Sets how many bytes of requests may wait to be sent. A single request is accepted at any
    /// size.
    #[must_use]
    pub fn max_queued_bytes(mut self, bytes: usize) -> Self {
        self.max_queued_bytes = bytes;
        self
    }

    /// Sets the largest body accepted from the server, at most [`MAX_MAX_BODY`].
    #[must_use]
    pub fn max_body(mut self, bytes: u32) -> Self {
        self.max_body = bytes.min(MAX_MAX_BODY);
        self
    }

    /// Sets the largest body accepted from a server whose model answers with labels.
    #[must_use]
    pub fn max_label_body(mut self, bytes: u32) -> Self {
        self.max_label_body = bytes;
        self
    }

    /// Sets the silence after which the client sends a `Ping`.
    #[must_use]
    pub fn keepalive(mut self, interval: Option<Duration>) -> Self {
        self.keepalive = interval;
        self
    }

    /// Sets whether calls fail at once while there is no connection.
    #[must_use]
    pub fn fail_fast(mut self, fail_fast: bool) -> Self {
        self.fail_fast = fail_fast;
        self
    }

    /// The same options with every value in its valid range.
    pub(super) fn sane(mut self) -> Self {
        self.max_in_flight = self.max_in_flight.max(1);
        self.max_body = self.max_body.min(MAX_MAX_BODY);
        self.backoff_min = self.backoff_min.clamp(MIN_BACKOFF, FAR_FUTURE);
        self.backoff_max = self.backoff_max.clamp(self.backoff_min, FAR_FUTURE);
        self.keepalive = self.keepalive.map(|interval| interval.clamp(MIN_KEEPALIVE, FAR_FUTURE));
        self
    }

    /// How long a new client waits for its first connection.
    pub(crate) fn patience(&self) -> Duration {
        self.connect_timeout.saturating_add(self.handshake_timeout)
    }

    /// Sets the kind of service that must answer.
    #[must_use]
    pub fn expect(mut self, expect: Expect) -> Self {
        self.expect = Some(expect);
        self
    }
}

impl fmt::Debug for ClientOptions {
    /// Omits the token: it is a secret, and debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("ClientOptions");
        debug.field("token_len", &self.token.len());
        #[cfg(feature = "tls")]
        debug.field("tls", &self.tls);
        debug
            .field("timeout", &self.timeout)
            .field("connect_timeout", &self.connect_timeout)
            .field("handshake_timeout", &self.handshake_timeout)
            .field("backoff_min", &self.backoff_min)
            .field("backoff_max", &self.backoff_max)
            .field("max_in_flight", &self.max_in_flight)
            .field("max_queued_bytes", &self.max_queued_bytes)
            .field("max_body", &self.max_body)
            .field("max_label_body", &self.max_label_body)
            .field("keepalive", &self.keepalive)
            .field("fail_fast", &self.fail_fast)
            .field("expect", &self.expect)
            .field("backoff_seed", &self.backoff_seed)
            .finish()
    }
}

/// A family of services that answer the same requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Expect {
    /// Answers `CacheReq`.
    Cache,
    /// Answers `ClassifyReq`: a memo or a classifier.
    Classify,
    /// Has streams of records.
    Streams,
}

impl Expect {
    /// Whether this service is one of the family.
    pub fn is_met_by(self, service: Role) -> bool {
        match self {
            Expect::Cache => service == Role::Cache,
            Expect::Classify => service.classifies(),
            Expect::Streams => service == Role::Streams,
        }
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Expect::Cache => "a cache",
            Expect::Classify => "a memo or a classifier",
            Expect::Streams => "a streams service",
        })
    }
}

/// Options of a single call. Unset ones are taken from the client's options.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CallOptions {
    /// Time limit of the call, from the call to the answer.
    pub timeout: Option<Duration>,
    /// Do not send the request again if its connection is lost or its server shuts down.
    pub no_retry: bool,
}

impl CallOptions {
    /// The client's options.
    pub fn new() -> Self {
        CallOptions::default()
    }

    /// Sets the time limit of the call.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets that the request is sent at most once.
    #[must_use]
    pub fn no_retry(mut self) -> Self {
        self.no_retry = true;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_leaves_the_token_out() {
        let text = format!("{:?}", ClientOptions::new().token("hunter2"));
        assert!(text.contains("token_len: 7") && !text.contains("hunter2"));
    }

    #[test]
    fn values_are_clamped_to_their_ranges() {
        let mut options = ClientOptions::new().keepalive(Some(Duration::ZERO));
        options.max_in_flight = 0;
        options.max_body = u32::MAX;
        (options.backoff_min, options.backoff_max) = (Duration::ZERO, Duration::ZERO);
        let sane = options.sane();
        assert_eq!((sane.max_in_flight, sane.max_body), (1, MAX_MAX_BODY));
        assert_eq!((sane.backoff_min, sane.backoff_max), (MIN_BACKOFF, MIN_BACKOFF));
        assert_eq!(sane.keepalive, Some(MIN_KEEPALIVE));
        let sane = ClientOptions::new()
            .keepalive(Some(Duration::MAX))
            .backoff(Duration::MAX, Duration::MAX)
            .connect_timeout(Duration::MAX)
            .sane();
        assert_eq!(sane.keepalive, Some(FAR_FUTURE));
        assert_eq!((sane.backoff_min, sane.backoff_max), (FAR_FUTURE, FAR_FUTURE));
        assert_eq!(sane.patience(), Duration::MAX);
    }

    #[test]
    fn a_family_knows_its_services() {
        for (service, cache, classify) in [
            (Role::Cache, true, false),
            (Role::Memo, false, true),
            (Role::Classifier, false, true),
            (Role::Unknown(9), false, false),
        ] {
            assert_eq!(Expect::Cache.is_met_by(service), cache);
            assert_eq!(Expect::Classify.is_met_by(service), classify);
        }
    }
}
