//! A hash of all events: two runs of one seed that differ anywhere get different hashes.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use tokio::time::Instant;

/// The hash of the events so far. Prints the events on request.
#[derive(Debug)]
pub(super) struct Trace {
    start: Instant,
    hasher: DefaultHasher,
    events: u64,
    prints: bool,
}

impl Trace {
    /// An empty trace. With `prints`, every event goes to standard error, too.
    pub(super) fn new(prints: bool) -> Self {
        // `DefaultHasher::new` is not randomized.
        Trace { start: Instant::now(), hasher: DefaultHasher::new(), events: 0, prints }
    }

    /// Records an event at the present time.
    pub(super) fn event(&mut self, what: impl Hash, text: impl FnOnce() -> String) {
        let at = self.start.elapsed();
        (at, what).hash(&mut self.hasher);
        self.events += 1;
        if self.prints {
            eprintln!("{:>7} ms  {}", at.as_millis(), text());
        }
    }

    /// The number of events, and their hash.
    pub(super) fn digest(&self) -> Digest {
        Digest { events: self.events, hash: self.hasher.finish() }
    }
}

/// A whole history in sixteen bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Digest {
    pub(super) events: u64,
    pub(super) hash: u64,
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x} over {} events", self.hash, self.events)
    }
}
