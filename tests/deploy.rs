//! The files in `deploy`, checked by the tools that read them and against the real binary.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{PATIENCE, Running};

/// Whether a program is installed. If not, says that the test is skipped.
fn has(program: &str) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    let found = command.status().is_ok();
    if !found {
        println!("SKIPPED: {program} is not installed");
    }
    found
}

/// The body of `GET path`, or nothing while nothing listens.
fn get(address: SocketAddr, path: &str) -> String {
    let mut body = String::new();
    if let Ok(mut stream) = TcpStream::connect(address) {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: here\r\nconnection: close\r\n\r\n");
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.read_to_string(&mut body);
    }
    body
}

/// Starts services with an admin listener each: a cache, a classifier, and a memo before both.
fn services() -> (Vec<Running>, Vec<SocketAddr>) {
    let admin = ["--admin", "127.0.0.1:0"];
    let cache = Running::start(&[&["cache", "--memory", "8MiB"][..], &admin].concat());
    let classifier = Running::start(&[&["classifier", "--model", "raw"][..], &admin].concat());
    let (store, upstream) = (cache.place(), classifier.place());
    let memo = ["memo", "--store", &store, "--classifier", &upstream, "--audit", "1/100"];
    let memo = Running::start(&[&memo[..], &admin].concat());
    let services = vec![cache, classifier, memo];
    let addresses =
        services.iter().map(|service| service.printed_address("metrics and probes on http://"));
    let addresses = addresses.collect();
    (services, addresses)
}

/// The words of a text that begin with our prefix.
fn metrics(text: &str) -> BTreeSet<&str> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("afterimage_")).collect()
}

#[test]
fn alerts_use_metrics_that_exist() {
    let (_services, addresses) = services();
    let pages: String = addresses.iter().map(|&address| get(address, "/metrics")).collect();
    let (known, alerts) =
        (metrics(&pages), std::fs::read_to_string("deploy/prometheus/alerts.yml").unwrap());
    let used = metrics(&alerts);
    assert!(used.len() >= 5, "{used:?}");
    let unknown: Vec<_> = used.difference(&known).collect();
    assert!(unknown.is_empty(), "no service has {unknown:?}");
}

#[test]
fn promtool_accepts_the_metrics_and_the_rules() {
    if !has("promtool") {
        return;
    }
    let check = |args: &[&str], input: &str| {
        let mut child = Command::new("promtool");
        child.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = child.spawn().unwrap();
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&text));
    };
    check(&["check", "rules", "deploy/prometheus/alerts.yml"], "");
    check(&["check", "config", "deploy/prometheus/prometheus.yml"], "");
    let (_services, addresses) = services();
    for address in addresses {
        let page = get(address, "/metrics");
        check(&["check", "metrics"], page.split_once("\r\n\r\n").unwrap().1);
    }
}

/// A child process that is killed at the end of its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_real_prometheus_scrapes_every_service() {
    if !has("prometheus") {
        return;
    }
    let (_services, addresses) = services();
    let folder = common::folder();
    let targets: Vec<String> = addresses.iter().map(|address| format!("'{address}'")).collect();
    let config = format!(
        "global: {{scrape_interval: 1s}}\nscrape_configs:\n  - job_name: afterimage\n    \
         static_configs: [{{targets: [{}]}}]\n",
        targets.join(", ")
    );
    let config = common::file(&folder, "prometheus.yml", config);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let prometheus = Command::new("prometheus")
        .arg(format!("--config.file={config}"))
        .arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()))
        .arg(format!("--web.listen-address={port}"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let _prometheus = Killed(prometheus.unwrap());
    let count = |query: &str| {
        let reply = get(port, &format!("/api/v1/query?query=count({query})"));
        reply.contains(&format!(r#""{}"]}}]"#, addresses.len()))
    };
    let deadline = Instant::now() + PATIENCE;
    while !count("up%3D%3D1") {
        assert!(Instant::now() < deadline, "{}", get(port, "/api/v1/targets"));
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn systemd_accepts_the_unit() {
    if !has("systemd-analyze") {
        return;
    }
    let folder = common::folder();
    let unit = std::fs::read_to_string("deploy/systemd/afterimage@.service").unwrap();
    // The binary is not installed on this machine.
    let unit = unit.replace("/usr/bin/afterimage", env!("CARGO_BIN_EXE_afterimage"));
    common::file(&folder, "afterimage@.service", unit);
    let path = folder.path().join("afterimage@memo.service");
    let output = Command::new("systemd-analyze").arg("verify").arg(path).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{errors}");
}
