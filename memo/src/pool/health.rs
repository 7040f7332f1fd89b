//! The health of one replica, judged by its answers: ejection, probation and warm-up. Pure: time
//! and randomness are arguments.

use std::time::{Duration, Instant};

/// Consecutive failures after which a replica is ejected. Envoy has the same default.
const MAX_FAILURES: u32 = 5;

/// The longest first ejection. Each further ejection may last twice as long.
const EJECTION_MIN: Duration = Duration::from_millis(500);

/// The longest ejection, and so the longest wait of a repaired replica.
const EJECTION_MAX: Duration = Duration::from_secs(30);

/// The time from the connection, or from the first answer after an ejection, to the full share of
/// requests. A process that has just started is slow, and its caches are empty.
const WARM_UP: Duration = Duration::from_secs(10);

/// The share of requests at the start of a warm-up.
const FIRST_SHARE: f64 = 0.1;

/// The end of a request, as evidence about its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A correct answer.
    Answered,
    /// A refusal that is not the replica's fault: overload, an invalid input.
    Refused,
    /// An error of the replica, or an invalid reply.
    Failed,
    /// No answer came in time.
    TimedOut,
    /// No answer came in the short time that the waiters had left. This is not a failure, because
    /// short deadlines could then eject every replica. It is not a sign of health either. The pool
    /// sets this; an endpoint reports `TimedOut`.
    CutShort,
    /// The request was not sent, or its connection was lost. The client deals with connections.
    Lost,
}

/// Whether a replica gets requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Healthy,
    /// The replica gets no request until then.
    Ejected {
        until: Instant,
    },
    /// The replica gets one request at a time, until it answers one.
    Probation,
}

/// The state of one replica.
#[derive(Debug)]
pub(super) struct Health {
    state: State,
    /// Rows that the replica has not answered yet.
    pub(super) in_flight: usize,
    /// The start of the present silence, if the replica owes an answer.
    silent_since: Option<Instant>,
    /// The sum of earlier silences since the last answer.
    silent_for: Duration,
    failures: u32,
    /// Ejections since the last complete warm-up.
    ejections: u32,
    warming_since: Option<Instant>,
}

impl Health {
    /// The health of a new replica.
    pub(super) fn new() -> Self {
        Health {
            state: State::Healthy,
            in_flight: 0,
            silent_since: None,
            silent_for: Duration::ZERO,
            failures: 0,
            ejections: 0,
            warming_since: None,
        }
    }

    /// Records a new connection. The fault may be over, so the replica gets few requests at first.
    pub(super) fn connected(&mut self, now: Instant) {
        self.failures = 0;
        self.silent_since = None;
        self.silent_for = Duration::ZERO;
        self.warming_since = Some(now);
        if self.state != State::Healthy {
            self.state = State::Probation;
        }
    }

    /// The share of requests for this replica, from 0 (none) to 1 (the full share).
    pub(super) fn share(&self, now: Instant) -> f64 {
        match self.state {
            State::Ejected { until } if now < until => 0.0,
            State::Ejected { .. } | State::Probation if self.in_flight > 0 => 0.0,
            State::Ejected { .. } | State::Probation => 1.0,
            State::Healthy => self.warmth(now),
        }
    }

    fn warmth(&self, now: Instant) -> f64 {
        let Some(since) = self.warming_since else { return 1.0 };
        let warm = now.saturating_duration_since(since).as_secs_f64() / WARM_UP.as_secs_f64();
        warm.clamp(FIRST_SHARE, 1.0)
    }

    /// Whether the replica is neither ejected nor on probation.
    pub(super) fn is_healthy(&self) -> bool {
        self.state == State::Healthy
    }

    /// Whether the replica has owed answers for `patience` in total without sending one.
    pub(super) fn is_silent(&self, now: Instant, patience: Duration) -> bool {
        !matches!(self.state, State::Ejected { .. }) && self.silence(now) >= patience
    }

    /// The time since the last answer in which the replica owed one.
    fn silence(&self, now: Instant) -> Duration {
        let now = self.silent_since.map(|since| now.saturating_duration_since(since));
        self.silent_for.saturating_add(now.unwrap_or_default())
    }

    /// Records a request with this number of rows to the replica.
    pub(super) fn sent(&mut self, now: Instant, rows: usize) {
        self.in_flight += rows;
        self.silent_since.get_or_insert(now);
        if matches!(self.state, State::Ejected { until } if now >= until) {
            self.state = State::Probation;
        }
    }

    /// Records the end of a request with this number of rows. Returns whether the replica should be
    /// ejected.
    pub(super) fn ended(&mut self, now: Instant, outcome: Outcome, rows: usize) -> bool {
        self.in_flight = self.in_flight.saturating_sub(rows);
        if !matches!(outcome, Outcome::TimedOut | Outcome::CutShort) {
            self.silent_since = Some(now);
            self.silent_for = Duration::ZERO;
        }
        if self.in_flight == 0 {
            self.silent_for = self.silence(now);
            self.silent_since = None;
        }
        match outcome {
            Outcome::Answered => {
                self.failures = 0;
                self.answered(now);
                false
            }
            Outcome::Refused | Outcome::Lost | Outcome::CutShort => false,
            Outcome::Failed | Outcome::TimedOut => {
                self.failures = self.failures.saturating_add(1);
                match self.state {
                    State::Healthy => self.failures >= MAX_FAILURES,
                    State::Probation => true,
                    State::Ejected { .. } => false,
                }
            }
        }
    }

    fn answered(&mut self, now: Instant) {
        match self.state {
            State::Healthy => {
                let warm = |since: Instant| now.saturating_duration_since(since) >= WARM_UP;
                if self.warming_since.is_some_and(warm) {
                    self.warming_since = None;
                    self.ejections = 0;
                }
            }
            // A late answer to an earlier request does not prove that the replica is healthy again.
            State::Ejected { until } if now < until => {}
            State::Ejected { .. } | State::Probation => {
                self.state = State::Healthy;
                self.warming_since = Some(now);
            }
        }
    }

    /// Ejects the replica for a time that grows with each ejection. `chance`, from 0 to 1, sets how
    /// much of the second half is waited for, so that many memos do not come back together.
    pub(super) fn eject(&mut self, now: Instant, chance: f64) -> Duration {
        let most = EJECTION_MIN.saturating_mul(1 << self.ejections.min(16)).min(EJECTION_MAX);
        let time = most / 2 + (most / 2).mul_f64(chance.clamp(0.0, 1.0));
        self.ejections += 1;
        self.failures = 0;
        self.silent_since = self.silent_since.map(|_| now);
        self.silent_for = Duration::ZERO;
        self.state = State::Ejected { until: now + time };
        time
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(health: &mut Health, now: Instant) -> bool {
        health.sent(now, 1);
        health.ended(now, Outcome::Failed, 1)
    }

    fn answer(health: &mut Health, now: Instant) {
        health.sent(now, 1);
        assert!(!health.ended(now, Outcome::Answered, 1));
    }

    #[test]
    fn failures_in_a_row_eject_and_others_do_not() {
        let (mut health, now) = (Health::new(), Instant::now());
        for _ in 0..100 {
            for _ in 1..MAX_FAILURES {
                assert!(!fail(&mut health, now));
            }
            answer(&mut health, now);
            for outcome in [Outcome::Refused, Outcome::Lost] {
                health.sent(now, 1);
                assert!(!health.ended(now, outcome, 1));
            }
        }
        for i in 1..=MAX_FAILURES {
            assert_eq!(fail(&mut health, now), i == MAX_FAILURES);
        }
    }

    #[test]
    fn ejections_grow_to_a_limit_and_a_warm_up_resets_them() {
        let (mut health, mut now) = (Health::new(), Instant::now());
        let mut last = Duration::ZERO;
        for _ in 0..20 {
            let time = health.eject(now, 1.0);
            assert!(time > last || time == EJECTION_MAX, "{time:?} after {last:?}");
            assert!(health.share(now + time / 2) == 0.0 && health.share(now + time) == 1.0);
            (last, now) = (time, now + time);
        }
        assert_eq!(last, EJECTION_MAX);
        assert!(health.eject(now, 0.0) >= EJECTION_MAX / 2);
        now += EJECTION_MAX;
        answer(&mut health, now);
        answer(&mut health, now + WARM_UP);
        assert!(health.eject(now, 1.0) <= EJECTION_MIN);
    }

    #[test]
    fn after_an_ejection_the_share_grows_from_one_request() {
        let (mut health, mut now) = (Health::new(), Instant::now());
        now += health.eject(now, 1.0);
        assert_eq!(health.share(now), 1.0);
        health.sent(now, 1);
        assert_eq!(health.share(now), 0.0, "one request at a time");
        assert!(health.ended(now, Outcome::TimedOut, 1), "the first failure ejects it again");
        now += health.eject(now, 1.0);
        answer(&mut health, now);
        assert!(health.is_healthy());
        assert_eq!(health.share(now), FIRST_SHARE);
        assert_eq!(health.share(now + WARM_UP / 2), 0.5);
        assert_eq!(health.share(now + WARM_UP), 1.0);
    }

    #[test]
    fn silence_counts_only_while_an_answer_is_owed() {
        let (mut health, now) = (Health::new(), Instant::now());
        let second = Duration::from_secs(1);
        assert!(!health.is_silent(now + 100 * second, second));
        health.sent(now, 1);
        health.sent(now, 1);
        assert!(!health.is_silent(now, second) && health.is_silent(now + second, second));
        health.ended(now + second, Outcome::Answered, 1);
        assert!(!health.is_silent(now + second, second));
        health.ended(now + second, Outcome::Answered, 1);
        assert!(!health.is_silent(now + 100 * second, second));
        // A timeout does not count as an answer.
        health.sent(now, 1);
        health.sent(now, 1);
        health.ended(now + second, Outcome::TimedOut, 1);
        assert!(health.is_silent(now + second, second));
    }

    #[test]
    fn short_deadlines_eject_only_a_replica_that_never_answers() {
        let (mut health, mut now) = (Health::new(), Instant::now());
        let (short, patience) = (Duration::from_millis(1), Duration::from_secs(1));
        let mut cut_short = |health: &mut Health| {
            // Many requests at once, and then none for a while.
            (0..20).for_each(|_| health.sent(now, 1));
            now += short;
            assert!((0..20).all(|_| !health.ended(now, Outcome::CutShort, 1)));
            now += patience;
            health.is_silent(now, patience)
        };
        for _ in 0..900 {
            assert!(!cut_short(&mut health));
        }
        answer(&mut health, Instant::now());
        for _ in 1..1000 {
            assert!(!cut_short(&mut health), "an answer resets the silence");
        }
        assert!(cut_short(&mut health), "one second of silence in total");
    }

    #[test]
    fn a_reconnected_replica_is_tried_at_once_but_gently() {
        let (mut health, now) = (Health::new(), Instant::now());
        health.eject(now, 1.0);
        health.connected(now);
        assert_eq!(health.share(now), 1.0);
        health.sent(now, 1);
        assert_eq!(health.share(now), 0.0);
        health.ended(now, Outcome::Answered, 1);
        assert_eq!(health.share(now), FIRST_SHARE);
    }
}
