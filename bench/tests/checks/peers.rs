//! Redis and memcached as targets: the real ones where they are installed, and liars in their
//! place.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Keys;
use afterimage_bench::{BenchError, Dialect, Plan, Report, Span, run};
use afterimage_wire::Status;

/// A process that ends with the test.
struct Peer {
    process: Child,
    addr: SocketAddr,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Starts the peer of a dialect; `None`, and a loud word, where it is not installed.
fn start(dialect: Dialect, more: &[&str]) -> Option<Peer> {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let port = addr.port().to_string();
    let (program, arguments) = match dialect {
        Dialect::Redis => ("redis-server", vec!["--save", "", "--port", &port]),
        _ => ("memcached", vec!["-u", "nobody", "-l", "127.0.0.1", "-U", "0", "-p", &port]),
    };
    let mut command = Command::new(program);
    command.args(arguments).args(more).stdin(Stdio::null()).stdout(Stdio::null());
    let Ok(process) = command.spawn() else {
        // Past the harness, which keeps what a passing test prints to itself.
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no {program} here");
        return None;
    };
    let peer = Peer { process, addr };
    let until = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(addr).is_err() {
        assert!(Instant::now() < until, "{program} does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    Some(peer)
}

/// A plan that is quick: a thousand requests about 100 keys, 40 at a time.
fn plan(addr: SocketAddr, dialect: Dialect, batch: usize) -> Plan {
    let keys = Keys { count: 100, read_share: 1.0, salt: 9 };
    Plan {
        dialect,
        batch,
        depth: 40,
        stop: Span::Requests(1000),
        timeout: Duration::from_secs(20),
        ..Plan::cache(addr, keys)
    }
}

fn share(plan: Plan, read_share: f64) -> Plan {
    let keys = Keys { count: 100, read_share, salt: 9 };
    Plan { target: afterimage_bench::Target::Cache(keys), ..plan }
}

fn go(plan: &Plan) -> Report {
    let report = match run(plan, &mut |_| {}) {
        Ok(report) => report,
        Err(BenchError::Wrong(report)) => *report,
        Err(error) => panic!("{error}"),
    };
    let accounted =
        report.answered + report.failed + report.writes_confirmed + report.timed_out + report.lost;
    assert_eq!(report.sent, accounted, "a request is missing or counted twice: {report}");
    report
}

/// Each dialect with each way to ask.
const WAYS: [(Dialect, usize); 7] = [
    (Dialect::Redis, 1),
    (Dialect::Redis, 7),
    (Dialect::Redis, 64),
    (Dialect::Memcached, 1),
    (Dialect::Memcached, 7),
    (Dialect::Memcached, 64),
    (Dialect::MemcachedMeta, 1),
];

#[test]
fn real_peers_are_read_and_written_and_every_answer_is_right() {
    for (dialect, batch) in WAYS {
        let Some(peer) = start(dialect, &[]) else { continue };
        let plan = plan(peer.addr, dialect, batch);
        let cold = go(&plan);
        assert_eq!((cold.hit_ratio, cold.answered), (Some(0.0), 1000), "{dialect} {batch}");
        let mixed = go(&share(Plan { connections: 3, ..plan.clone() }, 0.7));
        assert_eq!(mixed.problems(), [""; 0], "{dialect} {batch}");
        assert_eq!((mixed.sent, mixed.writes), (1000, mixed.writes_confirmed));
        assert!((200..400).contains(&mixed.writes), "{} writes", mixed.writes);
        // Not every key was written, so some batches have values and misses side by side.
        let ratio = mixed.hit_ratio.unwrap();
        assert!(0.2 < ratio && ratio < 1.0, "{dialect} {batch}: hit ratio {ratio}");
        let hot = go(&Plan { prefill: true, ..plan });
        assert_eq!(hot.problems(), [""; 0], "{dialect} {batch}");
        assert_eq!((hot.hit_ratio, hot.answered), (Some(1.0), 1000), "{dialect} {batch}");
        assert!(hot.server.name.contains(char::is_numeric), "{:?}", hot.server);
    }
}

#[test]
fn the_password_of_redis_is_shown_and_a_wrong_one_is_refused() {
    let Some(peer) = start(Dialect::Redis, &["--requirepass", "secret"]) else { return };
    let plan = plan(peer.addr, Dialect::Redis, 1);
    for token in [&b""[..], b"wrong"] {
        let plan = Plan { token: token.to_vec(), ..plan.clone() };
        assert!(matches!(
            run(&plan, &mut |_| {}),
            Err(BenchError::Refused { status: Status::Unauthenticated, .. })
        ));
    }
    assert_eq!(go(&Plan { token: b"secret".to_vec(), ..plan }).answered, 1000);
}

#[test]
fn errors_of_real_peers_are_counted() {
    // Too little memory for a single key: Redis refuses every write.
    let Some(peer) = start(Dialect::Redis, &["--maxmemory", "1"]) else { return };
    let report = go(&share(plan(peer.addr, Dialect::Redis, 7), 0.5));
    assert_eq!(report.errors["overloaded"], report.writes);
    assert_eq!((report.wrong, report.unexpected), (0, 0));
}

/// A server that answers a line in `script` with the text beside it, and other lines not at all.
fn liar(script: &'static [(&'static str, &'static str)]) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let mut output = stream.try_clone().unwrap();
                let mut lines = BufReader::new(stream).split(b'\n');
                while let Some(Ok(line)) = lines.next() {
                    let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                    for (_, answer) in script.iter().filter(|(start, _)| line.starts_with(start)) {
                        if output.write_all(answer.as_bytes()).is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    addr
}

const INFO: (&str, &str) = ("INFO", "$21\r\nredis_version:0.0.0\r\n\r\n");

#[test]
fn wrong_values_surplus_replies_and_nonsense_are_found() {
    let read = |script, dialect, batch| {
        let timeout = Duration::from_millis(500);
        let plan = plan(liar(script), dialect, batch);
        go(&Plan { depth: 8, timeout, stop: Span::Requests(8), ..plan })
    };
    let foreign = read(&[INFO, ("GET", "$8\r\n12345678\r\n")], Dialect::Redis, 1);
    assert_eq!((foreign.wrong, foreign.answered), (8, 8));
    let twice = read(&[INFO, ("GET", "$-1\r\n$-1\r\n")], Dialect::Redis, 1);
    assert!(twice.unexpected > 0);
    let too_many = read(&[INFO, ("MGET", "*9\r\n")], Dialect::Redis, 8);
    assert!(too_many.unexpected > 0);
    let failed = read(&[INFO, ("MGET", "-ERR no\r\n")], Dialect::Redis, 8);
    assert_eq!((failed.failed, failed.errors["upstream_error"]), (8, 8));
    let short = read(&[INFO, ("GET", "$3\r\nabc\r\n")], Dialect::Redis, 1);
    assert_eq!(short.disconnects.len(), 1, "{short}");

    let version = ("version", "VERSION 0\r\n");
    let missed = read(Box::leak(Box::new([version, ("get", "END\r\n")])), Dialect::Memcached, 8);
    assert_eq!((missed.answered, missed.hit_ratio), (8, Some(0.0)));
    let unknown = "VALUE AAAAAAAAAAA 0 8\r\n12345678\r\nEND\r\n";
    let foreign = read(Box::leak(Box::new([version, ("get", unknown)])), Dialect::Memcached, 8);
    assert_eq!((foreign.answered, foreign.unexpected), (8, 1));
    let failed =
        read(Box::leak(Box::new([version, ("get", "SERVER_ERROR x\r\n")])), Dialect::Memcached, 8);
    assert_eq!(failed.failed, 8);
    let wrong = "VA 8\r\n12345678\r\n";
    let wrong = read(Box::leak(Box::new([version, ("mg", wrong)])), Dialect::MemcachedMeta, 1);
    assert_eq!(wrong.wrong, 8);
    let late = read(Box::leak(Box::new([version])), Dialect::MemcachedMeta, 1);
    assert_eq!((late.timed_out, late.answered), (8, 0));
}

#[test]
fn a_server_of_another_protocol_is_recognised() {
    let addr = liar(&[("", "HTTP/1.1 400 Bad Request\r\n")]);
    for dialect in [Dialect::Redis, Dialect::Memcached, Dialect::MemcachedMeta] {
        let result = run(&plan(addr, dialect, 1), &mut |_| {});
        assert!(matches!(result, Err(BenchError::Protocol { .. })), "{dialect}: {result:?}");
    }
}

#[test]
fn refuses_plans_that_a_dialect_cannot_run() {
    let addr = "127.0.0.1:1".parse().unwrap();
    for (word, plan) in [
        ("batch", plan(addr, Dialect::Wire, 2)),
        ("batch", plan(addr, Dialect::MemcachedMeta, 2)),
        ("batch", plan(addr, Dialect::Redis, 0)),
        ("echo", share(plan(addr, Dialect::Echo, 1), 0.5)),
    ] {
        match run(&plan, &mut |_| {}) {
            Err(BenchError::Plan { what }) => assert!(what.contains(word), "{what}"),
            other => panic!("{word}: {other:?}"),
        }
    }
}
