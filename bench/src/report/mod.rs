//! The report of a run: figures for people, for JSON and for comparisons.

use std::collections::BTreeMap;
use std::fmt;
use std::time::UNIX_EPOCH;

use afterimage_wire::Status;
pub(crate) use parts::ThreadUse;
use parts::intervals;
pub use parts::{Generator, Interval, OutcomeReport, Server, Settings, Summary};
use serde::{Deserialize, Serialize};

use crate::address::Introduction;
use crate::format::{duration, grouped, number};
use crate::outcome::{Latencies, Outcome};
use crate::plan::Plan;
use crate::tally::{Tally, WrongAnswer};

mod parts;

/// The figures of a run. Latencies are in nanoseconds.
///
/// Every request is in exactly one place: `sent` is the sum of `answered`, `failed`,
/// `writes_confirmed`, `timed_out` and `lost`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The settings of the run.
    pub settings: Settings,
    /// The introduction of the server.
    pub server: Server,
    /// When the measurement began, in seconds since the beginning of 1970; 0 in reports that do
    /// not say.
    #[serde(default)]
    pub started_unix_s: f64,
    /// Whether the run was cancelled: it measured less than the settings say.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub interrupted: bool,
    /// Length of the measurement in seconds, without warm-up and without the wait for the last
    /// answers of a timed run.
    pub measured_s: f64,
    /// Requests handed to the kernel.
    pub sent: u64,
    /// Requests with a proper answer, cache writes not counted. The latencies are theirs.
    pub answered: u64,
    /// Requests with an error reply.
    pub failed: u64,
    /// The same by the status that the replies carried, refused cache writes included.
    pub errors: BTreeMap<String, u64>,
    /// Cache writes among the requests sent.
    pub writes: u64,
    /// Cache writes that a later reply on their connection shows the server to have come past.
    pub writes_confirmed: u64,
    /// Pings that were sent for the sake of such a reply. They are in no other number.
    pub fences: u64,
    /// Requests without a reply within the time limit.
    pub timed_out: u64,
    /// Requests in flight when their connection broke.
    pub lost: u64,
    /// Requests that were due, or that the plan counted on, and were never sent.
    pub skipped: u64,
    /// Replies to requests that had timed out.
    pub late: u64,
    /// Latencies beyond the histograms' hour, recorded as an hour.
    pub out_of_range: u64,
    /// Answers that cannot be right, warm-up included.
    pub wrong: u64,
    /// Replies to no request, of the wrong kind, or second ones; warm-up included.
    pub unexpected: u64,
    /// The first few wrong answers.
    pub examples: Vec<WrongAnswer>,
    /// Why connections broke, one text for each that did; warm-up included.
    pub disconnects: Vec<String>,
    /// Replies within the measurement, a second.
    pub throughput_per_s: f64,
    /// The share of hits: among all answers of a classification, among reads of a cache.
    pub hit_ratio: Option<f64>,
    /// From the moment a request was due: the time that its user waits.
    pub latency_from_due: Summary,
    /// From the hand-over to the kernel: the server's own time.
    pub latency_from_sent: Summary,
    /// The two latencies for each outcome that occurred, error replies included.
    pub outcomes: BTreeMap<Outcome, OutcomeReport>,
    /// The load generator's own use of time.
    pub generator: Generator,
    /// The run over time, in intervals of equal length.
    #[serde(default)]
    pub timeline: Vec<Interval>,
    /// The histograms behind the summaries; reports of earlier versions have none.
    #[serde(default)]
    pub histograms: BTreeMap<Outcome, Latencies>,
}

/// The CPU share above which a generator in a closed loop is taken for the bottleneck.
const BUSY: f64 = 0.95;

impl Report {
    pub(crate) fn new(
        plan: &Plan,
        server: Option<Introduction>,
        mut tally: Tally,
        threads: Vec<ThreadUse>,
    ) -> Self {
        tally.settle();
        let late_p99_ns = tally.late_p99_ns();
        let [hit, coalesced, miss, failed] =
            tally.latencies.each_ref().map(|latencies| latencies.from_due.len());
        let mut all = Latencies::default();
        let (mut outcomes, mut histograms) = (BTreeMap::new(), BTreeMap::new());
        for (outcome, latencies) in Outcome::ALL.into_iter().zip(tally.latencies) {
            if latencies.from_due.is_empty() {
                continue;
            }
            if outcome != Outcome::Failed {
                all.add(&latencies);
            }
            let from_due = Summary::new(&latencies.from_due);
            let from_sent = Summary::new(&latencies.from_sent);
            outcomes.insert(outcome, OutcomeReport { from_due, from_sent });
            histograms.insert(outcome, latencies);
        }
        let answered = hit + coalesced + miss;
        let measured = threads.iter().map(|used| used.measured).max().unwrap_or_default();
        let counts = tally.counts;
        let started = threads.iter().map(|used| used.started).min();
        let since = started.and_then(|started| started.duration_since(UNIX_EPOCH).ok());
        let latency_from_due = Summary::new(&all.from_due);
        let latency_from_sent = Summary::new(&all.from_sent);
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        Report {
            settings: Settings::new(plan),
            server: server.map(Server::new).unwrap_or_default(),
            started_unix_s: since.unwrap_or_default().as_secs_f64(),
            interrupted: threads.iter().any(|used| used.interrupted),
            measured_s: measured.as_secs_f64(),
            sent: counts.sent,
            answered,
            failed,
            errors: counts
                .errors
                .into_iter()
                .map(|(code, count)| (Status::from_code(code).to_string(), count))
                .collect(),
            writes: counts.writes,
            writes_confirmed: counts.writes_confirmed,
            fences: counts.fences,
            timed_out: counts.timed_out,
            lost: counts.lost,
            skipped: counts.skipped,
            late: counts.late,
            out_of_range: counts.out_of_range,
            wrong: tally.wrong,
            unexpected: tally.unexpected,
            examples: tally.examples,
            disconnects: tally.disconnects,
            throughput_per_s: if measured.is_zero() {
                0.0
            } else {
                counts.in_window as f64 / measured.as_secs_f64()
            },
            hit_ratio: share(hit, answered),
            generator: Generator {
                cpu_share: threads
                    .iter()
                    .map(|used| used.cpu.as_secs_f64() / used.wall.as_secs_f64().max(1e-9))
                    .collect(),
                cpu_ns_per_request: threads
                    .iter()
                    .map(|used| used.cpu.as_nanos() as f64)
                    .sum::<f64>()
                    / ((answered + failed + counts.writes_confirmed).max(1) as f64),
                held_back_p99_ns: latency_from_due.p99_ns.saturating_sub(latency_from_sent.p99_ns),
                late_p99_ns,
            },
            latency_from_due,
            latency_from_sent,
            outcomes,
            timeline: intervals(tally.timeline),
            histograms,
        }
    }

    /// The latencies of all proper answers together; empty in reports of earlier versions.
    pub fn latencies(&self) -> Latencies {
        let mut all = Latencies::default();
        for (&outcome, latencies) in &self.histograms {
            if outcome != Outcome::Failed {
                all.add(latencies);
            }
        }
        all
    }

    /// The problems; empty when every request was sent and answered properly.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.interrupted {
            problems.push(format!("interrupted after {:.3} s of measurement", self.measured_s));
        }
        let mut note = |count: u64, what: &str| {
            if count > 0 {
                problems.push(format!("{} {what}", grouped(count)));
            }
        };
        note(self.wrong, "wrong answers");
        note(self.unexpected, "replies to no request");
        note(self.failed, "error replies");
        note(self.timed_out, "requests without a reply in time");
        note(self.lost, "requests lost with their connection");
        note(self.skipped, "requests that were planned and never sent");
        note(self.out_of_range, "latencies beyond an hour");
        problems.extend(self.disconnects.iter().map(|reason| format!("connection lost: {reason}")));
        problems
    }

    /// Whether the load threads of a closed loop were busy all the time: the server may be faster.
    pub fn generator_is_the_limit(&self) -> bool {
        let shares = &self.generator.cpu_share;
        let mean = shares.iter().sum::<f64>() / shares.len().max(1) as f64;
        self.settings.rate_per_s.is_none() && mean > BUSY
    }

    pub(crate) fn first_example(&self) -> String {
        self.examples.first().map_or_else(String::new, |first| {
            let WrongAnswer { about, answer, expected } = first;
            format!("; number {about} was answered {answer}, not {expected}")
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Settings { addr, target, access, mode, population, .. } = &self.settings;
        let Settings { connections, threads, depth, seed, .. } = &self.settings;
        writeln!(f, "{target} at {addr} ({}, {})", self.server.service, self.server.name)?;
        let population = grouped(*population);
        writeln!(f, "{access} over {population}, {mode} loop, seed {seed}")?;
        writeln!(f, "connections {connections}, depth {depth}, threads {threads}")?;
        writeln!(f)?;
        let rate = self.throughput_per_s;
        writeln!(f, "throughput  {} requests/s over {:.3} s", number(rate), self.measured_s)?;
        if let Some(due) = self.settings.rate_per_s {
            writeln!(f, "due         {} requests/s", number(due))?;
        }
        if let Some(ratio) = self.hit_ratio {
            writeln!(f, "hit ratio   {:.2} %", ratio * 100.0)?;
        }
        let shares: Vec<String> = self
            .generator
            .cpu_share
            .iter()
            .map(|share| format!("{:.0} %", share * 100.0))
            .collect();
        let each = self.generator.cpu_ns_per_request;
        writeln!(f, "generator   {} of a core, {each:.1} ns per request", shares.join(", "))?;
        if self.settings.rate_per_s.is_some() {
            let late = duration(self.generator.late_p99_ns);
            writeln!(f, "            sent late by its own fault: {late} (p99)")?;
        }
        writeln!(
            f,
            "requests    {} sent, {} answered, {} failed, {} timed out, {} lost",
            self.sent, self.answered, self.failed, self.timed_out, self.lost
        )?;
        writeln!(
            f,
            "            {} skipped, {} late, {} out of range",
            self.skipped, self.late, self.out_of_range
        )?;
        if self.writes > 0 {
            writeln!(f, "writes      {} sent, {} confirmed", self.writes, self.writes_confirmed)?;
        }
        for (status, count) in &self.errors {
            writeln!(f, "error       {status}: {count}")?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{:<22}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
            "latency", "p50", "p90", "p99", "p99.9", "p99.99", "max", "count"
        )?;
        row(f, "from due", &self.latency_from_due)?;
        row(f, "from sent", &self.latency_from_sent)?;
        for (outcome, latency) in &self.outcomes {
            row(f, &format!("  {} from due", outcome.name()), &latency.from_due)?;
            row(f, &format!("  {} from sent", outcome.name()), &latency.from_sent)?;
        }
        if self.generator_is_the_limit() {
            writeln!(f, "\nThe load generator was the bottleneck: the server may be faster.")?;
        }
        if self.server.window > 0 && self.settings.depth as u64 > u64::from(self.server.window) {
            let window = self.server.window;
            writeln!(f, "\nThe server accepts {window} requests in flight per connection.")?;
        }
        let problems = self.problems();
        if !problems.is_empty() {
            writeln!(f, "\nProblems:")?;
        }
        for problem in problems {
            writeln!(f, "  {problem}")?;
        }
        Ok(())
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, summary: &Summary) -> fmt::Result {
    let Summary { p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns, count, .. } = *summary;
    write!(f, "{name:<22}")?;
    for ns in [p50_ns, p90_ns, p99_ns, p999_ns, p9999_ns, max_ns] {
        write!(f, "{:>10}", duration(ns))?;
    }
    writeln!(f, "{count:>12}")
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::timeline::Timeline;
    use crate::workload::Keys;

    /// A report of 999 hits of 1 ms, one of 500 ms that was sent 100 ms late, and two failures.
    pub(crate) fn report() -> Report {
        let keys = Keys { count: 10, read_share: 1.0, salt: 0 };
        let plan =
            Plan { token: b"s3cret".to_vec(), ..Plan::cache(([127, 0, 0, 1], 9).into(), keys) };
        let mut tally = Tally::default();
        tally.timeline = Timeline::new(0, 1_000_000_000);
        for _ in 0..999 {
            tally.sample(Outcome::Hit, 1_000_000, 1_000_000);
        }
        tally.at(1_500_000_000);
        tally.sample(Outcome::Hit, 500_000_000, 400_000_000);
        tally.sample(Outcome::Failed, 7, 7);
        tally.sample(Outcome::Failed, 7, 7);
        tally.error(Status::Overloaded.code());
        tally.error(Status::Overloaded.code());
        tally.counts.sent = 1002;
        tally.counts.in_window = 1002;
        let second = Duration::from_secs(1);
        let (started, wall) = (UNIX_EPOCH + second, second * 2);
        let used = ThreadUse { started, measured: wall, interrupted: false, wall, cpu: second };
        Report::new(&plan, None, tally, vec![used])
    }

    #[test]
    fn percentiles_are_within_a_thousandth_and_exclude_failures() {
        let report = report();
        let near = |value: u64, exact: u64| value.abs_diff(exact) <= exact / 1000;
        let Summary { count, p50_ns, p99_ns, p999_ns, p9999_ns, max_ns, .. } =
            report.latency_from_due;
        assert_eq!(count, 1000);
        assert!(near(p50_ns, 1_000_000) && near(p99_ns, 1_000_000) && near(p999_ns, 1_000_000));
        assert!(near(p9999_ns, 500_000_000) && near(max_ns, 500_000_000));
        assert!(near(report.latency_from_sent.max_ns, 400_000_000));
        assert_eq!((report.answered, report.failed, report.hit_ratio), (1000, 2, Some(1.0)));
        assert_eq!(report.throughput_per_s, 501.0);
        assert_eq!(report.generator.cpu_share, [0.5]);
    }

    #[test]
    fn a_report_survives_json_and_holds_no_token() {
        let report = report();
        let json = serde_json::to_string(&report).unwrap();
        assert!(!json.contains("s3cret"));
        let read: Report = serde_json::from_str(&json).unwrap();
        assert_eq!(read.settings, report.settings);
        assert_eq!(read.server, report.server);
        assert_eq!(read.latency_from_due, report.latency_from_due);
        assert_eq!(read.outcomes, report.outcomes);
        assert_eq!(read.errors["overloaded"], 2);
        assert_eq!(read.histograms, report.histograms);
        assert_eq!(read.timeline.len(), 2);
        assert_eq!(read.latencies().from_due.len(), 1000);
    }

    #[test]
    fn the_table_shows_both_latencies_and_every_problem() {
        let text = report().to_string();
        for part in ["from due", "from sent", "500 ms", "400 ms", "hit from due", "failed from due"]
        {
            assert!(text.contains(part), "{part:?} is missing in:\n{text}");
        }
        assert!(text.contains("error       overloaded: 2"), "{text}");
        assert!(text.contains("Problems:\n  2 error replies"), "{text}");
        assert!(!text.contains("bottleneck"), "{text}");
    }

    #[test]
    fn a_latency_beyond_the_histograms_is_counted() {
        let mut tally = Tally::default();
        tally.sample(Outcome::Hit, u64::MAX, 5);
        tally.settle();
        assert_eq!(tally.counts.out_of_range, 1);
        assert_eq!(tally.latencies[Outcome::Hit as usize].from_due.len(), 1);
    }
}
