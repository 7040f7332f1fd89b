//! All that callers, the connection's driver and the clock share, under one short lock.
//!
//! A call is in the table from its submission to its end. While there is no connection, or no room
//! in the server's window, it is queued and owns its bytes; then its frame is appended to the
//! connection's send buffer. Nothing in here calls back, wakes or blocks: what must happen after
//! the lock is released is noted in [`Effects`].
//!
//! What callers and the clock do stands here, what connections do in `lines.rs`.

mod effects;
mod lines;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::counters::Counters;
use super::error::{CallError, ConnectionError, Stage};
use super::in_flight::InFlight;
use super::line::Line;
use super::options::{ClientOptions, FAR_FUTURE};
use super::request::{Request, budget_ms};
use super::waiter::{Many, Waiter};
use crate::proto::Welcome;

pub(super) use effects::Effects;

/// The id of what has no reply: writes, and the driver's own pings. An error about one of them may
/// come all the same.
pub(super) const NO_REPLY_ID: u64 = 0;

/// A call in the table.
struct Call {
    waiter: Waiter,
    timeout: Duration,
    place: Place,
}

/// Where a call is.
enum Place {
    Queued(Request<Box<[u8]>>),
    /// On the line of this number.
    Sent(u64),
}

/// Calls that are not sent yet, in order. Ids of calls that have left are skipped when their turn
/// comes, and swept out when they are the majority.
#[derive(Default)]
struct Queue {
    ids: VecDeque<u64>,
    gone: usize,
    bytes: usize,
}

/// Why there is no connection.
struct Trouble {
    error: Arc<ConnectionError>,
    permanent: bool,
}

impl Trouble {
    fn of_a_call(&self) -> CallError {
        self.error.of_a_call(self.permanent)
    }
}

/// How far the client's life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Life {
    Open,
    /// Takes no more calls, finishes those it has.
    Closing,
    /// Has no more calls, flushes what is left to write.
    Closed,
    /// Its task has ended.
    Gone,
}

/// See the module.
pub(super) struct State {
    calls: InFlight<Call>,
    queue: Queue,
    /// The line that takes new requests.
    current: Option<Line>,
    /// Lines that finish what is in flight on them.
    draining: Vec<Line>,
    lines: u64,
    trouble: Option<Trouble>,
    pub(super) life: Life,
    /// When the timer wakes next.
    armed: Option<Instant>,
    counters: Counters,
    max_in_flight: usize,
    max_queued_bytes: usize,
    fail_fast: bool,
}

impl State {
    pub(super) fn new(options: &ClientOptions) -> Self {
        State {
            calls: InFlight::new(),
            queue: Queue::default(),
            current: None,
            draining: Vec::new(),
            lines: 0,
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
        self.current.as_ref().map(|line| &line.welcome)
    }

    pub(super) fn counters(&self) -> Counters {
        Counters {
            in_flight: self.calls.len() as u64,
            queued_bytes: self.queued_bytes() as u64,
            ..self.counters
        }
    }

    /// The error of a call that would have to wait for a connection but must not.
    pub(super) fn refusal(&self) -> Option<CallError> {
        let trouble = self.trouble.as_ref()?;
        (trouble.permanent || self.fail_fast).then(|| trouble.of_a_call())
    }

    pub(super) fn last_error(&self) -> Option<Arc<ConnectionError>> {
        self.trouble.as_ref().map(|t| Arc::clone(&t.error))
    }

    // What callers do.

    /// Whether another `cost` bytes may come. What comes alone always may.
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

    /// Takes a request in and gives it its id (0 for one that has no reply and is on its way).
    /// The caller asked [`State::room_for`] it.
    pub(super) fn submit(
        &mut self,
        now: Instant,
        timeout: Duration,
        request: Request<&[u8]>,
        waiter: Waiter,
        effects: &mut Effects,
    ) -> u64 {
        let deadline = deadline(now, timeout);
        let mut id = NO_REPLY_ID;
        if let Some(line) = &mut self.current
            && self.queue.ids.is_empty()
            && (line.has_room() || !request.has_reply())
        {
            if let Err(error) = request.check(&line.welcome) {
                effects.fail(waiter, error);
                return id;
            }
            if request.has_reply() {
                let place = Place::Sent(line.number);
                id = self.calls.insert(deadline, Call { waiter, timeout, place });
                line.in_flight += 1;
            }
            request.encode(id, budget_ms(now, deadline), &mut line.out);
            self.counters.sent += 1;
            effects.wake(line.rouse());
        } else {
            let cost = request.cost();
            let place = Place::Queued(request.to_owned());
            id = self.calls.insert(deadline, Call { waiter, timeout, place });
            self.queue.ids.push_back(id);
            self.queue.bytes += cost;
        }
        if id != 0 && self.armed.is_none_or(|armed| deadline < armed) {
            self.armed = Some(deadline);
            effects.timer = true;
        }
        id
    }

    /// Forgets a call whose caller has gone.
    pub(super) fn cancel(&mut self, now: Instant, id: u64, effects: &mut Effects) {
        if let Some(call) = self.calls.remove(id) {
            self.left(&call, effects);
            self.pump(now, effects);
        }
    }

    /// Forgets all reads of a caller who has gone.
    pub(super) fn cancel_many(&mut self, now: Instant, many: &Arc<Many>, effects: &mut Effects) {
        self.remove_where(|call| call.waiter.is_one_of(many), effects, |_, _, _| {});
        self.pump(now, effects);
    }

    /// No more calls from now on.
    pub(super) fn begin_closing(&mut self, effects: &mut Effects) {
        self.life = self.life.max(Life::Closing);
        effects.changed = true;
    }

    pub(super) fn is_idle(&self) -> bool {
        self.calls.is_empty()
    }

    /// Fails everything and lets the lines flush what they hold.
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
        for line in self.current.iter_mut().chain(&mut self.draining) {
            effects.wake(line.rouse());
        }
    }

    // What the clock does.

    /// Fails what is due and says when to come again.
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

    // Private.

    fn queued_bytes(&self) -> usize {
        self.queue.bytes + self.current.as_ref().map_or(0, Line::unsent_bytes)
    }

    /// Settles the accounts of a call that was taken out of the table.
    fn left(&mut self, call: &Call, effects: &mut Effects) {
        match &call.place {
            Place::Queued(request) => {
                self.queue.bytes -= request.cost();
                self.queue.gone += 1;
                if self.queue.gone > self.queue.ids.len() / 2 {
                    let calls = &mut self.calls;
                    self.queue.ids.retain(|&id| calls.get_mut(id).is_some());
                    self.queue.gone = 0;
                }
            }
            Place::Sent(number) => {
                let draining = self.draining.iter().any(|line| line.number == *number);
                if let Some(line) = self.line(*number) {
                    line.in_flight -= 1;
                    if draining && line.in_flight == 0 {
                        let waker = line.rouse();
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
        let stage = match call.place {
            Place::Sent(_) => Stage::AwaitingReply,
            Place::Queued(_) if self.current.is_some() => Stage::Queued,
            Place::Queued(_) => Stage::Connecting,
        };
        let error = CallError::DeadlineExceeded {
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
                |call| matches!(call.place, Place::Queued(_)),
                effects,
                |_, call, effects| effects.fail(call.waiter, error.clone()),
            );
        }
    }
}

/// The moment at which a call of this timeout is due.
fn deadline(now: Instant, timeout: Duration) -> Instant {
    now + timeout.min(FAR_FUTURE)
}
