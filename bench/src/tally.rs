//! The counters and measurements of one load thread.

use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::outcome::{Latencies, MAX_LATENCY_NS, Outcome, new_histogram};
use crate::timeline::Timeline;

/// A shorter delay of sending is not recorded: a thread wakes up from sleep this exactly.
const ON_TIME_NS: u64 = 60_000;

/// The number of wrong answers that are kept. A few show the pattern; all could fill the memory.
const MAX_EXAMPLES: usize = 8;

/// A wrong answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongAnswer {
    /// The number of the image or key that was asked about.
    pub about: u32,
    /// The received answer.
    pub answer: i64,
    /// The expected answer.
    pub expected: i64,
}

/// Counters; see the fields of the same names in [`crate::report::Report`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) sent: u64,
    pub(crate) writes: u64,
    pub(crate) writes_confirmed: u64,
    pub(crate) fences: u64,
    pub(crate) in_window: u64,
    pub(crate) timed_out: u64,
    pub(crate) lost: u64,
    pub(crate) skipped: u64,
    pub(crate) late: u64,
    pub(crate) out_of_range: u64,
    pub(crate) errors: BTreeMap<u16, u64>,
}

/// The findings of a load thread.
#[derive(Clone, Debug)]
pub(crate) struct Tally {
    pub(crate) counts: Counts,
    pub(crate) latencies: [Latencies; Outcome::ALL.len()],
    pub(crate) wrong: u64,
    pub(crate) unexpected: u64,
    pub(crate) examples: Vec<WrongAnswer>,
    pub(crate) disconnects: Vec<String>,
    pub(crate) timeline: Timeline,
    /// Delays of sending that the generator caused, from [`ON_TIME_NS`] on.
    pub(crate) delays: Histogram<u64>,
    /// Requests with a shorter delay.
    pub(crate) on_time: u64,
    /// Equal samples that are not recorded yet. The answers of one read to the requests of one
    /// write are equal, and mostly adjacent.
    pending: Sample,
    pending_count: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sample {
    outcome: Outcome,
    due_ns: u64,
    sent_ns: u64,
}

impl Default for Tally {
    fn default() -> Self {
        Tally {
            counts: Counts::default(),
            latencies: Default::default(),
            wrong: 0,
            unexpected: 0,
            examples: Vec::new(),
            disconnects: Vec::new(),
            timeline: Timeline::default(),
            delays: new_histogram(),
            on_time: 0,
            pending: Sample { outcome: Outcome::Hit, due_ns: 0, sent_ns: 0 },
            pending_count: 0,
        }
    }
}

impl Tally {
    /// Notes an answer and its two latencies.
    #[inline]
    pub(crate) fn sample(&mut self, outcome: Outcome, due_ns: u64, sent_ns: u64) {
        let sample = Sample { outcome, due_ns, sent_ns };
        if sample != self.pending {
            self.settle();
            self.pending = sample;
        }
        self.pending_count += 1;
    }

    /// Notes how long after its due time the generator sent a request of an open loop.
    #[inline]
    pub(crate) fn send_delay(&mut self, delay_ns: u64) {
        if delay_ns < ON_TIME_NS {
            self.on_time += 1;
        } else {
            self.delays.saturating_record(delay_ns);
        }
    }

    /// Sets the time of the following notes.
    #[inline]
    pub(crate) fn at(&mut self, now_ns: u64) {
        if now_ns >= self.timeline.ends_ns() {
            self.settle();
            self.timeline.advance(now_ns);
        }
    }

    /// Records the pending samples. Called before the histograms are read.
    pub(crate) fn settle(&mut self) {
        let count = std::mem::take(&mut self.pending_count);
        if count == 0 {
            return;
        }
        let Sample { outcome, due_ns, sent_ns } = self.pending;
        if due_ns.max(sent_ns) > MAX_LATENCY_NS {
            self.counts.out_of_range += count;
        }
        let latencies = &mut self.latencies[outcome as usize];
        latencies.from_due.saturating_record_n(due_ns, count);
        latencies.from_sent.saturating_record_n(sent_ns, count);
        self.timeline.note(outcome, due_ns, count);
    }

    pub(crate) fn wrong(&mut self, about: u32, answer: i64, expected: i64) {
        self.wrong += 1;
        if self.examples.len() < MAX_EXAMPLES {
            self.examples.push(WrongAnswer { about, answer, expected });
        }
    }

    pub(crate) fn error(&mut self, status: u16) {
        *self.counts.errors.entry(status).or_default() += 1;
    }

    /// Forgets the measurements of the warm-up, but not its wrong answers.
    pub(crate) fn forget_measurements(&mut self) {
        *self = Tally {
            wrong: self.wrong,
            unexpected: self.unexpected,
            examples: std::mem::take(&mut self.examples),
            disconnects: std::mem::take(&mut self.disconnects),
            ..Tally::default()
        };
    }

    /// The 99th percentile of the generator's own delays.
    pub(crate) fn late_p99_ns(&self) -> u64 {
        let mut all = self.delays.clone();
        all.saturating_record_n(0, self.on_time);
        all.value_at_quantile(0.99)
    }

    /// Adds another thread's.
    pub(crate) fn add(&mut self, mut other: Tally) {
        other.settle();
        let (mine, theirs) = (&mut self.counts, &other.counts);
        mine.sent += theirs.sent;
        mine.writes += theirs.writes;
        mine.writes_confirmed += theirs.writes_confirmed;
        mine.fences += theirs.fences;
        mine.in_window += theirs.in_window;
        mine.timed_out += theirs.timed_out;
        mine.lost += theirs.lost;
        mine.skipped += theirs.skipped;
        mine.late += theirs.late;
        mine.out_of_range += theirs.out_of_range;
        for (&status, count) in &theirs.errors {
            *mine.errors.entry(status).or_default() += count;
        }
        for (mine, theirs) in self.latencies.iter_mut().zip(&other.latencies) {
            mine.add(theirs);
        }
        self.wrong += other.wrong;
        self.unexpected += other.unexpected;
        self.examples.extend(other.examples);
        self.examples.truncate(MAX_EXAMPLES);
        self.disconnects.extend(other.disconnects);
        self.timeline.add(other.timeline);
        self.delays.add(&other.delays).expect("both histograms have the same bounds");
        self.on_time += other.on_time;
    }
}
