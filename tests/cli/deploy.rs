//! The files in `deploy`, checked by the tools that read them and against the real binary.

use crate::common;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use afterimage_wire::proto::Message;
use afterimage_wire::proto::handshake::Hello;
use tokio_util::bytes::BytesMut;

use crate::common::{PATIENCE, Running};

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

/// Starts services with an admin listener each: a cache, a classifier, a memo in front of both, and
/// a memo with everything embedded.
fn services() -> (Vec<Running>, Vec<SocketAddr>) {
    let admin = ["--admin", "127.0.0.1:0"];
    let cache = Running::start(&[&["cache", "--memory", "8MiB"][..], &admin].concat());
    let classifier = Running::start(&[&["classifier", "--model", "raw"][..], &admin].concat());
    let (store, upstream) = (cache.place(), classifier.place());
    let memo = ["memo", "--store", &store, "--classifier", &upstream, "--audit", "1/100"];
    let memo = Running::start(&[&memo[..], &admin].concat());
    let serve = ["serve", "--model", "raw", "--memory", "8MiB", "--http", "off"];
    let serve = Running::start(&[&serve[..], &admin].concat());
    let services = vec![cache, classifier, memo, serve];
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

/// The lists of words behind `key:` in a YAML file, written as JSON over one or several lines.
fn lists(file: &str, key: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(file).unwrap();
    let start = format!(" {key}: [");
    let lists = text.split(&start).skip(1).map(|rest| {
        let words = rest.split(']').next().unwrap();
        serde_json::from_str(&format!("[{words}]")).unwrap()
    });
    lists.collect()
}

#[test]
fn containers_start_commands_that_exist() {
    let files =
        ["memo", "classifier", "cache"].map(|name| format!("deploy/kubernetes/{name}.yaml"));
    let mut commands: Vec<_> = files.iter().flat_map(|file| lists(file, "args")).collect();
    commands.extend(lists("deploy/docker/compose.yaml", "command"));
    assert_eq!(commands.len(), 6, "{commands:?}");
    for words in commands {
        let words = std::iter::once("afterimage").chain(words.iter().map(String::as_str));
        let parsed = afterimage::command().try_get_matches_from(words.clone());
        assert!(parsed.is_ok(), "{:?}: {}", words.collect::<Vec<_>>(), parsed.unwrap_err());
    }
}

#[test]
fn tools_accept_the_manifests_and_the_dockerfile() {
    let python = std::env::var("TEST_PYTHON").unwrap_or_default();
    let folder = std::path::Path::new(&python).parent().unwrap_or(std::path::Path::new(""));
    let manifests = std::fs::read_dir("deploy/kubernetes").unwrap();
    let manifests = manifests.map(|entry| common::text(entry.unwrap().path()));
    let manifests: Vec<_> = manifests.filter(|file| !file.contains("kustomization")).collect();
    assert!(manifests.len() >= 4, "{manifests:?}");
    let kubernetes = std::iter::once("--strict").chain(manifests.iter().map(String::as_str));
    for (tool, args) in [
        ("kubernetes-validate", kubernetes.collect()),
        ("hadolint", vec!["deploy/docker/Dockerfile"]),
    ] {
        let Ok(output) = Command::new(folder.join(tool)).args(&args).output() else {
            println!("SKIPPED: {tool} is not installed");
            continue;
        };
        let text = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&text));
    }
}

#[test]
fn the_folder_of_manifests_lists_all_of_them() {
    let list = std::fs::read_to_string("deploy/kubernetes/kustomization.yaml").unwrap();
    for entry in std::fs::read_dir("deploy/kubernetes").unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let is_listed = list.contains(&format!("- {name}\n"));
        assert!(is_listed || name == "kustomization.yaml", "{name} is not listed");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn systemd_is_notified_of_the_start_and_of_the_drain() {
    let folder = common::folder();
    let path = common::text(folder.path().join("notify"));
    let socket = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let args = ["cache", "--memory", "8MiB"];
    let mut cache = Running::start_with_env(&args, &[("NOTIFY_SOCKET", &path)]);
    let received = || {
        let mut state = [0; 64];
        let len = socket.recv(&mut state).unwrap();
        String::from_utf8_lossy(&state[..len]).into_owned()
    };
    assert_eq!(received(), "READY=1");
    cache.signal(rustix::process::Signal::TERM);
    assert_eq!(received(), "STOPPING=1");
    assert!(cache.wait().success());
}

#[test]
fn alerts_and_the_dashboard_use_metrics_that_exist() {
    let (_services, addresses) = services();
    let pages: String = addresses.iter().map(|&address| get(address, "/metrics")).collect();
    let read = |file: &str| std::fs::read_to_string(file).unwrap();
    let known = metrics(&pages);
    let texts = read("deploy/prometheus/alerts.yml") + &read("deploy/grafana/afterimage.json");
    let used = metrics(&texts);
    assert!(used.len() >= 12, "{used:?}");
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
    check(&["check", "config", "deploy/prometheus/compose.yml"], "");
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
fn systemd_accepts_the_units() {
    if !has("systemd-analyze") {
        return;
    }
    let folder = common::folder();
    let unit = std::fs::read_to_string("deploy/systemd/afterimage@.service").unwrap();
    // The binary is not installed on this machine.
    let unit = unit.replace("/usr/bin/afterimage", env!("CARGO_BIN_EXE_afterimage"));
    common::file(&folder, "afterimage@.service", unit);
    let socket = std::fs::read_to_string("deploy/systemd/afterimage@.socket").unwrap();
    common::file(&folder, "afterimage@.socket", socket);
    for unit in ["afterimage@memo.service", "afterimage@memo.socket"] {
        let path = folder.path().join(unit);
        let output = Command::new("systemd-analyze").arg("verify").arg(path).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "{unit}: {errors}");
    }
}

#[test]
fn a_passed_socket_is_used_for_the_listener_with_its_address() {
    if !has("bash") {
        return;
    }
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap().to_string();
    // This client connects before the service exists, and is served.
    let mut early = TcpStream::connect(&address).unwrap();
    let args = ["cache", "--memory", "1MiB", "--listen", &address];
    let service = Running::start_with_socket(&args, socket);
    assert_eq!(service.place(), address);
    assert!(service.log().contains("that the process was given"), "{}", service.log());
    early.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut hello = BytesMut::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut hello);
    early.write_all(&hello).unwrap();
    assert_eq!(early.read(&mut [0; 8]).unwrap(), 8);
    assert!(common::run(&["ping", &address]).status.success());
}

#[test]
fn a_passed_socket_without_a_listener_is_reported() {
    if !has("bash") {
        return;
    }
    let socket = TcpListener::bind("127.0.0.1:0").unwrap();
    let unused = socket.local_addr().unwrap();
    let args = ["cache", "--memory", "1MiB", "--listen", "127.0.0.1:0"];
    let service = Running::start_with_socket(&args, socket);
    let expected = format!("was given a socket on {unused}, and no listener has this address");
    assert!(service.log().contains(&expected), "{}", service.log());
    // Children of other tests have it for the moment between fork and exec.
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(unused).is_ok() {
        assert!(Instant::now() < deadline, "the socket is not closed");
        std::thread::sleep(Duration::from_millis(10));
    }
}
