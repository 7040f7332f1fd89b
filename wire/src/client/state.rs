//! The state that callers, the connection's driver and the clock share, under one short lock.
//!
//! A call is in the table from its submission to its outcome. While there is no connection, or the
//! server's window is full, it is queued and owns or shares its bytes. Then its frame is appended
//! to the connection's send buffer. No function here calls back, wakes a task or blocks:
//! [`Effects`] collects what must happen after the lock is released.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use super::connection_error::{ConnectionError, Violation};
use super::error::{CallError, Stage};
use super::in_flight::InFlight;
use super::options::{ClientOptions, FAR_FUTURE};
use super::outbound::Outbound;
use super::request::{Body, QueuedBody, Request, budget_ms};
use super::waiter::{Many, Waiter};
use crate::proto::Welcome;
use crate::stream::Streams;

/// The id of frames without a reply: writes, and the driver's own pings. An error may still refer
/// to one of them.
pub(super) const NO_REPLY_ID: u64 = 0;

/// A call in the table.
struct Call {
    waiter: Waiter,
    timeout: Duration,
    state: CallState,
}

/// The state of a call in the table.
enum CallState {
    Queued(Request<QueuedBody>),
    /// On the connection of this number.
    Sent(u64),
}

/// Calls that are not sent, in order. Ids of calls that have left are skipped later, and removed
/// when they are the majority.
#[derive(Default)]
struct Queue {
    ids: VecDeque<u64>,
    gone: usize,
    bytes: usize,
}

/// Why there is no connection.
struct Trouble {
    server: Arc<str>,
    error: Arc<ConnectionError>,
    permanent: bool,
}

impl Trouble {
    fn of_a_call(&self) -> CallError {
        CallError::of_connection(&self.error, &self.server, self.permanent)
    }
}

/// The steps of a client's shutdown, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    Open,
    /// Accepts no more calls, and finishes those in flight.
    Closing,
    /// Has no more calls, and writes what is left.
    Closed,
    /// The client's task has ended.
    Gone,
}

/// See the module.
pub(super) struct State {
    server: Arc<str>,
    calls: InFlight<Call>,
    queue: Queue,
    /// The connection that takes new requests.
    current: Option<Outbound>,
    /// Connections that finish their requests in flight.
    draining: Vec<Outbound>,
    connections: u64,
    trouble: Option<Trouble>,
    pub(super) life: Life,
    /// When the timer fires next.
    armed: Option<Instant>,
    counters: Counters,
    max_in_flight: usize,
    max_queued_bytes: usize,
    fail_fast: bool,
}

impl State {
    pub(super) fn new(options: &ClientOptions, server: Arc<str>) -> Self {
        State {
            server,
            calls: InFlight::new(),
            queue: Queue::default(),
            current: None,
            draining: Vec::new(),
            connections: 0,
            trouble: None,
            life: Life::Open,
            armed: None,
            counters: Counters::default(),
            max_in_flight: options.max_in_flight,
            max_queued_bytes: options.max_queued_bytes,
            fail_fast: options.fail_fast,
        }
    }

    pub(super) fn welcome(&self) -> Option<&Arc<Welcome>> {
        self.current.as_ref().map(|outbound| &outbound.welcome)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            in_flight: self.calls.len() as u64,
            queued_bytes: self.queued_bytes() as u64,
            ..self.counters
        }
    }

    /// The error of a call that must not wait for a connection.
    pub(super) fn refusal(&self) -> Option<CallError> {
        let trouble = self.trouble.as_ref()?;
        (trouble.permanent || self.fail_fast).then(|| trouble.of_a_call())
    }

    pub(super) fn last_error(&self) -> Option<Arc<ConnectionError>> {
        self.trouble.as_ref().map(|t| Arc::clone(&t.error))
    }

    /// The address of the current connection, or of the last attempt, or all addresses.
    pub(super) fn server(&self) -> Arc<str> {
        let current = self.current.as_ref().map(|outbound| &outbound.server);
        let tried = self.trouble.as_ref().map(|trouble| &trouble.server);
        Arc::clone(current.or(tried).unwrap_or(&self.server))
    }

    // Methods of callers.

    /// Whether `cost` more bytes may be queued. With an empty queue any number may.
    pub(super) fn room_for(&self, cost: usize) -> Result<(), CallError> {
        if self.life != Life::Open {
            return Err(CallError::Closed);
        }
        if self.current.is_none()
            && let Some(error) = self.refusal()
        {
            return Err(error);
        }
        let queued_bytes = self.queued_bytes();
        if queued_bytes > 0 && queued_bytes + cost > self.max_queued_bytes {
            let limit_bytes = self.max_queued_bytes;
            return Err(CallError::QueueFull { queued_bytes, limit_bytes });
        }
        Ok(())
    }

    /// Inserts a request and returns its id (0 for one without a reply that is sent). The caller
    /// has checked [`State::room_for`].
    pub(super) fn submit<B: Body>(
        &mut self,
        now: Instant,
        timeout: Duration,
        request: Request<B>,
        waiter: Waiter,
        effects: &mut Effects,
    ) -> u64 {
        let deadline = deadline(now, timeout);
        let mut id = NO_REPLY_ID;
        if let Some(outbound) = &mut self.current
            && self.queue.ids.is_empty()
            && (outbound.has_room() || !request.has_reply())
        {
            if let Err(error) = request.check(&outbound.welcome) {
                effects.fail(waiter, error);
                return id;
            }
            if request.has_reply() {
                let state = CallState::Sent(outbound.number);
                id = self.calls.insert(deadline, Call { waiter, timeout, state });
                outbound.in_flight += 1;
            }
            request.encode(id, budget_ms(now, deadline), &mut outbound.out);
            self.counters.sent += 1;
            effects.wake(outbound.rouse());
        } else {
            let cost = request.cost();
            let state = CallState::Queued(request.to_queued());
            id = self.calls.insert(deadline, Call { waiter, timeout, state });
            self.queue.ids.push_back(id);
            self.queue.bytes += cost;
        }
        if id != 0 && self.armed.is_none_or(|armed| deadline < armed) {
            self.armed = Some(deadline);
            effects.timer = true;
        }
        id
    }

    /// Removes a call whose caller dropped it.
    pub(super) fn cancel(&mut self, now: Instant, id: u64, effects: &mut Effects) {
        if let Some(call) = self.calls.remove(id) {
            self.left(&call, effects);
            self.pump(now, effects);
        }
    }

    /// Removes all reads of a caller that dropped them.
    pub(super) fn cancel_many(&mut self, now: Instant, many: &Arc<Many>, effects: &mut Effects) {
        self.remove_where(|call| call.waiter.is_one_of(many), effects, |_, _, _| {});
        self.pump(now, effects);
    }

    /// Accepts no more calls.
    pub(super) fn begin_closing(&mut self, effects: &mut Effects) {
        self.life = self.life.max(Life::Closing);
        effects.changed = true;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    /// Fails all calls, and lets the connections write what is left.
    pub(super) fn terminate(&mut self, effects: &mut Effects) {
        if self.life >= Life::Closed {
            return;
        }
        self.life = Life::Closed;
        effects.changed = true;
        self.remove_where(
            |_| true,
            effects,
            |_, call, effects| {
                effects.fail(call.waiter, CallError::Closed);
            },
        );
        for outbound in self.current.iter_mut().chain(&mut self.draining) {
            effects.wake(outbound.rouse());
            effects.ended.push((Arc::clone(&outbound.streams), None));
        }
    }

    // Methods of connections.

    /// A connection is open and takes requests from now on.
    pub(super) fn attach(
        &mut self,
        now: Instant,
        server: Arc<str>,
        welcome: Arc<Welcome>,
        effects: &mut Effects,
    ) -> (u64, Arc<Streams>) {
        self.connections += 1;
        let window = self.max_in_flight.min(welcome.window as usize).max(1);
        let outbound = Outbound::new(self.connections, server, welcome, window);
        let streams = Arc::clone(&outbound.streams);
        self.current = Some(outbound);
        self.trouble = None;
        self.counters.connects += 1;
        effects.changed = true;
        self.pump(now, effects);
        (self.connections, streams)
    }

    /// An attempt to connect begins.
    pub(super) fn attempt(&mut self) {
        self.counters.attempts += 1;
    }

    /// An attempt to connect has failed.
    pub(super) fn attempt_failed(
        &mut self,
        server: Arc<str>,
        error: Arc<ConnectionError>,
        effects: &mut Effects,
    ) {
        let permanent = error.is_permanent();
        self.in_trouble(Trouble { server, error, permanent }, effects);
    }

    /// The server is closing this connection: it gets no more requests.
    pub(super) fn drain(&mut self, number: u64, effects: &mut Effects) {
        if let Some(outbound) = self.current.take_if(|outbound| outbound.number == number) {
            self.draining.push(outbound);
            effects.changed = true;
        }
    }

    /// How many connections finish their requests in flight.
    pub(super) fn draining(&self) -> usize {
        self.draining.len()
    }

    /// A connection has ended: its requests in flight are lost.
    pub(super) fn lose(
        &mut self,
        number: u64,
        cause: &Arc<ConnectionError>,
        effects: &mut Effects,
    ) {
        let server = self.outbound(number).map(|outbound| Arc::clone(&outbound.server));
        let server = server.unwrap_or_else(|| self.server());
        if let Some(outbound) = self.outbound(number) {
            effects.ended.push((Arc::clone(&outbound.streams), Some(Arc::clone(cause))));
        }
        let was_current = self.current.take_if(|outbound| outbound.number == number).is_some();
        self.draining.retain(|outbound| outbound.number != number);
        self.remove_where(
            |call| matches!(call.state, CallState::Sent(outbound) if outbound == number),
            effects,
            |_, call, effects| {
                let (server, cause) = (Arc::clone(&server), Arc::clone(cause));
                effects.fail(call.waiter, CallError::ConnectionLost { server, cause });
            },
        );
        if was_current {
            let error = Arc::clone(cause);
            let permanent = false;
            self.in_trouble(Trouble { server, error, permanent }, effects);
        }
    }

    /// The connection that takes new requests.
    pub(super) fn current(&mut self) -> Option<&mut Outbound> {
        self.current.as_mut()
    }

    /// The connection of this number.
    pub(super) fn outbound(&mut self, number: u64) -> Option<&mut Outbound> {
        self.current.iter_mut().chain(&mut self.draining).find(|outbound| outbound.number == number)
    }

    /// Whether a connection has nothing left to do but to write its buffer.
    pub(super) fn is_finished(&self, number: u64) -> bool {
        let drained = |outbound: &Outbound| {
            outbound.number == number && outbound.in_flight == 0 && !outbound.streams.is_busy()
        };
        self.life >= Life::Closed || self.draining.iter().any(drained)
    }

    /// The waiter for the reply with this id on this connection. `None`, and counted, if it no
    /// longer waits.
    ///
    /// # Errors
    /// [`Violation::UnknownId`] for an id that no request on this connection had.
    pub(super) fn reply(&mut self, number: u64, id: u64) -> Result<Option<Waiter>, Violation> {
        self.counters.received += 1;
        let sent_here =
            |call: &Call| matches!(call.state, CallState::Sent(outbound) if outbound == number);
        let found = self.calls.get_mut(id).is_some_and(|(_, call)| sent_here(call));
        let Some(call) = found.then(|| self.calls.remove(id)).flatten() else {
            self.counters.unknown_ids += 1;
            return match id == NO_REPLY_ID || self.calls.has_left(id) {
                true => Ok(None),
                false => Err(Violation::UnknownId { id }),
            };
        };
        if let Some(outbound) = self.outbound(number) {
            outbound.in_flight -= 1;
        }
        Ok(Some(call.waiter))
    }

    /// Sends queued requests as far as the window allows.
    pub(super) fn pump(&mut self, now: Instant, effects: &mut Effects) {
        effects.changed |= self.life == Life::Closing && self.calls.is_empty();
        let Some(outbound) = &mut self.current else {
            return;
        };
        while let Some(&id) = self.queue.ids.front() {
            let Some((deadline, call)) = self.calls.get_mut(id) else {
                self.queue.gone = self.queue.gone.saturating_sub(1);
                self.queue.ids.pop_front();
                continue;
            };
            let CallState::Queued(request) = &call.state else {
                unreachable!("a queued call is not sent");
            };
            if request.has_reply() && !outbound.has_room() {
                break;
            }
            self.queue.ids.pop_front();
            self.queue.bytes -= request.cost();
            if let Err(error) = request.check(&outbound.welcome) {
                if let Some(call) = self.calls.remove(id) {
                    effects.fail(call.waiter, error);
                }
                continue;
            }
            request.encode(id, budget_ms(now, deadline), &mut outbound.out);
            self.counters.sent += 1;
            if request.has_reply() {
                call.state = CallState::Sent(outbound.number);
                outbound.in_flight += 1;
            } else {
                self.calls.remove(id);
            }
            effects.wake(outbound.rouse());
        }
        effects.changed |= self.life == Life::Closing && self.calls.is_empty();
    }

    // Methods of the clock.

    /// Fails expired calls and returns the next deadline.
    pub(super) fn expire(&mut self, now: Instant, effects: &mut Effects) -> Option<Instant> {
        let mut due = Vec::new();
        self.calls.expire(now, |call| due.push(call));
        for call in due {
            self.left(&call, effects);
            self.time_out(call, effects);
        }
        self.pump(now, effects);
        self.armed = self.calls.next_deadline();
        self.armed
    }

    fn queued_bytes(&self) -> usize {
        self.queue.bytes + self.current.as_ref().map_or(0, Outbound::unsent_bytes)
    }

    /// Updates the accounts for a call that was removed from the table.
    fn left(&mut self, call: &Call, effects: &mut Effects) {
        match &call.state {
            CallState::Queued(request) => {
                self.queue.bytes -= request.cost();
                self.queue.gone += 1;
                if self.queue.gone > self.queue.ids.len() / 2 {
                    let calls = &mut self.calls;
                    self.queue.ids.retain(|&id| calls.get_mut(id).is_some());
                    self.queue.gone = 0;
                }
            }
            CallState::Sent(number) => {
                let draining = self.draining.iter().any(|outbound| outbound.number == *number);
                if let Some(outbound) = self.outbound(*number) {
                    outbound.in_flight -= 1;
                    if draining && outbound.in_flight == 0 {
                        let waker = outbound.rouse();
                        effects.wake(waker);
                    }
                }
            }
        }
    }

    fn remove_where(
        &mut self,
        leaves: impl FnMut(&Call) -> bool,
        effects: &mut Effects,
        mut each: impl FnMut(&mut Self, Call, &mut Effects),
    ) {
        let mut gone = Vec::new();
        self.calls.remove_where(leaves, |call| gone.push(call));
        for call in gone {
            self.left(&call, effects);
            each(self, call, effects);
        }
        effects.changed |= self.life == Life::Closing && self.calls.is_empty();
    }

    fn time_out(&mut self, call: Call, effects: &mut Effects) {
        self.counters.timeouts += 1;
        let stage = match call.state {
            CallState::Sent(_) => Stage::AwaitingReply,
            CallState::Queued(_) if self.current.is_some() => Stage::Queued,
            CallState::Queued(_) => Stage::Connecting,
        };
        let error = CallError::DeadlineExceeded {
            server: self.server(),
            stage,
            timeout: call.timeout,
            last_error: self.last_error(),
        };
        effects.fail(call.waiter, error);
    }

    fn in_trouble(&mut self, trouble: Trouble, effects: &mut Effects) {
        self.trouble = Some(trouble);
        effects.changed = true;
        if let Some(error) = self.refusal() {
            self.remove_where(
                |call| matches!(call.state, CallState::Queued(_)),
                effects,
                |_, call, effects| effects.fail(call.waiter, error.clone()),
            );
        }
    }
}

/// The deadline of a call with this timeout.
fn deadline(now: Instant, timeout: Duration) -> Instant {
    now + timeout.min(FAR_FUTURE)
}

/// Counters of a client at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Connections that reached a `Welcome`.
    pub connects: u64,
    /// Attempts to connect, successful ones included.
    pub attempts: u64,
    /// Requests sent; a request that is sent again counts again.
    pub sent: u64,
    /// Replies received, errors included.
    pub received: u64,
    /// Replies among them whose id was not in flight. Late and repeated replies are dropped; a
    /// reply to a request that was never sent ends the connection.
    pub unknown_ids: u64,
    /// Calls that ran out of time.
    pub timeouts: u64,
    /// Calls without an outcome, queued ones included.
    pub in_flight: u64,
    /// Bytes of requests that wait to be sent.
    pub queued_bytes: u64,
}

/// Actions for after the lock is released.
#[derive(Default)]
pub(super) struct Effects {
    failed: Vec<(Waiter, CallError)>,
    wake: Option<Waker>,
    wake_too: Vec<Waker>,
    /// Connections whose streams have ended, and the cause.
    ended: Vec<(Arc<Streams>, Option<Arc<ConnectionError>>)>,
    pub(super) timer: bool,
    pub(super) changed: bool,
}

impl Effects {
    pub(super) fn fail(&mut self, waiter: Waiter, error: CallError) {
        self.failed.push((waiter, error));
    }

    pub(super) fn wake(&mut self, waker: Option<Waker>) {
        match (&self.wake, waker) {
            (None, waker) => self.wake = waker,
            (Some(_), waker) => self.wake_too.extend(waker),
        }
    }

    /// Whether a waiter gets an outcome.
    pub(super) fn has_outcomes(&self) -> bool {
        !self.failed.is_empty()
    }

    pub(super) fn run(self) {
        for waker in self.wake.into_iter().chain(self.wake_too) {
            waker.wake();
        }
        for (streams, cause) in self.ended {
            streams.lose(cause);
        }
        for (waiter, error) in self.failed {
            waiter.fail(error);
        }
    }
}
