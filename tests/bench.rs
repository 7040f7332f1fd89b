//! `afterimage bench` and its commands, against the real services.

// The exemption for tests does not reach the helpers beside them.
#![allow(clippy::unwrap_used)]
mod common;

use std::fs;

use afterimage_bench::record::Record;
use common::{Running, file, folder, run, text};

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
    let line = bench(&["--target", "http://127.0.0.1:1"]).failed_with_a_line();
    assert!(line.contains("--target http://") && line.contains("memcached://"), "{line}");
}

#[test]
fn a_hit_ratio_is_what_the_service_then_sees() {
    let (memo, cache) = (memo(), cache());
    for service in [&memo, &cache] {
        let place = service.place();
        let args = [&[place.as_str(), "--prefill", "--hit-ratio", "0.75"][..], &QUICK].concat();
        // Twice: what was fresh in the first run must not be remembered in the second.
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
    let nowhere = path("no/such/folder.html");
    let line = bench(&[&[memo.place().as_str()][..], &QUICK, &["--html", &nowhere]].concat());
    assert!(line.failed_with_a_line().contains(&nowhere));
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
    assert!(page.contains("<h1>Both</h1>") && page.contains("two, depth 1 (middle of 4)"));
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
    assert!(line.contains("no rate held the goal"), "{line}");
}
