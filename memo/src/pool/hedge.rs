//! The calls that wait for their hedge, in the order of their due times. Pure: time is an argument.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Calls in the order in which half of their time is over. The calls in flight limit their number.
#[derive(Debug)]
pub(super) struct Hedges<C> {
    waiting: BTreeMap<Ticket, Arc<C>>,
    tickets: u64,
    /// When the hedging task wakes next, if it sleeps until a time.
    armed: Option<Instant>,
}

/// An entry's key: the due time and a unique number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    due: Instant,
    number: u64,
}

impl<C> Hedges<C> {
    pub(super) fn new() -> Self {
        Hedges { waiting: BTreeMap::new(), tickets: 0, armed: None }
    }

    /// Adds a call.
    pub(super) fn add(&mut self, due: Instant, call: &Arc<C>) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket { due, number: self.tickets };
        self.waiting.insert(ticket, Arc::clone(call));
        ticket
    }

    /// Removes a call that needs no hedge any more.
    pub(super) fn remove(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
    }

    /// Whether the hedging task must wake earlier than planned.
    pub(super) fn needs_earlier_wake(&self) -> bool {
        let first = self.waiting.keys().next();
        first.is_some_and(|first| self.armed.is_none_or(|armed| first.due < armed))
    }

    /// Removes and returns a call that is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Arc<C>> {
        let first = self.waiting.first_entry()?;
        (first.key().due <= now).then(|| first.remove())
    }

    /// The time of the next wake; `None` waits for
    /// [`needs_earlier_wake`](Self::needs_earlier_wake).
    pub(super) fn arm(&mut self) -> Option<Instant> {
        self.armed = self.waiting.keys().next().map(|first| first.due);
        self.armed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn due_calls_come_in_order_and_dropped_calls_do_not() {
        let (mut hedges, start) = (Hedges::new(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let call = |hedges: &mut Hedges<u64>, ms| hedges.add(at(ms), &Arc::new(ms));
        assert!(!hedges.needs_earlier_wake() && hedges.arm().is_none());
        call(&mut hedges, 30);
        assert!(hedges.needs_earlier_wake());
        assert_eq!(hedges.arm(), Some(at(30)));
        call(&mut hedges, 40);
        assert!(!hedges.needs_earlier_wake());
        let gone = call(&mut hedges, 10);
        call(&mut hedges, 20);
        assert!(hedges.needs_earlier_wake());
        hedges.remove(gone);
        assert!(hedges.take_due(at(19)).is_none());
        assert_eq!(hedges.take_due(at(30)).as_deref(), Some(&20));
        assert_eq!(hedges.take_due(at(30)).as_deref(), Some(&30));
        assert!(hedges.take_due(at(30)).is_none());
        assert_eq!(hedges.arm(), Some(at(40)));
    }
}
