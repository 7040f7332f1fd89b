//! Model servers over HTTP: every answer is compared with the first one, and hits are told apart.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use afterimage_bench::workload::{Calls, Protocol};
use afterimage_bench::{
    Address, BenchError, Dialect, Login, Outcome, Peer, Plan, Span, describe, run,
};

const PATH: &str = "/v2/models/m";
const METADATA: &str = r#"{"name":"m","inputs":[{"name":"x","datatype":"FP32","shape":[-1,64]}]}"#;

/// The faults of a server.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    /// Each answer differs.
    differs: bool,
    /// Each tenth request of a connection is refused.
    refuses: bool,
}

/// A model server with a cache before it. Its answer is the length and the sum of the body.
struct Server {
    addr: SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let seen = Arc::new(Mutex::new(HashSet::new()));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                counted.fetch_add(1, Ordering::Relaxed);
                let seen = Arc::clone(&seen);
                thread::spawn(move || serve(stream, faults, &seen));
            }
        });
        Server { addr, connections }
    }

    fn peer(&self) -> Peer<'_> {
        static LOGIN: Login = Login { user: String::new(), database: 0 };
        let timeout = Duration::from_secs(30);
        Peer {
            addr: self.addr,
            dialect: Dialect::Http,
            token: b"",
            login: &LOGIN,
            tls: None,
            timeout,
        }
    }

    /// 1000 calls of 50 inputs on four connections.
    fn plan(&self) -> Plan {
        let protocol = Protocol::of(PATH).unwrap();
        let description = describe(self.peer(), "host", &protocol.description()).unwrap();
        let bodies = protocol.bodies(&description, 50, 1).unwrap();
        let calls = Arc::new(Calls::new("host", PATH, bodies).unwrap());
        Plan {
            depth: 4,
            prefill: true,
            stop: Span::Requests(1000),
            timeout: Duration::from_secs(30),
            ..Plan::call(self.addr, calls)
        }
    }
}

fn serve(mut stream: TcpStream, faults: Faults, seen: &Mutex<HashSet<Vec<u8>>>) {
    for number in 1.. {
        let Some((head, body)) = take(&mut stream) else { return };
        let sum: u64 = body.iter().map(|&byte| u64::from(byte)).sum();
        let is_hit = !seen.lock().unwrap().insert(body.clone());
        let answer = match faults.differs {
            true => format!(r#"{{"id":"{number}","outputs":[{{"data":[{sum}.5,{number}]}}]}}"#),
            // Two forms of one value.
            false if number % 2 == 0 => {
                format!(r#"{{"outputs":[{{"data":[{sum}.5]}}],"id":"{number}"}}"#)
            }
            false => format!(r#"{{ "outputs": [ {{"data":[{sum}.50]}} ] }}"#),
        };
        let cache = if is_hit { "memo; hit; age=1" } else { "memo; fwd=miss; stored" };
        let response = if head.starts_with("GET /v2/models/m HTTP/1.1\r\n") {
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{METADATA}", METADATA.len())
        } else if !head.starts_with("POST /v2/models/m/infer HTTP/1.1\r\n") {
            "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".into()
        } else if faults.refuses && number % 10 == 0 {
            "HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy".into()
        } else if number % 3 == 0 {
            let (first, second) = answer.split_at(5);
            format!(
                "HTTP/1.1 200 OK\r\nCache-Status: {cache}\r\nTransfer-Encoding: chunked\r\n\r\n\
                 5\r\n{first}\r\n{:x}\r\n{second}\r\n0\r\n\r\n",
                second.len()
            )
        } else {
            let len = answer.len();
            format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {len}\r\nCache-Status: {cache}\r\n\r\n{answer}"
            )
        };
        if stream.write_all(response.as_bytes()).is_err() {
            return;
        }
    }
}

/// The head and the body of the next request; `None` at the end.
fn take(stream: &mut TcpStream) -> Option<(String, Vec<u8>)> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).ok()?;
    Some((head, body))
}

#[test]
fn answers_are_checked_and_hits_are_apart() {
    let server = Server::start(Faults::default());
    let report = run(&server.plan(), &mut |_| {}).unwrap();
    assert_eq!((report.answered, report.failed, report.lost), (1000, 0, 0), "{report}");
    // The prefill has sent each input once.
    assert_eq!(report.hit_ratio, Some(1.0));
    assert_eq!((report.settings.connections, report.settings.depth), (4, 1));
    // One more asked for the metadata.
    assert_eq!(server.connections.load(Ordering::Relaxed), 5);

    let cold = Server::start(Faults::default());
    let report = run(&Plan { prefill: false, ..cold.plan() }, &mut |_| {}).unwrap();
    let misses = report.outcomes[&Outcome::Miss].from_due.count;
    assert_eq!(misses, 50, "each input misses once: {report}");
}

#[test]
fn another_answer_than_the_first_is_wrong() {
    let server = Server::start(Faults { differs: true, ..Faults::default() });
    let Err(BenchError::Wrong(report)) = run(&server.plan(), &mut |_| {}) else {
        panic!("the answers differ");
    };
    assert!(report.wrong > 900, "{report}");
}

#[test]
fn refused_calls_are_errors_and_not_answers() {
    let server = Server::start(Faults { refuses: true, ..Faults::default() });
    let report = run(&server.plan(), &mut |_| {}).unwrap();
    assert_eq!(report.answered + report.failed, 1000, "{report}");
    assert!(report.failed > 90, "{report}");
    assert_eq!(report.errors["overloaded"], report.failed);
}

#[test]
fn an_unknown_model_and_a_wrong_path_are_reported() {
    let server = Server::start(Faults::default());
    let error = describe(server.peer(), "host", "/v2/models/other").unwrap_err().to_string();
    assert!(error.contains("GET /v2/models/other: 404"), "{error}");
    let address = Address::parse("http://[::1]:8000/v2/models/m").unwrap();
    assert_eq!((address.place.as_str(), address.path.as_str()), ("[::1]:8000", "/v2/models/m"));
    assert_eq!(address.to_string(), "http://[::1]:8000/v2/models/m");
}
