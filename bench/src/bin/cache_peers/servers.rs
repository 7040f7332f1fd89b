//! The compared servers, their loads and their figures.

use std::path::Path;
use std::time::Duration;

use afterimage_bench::workload::Keys;
use afterimage_bench::{Dialect, Plan, Report, Span, Target};

use crate::harness::{self, Process, Result, checked};

const MEASURE: Duration = Duration::from_millis(1000);
const WARMUP: Duration = Duration::from_millis(250);

/// A server on CPU 0, and how it is asked.
pub(super) struct Server {
    pub(super) process: Process,
    dialect: Dialect,
    /// Keys in a command, and connections.
    pub(super) way: (Dialect, usize, usize),
}

impl Server {
    fn new(dialect: Dialect, process: Process) -> Self {
        Server { process, dialect, way: (dialect, 1, 1) }
    }

    pub(super) fn telling(dialect: Dialect, program: &Path, arguments: &[&str]) -> Result<Self> {
        Ok(Server::new(dialect, Process::telling(program, arguments)?))
    }

    pub(super) fn afterimage(binary: &Path, entries: u64) -> Result<Self> {
        let entries = entries.to_string();
        let listen = ["cache", "--listen", "127.0.0.1:0", "--threads", "1", "--log", "warn"];
        let arguments = [&listen[..], &["--entries", &entries]].concat();
        Server::telling(Dialect::Wire, binary, &arguments)
    }

    pub(super) fn redis() -> Result<Self> {
        Ok(Server::new(Dialect::Redis, harness::redis()?))
    }

    /// One worker, which serves a connection for as long as it has requests; no compare-and-swap
    /// numbers, small chunks and a hash table of the right size from the start.
    pub(super) fn memcached(keys: u32) -> Result<Self> {
        let power = (keys.next_power_of_two().trailing_zeros()).to_string();
        let power = format!("hashpower={power},no_lru_crawler");
        let one = ["-t", "1", "-R", "100000", "-m", "8192", "-C", "-n", "24", "-o", &power];
        let place = ["-u", "nobody", "-l", "127.0.0.1", "-U", "0"];
        let arguments = [&one[..], &place].concat();
        let process = Process::told("memcached", &arguments, "-p", |_| {})?;
        Ok(Server::new(Dialect::Memcached, process))
    }

    pub(super) fn plan(&self, count: u32, depth: usize) -> Plan {
        let (dialect, batch, connections) = self.way;
        Plan {
            dialect,
            batch: batch.min(depth),
            connections,
            // The depth is that of all connections together.
            depth: (depth / connections).max(1),
            stop: Span::Time(MEASURE),
            timeout: Duration::from_secs(30),
            pin: vec![1],
            ..Plan::cache(self.process.addr, keys(count, 1))
        }
    }

    /// Writes each key once.
    pub(super) fn fill(&self, keys: Keys) -> Result<()> {
        let plan = self.plan(keys.count, 4096);
        let target = Target::Cache(keys);
        checked(&Plan { target, prefill: true, stop: Span::NONE, ..plan })?;
        Ok(())
    }

    /// Warms up, then measures what `plan` says, and the server's CPU time for each answer with it:
    /// that does not change when others want the same CPUs.
    pub(super) fn measure(&self, plan: &Plan) -> Result<Sample> {
        checked(&Plan { stop: Span::Time(WARMUP), ..plan.clone() })?;
        let before_ns = self.process.cpu_ns()?;
        let report = checked(plan)?;
        let used_ns = self.process.cpu_ns()? - before_ns;
        Ok(Sample { server_ns: used_ns as f64 / report.answered as f64, report })
    }

    pub(super) fn name(&self) -> &'static str {
        match self.dialect {
            Dialect::Wire => "afterimage",
            Dialect::Echo => "echo",
            Dialect::Redis => "redis",
            Dialect::Memcached | Dialect::MemcachedMeta => "memcached",
        }
    }
}

pub(super) fn keys(count: u32, salt: u64) -> Keys {
    Keys { count, read_share: 1.0, salt }
}

/// One measurement.
#[derive(Clone)]
pub(super) struct Sample {
    pub(super) report: Report,
    /// The server's CPU time for each answer.
    pub(super) server_ns: f64,
}

/// The best throughput of several depths, and the least CPU time of the server for an answer.
#[derive(Clone, Copy, Default)]
pub(super) struct Best {
    /// Million a second.
    pub(super) rate: f64,
    pub(super) server_ns: f64,
}

impl Best {
    pub(super) fn see(&mut self, sample: &Sample) {
        self.rate = self.rate.max(RATE.1(&sample.report));
        if self.server_ns == 0.0 || sample.server_ns < self.server_ns {
            self.server_ns = sample.server_ns;
        }
    }
}

/// A figure of a report: its unit and its value.
pub(super) type Measure = (&'static str, fn(&Report) -> f64);
pub(super) const RATE: Measure = ("M/s", |report| report.throughput_per_s / 1e6);
pub(super) const P50: Measure = ("µs p50", |report| report.latency_from_sent.p50_ns as f64 / 1e3);
pub(super) const P99: Measure = ("µs p99", |report| report.latency_from_sent.p99_ns as f64 / 1e3);
