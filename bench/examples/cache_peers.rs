//! The cache beside Redis and memcached, by one generator, in one run: what `bench/cache` calls.
//!
//! Arguments: the `afterimage` binary; a folder for the record; optionally a file whose text goes into the
//! record as it is (the table of hit ratios). Servers run on CPU 0, the load on CPU 1. Each comparison is
//! made in rounds, one server after another in each, and the median of the rounds counts. Before that,
//! the peers are asked in several ways, and each is then asked in the way that it answers fastest.
//! With `echo` as its only argument it is the echo server.

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, io};

use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::workload::Keys;
use afterimage_bench::{Dialect, Plan, Report, Span};
use common::{Process, Result, checked};

const DEPTHS: [usize; 5] = [64, 256, 1024, 4096, 16_384];
const ROUNDS: usize = 3;
/// Rounds of one request at a time: its percentiles move more from run to run than a throughput does.
const LATENCY_ROUNDS: usize = 5;
const MEASURE: Duration = Duration::from_millis(1000);
const WARMUP: Duration = Duration::from_millis(250);
/// How long each way to ask a peer is tried.
const TRY: Duration = Duration::from_millis(400);
const FEW: u32 = 1_000_000;
const MANY: u32 = 50_000_000;
/// Keys of the comparison of memory.
const HELD: u32 = 10_000_000;
/// The cache is made for twice as many keys as it gets: a bucket overflows before a table is full, and a lookup that
/// misses is no fair lookup. The hit ratio is shown.
const ROOM: u64 = 2;

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    match &args[..] {
        [only] if only == "echo" => Ok(echo()?),
        [binary, folder, rest @ ..] => {
            let attached = rest.first().map(fs::read_to_string).transpose()?;
            compare(Path::new(binary), Path::new(folder), attached)
        }
        _ => Err("usage: cache_peers BINARY FOLDER [FILE]".into()),
    }
}

/// Sends back what it gets, on one connection after another.
fn echo() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("echo listening on {}", listener.local_addr()?);
    for stream in listener.incoming() {
        let mut stream = stream?;
        stream.set_nodelay(true)?;
        let mut bytes = [0; 4096];
        while let Ok(len) = stream.read(&mut bytes) {
            if len == 0 || stream.write_all(&bytes[..len]).is_err() {
                break;
            }
        }
    }
    Ok(())
}

/// A server on CPU 0, and how it is asked.
struct Server {
    process: Process,
    dialect: Dialect,
    /// Keys in a command, and connections.
    way: (Dialect, usize, usize),
}

impl Server {
    fn new(dialect: Dialect, process: Process) -> Self {
        Server { process, dialect, way: (dialect, 1, 1) }
    }

    fn telling(dialect: Dialect, program: &Path, arguments: &[&str]) -> Result<Self> {
        Ok(Server::new(dialect, Process::telling(program, arguments)?))
    }

    fn afterimage(binary: &Path, entries: u64) -> Result<Self> {
        let entries = entries.to_string();
        let listen = ["cache", "--listen", "127.0.0.1:0", "--threads", "1", "--log", "warn"];
        let arguments = [&listen[..], &["--entries", &entries]].concat();
        Server::telling(Dialect::Wire, binary, &arguments)
    }

    fn redis() -> Result<Self> {
        Ok(Server::new(Dialect::Redis, common::redis()?))
    }

    /// One worker, which serves a connection for as long as it has requests; no compare-and-swap
    /// numbers, small chunks and a hash table of the right size from the start.
    fn memcached(keys: u32) -> Result<Self> {
        let power = (keys.next_power_of_two().trailing_zeros()).to_string();
        let power = format!("hashpower={power},no_lru_crawler");
        let one = ["-t", "1", "-R", "100000", "-m", "8192", "-C", "-n", "24", "-o", &power];
        let place = ["-u", "nobody", "-l", "127.0.0.1", "-U", "0"];
        let arguments = [&one[..], &place].concat();
        let process = Process::told("memcached", &arguments, "-p", |_| {})?;
        Ok(Server::new(Dialect::Memcached, process))
    }

    fn plan(&self, count: u32, depth: usize) -> Plan {
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
    fn fill(&self, keys: Keys) -> Result<()> {
        let plan = self.plan(keys.count, 4096);
        let target = afterimage_bench::Target::Cache(keys);
        checked(&Plan { target, prefill: true, stop: Span::NONE, ..plan })?;
        Ok(())
    }

    /// Warms up, then measures what `plan` says, and the server's CPU time for each answer with it: that
    /// does not change when others want the same CPUs.
    fn measure(&self, plan: &Plan) -> Result<Sample> {
        checked(&Plan { stop: Span::Time(WARMUP), ..plan.clone() })?;
        let before_ns = self.process.cpu_ns()?;
        let report = checked(plan)?;
        let used_ns = self.process.cpu_ns()? - before_ns;
        Ok(Sample { server_ns: used_ns as f64 / report.answered as f64, report })
    }

    fn name(&self) -> &'static str {
        match self.dialect {
            Dialect::Wire => "afterimage",
            Dialect::Echo => "echo",
            Dialect::Redis => "redis",
            Dialect::Memcached | Dialect::MemcachedMeta => "memcached",
        }
    }
}

fn keys(count: u32, salt: u64) -> Keys {
    Keys { count, read_share: 1.0, salt }
}

/// One measurement.
#[derive(Clone)]
struct Sample {
    report: Report,
    /// The server's CPU time for each answer.
    server_ns: f64,
}

/// The best throughput of several depths, and the least CPU time of the server for an answer.
#[derive(Clone, Copy, Default)]
struct Best {
    /// Million a second.
    rate: f64,
    server_ns: f64,
}

impl Best {
    fn see(&mut self, sample: &Sample) {
        self.rate = self.rate.max(RATE.1(&sample.report));
        if self.server_ns == 0.0 || sample.server_ns < self.server_ns {
            self.server_ns = sample.server_ns;
        }
    }
}

/// What the comparison has found so far.
struct Found {
    runs: Vec<Run>,
    text: String,
    figures: BTreeMap<String, f64>,
}

impl Found {
    fn say(&mut self, line: &str) {
        println!("{line}");
        self.text += line;
        self.text.push('\n');
    }

    fn figure(&mut self, name: &str, value: f64) {
        self.figures.insert(name.to_owned(), value);
    }

    /// Keeps the run in the middle of these by `measure`, with all values in the text, and returns it.
    fn median(&mut self, name: &str, mut rounds: Vec<Sample>, measure: Measure) -> Sample {
        let (unit, of) = measure;
        let all: Vec<String> = rounds.iter().map(|one| format!("{:.2}", of(&one.report))).collect();
        rounds.sort_by(|one, other| of(&one.report).total_cmp(&of(&other.report)));
        let middle = rounds.swap_remove(rounds.len() / 2);
        let busy = middle.report.generator.cpu_share.iter().sum::<f64>() * 100.0;
        let (value, all, server_ns) = (of(&middle.report), all.join(" "), middle.server_ns);
        self.say(&format!(
            "  {name:<28} {value:>7.2} {unit}  ({all}; server {server_ns:.0} ns each, generator's core \
             {busy:.0} %)"
        ));
        self.runs.push(Run { name: name.to_owned(), report: middle.report.clone() });
        middle
    }
}

type Measure = (&'static str, fn(&Report) -> f64);
const RATE: Measure = ("M/s", |report| report.throughput_per_s / 1e6);
const P50: Measure = ("µs p50", |report| report.latency_from_sent.p50_ns as f64 / 1e3);
const P99: Measure = ("µs p99", |report| report.latency_from_sent.p99_ns as f64 / 1e3);

fn compare(binary: &Path, folder: &Path, attached: Option<String>) -> Result<()> {
    let machine = Machine::here();
    let mut found = Found { runs: Vec::new(), text: String::new(), figures: BTreeMap::new() };
    let mut redis = Server::redis()?;
    let mut memcached = Server::memcached(FEW)?;
    let ours = Server::afterimage(binary, ROOM * u64::from(FEW))?;
    for server in [&redis, &memcached, &ours] {
        found.say(&server.process.command);
        server.fill(keys(FEW, 1))?;
    }
    best_way(&mut redis, &[(Dialect::Redis, 1), (Dialect::Redis, 64), (Dialect::Redis, 256)])?;
    let text = [16, 64, 256].map(|batch| (Dialect::Memcached, batch));
    best_way(&mut memcached, &[&text[..], &[(Dialect::MemcachedMeta, 1)]].concat())?;
    for server in [&redis, &memcached] {
        let (dialect, batch, connections) = server.way;
        let line = format!("asked as {dialect}, batch {batch}, connections {connections}");
        found.say(&format!("{} is {line}", server.name()));
    }

    found.say(&format!("\npipelined reads, {FEW} keys"));
    let best = rates(&mut found, &[&redis, &memcached, &ours], FEW)?;
    let [redis_best, memcached_best, ours_best] = best[..] else { unreachable!("three servers") };

    found.say(&format!("\npipelined reads, {MANY} keys beside {FEW}"));
    let large = Server::afterimage(binary, ROOM * u64::from(MANY))?;
    found.say(&large.process.command);
    large.fill(keys(MANY, 1))?;
    let (mut few, mut many) = (Best::default(), Best::default());
    for depth in DEPTHS.into_iter().skip(2) {
        let (mut a, mut b) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            a.push(ours.measure(&ours.plan(FEW, depth))?);
            b.push(large.measure(&large.plan(MANY, depth))?);
        }
        let middle = found.median(&format!("afterimage 1 M depth {depth}"), a, RATE);
        few.see(&middle);
        let middle = found.median(&format!("afterimage 50 M depth {depth}"), b, RATE);
        many.see(&middle);
        let ratio = middle.report.hit_ratio.unwrap_or(0.0);
        found.figure("afterimage 50 M hit ratio", ratio);
    }
    drop(large);

    found.say("\none request at a time");
    let echo = Server::telling(Dialect::Echo, &env::current_exe()?, &["echo"])?;
    redis.way = (Dialect::Redis, 1, 1);
    memcached.way = (Dialect::Memcached, 1, 1);
    let servers = [&echo, &ours, &redis, &memcached];
    let mut rounds = servers.map(|_| Vec::new());
    for _ in 0..LATENCY_ROUNDS {
        for (server, reports) in servers.iter().zip(&mut rounds) {
            reports.push(server.measure(&server.plan(FEW, 1))?);
        }
    }
    let mut latencies = Vec::new();
    for (server, reports) in servers.iter().zip(rounds) {
        let name = format!("{} depth 1", server.name());
        let p50 = P50.1(&found.median(&name, reports.clone(), P50).report);
        let p99 = P99.1(&found.median(&name, reports, P99).report);
        found.figure(&format!("{} p50 µs", server.name()), p50);
        found.figure(&format!("{} p99 µs", server.name()), p99);
        latencies.push((p50, p99));
    }
    drop((redis, memcached, ours, echo));

    found.say(&format!("\nbytes an entry, resident, {HELD} keys written"));
    let redis_bytes = bytes_an_entry(&mut found, &Server::redis()?)?;
    let memcached_bytes = bytes_an_entry(&mut found, &Server::memcached(HELD)?)?;
    let ours = Server::afterimage(binary, HELD.into())?;
    let before = ours.process.resident()?;
    let mut full = 0.0;
    for salt in 1..=4 {
        ours.fill(keys(HELD, salt << 40))?;
        let (bytes, entries) = (ours.process.resident()? - before, entries(binary, &ours)?);
        full = bytes as f64 / entries as f64;
        let written = salt * u64::from(HELD);
        let line = format!("{full:.2} with {entries} entries after {written} keys written");
        found.say(&format!("  afterimage {line}"));
        found.figure(&format!("afterimage bytes an entry after {written} keys"), full);
    }
    drop(ours);

    let [redis_rate, memcached_rate, ours_rate] =
        [redis_best, memcached_best, ours_best].map(|best| best.rate);
    let better = f64::max(redis_rate, memcached_rate);
    let [redis_ns, memcached_ns, ours_ns, few_ns, many_ns] =
        [redis_best, memcached_best, ours_best, few, many].map(|best| best.server_ns);
    let better_ns = f64::min(redis_ns, memcached_ns);
    let (few, many) = (few.rate, many.rate);
    let ((echo_p50, echo_p99), (p50, p99)) = (latencies[0], latencies[1]);
    let mut table = String::new();
    writeln!(table, "\n| | Redis | memcached | Afterimage | target | reached |")?;
    writeln!(table, "|---|---|---|---|---|---|")?;
    writeln!(
        table,
        "| pipelined reads, 1 M keys | {redis_rate:.2} M/s | {memcached_rate:.2} M/s | \
         {ours_rate:.2} M/s | ≥ 20 × the better | {:.1} × |",
        ours_rate / better
    )?;
    writeln!(
        table,
        "| the same, 50 M keys | – | – | {many:.2} M/s | ≥ 70 % of 1 M ({few:.2} M/s) | {:.0} % |",
        100.0 * many / few
    )?;
    writeln!(
        table,
        "| server's CPU time a read, 1 M | {redis_ns:.0} ns | {memcached_ns:.0} ns | {ours_ns:.1} ns | \
         (1/20 of the better) | 1/{:.1} |",
        better_ns / ours_ns
    )?;
    writeln!(
        table,
        "| the same, 50 M keys | – | – | {many_ns:.1} ns | ({few_ns:.1} ns with 1 M) | {:.0} % |",
        100.0 * few_ns / many_ns
    )?;
    for (what, at, echo, ours) in [("p50", 0, echo_p50, p50), ("p99", 1, echo_p99, p99)] {
        let of = |i: usize| if at == 0 { latencies[i].0 } else { latencies[i].1 };
        writeln!(
            table,
            "| one at a time, {what} | {:.1} µs | {:.1} µs | {ours:.1} µs | ≤ 1.10 × an echo \
             ({echo:.1} µs) | {:.2} × |",
            of(2),
            of(3),
            ours / echo
        )?;
    }
    writeln!(
        table,
        "| bytes an entry, 10 M | {redis_bytes:.1} | {memcached_bytes:.1} | {full:.1} (full) | ≤ 20 \
         | {full:.1} |"
    )?;
    found.say(&table);
    if let Some(attached) = attached {
        found.say(&attached);
    }
    for (name, value) in [
        ("redis M/s", redis_rate),
        ("memcached M/s", memcached_rate),
        ("afterimage M/s", ours_rate),
        ("afterimage over the better peer", ours_rate / better),
        ("afterimage 50 M keys M/s", many),
        ("afterimage 50 M over 1 M", many / few),
        ("p50 over an echo", p50 / echo_p50),
        ("p99 over an echo", p99 / echo_p99),
        ("redis server ns a read", redis_ns),
        ("memcached server ns a read", memcached_ns),
        ("afterimage server ns a read", ours_ns),
        ("afterimage 50 M server ns a read", many_ns),
        ("redis bytes an entry", redis_bytes),
        ("memcached bytes an entry", memcached_bytes),
    ] {
        found.figure(name, value);
    }
    let mut record = Record::new("cache", Path::new("."), machine, found.runs);
    record.command = vec!["bench/cache".into()];
    record.text = found.text.lines().map(str::to_owned).collect();
    record.figures = found.figures;
    let path: PathBuf = record.write(folder)?;
    println!("recorded in {}", path.display());
    Ok(())
}

/// Finds the way to ask this server that gives the most answers.
fn best_way(server: &mut Server, ways: &[(Dialect, usize)]) -> Result<()> {
    let mut best = (0.0, server.way);
    // Several times: what disturbs a try makes it slower and never faster.
    for _ in 0..ROUNDS {
        for &(dialect, batch) in ways {
            for connections in [1, 4] {
                server.way = (dialect, batch, connections);
                let plan = Plan { stop: Span::Time(TRY), ..server.plan(FEW, 4096) };
                let rate = checked(&plan)?.throughput_per_s;
                if rate > best.0 {
                    best = (rate, server.way);
                }
            }
        }
    }
    server.way = best.1;
    Ok(())
}

/// The best of the medians at all depths, for each server.
fn rates(found: &mut Found, servers: &[&Server], count: u32) -> Result<Vec<Best>> {
    let mut best = vec![Best::default(); servers.len()];
    for depth in DEPTHS {
        let mut rounds = vec![Vec::new(); servers.len()];
        for _ in 0..ROUNDS {
            for (server, reports) in servers.iter().zip(&mut rounds) {
                reports.push(server.measure(&server.plan(count, depth))?);
            }
        }
        for ((server, reports), best) in servers.iter().zip(rounds).zip(&mut best) {
            let name = format!("{} depth {depth}", server.name());
            let middle = found.median(&name, reports, RATE);
            best.see(&middle);
            let ratio = middle.report.hit_ratio.unwrap_or(0.0);
            found.figure(&format!("{} hit ratio", server.name()), ratio);
        }
    }
    Ok(best)
}

/// Fills a server that keeps all it gets, and makes sure that it did.
fn bytes_an_entry(found: &mut Found, server: &Server) -> Result<f64> {
    let before = server.process.resident()?;
    server.fill(keys(HELD, 1))?;
    let bytes = server.process.resident()? - before;
    let kept = checked(&server.plan(HELD, 1024))?.hit_ratio.unwrap_or(0.0);
    let each = bytes as f64 / (kept * f64::from(HELD));
    found.say(&format!("  {} {each:.2}, {:.2} % of the keys there", server.name(), kept * 100.0));
    Ok(each)
}

/// The entries that our cache says it holds.
fn entries(binary: &Path, server: &Server) -> Result<u64> {
    let output = Command::new(binary).args(["stats", &server.process.addr.to_string()]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let found = text.lines().find_map(|line| line.strip_prefix("entries "));
    Ok(found.ok_or("no entries in the statistics")?.trim().parse()?)
}
