//! A call from submission to outcome: it enters the table, its caller waits, and a read whose
//! connection is lost is sent again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::error::CallError;
use super::options::CallOptions;
use super::request::Request;
use super::shared::Shared;
use super::waiter::{Answer, Callback, Many, Waiter};

/// Sends one request and waits for its answer. Dropping the future cancels the request.
pub(super) async fn ask(
    shared: &Shared,
    request: Request<&[u8]>,
    timeout: Duration,
) -> Result<Answer, CallError> {
    let (sender, receiver) = oneshot::channel();
    let id = shared.submit(request, timeout, Waiter::Future(sender));
    let mut cancel = Cancel { shared, id };
    let outcome = receiver.await;
    cancel.id = 0;
    outcome.unwrap_or(Err(CallError::Closed))
}

/// Sends one read, and sends it again if its connection is lost.
pub(super) async fn read(
    shared: &Shared,
    request: Request<&[u8]>,
    options: CallOptions,
) -> Result<Answer, CallError> {
    let mut tries = Tries::new(shared, options);
    loop {
        match ask(shared, request, tries.left).await {
            Ok(answer) => return Ok(answer),
            Err(error) => tries.another(error).await?,
        }
    }
}

/// Sends many reads and waits for all answers. Dropping the future cancels them.
pub(super) async fn ask_many(
    shared: &Shared,
    keys: &[u64],
    timeout: Duration,
) -> Result<Vec<Option<i64>>, CallError> {
    let (sender, receiver) = oneshot::channel();
    let callback = Callback::new(|values| drop(sender.send(values)));
    let many = shared.submit_many(keys, timeout, callback);
    let _cancel = many.map(|many| CancelMany { shared, many });
    receiver.await.unwrap_or(Err(CallError::Closed))
}

/// How often a read is sent again.
const RETRIES: usize = 2;

/// Pause before a request is sent again to a server that is shutting down: time for its `GoAway`.
const PAUSE: Duration = Duration::from_millis(10);

/// The attempts of one call, all within its deadline.
pub(super) struct Tries<'a> {
    shared: &'a Shared,
    start: Instant,
    total: Duration,
    retries: usize,
    /// Time left for the next attempt.
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

    /// Returns when the next attempt may start, or the error if there is none.
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

/// Removes a call from the table when its caller drops it (id 0: nothing to remove).
struct Cancel<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Cancel<'_> {
    fn drop(&mut self) {
        if self.id != 0 {
            let now = self.shared.now();
            self.shared.with(|state, effects| state.cancel(now, self.id, effects));
        }
    }
}

/// The same for many reads. Nothing is left to remove once they are answered.
struct CancelMany<'a> {
    shared: &'a Shared,
    many: Arc<Many>,
}

impl Drop for CancelMany<'_> {
    fn drop(&mut self) {
        if !self.many.is_answered() {
            let now = self.shared.now();
            self.shared.with(|state, effects| state.cancel_many(now, &self.many, effects));
        }
    }
}
