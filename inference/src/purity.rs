//! Whether the rows of a model depend on each other: evidence from live calls, and the verdict.
//!
//! A batch can be split only if each row has the same answer in every batch and at every position.
//! Not every model is like that. The proxy asks the server again about some rows of a call that it
//! has just answered: a row alone, or the rows in another order. The model is split only after
//! [`PROBES`] probes have found no difference, or none above the operator's limit. From then on
//! some calls are still compared.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::compare::Comparison;

/// Probes before the verdict. Models whose rows differ showed it in more than half of the probes.
pub(crate) const PROBES: u32 = 16;

/// One of so many calls to a split model is compared with the server's answer to the whole batch.
const AUDIT_EVERY: u32 = 100;

/// The largest relative difference that counts as rounding. Beyond it, rows depend on each other.
const ROUNDING: f64 = 1e-3;

/// How the batches of a model are answered.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub enum RowsMode {
    /// Whole: a batch is one input.
    #[default]
    Whole,
    /// Row by row, if probes find all rows equal to the bit.
    Auto,
    /// Row by row, if probes find no difference above this limit between two numbers.
    Within(f64),
}

/// What probes and audits say about the rows of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// Too few probes so far.
    Unknown,
    /// All rows were equal to the bit.
    Pure,
    /// Rows differ by no more than the operator's limit.
    Within,
    /// Rows differ by rounding, above the operator's limit. A larger limit would split the model.
    Offered,
    /// Rows depend on their batch.
    Impure,
}

impl Verdict {
    /// One word for reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Verdict::Unknown => "unknown",
            Verdict::Pure => "rows",
            Verdict::Within => "within",
            Verdict::Offered => "within offered",
            Verdict::Impure => "whole",
        }
    }
}

/// What the comparisons of a model have found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Evidence {
    /// Probes before the verdict.
    pub probes: u32,
    /// Audits after it.
    pub audits: u32,
    /// Rows that were compared.
    pub rows: u64,
    /// Rows with another answer.
    pub disagreements: u64,
    /// The greatest difference between two numbers; infinite if other parts differ.
    pub greatest: f64,
}

/// The evidence about one model.
#[derive(Debug)]
pub(crate) struct Purity {
    mode: RowsMode,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// The identity of the model that the evidence is about.
    digest: [u8; 32],
    verdict: Verdict,
    evidence: Evidence,
    is_probing: bool,
    calls: u32,
}

impl State {
    fn new(digest: [u8; 32]) -> Self {
        let (verdict, evidence) = (Verdict::Unknown, Evidence::default());
        State { digest, verdict, evidence, is_probing: false, calls: 0 }
    }

    /// The verdict after a comparison.
    fn judge(&self, mode: RowsMode, comparison: &Comparison) -> Verdict {
        let Evidence { probes, disagreements, greatest, .. } = self.evidence;
        let fits = match mode {
            RowsMode::Within(limit) => greatest <= limit,
            _ => disagreements == 0,
        };
        match self.verdict {
            Verdict::Offered | Verdict::Impure => self.verdict,
            _ if comparison.relative > ROUNDING => Verdict::Impure,
            // Further probes show how far the rows differ.
            Verdict::Unknown if probes < PROBES => Verdict::Unknown,
            _ if !fits => Verdict::Offered,
            _ if disagreements > 0 => Verdict::Within,
            _ => Verdict::Pure,
        }
    }
}

/// What to do with a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
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
    pub(crate) fn new(mode: RowsMode) -> Self {
        Purity { mode, state: Mutex::new(State::new([0; 32])) }
    }

    /// How the operator wants batches to be answered.
    pub(crate) fn mode(&self) -> RowsMode {
        self.mode
    }

    /// The verdict and its evidence.
    pub(crate) fn found(&self) -> (Verdict, Evidence) {
        let state = self.lock();
        (state.verdict, state.evidence)
    }

    /// The difference between two answers to one row that is no evidence of another model.
    pub(crate) fn tolerance(&self) -> f64 {
        let state = self.lock();
        match self.mode {
            RowsMode::Within(limit) if state.verdict == Verdict::Within => limit,
            // Its canaries repeat the whole call: differences between batches are no measure.
            _ if state.verdict == Verdict::Impure => 0.0,
            _ if state.evidence.greatest.is_finite() => state.evidence.greatest,
            _ => 0.0,
        }
    }

    /// What to do with a batch of `rows` rows to the model with this digest. A probe that is
    /// returned must be ended with [`probed`](Self::probed).
    pub(crate) fn due(&self, digest: [u8; 32], rows: usize) -> Due {
        if self.mode == RowsMode::Whole {
            return Due::Whole;
        }
        let mut state = self.lock();
        if state.digest != digest {
            *state = State::new(digest);
        }
        match state.verdict {
            Verdict::Unknown if rows > 1 && !state.is_probing => {
                state.is_probing = true;
                Due::Probe(state.evidence.probes)
            }
            Verdict::Unknown | Verdict::Offered | Verdict::Impure => Due::Whole,
            Verdict::Pure | Verdict::Within => {
                state.calls = state.calls.wrapping_add(1);
                Due::Rows { audit: rows > 1 && state.calls.is_multiple_of(AUDIT_EVERY) }
            }
        }
    }

    /// Ends a probe or an audit of the model with this digest: `None` when there was no comparison.
    /// Returns a new verdict.
    pub(crate) fn probed(
        &self,
        digest: [u8; 32],
        comparison: Option<Comparison>,
    ) -> Option<Verdict> {
        let mut state = self.lock();
        if state.digest != digest {
            return None;
        }
        state.is_probing = false;
        let comparison = comparison?;
        let (before, evidence) = (state.verdict, &mut state.evidence);
        match before {
            Verdict::Unknown => evidence.probes += 1,
            _ => evidence.audits += 1,
        }
        evidence.rows += comparison.rows;
        evidence.disagreements += comparison.disagreements;
        evidence.greatest = evidence.greatest.max(comparison.greatest);
        state.verdict = state.judge(self.mode, &comparison);
        (state.verdict != before).then_some(state.verdict)
    }

    /// Deletes the evidence: the model was loaded again.
    pub(crate) fn reset(&self) {
        let mut state = self.lock();
        *state = State::new(state.digest);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is complete before the next one, so a poisoned value is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The rows that probe `number` asks about again: a row alone, or all rows in another order.
pub(crate) fn probe_rows(number: u32, rows: usize) -> Vec<u32> {
    let (number, rows) = (number as usize, rows.max(1));
    let row = |row: usize| (row % rows) as u32;
    if number.is_multiple_of(2) {
        return vec![row(number / 2)];
    }
    let shift = 1 + (number / 2) % (rows - 1).max(1);
    (0..rows).map(|at| row(at + shift)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: [u8; 32] = [1; 32];

    fn equal() -> Option<Comparison> {
        Some(Comparison { rows: 2, ..Comparison::default() })
    }

    fn differs(greatest: f64, relative: f64) -> Option<Comparison> {
        Some(Comparison { rows: 2, disagreements: 1, greatest, relative })
    }

    fn probe(purity: &Purity, comparison: Option<Comparison>) -> Option<Verdict> {
        assert!(matches!(purity.due(MODEL, 4), Due::Probe(_)));
        purity.probed(MODEL, comparison)
    }

    #[test]
    fn rows_are_split_only_after_all_probes_agree() {
        let purity = Purity::new(RowsMode::Auto);
        assert_eq!(purity.due(MODEL, 1), Due::Whole, "a single row proves nothing");
        for number in 0..PROBES {
            assert_eq!(purity.due(MODEL, 4), Due::Probe(number));
            assert_eq!(purity.due(MODEL, 4), Due::Whole, "one probe at a time");
            let verdict = purity.probed(MODEL, equal());
            assert_eq!(verdict, (number + 1 == PROBES).then_some(Verdict::Pure));
        }
        assert!(matches!(purity.due(MODEL, 4), Due::Rows { .. }));
        assert!(matches!(purity.due(MODEL, 1), Due::Rows { audit: false }));
        let audits = (0..1000).filter(|_| purity.due(MODEL, 2) == Due::Rows { audit: true });
        assert_eq!(audits.count(), 10);
        assert_eq!(Purity::new(RowsMode::Whole).due(MODEL, 4), Due::Whole, "nothing is probed");
    }

    #[test]
    fn one_difference_ends_the_splitting() {
        let purity = Purity::new(RowsMode::Auto);
        for _ in 0..PROBES {
            probe(&purity, equal());
        }
        assert_eq!(purity.probed(MODEL, None), None);
        assert_eq!(purity.probed(MODEL, differs(9.0, 1.0)), Some(Verdict::Impure));
        assert_eq!(purity.due(MODEL, 4), Due::Whole);
        assert_eq!(purity.probed(MODEL, equal()), None, "no later agreement changes that");
        assert_eq!(purity.due(MODEL, 4), Due::Whole);
        let (verdict, evidence) = purity.found();
        assert_eq!((verdict, evidence.probes, evidence.audits), (Verdict::Impure, PROBES, 2));
        assert_eq!((evidence.rows, evidence.disagreements, evidence.greatest), (36, 1, 9.0));
        // Another model begins without evidence.
        assert_eq!(purity.due([2; 32], 4), Due::Probe(0));
        assert_eq!(purity.probed(MODEL, equal()), None, "a late probe of the former model");
        purity.reset();
        assert_eq!(purity.due([2; 32], 4), Due::Probe(0));
    }

    #[test]
    fn rounding_is_measured_and_a_limit_is_offered() {
        let purity = Purity::new(RowsMode::Auto);
        for number in 1..=PROBES {
            let verdict = probe(&purity, differs(f64::from(number) * 1e-6, 1e-5));
            assert_eq!(verdict, (number == PROBES).then_some(Verdict::Offered));
        }
        assert_eq!(purity.due(MODEL, 4), Due::Whole);
        assert_eq!(purity.found().1.greatest, 1.6e-5);
        assert_eq!(purity.tolerance(), 1.6e-5);
        // One difference beyond rounding is enough.
        let purity = Purity::new(RowsMode::Within(1e9));
        assert_eq!(probe(&purity, differs(0.5, 0.5)), Some(Verdict::Impure));
    }

    #[test]
    fn rows_within_the_limit_are_split_and_audited() {
        let purity = Purity::new(RowsMode::Within(1e-5));
        (1..PROBES).for_each(|_| assert_eq!(probe(&purity, differs(1e-6, 1e-6)), None));
        assert_eq!(probe(&purity, equal()), Some(Verdict::Within));
        assert!(matches!(purity.due(MODEL, 4), Due::Rows { .. }));
        assert_eq!(purity.tolerance(), 1e-5);
        assert_eq!(purity.probed(MODEL, differs(9e-6, 1e-5)), None, "an audit within the limit");
        assert_eq!(purity.probed(MODEL, differs(2e-5, 1e-5)), Some(Verdict::Offered));
        assert_eq!(purity.due(MODEL, 4), Due::Whole);
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
