//! The memo beside the classifier asked directly, a gRPC service with the same logic, and FastAPI
//! with scikit-learn and Redis: the program of `bench/scripts/run.sh memo-peers`.
//!
//! Arguments: the `afterimage` binary; a folder for the record; the folder of the peers' programs;
//! the Python of FastAPI's environment; the null server's binary. All servers of a system run on
//! CPU 0, the load on CPU 1. In each round the systems take turns, and the median of the rounds
//! counts. Each peer is first asked in several ways, and then in its fastest way.

mod harness;

use std::env;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use afterimage_bench::record::{Machine, Run};
use afterimage_bench::workload::{Access, Answers, Population};
use afterimage_bench::{Plan, Report, Span, Target};
use harness::{Findings, Process, Result, checked, median};
use serde_json::Value;

/// Digits that are asked about: as many as the peers' loads have.
const IMAGES: usize = 10_000;
const ROUNDS: usize = 3;
/// Those of the comparison with a server of nothing, which is about a microsecond.
const ECHO_ROUNDS: usize = 7;
const MEASURE: Duration = Duration::from_secs(2);
const WARMUP: Duration = Duration::from_millis(300);
const DEPTHS: [usize; 5] = [1, 64, 256, 1024, 4096];
/// How long each way to ask a peer is tried.
const TRY: f64 = 0.7;

/// gRPC: by a call for each image or by long streams, connections, requests in flight on each.
const UNARY_WAYS: [[&str; 3]; 4] =
    [["unary", "1", "64"], ["unary", "1", "256"], ["unary", "4", "64"], ["unary", "4", "256"]];
const STREAM_WAYS: [[&str; 3]; 5] = [
    ["stream", "1", "64"],
    ["stream", "1", "256"],
    ["stream", "1", "1024"],
    ["stream", "4", "256"],
    ["stream", "4", "1024"],
];

/// HTTP: connections, requests under way on each.
const HTTP_WAYS: [[&str; 2]; 5] = [["1", "1"], ["8", "1"], ["32", "1"], ["128", "1"], ["8", "8"]];

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let [binary, folder, peers, python, null] = &args[..] else {
        return Err("usage: memo_peers BINARY FOLDER PEERS PYTHON NULL_SERVER".into());
    };
    let machine = Machine::here();
    let mut found = Findings::default();
    against_the_classifier(&mut found, Path::new(binary), Path::new(null))?;
    beside_peers(&mut found, Path::new(binary), Path::new(peers), python)?;
    found.record("memo-peers", machine, "bench/scripts/run.sh memo-peers", Path::new(folder))
}

/// Keeps a run and says what came out.
fn keep(found: &mut Findings, name: &str, report: Report) {
    let us = |ns: u64| ns as f64 / 1e3;
    let (p50, p99) = (us(report.latency_from_sent.p50_ns), us(report.latency_from_sent.p99_ns));
    let rate = report.throughput_per_s;
    let busy = report.generator.cpu_share.iter().sum::<f64>() * 100.0;
    found.say(&format!(
        "  {name:<36}{rate:>11.0}/s  p50 {p50:>9.1} µs  p99 {p99:>9.1} µs  generator {busy:.0} %"
    ));
    found.runs.push(Run { name: name.into(), report });
}

/// The service of ours that `arguments` start, with one thread for each kind of work.
fn ours(binary: &Path, arguments: &[&str]) -> Result<Process> {
    let common = ["--listen", "127.0.0.1:0", "--threads", "1", "--log", "warn"];
    Process::telling(binary, &[arguments, &common].concat())
}

fn plan(server: &Process, population: &Arc<Population>, depth: usize) -> Plan {
    Plan {
        depth,
        warmup: Span::Time(WARMUP),
        stop: Span::Time(MEASURE),
        timeout: Duration::from_secs(30),
        pin: vec![1],
        ..Plan::classify(server.addr, Arc::clone(population))
    }
}

/// The shipped model: asked directly, through a memo that knows nothing yet, and through one that
/// knows it all; with the table in the memo's process, and with a cache and a classifier of their
/// own.
fn against_the_classifier(found: &mut Findings, binary: &Path, null: &Path) -> Result<()> {
    found.say(
        "the memo against the classifier asked directly, shipped model, one core for all servers",
    );
    let compute = ["--compute-threads", "1"];
    let classifier = ours(binary, &[&["classifier"][..], &compute].concat())?;
    let embedded = ours(binary, &[&["serve"][..], &compute].concat())?;
    let cache = ours(binary, &["cache"])?;
    let (at_cache, at_classifier) = (cache.addr.to_string(), classifier.addr.to_string());
    let remote = ours(binary, &["memo", "--cache", &at_cache, "--classifier", &at_classifier])?;
    let looking = ours(binary, &[&["serve", "--busy-poll", "1ms"][..], &compute].concat())?;
    let nothing = Process::telling(null, &["serve", "127.0.0.1:0", "memo"])?;
    let population = Arc::new(Population::drawn(1, IMAGES));
    let answers = Arc::new(Answers::first_come(IMAGES));
    // The same answers for all: a label that is not the classifier's own fails the run.
    let target = Target::Classify { population: Arc::clone(&population), answers };
    let asked = |server: &Process, depth| Plan {
        target: target.clone(),
        ..plan(server, &population, depth)
    };
    // A memo is cold once; other digits make it so again.
    let mut seed = 100;
    for depth in [1, 64] {
        for (name, server) in [("memo, embedded", &embedded), ("memo, remote", &remote)] {
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                seed += 1;
                let unknown = Arc::new(Population::drawn(seed, IMAGES));
                let cold = plan(server, &unknown, depth);
                let stop = Span::Requests(IMAGES as u64);
                let cold = Plan { access: Access::EachOnce, warmup: Span::NONE, stop, ..cold };
                rounds.push(checked(&cold)?);
            }
            keep(found, &format!("{name}, cold, depth {depth}"), median(rounds));
        }
    }
    for server in [&embedded, &remote, &looking] {
        checked(&Plan { prefill: true, stop: Span::Time(WARMUP), ..asked(server, 64) })?;
    }
    let hot = [("memo, embedded, hot", &embedded), ("memo, remote, hot", &remote)];
    for depth in [1, 64, 1024] {
        let mut rounds = [(); 3].map(|()| Vec::new());
        for _ in 0..ROUNDS {
            let servers = [&classifier, &embedded, &remote];
            for (server, reports) in servers.into_iter().zip(&mut rounds) {
                reports.push(checked(&asked(server, depth))?);
            }
        }
        let names = ["classifier, direct", hot[0].0, hot[1].0];
        let rates = rounds.map(median);
        let (direct, local) = (rates[0].throughput_per_s, rates[1].throughput_per_s);
        found.figure(&format!("memo hot over classifier, depth {depth}"), local / direct);
        for (name, report) in names.into_iter().zip(rates) {
            keep(found, &format!("{name}, depth {depth}"), report);
        }
    }
    // The cost of both kernels and of wake-ups: a server that reads 800 bytes and writes 18.
    let names = ["null server", "memo, embedded, hot, again", "memo, embedded, hot, --busy-poll"];
    let mut rounds = [(); 3].map(|()| Vec::new());
    for _ in 0..ECHO_ROUNDS {
        rounds[0].push(checked(&plan(&nothing, &population, 1))?);
        rounds[1].push(checked(&asked(&embedded, 1))?);
        rounds[2].push(checked(&asked(&looking, 1))?);
    }
    let reports = rounds.map(median);
    let [floor, memo, busy] =
        reports.each_ref().map(|report| report.latency_from_sent.p50_ns as f64);
    found.figure("memo p50 over a server of nothing", memo / floor);
    found.figure("memo p50 over a server of nothing, --busy-poll", busy / floor);
    for (name, report) in names.into_iter().zip(reports) {
        keep(found, &format!("{name}, depth 1"), report);
    }
    Ok(())
}

/// The raw model, which all three systems have: hits per second.
fn beside_peers(found: &mut Findings, binary: &Path, peers: &Path, python: &str) -> Result<()> {
    found.say("hits beside two peers, raw model, one core for all servers of each");
    let memo = ours(binary, &["serve", "--model", "raw", "--compute-threads", "1"])?;
    let grpc = Process::telling(&peers.join("grpc_server"), &["raw"])?;
    let redis = harness::redis()?;
    let fastapi = Process::told(
        python,
        &[
            "-m",
            "uvicorn",
            "app:app",
            "--host",
            "127.0.0.1",
            "--no-access-log",
            "--log-level",
            "warning",
        ],
        "--port",
        |command| {
            let here = Path::new(env!("CARGO_MANIFEST_DIR"));
            command
                .current_dir(here.join("peers/fastapi"))
                .env("MODEL", here.join("../classifier/models/raw-linear.safetensors"))
                .env("REDIS", format!("redis://{}", redis.addr));
        },
    )?;
    let population = Arc::new(Population::drawn(1, IMAGES));
    let answers = Arc::new(Answers::first_come(IMAGES));
    let target = Target::Classify { population: Arc::clone(&population), answers: answers.clone() };
    let asked = |depth| Plan { target: target.clone(), ..plan(&memo, &population, depth) };
    checked(&Plan { prefill: true, ..asked(64) })?;

    let grpc_load = peers.join("grpc_load");
    let http_load = peers.join("http_load");
    // Each cold input is requested once, and its answer compared with the memo's.
    let once = load(&grpc_load, &grpc, &["unary", "1", "64", "0", "labels"])?;
    same_labels("gRPC", &once, &answers)?;
    let once = load(&http_load, &fastapi, &["8", "1", "0", "labels"])?;
    same_labels("FastAPI", &once, &answers)?;
    let of_grpc = |way: &[&str], seconds: f64| {
        load(&grpc_load, &grpc, &[way, &[&seconds.to_string()]].concat())
    };
    let of_http = |way: &[&str], seconds: f64| {
        load(&http_load, &fastapi, &[way, &[&seconds.to_string()]].concat())
    };
    let unary_way = best(found, "gRPC", &UNARY_WAYS.each_ref().map(|way| &way[..]), of_grpc)?;
    let stream_way = best(found, "gRPC", &STREAM_WAYS.each_ref().map(|way| &way[..]), of_grpc)?;
    let http_way = best(found, "FastAPI", &HTTP_WAYS.each_ref().map(|way| &way[..]), of_http)?;

    let mut peers = [
        ("gRPC, unary", Vec::new()),
        ("gRPC, streams", Vec::new()),
        ("gRPC, one at a time", Vec::new()),
        ("FastAPI", Vec::new()),
        ("FastAPI, one at a time", Vec::new()),
    ];
    let mut memo_rates = DEPTHS.map(|_| Vec::new());
    for _ in 0..ROUNDS {
        for (depth, reports) in DEPTHS.iter().zip(&mut memo_rates) {
            reports.push(checked(&asked(*depth))?);
        }
        let seconds = MEASURE.as_secs_f64();
        let lines = [
            of_grpc(unary_way, seconds)?,
            of_grpc(stream_way, seconds)?,
            of_grpc(&["unary", "1", "1"], seconds)?,
            of_http(http_way, seconds)?,
            of_http(&["1", "1"], seconds)?,
        ];
        for ((_, kept), line) in peers.iter_mut().zip(lines) {
            kept.push(line);
        }
    }
    let mut memo_best = 0.0;
    for (depth, reports) in DEPTHS.iter().zip(memo_rates) {
        let report = median(reports);
        memo_best = f64::max(memo_best, report.throughput_per_s);
        keep(found, &format!("memo, raw model, hot, depth {depth}"), report);
    }
    found.figure("memo M/s", memo_best / 1e6);
    for (name, lines) in peers {
        let line = middle(lines)?;
        let number = |field: &str| line[field].as_f64().unwrap_or(f64::NAN);
        let (rate, p50, p99) =
            (number("throughput_per_s"), number("p50_ns") / 1e3, number("p99_ns") / 1e3);
        found.say(&format!("  {name:<36}{rate:>11.0}/s  p50 {p50:>9.1} µs  p99 {p99:>9.1} µs"));
        found.figure(&format!("{name}, p50 µs"), p50);
        if !name.ends_with("one at a time") {
            found.figure(&format!("{name} M/s"), rate / 1e6);
            found.figure(&format!("memo over {name}"), memo_best / rate);
            found.say(&format!("  the memo over {name}: {:.1} ×", memo_best / rate));
        }
    }
    Ok(())
}

/// The output of a peer's load on CPU 1.
fn load(program: &Path, server: &Process, way: &[&str]) -> Result<Value> {
    let addr = server.addr.to_string();
    let mut command = Command::new("taskset");
    command.args(["-c", "1"]).arg(program).arg(addr).args(way);
    let output = command.output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{} {}: {said}", program.display(), way.join(" ")).into());
    }
    let line: Value = serde_json::from_slice(&output.stdout)?;
    if line["wrong"] != 0 {
        return Err(format!("{}: {} wrong answers", program.display(), line["wrong"]).into());
    }
    Ok(line)
}

/// The way that gives the most answers.
fn best<'a>(
    found: &mut Findings,
    name: &str,
    ways: &[&'a [&'a str]],
    load: impl Fn(&[&str], f64) -> Result<Value>,
) -> Result<&'a [&'a str]> {
    let mut best = (0.0, ways[0]);
    for &way in ways {
        let rate = load(way, TRY)?["throughput_per_s"].as_f64().unwrap_or(0.0);
        found.say(&format!("  {name}, asked as {:<24}{rate:>11.0}/s", way.join(" ")));
        if rate > best.0 {
            best = (rate, way);
        }
    }
    Ok(best.1)
}

/// The middle one of several lines.
fn middle(mut lines: Vec<Value>) -> Result<Value> {
    let rate = |line: &Value| line["throughput_per_s"].as_f64().unwrap_or(0.0);
    lines.sort_by(|a, b| rate(a).total_cmp(&rate(b)));
    let line = lines.swap_remove(lines.len() / 2);
    // Only hits are measured.
    let (hits, count) = (line["hits"].as_u64(), line["count"].as_u64());
    if hits != count {
        return Err(format!("{hits:?} of {count:?} answers were hits").into());
    }
    Ok(line)
}

/// Fails unless the peer has answered about every image, as the memo did.
fn same_labels(name: &str, line: &Value, answers: &Answers) -> Result<()> {
    for image in 0..IMAGES {
        let (theirs, ours) = (line["labels"][image].as_u64(), answers.expected(image));
        if theirs.is_none() || theirs != ours.map(u64::from) {
            return Err(
                format!("{name} says {theirs:?} of image {image}; the memo {ours:?}").into()
            );
        }
    }
    Ok(())
}
