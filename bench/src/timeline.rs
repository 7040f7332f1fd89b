//! Timeline of a run: its measurement, divided into intervals of equal length.

use hdrhistogram::Histogram;

use crate::outcome::{DIGITS, MAX_LATENCY_NS, Outcome};

/// Most intervals of a run: a plot can show so many, and each has a histogram of some 100 KB. When
/// all are used, each two are merged into one. So a run of any length has between half of this
/// number and all.
pub(crate) const MAX_INTERVALS: usize = 200;

const _: () = assert!(MAX_INTERVALS.is_multiple_of(2));

/// The events of one interval.
#[derive(Clone, Debug)]
pub(crate) struct Interval {
    /// Latencies from the due time, of the correct answers that arrived in it.
    pub(crate) from_due: Histogram<u64>,
    /// Requests that ended in it: answered, failed, or a confirmed write.
    pub(crate) closed: u64,
    pub(crate) hits: u64,
    pub(crate) failed: u64,
}

impl Default for Interval {
    fn default() -> Self {
        // The histogram grows with the longest latency. Most intervals have none near its limit of
        // an hour.
        let from_due = Histogram::new(DIGITS).expect("a constant that the histogram allows");
        Interval { from_due, closed: 0, hits: 0, failed: 0 }
    }
}

impl Interval {
    fn add(&mut self, other: &Interval) {
        self.from_due.add(&other.from_due).expect("the histogram grows as it must");
        self.closed += other.closed;
        self.hits += other.hits;
        self.failed += other.failed;
    }
}

/// The intervals of a measurement. The default timeline records nothing.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    start_ns: u64,
    width_ns: u64,
    intervals: Vec<Interval>,
}

impl Timeline {
    /// A measurement that begins at `start_ns`. Its intervals have a length of `width_ns` at first,
    /// which is above 0.
    pub(crate) fn new(start_ns: u64, width_ns: u64) -> Self {
        Timeline { start_ns, width_ns, intervals: vec![Interval::default()] }
    }

    /// The length of each interval.
    pub(crate) fn width_ns(&self) -> u64 {
        self.width_ns
    }

    /// The intervals in order. Intervals without an event may be missing at the end.
    pub(crate) fn into_intervals(self) -> Vec<Interval> {
        self.intervals
    }

    /// The end of the current interval.
    #[inline]
    pub(crate) fn ends_ns(&self) -> u64 {
        match self.intervals.len() {
            0 => u64::MAX,
            len => self.start_ns.saturating_add(self.width_ns.saturating_mul(len as u64)),
        }
    }

    /// Moves to the interval that contains `now_ns`.
    pub(crate) fn advance(&mut self, now_ns: u64) {
        while now_ns >= self.ends_ns() {
            if self.intervals.len() == MAX_INTERVALS {
                self.coarsen();
            } else {
                self.intervals.push(Interval::default());
            }
        }
    }

    /// Merges each two intervals into one.
    fn coarsen(&mut self) {
        let fine = std::mem::take(&mut self.intervals);
        for pair in fine.chunks(2) {
            let mut both = pair[0].clone();
            pair[1..].iter().for_each(|second| both.add(second));
            self.intervals.push(both);
        }
        self.width_ns = self.width_ns.saturating_mul(2);
    }

    /// Records `count` answers with this latency.
    #[inline]
    pub(crate) fn note(&mut self, outcome: Outcome, due_ns: u64, count: u64) {
        let Some(interval) = self.intervals.last_mut() else { return };
        if outcome == Outcome::Failed {
            interval.failed += count;
            return;
        }
        if outcome == Outcome::Hit {
            interval.hits += count;
        }
        let due_ns = due_ns.min(MAX_LATENCY_NS);
        interval.from_due.record_n(due_ns, count).expect("the histogram grows as it must");
    }

    /// Records `count` requests that ended.
    #[inline]
    pub(crate) fn note_closed(&mut self, count: u64) {
        if let Some(interval) = self.intervals.last_mut() {
            interval.closed += count;
        }
    }

    /// Adds another thread's timeline of the same measurement.
    pub(crate) fn add(&mut self, mut other: Timeline) {
        if other.intervals.is_empty() {
            return;
        }
        if self.intervals.is_empty() {
            *self = other;
            return;
        }
        // Both timelines began with the same width, and widths only double.
        while self.width_ns < other.width_ns {
            self.coarsen();
        }
        while other.width_ns < self.width_ns {
            other.coarsen();
        }
        for (i, theirs) in other.intervals.into_iter().enumerate() {
            match self.intervals.get_mut(i) {
                Some(mine) => mine.add(&theirs),
                None => self.intervals.push(theirs),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(timeline: &Timeline) -> Vec<u64> {
        timeline.intervals.iter().map(|interval| interval.closed).collect()
    }

    fn at(timeline: &mut Timeline, now_ns: u64) {
        timeline.advance(now_ns);
        timeline.note(Outcome::Hit, now_ns, 2);
        timeline.note(Outcome::Failed, 1, 1);
        timeline.note_closed(3);
    }

    #[test]
    fn events_are_in_the_interval_of_their_time() {
        let mut timeline = Timeline::new(1000, 10);
        for now_ns in [1000, 1009, 1010, 1035] {
            at(&mut timeline, now_ns);
        }
        assert_eq!(closed(&timeline), [6, 3, 0, 3]);
        let first = &timeline.intervals[0];
        assert_eq!((first.hits, first.failed, first.from_due.len()), (4, 2, 4));
        assert_eq!(timeline.ends_ns(), 1040);
    }

    #[test]
    fn a_long_run_has_wider_intervals_and_loses_nothing() {
        let mut timeline = Timeline::new(0, 10);
        for i in 0..5 * MAX_INTERVALS as u64 {
            at(&mut timeline, i * 10);
        }
        assert_eq!(timeline.width_ns(), 80);
        assert!(timeline.intervals.len() > MAX_INTERVALS / 2);
        assert_eq!(closed(&timeline).iter().sum::<u64>(), 15 * MAX_INTERVALS as u64);
        assert!(closed(&timeline).iter().all(|&closed| closed == 24));
    }

    #[test]
    fn threads_with_different_widths_come_together() {
        let (mut one, mut other) = (Timeline::new(0, 10), Timeline::new(0, 10));
        at(&mut one, 5);
        at(&mut one, 15);
        for i in 0..2 * MAX_INTERVALS as u64 {
            at(&mut other, i * 10);
        }
        one.add(other);
        assert_eq!(one.width_ns(), 20);
        assert_eq!(closed(&one)[..2], [12, 6]);
        let mut none = Timeline::default();
        none.note(Outcome::Hit, 1, 1);
        none.add(one);
        assert_eq!(none.intervals.len(), MAX_INTERVALS);
    }
}
