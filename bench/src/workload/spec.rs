//! A workload as a TOML file. The keys are the flags of `afterimage bench` without the dashes.
//!
//! ```toml
//! population = 100000       # images, or keys of a cache
//! images = "drawn"          # or an IDX file, or the folder of the MNIST files
//! access = "zipf"           # or "uniform", "scan" (in order, repeatedly), "once"
//! zipf = 1.0                # the exponent of Zipf's law; also: exponent
//! read-share = 0.95         # of requests to a cache; the others write
//! hit-ratio = 0.9           # the share of reads from the population
//! prefill = true            # ask about each image, or write each key, once before
//! warm-up = "2s"
//! duration = "30s"          # or count = 1000000
//! connections = 4
//! load-threads = 1          # also: threads
//! depth = 64                # or several, measured in turn: [1, 64, 1024]
//! batch = 1                 # keys in one command of Redis or memcached
//! rate = 100000             # requests per second (open loop); without it a closed loop
//! poisson = true            # random arrivals; also: arrivals = "poisson" or "constant"
//! seed = 1
//! pin = [1]                 # CPUs of the load threads
//! ```

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use super::Access;
use crate::error::BenchError;
use crate::plan::{Arrivals, Mode, Plan, Span};

/// The default number of images or keys.
pub const DEFAULT_POPULATION: u32 = 10_000;

/// The default length of a measurement.
pub const DEFAULT_DURATION: Duration = Duration::from_secs(10);

/// The default length of the warm-up.
pub const DEFAULT_WARM_UP: Duration = Duration::from_secs(1);

/// The settings of a workload; `None` for defaults. The module shows a file with all of them.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Spec {
    /// The number of images or keys.
    pub population: Option<u32>,
    /// The source of the images.
    pub images: Option<String>,
    /// The order of the requests.
    pub access: Option<Order>,
    /// The exponent of Zipf's law.
    #[serde(alias = "zipf")]
    pub exponent: Option<f64>,
    /// The share of requests to a cache that read, from 0 to 1.
    pub read_share: Option<f64>,
    /// The share of reads from the population, from 0 to 1.
    pub hit_ratio: Option<f64>,
    /// Whether the whole population is requested, or written, once before.
    pub prefill: Option<bool>,
    /// The length of the warm-up.
    #[serde(default, deserialize_with = "time")]
    pub warm_up: Option<Duration>,
    /// The length of the measurement.
    #[serde(default, deserialize_with = "time")]
    pub duration: Option<Duration>,
    /// The number of requests to measure.
    pub count: Option<u64>,
    /// The number of connections.
    pub connections: Option<usize>,
    /// The number of load threads.
    #[serde(alias = "load-threads")]
    pub threads: Option<usize>,
    /// Requests in flight on each connection, one number or several.
    #[serde(default, deserialize_with = "one_or_many")]
    pub depth: Option<Vec<usize>>,
    /// Keys in one command.
    pub batch: Option<usize>,
    /// Requests per second of an open loop.
    pub rate: Option<f64>,
    /// The spacing of requests in an open loop. `true` is Poisson.
    #[serde(default, alias = "poisson", deserialize_with = "spacing")]
    pub arrivals: Option<Spacing>,
    /// The random seed.
    pub seed: Option<u64>,
    /// CPUs to pin the load threads to.
    #[serde(default, deserialize_with = "one_or_many")]
    pub pin: Option<Vec<usize>>,
}

/// The names of the orders. See [`Access`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// All equally likely.
    Uniform,
    /// By Zipf's law.
    Zipf,
    /// In order, repeatedly.
    Scan,
    /// In order, each once.
    Once,
}

/// The names of the spacings of an open loop. See [`Arrivals`].
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
    /// One line with the line number and the wrong key or value.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or("");
            let line = before.matches('\n').count() + 1;
            format!("line {line}: {}", error.message().replace('\n', " "))
        })
    }

    /// These settings over those of `below`. Count and duration exclude each other: one of them
    /// here hides both of `below`.
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
            pin: self.pin.or(below.pin),
        }
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// [`BenchError::Plan`] when there is nothing to ask about or nothing to measure.
    pub fn check(&self) -> Result<(), BenchError> {
        let refuse = |what: &str| Err(BenchError::Plan { what: what.into() });
        match self {
            Spec { population: Some(0), .. } => refuse("population is 0; it must be 1 or more"),
            Spec { count: Some(0), .. } => refuse("count is 0; it must be 1 or more"),
            Spec { duration: Some(Duration::ZERO), .. } => {
                refuse("duration is 0; it must be above 0")
            }
            _ => Ok(()),
        }
    }

    /// The seed, or its default.
    pub fn seed(&self) -> u64 {
        self.seed.unwrap_or(1)
    }

    /// The depths to measure in turn, or the default.
    pub fn depths(&self) -> &[usize] {
        self.depth.as_deref().filter(|depths| !depths.is_empty()).unwrap_or(&[1])
    }

    /// Sets all fields of `plan` except the server and the target.
    ///
    /// # Errors
    /// [`BenchError::Plan`] when two settings exclude each other.
    pub fn apply(&self, plan: &mut Plan) -> Result<(), BenchError> {
        let refuse = |what: &str| Err(BenchError::Plan { what: what.into() });
        if self.duration.is_some() && self.count.is_some() {
            return refuse("duration and count exclude each other");
        }
        if self.arrivals.is_some() && self.rate.is_none() {
            return refuse("arrivals need a rate, the number of requests per second");
        }
        plan.access = match (self.access, self.exponent) {
            (None | Some(Order::Zipf), Some(exponent)) => Access::Zipf { exponent },
            (Some(Order::Zipf), None) => Access::Zipf { exponent: 1.0 },
            (_, Some(_)) => return refuse("the exponent needs access = \"zipf\""),
            (None | Some(Order::Uniform), None) => Access::Uniform,
            (Some(Order::Scan), None) => Access::Sequential,
            (Some(Order::Once), None) => Access::EachOnce,
        };
        plan.hit_ratio = self.hit_ratio;
        plan.prefill = self.prefill.unwrap_or(false);
        // A warm-up would use up the images.
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
        plan.pin = self.pin.clone().unwrap_or_default();
        Ok(())
    }
}

fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let text = String::deserialize(from)?;
    let time = humantime::parse_duration(&text)
        .map_err(|error| serde::de::Error::custom(format!("{text:?} is not a time: {error}")))?;
    Ok(Some(time))
}

fn spacing<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Spacing>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected true, false, \"poisson\" or \"constant\"")]
    enum Named {
        Poisson(bool),
        Spacing(Spacing),
    }
    Ok(match Named::deserialize(from)? {
        Named::Poisson(poisson) => poisson.then_some(Spacing::Poisson),
        Named::Spacing(spacing) => Some(spacing),
    })
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
        assert_eq!(plan.pin, [1]);
        // Only the count is missing in the example: it excludes the duration.
        let unset = format!("{spec:?}").matches("None").count();
        assert_eq!(unset, 1, "only the count: {spec:?}");
    }

    #[test]
    fn both_names_of_a_key_mean_the_same() {
        let one = "zipf = 1.5\nload-threads = 2\nrate = 5\npoisson = true\npin = 3";
        let other = "exponent = 1.5\nthreads = 2\nrate = 5\narrivals = \"poisson\"\npin = [3]";
        assert_eq!(Spec::parse(one).unwrap(), Spec::parse(other).unwrap());
        assert_eq!(Spec::parse("poisson = false").unwrap(), Spec::default());
    }

    #[test]
    fn nothing_to_measure_is_refused() {
        for text in ["population = 0", "count = 0", "duration = \"0s\""] {
            let error = Spec::parse(text).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(" is 0; it must be "), "{error}");
        }
    }

    #[test]
    fn an_unknown_key_is_one_line_that_names_it() {
        let error = refused("population = 5\nreadshare = 0.5");
        assert!(error.starts_with("line 2: unknown field `readshare`, expected one of"), "{error}");
        assert!(!error.contains('\n'));
        for (text, named) in [
            ("access = \"random\"", "random"),
            ("warm-up = \"soon\"", "\"soon\" is not a time"),
            ("depth = \"deep\"", "a number or a list"),
            ("population = -1", "-1"),
            ("duration = \"1s\"\ncount = 5", "exclude each other"),
            ("arrivals = \"poisson\"", "need a rate"),
            ("access = \"scan\"\nexponent = 1.0", "zipf"),
            ("hit-ratio", "line 1"),
        ] {
            let error = refused(text);
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn settings_on_top_hide_those_below() {
        let file = Spec::parse("seed = 1\nduration = \"30s\"\nrate = 5\ndepth = [1, 2]").unwrap();
        let flags = Spec { seed: Some(2), count: Some(7), ..Spec::default() };
        let both = flags.over(file.clone());
        assert_eq!((both.seed(), both.rate, both.depths()), (2, Some(5.0), &[1, 2][..]));
        assert_eq!((both.count, both.duration), (Some(7), None));
        assert_eq!(Spec::default().over(file.clone()), file);
        assert_eq!(Spec::default().depths(), [1]);
    }
}
