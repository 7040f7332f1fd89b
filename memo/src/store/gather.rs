//! The values of a lookup that arrive one by one.

use std::sync::{Arc, Mutex, PoisonError};

use afterimage_core::{ByteBudget, BytePermit};
use bytes::Bytes;

use super::{Callback, OfBytes};

/// Bytes that the values of unfinished lookups may have together. A value beyond them counts as
/// missing. A store that sends much more than the memo has asked for costs no more memory.
pub(super) const MAX_GATHERED_BYTES: usize = 128 << 20;

/// A lookup of several keys of bytes. The callback is called when all values have arrived, or at
/// the first failure, and also if this is dropped.
pub(super) struct Gathered {
    budget: ByteBudget,
    state: Mutex<State>,
}

struct State {
    values: Vec<Option<Bytes>>,
    missing: usize,
    held: Vec<BytePermit>,
    then: Option<Callback<OfBytes>>,
}

impl Gathered {
    /// A lookup of so many keys, at least one.
    pub(super) fn new(keys: usize, budget: &ByteBudget, then: Callback<OfBytes>) -> Arc<Self> {
        let state =
            State { values: vec![None; keys], missing: keys, held: Vec::new(), then: Some(then) };
        Arc::new(Gathered { budget: budget.clone(), state: Mutex::new(state) })
    }

    /// The value of key `i` has arrived.
    pub(super) fn arrived(&self, i: usize, value: Option<Bytes>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.then.is_none() {
            return;
        }
        if let Some(value) = value
            && let Some(permit) = self.budget.take(value.len())
            && let Some(place) = state.values.get_mut(i)
        {
            *place = Some(value);
            state.held.push(permit);
        }
        state.missing = state.missing.saturating_sub(1);
        if state.missing == 0
            && let Some(then) = state.then.take()
        {
            let (values, held) = (std::mem::take(&mut state.values), std::mem::take(&mut state.held));
            drop(state);
            then(Some(values));
            drop(held);
        }
    }

    /// The store gave no answer for one of the keys.
    pub(super) fn failed(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        (state.values, state.held) = (Vec::new(), Vec::new());
        let then = state.then.take();
        drop(state);
        if let Some(then) = then {
            then(None);
        }
    }
}

impl Drop for Gathered {
    fn drop(&mut self) {
        self.failed();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_lookup_ends_once_with_all_values_or_none() {
        let budget = ByteBudget::new(10);
        let (sender, outcomes) = channel();
        let gather = |keys| {
            let sender = sender.clone();
            Gathered::new(keys, &budget, Box::new(move |values| sender.send(values).unwrap()))
        };
        let whole = gather(3);
        whole.arrived(2, Some("c".into()));
        whole.arrived(0, None);
        assert!(outcomes.try_recv().is_err());
        whole.arrived(1, Some("b".into()));
        assert_eq!(outcomes.try_recv(), Ok(Some(vec![None, Some("b".into()), Some("c".into())])));
        let failed = gather(2);
        failed.arrived(0, Some("a".into()));
        failed.failed();
        failed.arrived(1, Some("b".into()));
        drop(failed);
        drop(gather(1));
        drop(whole);
        assert_eq!(outcomes.try_iter().collect::<Vec<_>>(), [None, None]);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn values_beyond_the_budget_are_missing() {
        let (budget, (sender, outcomes)) = (ByteBudget::new(10), channel());
        let lookup = Gathered::new(3, &budget, Box::new(move |it| sender.send(it).unwrap()));
        for i in 0..3 {
            lookup.arrived(i, Some(vec![0; 4].into()));
        }
        let values = outcomes.try_recv().unwrap().unwrap();
        assert_eq!(values.iter().filter(|value| value.is_some()).count(), 2);
        assert_eq!(budget.used(), 0);
    }
}
