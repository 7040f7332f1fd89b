//! Cost and benefit of remote lookups, and the automatic bypass.
//!
//! Both are waiting time of a client. A lookup costs its duration; a hit saves the recent duration
//! of a call to the classifier. Pure: time is an argument.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::latency::CallCost;

/// The least lookups and time before a decision, so that neither a burst nor a few slow lookups
/// decide.
const JUDGED_LOOKUPS: u64 = 200;
const JUDGED_TIME: Duration = Duration::from_secs(1);

/// The first pause between probes. It doubles after each probe that finds no benefit.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// The longest pause between probes, and so the longest time until a store is used again.
const PROBE_EVERY_MOST: Duration = Duration::from_secs(30);

/// A probe ends after this number of lookups or this time.
const PROBE_LOOKUPS: u64 = 100;
const PROBE_TIME: Duration = Duration::from_millis(200);

/// The measured cost of a call to the classifier: the caller's waiting time and the classifier's
/// working time.
#[derive(Debug, Default)]
pub(crate) struct CallTime {
    /// A moving average over about sixteen calls.
    waiting_ns: AtomicU64,
    /// The time with calls in flight, over the number of calls.
    work_ns: AtomicU64,
    busy: Mutex<Busy>,
}

/// The time with at least one call in flight, and the calls that ended in it.
#[derive(Debug, Default)]
struct Busy {
    in_flight: u64,
    since: Option<Instant>,
    busy_ns: u64,
    ended: u64,
}

impl Busy {
    /// Older calls count half as much after this many.
    const HALVED_AT: u64 = 4096;

    fn advance(&mut self, now: Instant) {
        if let Some(since) = self.since.filter(|_| self.in_flight > 0) {
            self.busy_ns += now.saturating_duration_since(since).as_nanos() as u64;
        }
        // Times of different threads arrive in any order; this clock only goes forward.
        self.since = self.since.max(Some(now));
    }
}

impl CallTime {
    /// Counts calls that start now.
    pub(crate) fn start(&self, calls: u64, now: Instant) {
        let mut busy = self.lock();
        busy.advance(now);
        busy.in_flight += calls;
    }

    /// Counts a call that ended now; `took` is `None` for a failed one.
    pub(crate) fn end(&self, now: Instant, took: Option<Duration>) {
        let mut busy = self.lock();
        busy.advance(now);
        busy.in_flight = busy.in_flight.saturating_sub(1);
        let Some(took) = took else { return };
        busy.ended += 1;
        self.work_ns.store(busy.busy_ns / busy.ended, Relaxed);
        if busy.ended >= Busy::HALVED_AT {
            busy.ended /= 2;
            busy.busy_ns /= 2;
        }
        drop(busy);
        let took = took.as_nanos() as u64;
        // Two threads at once may lose a call, which hardly changes an average.
        let before = self.waiting_ns.load(Relaxed);
        let after = if before == 0 { took } else { before - before / 16 + took / 16 };
        self.waiting_ns.store(after, Relaxed);
    }

    /// The recent cost of a call.
    pub(crate) fn cost(&self) -> CallCost {
        CallCost { waiting_ns: self.waiting_ns.load(Relaxed), work_ns: self.work_ns.load(Relaxed) }
    }

    fn lock(&self) -> MutexGuard<'_, Busy> {
        // Plain numbers stay whole when a thread panics.
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides whether to use the store, from the cost and the benefit of its lookups.
#[derive(Debug)]
pub(crate) struct Bypass {
    /// Whether lookups are bypassed, except for probes.
    active: AtomicBool,
    bypassed: AtomicU64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    window: Window,
    probe_every: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Looking,
    Bypassing { until: Instant },
    Probing,
}

/// The cost and the benefit of the lookups since a time.
#[derive(Clone, Copy, Debug)]
struct Window {
    since: Instant,
    lookups: u64,
    cost_ns: u64,
    saved_ns: u64,
}

impl Window {
    fn new(since: Instant) -> Self {
        Window { since, lookups: 0, cost_ns: 0, saved_ns: 0 }
    }
}

/// A change of the decision, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Lookups cost more than they save, so they stop for now.
    Bypass,
    /// Lookups pay again.
    Look,
}

impl Bypass {
    pub(crate) fn new(now: Instant) -> Self {
        let state =
            State { phase: Phase::Looking, window: Window::new(now), probe_every: PROBE_EVERY };
        let active = AtomicBool::new(false);
        Bypass { active, bypassed: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Whether to look up these keys; `lookups` is their number.
    pub(crate) fn looks(&self, now: Instant, lookups: u64) -> bool {
        if !self.active.load(Relaxed) {
            return true;
        }
        let mut state = self.lock();
        match state.phase {
            Phase::Looking | Phase::Probing => return true,
            Phase::Bypassing { until } if now >= until => {
                state.phase = Phase::Probing;
                state.window = Window::new(now);
                return true;
            }
            Phase::Bypassing { .. } => {}
        }
        drop(state);
        self.bypassed.fetch_add(lookups, Relaxed);
        false
    }

    /// Records lookups that cost `cost_ns` of waiting time and whose hits saved `saved_ns`.
    pub(crate) fn record(
        &self,
        now: Instant,
        lookups: u64,
        cost_ns: u64,
        saved_ns: u64,
    ) -> Option<Decision> {
        let mut state = self.lock();
        let window = &mut state.window;
        window.lookups += lookups;
        window.cost_ns = window.cost_ns.saturating_add(cost_ns);
        window.saved_ns = window.saved_ns.saturating_add(saved_ns);
        let (lookups, pays) = (window.lookups, window.saved_ns >= window.cost_ns);
        let time = now.saturating_duration_since(window.since);
        match state.phase {
            Phase::Looking if lookups >= JUDGED_LOOKUPS && time >= JUDGED_TIME => {
                state.window = Window::new(now);
                if pays {
                    return None;
                }
                state.probe_every = PROBE_EVERY;
                state.phase = Phase::Bypassing { until: now + PROBE_EVERY };
                self.active.store(true, Relaxed);
                Some(Decision::Bypass)
            }
            Phase::Probing if lookups >= PROBE_LOOKUPS || time >= PROBE_TIME => {
                state.window = Window::new(now);
                if pays {
                    state.phase = Phase::Looking;
                    self.active.store(false, Relaxed);
                    return Some(Decision::Look);
                }
                state.probe_every = (state.probe_every * 2).min(PROBE_EVERY_MOST);
                state.phase = Phase::Bypassing { until: now + state.probe_every };
                None
            }
            _ => None,
        }
    }

    /// Whether lookups are bypassed now.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Relaxed)
    }

    /// The number of bypassed lookups.
    pub(crate) fn bypassed(&self) -> u64 {
        self.bypassed.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain numbers stay whole when a thread panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Makes 100 lookups a second, each with this cost and benefit. Returns the number of lookups
    /// that were not bypassed, and the decisions.
    fn live(
        bypass: &Bypass,
        now: &mut Instant,
        seconds: u32,
        cost_ns: u64,
        saved_ns: u64,
    ) -> (u32, Vec<Decision>) {
        let (mut looked, mut decisions) = (0, Vec::new());
        for _ in 0..seconds * 100 {
            *now += Duration::from_millis(10);
            if bypass.looks(*now, 1) {
                looked += 1;
                decisions.extend(bypass.record(*now, 1, cost_ns, saved_ns));
            }
        }
        (looked, decisions)
    }

    #[test]
    fn lookups_that_pay_go_on() {
        let mut now = Instant::now();
        let bypass = Bypass::new(now);
        assert_eq!(live(&bypass, &mut now, 60, MS, MS), (6000, vec![]));
        assert_eq!(bypass.bypassed(), 0);
    }

    #[test]
    fn stops_unprofitable_lookups_then_probes_and_resumes() {
        let mut now = Instant::now();
        let bypass = Bypass::new(now);
        let (looked, decisions) = live(&bypass, &mut now, 120, 2 * MS, MS);
        assert_eq!(decisions, [Decision::Bypass]);
        assert!(bypass.is_active());
        // 200 before the decision; then probes of 20 after 1, 2, 4, 8, 16, 30, 30 … seconds.
        assert!((200..400).contains(&looked), "{looked}");
        assert_eq!(bypass.bypassed(), 12_000 - u64::from(looked));
        let (_, decisions) = live(&bypass, &mut now, 31, MS, 2 * MS);
        assert_eq!(decisions, [Decision::Look]);
        assert!(!bypass.is_active());
        assert_eq!(live(&bypass, &mut now, 10, MS, 2 * MS), (1000, vec![]));
    }

    #[test]
    fn a_burst_that_does_not_pay_decides_nothing() {
        let mut now = Instant::now();
        let bypass = Bypass::new(now);
        for _ in 0..10_000 {
            assert_eq!(bypass.record(now, 1, MS, 0), None);
        }
        now += JUDGED_TIME;
        assert_eq!(bypass.record(now, 1, 0, 10_000 * MS), None);
        assert!(!bypass.is_active());
    }

    #[test]
    fn the_waiting_time_of_a_call_follows_recent_calls() {
        let (time, now) = (CallTime::default(), Instant::now());
        time.end(now, Some(Duration::from_millis(1)));
        assert_eq!(time.cost().waiting_ns, MS);
        for _ in 0..200 {
            time.end(now, Some(Duration::from_millis(3)));
        }
        let waiting = time.cost().waiting_ns;
        assert!((29 * MS / 10..=3 * MS).contains(&waiting), "{waiting}");
    }

    #[test]
    fn calls_in_flight_together_share_the_classifiers_time() {
        let (time, start) = (CallTime::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        time.start(4, at(0));
        for _ in 0..4 {
            time.end(at(20), Some(Duration::from_millis(20)));
        }
        // Idle time counts for nothing.
        time.start(1, at(1000));
        time.end(at(1020), Some(Duration::from_millis(20)));
        assert_eq!(time.cost(), CallCost { waiting_ns: 20 * MS, work_ns: 8 * MS });
    }
}
