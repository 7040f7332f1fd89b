//! What connections do with the shared state: they come, take requests, bring replies, and go.

use std::sync::Arc;
use std::time::Instant;

use super::effects::Effects;
use super::{Call, Life, NO_REPLY_ID, Place, State, Trouble};
use crate::client::error::{CallError, ConnectionError, Violation};
use crate::client::line::Line;
use crate::client::request::budget_ms;
use crate::client::waiter::Waiter;
use crate::proto::Welcome;

impl State {
    /// A connection is ready: it takes the requests from now on.
    pub(in crate::client) fn attach(
        &mut self,
        now: Instant,
        welcome: Arc<Welcome>,
        effects: &mut Effects,
    ) -> u64 {
        self.lines += 1;
        let window = self.max_in_flight.min(welcome.window as usize).max(1);
        self.current = Some(Line::new(self.lines, welcome, window));
        self.trouble = None;
        self.counters.connects += 1;
        effects.changed = true;
        self.pump(now, effects);
        self.lines
    }

    /// An attempt to connect begins.
    pub(in crate::client) fn attempt(&mut self) {
        self.counters.attempts += 1;
    }

    /// An attempt to connect has failed.
    pub(in crate::client) fn attempt_failed(
        &mut self,
        error: Arc<ConnectionError>,
        effects: &mut Effects,
    ) {
        let permanent = error.is_permanent();
        self.in_trouble(Trouble { error, permanent }, effects);
    }

    /// The server wants to be rid of this line: it gets no more requests.
    pub(in crate::client) fn drain(&mut self, number: u64, effects: &mut Effects) {
        if let Some(line) = self.current.take_if(|line| line.number == number) {
            self.draining.push(line);
            effects.changed = true;
        }
    }

    /// How many lines finish what is in flight on them.
    pub(in crate::client) fn draining(&self) -> usize {
        self.draining.len()
    }

    /// A line has ended: what is in flight on it is lost.
    pub(in crate::client) fn lose(
        &mut self,
        number: u64,
        cause: &Arc<ConnectionError>,
        effects: &mut Effects,
    ) {
        let was_current = self.current.take_if(|line| line.number == number).is_some();
        self.draining.retain(|line| line.number != number);
        self.remove_where(
            |call| matches!(call.place, Place::Sent(line) if line == number),
            effects,
            |_, call, effects| {
                let cause = Arc::clone(cause);
                effects.fail(call.waiter, CallError::ConnectionLost { cause });
            },
        );
        if was_current {
            let error = Arc::clone(cause);
            let permanent = false;
            self.in_trouble(Trouble { error, permanent }, effects);
        }
    }

    /// The line of this number.
    pub(in crate::client) fn line(&mut self, number: u64) -> Option<&mut Line> {
        self.current.iter_mut().chain(&mut self.draining).find(|line| line.number == number)
    }

    /// Whether a line has nothing more to do but to write what it holds.
    pub(in crate::client) fn is_finished(&self, number: u64) -> bool {
        let drained = |line: &Line| line.number == number && line.in_flight == 0;
        self.life >= Life::Closed || self.draining.iter().any(drained)
    }

    /// Who waits for the reply with this id on this line; `None`, and counted, for nobody any more.
    ///
    /// # Errors
    /// [`Violation::UnknownId`] for an id that was not given to any request on this line.
    pub(in crate::client) fn reply(
        &mut self,
        number: u64,
        id: u64,
    ) -> Result<Option<Waiter>, Violation> {
        self.counters.received += 1;
        let sent_here = |call: &Call| matches!(call.place, Place::Sent(line) if line == number);
        let found = self.calls.get_mut(id).is_some_and(|(_, call)| sent_here(call));
        let Some(call) = found.then(|| self.calls.remove(id)).flatten() else {
            self.counters.unknown_ids += 1;
            return match id == NO_REPLY_ID || self.calls.has_left(id) {
                true => Ok(None),
                false => Err(Violation::UnknownId { id }),
            };
        };
        if let Some(line) = self.line(number) {
            line.in_flight -= 1;
        }
        Ok(Some(call.waiter))
    }

    /// Sends what is queued, as far as there is room.
    pub(in crate::client) fn pump(&mut self, now: Instant, effects: &mut Effects) {
        effects.changed |= self.life == Life::Closing && self.calls.is_empty();
        let Some(line) = &mut self.current else {
            return;
        };
        while let Some(&id) = self.queue.ids.front() {
            let Some((deadline, call)) = self.calls.get_mut(id) else {
                self.queue.gone = self.queue.gone.saturating_sub(1);
                self.queue.ids.pop_front();
                continue;
            };
            let Place::Queued(request) = &call.place else {
                unreachable!("what is in the queue is not sent");
            };
            if request.has_reply() && !line.has_room() {
                break;
            }
            self.queue.ids.pop_front();
            self.queue.bytes -= request.cost();
            if let Err(error) = request.check(&line.welcome) {
                if let Some(call) = self.calls.remove(id) {
                    effects.fail(call.waiter, error);
                }
                continue;
            }
            request.encode(id, budget_ms(now, deadline), &mut line.out);
            self.counters.sent += 1;
            if request.has_reply() {
                call.place = Place::Sent(line.number);
                line.in_flight += 1;
            } else {
                self.calls.remove(id);
            }
            effects.wake(line.rouse());
        }
        effects.changed |= self.life == Life::Closing && self.calls.is_empty();
    }
}
