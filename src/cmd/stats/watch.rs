//! The loop of the live view: it reads, draws, and ends on a signal or a key.

use std::io::{self, Read};
use std::time::Duration;

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_memo::metrics as memo;
use afterimage_wire::Admin;
use afterimage_wire::client::Report;
use afterimage_wire::server::metrics as server;
use afterimage_wire::server::until_terminated;
use afterimage_wire::text::escape_text;
use anyhow::Context;
use tokio::sync::mpsc;

use super::reading::{Interval, Reading};
use super::report;
use super::screen::Screen;
use super::view::View;
use crate::format::{nanos, percent, short};
use crate::print::{self, say};

/// Shows the statistics until Ctrl-C, SIGTERM or the key q: on a terminal as a screen, elsewhere as
/// lines. After a lost connection it retries.
pub(super) async fn watch(
    admin: &Admin,
    server: &str,
    every: Duration,
    json: bool,
) -> anyhow::Result<()> {
    let screen = if json { None } else { Screen::open().context("the terminal")? };
    let mut terminated = std::pin::pin!(until_terminated());
    let mut keys = screen.as_ref().map(|_| keys());
    let mut resized = Resized::new();
    let mut looks = looks(admin.clone(), every);
    let (mut view, mut before) = (View::new(server), None);
    loop {
        tokio::select! {
            biased;
            () = &mut terminated => break,
            Some(key) = key(&mut keys) => if matches!(key, b'q' | b'Q') { break },
            () = resized.recv() => {}
            look = looks.recv() => {
                let Some(look) = look else { break };
                let outcome = look.map(|now| {
                    let interval = match before.replace(now.clone()) {
                        Some(before) => Interval::between(before, now),
                        None => Interval::single(now),
                    };
                    view.update(interval.clone());
                    interval
                });
                if let Err(why) = &outcome {
                    view.lost(why.clone());
                }
                if screen.is_none() {
                    print(server, &outcome, json)?;
                }
            }
        }
        if let Some(screen) = &screen {
            let (width, height) = screen.size();
            screen.show(&view.lines(width, height), width).context("the terminal")?;
        }
    }
    Ok(())
}

/// A reading, or the error of one.
type Look = Result<Reading, String>;

/// Reads the statistics at this interval. A slow reading delays the next one.
fn looks(admin: Admin, every: Duration) -> mpsc::Receiver<Look> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut ticks = tokio::time::interval(every);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let look =
                admin.stats().await.map(Reading::new).map_err(|error| Report(&error).to_string());
            if sender.send(look).await.is_err() {
                return;
            }
        }
    });
    receiver
}

/// The pressed keys. The thread ends with the process: a read from a terminal cannot be cancelled.
fn keys() -> mpsc::Receiver<u8> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        let mut key = [0];
        while let Ok(1) = io::stdin().read(&mut key) {
            if sender.blocking_send(key[0]).is_err() {
                return;
            }
        }
    });
    receiver
}

async fn key(keys: &mut Option<mpsc::Receiver<u8>>) -> Option<u8> {
    match keys {
        Some(keys) => keys.recv().await,
        None => None,
    }
}

/// Reports that the terminal has a new size.
struct Resized {
    #[cfg(unix)]
    signals: Option<tokio::signal::unix::Signal>,
}

impl Resized {
    fn new() -> Self {
        Resized {
            #[cfg(unix)]
            signals: {
                use tokio::signal::unix::{SignalKind, signal};
                signal(SignalKind::window_change()).ok()
            },
        }
    }

    async fn recv(&mut self) {
        #[cfg(unix)]
        if let Some(signals) = &mut self.signals
            && signals.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

/// Prints one line.
fn print(server: &str, outcome: &Result<Interval, String>, json: bool) -> anyhow::Result<()> {
    match outcome {
        Ok(interval) if json => print::json(&report::json(server, interval).to_string()),
        Ok(interval) => say!("{}", line(interval)),
        Err(why) if json => {
            print::json(&serde_json::json!({"server": server, "error": why}).to_string())
        }
        Err(why) => say!("no answer: {}", escape_text(why)),
    }
}

/// The most important rates of an interval, in a line.
fn line(interval: &Interval) -> String {
    let mut parts = Vec::new();
    let mut rate = |name: &str, counter: &str| {
        if let Some(rate) = interval.rate(counter) {
            parts.push(format!("{name} {}/s", short(rate)));
        }
    };
    rate("requests", server::REQUESTS.name);
    rate("hits", cache::HITS.name);
    rate("misses", cache::MISSES.name);
    rate("coalesced", memo::COALESCED.name);
    rate("scored", engine::SCORED.name);
    rate("writes", cache::WRITES.name);
    rate("evictions", cache::EVICTIONS.name);
    if let Some(ratio) = interval.recent_hit_ratio() {
        parts.push(format!("hit ratio {}", percent(ratio)));
    }
    for (name, histogram) in [("hit", memo::HIT_LATENCY.name), ("miss", memo::MISS_LATENCY.name)] {
        if let Some(recent) = interval.recent(histogram).filter(|recent| recent.count > 0) {
            parts.push(format!("{name} p50 {} p99 {}", nanos(recent.p50), nanos(recent.p99)));
        }
    }
    for (name, counter) in [
        ("in flight", memo::WAITING.name),
        ("queued", engine::QUEUED.name),
        ("entries", cache::ENTRIES.name),
    ] {
        if let Some(number) = interval.now.number(counter) {
            parts.push(format!("{name} {number}"));
        }
    }
    if let Some(breaker) = interval.now.text(memo::STORE_BREAKER.name) {
        parts.push(format!("breaker {breaker}"));
    }
    parts.join("  ")
}
