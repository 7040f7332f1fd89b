//! The plan of a run: server, target, order, schedule and limits.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use afterimage_wire::tls::ClientTls;

use crate::address::Login;
use crate::address::Peer;
use crate::dialect::Dialect;
use crate::workload::{Access, Answers, Calls, Keys, MAX_POPULATION, Population, STAMP_LEN};

/// The deepest window of a connection. A million requests in flight is past what any buffer on the
/// way holds; and it leaves 44 bits of the request id for a number that is never used twice.
pub const MAX_DEPTH: usize = 1 << 20;

/// The most connections of one run: as many as a process may have files open on most machines.
pub const MAX_CONNECTIONS: usize = 65_536;

/// The most keys in one command. Some hundreds cost a peer no less for each key than more do; and
/// memcached wants a command's end before its line grows too long.
pub const MAX_BATCH: usize = 1024;

/// How long a request may stay unanswered unless the plan says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(5);

/// The settings of a run. Start from [`Plan::classify`] or [`Plan::cache`] and change
/// fields.
#[derive(Clone)]
pub struct Plan {
    /// The address of the server.
    pub addr: SocketAddr,
    /// Its protocol.
    pub dialect: Dialect,
    /// Keys that one command asks for at most, where the dialect has such commands. Each key
    /// counts as a request.
    pub batch: usize,
    /// The token for the handshake, or the password of Redis; empty for none.
    pub token: Vec<u8>,
    /// The user and the database of Redis.
    pub login: Login,
    /// TLS, for every connection; `None` for none.
    pub tls: Option<ClientTls>,
    /// The requests.
    pub target: Target,
    /// The order of the requests.
    pub access: Access,
    /// The share of reads from the population, from 0 to 1; the others use new images or keys,
    /// which always miss. `None` for all reads.
    pub hit_ratio: Option<f64>,
    /// Connections in all, spread over the threads.
    pub connections: usize,
    /// Load threads.
    pub threads: usize,
    /// Requests in flight on each connection, at most.
    pub depth: usize,
    /// Closed or open loop.
    pub mode: Mode,
    /// Whether each image is sent, or each key written, once before the warm-up.
    pub prefill: bool,
    /// The warm-up; its answers are checked and not counted.
    pub warmup: Span,
    /// The length of the measurement.
    pub stop: Span,
    /// After this time a request counts as timed out; also the limit for connecting.
    pub timeout: Duration,
    /// The CPUs of the load threads, in turn; empty for the system's choice.
    pub pin: Vec<usize>,
    /// Decides every random choice: same seed, same requests on every connection.
    pub seed: u64,
    /// Ends the run early.
    pub cancel: Cancel,
}

/// A request to end a run early. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Ends the runs with this value: they send nothing more, wait for the answers in flight, and
    /// report what they measured.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`Cancel::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// The requests to the server.
#[derive(Clone, Debug)]
pub enum Target {
    /// The class of an image: of a memo or a classifier.
    Classify {
        /// The images.
        population: Arc<Population>,
        /// The expected answers. Share it between runs to check them against each other.
        answers: Arc<Answers>,
    },
    /// The values of keys: of a cache.
    Cache(Keys),
    /// The answers of a model server over HTTP.
    Call(Arc<Calls>),
}

/// The rule for sending requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mode {
    /// An answer triggers the next request. Measures the capacity of a server. A slow server gets
    /// fewer requests, so its worst moments count too little in the latencies.
    Closed,
    /// A schedule triggers the requests, whether or not earlier ones were answered.
    Open {
        /// Requests a second, over all connections.
        rate: f64,
        /// How they are spaced.
        arrivals: Arrivals,
    },
}

/// How the arrivals of an open loop are spaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrivals {
    /// Evenly.
    Constant,
    /// At random and independently, as many users together.
    Poisson,
}

/// The length of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// This time. The answers in flight at its end are awaited.
    Time(Duration),
    /// Until this number of requests, over all connections, have been sent and answered.
    Requests(u64),
}

impl Span {
    /// Nothing: the warm-up of a run without one.
    pub const NONE: Span = Span::Requests(0);
}

/// The highest rate of a schedule, one request each nanosecond. A higher one would never stop
/// being late.
pub const MAX_RATE: f64 = 1e9;

impl Plan {
    /// The server and how to connect to it.
    pub(crate) fn peer(&self) -> Peer<'_> {
        let Plan { addr, dialect, timeout, .. } = *self;
        let (token, login, tls) = (&self.token, &self.login, self.tls.as_ref());
        Peer { addr, dialect, token, login, tls, timeout }
    }

    /// Ten seconds of random images on one connection, one at a time. The first answer for each
    /// image is the expected one.
    pub fn classify(addr: SocketAddr, population: Arc<Population>) -> Self {
        let answers = Arc::new(Answers::first_come(population.len()));
        Plan::new(addr, Target::Classify { population, answers })
    }

    /// Ten seconds of random keys on one connection, one at a time.
    pub fn cache(addr: SocketAddr, keys: Keys) -> Self {
        Plan::new(addr, Target::Cache(keys))
    }

    /// Ten seconds of random calls on one connection, one at a time. The first answer to each call
    /// is the expected one.
    pub fn call(addr: SocketAddr, calls: Arc<Calls>) -> Self {
        Plan { dialect: Dialect::Http, ..Plan::new(addr, Target::Call(calls)) }
    }

    /// The plan as it is run: a connection of HTTP has one request in flight, so the depth is a
    /// number of connections.
    pub(crate) fn spread(&self) -> Self {
        let mut plan = self.clone();
        if plan.dialect == Dialect::Http {
            (plan.connections, plan.depth) = (plan.connections.saturating_mul(plan.depth), 1);
        }
        plan
    }

    fn new(addr: SocketAddr, target: Target) -> Self {
        Plan {
            addr,
            dialect: Dialect::Wire,
            batch: 1,
            token: Vec::new(),
            login: Login::default(),
            tls: None,
            target,
            access: Access::Uniform,
            hit_ratio: None,
            connections: 1,
            threads: 1,
            depth: 1,
            mode: Mode::Closed,
            prefill: false,
            warmup: Span::NONE,
            stop: Span::Time(Duration::from_secs(10)),
            timeout: DEFAULT_TIMEOUT,
            pin: Vec::new(),
            seed: 1,
            cancel: Cancel::default(),
        }
    }

    /// The number of images or keys.
    pub(crate) fn subjects(&self) -> u32 {
        match &self.target {
            Target::Classify { population, .. } => {
                u32::try_from(population.len()).expect("a population has at most u32::MAX images")
            }
            Target::Cache(keys) => keys.count,
            Target::Call(calls) => u32::try_from(calls.len()).unwrap_or(u32::MAX),
        }
    }

    /// The first fault of the plan, if there is one.
    pub(crate) fn validate(&self) -> Result<(), String> {
        let refuse = |what: String| Err(what);
        let between = |name, value: usize, limit: usize| {
            if (1..=limit).contains(&value) {
                return Ok(());
            }
            refuse(format!("{name} is {value}; it must be from 1 to {limit}"))
        };
        between("connections", self.connections, MAX_CONNECTIONS)?;
        between("threads", self.threads, self.connections)?;
        between("depth", self.depth, MAX_DEPTH)?;
        between("batch", self.batch, MAX_BATCH)?;
        let dialect = self.dialect;
        if self.batch > 1 && !dialect.takes_batches() {
            return refuse(format!("batch is {}; {dialect} has no such command", self.batch));
        }
        if self.timeout.is_zero() {
            return refuse("timeout is 0; every request would fail".into());
        }
        if matches!(self.stop, Span::Requests(0) | Span::Time(Duration::ZERO)) {
            return refuse(
                "the measurement has no length; count and duration must be above 0".into(),
            );
        }
        if self.subjects() == 0 {
            return refuse("the population is 0; it must be 1 or more".into());
        }
        if self.subjects() as usize > MAX_POPULATION {
            let count = self.subjects();
            return refuse(format!("the population is {count}; the limit is {MAX_POPULATION}"));
        }
        if let Mode::Open { rate, .. } = self.mode
            && !(rate > 0.0 && rate <= MAX_RATE)
        {
            return refuse(format!("rate is {rate}; it must be above 0 and at most {MAX_RATE}"));
        }
        match self.access {
            Access::Zipf { exponent } if !(exponent.is_finite() && exponent >= 0.0) => {
                return refuse(format!("Zipf's exponent is {exponent}; it must be 0 or more"));
            }
            Access::EachOnce if self.warmup != Span::NONE => {
                return refuse(
                    "access \"once\" sends each image once; set the warm-up to 0s".into(),
                );
            }
            _ => {}
        }
        self.validate_hit_ratio()?;
        match &self.target {
            Target::Call(_) if dialect != Dialect::Http => {
                refuse(format!("a {dialect} server does not take HTTP calls"))
            }
            Target::Classify { .. } | Target::Cache(_) if dialect == Dialect::Http => {
                refuse("an HTTP server takes calls, not images or keys".into())
            }
            Target::Classify { .. } if dialect != Dialect::Wire => {
                refuse(format!("{dialect} servers do not classify images"))
            }
            Target::Cache(keys)
                if dialect == Dialect::Echo && (self.prefill || keys.read_share < 1.0) =>
            {
                refuse("an echo server does not confirm writes; the read share must be 1".into())
            }
            Target::Cache(keys) if !(0.0..=1.0).contains(&keys.read_share) => {
                let share = keys.read_share;
                refuse(format!("the read share is {share}; it must be from 0 to 1"))
            }
            Target::Classify { population, answers } if answers.len() != population.len() => {
                let (answers, images) = (answers.len(), population.len());
                refuse(format!("there are {answers} answers for {images} images"))
            }
            _ => Ok(()),
        }
    }
}

impl Plan {
    fn validate_hit_ratio(&self) -> Result<(), String> {
        let Some(ratio) = self.hit_ratio else { return Ok(()) };
        let refuse = |what: String| Err(what);
        if !(0.0..=1.0).contains(&ratio) {
            return refuse(format!("the hit ratio is {ratio}; it must be from 0 to 1"));
        }
        match &self.target {
            Target::Classify { population, .. } if population.image_len() < STAMP_LEN => {
                let len = population.image_len();
                refuse(format!("images have {len} bytes; a hit ratio needs {STAMP_LEN} or more"))
            }
            Target::Cache(_) if self.dialect == Dialect::Echo => {
                refuse("an echo server has no misses; remove the hit ratio".into())
            }
            Target::Call(_) => refuse(
                "an HTTP target has no hit ratio; a larger population with the access scan has misses"
                    .into(),
            ),
            _ => Ok(()),
        }
    }
}
