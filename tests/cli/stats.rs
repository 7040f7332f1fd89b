//! `afterimage stats` against real services: rates, JSON, and the live view where the output is no
//! terminal.

use crate::common;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_wire::ClientOptions;
use afterimage_wire::blocking::Client;
use serde_json::Value;

use crate::common::{PATIENCE, Running, run};

/// A live view that writes lines; killed at its end.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    fn start(args: &[&str]) -> Watch {
        let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
        command.args(["stats", "--watch", "--every", "100ms"]).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Watch { child, lines }
    }

    /// The first line to come that is wanted. There is one every tenth of a second.
    fn until(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let lines = self.lines.by_ref().map(Result::unwrap).take(300);
        let mut seen = Vec::new();
        for line in lines {
            if wanted(&line) {
                return line;
            }
            seen.push(line);
        }
        panic!("not among these lines:\n{}", seen.join("\n"));
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn rates_and_the_hit_ratio_are_in_the_text_and_in_the_json() {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let client = Client::connect(memo.addr(), ClientOptions::new()).unwrap();
    let asking = std::thread::spawn({
        let (client, place) = (client.clone(), memo.place());
        move || {
            let watched = std::thread::spawn(move || run(&["stats", "--json", &place]).succeeded());
            while !watched.is_finished() {
                client.classify(&[7; 784]).unwrap();
            }
            watched.join().unwrap()
        }
    });
    let json: Value = serde_json::from_str(&asking.join().unwrap()).unwrap();
    assert!(json["interval_s"].as_f64().unwrap() >= 0.5, "{json:#}");
    assert!(json["per_second"]["hits"].as_f64().unwrap() > 0.0, "{json:#}");
    assert!(json["recent"]["hit_latency_ns"]["p99"].as_u64().unwrap() > 0, "{json:#}");
    assert!(json["recent_hit_ratio"].as_f64().unwrap() > 0.9, "{json:#}");
    assert_eq!(json["values"]["misses"], 1);
    assert_eq!(json["values"]["miss_latency_ns"]["count"], 1);
    for name in ["hit_latency_ns", "miss_latency_ns", "coalesced_latency_ns"] {
        assert!(json["values"][name]["p999"].is_u64(), "{name}: {json:#}");
    }

    // Once, without rates.
    let text = run(&["stats", "--over", "0s", &memo.place()]).succeeded();
    assert!(text.contains("hit ratio") && !text.contains("/s"), "{text}");
}

#[test]
fn a_cache_reports_its_size_and_its_snapshots() {
    let folder = common::folder();
    let snapshot = common::text(folder.path().join("snapshot"));
    let cache = Running::start(&["cache", "--memory", "8MiB", "--snapshot", &snapshot]);
    let client = Client::connect(cache.addr(), ClientOptions::new()).unwrap();
    client.cache().set(1, 10).unwrap();
    assert_eq!(client.cache().get(1).unwrap(), Some(10));
    assert_eq!(client.cache().get(2).unwrap(), None);
    run(&["snapshot", &cache.place()]).succeeded();
    let json = run(&["stats", "--json", &cache.place()]).succeeded();
    let json: Value = serde_json::from_str(&json).unwrap();
    let values = &json["values"];
    for (name, value) in
        [("entries", 1), ("hits", 1), ("misses", 1), ("writes", 1), ("evictions", 0)]
    {
        assert_eq!(values[name], value, "{name}: {json:#}");
    }
    assert_eq!((&values["snapshots_written"], &values["snapshot_entries"]), (&1.into(), &1.into()));
    assert!(values["snapshot_age_ms"].as_u64().unwrap() < 60_000, "{json:#}");
    for name in ["capacity", "memory_bytes", "snapshot_bytes"] {
        assert!(values[name].as_u64().unwrap() > 0, "{name}: {json:#}");
    }
    for name in ["hits", "misses", "writes", "evictions", "requests"] {
        assert!(json["per_second"][name].is_number(), "{name}: {json:#}");
    }
    assert_eq!(json["hit_ratio"], 0.5);
}

#[test]
fn the_live_view_writes_lines_and_outlives_a_restart() {
    let mut cache = Running::start(&["cache", "--memory", "8MiB"]);
    let mut watch = Watch::start(&[&cache.place()]);
    let mut as_json = Watch::start(&["--json", &cache.place()]);
    watch.until(|line| line.contains("hits 0/s") && line.contains("entries 0"));
    as_json.until(|line| serde_json::from_str::<Value>(line).unwrap()["interval_s"].is_number());
    cache.kill();
    watch.until(|line| line.starts_with("no answer: "));
    as_json.until(|line| serde_json::from_str::<Value>(line).unwrap()["error"].is_string());
    cache.restart();
    let client = Client::connect(cache.addr(), ClientOptions::new()).unwrap();
    client.cache().set(1, 1).unwrap();
    client.cache().get(1).unwrap();
    watch.until(|line| line.contains("entries 1"));
    as_json.until(|line| serde_json::from_str::<Value>(line).unwrap()["values"]["hits"] == 1);
}

#[test]
#[cfg(unix)]
fn the_live_view_ends_with_success_on_a_signal() {
    use rustix::process::{Pid, Signal, kill_process};
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    for signal in [Signal::INT, Signal::TERM] {
        let mut watch = Watch::start(&[&cache.place()]);
        watch.until(|line| line.contains("entries"));
        kill_process(Pid::from_child(&watch.child), signal).unwrap();
        assert_eq!(watch.child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn a_server_that_is_not_there_is_one_line_and_no_more() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let unused = unused.to_string();
    for args in [&["stats", &unused][..], &["stats", "--watch", &unused], &["snapshot", &unused]] {
        // No line of the log beside it, which would say the same.
        let line = run(args).failed_with_a_line();
        assert!(line.contains("refused"), "{line}");
    }
}

#[test]
fn each_replica_has_a_label_in_prometheus_and_a_name_in_json() {
    let classifier = Running::start(&["classifier", "--model", "raw"]);
    let (at, unused) = (classifier.addr().to_string(), "127.0.0.1:1");
    let both = format!("{at},{unused}");
    let memo = Running::start(&["memo", "--classifier", &both, "--memory", "8MiB"]);
    let client = Client::connect(memo.addr(), ClientOptions::new()).unwrap();
    // The replica that refuses may be the first one to be tried.
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = client.classify(&[7; 784]) {
        assert!(Instant::now() < deadline, "{error}");
        std::thread::sleep(Duration::from_millis(10));
    }
    let text = run(&["stats", "--prometheus", &memo.place()]).succeeded();
    for (address, connected) in [(at.as_str(), 1), (unused, 0)] {
        let labels = format!("service=\"memo\",replica=\"{address}\"");
        for (name, value) in [("connected", connected), ("in_flight", 0)] {
            let series = format!("afterimage_replica_{name}{{{labels}}} {value}\n");
            assert!(text.contains(&series), "{series}: {text}");
        }
    }
    let json = run(&["stats", "--json", "--over", "0s", &memo.place()]).succeeded();
    let json: Value = serde_json::from_str(&json).unwrap();
    let name = format!("replica_connected{{replica=\"{at}\"}}");
    assert_eq!(json["values"][&name], 1, "{json}");
    // The table for people has one line for each replica.
    let table = run(&["stats", "--over", "0s", &memo.place()]).succeeded();
    assert_eq!(table.matches(&at).count(), 1, "{table}");
}

/// Reads text from standard input with the parser of Prometheus' Python client, and prints each
/// family: name, type, whether it has a help text, and the number of its samples.
const PARSER: &str = "
import sys
from prometheus_client.parser import text_string_to_metric_families as families
for family in families(sys.stdin.read()):
    names = {(s.name, tuple(sorted(s.labels.items()))) for s in family.samples}
    assert len(names) == len(family.samples), f'{family.name}: a sample occurs twice'
    print(family.name, family.type, bool(family.documentation), len(names))
";

#[test]
fn the_python_client_of_prometheus_parses_the_text() {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let client = Client::connect(memo.addr(), ClientOptions::new()).unwrap();
    client.classify(&[7; 784]).unwrap();
    client.classify(&[7; 784]).unwrap();
    let text = run(&["stats", "--prometheus", &memo.place()]).succeeded();
    let hits = "afterimage_lookups_total{service=\"memo\",result=\"hit\"} 1\n";
    assert!(text.contains(hits), "{text}");

    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut parser = Command::new(&python);
    parser.args(["-c", PARSER]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let has_client = Command::new(&python).args(["-c", "import prometheus_client"]).output();
    if !has_client.is_ok_and(|output| output.status.success()) {
        // The test harness shows only the standard error of the process itself.
        let why = "no Python with prometheus-client (TEST_PYTHON)";
        let _ = writeln!(std::io::stderr(), "SKIPPED the parser of Prometheus: {why}");
        return;
    }
    let mut child = parser.spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}\n{text}");
    let families = String::from_utf8(output.stdout).unwrap();
    for family in [
        "afterimage_lookups counter True 3",
        "afterimage_saved_time_seconds counter True 1",
        "afterimage_store_memory_bytes gauge True 1",
        // For each result 27 bounds, infinity, sum and count.
        "afterimage_latency_seconds histogram True 90",
        "afterimage_uptime_seconds counter True 1",
        "afterimage_version_info gauge True 1",
    ] {
        assert!(families.lines().any(|line| line == family), "{family}: {families}");
    }
}
