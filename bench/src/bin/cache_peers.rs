//! The cache service beside Redis and memcached, by one generator, in one run: the program of
//! `bench/scripts/run.sh cache`.
//!
//! Arguments: the `afterimage` binary; a folder for the record; optionally a file whose text is
//! copied into the record (the table of hit ratios). Servers run on CPU 0, the load on CPU 1. In
//! each round the servers take turns, and the median of the rounds counts. Each peer is first asked
//! in several ways, and then in its fastest way. With `echo` as the only argument the program is
//! the echo server.

mod harness;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{env, fs, io};

use afterimage_bench::record::{Machine, Run};
use afterimage_bench::workload::Keys;
use afterimage_bench::{Dialect, Plan, Report, Span, Target};
use harness::{Findings, Process, Result, checked};

const DEPTHS: [usize; 5] = [64, 256, 1024, 4096, 16_384];
const ROUNDS: usize = 3;
/// Rounds of one request at a time: its percentiles move more from run to run than a throughput
/// does.
const LATENCY_ROUNDS: usize = 5;
/// How long each way to ask a peer is tried.
const TRY: Duration = Duration::from_millis(400);
const FEW: u32 = 1_000_000;
const MANY: u32 = 50_000_000;
/// Keys of the comparison of memory.
const HELD: u32 = 10_000_000;
/// The cache is made for twice as many keys as it gets: a bucket overflows before a table is full,
/// and a lookup that misses is no fair lookup. The hit ratio is shown.
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

/// Echoes all bytes, on one connection after another.
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

/// The results, in the order Redis, memcached, Afterimage.
struct Results {
    rates: [Best; 3],
    /// Ours with few keys and with many, in turn.
    few: Best,
    many: Best,
    echo: Latency,
    latencies: [Latency; 3],
    /// Bytes an entry.
    bytes: [f64; 3],
}

/// One request at a time, in microseconds.
#[derive(Clone, Copy)]
struct Latency {
    p50: f64,
    p99: f64,
}

fn compare(binary: &Path, folder: &Path, attached: Option<String>) -> Result<()> {
    let machine = Machine::here();
    let mut found = Findings::default();
    let mut peers = [Server::redis()?, Server::memcached(FEW)?];
    let ours = Server::afterimage(binary, ROOM * u64::from(FEW))?;
    for server in peers.iter().chain([&ours]) {
        found.say(&server.process.command);
        server.fill(keys(FEW, 1))?;
    }
    best_ways(&mut found, &mut peers)?;

    found.say(&format!("\npipelined reads, {FEW} keys"));
    let rates = rates(&mut found, [&peers[0], &peers[1], &ours])?;
    found.say(&format!("\npipelined reads, {MANY} keys beside {FEW}"));
    let (few, many) = few_and_many(&mut found, binary, &ours)?;
    found.say("\none request at a time");
    let [echo, latencies @ ..] = one_at_a_time(&mut found, peers, ours)?;
    found.say(&format!("\nbytes an entry, resident, {HELD} keys written"));
    // One after the other: there is not memory for all at once everywhere.
    let of_redis = bytes_an_entry(&mut found, &Server::redis()?)?;
    let of_memcached = bytes_an_entry(&mut found, &Server::memcached(HELD)?)?;
    let bytes = [of_redis, of_memcached, our_bytes_an_entry(&mut found, binary)?];

    let results = Results { rates, few, many, echo, latencies, bytes };
    results.say(&mut found);
    if let Some(attached) = attached {
        found.say(&attached);
    }
    found.record("cache", machine, "bench/scripts/run.sh cache", folder)
}

impl Results {
    /// The table, and the figures that the rounds have not left yet.
    fn say(&self, found: &mut Findings) {
        let Results { rates, few, many, echo, latencies, bytes } = self;
        let [redis, memcached, ours] = rates.each_ref().map(|best| best.rate);
        let [redis_ns, memcached_ns, ours_ns] = rates.each_ref().map(|best| best.server_ns);
        let better = f64::max(redis, memcached);
        let better_ns = f64::min(redis_ns, memcached_ns);
        let rows = [
            String::new(),
            "| | Redis | memcached | Afterimage | target | reached |".into(),
            "|---|---|---|---|---|---|".into(),
            format!(
                "| pipelined reads, 1 M keys | {redis:.2} M/s | {memcached:.2} M/s | {ours:.2} M/s | ≥ 20 × the better \
                 | {:.1} × |",
                ours / better
            ),
            format!(
                "| the same, 50 M keys | – | – | {:.2} M/s | ≥ 70 % of 1 M ({:.2} M/s) | {:.0} % |",
                many.rate,
                few.rate,
                100.0 * many.rate / few.rate
            ),
            format!(
                "| server's CPU time a read, 1 M | {redis_ns:.0} ns | {memcached_ns:.0} ns | {ours_ns:.1} ns | (1/20 of \
                 the better) | 1/{:.1} |",
                better_ns / ours_ns
            ),
            format!(
                "| the same, 50 M keys | – | – | {:.1} ns | ({:.1} ns with 1 M) | {:.0} % |",
                many.server_ns,
                few.server_ns,
                100.0 * few.server_ns / many.server_ns
            ),
            latency_row("p50", latencies.map(|latency| latency.p50), echo.p50),
            latency_row("p99", latencies.map(|latency| latency.p99), echo.p99),
            format!(
                "| bytes an entry, 10 M | {:.1} | {:.1} | {:.1} (full) | ≤ 20 | {:.1} |",
                bytes[0], bytes[1], bytes[2], bytes[2]
            ),
            String::new(),
        ];
        rows.iter().for_each(|row| found.say(row));
        for (name, value) in [
            ("redis M/s", redis),
            ("memcached M/s", memcached),
            ("afterimage M/s", ours),
            ("afterimage over the better peer", ours / better),
            ("afterimage 50 M keys M/s", many.rate),
            ("afterimage 50 M over 1 M", many.rate / few.rate),
            ("p50 over an echo", latencies[2].p50 / echo.p50),
            ("p99 over an echo", latencies[2].p99 / echo.p99),
            ("redis server ns a read", redis_ns),
            ("memcached server ns a read", memcached_ns),
            ("afterimage server ns a read", ours_ns),
            ("afterimage 50 M server ns a read", many.server_ns),
            ("redis bytes an entry", bytes[0]),
            ("memcached bytes an entry", bytes[1]),
        ] {
            found.figure(name, value);
        }
    }
}

fn latency_row(what: &str, [redis, memcached, ours]: [f64; 3], echo: f64) -> String {
    format!(
        "| one at a time, {what} | {redis:.1} µs | {memcached:.1} µs | {ours:.1} µs | ≤ 1.10 × an echo ({echo:.1} µs) \
         | {:.2} × |",
        ours / echo
    )
}

/// Keeps the run in the middle of these by `measure`, with all values in the text, and returns it.
fn median(found: &mut Findings, name: &str, rounds: Vec<Sample>, measure: Measure) -> Sample {
    let middle = middle(found, name, rounds, measure);
    found.runs.push(Run { name: name.to_owned(), report: middle.report.clone() });
    middle
}

/// The run in the middle of these by `measure`, with all values in the text.
fn middle(found: &mut Findings, name: &str, mut rounds: Vec<Sample>, measure: Measure) -> Sample {
    let (unit, of) = measure;
    let all: Vec<String> = rounds.iter().map(|one| format!("{:.2}", of(&one.report))).collect();
    rounds.sort_by(|one, other| of(&one.report).total_cmp(&of(&other.report)));
    let middle = rounds.swap_remove(rounds.len() / 2);
    let busy = middle.report.generator.cpu_share.iter().sum::<f64>() * 100.0;
    let (value, all, server_ns) = (of(&middle.report), all.join(" "), middle.server_ns);
    found.say(&format!(
        "  {name:<28} {value:>7.2} {unit}  ({all}; server {server_ns:.0} ns each, generator's core {busy:.0} %)"
    ));
    middle
}

/// Finds for Redis and memcached the way to ask that gives the most answers.
fn best_ways(found: &mut Findings, [redis, memcached]: &mut [Server; 2]) -> Result<()> {
    best_way(redis, &[1, 64, 256].map(|batch| (Dialect::Redis, batch)))?;
    let text = [16, 64, 256].map(|batch| (Dialect::Memcached, batch));
    best_way(memcached, &[&text[..], &[(Dialect::MemcachedMeta, 1)]].concat())?;
    for server in [redis, memcached] {
        let (dialect, batch, connections) = server.way;
        let line = format!("asked as {dialect}, batch {batch}, connections {connections}");
        found.say(&format!("{} is {line}", server.name()));
    }
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
fn rates(found: &mut Findings, servers: [&Server; 3]) -> Result<[Best; 3]> {
    let mut best = [Best::default(); 3];
    for depth in DEPTHS {
        let mut rounds = [const { Vec::new() }; 3];
        for _ in 0..ROUNDS {
            for (server, samples) in servers.iter().zip(&mut rounds) {
                samples.push(server.measure(&server.plan(FEW, depth))?);
            }
        }
        for ((server, samples), best) in servers.iter().zip(rounds).zip(&mut best) {
            let name = format!("{} depth {depth}", server.name());
            let middle = median(found, &name, samples, RATE);
            best.see(&middle);
            let ratio = middle.report.hit_ratio.unwrap_or(0.0);
            found.figure(&format!("{} hit ratio", server.name()), ratio);
        }
    }
    Ok(best)
}

/// Our cache with few keys and another one with many, in turn.
fn few_and_many(found: &mut Findings, binary: &Path, ours: &Server) -> Result<(Best, Best)> {
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
        few.see(&median(found, &format!("afterimage 1 M depth {depth}"), a, RATE));
        let middle = median(found, &format!("afterimage 50 M depth {depth}"), b, RATE);
        many.see(&middle);
        let ratio = middle.report.hit_ratio.unwrap_or(0.0);
        found.figure("afterimage 50 M hit ratio", ratio);
    }
    Ok((few, many))
}

/// An echo, Redis, memcached and ours, in turn; they end here.
fn one_at_a_time(found: &mut Findings, peers: [Server; 2], ours: Server) -> Result<[Latency; 4]> {
    let echo = Server::telling(Dialect::Echo, &env::current_exe()?, &["echo"])?;
    let [mut redis, mut memcached] = peers;
    redis.way = (Dialect::Redis, 1, 1);
    memcached.way = (Dialect::Memcached, 1, 1);
    let servers = [echo, redis, memcached, ours];
    let mut rounds = [const { Vec::new() }; 4];
    for _ in 0..LATENCY_ROUNDS {
        for (server, samples) in servers.iter().zip(&mut rounds) {
            samples.push(server.measure(&server.plan(FEW, 1))?);
        }
    }
    let mut latencies = [Latency { p50: 0.0, p99: 0.0 }; 4];
    for ((server, samples), latency) in servers.iter().zip(rounds).zip(&mut latencies) {
        let name = format!("{} depth 1", server.name());
        // One of the two is enough to keep.
        let p50 = P50.1(&median(found, &name, samples.clone(), P50).report);
        let p99 = P99.1(&middle(found, &name, samples, P99).report);
        found.figure(&format!("{} p50 µs", server.name()), p50);
        found.figure(&format!("{} p99 µs", server.name()), p99);
        *latency = Latency { p50, p99 };
    }
    Ok(latencies)
}

/// Fills our cache, which has space for as many keys as are written, four times over with others;
/// gives what an entry takes when it is full.
fn our_bytes_an_entry(found: &mut Findings, binary: &Path) -> Result<f64> {
    // What a server takes that has space for next to nothing: a large table's memory is taken at
    // the start.
    let before = Server::afterimage(binary, 8)?.process.resident()?;
    let ours = Server::afterimage(binary, HELD.into())?;
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
    Ok(full)
}

/// Fills a server that keeps all it gets, and makes sure that it did.
fn bytes_an_entry(found: &mut Findings, server: &Server) -> Result<f64> {
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

const MEASURE: Duration = Duration::from_millis(1000);
const WARMUP: Duration = Duration::from_millis(250);

/// A server on CPU 0, and the form of its requests.
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
        Ok(Server::new(Dialect::Redis, harness::redis()?))
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
        let target = Target::Cache(keys);
        checked(&Plan { target, prefill: true, stop: Span::NONE, ..plan })?;
        Ok(())
    }

    /// Warms up, then measures what `plan` says, and the server's CPU time for each answer with it:
    /// that does not change when others want the same CPUs.
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
            Dialect::Http => "http",
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

/// A figure of a report: its unit and its value.
type Measure = (&'static str, fn(&Report) -> f64);
const RATE: Measure = ("M/s", |report| report.throughput_per_s / 1e6);
const P50: Measure = ("µs p50", |report| report.latency_from_sent.p50_ns as f64 / 1e3);
const P99: Measure = ("µs p99", |report| report.latency_from_sent.p99_ns as f64 / 1e3);
