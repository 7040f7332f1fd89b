//! The loop of the live view: it reads, draws, and ends on a signal or a key.

use std::io;
use std::io::{IsTerminal, Read, Write};
use std::time::Duration;

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_memo::metrics as memo;
use afterimage_wire::Admin;
use afterimage_wire::client::Report;
use afterimage_wire::server::{metrics as server, until_terminated};
use afterimage_wire::text::escape_text;
use anyhow::Context;
use tokio::sync::mpsc;

use super::reading::{Interval, Reading};
use super::report;
use super::view::{Line, View};
use crate::format::{nanos, percent, short};
use crate::print;
use crate::print::say;

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

/// The size of a terminal that reports none.
const DEFAULT_SIZE: (usize, usize) = (80, 24);

/// The alternate screen without cursor and echo. Dropped, it restores the terminal.
pub(super) struct Screen {
    styled: bool,
    #[cfg(unix)]
    before: Option<rustix::termios::Termios>,
}

impl Screen {
    /// Opens the screen if standard output is a terminal.
    pub(super) fn open() -> io::Result<Option<Screen>> {
        if !io::stdout().is_terminal() {
            return Ok(None);
        }
        let styled = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let screen = Screen {
            styled,
            #[cfg(unix)]
            before: quiet(),
        };
        // The alternate screen (1049), and no cursor (25).
        write_out("\x1b[?1049h\x1b[?25l")?;
        Ok(Some(screen))
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> (usize, usize) {
        #[cfg(unix)]
        if let Ok(size) = rustix::termios::tcgetwinsize(io::stdout())
            && size.ws_col > 0
            && size.ws_row > 0
        {
            return (size.ws_col.into(), size.ws_row.into());
        }
        DEFAULT_SIZE
    }

    /// Shows `lines`, no wider than `width`, and nothing else.
    pub(super) fn show(&self, lines: &[Line], width: usize) -> io::Result<()> {
        // A terminal that supports mode 2026 draws the frame at once, without flicker.
        let mut frame = String::from("\x1b[?2026h\x1b[H");
        for (i, line) in lines.iter().enumerate() {
            if i > 0 {
                frame.push_str("\r\n");
            }
            frame.push_str(&line.render(width, self.styled));
            frame.push_str("\x1b[K");
        }
        frame.push_str("\x1b[J\x1b[?2026l");
        write_out(&frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write_out("\x1b[?25h\x1b[?1049l");
        #[cfg(unix)]
        if let Some(before) = &self.before {
            let now = rustix::termios::OptionalActions::Now;
            let _ = rustix::termios::tcsetattr(io::stdin(), now, before);
        }
    }
}

fn write_out(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Turns off echo and line input, and returns the previous state. Ctrl-C still sends a signal.
/// Ctrl-Z does not: a stopped process would leave its screen behind.
#[cfg(unix)]
fn quiet() -> Option<rustix::termios::Termios> {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};
    let before = tcgetattr(io::stdin()).ok()?;
    let mut now = before.clone();
    now.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON);
    now.special_codes[SpecialCodeIndex::VSUSP] = 0;
    tcsetattr(io::stdin(), OptionalActions::Now, &now).ok()?;
    Some(before)
}
