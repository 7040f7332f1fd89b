//! State that all connections of a server share.

use std::sync::Arc;
use std::time::Duration;

use afterimage_core::{ByteBudget, Tally};

use super::metrics::Counters;
use super::options::ServerOptions;
use crate::proto::header::MAX_MAX_BODY;

/// State that all connections of a server share.
pub(super) struct Shared<S> {
    pub(super) service: Arc<S>,
    pub(super) options: ServerOptions,
    pub(super) counters: Counters,
    /// Bytes of the buffers of all connections.
    pub(super) buffers: ByteBudget,
    /// The part of `buffers` that streams may use.
    pub(super) stream_memory: ByteBudget,
    /// Wrong tokens, for the log.
    pub(super) wrong_tokens: Tally,
    /// TLS handshakes that may be polled before all other ready tasks are polled.
    #[cfg(feature = "tls")]
    pub(super) tls_permits: Arc<tokio::sync::Semaphore>,
}

impl<S> Shared<S> {
    pub(super) fn new(service: Arc<S>, mut options: ServerOptions) -> Self {
        options.max_body = options.max_body.min(MAX_MAX_BODY);
        // With a window of 0, no request would ever be read.
        options.window = options.window.max(1);
        for time in [
            &mut options.handshake_timeout,
            &mut options.idle_timeout,
            &mut options.frame_timeout,
            &mut options.write_timeout,
            &mut options.drain_timeout,
        ] {
            *time = (*time).clamp(MIN_TIMEOUT, MAX_TIMEOUT);
        }
        let buffers = ByteBudget::new(options.max_buffer_memory);
        // The rest is for requests and replies, which continue when streams have used up theirs.
        let stream_memory = buffers.child(buffers.limit() / 2);
        let wrong_tokens = Tally::new(LOG_INTERVAL);
        let counters = Counters::default();
        Shared {
            service,
            options,
            counters,
            buffers,
            stream_memory,
            wrong_tokens,
            #[cfg(feature = "tls")]
            tls_permits: Arc::new(tokio::sync::Semaphore::new(1)),
        }
    }
}

/// Shortest time between two log lines about wrong tokens.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Bounds of all timeouts: 0 would end a connection before it begins, and a clock cannot add
/// centuries.
const MIN_TIMEOUT: Duration = Duration::from_millis(1);
const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);
