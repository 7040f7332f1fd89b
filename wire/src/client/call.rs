//! A call from submission to outcome: it enters the table, its caller waits, and a read whose
//! connection is lost is sent again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_core::Reply;
use tokio::sync::oneshot;

use super::error::CallError;
use super::options::CallOptions;
use super::request::{Body, Request};
use super::shared::Shared;
use super::waiter::{Answer, Many, Waiter};

/// Sends one request and waits for its answer. Dropping the future cancels the request.
pub(super) async fn ask(
    shared: &Shared,
    request: Request<&[u8]>,
    timeout: Duration,
) -> Result<Answer, CallError> {
    Asked::new(shared, request, timeout).outcome().await
}

/// Sends one read, and sends it again if its connection is lost.
pub(super) async fn read<B: Body + Copy>(
    shared: &Shared,
    request: Request<B>,
    options: CallOptions,
) -> Result<Answer, CallError> {
    Read::begin(shared, request, options).outcome().await
}

/// A request in flight. Dropping it cancels the request.
struct Asked<'a> {
    shared: &'a Shared,
    /// 0 when there is nothing to cancel.
    id: u64,
    outcome: oneshot::Receiver<Result<Answer, CallError>>,
}

impl<'a> Asked<'a> {
    fn new<B: Body>(shared: &'a Shared, request: Request<B>, timeout: Duration) -> Self {
        let (sender, outcome) = oneshot::channel();
        let id = shared.submit(request, timeout, Waiter::Future(sender));
        Asked { shared, id, outcome }
    }

    async fn outcome(&mut self) -> Result<Answer, CallError> {
        let outcome = (&mut self.outcome).await;
        self.id = 0;
        outcome.unwrap_or(Err(CallError::Closed))
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        if self.id != 0 {
            let now = self.shared.now();
            self.shared.with(|state, effects| state.cancel(now, self.id, effects));
        }
    }
}

/// A read in flight, which is sent again if its connection is lost.
pub(super) struct Read<'a, B> {
    request: Request<B>,
    tries: Tries<'a>,
    asked: Asked<'a>,
    /// The outcome, if `again_if_lost` has found it.
    known: Option<Result<Answer, CallError>>,
}

impl<'a, B: Body + Copy> Read<'a, B> {
    pub(super) fn begin(shared: &'a Shared, request: Request<B>, options: CallOptions) -> Self {
        let tries = Tries::new(shared, options);
        let asked = Asked::new(shared, request, tries.left);
        Read { request, tries, asked, known: None }
    }

    pub(super) async fn outcome(self) -> Result<Answer, CallError> {
        self.outcome_before([].into_iter()).await
    }

    /// The outcome. If the read is sent again, so are those of `later` that were lost with it.
    pub(super) async fn outcome_before<'r>(
        mut self,
        later: impl Iterator<Item = &'r mut Read<'a, B>>,
    ) -> Result<Answer, CallError>
    where
        'a: 'r,
        B: 'r,
    {
        let mut later = Some(later);
        loop {
            let outcome = match self.known.take() {
                Some(outcome) => outcome,
                None => self.asked.outcome().await,
            };
            match outcome {
                Ok(answer) => return Ok(answer),
                Err(error) => self.tries.another(error).await?,
            }
            self.asked = Asked::new(self.tries.shared, self.request, self.tries.left);
            later.take().into_iter().flatten().for_each(Read::again_if_lost);
        }
    }

    /// Sends the read again at once if its connection is lost and it may be repeated.
    fn again_if_lost(&mut self) {
        if self.known.is_some() {
            return;
        }
        let Ok(outcome) = self.asked.outcome.try_recv() else { return };
        self.asked.id = 0;
        match outcome {
            Err(CallError::ConnectionLost { .. }) if self.tries.begin_another() => {
                self.asked = Asked::new(self.tries.shared, self.request, self.tries.left);
            }
            outcome => self.known = Some(outcome),
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
    let reply = Reply::call(|values| drop(sender.send(values)));
    let many = shared.submit_many(keys, timeout, reply);
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
        if matches!(error, CallError::Server { .. }) {
            tokio::time::sleep(PAUSE).await;
        }
        if self.begin_another() { Ok(()) } else { Err(error) }
    }

    /// Takes an attempt. False when no attempt or no time is left.
    fn begin_another(&mut self) -> bool {
        if self.retries == 0 {
            return false;
        }
        self.retries -= 1;
        self.left = self.total.saturating_sub(self.shared.now() - self.start);
        !self.left.is_zero()
    }
}

/// Removes many reads from the table when their caller drops them. Nothing is left to remove once
/// they are answered.
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
