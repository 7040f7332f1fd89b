//! `afterimage bench` and its commands, against the real services.

use crate::common;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Running, file, folder, run, text};
use afterimage_bench::record::Record;
use rustix::process::{Pid, Signal, kill_process};

/// The arguments that make a run quick.
const QUICK: [&str; 6] = ["--count", "2000", "--warm-up", "0s", "--population", "100"];

fn memo() -> Running {
    Running::start(&["serve", "--memory", "8MiB", "--model", "raw"])
}

fn cache() -> Running {
    Running::start(&["cache", "--memory", "8MiB"])
}

fn bench(args: &[&str]) -> common::Done {
    run(&[&["bench"][..], args].concat())
}

fn record(args: &[&str]) -> Record {
    serde_json::from_str(&bench(&[args, &["--json"]].concat()).succeeded()).unwrap()
}

#[test]
fn a_service_says_itself_what_it_can_be_asked() {
    let (memo, cache) = (memo(), cache());
    let target = format!("tcp://{}", memo.place());
    let of_memo = record(&[&["--target", target.as_str()][..], &QUICK].concat());
    assert_eq!(of_memo.runs[0].report.settings.target, "classify");
    let of_cache = record(&[&[cache.place().as_str()][..], &QUICK].concat());
    assert_eq!(of_cache.runs[0].report.settings.target, "cache");
    let line = bench(&["--target", "ftp://127.0.0.1:1"]).failed_with_a_line();
    assert!(line.contains("ftp://") && line.contains("memcached://"), "{line}");
}

#[test]
fn a_hit_ratio_is_what_the_service_then_sees() {
    let (memo, cache) = (memo(), cache());
    for service in [&memo, &cache] {
        let place = service.place();
        let args = [&[place.as_str(), "--prefill", "--hit-ratio", "0.75"][..], &QUICK].concat();
        // Twice: the new images of the first run must not be hits in the second.
        for _ in 0..2 {
            let record = record(&args);
            let report = &record.runs[0].report;
            let ratio = report.hit_ratio.unwrap();
            // 2000 draws; five standard deviations are 0.048.
            assert!((0.70..0.80).contains(&ratio), "{ratio}");
            assert_eq!(report.settings.known_share, Some(0.75));
            assert_eq!((report.answered, report.wrong), (2000, 0));
        }
    }
}

#[test]
fn a_workload_file_says_what_flags_say_and_flags_beat_it() {
    let (cache, folder) = (cache(), folder());
    let workload = "population = 50\nread-share = 0.5\naccess = \"zipf\"\ncount = 500\n\
                    warm-up = \"0s\"\ndepth = [1, 8]\nseed = 7\n";
    let path = file(&folder, "workload.toml", workload);
    let place = cache.place();
    let runs = record(&[&place, "--workload", &path, "--population", "60"]).runs;
    let depths: Vec<usize> = runs.iter().map(|run| run.report.settings.depth).collect();
    assert_eq!(depths, [1, 8]);
    let settings = &runs[0].report.settings;
    assert_eq!((settings.population, settings.seed), (60, 7));
    assert_eq!((settings.read_share, settings.access.as_str()), (0.5, "zipf(1)"));
    assert!(runs.iter().all(|run| run.report.sent == 500));
    let path = file(&folder, "wrong.toml", "population = 5\nreedshare = 1\n");
    let line = bench(&[&place, "--workload", &path]).failed_with_a_line();
    assert!(line.contains(&path) && line.contains("line 2: unknown field `reedshare`"), "{line}");
}

#[test]
fn an_idx_file_is_a_population() {
    let (memo, folder) = (memo(), folder());
    let mut idx = vec![0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28];
    // Two different images, the first one twice.
    for shade in [9, 9, 200] {
        idx.extend([shade; 784]);
    }
    let path = file(&folder, "digits", &idx);
    let place = memo.place();
    let record = record(&[&place, "--images", &path, "--count", "10", "--warm-up", "0s"]);
    assert_eq!(record.runs[0].report.settings.population, 2);
    let path = file(&folder, "broken", b"these are no images");
    let line = bench(&[&place, "--images", &path]).failed_with_a_line();
    assert!(line.contains(&path), "{line}");
}

#[test]
fn a_broken_threshold_fails_the_run_and_names_itself() {
    let memo = memo();
    let args = |limits: &[&'static str]| {
        let limits = limits.iter().flat_map(|limit| ["--fail-if", limit]);
        bench(&[&[memo.place().as_str()][..], &QUICK, &limits.collect::<Vec<_>>()].concat())
    };
    args(&["p99>1s", "errors>0", "throughput<1"]).succeeded();
    let done = args(&["p99>1s", "p50>1ns", "hit-ratio<200%"]);
    assert!(done.stdout.contains("p99.99"), "the table comes all the same: {done:#?}");
    let line = done.stderr.lines().last().unwrap();
    assert!(line.contains("p50>1ns: p50 is") && line.contains("hit-ratio<200%"), "{line}");
    assert_eq!(done.status.code(), Some(1));
    let done = args(&["p98>1ms"]);
    assert!(done.stderr.contains("p98>1ms") && done.stderr.contains("p99.99"), "{done:#?}");
}

#[test]
fn all_files_that_were_asked_for_are_written() {
    let (memo, folder) = (memo(), folder());
    let path = |name| text(folder.path().join(name));
    let (page, hgrm, log) = (path("run.html"), path("run.hgrm"), path("run.hlog"));
    let files = ["--html", &page, "--hgrm", &hgrm, "--interval-log", &log, "--depth", "1,4"];
    bench(&[&[memo.place().as_str()][..], &QUICK, &files].concat()).succeeded();
    let read = |path: &str| fs::read_to_string(path).unwrap();
    assert!(read(&page).contains("Latency by percentile"));
    assert!(read(&hgrm).contains("1.000000000000       2000"), "{}", read(&hgrm));
    assert!(read(&log).contains("Tag=depth_4,"), "{}", read(&log));
}

#[test]
fn output_paths_are_checked_before_the_run() {
    let (memo, folder) = (memo(), folder());
    let place = memo.place();
    let path = |name| text(folder.path().join(name));
    fs::write(path("a-file"), "").unwrap();
    let (nowhere, no_folder, unused) = (path("no/such/file"), path("a-file/records"), path("new"));
    let long = [&place[..], "--duration", "60s", "--html", &unused];
    let began = Instant::now();
    for flags in [
        ["--html", &nowhere],
        ["--hgrm", &nowhere],
        ["--interval-log", &nowhere],
        ["--record", &no_folder],
    ] {
        let long = if flags[0] == "--html" { &long[..3] } else { &long[..] };
        let line = bench(&[long, &flags].concat()).failed_with_a_line();
        assert!(line.contains(flags[1]), "{line}");
        assert!(!Path::new(&unused).exists(), "an empty file stayed");
    }
    let ab = ["ab", &place, &place, "--duration", "60s", "--record", &no_folder];
    assert!(bench(&ab).failed_with_a_line().contains(&no_folder));
    assert!(began.elapsed() < Duration::from_secs(30), "a run came before the error");
}

#[test]
fn two_records_are_compared_and_put_on_one_page() {
    let (memo, folder) = (memo(), folder());
    let records = text(folder.path());
    for name in ["one", "two"] {
        let to = ["--repeat", "4", "--record", &records, "--record-name", name];
        bench(&[&[memo.place().as_str()][..], &QUICK, &to].concat()).succeeded();
    }
    let mut files: Vec<String> =
        fs::read_dir(folder.path()).unwrap().map(|entry| text(entry.unwrap().path())).collect();
    files.sort();
    let said = bench(&["compare", &files[0], &files[1]]).succeeded();
    assert!(said.contains("depth 1 (4 and 4 repeats)") && said.contains("95 %:"), "{said}");
    let page = text(folder.path().join("page.html"));
    bench(&["report", &files[0], &files[1], "--html", &page, "--title", "Both"]).succeeded();
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("<h1>Both</h1>") && page.contains("depth 1 (median of 4)"), "{page}");
    let named = files.iter().map(|file| Path::new(file).file_stem().unwrap().to_str().unwrap());
    assert!(named.clone().all(|name| page.contains(&format!("{name}, depth 1"))), "{page}");
    assert!(!page.contains("the second"), "{page}");
    let line = bench(&["compare", &files[0]]).failed_with_a_line();
    assert!(line.contains("a comparison needs two"), "{line}");
}

#[test]
fn two_services_are_measured_in_turn() {
    let (one, other, folder) = (memo(), memo(), folder());
    let records = text(folder.path());
    let args = ["ab", &one.place(), &other.place(), "--rounds", "6", "--record", &records];
    let said = bench(&[&args[..], &QUICK].concat()).succeeded();
    assert!(said.contains("6 rounds") && said.contains("95 %:"), "{said}");
    let path = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let names: Vec<String> =
        Record::read(&path).unwrap().runs.into_iter().map(|run| run.name).collect();
    assert_eq!(names[..4], ["A", "B", "B", "A"]);
    // The same again from the file.
    let again = bench(&["compare", &text(path)]).succeeded();
    let figures = |said: &str| {
        let lines = said.lines().filter(|line| line.contains("95 %"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(figures(&again), figures(&said));
}

#[test]
fn the_highest_rate_is_found_within_its_budget() {
    let memo = memo();
    let place = memo.place();
    let quick = ["--duration", "100ms", "--warm-up", "20ms", "--population", "50"];
    // A goal that any machine keeps at a rate that any machine reaches, and one that none keeps.
    let easy = ["find-max", &place, "--p99", "10s", "--start", "100", "--budget", "2s"];
    let done = bench(&[&easy[..], &quick, &["--prefill"]].concat());
    assert!(done.stdout.contains("holds"), "{done:#?}");
    assert!(done.stdout.contains("highest rate with p99 ≤ 10s"), "{done:#?}");
    let hard = ["find-max", &place, "--p99", "1ns", "--start", "100", "--budget", "2s"];
    let line = bench(&[&hard[..], &quick].concat()).failed_with_a_line();
    assert!(line.contains("no rate met the goal"), "{line}");
}

/// Starts the binary; the measurement is in progress when this returns.
fn started(args: &[&str], running: Duration) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    thread::sleep(running);
    child
}

#[test]
fn an_interrupted_run_keeps_its_figures() {
    let (memo, folder) = (memo(), folder());
    for (signal, code) in [(Signal::HUP, 129), (Signal::INT, 130), (Signal::TERM, 143)] {
        let (page, records) =
            (text(folder.path().join("p.html")), folder.path().join(signal.as_raw().to_string()));
        let place = memo.place();
        let args = ["bench", &place, "--duration", "60s", "--warm-up", "0s", "--population", "100"];
        let records_text = text(records.clone());
        let outputs = ["--depth", "1,4", "--html", &page, "--record", &records_text];
        let began = Instant::now();
        let child = started(&[&args[..], &outputs].concat(), Duration::from_secs(1));
        kill_process(Pid::from_child(&child), signal).unwrap();
        let done = child.wait_with_output().unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert_eq!(done.status.code(), Some(code), "{out}{err}");
        assert!(began.elapsed() < Duration::from_secs(30));
        assert!(out.contains("throughput") && out.contains("interrupted after"), "{out}");
        assert!(err.contains("interrupted by"), "{err}");
        assert!(fs::read_to_string(&page).unwrap().contains("interrupted after"));
        let path = fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
        let record = Record::read(&path).unwrap();
        let report = &record.runs[0].report;
        assert!(record.runs.len() == 1 && report.interrupted && report.answered > 0);
        assert!((0.1..30.0).contains(&report.measured_s), "{}", report.measured_s);
        assert_eq!(report.sent, report.answered, "requests in flight were waited for");
        assert_eq!(report.problems().len(), 1, "{:?}", report.problems());
    }
}

#[test]
fn an_interrupt_before_the_measurement_writes_nothing() {
    let (memo, folder) = (memo(), folder());
    let (place, page) = (memo.place(), text(folder.path().join("page.html")));
    let args = ["bench", &place, "--warm-up", "60s", "--population", "100", "--html", &page];
    let child = started(&args, Duration::from_secs(1));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let done = child.wait_with_output().unwrap();
    assert_eq!(done.status.code(), Some(130));
    assert!(done.stdout.is_empty() && !Path::new(&page).exists());
}

#[test]
fn find_max_and_ab_keep_what_they_found_when_interrupted() {
    let memo = memo();
    let place = memo.place();
    let quick = ["--warm-up", "0s", "--population", "50", "--duration", "200ms"];
    let search = ["bench", "find-max", &place, "--p99", "10s", "--start", "10", "--budget", "60s"];
    let ab = ["bench", "ab", &place, &place, "--rounds", "500"];
    for (args, expected) in [(&search[..], "held, not confirmed"), (&ab, "rounds")] {
        let child = started(&[args, &quick].concat(), Duration::from_secs(3));
        kill_process(Pid::from_child(&child), Signal::INT).unwrap();
        let done = child.wait_with_output().unwrap();
        let out = String::from_utf8_lossy(&done.stdout);
        assert_eq!(done.status.code(), Some(130), "{out}");
        assert!(out.contains(expected) && !out.contains("500 rounds"), "{out}");
    }
}

#[test]
fn nothing_to_ask_or_to_measure_is_a_clear_error() {
    let (memo, cache, folder) = (memo(), cache(), folder());
    for place in [memo.place(), cache.place()] {
        for (flag, value) in [
            ("--population", "0"),
            ("--count", "0"),
            ("--duration", "0s"),
            ("--depth", "0"),
            ("--connections", "0"),
            ("--load-threads", "0"),
        ] {
            let line = bench(&[&place, flag, value]).failed_with_a_line();
            assert!(line.contains(" is 0; it must be "), "{flag}: {line}");
        }
    }
    // A schedule that no clock can keep never ended, not even by a signal.
    for rate in ["1e18", "inf", "nan", "0", "-1"] {
        let line = bench(&[&memo.place(), &format!("--rate={rate}")]).failed_with_a_line();
        assert!(line.contains("above 0 and at most 1000000000"), "{rate}: {line}");
        let line = bench(&["find-max", &memo.place(), &format!("--start={rate}")]);
        assert!(line.stderr.contains("above 0 and at most 1000000000"), "{rate}: {line:#?}");
    }
    let path = file(&folder, "empty.toml", "population = 0\n");
    let line = bench(&[&cache.place(), "--workload", &path]).failed_with_a_line();
    assert!(line.contains("population is 0"), "{line}");
    let line = bench(&[&memo.place(), "--population", "4000000000"]).failed_with_a_line();
    assert!(line.contains("the limit for images"), "{line}");
    let line = bench(&[&cache.place(), "--population", "4294967295"]).failed_with_a_line();
    assert!(line.contains("the limit is"), "{line}");
}

#[test]
fn a_workload_file_takes_the_names_of_the_flags() {
    let (cache, folder) = (cache(), folder());
    let keys = "zipf = 1.5\nload-threads = 2\nconnections = 2\nrate = 5000\npoisson = true\n\
                count = 500\nwarm-up = \"0s\"\npopulation = 50\n";
    let path = file(&folder, "workload.toml", keys);
    let settings = &record(&[&cache.place(), "--workload", &path]).runs[0].report.settings;
    assert_eq!((settings.access.as_str(), settings.threads), ("zipf(1.5)", 2));
    assert_eq!(settings.mode, "open, Poisson");
}

#[test]
fn a_rate_below_one_is_shown() {
    let memo = memo();
    let args =
        [&memo.place(), "--rate", "0.5", "--count", "1", "--warm-up", "0s", "--population", "5"];
    let said = bench(&args).succeeded();
    assert!(said.contains("due         0.5 requests/s"), "{said}");
}

/// The number in a line such as `*2` or `$4`; `None` at the end of the stream.
fn length(input: &mut impl BufRead) -> Option<usize> {
    let mut line = String::new();
    input.read_line(&mut line).ok()?;
    line.trim_end().get(1..)?.parse().ok()
}

/// A Redis that wants this command for a login, answers every read with a miss, and repeats the
/// arguments of an unknown command, as Redis does.
fn fake_redis(login: &'static str) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut output = stream.try_clone().unwrap();
                let mut input = BufReader::new(stream);
                while let Some(parts) = length(&mut input) {
                    let mut words = Vec::new();
                    for _ in 0..parts {
                        let Some(len) = length(&mut input) else { return };
                        let mut word = vec![0; len + 2];
                        input.read_exact(&mut word).unwrap();
                        words.push(String::from_utf8_lossy(&word[..len]).into_owned());
                    }
                    let reply = match words.join(" ") {
                        command if command == login => "+OK\r\n".to_owned(),
                        command if command == "SELECT 3" => "+OK\r\n".to_owned(),
                        command if command == "INFO server" => {
                            "$21\r\nredis_version:0.0.0\r\n\r\n".to_owned()
                        }
                        command if command.starts_with("GET") => "$-1\r\n".to_owned(),
                        command => format!("-ERR unknown command, beginning with: {command}\r\n"),
                    };
                    if output.write_all(reply.as_bytes()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

#[test]
fn a_redis_address_takes_user_password_and_database() {
    let folder = folder();
    let (page, records) = (text(folder.path().join("p.html")), text(folder.path().join("records")));
    for (login, userinfo) in [("AUTH s3cr@et", ":s3cr%40et"), ("AUTH me s3cr@et", "me:s3cr%40et")] {
        let target = format!("redis://{userinfo}@{}/3", fake_redis(login));
        let args = [&target[..], "--count", "50", "--warm-up", "0s", "--population", "1"];
        let done = bench(&[&args[..], &["--html", &page, "--record", &records, "--json"]].concat());
        let json = done.succeeded();
        let page = fs::read_to_string(&page).unwrap();
        let path = fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
        for text in [&json, &page, &fs::read_to_string(path).unwrap()] {
            assert!(!text.contains("s3cr") && text.contains("redis://***@127.0.0.1"), "{text}");
        }
    }
    let args = [&cache().place(), "--token", "s3cret", "--json", "--count", "1", "--warm-up", "0s"];
    let said = bench(&args);
    assert!(!said.stdout.contains("s3cret") && !said.stderr.contains("s3cret"), "{said:#?}");
}

#[test]
fn no_error_shows_a_password() {
    let addr = fake_redis("AUTH other");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for target in [
        format!("redis://:s3cret@{addr}"),
        format!("redis://:s3cret@{closed}"),
        format!("redis://:s3c/ret@{addr}"),
        format!("redis://:s3c#ret@{addr}"),
        format!("redis://:s3cret@{addr}/x"),
        format!("redis://:s3cret@{addr}?db=3"),
        "redis://:s3cret@127.0.0.1:port".to_owned(),
        format!("rediss://:s3cret@{addr}"),
        format!("memcached://:s3cret@{addr}"),
        format!(":s3cret@{addr}"),
    ] {
        for args in [
            &[&target[..]][..],
            &["--target", &target],
            &["find-max", &target],
            &["ab", &target, &target],
        ] {
            let done = bench(args);
            assert!(!done.status.success(), "{target}");
            let said = format!("{}{}", done.stdout, done.stderr);
            assert!(!said.contains("s3c"), "{target}: {said}");
        }
    }
}

#[test]
fn find_max_says_when_the_generator_was_late() {
    let memo = memo();
    let place = memo.place();
    // No generator is as punctual as this goal, and no server.
    let args = [
        "find-max",
        &place,
        "--p99",
        "1ns",
        "--start",
        "2000000",
        "--budget",
        "1s",
        "--duration",
        "200ms",
        "--warm-up",
        "0s",
        "--population",
        "50",
        "--connections",
        "64",
    ];
    let done = bench(&args);
    assert!(done.stdout.contains("the load generator itself was late by"), "{done:#?}");
    assert!(done.stdout.contains("this machine is too busy"), "{done:#?}");
}
