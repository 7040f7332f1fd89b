//! Requests whose time is running: which of them have used up half of it. Pure: time comes in as an
//! argument.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

/// Requests in the order in which half of their time is over. As many as are under way, at most.
#[derive(Debug)]
pub(super) struct Halfway<C> {
    waiting: BTreeMap<Ticket, Arc<C>>,
    tickets: u64,
    /// When whoever looks comes again, if that is known.
    armed: Option<Instant>,
}

/// A request's place: when it is due, and a number that no other has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket {
    due: Instant,
    number: u64,
}

impl<C> Halfway<C> {
    pub(super) fn new() -> Self {
        Halfway { waiting: BTreeMap::new(), tickets: 0, armed: None }
    }

    /// Takes a request in.
    pub(super) fn add(&mut self, due: Instant, call: &Arc<C>) -> Ticket {
        self.tickets += 1;
        let ticket = Ticket { due, number: self.tickets };
        self.waiting.insert(ticket, Arc::clone(call));
        ticket
    }

    /// Forgets one that needs it no more.
    pub(super) fn remove(&mut self, ticket: Ticket) {
        self.waiting.remove(&ticket);
    }

    /// Whether somebody must look earlier than was said the last time.
    pub(super) fn is_pressing(&self) -> bool {
        let first = self.waiting.keys().next();
        first.is_some_and(|first| self.armed.is_none_or(|armed| first.due < armed))
    }

    /// Takes one out whose time has come.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<Arc<C>> {
        let first = self.waiting.first_entry()?;
        (first.key().due <= now).then(|| first.remove())
    }

    /// When to look again; `None` for not before somebody is [pressing](Self::is_pressing).
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
    fn calls_come_out_when_they_are_due_in_order_and_whoever_has_left_does_not() {
        let (mut halfway, start) = (Halfway::new(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let call = |halfway: &mut Halfway<u64>, ms| halfway.add(at(ms), &Arc::new(ms));
        assert!(!halfway.is_pressing() && halfway.arm().is_none());
        call(&mut halfway, 30);
        assert!(halfway.is_pressing());
        assert_eq!(halfway.arm(), Some(at(30)));
        call(&mut halfway, 40);
        assert!(!halfway.is_pressing());
        let gone = call(&mut halfway, 10);
        call(&mut halfway, 20);
        assert!(halfway.is_pressing());
        halfway.remove(gone);
        assert!(halfway.take_due(at(19)).is_none());
        assert_eq!(halfway.take_due(at(30)).as_deref(), Some(&20));
        assert_eq!(halfway.take_due(at(30)).as_deref(), Some(&30));
        assert!(halfway.take_due(at(30)).is_none());
        assert_eq!(halfway.arm(), Some(at(40)));
    }
}
