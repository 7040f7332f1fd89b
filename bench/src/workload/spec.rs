//! A workload as a TOML file, and what of it is set: the command line's flags are the same thing.
//!
//! ```toml
//! population = 100000       # images, or keys of a cache
//! images = "drawn"          # or an IDX file, or the folder of the MNIST files
//! access = "zipf"           # or "uniform", "scan" (over and over), "once"
//! exponent = 1.0            # of Zipf's law
//! read-share = 0.95         # of a cache's requests; the others write
//! hit-ratio = 0.9           # the share of reads that are about the population
//! prefill = true            # ask about each image, or write each key, once before
//! warm-up = "2s"
//! duration = "30s"          # or count = 1000000
//! connections = 4
//! threads = 1
//! depth = 64                # or several, to be measured in turn: [1, 64, 1024]
//! batch = 1                 # keys in one command, of Redis and memcached
//! rate = 100000             # requests a second; without it a closed loop
//! arrivals = "poisson"      # or "constant"
//! seed = 1
//! ```

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::Access;
use crate::plan::{Arrivals, BenchError, Mode, Plan, Span};

/// Images or keys, unless the workload says otherwise.
pub const DEFAULT_POPULATION: u32 = 10_000;

/// How long is measured, unless the workload says otherwise.
pub const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// How long is warmed up, unless the workload says otherwise.
pub const DEFAULT_WARM_UP: Duration = Duration::from_secs(1);

/// What a workload says; `None` for what it leaves to the defaults. The module shows a file with
/// all of it.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Spec {
    /// How many images or keys there are.
    pub population: Option<u32>,
    /// Where images come from.
    pub images: Option<String>,
    /// In which order the population is asked about.
    pub access: Option<Order>,
    /// The exponent of Zipf's law.
    pub exponent: Option<f64>,
    /// The share of requests to a cache that read, from 0 to 1.
    pub read_share: Option<f64>,
    /// The share of reads that are about the population, from 0 to 1.
    pub hit_ratio: Option<f64>,
    /// Whether all of the population is asked about, or written, once before.
    pub prefill: Option<bool>,
    /// How long to run before measuring.
    #[serde(default, deserialize_with = "time")]
    pub warm_up: Option<Duration>,
    /// How long to measure.
    #[serde(default, deserialize_with = "time")]
    pub duration: Option<Duration>,
    /// How many requests to measure.
    pub count: Option<u64>,
    /// Connections in all.
    pub connections: Option<usize>,
    /// Load threads.
    pub threads: Option<usize>,
    /// Requests in flight on each connection, one number or several.
    #[serde(default, deserialize_with = "one_or_many")]
    pub depth: Option<Vec<usize>>,
    /// Keys in one command.
    pub batch: Option<usize>,
    /// Requests a second of an open loop.
    pub rate: Option<f64>,
    /// How they are spaced.
    pub arrivals: Option<Spacing>,
    /// What all random numbers come from.
    pub seed: Option<u64>,
}

/// The orders that a workload can name. See [`Access`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Each one as likely as another.
    Uniform,
    /// By Zipf's law.
    Zipf,
    /// One after another, over and over.
    Scan,
    /// One after another, each once.
    Once,
}

/// The spacings of an open loop that a workload can name. See [`Arrivals`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Spacing {
    /// Evenly.
    Constant,
    /// At random.
    Poisson,
}

impl Spec {
    /// Reads a workload file's text.
    ///
    /// # Errors
    /// One line with the line's number, and the key or value that is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
            let line = before.matches('\n').count() + 1;
            format!("line {line}: {}", error.message().replace('\n', " "))
        })
    }

    /// This one where it says something, `below` where it does not. What ends a measurement is one
    /// thing: a count here leaves no duration from below, and the other way round.
    #[must_use]
    pub fn over(self, below: Spec) -> Spec {
        let ends = self.duration.is_some() || self.count.is_some();
        Spec {
            population: self.population.or(below.population),
            images: self.images.or(below.images),
            access: self.access.or(below.access),
            exponent: self.exponent.or(below.exponent),
            read_share: self.read_share.or(below.read_share),
            hit_ratio: self.hit_ratio.or(below.hit_ratio),
            prefill: self.prefill.or(below.prefill),
            warm_up: self.warm_up.or(below.warm_up),
            duration: if ends { self.duration } else { below.duration },
            count: if ends { self.count } else { below.count },
            connections: self.connections.or(below.connections),
            threads: self.threads.or(below.threads),
            depth: self.depth.or(below.depth),
            batch: self.batch.or(below.batch),
            rate: self.rate.or(below.rate),
            arrivals: self.arrivals.or(below.arrivals),
            seed: self.seed.or(below.seed),
        }
    }

    /// The seed, or its default.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(1)
    }

    /// The depths to measure in turn, or the default one.
    pub fn depths(&self) -> &[usize] {
        self.depth.as_deref().filter(|depths| !depths.is_empty()).unwrap_or(&[1])
    }

    /// Sets all of `plan` but whom it asks and what it asks about.
    ///
    /// # Errors
    /// [`BenchError::Plan`] when two settings contradict each other.
    pub fn apply(&self, plan: &mut Plan) -> Result<(), BenchError> {
        let refuse = |what: &str| Err(BenchError::Plan { what: what.into() });
        if self.duration.is_some() && self.count.is_some() {
            return refuse("duration and count both say when to end: choose one");
        }
        if self.arrivals.is_some() && self.rate.is_none() {
            return refuse("arrivals need a rate: how many requests a second?");
        }
        plan.access = match (self.access, self.exponent) {
            (None | Some(Order::Zipf), Some(exponent)) => Access::Zipf { exponent },
            (Some(Order::Zipf), None) => Access::Zipf { exponent: 1.0 },
            (_, Some(_)) => return refuse("an exponent is Zipf's: access must be \"zipf\""),
            (None | Some(Order::Uniform), None) => Access::Uniform,
            (Some(Order::Scan), None) => Access::Sequential,
            (Some(Order::Once), None) => Access::EachOnce,
        };
        plan.hit_ratio = self.hit_ratio;
        plan.prefill = self.prefill.unwrap_or(false);
        // What is asked about once must not be used up before.
        let once = plan.access == Access::EachOnce;
        let warm_up = if once { Duration::ZERO } else { DEFAULT_WARM_UP };
        let warm_up = self.warm_up.unwrap_or(warm_up);
        plan.warmup = if warm_up.is_zero() { Span::NONE } else { Span::Time(warm_up) };
        plan.stop = match self.count {
            Some(count) => Span::Requests(count),
            None => Span::Time(self.duration.unwrap_or(DEFAULT_DURATION)),
        };
        plan.connections = self.connections.unwrap_or(1);
        plan.threads = self.threads.unwrap_or(1);
        plan.depth = self.depths()[0];
        plan.batch = self.batch.unwrap_or(1);
        plan.mode = match (self.rate, self.arrivals) {
            (None, _) => Mode::Closed,
            (Some(rate), Some(Spacing::Poisson)) => {
                Mode::Open { rate, arrivals: Arrivals::Poisson }
            }
            (Some(rate), _) => Mode::Open { rate, arrivals: Arrivals::Constant },
        };
        plan.seed = self.seed();
        Ok(())
    }
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let time = humantime::parse_duration(&text)
        .map_err(|error| serde::de::Error::custom(format!("{text:?} is no time: {error}")))?;
    Ok(Some(time))
}

fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<usize>>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a number or a list of numbers")]
    enum Numbers {
        One(usize),
        Many(Vec<usize>),
    }
    Ok(Some(match Numbers::deserialize(from)? {
        Numbers::One(number) => vec![number],
        Numbers::Many(numbers) => numbers,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::Keys;

    /// The example of the module's documentation.
    fn example() -> String {
        let source = include_str!("spec.rs");
        let lines = source.lines().skip_while(|line| *line != "//! ```toml").skip(1);
        let lines = lines.take_while(|line| *line != "//! ```");
        lines.map(|line| line.trim_start_matches("//! ").to_owned() + "\n").collect()
    }

    fn plan() -> Plan {
        Plan::cache(([127, 0, 0, 1], 9).into(), Keys { count: 1, read_share: 1.0, salt: 0 })
    }

    fn refused(text: &str) -> String {
        match Spec::parse(text) {
            Err(error) => error,
            Ok(spec) => spec.apply(&mut plan()).unwrap_err().to_string(),
        }
    }

    #[test]
    fn the_documented_file_sets_everything() {
        let spec = Spec::parse(&example()).unwrap();
        let mut plan = plan();
        spec.apply(&mut plan).unwrap();
        assert_eq!((spec.population, spec.images.as_deref()), (Some(100_000), Some("drawn")));
        assert_eq!(plan.access, Access::Zipf { exponent: 1.0 });
        assert_eq!((spec.read_share, plan.hit_ratio, plan.prefill), (Some(0.95), Some(0.9), true));
        assert_eq!(plan.warmup, Span::Time(Duration::from_secs(2)));
        assert_eq!(plan.stop, Span::Time(Duration::from_secs(30)));
        assert_eq!((plan.connections, plan.threads, plan.depth, plan.batch), (4, 1, 64, 1));
        assert_eq!(plan.mode, Mode::Open { rate: 1e5, arrivals: Arrivals::Poisson });
        assert_eq!(plan.seed, 1);
        // Nothing that can be set is missing in the example, but what excludes another.
        let unset = format!("{spec:?}").matches("None").count();
        assert_eq!(unset, 1, "only the count: {spec:?}");
    }

    #[test]
    fn an_unknown_key_is_one_line_that_names_it() {
        let error = refused("population = 5\nreadshare = 0.5");
        assert!(error.starts_with("line 2: unknown field `readshare`, expected one of"), "{error}");
        assert!(!error.contains('\n'));
        for (text, named) in [
            ("access = \"random\"", "random"),
            ("warm-up = \"soon\"", "\"soon\" is no time"),
            ("depth = \"deep\"", "a number or a list"),
            ("population = -1", "-1"),
            ("duration = \"1s\"\ncount = 5", "choose one"),
            ("arrivals = \"poisson\"", "need a rate"),
            ("access = \"scan\"\nexponent = 1.0", "Zipf"),
            ("hit-ratio", "line 1"),
        ] {
            let error = refused(text);
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn what_is_on_top_hides_what_is_below() {
        let file = Spec::parse("seed = 1\nduration = \"30s\"\nrate = 5\ndepth = [1, 2]").unwrap();
        let flags = Spec { seed: Some(2), count: Some(7), ..Spec::default() };
        let both = flags.over(file.clone());
        assert_eq!((both.seed(), both.rate, both.depths()), (2, Some(5.0), &[1, 2][..]));
        assert_eq!((both.count, both.duration), (Some(7), None));
        assert_eq!(Spec::default().over(file.clone()), file);
        assert_eq!(Spec::default().depths(), [1]);
    }
}
