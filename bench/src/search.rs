//! The search for the highest rate that holds a goal: doubling, halving, then confirmation.

use std::time::{Duration, Instant};

/// Lower rates are not tried.
const MIN_RATE: f64 = 0.1;

/// The settings of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Search {
    /// The first rate that is tried, a second.
    pub start: f64,
    /// The search ends when the rate that holds and the one that does not are this close: 0.05 for
    /// 5 %.
    pub precision: f64,
    /// How often the rate that is found must hold again, all in a row.
    pub confirmations: u32,
    /// No try is begun after so long.
    pub budget: Duration,
}

/// The result of a search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SearchResult {
    /// The highest rate that held; `None` when none did.
    pub rate: Option<f64>,
    /// Whether it held as often as was asked for.
    pub confirmed: bool,
    /// The lowest rate that did not hold; `None` when all did.
    pub failed: Option<f64>,
    /// How often a rate was tried.
    pub tries: u32,
}

struct Tries<'a, E> {
    holds: &'a mut dyn FnMut(f64) -> Result<bool, E>,
    until: Instant,
    found: SearchResult,
}

impl<E> Tries<'_, E> {
    fn time_is_left(&self) -> bool {
        Instant::now() < self.until
    }

    /// Tries a rate, and one that does not hold a second time: one disturbance proves nothing.
    fn holds(&mut self, rate: f64) -> Result<bool, E> {
        let holds = self.once(rate)? || (self.time_is_left() && self.once(rate)?);
        let found = &mut self.found;
        if holds {
            found.rate = Some(found.rate.map_or(rate, |best| best.max(rate)));
        } else {
            found.failed = Some(found.failed.map_or(rate, |worst| worst.min(rate)));
        }
        Ok(holds)
    }

    fn once(&mut self, rate: f64) -> Result<bool, E> {
        self.found.tries += 1;
        (self.holds)(rate)
    }
}

impl Search {
    /// Finds the highest rate for which `holds` returns true. A server that holds a rate is
    /// expected to hold every lower one.
    ///
    /// # Errors
    /// The first error of `holds`.
    pub fn run<E>(&self, holds: &mut dyn FnMut(f64) -> Result<bool, E>) -> Result<SearchResult, E> {
        let found = SearchResult { rate: None, confirmed: false, failed: None, tries: 0 };
        let mut tries = Tries { holds, until: Instant::now() + self.budget, found };
        self.double(&mut tries)?;
        loop {
            self.halve(&mut tries)?;
            let Some(rate) = tries.found.rate else { break };
            let mut confirmed = 0;
            while confirmed < self.confirmations && tries.time_is_left() && tries.once(rate)? {
                confirmed += 1;
            }
            tries.found.confirmed = confirmed == self.confirmations;
            if tries.found.confirmed || !tries.time_is_left() {
                break;
            }
            // It held by luck: the search continues below it.
            tries.found.failed = Some(rate);
            tries.found.rate = None;
            let mut lower = rate * (1.0 - self.precision);
            while tries.time_is_left() && lower >= MIN_RATE && !tries.holds(lower)? {
                lower *= 1.0 - 2.0 * self.precision;
            }
        }
        Ok(tries.found)
    }

    /// From the start upwards until a rate does not hold; downwards if the first one does not.
    fn double<E>(&self, tries: &mut Tries<'_, E>) -> Result<(), E> {
        let mut rate = self.start;
        let upwards = tries.holds(rate)?;
        while tries.time_is_left() {
            rate *= if upwards { 2.0 } else { 0.5 };
            if rate < MIN_RATE || tries.holds(rate)? != upwards {
                break;
            }
        }
        Ok(())
    }

    /// Halves the interval between the two, by their ratio, until they are close.
    fn halve<E>(&self, tries: &mut Tries<'_, E>) -> Result<(), E> {
        while let (Some(low), Some(high)) = (tries.found.rate, tries.found.failed) {
            if high <= low * (1.0 + self.precision) || !tries.time_is_left() {
                break;
            }
            tries.holds((low * high).sqrt())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEARCH: Search = Search {
        start: 1000.0,
        precision: 0.05,
        confirmations: 3,
        budget: Duration::from_secs(60),
    };

    fn search(search: Search, mut holds: impl FnMut(f64) -> bool) -> SearchResult {
        search.run(&mut |rate| Ok::<_, std::convert::Infallible>(holds(rate))).unwrap()
    }

    #[test]
    fn the_limit_is_found_wherever_it_is() {
        for limit in [3.0, 999.0, 1000.0, 1001.0, 54_321.0, 7.7e8] {
            let found = search(SEARCH, |rate| rate <= limit);
            let rate = found.rate.unwrap();
            assert!(rate <= limit && rate * 1.06 > limit, "{rate} of {limit}");
            assert!(found.confirmed && found.tries < 60, "{found:?}");
            assert!(found.failed.is_some_and(|failed| failed > limit));
        }
    }

    #[test]
    fn one_disturbance_in_ten_tries_does_not_hide_the_limit() {
        let mut tries = 0;
        let found = search(SEARCH, |rate| {
            tries += 1;
            rate <= 20_000.0 && tries % 10 != 0
        });
        assert!(found.rate.is_some_and(|rate| rate > 15_000.0), "{found:?}");
    }

    #[test]
    fn what_held_by_luck_is_not_confirmed() {
        // Once, and once only, a rate far too high holds.
        let mut lucky = true;
        let found = search(SEARCH, |rate| {
            let luck = rate > 10_000.0 && std::mem::take(&mut lucky);
            rate <= 10_000.0 || luck
        });
        let rate = found.rate.unwrap();
        assert!(found.confirmed && (9_000.0..=10_000.0).contains(&rate), "{found:?}");
    }

    #[test]
    fn ends_when_nothing_holds_and_when_time_is_up() {
        let nothing = search(SEARCH, |_| false);
        assert_eq!((nothing.rate, nothing.confirmed), (None, false));
        let short = Search { budget: Duration::ZERO, ..SEARCH };
        let found = search(short, |_| true);
        assert_eq!((found.rate, found.confirmed, found.tries), (Some(1000.0), false, 1));
        let error = SEARCH.run(&mut |_| Err::<bool, _>("gone"));
        assert_eq!(error, Err("gone"));
    }
}
