//! The plan of a history, drawn from its seed before it starts.

use std::time::Duration;

use super::determinism::Dice;
use super::network::Host;
use super::{CACHE, CLASSIFIERS, CLIENTS, MAX_CLASSIFIERS, MEMO};

/// The time in which the faults of a history start. Requests come all the time.
pub(super) const STORM_MS: u64 = 2000;

/// The setting of a history.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) seed: u64,
    pub(super) weather: Weather,
    pub(super) clients: usize,
    pub(super) classifiers: usize,
    pub(super) images: u8,
    pub(super) models: u8,
    /// Whether the memo's store is a cache across the network.
    pub(super) remote_cache: bool,
    pub(super) lookup_budget: Duration,
    /// The longest time of the classifier for an image.
    pub(super) classifier_ms: u64,
    pub(super) classifier_timeout: Duration,
    pub(super) max_waiting: usize,
    /// The limit of requests in flight on a connection.
    pub(super) window: usize,
}

/// The kinds of faults in a history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weather {
    /// No faults: every request must succeed, and no image is computed twice.
    Calm,
    /// Faults of the cache only: every request must succeed, and soon.
    CacheOnly,
    /// Faults of one of several classifiers with the same model: every request must succeed.
    OneReplica,
    /// All kinds of faults.
    Stormy,
}

/// A request: its client, image, time and timeout.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) at: Duration,
    pub(super) client: usize,
    pub(super) image: u8,
    pub(super) timeout: Duration,
    pub(super) manner: Manner,
}

/// The way in which a client makes a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    /// Through a callback, which also gets the model. A lost request stays lost.
    Callback,
    /// Through a future. The client repeats a lost request.
    Wait,
    /// Through a future that is dropped after this time.
    HangUp(Duration),
}

/// A fault, its start and its duration.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    pub(super) at: Duration,
    pub(super) lasts: Duration,
    pub(super) what: Trouble,
}

/// A kind of fault.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trouble {
    /// A process ends, with its machine (`silent`) or alone. It restarts with its table or with an
    /// empty one.
    Crash { host: Host, silent: bool, keep: bool },
    /// A process is terminated, and the next one starts after it.
    Drain { host: Host, keep: bool },
    /// A process is stopped and continues.
    Stop { host: Host },
    /// A link transports nothing.
    Cut { a: Host, b: Host },
    /// A link is slow.
    Slow { a: Host, b: Host },
    /// All connections of a link are reset.
    Reset { a: Host, b: Host },
    /// Invalid values are written into the cache.
    Poison,
    /// A classifier gives labels that its model does not have.
    Corrupt { host: Host },
    /// A classifier is terminated, and the next one has another model.
    NewModel { host: Host, model: u8 },
}

impl Settings {
    /// The history of a seed.
    pub(super) fn of(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 3);
        let weather = match seed % 8 {
            0 => Weather::Calm,
            1 | 2 => Weather::CacheOnly,
            3 => Weather::OneReplica,
            _ => Weather::Stormy,
        };
        let stormy = weather == Weather::Stormy;
        let calm = weather == Weather::Calm;
        Settings {
            seed,
            weather,
            clients: 1 + dice.below(4),
            classifiers: match weather {
                Weather::OneReplica => dice.pick(&[2, 2, MAX_CLASSIFIERS]),
                _ => dice.pick(&[1, 1, 2, MAX_CLASSIFIERS]),
            },
            images: dice.pick(&[1, 4, 20, 60]),
            models: if stormy { dice.pick(&[2, 3]) } else { dice.pick(&[1, 3]) },
            remote_cache: weather == Weather::CacheOnly || dice.one_in(2),
            // In calm weather, calls are counted: the largest values arrive within the budget.
            lookup_budget: Duration::from_millis(dice.of(15..=30)) * if calm { 4 } else { 1 },
            classifier_ms: dice.of(0..=40),
            classifier_timeout: Duration::from_millis(dice.of(100..=1000)),
            max_waiting: if stormy { dice.pick(&[3, 20, 10_000]) } else { 10_000 },
            window: if stormy { dice.pick(&[8, 16, 4096]) } else { 4096 },
        }
    }

    /// The requests of a history in order of time.
    pub(super) fn asks(&self) -> Vec<Ask> {
        let mut dice = Dice::new(self.seed, 4);
        let mut asks = Vec::new();
        for _ in 0..20 + dice.below(80) {
            let at = Duration::from_millis(dice.of(0..=STORM_MS));
            let (image, crowd) = (self.image(&mut dice), dice.one_in(8));
            // Sometimes many clients request the same image at the same time.
            for _ in 0..if crowd { 2 + dice.below(20) } else { 1 } {
                asks.push(self.ask(&mut dice, at, image));
            }
        }
        asks.sort_by_key(|ask| ask.at);
        asks
    }

    fn ask(&self, dice: &mut Dice, at: Duration, image: u8) -> Ask {
        let (timeout_ms, manner) = match self.weather {
            Weather::Stormy => {
                let hangs_up = Duration::from_millis(dice.of(1..=60));
                let manners = [Manner::Callback, Manner::Callback, Manner::Wait];
                let manner =
                    if dice.one_in(6) { Manner::HangUp(hangs_up) } else { dice.pick(&manners) };
                (dice.pick(&[5, 30, 100, 500, 2000, 70_000]), manner)
            }
            _ => (5000, dice.pick(&[Manner::Callback, Manner::Wait])),
        };
        let (client, timeout) = (dice.below(self.clients), Duration::from_millis(timeout_ms));
        Ask { at, client, image, timeout, manner }
    }

    /// A random image.
    pub(super) fn image(&self, dice: &mut Dice) -> u8 {
        dice.below(self.images.into()) as u8
    }

    /// The faults of a history.
    pub(super) fn faults(&self) -> Vec<Fault> {
        let mut dice = Dice::new(self.seed, 5);
        let count = if self.weather == Weather::Calm { 0 } else { 1 + dice.below(8) };
        (0..count)
            .map(|_| Fault {
                at: Duration::from_millis(dice.of(20..=STORM_MS)),
                lasts: Duration::from_millis(dice.pick(&[1, 20, 150, 600])),
                what: self.trouble(&mut dice),
            })
            .collect()
    }

    fn trouble(&self, dice: &mut Dice) -> Trouble {
        let classifier = CLASSIFIERS + dice.below(self.classifiers);
        let (host, other, kinds) = match self.weather {
            Weather::Stormy => {
                let other = CLIENTS + dice.below(self.clients);
                (dice.pick(&[MEMO, CACHE, classifier, classifier]), other, 12)
            }
            Weather::OneReplica => (CLASSIFIERS, MEMO, 7),
            Weather::Calm | Weather::CacheOnly => (CACHE, MEMO, 8),
        };
        // Each link ends at the memo.
        let (a, b) = (MEMO, if host == MEMO { other } else { host });
        let (keep, silent) = (dice.one_in(2), dice.one_in(3));
        match dice.below(kinds) {
            0 | 1 => Trouble::Crash { host, silent, keep },
            2 => Trouble::Drain { host, keep },
            3 => Trouble::Stop { host },
            4 => Trouble::Cut { a, b },
            5 => Trouble::Slow { a, b },
            6 => Trouble::Reset { a, b },
            7 => Trouble::Poison,
            8 => Trouble::Corrupt { host: classifier },
            _ => {
                let model = 1 + dice.below(self.models.into()) as u8;
                Trouble::NewModel { host: classifier, model }
            }
        }
    }
}
