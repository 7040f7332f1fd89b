//! Determinism of a simulation: random numbers that depend only on the seed, and a hash of all
//! events that shows whether two runs of one seed differ.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::RangeInclusive;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::time::Instant;

/// Random numbers that depend only on a seed.
#[derive(Debug)]
pub(super) struct Dice(ChaCha8Rng);

impl Dice {
    /// The random numbers of one part of a simulation. Each part has its own stream, so that a
    /// change in one part does not change the numbers of another.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Dice(rng)
    }

    /// Any 64 bits.
    pub(super) fn bits(&mut self) -> u64 {
        self.0.next_u64()
    }

    /// A number below `bound`, which is not 0. For the bounds used here the bias is below 2⁻⁴⁰.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        (self.bits() % bound as u64) as usize
    }

    /// A number of this range.
    pub(super) fn of(&mut self, range: RangeInclusive<u64>) -> u64 {
        range.start() + self.bits() % (range.end() - range.start() + 1)
    }

    /// True in one of this many cases.
    pub(super) fn one_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }

    /// One of these values.
    pub(super) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

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
