//! What a client counts.

/// A snapshot of a client's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Connections that came to a `Welcome`.
    pub connects: u64,
    /// Attempts to connect, the successful ones included.
    pub attempts: u64,
    /// Requests handed to a connection; each try of a request that is sent again counts.
    pub sent: u64,
    /// Replies received, errors included.
    pub received: u64,
    /// Replies among them whose id was not in flight. What comes late or twice is dropped; what
    /// this connection never asked for ends it.
    pub unknown_ids: u64,
    /// Calls that ran out of time.
    pub timeouts: u64,
    /// Calls without an outcome right now, queued ones included.
    pub in_flight: u64,
    /// Bytes of requests that wait to be sent right now.
    pub queued_bytes: u64,
}
