//! The verdict: every call is checked, and figures are printed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use afterimage_classifier::{Model, service};
use afterimage_wire::proto::message::Origin;
use afterimage_wire::{CallError, Status};

use crate::LATE;
use crate::common::contrary_model;
use crate::load::{Call, Flush, HOT, TIMEOUT, population};
use crate::{Incident, What, Who};

/// The most failures that are printed as examples.
const EXAMPLES: usize = 10;

/// See the module.
pub(crate) struct Verdict {
    /// How long a recovery may take.
    limit: Duration,
    calls: usize,
    answers: usize,
    hits: usize,
    excused: usize,
    flushes: usize,
    wrong: Vec<String>,
    stale: Vec<String>,
    lost: Vec<String>,
    unexcused: Vec<String>,
    /// How long it took after each incident of a kind, and the last error by then.
    recovery: BTreeMap<(Who, What), Vec<(Duration, String)>>,
    /// Median, 99th percentile and longest time of the answers, from when they were due.
    took: [Duration; 3],
}

impl Verdict {
    /// Judges every call.
    pub(crate) fn new(
        incidents: &[Incident],
        calls: &[Call],
        flushes: &[Flush],
        limit: Duration,
    ) -> Verdict {
        let labels = Labels::new();
        let mut verdict = Verdict {
            limit,
            calls: calls.len(),
            answers: 0,
            hits: 0,
            excused: 0,
            flushes: flushes.len(),
            wrong: Vec::new(),
            stale: stale(calls, flushes),
            lost: Vec::new(),
            unexcused: Vec::new(),
            recovery: BTreeMap::new(),
            took: percentiles(calls),
        };
        for call in calls {
            verdict.judge(call, incidents, &labels);
        }
        for (number, incident) in incidents.iter().enumerate() {
            let next = incidents.get(number + 1).map(|next| next.began);
            let took = recovery(incident, next, calls);
            verdict.recovery.entry((incident.who, incident.what)).or_default().push(took);
        }
        verdict
    }

    fn judge(&mut self, call: &Call, incidents: &[Incident], labels: &Labels) {
        let took = call.ended - call.due;
        let describe = || format!("image {}, after {took:?}: {:?}", call.image, call.outcome);
        if took > TIMEOUT + LATE {
            self.lost.push(describe());
        }
        match &call.outcome {
            Ok((label, digest)) => {
                self.answers += 1;
                self.hits += usize::from(label.origin == Origin::Hit);
                if labels.of(digest, call.image) != Some(label.label) {
                    self.wrong.push(describe());
                }
            }
            Err(error)
                if incidents.iter().any(|incident| excuses(incident, self.limit, call, error)) =>
            {
                self.excused += 1;
            }
            Err(_) => self.unexcused.push(describe()),
        }
    }

    /// Fails unless all is as promised.
    pub(crate) fn assert_good(&self) {
        let bad = [&self.wrong, &self.stale, &self.lost, &self.unexcused].map(Vec::len);
        assert_eq!(bad, [0; 4], "wrong, stale, lost, unexcused");
        assert!(self.flushes > 0, "no flush was confirmed");
        for (kind, took) in &self.recovery {
            let (longest, error) = took.iter().max().expect("one at least");
            assert!(*longest < self.limit, "{kind:?} took {longest:?} to recover from{error}");
        }
        assert!(self.hits * 2 > self.answers, "most answers are hits: {self}");
    }
}

/// The hits after a flush that no call since the flush accounts for.
fn stale(calls: &[Call], flushes: &[Flush]) -> Vec<String> {
    let is_hit =
        |call: &Call| matches!(&call.outcome, Ok((label, _)) if label.origin == Origin::Hit);
    let mut of_image: BTreeMap<usize, Vec<&Call>> = BTreeMap::new();
    for call in calls {
        of_image.entry(call.image).or_default().push(call);
    }
    let mut stale = Vec::new();
    for calls in of_image.into_values() {
        let (hits, others): (Vec<&Call>, Vec<&Call>) =
            calls.into_iter().partition(|call| is_hit(call));
        for hit in hits {
            let before = flushes.iter().filter(|flush| flush.confirmed <= hit.due);
            let Some(flush) = before.max_by_key(|flush| flush.confirmed) else { continue };
            // A call that failed may have stored its answer.
            let accounts = |call: &&Call| call.ended >= flush.began && call.due <= hit.ended;
            if !others.iter().any(accounts) {
                let after = hit.due - flush.confirmed;
                stale.push(format!("image {}, {after:?} after a flush", hit.image));
            }
        }
    }
    stale
}

/// Whether an incident is a reason for this error that the caller must accept.
fn excuses(incident: &Incident, limit: Duration, call: &Call, error: &CallError) -> bool {
    let overlaps = call.ended >= incident.began && call.due <= incident.over + limit;
    let upstream = matches!(
        error,
        CallError::Server { status: Status::UpstreamCrashed | Status::UpstreamError, .. }
    );
    let connection = matches!(
        error,
        CallError::ConnectionLost { .. }
            | CallError::Unavailable { .. }
            | CallError::DeadlineExceeded { .. }
            | CallError::Server { status: Status::ShuttingDown | Status::DeadlineExceeded, .. }
    );
    overlaps
        && match incident.who {
            Who::Cache => false,
            Who::Classifier => upstream,
            Who::Memo => connection || upstream,
        }
}

/// How long it took after an incident until all was well again.
fn recovery(incident: &Incident, next: Option<Instant>, calls: &[Call]) -> (Duration, String) {
    let after = calls.iter().filter(|call| call.due >= incident.over);
    if incident.who == Who::Cache {
        let hits =
            |call: &&Call| matches!(&call.outcome, Ok((label, _)) if label.origin == Origin::Hit);
        let first = after.filter(hits).map(|call| call.ended).min();
        return (first.map_or(Duration::MAX, |first| first - incident.over), String::new());
    }
    let after = after.filter(|call| next.is_none_or(|next| call.ended < next));
    let failed = after.filter_map(|call| Some((call.due, call.outcome.as_ref().err()?)));
    failed
        .max_by_key(|(due, _)| *due)
        .map_or_else(Default::default, |(due, error)| (due - incident.over, format!(" ({error})")))
}

/// The answer of each model to each image.
struct Labels([([u8; 32], Vec<u16>); 2]);

impl Labels {
    fn new() -> Labels {
        let population = population();
        Labels([Model::raw(), contrary_model().into()].map(|model| {
            let label = |i| model.classify(population.image(i)).expect("a digit");
            (service::identity(&model).digest, (0..population.len()).map(label).collect())
        }))
    }

    fn of(&self, digest: &[u8; 32], image: usize) -> Option<u16> {
        let (_, labels) = self.0.iter().find(|(known, _)| known == digest)?;
        labels.get(image).copied()
    }
}

fn percentiles(calls: &[Call]) -> [Duration; 3] {
    let answered = calls.iter().filter(|call| call.outcome.is_ok());
    let mut took: Vec<Duration> = answered.map(|call| call.ended - call.due).collect();
    took.sort_unstable();
    let at = |of: f64| {
        let index = (took.len() as f64 * of) as usize;
        took.get(index.min(took.len().saturating_sub(1))).copied().unwrap_or_default()
    };
    [at(0.5), at(0.99), at(1.0)]
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let incidents: usize = self.recovery.values().map(Vec::len).sum();
        writeln!(
            f,
            "{} calls, {} answers ({} hits, {HOT} hot images), {} excused errors, {} flushes, \
             {incidents} incidents",
            self.calls, self.answers, self.hits, self.excused, self.flushes
        )?;
        let [median, p99, longest] = self.took;
        writeln!(f, "an answer took p50 {median:.1?}, p99 {p99:.1?}, at most {longest:.1?}")?;
        for ((who, what), took) in &self.recovery {
            let mut took = took.clone();
            took.sort_unstable();
            let ((median, _), (longest, error)) = (&took[took.len() / 2], &took[took.len() - 1]);
            writeln!(
                f,
                "{who:?} {what:?}: {} times, recovery p50 {} ms, at most {} ms{error}",
                took.len(),
                median.as_millis(),
                longest.as_millis()
            )?;
        }
        for (name, bad) in [
            ("wrong", &self.wrong),
            ("stale", &self.stale),
            ("lost", &self.lost),
            ("unexcused", &self.unexcused),
        ] {
            writeln!(f, "{name}: {}", bad.len())?;
            for example in bad.iter().take(EXAMPLES) {
                writeln!(f, "    {example}")?;
            }
        }
        Ok(())
    }
}
