//! State that all handles and tasks of one client share: a lock, and the ways to be woken.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::Reply;
use tokio::sync::{Notify, watch};

use super::error::{CallError, Stage};
use super::options::ClientOptions;
use super::request::{Body, Request};
use super::state::{Effects, Life, State};
use super::waiter::{Many, Values, Waiter};

/// See the module.
pub(super) struct Shared {
    pub(super) options: ClientOptions,
    /// The server's addresses, as errors and logs name them.
    pub(super) server: Arc<str>,
    state: Mutex<State>,
    /// Notified when the timer must fire earlier.
    timer: Notify,
    /// Notified when a connection is opened or lost, and at each step of the client's shutdown.
    changed: watch::Sender<()>,
    /// Tasks and threads that are delivering outcomes. Their calls have left the table, but
    /// `close` must still wait for their receivers.
    delivering: AtomicUsize,
    /// `close` may be waiting for deliveries.
    ending: AtomicBool,
}

impl Shared {
    pub(super) fn new(options: ClientOptions, server: Arc<str>) -> Arc<Self> {
        let options = options.sane();
        Arc::new(Shared {
            state: Mutex::new(State::new(&options, Arc::clone(&server))),
            options,
            server,
            timer: Notify::new(),
            changed: watch::Sender::new(()),
            delivering: AtomicUsize::new(0),
            ending: AtomicBool::new(false),
        })
    }

    /// The time of tokio's clock, which may be virtual.
    pub(super) fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // No code under this lock panics by design. If it does, the other calls may continue.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `act` under the lock, and runs its effects after the lock is released.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut State, &mut Effects) -> R) -> R {
        let mut effects = Effects::default();
        let mut state = self.lock();
        let result = act(&mut state, &mut effects);
        self.release(state, effects);
        result
    }

    /// Releases the lock and runs the effects.
    pub(super) fn release(&self, state: MutexGuard<'_, State>, effects: Effects) {
        let _delivering = effects.has_outcomes().then(|| self.delivering(&state));
        drop(state);
        if effects.timer {
            self.timer.notify_one();
        }
        if effects.changed {
            self.changed.send_replace(());
        }
        effects.run();
    }

    /// Counts a delivery until the guard is dropped. It begins under the lock, so that `close`
    /// never sees an empty table between removal and delivery.
    pub(super) fn delivering(&self, _locked: &MutexGuard<'_, State>) -> Delivering<'_> {
        self.delivering.fetch_add(1, Ordering::SeqCst);
        Delivering(self)
    }

    /// Accepts no more calls, waits for those in flight, and ends the client.
    pub(super) async fn close(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.with(|state, effects| state.begin_closing(effects));
        self.wait_until(|state| self.is_settled(state).then_some(())).await;
        self.terminate();
        let gone = |state: &State| state.life == Life::Gone && self.is_settled(state);
        self.wait_until(|state| gone(state).then_some(())).await;
    }

    fn is_settled(&self, state: &State) -> bool {
        state.is_idle() && self.delivering.load(Ordering::SeqCst) == 0
    }

    /// Submits a request. Its waiter may get the outcome before this returns.
    pub(super) fn submit<B: Body>(
        &self,
        request: Request<B>,
        timeout: Duration,
        waiter: Waiter,
    ) -> u64 {
        let now = self.now();
        let mut effects = Effects::default();
        let mut state = self.lock();
        let outcome = match state.room_for(request.cost()) {
            Ok(()) => Ok(state.submit(now, timeout, request, waiter, &mut effects)),
            Err(error) => Err((waiter, error)),
        };
        self.release(state, effects);
        match outcome {
            Ok(id) => id,
            Err((waiter, error)) => {
                waiter.fail(error);
                0
            }
        }
    }

    /// Submits a request without a reply.
    pub(super) fn submit_write(&self, key: u64, value: i64) -> Result<(), CallError> {
        let now = self.now();
        let request = Request::<&[u8]>::CacheWrite { key, value };
        self.with(|state, effects| {
            state.room_for(request.cost())?;
            state.submit(now, self.options.timeout, request, Waiter::None, effects);
            Ok(())
        })
    }

    /// Submits many reads under one lock. The reply may be sent before this returns.
    pub(super) fn submit_many(
        &self,
        keys: &[u64],
        timeout: Duration,
        reply: Reply<Values>,
    ) -> Option<Arc<Many>> {
        if keys.is_empty() {
            reply.send(Ok(Vec::new()));
            return None;
        }
        let now = self.now();
        let many = Many::new(keys.len(), reply);
        let mut effects = Effects::default();
        let mut state = self.lock();
        let outcome = state.room_for(Request::<&[u8]>::CacheRead(0).cost() * keys.len());
        if outcome.is_ok() {
            for (index, &key) in keys.iter().enumerate() {
                let waiter = Waiter::One(Arc::clone(&many), index as u32);
                let request = Request::<&[u8]>::CacheRead(key);
                state.submit(now, timeout, request, waiter, &mut effects);
            }
        }
        self.release(state, effects);
        if let Err(error) = outcome {
            many.fail(error);
        }
        Some(many)
    }

    /// Notifies when a connection is opened or lost.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Returns when `condition` is true. Changes to it must set `Effects::changed`.
    pub(super) async fn wait_until<R>(&self, condition: impl Fn(&State) -> Option<R>) -> R {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(result) = condition(&self.lock()) {
                return result;
            }
            // Never an error: the sender lives in `self`.
            let _ = changed.changed().await;
        }
    }

    /// Returns when there is a connection.
    ///
    /// # Errors
    /// As a call's, if there is none within `timeout`, or no attempt can succeed.
    pub(super) async fn connected(&self, timeout: Duration) -> Result<(), CallError> {
        let connected = self.wait_until(|state| {
            if state.life != Life::Open {
                return Some(Err(CallError::Closed));
            }
            if state.welcome().is_some() {
                return Some(Ok(()));
            }
            state.refusal().map(Err)
        });
        match tokio::time::timeout(timeout, connected).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let state = self.lock();
                let (server, last_error) = (state.server(), state.last_error());
                let stage = Stage::Connecting;
                Err(CallError::DeadlineExceeded { server, stage, timeout, last_error })
            }
        }
    }

    /// Returns when the client is closed.
    pub(super) async fn closed(&self) {
        self.wait_until(|state| (state.life >= Life::Closed).then_some(())).await;
    }

    /// Fails calls at their deadlines, until the client is closed.
    pub(super) async fn keep_time(self: Arc<Self>) {
        loop {
            let next = self.with(|state, effects| {
                let next = state.expire(self.now(), effects);
                (state.life < Life::Closed).then_some(next)
            });
            let Some(next) = next else { return };
            let earlier = self.timer.notified();
            match next {
                None => earlier.await,
                Some(next) => tokio::select! {
                    biased;
                    () = earlier => {}
                    () = tokio::time::sleep_until(next.into()) => {}
                },
            }
        }
    }

    /// Ends the client at once.
    pub(super) fn terminate(&self) {
        self.with(|state, effects| state.terminate(effects));
        self.timer.notify_one();
    }
}

/// See [`Shared::delivering`].
pub(super) struct Delivering<'a>(&'a Shared);

impl Drop for Delivering<'_> {
    fn drop(&mut self) {
        self.0.delivering.fetch_sub(1, Ordering::SeqCst);
        if self.0.ending.load(Ordering::SeqCst) {
            self.0.changed.send_replace(());
        }
    }
}
