//! Progress bars for work that takes longer than a second; silent without a terminal.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Shorter work needs no bar.
const PATIENCE: Duration = Duration::from_secs(1);

/// A bar on standard error that appears after a second, if that is a terminal.
pub(crate) struct Bar {
    bar: ProgressBar,
    started: Instant,
}

impl Bar {
    /// A bar of this many steps; 0 for a number not known.
    pub(crate) fn new(steps: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::hidden());
        let template = "{msg:28} [{bar:30}] {pos}/{len} {elapsed}, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        Bar { bar, started: Instant::now() }
    }

    /// Moves on to byte `done` of `length`, under this heading; 0 is a length not known.
    pub(crate) fn set_bytes(&self, heading: &str, done: u64, length: u64) {
        let template = match length {
            0 => "{msg:28} {bytes} {elapsed}, {binary_bytes_per_sec}",
            _ => "{msg:28} [{bar:30}] {bytes}/{total_bytes} {binary_bytes_per_sec}, {eta} left",
        };
        if self.bar.position() == 0
            && let Ok(style) = ProgressStyle::with_template(template)
        {
            self.bar.set_style(style.progress_chars("=> "));
        }
        self.set(heading, done, length);
    }

    /// Moves on to `done` of `steps`, under this heading.
    pub(crate) fn set(&self, heading: &str, done: u64, steps: u64) {
        if self.started.elapsed() > PATIENCE && self.bar.is_hidden() {
            // Draws nothing when standard error is not a terminal.
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        if self.bar.message() != heading {
            self.bar.set_message(heading.to_owned());
        }
        self.bar.set_length(steps);
        self.bar.set_position(done);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
