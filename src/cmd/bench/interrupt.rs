//! Signals during a measurement: Ctrl-C, SIGTERM, SIGQUIT, and SIGHUP (a closed terminal). The run
//! ends early, and its figures are kept.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread;

use afterimage_bench::Cancel;
use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Exit codes: 128 plus the number of the signal, as shells do.
const SIGHUP: u8 = 128 + 1;
const SIGINT: u8 = 128 + 2;
const SIGQUIT: u8 = 128 + 3;
const SIGTERM: u8 = 128 + 15;

/// The error of a command that a signal has ended early.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted {
    /// The exit code.
    pub(crate) code: u8,
}

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self.code {
            SIGHUP => "SIGHUP",
            SIGINT => "Ctrl-C",
            SIGQUIT => "SIGQUIT",
            _ => "SIGTERM",
        };
        write!(f, "interrupted by {name}; the figures cover the time until then")
    }
}

impl std::error::Error for Interrupted {}

/// The signals since its creation. The first one cancels the runs, the second ends the process.
#[derive(Clone, Debug)]
pub(crate) struct Interrupts {
    code: Arc<AtomicU8>,
    cancel: Cancel,
}

impl Interrupts {
    /// Takes over these signals of this process.
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let interrupts = Interrupts { code: Arc::new(AtomicU8::new(0)), cancel: Cancel::default() };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("cannot watch for signals")?;
        let mut signals = {
            let _guard = runtime.enter();
            let watched = |kind| signal(kind).context("cannot watch for signals");
            [
                watched(SignalKind::hangup())?,
                watched(SignalKind::interrupt())?,
                watched(SignalKind::quit())?,
                watched(SignalKind::terminate())?,
            ]
        };
        let theirs = interrupts.clone();
        thread::spawn(move || {
            runtime.block_on(async {
                let first = next(&mut signals).await;
                theirs.code.store(first, Ordering::Relaxed);
                theirs.cancel.cancel();
                std::process::exit(next(&mut signals).await.into());
            });
        });
        Ok(interrupts)
    }

    /// The value that ends runs early.
    pub(crate) fn cancel(&self) -> Cancel {
        self.cancel.clone()
    }

    /// The error of an interrupted command; `None` while there was no signal.
    pub(crate) fn happened(&self) -> Option<Interrupted> {
        match self.code.load(Ordering::Relaxed) {
            0 => None,
            code => Some(Interrupted { code }),
        }
    }
}

async fn next([hangup, int, quit, term]: &mut [Signal; 4]) -> u8 {
    tokio::select! {
        _ = hangup.recv() => SIGHUP,
        _ = int.recv() => SIGINT,
        _ = quit.recv() => SIGQUIT,
        _ = term.recv() => SIGTERM,
    }
}
