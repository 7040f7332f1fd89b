//! Whether looking pays: the time that lookups take against the time that hits save, and what to do
//! about a store that costs more than it gives.
//!
//! Both are waiting time, as a client sees it. A lookup costs what it takes; a hit saves what a
//! call to the classifier has lately taken. Pure: time comes in as an argument.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Lookups, and time, that a judgement takes at least: neither a burst nor a few slow ones decide.
const JUDGED_LOOKUPS: u64 = 200;
const JUDGED_TIME: Duration = Duration::from_secs(1);

/// Between the end of one probe and the next one, at first; twice as long after each that finds
/// nothing better.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// And at most: so long it may take to notice that a store has become worth while.
const PROBE_EVERY_MOST: Duration = Duration::from_secs(30);

/// A probe ends after so many lookups, or so long.
const PROBE_LOOKUPS: u64 = 100;
const PROBE_TIME: Duration = Duration::from_millis(200);

/// How long a call to the classifier takes, lately: a moving average over some sixteen calls.
#[derive(Debug, Default)]
pub(crate) struct CallTime(AtomicU64);

impl CallTime {
    pub(crate) fn record(&self, took: Duration) {
        let took = took.as_nanos() as u64;
        // Two threads at once may lose one of their calls: it is an average.
        let before = self.0.load(Relaxed);
        let after = if before == 0 { took } else { before - before / 16 + took / 16 };
        self.0.store(after, Relaxed);
    }

    pub(crate) fn nanos(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Decides whether to look, from what looking has cost and saved.
#[derive(Debug)]
pub(crate) struct Bypass {
    /// Whether nobody looks, but for probes.
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

/// What a stretch of time has brought.
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

/// What has just been decided, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Lookups cost more than they save: no more of them for now.
    Bypass,
    /// They are worth their time again.
    Look,
}

impl Bypass {
    pub(crate) fn new(now: Instant) -> Self {
        let state =
            State { phase: Phase::Looking, window: Window::new(now), probe_every: PROBE_EVERY };
        let active = AtomicBool::new(false);
        Bypass { active, bypassed: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Whether to look `lookups` keys up.
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

    /// Takes note of lookups that took `cost_ns` of waiting, and of what their hits saved.
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

    /// Whether lookups are left out now.
    pub(crate) fn is_active(&self) -> bool {
        self.active.load(Relaxed)
    }

    /// Lookups left out so far.
    pub(crate) fn bypassed(&self) -> u64 {
        self.bypassed.load(Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain numbers: whole whatever happened to their last holder.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// A hundred lookups a second for some seconds, each costing and, on average, saving so much.
    /// Gives how many were done and what was decided.
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
    fn lookups_that_do_not_pay_stop_are_probed_now_and_then_and_come_back() {
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
    fn the_time_of_a_call_follows_what_calls_take() {
        let time = CallTime::default();
        time.record(Duration::from_millis(1));
        assert_eq!(time.nanos(), MS);
        for _ in 0..200 {
            time.record(Duration::from_millis(3));
        }
        assert!((29 * MS / 10..=3 * MS).contains(&time.nanos()), "{}", time.nanos());
    }
}
