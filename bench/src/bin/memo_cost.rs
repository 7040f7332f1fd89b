//! The overhead of a memo that only misses, and the memory of a memo under ten times its capacity:
//! the program of `overhead` and `overload` in `bench/scripts/run.sh`.
//!
//! Arguments: `overhead` or `overload`; the `afterimage` binary; a folder for the record; for
//! `overload` the seconds (default 60). Servers run on CPU 0, the load on CPU 1.

mod harness;

use std::env;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use afterimage_bench::record::{Machine, Run};
use afterimage_bench::report::Summary;
use afterimage_bench::workload::Population;
use afterimage_bench::{Arrivals, Mode, Outcome, Plan, Report, Span, run};
use harness::{Findings, Process, Result};
use rustix::process::setpriority_process;

/// How often the servers are started anew: where a process lies in memory makes it a hundredth
/// faster or slower, for as long as it lives.
const STARTS: u64 = 3;
/// Rounds between two starts; in each, every server has its turn, and they take turns in going
/// first.
const ROUNDS: u64 = 4;
const MEASURE: Duration = Duration::from_millis(800);
const WARMUP: Duration = Duration::from_millis(250);
const DEPTHS: [usize; 2] = [1, 64];
/// Images with a stored answer.
const KNOWN: usize = 1000;
/// The offered load, as a multiple of the memo's capacity.
const OVERLOAD: f64 = 10.0;
/// Hits a second that are asked for meanwhile.
const HITS_PER_S: f64 = 1000.0;
/// Hits that may be in flight: with one at a time those that are due would wait in the generator
/// for the one before.
const HITS_DEPTH: usize = 1024;
/// The flood's claim on the CPU that it shares with the hits' thread, which would otherwise be kept
/// waiting by the generator, and not by the memo.
const FLOOD_NICE: i32 = 19;
/// Between two readings of a server's memory.
const LOOK_EVERY: Duration = Duration::from_millis(500);

fn main() -> Result<()> {
    let args: Vec<String> = env::args().skip(1).collect();
    let texts: Vec<&str> = args.iter().map(String::as_str).collect();
    match texts[..] {
        ["overhead", binary, folder] => overhead(Path::new(binary), Path::new(folder)),
        ["overload", binary, folder] => overload(Path::new(binary), Path::new(folder), 60),
        ["overload", binary, folder, seconds] => {
            overload(Path::new(binary), Path::new(folder), seconds.parse()?)
        }
        _ => Err("usage: memo_cost overhead|overload BINARY FOLDER [SECONDS]".into()),
    }
}

/// Starts a service of ours on CPU 0.
fn start(binary: &Path, args: &[&str]) -> Result<Process> {
    Process::telling(binary, &[args, &["--listen", "127.0.0.1:0", "--threads", "1"]].concat())
}

fn plan(addr: SocketAddr, population: &Arc<Population>) -> Plan {
    let mut plan = Plan::classify(addr, Arc::clone(population));
    plan.pin = vec![1];
    plan.warmup = Span::Time(WARMUP);
    plan.stop = Span::Time(MEASURE);
    plan
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

// ---- What it costs ----

/// One of the compared servers.
struct Contestant {
    name: &'static str,
    addr: SocketAddr,
    /// Share of images with a stored answer.
    hit_ratio: f64,
}

/// The classifier twice: what the two of them differ by is what these figures cannot tell.
const NAMES: [&str; 5] = [
    "classifier",
    "classifier, another process",
    "memo, classifier embedded, no hits",
    "memo, classifier elsewhere, no hits",
    // A hit takes one hop and nothing else.
    "memo, hits: one hop",
];

fn overhead(binary: &Path, folder: &Path) -> Result<()> {
    let machine = Machine::here();
    let population = Arc::new(Population::drawn(1, KNOWN));
    let mut found = Findings::default();
    for seed in 0..STARTS {
        compare(&mut found.runs, binary, &population, 1_000_000 * seed)?;
    }
    judge(&mut found);
    found.record("memo-overhead", machine, "bench/scripts/run.sh overhead", folder)
}

/// Starts all servers, and measures them in turn.
fn compare(
    runs: &mut Vec<Run>,
    binary: &Path,
    population: &Arc<Population>,
    seed: u64,
) -> Result<()> {
    let compute = ["--compute-threads", "1"];
    let classifier = || start(binary, &[&["classifier"][..], &compute].concat());
    let (direct, other) = (classifier()?, classifier()?);
    let embedded = start(binary, &[&["serve", "--memory", "64MiB"][..], &compute].concat())?;
    let place = direct.addr.to_string();
    let remote = start(binary, &["memo", "--classifier", &place, "--memory", "64MiB"])?;
    let addrs = [&direct, &other, &embedded, &remote, &embedded].map(|server| server.addr);
    let mut contestants: Vec<Contestant> = NAMES
        .into_iter()
        .zip(addrs)
        .map(|(name, addr)| Contestant { name, addr, hit_ratio: f64::from(name == NAMES[4]) })
        .collect();
    for depth in DEPTHS {
        for round in 0..ROUNDS {
            for Contestant { name, addr, hit_ratio } in &contestants {
                let mut plan = plan(*addr, population);
                (plan.depth, plan.hit_ratio) = (depth, Some(*hit_ratio));
                plan.prefill = *hit_ratio > 0.0 && round == 0;
                // Otherwise the new images would be those of the round before.
                plan.seed = 1 + round + 1000 * depth as u64 + seed;
                let report = run(&plan, &mut |_| {})?;
                if let [problem, ..] = &report.problems()[..] {
                    return Err(format!("{name}: {problem}").into());
                }
                if *hit_ratio == 0.0 && report.hit_ratio.is_some_and(|hits| hits > 0.001) {
                    return Err(format!("{name}: some were hits").into());
                }
                runs.push(Run { name: format!("{name}, depth {depth}"), report });
            }
            contestants.rotate_left(1);
        }
    }
    Ok(())
}

/// Medians over the rounds, and their ratios to the classifier's; of the runs, the middle ones are
/// kept.
fn judge(found: &mut Findings) {
    let mut runs = std::mem::take(&mut found.runs);
    found.say(&format!("{:<46}{:>12}{:>12}{:>14}", "", "p50", "p99", "answers/s"));
    for depth in DEPTHS {
        let of = |name: &str, value: fn(&Report) -> f64| {
            let name = format!("{name}, depth {depth}");
            let runs = runs.iter().filter(|run| run.name == name);
            median(runs.map(|run| value(&run.report)).collect())
        };
        let p50 = |name| of(name, |report| report.latency_from_sent.p50_ns as f64 / 1e3);
        let p99 = |name| of(name, |report| report.latency_from_sent.p99_ns as f64 / 1e3);
        for name in NAMES {
            let rate = of(name, |report| report.throughput_per_s);
            let (p50, p99) = (p50(name), p99(name));
            let name = format!("{name}, depth {depth}");
            found.say(&format!("{name:<46}{p50:>9.2} µs{p99:>9.2} µs{rate:>14.0}"));
        }
        let [classifier, another, embedded, remote, hop] = NAMES;
        for (name, figure) in [
            ("another_p50_over_classifier", p50(another) / p50(classifier)),
            ("another_p99_over_classifier", p99(another) / p99(classifier)),
            ("embedded_p50_over_classifier", p50(embedded) / p50(classifier)),
            ("embedded_p99_over_classifier", p99(embedded) / p99(classifier)),
            ("remote_p50_over_classifier_us", p50(remote) - p50(classifier)),
            ("remote_p99_over_classifier_us", p99(remote) - p99(classifier)),
            ("hop_p50_us", p50(hop)),
            ("hop_p99_us", p99(hop)),
        ] {
            let name = format!("depth_{depth}_{name}");
            found.say(&format!("{name:<58}{figure:>12.3}"));
            found.figure(&name, figure);
        }
    }
    found.say("targets: the memo's ratios at most 1.02; remote over classifier at most a hop");
    found.say("p50 of each round, µs");
    for depth in DEPTHS {
        for name in NAMES.map(|name| format!("{name}, depth {depth}")) {
            let (mut texts, mut reports) = (Vec::new(), Vec::new());
            for run in runs.extract_if(.., |run| run.name == name) {
                texts.push(format!("{:.2}", run.report.latency_from_sent.p50_ns as f64 / 1e3));
                reports.push(run.report);
            }
            found.say(&format!("{name}: {}", texts.join(" ")));
            // The rest would be a megabyte.
            found.runs.push(Run { name, report: harness::median(reports) });
        }
    }
}

// ---- What it holds ----

fn overload(binary: &Path, folder: &Path, seconds: u64) -> Result<()> {
    let machine = Machine::here();
    let population = Arc::new(Population::drawn(1, KNOWN));
    // A table that is full soon, and room for few to wait: what grows then would grow without end.
    let args = ["serve", "--compute-threads", "1", "--memory", "8MiB", "--max-waiting", "4096"];
    let memo = start(binary, &args)?;
    let mut calm = plan(memo.addr, &population);
    (calm.depth, calm.hit_ratio, calm.stop) = (64, Some(0.0), Span::Time(3 * MEASURE));
    let calm = run(&calm, &mut |_| {})?;
    let rate = calm.throughput_per_s * OVERLOAD;

    let mut hits = plan(memo.addr, &population);
    hits.prefill = true;
    hits.mode = Mode::Open { rate: HITS_PER_S, arrivals: Arrivals::Poisson };
    hits.depth = HITS_DEPTH;
    let quiet = run(&hits, &mut |_| {})?;
    hits.prefill = false;
    hits.stop = Span::Time(Duration::from_secs(seconds));
    let mut flood = plan(memo.addr, &population);
    (flood.depth, flood.connections, flood.hit_ratio) = (4096, 4, Some(0.0));
    (flood.seed, flood.stop) = (2, Span::Time(Duration::from_secs(seconds) + WARMUP));
    flood.mode = Mode::Open { rate, arrivals: Arrivals::Poisson };

    let flooding = thread::spawn(move || {
        // Of this thread, and of the load threads that it starts.
        setpriority_process(None, FLOOD_NICE).map_err(|errno| errno.to_string())?;
        run(&flood, &mut |_| {}).map_err(|error| error.to_string())
    });
    let asking = thread::spawn(move || run(&hits, &mut |_| {}).map_err(|error| error.to_string()));
    let mut resident = Vec::new();
    let began = Instant::now();
    while !flooding.is_finished() && began.elapsed().as_secs() < 2 * seconds + 10 {
        thread::sleep(LOOK_EVERY);
        resident.push((began.elapsed(), memo.resident()?));
    }
    let flood = flooding.join().map_err(|_| "the load panicked")??;
    let hits = asking.join().map_err(|_| "the load panicked")??;
    let runs =
        [("calm", calm), ("hits, calm", quiet), ("flood", flood), ("hits under flood", hits)];
    let runs = runs.map(|(name, report)| Run { name: name.into(), report });
    let mut found = Findings { runs: runs.into(), ..Findings::default() };
    report_overload(&mut found, &resident)?;
    found.record("memo-overload", machine, "bench/scripts/run.sh overload", folder)
}

/// The figures: memory over time, and the outcomes of both kinds of requests.
fn report_overload(found: &mut Findings, resident: &[(Duration, u64)]) -> Result<()> {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    // The first second fills the table and the buffers.
    let settled: Vec<u64> =
        resident.iter().filter(|(at, _)| at.as_secs() >= 1).map(|&(_, bytes)| bytes).collect();
    let (Some(&start), Some(&end)) = (settled.first(), settled.last()) else {
        return Err("the flood was too short to see memory by".into());
    };
    let peak = settled.iter().copied().max().unwrap_or(end);
    let [calm, quiet, flood, hits] = [0, 1, 2, 3].map(|i| &found.runs[i].report);
    let us = |ns: u64| ns as f64 / 1e3;
    let hit =
        |report: &Report| report.outcomes.get(&Outcome::Hit).map_or(0, |hits| hits.from_due.count);
    let latency = |latency: &Summary| (us(latency.p50_ns), us(latency.p99_ns));
    let (quiet_latency, hits_latency) =
        (latency(&quiet.latency_from_due), latency(&hits.latency_from_due));
    let refused = flood.outcomes.get(&Outcome::Failed);
    let refused = refused.map_or((f64::NAN, f64::NAN), |refused| latency(&refused.from_due));
    let figures = [
        ("capacity_per_s", calm.throughput_per_s),
        ("asked_per_s", (flood.sent + flood.skipped) as f64 / flood.measured_s),
        ("sent_per_s", flood.sent as f64 / flood.measured_s),
        ("replied_per_s", flood.throughput_per_s),
        ("classified_per_s", flood.answered as f64 / flood.measured_s),
        ("refused_per_s", flood.failed as f64 / flood.measured_s),
        ("refused_p50_us", refused.0),
        ("refused_p99_us", refused.1),
        ("hits_asked", (hits.sent + hits.skipped) as f64),
        ("hits_answered_as_hits", hit(hits) as f64),
        ("hits_failed", (hits.failed + hits.timed_out + hits.lost) as f64),
        ("hits_calm_p50_us", quiet_latency.0),
        ("hits_calm_p99_us", quiet_latency.1),
        ("hits_under_flood_p50_us", hits_latency.0),
        ("hits_under_flood_p99_us", hits_latency.1),
        ("resident_mib_after_1_s", mib(start)),
        ("resident_mib_peak", mib(peak)),
        ("resident_mib_end", mib(end)),
        ("wrong", (flood.wrong + hits.wrong) as f64),
    ];
    for (name, figure) in figures {
        found.say(&format!("{name:<28}{figure:>16.1}"));
        found.figure(name, figure);
    }
    Ok(())
}
