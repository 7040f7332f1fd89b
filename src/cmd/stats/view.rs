//! The live view of a service for a screen of any size. Pure: readings in, lines out.

use std::collections::VecDeque;
use std::time::Duration;

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_core::metric::Unit;
use afterimage_memo::metrics as memo;
use afterimage_wire::server::metrics as server;
use afterimage_wire::text::escape_text;

use super::catalog;
use super::details::{LABEL, SHOWN, details, label, latencies};
use super::reading::Interval;
use crate::format::{bar, long_time, percent, short, sparkline};
use crate::metrics;

/// Rates kept for the sparkline: one for each column of the widest screen.
const HISTORY: usize = 512;

/// The state of the view: the latest reading and the history of rates.
#[derive(Debug)]
pub(super) struct View {
    server: String,
    /// Answers a second, the newest last.
    history: VecDeque<f64>,
    latest: Option<Interval>,
    /// The error since the latest reading.
    trouble: Option<String>,
}

impl View {
    pub(super) fn new(server: &str) -> Self {
        let server = server.to_owned();
        View { server, history: VecDeque::new(), latest: None, trouble: None }
    }

    /// Takes a new reading.
    pub(super) fn update(&mut self, interval: Interval) {
        if let Some(rate) = interval.rates(answers(&interval)) {
            self.history.push_back(rate);
            if self.history.len() > HISTORY {
                self.history.pop_front();
            }
        }
        self.latest = Some(interval);
        self.trouble = None;
    }

    /// Takes the error of a failed reading.
    pub(super) fn lost(&mut self, why: String) {
        self.trouble = Some(why);
    }

    /// The screen, from its top: no more than `height` lines, none wider than `width`.
    pub(super) fn lines(&self, width: usize, height: usize) -> Vec<Line> {
        let mut lines = vec![self.title(width)];
        if let Some(trouble) = &self.trouble {
            lines.push(
                Line::default().push(Style::Warning, format!(" no answer: {trouble}; retrying")),
            );
        } else {
            lines.push(Line::default());
        }
        if let Some(interval) = &self.latest {
            lines.extend(self.headline(interval, width));
            lines.extend(latencies(interval));
            lines.push(Line::default());
            lines.extend(details(interval));
            lines.extend(rest(interval, width, height.saturating_sub(lines.len())));
        }
        lines.truncate(height);
        lines
    }

    fn title(&self, width: usize) -> Line {
        let Some(now) = self.latest.as_ref().map(|latest| &latest.now) else {
            return Line::default().push(Style::Bold, format!(" {}", self.server));
        };
        let service = now.text(server::SERVICE.name).unwrap_or("service");
        let uptime = long_time(Duration::from_millis(now.number(server::UPTIME.name).unwrap_or(0)));
        let open = now.number(server::OPEN.name).unwrap_or(0);
        let connections = if open == 1 { "connection" } else { "connections" };
        let version = now.text(server::VERSION.name).unwrap_or_default();
        Line::default()
            .push(Style::Bold, format!(" {service} {}", self.server))
            .push(Style::Faint, format!("  {version}"))
            .at_end(Style::Faint, &format!("up {uptime} · {open} {connections} "), width)
    }

    /// The rate of answers and the hit ratio.
    fn headline(&self, interval: &Interval, width: usize) -> Vec<Line> {
        let room = width.saturating_sub(LABEL + 14).min(HISTORY);
        let history: Vec<f64> = self.history.iter().copied().collect();
        let unit = match interval.now.text(server::SERVICE.name) {
            Some("cache") => "reads/s",
            Some("classifier") => "images/s",
            _ => "answers/s",
        };
        let rate = interval.rates(answers(interval)).map_or("–".into(), short);
        let mut lines = vec![
            label(unit)
                .right(Style::Bold, &rate, 9)
                .push(Style::Good, format!("  {}", sparkline(&history, room))),
        ];
        if let Some(all) = interval.hit_ratio() {
            let (shown, style) = match interval.recent_hit_ratio() {
                Some(recent) => (recent, Style::Bold),
                // There were no lookups in this interval.
                None => (all, Style::Faint),
            };
            let since = format!("  {} since the start", percent(all));
            let room = width.saturating_sub(LABEL + 13 + since.chars().count()).clamp(4, 50);
            lines.push(
                label("hit ratio")
                    .right(style, &percent(shown), 9)
                    .push(Style::Good, format!("  {}", bar(shown, room)))
                    .push(Style::Faint, since),
            );
        }
        lines
    }
}

/// The counters that together count the service's answers.
fn answers(interval: &Interval) -> &'static [&'static str] {
    match interval.now.text(server::SERVICE.name) {
        Some("classifier") => &[engine::SCORED.name],
        _ => &[cache::HITS.name, cache::MISSES.name, memo::COALESCED.name],
    }
}

/// The statistics that the upper part does not show, in as many columns as fit. Zeros are hidden,
/// and long values have a line of their own.
fn rest(interval: &Interval, width: usize, height: usize) -> Vec<Line> {
    const COLUMN: usize = 46;
    const NAME: usize = 28;
    let cells = interval.now.stats.entries.iter().filter(|(name, _)| {
        // The text of a replica has its numbers, too.
        let is_number_of_one = metrics::find(name).is_some_and(|metric| metric.per.is_some());
        !is_number_of_one && !SHOWN.contains(&name.as_str())
    });
    let cells = cells.filter_map(|(name, value)| {
        let shown = catalog::show(name, value)?;
        let is_count = metrics::find(name).is_none_or(|metric| metric.unit == Unit::Count);
        let rate = interval.rate(name).filter(|&rate| rate > 0.0 && is_count);
        let rate = rate.map(|rate| format!("  {}/s", short(rate))).unwrap_or_default();
        Some((format!(" {} ", catalog::label(name)), shown + &rate))
    });
    let width_of =
        |(name, value): &(String, String)| name.chars().count().max(NAME) + value.chars().count();
    let (short, long): (Vec<_>, Vec<_>) = cells.partition(|cell| width_of(cell) < COLUMN);
    let rows = short.len().div_ceil((width / COLUMN).max(1));
    if height < 3 || short.is_empty() && long.is_empty() {
        return Vec::new();
    }
    let mut lines = vec![Line::default()];
    for row in 0..rows {
        let mut line = Line::default();
        for (name, value) in short.iter().skip(row).step_by(rows) {
            let room = COLUMN - name.chars().count().max(NAME);
            line = line.left(Style::Faint, name, NAME).left(Style::Plain, value, room);
        }
        lines.push(line);
    }
    lines.extend(long.iter().map(|(name, value)| {
        Line::default().left(Style::Faint, name, NAME).push(Style::Plain, value.as_str())
    }));
    lines.truncate(height);
    lines
}

/// The style of a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Bold,
    /// For labels and inactive values.
    Faint,
    Good,
    Warning,
}

impl Style {
    /// The escape sequence that begins it ("Select Graphic Rendition", ECMA-48).
    fn code(self) -> &'static str {
        match self {
            Style::Plain => "",
            Style::Bold => "\x1b[1m",
            Style::Faint => "\x1b[2m",
            Style::Good => "\x1b[32m",
            Style::Warning => "\x1b[1;33m",
        }
    }
}

/// A line. Its characters are one column wide each.
#[derive(Clone, Debug, Default)]
pub(super) struct Line(Vec<(Style, String)>);

impl Line {
    /// Adds a text. A name or text of the server must not control the terminal.
    pub(super) fn push(mut self, style: Style, text: impl AsRef<str>) -> Self {
        self.0.push((style, escape_text(text.as_ref()).into_owned()));
        self
    }

    /// Adds a text at the left of a column of this width.
    pub(super) fn left(self, style: Style, text: &str, width: usize) -> Self {
        self.push(style, format!("{text:<width$}"))
    }

    /// Adds a text at the right of a column of this width.
    pub(super) fn right(self, style: Style, text: &str, width: usize) -> Self {
        self.push(style, format!("{text:>width$}"))
    }

    /// Adds a text at the right end of a line of this width, if it fits there.
    pub(super) fn at_end(self, style: Style, text: &str, width: usize) -> Self {
        let free = width.saturating_sub(self.width());
        if text.chars().count() < free { self.right(style, text, free) } else { self }
    }

    pub(super) fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// The line, cut to `width` columns; with its styles if `styled`.
    pub(super) fn render(&self, width: usize, styled: bool) -> String {
        let (mut out, mut left) = (String::new(), width);
        for (style, text) in &self.0 {
            let cut: String = text.chars().take(left).collect();
            left -= cut.chars().count();
            let code = if styled { style.code() } else { "" };
            out.push_str(code);
            out.push_str(&cut);
            if !code.is_empty() {
                out.push_str("\x1b[0m");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use afterimage_wire::proto::stats::{Stats, Value};

    use super::*;
    use crate::cmd::stats::reading::Reading;

    /// A memo with a remote store, after `seconds` under load.
    fn memo(seconds: u64, breaker: &str) -> Reading {
        let mut stats = Stats::default();
        stats.push("service", Value::Text("memo".into()));
        stats.push("version", Value::Text("afterimage 0.1.0".into()));
        stats.push("uptime_ms", Value::Counter(seconds * 1000));
        stats.push("connections_open", Value::Gauge(12));
        stats.push("hits", Value::Counter(99_000 * seconds));
        stats.push("misses", Value::Counter(900 * seconds));
        stats.push("coalesced", Value::Counter(100 * seconds));
        stats.push("overloaded", Value::Counter(0));
        stats.push("rejected_tags", Value::Counter(3 * seconds));
        stats.push("audited", Value::Counter(1_234_567));
        stats.push("classifier_calls", Value::Counter(900 * seconds));
        stats.push("classifier_failures", Value::Counter(0));
        stats.push("classifiers", Value::Gauge(2));
        stats.push("classifiers_connected", Value::Gauge(1));
        stats.push(
            "classifier_1",
            Value::Text(
                "classifier-1.example.net:7402: healthy, model 501a1c72…, 3 in flight".into(),
            ),
        );
        stats.push("waiting", Value::Gauge(17));
        stats.push("store", Value::Text("afterimage".into()));
        stats.push("store_connected", Value::Text("yes".into()));
        stats.push("store_breaker", Value::Text(breaker.into()));
        stats.push("store_breaker_opened", Value::Counter(1));
        for (name, ns, count) in [
            ("hit_latency_ns", 1_250, 99_000 * seconds),
            ("miss_latency_ns", 70_100, 900 * seconds),
            ("coalesced_latency_ns", 0, 0),
        ] {
            let buckets = if count > 0 { vec![(ns, count)] } else { Vec::new() };
            stats.entries.push((name.into(), Value::Histogram(buckets)));
        }
        Reading::new(stats)
    }

    fn shown(view: &View, width: usize, height: usize) -> String {
        let lines = view.lines(width, height);
        assert!(lines.len() <= height, "{} lines on a screen of {height}", lines.len());
        let lines = lines.iter().map(|line| line.render(width, false).trim_end().to_owned());
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_memo_shows_rates_hit_ratio_and_latencies() {
        let mut view = View::new("127.0.0.1:7400");
        view.update(Interval::between(memo(8, "closed"), memo(10, "closed")));
        let expected =
            " memo 127.0.0.1:7400  afterimage 0.1.0                  up 10 s · 12 connections

 answers/s      100 k  █
 hit ratio    99.00 %  ██████████████████████████████▊  99.00 % since the start

                per s        p50        p99      p99.9        max
 hit           99.0 k    1.25 µs    1.25 µs    1.25 µs    1.25 µs
 coalesced        100          –          –          –          –
 miss             900    70.1 µs    70.1 µs    70.1 µs    70.1 µs

 in flight  17
 store      afterimage · connected · breaker closed · opened once
 classifier 900 calls/s · 0 failed · 1 of 2 connected
 refused    0 overloaded · 30 with a wrong seal

 audited                    1,234,567
 replica 1                  classifier-1.example.net:7402: healthy, model 501a1c7";
        let found = shown(&view, 81, 30);
        assert_eq!(found, expected, "found:\n{found}");
    }

    #[test]
    fn lines_fit_a_screen_of_any_size() {
        let mut view = View::new("a-host-with-a-long-name.example.net:7400");
        for round in 0..2 {
            for (width, height) in [(0, 0), (1, 1), (10, 3), (40, 10), (80, 24), (400, 100)] {
                for line in view.lines(width, height) {
                    assert!(line.render(width, false).chars().count() <= width);
                }
                assert!(view.lines(width, height).len() <= height);
            }
            if round == 0 {
                view.update(Interval::between(memo(1, "open"), memo(2, "open")));
            }
        }
    }

    #[test]
    fn a_lost_server_is_marked_and_keeps_its_last_reading() {
        let mut view = View::new("127.0.0.1:7400");
        view.update(Interval::single(memo(5, "open")));
        view.lost("connection refused".into());
        let found = shown(&view, 90, 24);
        assert!(found.contains("no answer: connection refused; retrying"), "{found}");
        assert!(found.contains("breaker open") && found.contains("hit ratio"), "{found}");
        view.update(Interval::single(memo(1, "closed")));
        assert!(!shown(&view, 90, 24).contains("no answer"));
    }

    #[test]
    fn a_cache_and_a_classifier_show_their_own_counters() {
        let mut view = View::new("c:1");
        let cache = |seconds: u64| {
            let mut stats = Stats::default();
            stats.push("service", Value::Text("cache".into()));
            stats.push("uptime_ms", Value::Counter(seconds * 1000));
            stats.push("hits", Value::Counter(seconds * 1_000_000));
            stats.push("misses", Value::Counter(0));
            stats.push("entries", Value::Gauge(250));
            stats.push("capacity", Value::Gauge(1000));
            stats.push("memory_bytes", Value::Gauge(1 << 20));
            stats.push("writes", Value::Counter(seconds * 500));
            stats.push("evictions", Value::Counter(0));
            stats.push("snapshots_failed", Value::Counter(0));
            stats.push("snapshot_running", Value::Gauge(1));
            stats.push("snapshot_age_ms", Value::Gauge(61_000));
            Reading::new(stats)
        };
        view.update(Interval::between(cache(1), cache(2)));
        let found = shown(&view, 100, 24);
        for text in [
            "reads/s       1.00 M",
            "100.00 %",
            "250 of 1,000  ██▌·······  25.00 % · 1.0 MiB",
            "500 /s",
            "1 min 1 s ago",
            "being written",
        ] {
            assert!(found.contains(text), "{text:?} in\n{found}");
        }
        let classifier = |seconds: u64| {
            let mut stats = Stats::default();
            stats.push("service", Value::Text("classifier".into()));
            stats.push("uptime_ms", Value::Counter(seconds * 1000));
            stats.push("engine_scored", Value::Counter(seconds * 1200));
            stats.push("engine_batches", Value::Counter(seconds * 100));
            stats.push("engine_queued", Value::Gauge(4));
            stats.push("engine_busy_us", Value::Counter(seconds * 1_500_000));
            Reading::new(stats)
        };
        let mut view = View::new("c:2");
        view.update(Interval::between(classifier(1), classifier(2)));
        let found = shown(&view, 100, 24);
        for text in [
            "images/s      1.20 k",
            "4 queued · 1.20 k images/s · mean batch 12.0 · 1.50 cores busy",
        ] {
            assert!(found.contains(text), "{text:?} in\n{found}");
        }
        assert!(!found.contains("hit ratio"), "{found}");
    }

    #[test]
    fn a_text_of_the_server_is_escaped() {
        let line = Line::default().push(Style::Plain, "a\x1b[2J\n");
        assert_eq!(line.render(80, true), r"a\u{1b}[2J\n");
    }

    #[test]
    fn a_line_is_cut_by_characters_without_styles() {
        let line = Line::default().push(Style::Bold, "µs").right(Style::Plain, "7", 3);
        assert_eq!(line.width(), 5);
        assert_eq!(line.render(4, false), "µs  ");
        assert_eq!(line.render(9, true), "\x1b[1mµs\x1b[0m  7");
        assert_eq!(line.clone().at_end(Style::Plain, "end", 9).render(9, false), "µs  7 end");
        assert_eq!(line.at_end(Style::Plain, "end", 8).render(9, false), "µs  7");
    }
}
