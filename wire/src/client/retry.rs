//! When a read is sent again: its connection was lost, or its server shut down before it began.

use std::time::{Duration, Instant};

use super::error::CallError;
use super::options::CallOptions;
use super::shared::Shared;

/// How often a read is sent again.
const RETRIES: usize = 2;

/// Before a request is sent again to a server that is shutting down: time for its `GoAway`.
const PAUSE: Duration = Duration::from_millis(10);

/// The tries of one call, all within its deadline.
pub(super) struct Tries<'a> {
    shared: &'a Shared,
    start: Instant,
    total: Duration,
    retries: usize,
    /// The time that the next try has.
    pub(super) left: Duration,
}

impl<'a> Tries<'a> {
    pub(super) fn new(shared: &'a Shared, options: CallOptions) -> Self {
        let total = options.timeout.unwrap_or(shared.options.timeout);
        Tries {
            shared,
            start: shared.now(),
            total,
            retries: if options.no_retry { 0 } else { RETRIES },
            left: total,
        }
    }

    /// Returns when it is time for another try, or the error when there is none.
    pub(super) async fn another(&mut self, mut error: CallError) -> Result<(), CallError> {
        if self.retries == 0 || !error.is_worth_another_try() {
            if let CallError::DeadlineExceeded { timeout, .. } = &mut error {
                *timeout = self.total;
            }
            return Err(error);
        }
        self.retries -= 1;
        if matches!(error, CallError::Server { .. }) {
            tokio::time::sleep(PAUSE).await;
        }
        self.left = self.total.saturating_sub(self.shared.now() - self.start);
        if self.left.is_zero() {
            return Err(error);
        }
        Ok(())
    }
}
