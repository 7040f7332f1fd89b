//! `afterimage stream` as processes: files of any size in bounded memory, and runs that continue
//! after `kill -9` with the same bits.

// The exemption for tests does not reach the helpers beside them.
#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Running, file, folder, run};
use serde_json::Value;
use tempfile::TempDir;

fn serve(state: &TempDir, extra: &[&str]) -> Running {
    let mut args = vec!["stream", "serve", "--listen", "127.0.0.1:0"];
    args.extend(["--state", state.path().to_str().unwrap()]);
    args.extend(extra);
    Running::start(&args)
}

/// The result of a run that must succeed.
fn result(args: &[&str]) -> Value {
    let mut all = vec!["stream", "run", "--json"];
    all.extend(args);
    serde_json::from_str(&run(&all).succeeded()).unwrap()
}

/// The parts of a result that do not depend on time.
fn bits(report: &Value) -> String {
    let Value::Object(report) = report else { panic!("{report}") };
    let parts = ["bytes", "records", "refused", "value"];
    parts.map(|part| report[part].to_string()).join(" ")
}

/// Numbers that any sum in `f64` gets wrong.
fn numbers(count: u64) -> String {
    let mut text = String::new();
    for i in 0..count {
        let number = (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 11) as f64;
        let number = match i % 4 {
            0 => number * 1e3,
            1 => -number * 1e3,
            2 => number / 1e19,
            _ => 0.1,
        };
        let _ = writeln!(text, "{number:e}");
    }
    text
}

#[test]
fn a_mean_is_exact_here_and_at_a_service() {
    let folder = folder();
    let text = "10000000000000000\n".to_owned() + &"1\n".repeat(1_000_000) + "-10000000000000000\n";
    let path = file(&folder, "numbers.txt", &text);
    let here = result(&["mean", &path]);
    assert_eq!(here["value"]["sum"], 1e6);
    assert_eq!(here["value"]["mean"], 1e6 / 1_000_002.0);
    let service = serve(&folder, &[]);
    let place = service.place();
    assert_eq!(bits(&result(&["mean", &path, "--server", &place])), bits(&here));
    let shown = run(&["stream", "run", "mean", &path]).succeeded();
    assert!(shown.contains("1,000,002 records, 1.9 MiB"), "{shown}");
}

#[test]
fn formats_and_fields_are_those_of_the_file() {
    let folder = folder();
    let files = [
        ("a.json", "[{\"ms\":1},{\"ms\":2.5},{\"x\":0,\"ms\":-3}]"),
        ("a.jsonl", "{\"ms\":1}\n{\"ms\":2.5}\n{\"ms\":-3,\"y\":\"}\"}\n"),
        ("a.csv", "id,ms\n1,1\n\"2,\n\",2.5\n3,-3\n"),
    ];
    for (name, text) in files {
        let path = file(&folder, name, text);
        let report = result(&["mean", &path, "--field", "ms"]);
        assert_eq!(report["value"]["sum"], 0.5, "{name}");
        assert_eq!(report["records"], 3, "{name}");
    }
    let path = file(&folder, "bad.txt", "1\nx\n3\n");
    let error = run(&["stream", "run", "mean", &path]).failed_with_a_line();
    assert!(error.contains("record 1 at byte 2: the value is not a number"), "{error}");
    let report = result(&["mean", &path, "--on-bad", "skip"]);
    assert_eq!((&report["refused"], &report["value"]["mean"]), (&1.into(), &2.0.into()));
    let path = file(&folder, "long.txt", "1\n".to_owned() + &"2".repeat(2000) + "\n3\n");
    let error = run(&["stream", "run", "count", &path, "--max-record", "1KiB"]);
    let error = error.failed_with_a_line();
    assert!(error.contains("at byte 2: the record is longer than the limit of 1024"), "{error}");
}

/// A client that gets the first `sent` bytes of its input, and then waits for more.
struct Client {
    child: Child,
}

impl Client {
    fn start(args: &[&str], input: &[u8]) -> Client {
        let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
        command.args(["stream", "run"]).args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        // A dead client has closed its pipe.
        let _ = child.stdin.as_mut().unwrap().write_all(input);
        Client { child }
    }

    /// Ends it as `kill -9` does.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Waits until the checkpoint of `id` is after the first byte.
fn wait_for_checkpoint(state: &Path, id: &str) {
    let begun = Instant::now();
    // A new run's file has its generation alone.
    while std::fs::metadata(state.join(format!("{id}.run"))).map_or(0, |data| data.len()) <= 8 {
        assert!(begun.elapsed() < common::PATIENCE, "no checkpoint of {id}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_client_killed_after_any_byte_is_resumed() {
    let (inputs, state) = (folder(), folder());
    let text = "1e16\n2.5\n\n-1e16\nx\n7\n";
    let path = file(&inputs, "numbers.txt", text);
    let whole = bits(&result(&["mean", &path, "--on-bad", "skip"]));
    let service = serve(&state, &["--checkpoint-every", "1ms"]);
    let place = service.place();
    let fixed = ["--format", "lines", "--on-bad", "skip", "--server", &place];
    for cut in 1..text.len() {
        let id = format!("cut-{cut}");
        let args = [&["mean", "-", "--id", &id][..], &fixed].concat();
        let client = Client::start(&args, &text.as_bytes()[..cut]);
        let begun = Instant::now();
        while !state.path().join(format!("{id}.run")).exists() {
            assert!(begun.elapsed() < common::PATIENCE, "the run did not begin");
            std::thread::sleep(Duration::from_millis(1));
        }
        client.kill();
        let args = [&["mean", &path, "--resume", &id][..], &fixed].concat();
        assert_eq!(bits(&result(&args)), whole, "cut at {cut}");
        // The result is kept: a client that did not get it asks again.
        assert_eq!(bits(&result(&args)), whole, "again after a cut at {cut}");
    }
}

#[test]
fn a_service_killed_at_random_gives_the_same_bits() {
    let (inputs, state) = (folder(), folder());
    let path = file(&inputs, "numbers.txt", numbers(400_000));
    let whole = bits(&result(&["mean", &path]));
    let mut service = serve(&state, &["--checkpoint-every", "5ms"]);
    let place = service.place();
    let mut client = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    client.args(["stream", "run", "mean", &path, "--json", "--id", "a", "--server", &place]);
    client.stdout(Stdio::piped()).stderr(Stdio::null());
    let client = client.spawn().unwrap();
    wait_for_checkpoint(state.path(), "a");
    for round in 1..4 {
        service.kill();
        service.restart();
        std::thread::sleep(Duration::from_millis(20 * round));
    }
    let done = client.wait_with_output().unwrap();
    assert!(done.status.success());
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(bits(&report), whole);
}

#[test]
fn a_second_connection_takes_over_at_once() {
    let (inputs, state) = (folder(), folder());
    let path = file(&inputs, "numbers.txt", numbers(1000));
    let whole = bits(&result(&["mean", &path]));
    let service = serve(&state, &["--checkpoint-every", "1ms"]);
    let place = service.place();
    let first = ["mean", "-", "--format", "lines", "--server", &place, "--id", "a"];
    let mut first = Client::start(&first, &numbers(1000).as_bytes()[..500]);
    let begun = Instant::now();
    while !state.path().join("a.run").exists() {
        assert!(begun.elapsed() < common::PATIENCE, "the run did not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    let second = ["mean", &path, "--format", "lines", "--server", &place, "--resume", "a"];
    assert_eq!(bits(&result(&second)), whole);
    // The first one ends with an error, although its input goes on.
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = first.child.try_wait().unwrap() {
            break status;
        }
        assert!(begun.elapsed() < common::PATIENCE, "the first connection goes on");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(!status.success());
}

#[test]
fn a_run_of_another_plan_is_not_resumed() {
    let folder = folder();
    let path = file(&folder, "numbers.txt", "1\n2\n");
    let state = folder.path().join("state");
    let state = state.to_str().unwrap();
    result(&["mean", &path, "--state", state, "--id", "a"]);
    let error = run(&["stream", "run", "count", &path, "--state", state, "--resume", "a"]);
    assert!(error.failed_with_a_line().contains("the checkpoint is of another run"));
    let error = run(&["stream", "run", "mean", &path, "--state", state, "--id", "a"]);
    assert!(error.failed_with_a_line().contains("there is a checkpoint of \"a\" already"));
    let error = run(&["stream", "run", "mean", &path, "--state", state, "--resume", "b"]);
    assert!(error.failed_with_a_line().contains("there is no checkpoint of \"b\""));
}

#[test]
fn an_idx_file_is_classified_through_a_memo_and_resumed() {
    let (inputs, state) = (folder(), folder());
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let place = memo.place();
    let count = 500_u32;
    // IDX has the highest byte first.
    let header = [0, 0, 8, 3, 0, 0, 1, 0xF4, 0, 0, 0, 28, 0, 0, 0, 28];
    let images = (0..count * 784).map(|i| (i / 784 % 50 + i % 784 % 251) as u8);
    let bytes: Vec<u8> = header.into_iter().chain(images).collect();
    let path = file(&inputs, "images.idx", &bytes);
    let out = inputs.path().join("labels.txt");
    let out = out.to_str().unwrap();
    let state = state.path().to_str().unwrap();
    let report = result(&["classify", &path, "--server", &place, "--out", out]);
    assert_eq!(report["records"], count);
    let whole = std::fs::read_to_string(out).unwrap();
    assert_eq!(whole.lines().count(), count as usize);
    assert!(report["value"]["misses"].as_u64().unwrap() <= 50, "{report}");
    // Half of the file is an error at its end, and labels of whole records.
    let cut = file(&inputs, "cut.idx", &bytes[..bytes.len() / 2]);
    let fixed = ["--server", &place, "--out", out, "--state", state];
    let args = [&["stream", "run", "classify", &cut, "--id", "a"], &fixed[..]].concat();
    let error = run(&args).failed_with_a_line();
    assert!(error.contains("the input ends within a record"), "{error}");
    std::fs::OpenOptions::new().append(true).open(out).unwrap().write_all(b"rubbish").unwrap();
    let report = result(&[&["classify", &path, "--resume", "a"], &fixed[..]].concat());
    assert_eq!(report["records"], count);
    assert_eq!(std::fs::read_to_string(out).unwrap(), whole);
}

#[test]
fn a_mistake_of_classify_empties_no_file() {
    let inputs = folder();
    let (labels, digits) = (file(&inputs, "labels.txt", "7\n"), file(&inputs, "in.idx", "digits"));
    // No memo listens there.
    let nowhere = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let nowhere = nowhere.to_string();
    let refused = |input: &str, out: &str| {
        let args = ["stream", "run", "classify", input, "--out", out, "--server", &nowhere];
        let done = run(&args);
        assert!(!done.status.success());
        done.stderr
    };
    assert!(refused("missing.idx", &labels).contains("cannot read missing.idx"));
    assert!(refused(&digits, &digits).contains("is the input"));
    assert!(refused(&digits, &labels).contains("cannot connect"));
    assert_eq!(std::fs::read_to_string(&labels).unwrap(), "7\n");
    assert_eq!(std::fs::read_to_string(&digits).unwrap(), "digits");
}

/// The ports of a database, as lines of key, name and longitude.
fn ports(database: &str) -> Vec<String> {
    let database = rusqlite::Connection::open(database).unwrap();
    let mut rows = database.prepare("SELECT key, name, longitude FROM ports ORDER BY key").unwrap();
    let rows = rows.query_map([], |row| {
        let longitude: Option<f64> = row.get(2)?;
        Ok(format!("{} {} {longitude:?}", row.get::<_, String>(0)?, row.get::<_, String>(1)?))
    });
    rows.unwrap().map(Result::unwrap).collect()
}

#[test]
fn ports_are_stored_once_each_through_kills_of_the_service() {
    let (inputs, state) = (folder(), folder());
    let members = (0..60_000).map(|i| {
        let i = i * 7919 % 60_000;
        format!(
            "\"K{i:05}\": {{\"name\": \"Port {i}\", \"city\": \"C\", \"coordinates\": [{}.5, 1]}}",
            i % 180
        )
    });
    let text = format!("{{\n{}\n}}", members.collect::<Vec<_>>().join(",\n"));
    let path = file(&inputs, "ports.json", text);
    let own = inputs.path().join("own.db");
    let own = own.to_str().unwrap();
    let whole = result(&["ports", &path, "--database", own, "--id", "a"]);
    assert_eq!(whole["value"]["ports"], 60_000);
    assert_eq!(ports(own).len(), 60_000);
    let database = inputs.path().join("service.db");
    let database = database.to_str().unwrap();
    let mut service = serve(&state, &["--database", database]);
    let place = service.place();
    let mut client = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    client.args(["stream", "run", "ports", &path, "--json", "--id", "a", "--server", &place]);
    client.stdout(Stdio::piped()).stderr(Stdio::null());
    let client = client.spawn().unwrap();
    let begun = Instant::now();
    while std::fs::metadata(database.to_owned() + "-wal").map_or(0, |data| data.len()) < 100_000 {
        assert!(begun.elapsed() < common::PATIENCE, "no port was stored");
        std::thread::sleep(Duration::from_millis(1));
    }
    for round in 1..4 {
        service.kill();
        service.restart();
        std::thread::sleep(Duration::from_millis(50 * round));
    }
    let done = client.wait_with_output().unwrap();
    assert!(done.status.success());
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(bits(&report), bits(&whole));
    assert!(ports(database) == ports(own));
}

#[test]
fn records_set_aside_are_written_once() {
    let folder = folder();
    let text = "1\nx\n3\n\"y\"\n5\n";
    let path = file(&folder, "numbers.txt", text);
    let cut = file(&folder, "cut.txt", &text[..7]);
    let (aside, state) = (folder.path().join("aside.jsonl"), folder.path().join("state"));
    let (aside, state) = (aside.to_str().unwrap(), state.to_str().unwrap());
    let fixed = ["--set-aside", aside, "--state", state];
    let report = result(&[&["mean", &path][..], &fixed].concat());
    assert_eq!((&report["refused"], &report["value"]["mean"]), (&2.into(), &3.0.into()));
    let whole = std::fs::read_to_string(aside).unwrap();
    let lines: Vec<Value> = whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["offset"], &lines[0]["record"]), (&2.into(), &"x".into()));
    assert_eq!((&lines[1]["offset"], &lines[1]["record"]), (&6.into(), &"\"y\"".into()));
    // The file was cut within the second one, which is then another record.
    result(&[&["mean", &cut, "--id", "a"][..], &fixed].concat());
    assert_eq!(std::fs::read_to_string(aside).unwrap().lines().count(), 2);
    let report = result(&[&["mean", &path][..], &fixed].concat());
    assert_eq!(report["refused"], 2);
    assert_eq!(std::fs::read_to_string(aside).unwrap(), whole);
}

/// The resident memory of a process without the pages of its program file, in bytes. A program
/// without optimization is large.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_gibibyte_takes_32_mib_in_both_processes() {
    const BYTES: u64 = 1 << 30;
    let state = folder();
    let service = serve(&state, &[]);
    let place = service.place();
    let args = ["count", "-", "--format", "fixed:4096", "--server", &place, "--id", "a", "--json"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.args(["stream", "run"]).args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut client = command.spawn().unwrap();
    let mut input = client.stdin.take().unwrap();
    let chunk = vec![7; 1 << 20];
    let mut peaks = [0; 2];
    for _ in 0..BYTES >> 20 {
        input.write_all(&chunk).unwrap();
        // The client lives until its input ends.
        for (peak, pid) in peaks.iter_mut().zip([client.id(), service.pid()]) {
            *peak = resident(pid).max(*peak);
        }
    }
    drop(input);
    let done = client.wait_with_output().unwrap();
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&report["bytes"], &report["records"]), (&BYTES.into(), &(BYTES / 4096).into()));
    println!("peaks: {} MiB and {} MiB", peaks[0] >> 20, peaks[1] >> 20);
    assert!(peaks.into_iter().all(|peak| peak <= 32 << 20), "{peaks:?}");
}
