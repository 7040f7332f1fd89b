//! Where `afterimage proxy` keeps answers: a snapshot that outlives the process, and a cache
//! service or Redis that several proxies share.

use crate::common;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Instant;

use rustix::process::Signal;

use crate::common::{PATIENCE, Running, file, folder, run};

/// A model server of the Open Inference Protocol, whose model answers with the length of the call.
struct ModelServer {
    address: SocketAddr,
    inferences: Arc<AtomicUsize>,
}

impl ModelServer {
    fn start() -> ModelServer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, inferences) = (listener.local_addr().unwrap(), Arc::default());
        let server = ModelServer { address, inferences: Arc::clone(&inferences) };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let inferences = Arc::clone(&inferences);
                // An error ends the connection.
                std::thread::spawn(move || serve(stream.unwrap(), &inferences));
            }
        });
        server
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn inferences(&self) -> usize {
        self.inferences.load(SeqCst)
    }
}

fn serve(stream: TcpStream, inferences: &AtomicUsize) -> std::io::Result<()> {
    let mut input = BufReader::new(stream.try_clone()?);
    loop {
        let (head, body) = message(&mut input)?;
        let path = head.split(' ').nth(1).unwrap_or_default();
        let (status, reply) = match path {
            "/v2" => (200, r#"{"name":"scripted","version":"1","extensions":[]}"#.to_owned()),
            "/v2/models/m" => (200, r#"{"name":"m"}"#.to_owned()),
            "/v2/models/m/infer" => {
                inferences.fetch_add(1, SeqCst);
                let sum = body.len();
                let output = r#"{"name":"y","datatype":"INT64","shape":[1],"data":["#;
                (200, format!(r#"{{"model_name":"m","outputs":[{output}{sum}]}}]}}"#))
            }
            _ => (404, r#"{"error":"unknown"}"#.to_owned()),
        };
        let length = reply.len();
        write!(
            &stream,
            "HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{reply}"
        )?;
    }
}

/// The head and the body of a message.
fn message(input: &mut BufReader<TcpStream>) -> std::io::Result<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if input.read_line(&mut head)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    let fields = head.lines().filter_map(|line| line.split_once(": "));
    let mut length = fields.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    let length = length.next_back().map_or(0, |(_, length)| length.parse().unwrap());
    let mut body = vec![0; length];
    input.read_exact(&mut body)?;
    Ok((head, body))
}

/// Asks the model about a number. Returns whether the answer was a hit.
fn is_hit(proxy: &Running, number: usize) -> bool {
    let body = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"INT64","shape":[1],"data":[{number}]}}]}}"#
    );
    let stream = TcpStream::connect(proxy.addr()).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let length = body.len();
    write!(
        &stream,
        "POST /v2/models/m/infer HTTP/1.1\r\nhost: here\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let (head, reply) = message(&mut BufReader::new(stream)).unwrap();
    let reply = String::from_utf8(reply).unwrap();
    assert!(reply.contains(&format!(r#""data":[{length}]"#)), "{head}{reply}");
    head.to_ascii_lowercase()
        .lines()
        .any(|line| line.starts_with("cache-status") && line.contains("; hit"))
}

/// Asks until this number is a hit.
fn until_hit(proxy: &Running, number: usize) {
    let start = Instant::now();
    while !is_hit(proxy, number) {
        assert!(start.elapsed() < PATIENCE, "no hit:\n{}", proxy.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn stop(mut proxy: Running) {
    proxy.signal(Signal::TERM);
    assert!(proxy.wait().success(), "{}", proxy.log());
}

#[test]
fn answers_of_a_proxy_outlive_a_restart() {
    let (model, folder) = (ModelServer::start(), folder());
    let secret = file(&folder, "secret", [7; 32]);
    let snapshot = folder.path().join("answers").to_str().unwrap().to_owned();
    let url = model.url();
    let args =
        ["proxy", &url, "--canaries", "0", "--snapshot", &snapshot, "--secret-file", &secret];
    let proxy = Running::start(&args);
    (0..20).for_each(|number| until_hit(&proxy, number));
    stop(proxy);
    let before = model.inferences();
    let proxy = Running::start(&args);
    // The model of a proxy is known after the first request.
    until_hit(&proxy, 0);
    for number in 1..20 {
        assert!(is_hit(&proxy, number), "{number}");
    }
    assert!(model.inferences() <= before + 1, "at most the first request was a miss");
    stop(proxy);

    // Another secret: no seal is right, and no answer is used.
    let other = file(&folder, "other", [8; 32]);
    let proxy = Running::start(&["proxy", &url, "--snapshot", &snapshot, "--secret-file", &other]);
    for number in 0..20 {
        assert!(!is_hit(&proxy, number), "{number}");
    }
    stop(proxy);
}

#[test]
fn a_rotated_access_log_gives_an_estimate() {
    let (model, folder) = (ModelServer::start(), folder());
    let (url, secret) = (model.url(), file(&folder, "secret", [7; 32]));
    let path = folder.path().join("access.log");
    let (log, old) = (path.to_str().unwrap(), folder.path().join("old.log"));
    let args = ["proxy", &url, "--access-log", log, "--secret-file", &secret];
    let proxy = Running::start(&args);
    until_hit(&proxy, 1);
    std::fs::rename(&path, &old).unwrap();
    proxy.signal(Signal::HUP);
    let start = Instant::now();
    while !path.exists() {
        assert!(start.elapsed() < PATIENCE, "the log is not opened again:\n{}", proxy.log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(is_hit(&proxy, 1) && !is_hit(&proxy, 2));
    stop(proxy);
    let (old, new) =
        (std::fs::read_to_string(&old).unwrap(), std::fs::read_to_string(&path).unwrap());
    let lines = old.lines().chain(new.lines()).count();
    // The first calls can find the model unknown, and their answers are not stored then.
    let all = file(&folder, "all.log", format!("{old}{new}"));
    let estimate = run(&["estimate", &all, "--json"]).succeeded();
    let estimate: serde_json::Value = serde_json::from_str(&estimate).unwrap();
    assert_eq!((&estimate["calls"], &estimate["skipped"]), (&lines.into(), &0.into()));
    let rows = [&estimate["rows"], &estimate["rows_from_memory"]].map(|n| n.as_u64().unwrap());
    assert!(rows[0] >= 4 && rows[1] == rows[0] - 2, "{estimate}");
    assert!(run(&["estimate", &all]).succeeded().contains("hit ratio of rows"));
    let empty = file(&folder, "empty", "");
    let error = run(&["estimate", &empty]).failed_with_a_line();
    assert!(error.contains("has no inference call; give an access log"), "{error}");
}

/// Asks about numbers, and kills the proxy when nothing more is written to this folder.
fn fill_and_kill(proxy: Running, disk: &std::path::Path) {
    (0..300).for_each(|number| until_hit(&proxy, number));
    let size = || {
        let files = std::fs::read_dir(disk).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    let mut before = 0;
    while size() > before {
        before = size();
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    // Dropping it kills it.
    drop(proxy);
}

#[test]
fn answers_on_a_disk_outlive_a_kill_and_damage() {
    let (model, folder) = (ModelServer::start(), folder());
    let secret = file(&folder, "secret", [7; 32]);
    let disk = folder.path().join("disk");
    let (url, place) = (model.url(), disk.to_str().unwrap().to_owned());
    // Memory for few answers: most are read from the disk.
    let args = ["proxy", &url, "--disk", &place, "--disk-bytes", "1GiB", "--memory", "16KiB"];
    let args = [&args[..], &["--canaries", "0", "--secret-file", &secret]].concat();
    fill_and_kill(Running::start(&args), &disk);
    let proxy = Running::start(&args);
    until_hit(&proxy, 299);
    let before = model.inferences();
    let hits = (0..290).filter(|&number| is_hit(&proxy, number)).count();
    assert_eq!(hits, 290, "{}", proxy.log());
    assert_eq!(model.inferences(), before);
    drop(proxy);

    // Every file loses its end and one of its bits: `is_hit` checks each answer.
    for entry in std::fs::read_dir(&disk).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(bytes.len() * 2 / 3);
        if let Some(byte) = bytes.get_mut(1000) {
            *byte ^= 4;
        }
        std::fs::write(&path, bytes).unwrap();
    }
    let proxy = Running::start(&args);
    until_hit(&proxy, 299);
    let hits = (0..290).filter(|&number| is_hit(&proxy, number)).count();
    assert!(hits < 290, "{hits}");
    stop(proxy);
}

/// Two proxies with this store share their answers.
fn share(store: &[&str]) {
    let (model, folder) = (ModelServer::start(), folder());
    let secret = file(&folder, "secret", [7; 32]);
    let url = model.url();
    let args =
        ["proxy", &url, "--secret-file", &secret, "--lookup-budget", "1s", "--canaries", "0"];
    let args = [&args[..], store].concat();
    let (one, other) = (Running::start(&args), Running::start(&args));
    (0..20).for_each(|number| until_hit(&one, number));
    until_hit(&other, 0);
    let before = model.inferences();
    for number in 1..20 {
        assert!(is_hit(&other, number), "{number}:\n{}", other.log());
    }
    assert_eq!(model.inferences(), before);
    stop(one);
    stop(other);
}

#[test]
fn proxies_share_answers_through_a_cache_service() {
    let cache = Running::start(&["cache", "--memory", "8MiB", "--bytes", "64MiB"]);
    share(&["--store", &cache.place()]);
}

/// A Redis server, killed when it is dropped.
struct Redis(Child);

impl Drop for Redis {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn proxies_share_answers_through_redis() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = folder();
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--save", "", "--port", &port.to_string()]);
    command.arg("--dir").arg(folder.path()).stdout(Stdio::null());
    let Ok(child) = command.spawn() else {
        let why = "redis-server is not installed";
        let _ = writeln!(std::io::stderr(), "SKIPPED proxies_share_answers_through_redis: {why}");
        return;
    };
    let _redis = Redis(child);
    let url = format!("redis://127.0.0.1:{port}");
    share(&["--store", &url, "--redis-prefix", "proxies:", "--redis-ttl", "1h"]);
}

#[test]
fn flags_of_another_store_are_refused() {
    let url = "http://127.0.0.1:1";
    let cases: [(&[&str], &str); 6] = [
        (&["--redis-prefix", "a:"], "--redis-prefix needs a Redis store"),
        (&["--store", "127.0.0.1:1", "--redis-ttl", "1h"], "--redis-ttl needs a Redis store"),
        (&["--store", "127.0.0.1:1", "--memory", "1GiB"], "--memory needs --store embedded"),
        (&["--store", "redis://h", "--snapshot", "file"], "--snapshot needs --store embedded"),
        (&["--store", "redis://h", "--redis-prefix", "a b"], "invalid Redis key prefix"),
        (&["--store-token-file", "file"], "--store-token-file needs a remote store"),
    ];
    for (args, wanted) in cases {
        let line =
            run(&[&["proxy", url, "--listen", "127.0.0.1:0", "--log", "error"], args].concat());
        let line = line.failed_with_a_line();
        assert!(line.contains(wanted), "{args:?}: {line}");
    }
}

#[test]
fn the_page_of_a_proxy_shows_its_numbers() {
    let server = ModelServer::start();
    let args = ["proxy", &server.url(), "--http", "127.0.0.1:0"];
    let proxy = Running::start(&args);
    let page = proxy.printed_address("gateway listening on http://");
    until_hit(&proxy, 1);
    let get = |path: &str| {
        let mut stream = TcpStream::connect(page).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        reply
    };
    let overview = get("/v1/overview");
    assert!(overview.contains("\"hits\":1,"), "{overview}");
    assert!(overview.contains(&server.url()), "{overview}");
    assert!(get("/readyz").starts_with("HTTP/1.1 200"));
    assert!(get("/metrics").contains("# HELP afterimage_proxy_calls_total"));
    common::drive_page(page, "foreign");
}

#[test]
fn a_public_page_of_a_proxy_needs_keys() {
    let args = ["--log", "warn", "proxy", "http://127.0.0.1:1", "--http", "0.0.0.0:0"];
    let error = run(&args).failed_with_a_line();
    assert!(error.contains("set --api-keys"), "{error}");
}
