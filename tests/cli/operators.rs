//! Commands for operators: ping, doctor, completions, manual pages, and logs as JSON.

use std::io::{Read, Write};
use std::net::TcpListener;

use serde_json::Value;

use crate::common::{self, Running, run};
use crate::unused_address;

#[test]
fn ping_reports_a_service_over_tcp_and_over_http() {
    let admin = ["--admin", "127.0.0.1:0"];
    let memo = Running::start(&[&["serve", "--model", "raw"][..], &admin].concat());
    let probes = memo.printed_address("metrics and probes on http://");
    let text = run(&["ping", &memo.place(), "--ready"]).succeeded();
    assert!(text.starts_with(&format!("memo {} answered in ", memo.place())), "{text}");
    let json = run(&["ping", "--json", &format!("http://{probes}")]).succeeded();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert!(json["time_us"].as_f64().unwrap() > 0.0, "{json}");
}

#[test]
fn ping_fails_if_nothing_answers_or_a_memo_is_not_ready() {
    let unused = unused_address();
    let error = run(&["ping", &unused]).failed_with_a_line();
    assert!(error.contains(&format!("cannot connect to {unused}")), "{error}");
    let url = format!("http://{unused}");
    let error = run(&["ping", &url]).failed_with_a_line();
    assert!(error.contains("cannot connect"), "{error}");
    // A listener that never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", silent.local_addr().unwrap());
    let error = run(&["ping", &url, "--timeout", "200ms"]).failed_with_a_line();
    assert!(error.contains("within 200ms"), "{error}");

    let args = ["memo", "--classifier", &unused, "--admin", "127.0.0.1:0"];
    let memo = Running::start(&args);
    run(&["ping", &memo.place()]).succeeded();
    let error = run(&["ping", &memo.place(), "--ready"]).failed_with_a_line();
    assert!(error.contains("has not reached its classifier"), "{error}");
    let probes = format!("http://{}", memo.printed_address("metrics and probes on http://"));
    run(&["ping", &probes]).succeeded();
    let error = run(&["ping", &probes, "--ready"]).failed_with_a_line();
    assert!(error.contains("503") && error.contains("classifier"), "{error}");
}

#[test]
fn doctor_names_what_it_cannot_reach_and_gives_advice() {
    let (cache, unused) = (Running::start(&["cache"]), unused_address());
    let done = run(&["doctor", "--store", &cache.place()]);
    let text = done.succeeded();
    for line in ["processor: ", "file limit: ", "port 7400: ", "settings: "] {
        assert!(text.contains(line), "{line}: {text}");
    }
    assert!(text.contains(&format!("ok       store {}: answered in ", cache.place())), "{text}");

    let args = ["doctor", "--json", "--classifier", &cache.place(), "--store", &unused];
    let done = run(&args);
    assert_eq!(done.status.code(), Some(1), "{done:?}");
    let json: Value = serde_json::from_str(&done.stdout).unwrap();
    let check = |name: &str| {
        let checks = json["checks"].as_array().unwrap();
        checks.iter().find(|check| check["check"].as_str().unwrap().starts_with(name)).unwrap()
    };
    let store = check("store ");
    assert_eq!(store["result"], "failed", "{store}");
    assert!(store["advice"].as_str().unwrap().contains("afterimage cache --listen"), "{store}");
    let classifier = check("classifier ");
    assert!(classifier["found"].as_str().unwrap().ends_with("but it is a cache"), "{classifier}");
}

/// A Redis server that requires a password: the same error to each command of one connection.
fn redis_with_password() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = stream.read(&mut buffer) {
            let lines = buffer[..read].split(|byte| *byte == b'\n');
            for _ in lines.filter(|line| line.starts_with(b"*")) {
                let _ = stream.write_all(b"-NOAUTH Authentication required.\r\n");
            }
        }
    });
    address
}

#[test]
fn doctor_checks_the_address_and_the_login_of_redis() {
    let (closed, locked) = (unused_address(), redis_with_password());
    for (store, found) in [
        (format!("redis://{closed}"), "refused"),
        (format!("redis://{locked}"), "the server requires a password"),
        ("redis://127.0.0.1:1?db=3".into(), "unknown parameter `db`"),
        ("redis://::1:6379".into(), "an IPv6 address needs brackets"),
        ("redis://".into(), "it names no host"),
    ] {
        let done = run(&["doctor", "--store", &store]);
        assert_eq!(done.status.code(), Some(1), "{done:?}");
        let line = done.stdout.lines().find(|line| line.contains(" store ")).unwrap();
        assert!(line.starts_with("failed") && line.contains(found), "{store}: {line}");
    }
}

#[test]
fn completions_and_manual_pages_cover_every_command() {
    let script = run(&["completions", "bash"]).succeeded();
    assert!(script.contains("--max-connections"), "{script}");
    let folder = common::folder();
    let pages = common::text(folder.path().join("man"));
    run(&["man", "--out", &pages]).succeeded();
    for page in ["afterimage.1", "afterimage-serve.1", "afterimage-bench-find-max.1"] {
        let page = std::fs::read_to_string(folder.path().join("man").join(page)).unwrap();
        assert!(page.contains(".TH"), "{page}");
    }
}

#[test]
fn each_line_of_a_json_log_is_an_object() {
    let mut cache = Running::start(&["--log-format", "json", "cache", "--memory", "8MiB"]);
    cache.signal(rustix::process::Signal::TERM);
    assert!(cache.wait().success());
    let log = cache.log();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let message = |line: &Value| line["message"].as_str().unwrap_or_default().to_owned();
    let first = message(&lines[0]);
    assert!(first.starts_with("afterimage ") && first.contains("memory=8MiB"), "{log}");
    assert!(message(lines.last().unwrap()).starts_with("stopped after "), "{log}");
    assert!(lines.iter().all(|line| line["level"].is_string() && line["timestamp"].is_string()));
}
