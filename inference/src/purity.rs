//! Whether the rows of a model depend on each other: evidence from live calls, and the verdict.
//!
//! A batch can be split only if each row has the same answer in every batch and at every position.
//! Not every model is like that. The proxy asks the server again about some rows of a call that it
//! has just answered: a row alone, or the rows in another order. Only after [`PROBES`] equal
//! answers in a row the model is split, and from then on some calls are still compared.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Probes that must agree before batches are split. Models whose rows differ showed it in more than
/// half of the probes.
pub(crate) const PROBES: u32 = 16;

/// One of so many calls to a split model is compared with the server's answer to the whole batch.
const AUDIT_EVERY: u32 = 100;

/// The rows of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Not known. So many probes have agreed.
    Unknown(u32),
    /// The rows do not depend on each other, as far as probes and audits show.
    Pure,
    /// A probe or an audit has found a difference. Batches are answered whole.
    Impure,
}

/// The evidence about one model.
#[derive(Debug)]
pub(crate) struct Purity(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The identity of the model that the evidence is about.
    digest: [u8; 32],
    verdict: Verdict,
    is_probing: bool,
    calls: u32,
}

/// What to do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Answer it whole, and compare some rows afterwards: the probe of this number.
    Probe(u32),
    /// Answer it whole.
    Whole,
    /// Answer it row by row.
    Rows {
        /// Compare the answer with that to the whole batch.
        audit: bool,
    },
}

impl Purity {
    pub(crate) fn new() -> Self {
        let verdict = Verdict::Unknown(0);
        Purity(Mutex::new(State { digest: [0; 32], verdict, is_probing: false, calls: 0 }))
    }

    /// The mode for a batch of `rows` rows to the model with this digest. A probe that is returned
    /// must be ended with [`probed`](Self::probed).
    pub(crate) fn mode(&self, digest: [u8; 32], rows: usize) -> Mode {
        let mut state = self.lock();
        if state.digest != digest {
            *state = State { digest, verdict: Verdict::Unknown(0), is_probing: false, calls: 0 };
        }
        match state.verdict {
            Verdict::Unknown(agreed) if rows > 1 && !state.is_probing => {
                state.is_probing = true;
                Mode::Probe(agreed)
            }
            Verdict::Unknown(_) | Verdict::Impure => Mode::Whole,
            Verdict::Pure => {
                state.calls = state.calls.wrapping_add(1);
                Mode::Rows { audit: rows > 1 && state.calls.is_multiple_of(AUDIT_EVERY) }
            }
        }
    }

    /// Ends a probe or an audit of the model with this digest: `None` when there was no comparison.
    /// Returns a new verdict.
    pub(crate) fn probed(&self, digest: [u8; 32], agreed: Option<bool>) -> Option<Verdict> {
        let mut state = self.lock();
        if state.digest != digest {
            return None;
        }
        state.is_probing = false;
        let before = state.verdict;
        state.verdict = match (before, agreed) {
            (_, Some(false)) => Verdict::Impure,
            (Verdict::Unknown(so_far), Some(true)) if so_far + 1 >= PROBES => Verdict::Pure,
            (Verdict::Unknown(so_far), Some(true)) => Verdict::Unknown(so_far + 1),
            (verdict, _) => verdict,
        };
        let is_new = state.verdict != before && !matches!(state.verdict, Verdict::Unknown(_));
        is_new.then_some(state.verdict)
    }

    /// Forgets the evidence: the model was loaded again.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        (state.verdict, state.is_probing) = (Verdict::Unknown(0), false);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before the next one, so a poisoned value is still whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rows that probe `number` asks about again: a row alone, or all rows in another order.
pub(crate) fn probe_rows(number: u32, rows: usize) -> Vec<usize> {
    let number = number as usize;
    if number.is_multiple_of(2) {
        return vec![(number / 2) % rows];
    }
    let shift = 1 + (number / 2) % (rows - 1).max(1);
    (0..rows).map(|row| (row + shift) % rows).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: [u8; 32] = [1; 32];

    #[test]
    fn rows_are_split_only_after_all_probes_agree() {
        let purity = Purity::new();
        assert_eq!(purity.mode(MODEL, 1), Mode::Whole, "a single row proves nothing");
        for number in 0..PROBES {
            assert_eq!(purity.mode(MODEL, 4), Mode::Probe(number));
            assert_eq!(purity.mode(MODEL, 4), Mode::Whole, "one probe at a time");
            let verdict = purity.probed(MODEL, Some(true));
            assert_eq!(verdict, (number + 1 == PROBES).then_some(Verdict::Pure));
        }
        assert!(matches!(purity.mode(MODEL, 4), Mode::Rows { .. }));
        assert!(matches!(purity.mode(MODEL, 1), Mode::Rows { audit: false }));
        let audits = (0..1000).filter(|_| purity.mode(MODEL, 2) == Mode::Rows { audit: true });
        assert_eq!(audits.count(), 10);
    }

    #[test]
    fn one_difference_ends_the_splitting() {
        let purity = Purity::new();
        for _ in 0..PROBES {
            purity.mode(MODEL, 4);
            purity.probed(MODEL, Some(true));
        }
        assert_eq!(purity.probed(MODEL, None), None);
        assert_eq!(purity.probed(MODEL, Some(false)), Some(Verdict::Impure));
        assert_eq!(purity.mode(MODEL, 4), Mode::Whole);
        assert_eq!(purity.probed(MODEL, Some(true)), None, "no later agreement changes that");
        assert_eq!(purity.mode(MODEL, 4), Mode::Whole);
        // Another model begins without evidence.
        assert_eq!(purity.mode([2; 32], 4), Mode::Probe(0));
        assert_eq!(purity.probed(MODEL, Some(true)), None, "a late probe of the former model");
        purity.reset();
        assert_eq!(purity.mode([2; 32], 4), Mode::Probe(0));
    }

    #[test]
    fn probes_ask_single_rows_and_other_orders() {
        assert_eq!(probe_rows(0, 3), [0]);
        assert_eq!(probe_rows(1, 3), [1, 2, 0]);
        assert_eq!(probe_rows(2, 3), [1]);
        assert_eq!(probe_rows(3, 3), [2, 0, 1]);
        assert_eq!(probe_rows(5, 2), [1, 0]);
        for number in 0..PROBES {
            let rows = probe_rows(number, 4);
            assert!(rows.len() == 1 || (rows.len() == 4 && rows != [0, 1, 2, 3]), "{rows:?}");
        }
    }
}
