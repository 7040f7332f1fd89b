//! The lines of the live view about the parts of a service: latencies, store, table, classifier,
//! snapshot. Pure: an interval in, lines out.

use std::time::Duration;

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_core::Metric;
use afterimage_memo::metrics as memo;
use afterimage_wire::server::metrics as server;

use super::reading::Interval;
use super::view::{Line, Style};
use crate::args::Size;
use crate::format::{bar, grouped, long_time, nanos, percent, short};

/// Columns of the labels.
pub(super) const LABEL: usize = 12;

/// The statistics that the upper part of the view shows. The rest is listed below it.
pub(super) const SHOWN: &[&str] = &[
    server::SERVICE.name,
    server::VERSION.name,
    server::UPTIME.name,
    server::OPEN.name,
    server::REQUESTS.name,
    cache::HITS.name,
    cache::MISSES.name,
    memo::COALESCED.name,
    memo::WAITING.name,
    memo::STORE.name,
    memo::STORE_CONNECTED.name,
    memo::STORE_BREAKER.name,
    memo::STORE_BREAKER_OPENED.name,
    memo::STORE_ENTRIES.name,
    memo::STORE_CAPACITY.name,
    memo::STORE_MEMORY.name,
    memo::STORE_EVICTIONS.name,
    cache::ENTRIES.name,
    cache::CAPACITY.name,
    cache::MEMORY.name,
    cache::WRITES.name,
    cache::EVICTIONS.name,
    engine::SCORED.name,
    engine::BATCHES.name,
    engine::QUEUED.name,
    engine::BUSY.name,
    memo::CLASSIFIER.name,
    memo::CLASSIFIER_CONNECTED.name,
    memo::CLASSIFIERS.name,
    memo::CLASSIFIERS_CONNECTED.name,
    memo::CLASSIFIER_CALLS.name,
    memo::CLASSIFIER_FAILURES.name,
    memo::SAVED_TIME.name,
    memo::SAVED_CLASSIFIER_TIME.name,
    memo::OVERLOADED.name,
    memo::EXPIRED.name,
    memo::REJECTED_TAGS.name,
    cache::SNAPSHOT_AGE.name,
    cache::SNAPSHOT_ENTRIES.name,
    cache::SNAPSHOT_SIZE.name,
    cache::SNAPSHOT_RUNNING.name,
    cache::SNAPSHOTS_FAILED.name,
];

/// A line that begins with this label.
pub(super) fn label(text: &str) -> Line {
    Line::default().left(Style::Faint, &format!(" {text}"), LABEL)
}

/// The table of latencies by origin.
pub(super) fn latencies(interval: &Interval) -> Vec<Line> {
    let mut lines = Vec::new();
    for (name, counter, histogram) in [
        ("hit", cache::HITS.name, memo::HIT_LATENCY.name),
        ("coalesced", memo::COALESCED.name, memo::COALESCED_LATENCY.name),
        ("miss", cache::MISSES.name, memo::MISS_LATENCY.name),
    ] {
        let Some(recent) = interval.recent(histogram) else { continue };
        if lines.is_empty() {
            let head = Line::default().left(Style::Faint, "", LABEL);
            let columns = ["per s", "p50", "p99", "p99.9", "max"];
            lines.push(Line::default());
            lines.push(columns.iter().enumerate().fold(head, |head, (i, column)| {
                head.right(Style::Faint, column, if i == 0 { 9 } else { 11 })
            }));
        }
        let rate = interval.rate(counter).map_or("–".into(), short);
        let style = if recent.count > 0 { Style::Plain } else { Style::Faint };
        let row = label(name).right(style, &rate, 9);
        let values = [recent.p50, recent.p99, recent.p999, recent.max];
        lines.push(values.into_iter().fold(row, |row, value| {
            let value = if recent.count > 0 { nanos(value) } else { "–".into() };
            row.right(style, &value, 11)
        }));
    }
    lines
}

/// A line for each part of the service that has statistics.
pub(super) fn details(interval: &Interval) -> Vec<Line> {
    [saved, in_flight, store, table, writes, engine, classifier, refused, snapshot]
        .into_iter()
        .filter_map(|part| part(interval))
        .collect()
}

fn saved(interval: &Interval) -> Option<Line> {
    let time = |name| interval.now.number(name).map(|us| long_time(Duration::from_micros(us)));
    let waiting = time(memo::SAVED_TIME.name)?;
    let mut line = label("time saved").push(Style::Good, format!("{waiting} of waiting"));
    if let Some(work) = time(memo::SAVED_CLASSIFIER_TIME.name) {
        line = line.push(Style::Good, format!(" · {work} of the classifier"));
    }
    Some(line)
}

fn in_flight(interval: &Interval) -> Option<Line> {
    let waiting = interval.now.number(memo::WAITING.name)?;
    Some(label("in flight").push(Style::Plain, grouped(waiting)))
}

fn store(interval: &Interval) -> Option<Line> {
    let now = &interval.now;
    let kind = now.text(memo::STORE.name)?;
    let line = label("store").push(Style::Plain, kind);
    let Some(breaker) = now.text(memo::STORE_BREAKER.name) else { return Some(line) };
    let connected = now.text(memo::STORE_CONNECTED.name) == Some("yes");
    let opened = now.number(memo::STORE_BREAKER_OPENED.name).unwrap_or(0);
    let warn = |bad| if bad { Style::Warning } else { Style::Plain };
    Some(
        line.push(warn(!connected), if connected { " · connected" } else { " · not connected" })
            .push(warn(breaker != "closed"), format!(" · breaker {breaker}"))
            .push(Style::Faint, format!(" · opened {}", times(opened))),
    )
}

fn times(count: u64) -> String {
    match count {
        1 => "once".into(),
        count => format!("{} times", grouped(count)),
    }
}

/// The fill of the label table: the cache's, or the one in the memo's process.
fn table(interval: &Interval) -> Option<Line> {
    let now = &interval.now;
    let number =
        |own: Metric, store: Metric| now.number(own.name).or_else(|| now.number(store.name));
    let entries = number(cache::ENTRIES, memo::STORE_ENTRIES)?;
    let capacity = number(cache::CAPACITY, memo::STORE_CAPACITY)?;
    let bytes = Size(number(cache::MEMORY, memo::STORE_MEMORY).unwrap_or(0));
    let evictions = interval
        .rates(&[cache::EVICTIONS.name, memo::STORE_EVICTIONS.name])
        .map_or("–".into(), short);
    let share = if capacity > 0 { entries as f64 / capacity as f64 } else { 0.0 };
    Some(
        label("entries")
            .push(Style::Plain, format!("{} of {}", grouped(entries), grouped(capacity)))
            .push(Style::Good, format!("  {}", bar(share, 10)))
            .push(Style::Plain, format!("  {}", percent(share)))
            .push(Style::Faint, format!(" · {bytes} · {evictions} evictions/s")),
    )
}

fn writes(interval: &Interval) -> Option<Line> {
    interval.now.number(cache::WRITES.name)?;
    let rate = interval.rate(cache::WRITES.name).map_or("–".into(), short);
    Some(label("writes").push(Style::Plain, format!("{rate} /s")))
}

fn engine(interval: &Interval) -> Option<Line> {
    let queued = interval.now.number(engine::QUEUED.name)?;
    let line = label("engine").push(Style::Plain, format!("{} queued", grouped(queued)));
    let (scored, batches) =
        (interval.rate(engine::SCORED.name)?, interval.rate(engine::BATCHES.name)?);
    let together = if batches > 0.0 { scored / batches } else { 0.0 };
    let cores = interval.rate(engine::BUSY.name)? / 1e6;
    Some(line.push(
        Style::Plain,
        format!(" · {} images/s · mean batch {together:.1} · {cores:.2} cores busy", short(scored)),
    ))
}

fn classifier(interval: &Interval) -> Option<Line> {
    let now = &interval.now;
    let failures = now.number(memo::CLASSIFIER_FAILURES.name)?;
    let calls = interval.rate(memo::CLASSIFIER_CALLS.name).map_or("–".into(), short);
    let failing = interval.rate(memo::CLASSIFIER_FAILURES.name).unwrap_or(0.0) > 0.0;
    let style = if failing { Style::Warning } else { Style::Plain };
    let mut line = label("classifier")
        .push(Style::Plain, format!("{calls} calls/s"))
        .push(style, format!(" · {} failed", grouped(failures)));
    if let (Some(all), Some(connected)) =
        (now.number(memo::CLASSIFIERS.name), now.number(memo::CLASSIFIERS_CONNECTED.name))
    {
        let style = if connected < all { Style::Warning } else { Style::Plain };
        line = line.push(style, format!(" · {connected} of {all} connected"));
    }
    Some(line)
}

/// Refused requests, highlighted while their number grows.
fn refused(interval: &Interval) -> Option<Line> {
    let names = [
        (memo::OVERLOADED.name, "overloaded"),
        (memo::EXPIRED.name, "past their deadline"),
        (memo::REJECTED_TAGS.name, "with a wrong seal"),
    ];
    let mut line = label("refused");
    let mut first = true;
    for (name, text) in names {
        let Some(count) = interval.now.number(name) else { continue };
        let now = interval.rate(name).unwrap_or(0.0) > 0.0;
        let style = if now { Style::Warning } else { Style::Plain };
        let between = if std::mem::take(&mut first) { "" } else { " · " };
        line = line.push(style, format!("{between}{} {text}", grouped(count)));
    }
    (!first).then_some(line)
}

fn snapshot(interval: &Interval) -> Option<Line> {
    let now = &interval.now;
    let failed = now.number(cache::SNAPSHOTS_FAILED.name)?;
    let mut line = label("snapshot");
    line = match now.number(cache::SNAPSHOT_AGE.name) {
        Some(ms) => {
            let entries = grouped(now.number(cache::SNAPSHOT_ENTRIES.name).unwrap_or(0));
            let bytes = Size(now.number(cache::SNAPSHOT_SIZE.name).unwrap_or(0));
            line.push(Style::Plain, format!("{} ago", long_time(Duration::from_millis(ms))))
                .push(Style::Faint, format!(" · {entries} entries · {bytes}"))
        }
        None => line.push(Style::Plain, "none yet"),
    };
    if now.number(cache::SNAPSHOT_RUNNING.name) == Some(1) {
        line = line.push(Style::Good, " · one is being written");
    }
    if failed > 0 {
        line = line.push(Style::Warning, format!(" · {} failed", grouped(failed)));
    }
    Some(line)
}
