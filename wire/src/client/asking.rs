//! How the methods of a client wait: a request goes into the table, and its caller waits for the
//! outcome, or goes away and takes it along.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use super::Client;
use super::error::CallError;
use super::options::CallOptions;
use super::request::Request;
use super::retry::Tries;
use super::shared::Shared;
use super::waiter::{Answer, Callback, Many, Waiter};

impl Client {
    /// Sends one request and waits for its answer. A dropped future leaves nothing behind.
    pub(super) async fn ask(
        &self,
        request: Request<&[u8]>,
        timeout: Duration,
    ) -> Result<Answer, CallError> {
        let (sender, receiver) = oneshot::channel();
        let id = self.shared().submit(request, timeout, Waiter::Future(sender));
        let mut cancel = Cancel { shared: self.shared(), id };
        let outcome = receiver.await;
        cancel.id = 0;
        outcome.unwrap_or(Err(CallError::Closed))
    }

    /// Sends one read, and again if its connection is lost.
    pub(super) async fn read(
        &self,
        request: Request<&[u8]>,
        options: CallOptions,
    ) -> Result<Answer, CallError> {
        let mut tries = Tries::new(self.shared(), options);
        loop {
            match self.ask(request, tries.left).await {
                Ok(answer) => return Ok(answer),
                Err(error) => tries.another(error).await?,
            }
        }
    }

    /// Sends many reads and waits for all answers. A dropped future leaves nothing behind.
    pub(super) async fn ask_many(
        &self,
        keys: &[u64],
        timeout: Duration,
    ) -> Result<Vec<Option<i64>>, CallError> {
        let (sender, receiver) = oneshot::channel();
        let callback = Callback::new(|values| drop(sender.send(values)));
        let many = self.shared().submit_many(keys, timeout, callback);
        let _cancel = many.map(|many| CancelMany { shared: self.shared(), many });
        receiver.await.unwrap_or(Err(CallError::Closed))
    }
}

/// Takes a call whose caller goes away out of the table (id 0: nothing to take).
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

/// The same for many reads. Once they are answered there is nothing to take.
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
