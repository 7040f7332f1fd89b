//! Hostile HTTP: uploads, pictures, connections and paths that must cost a limit and nothing else.
//! After each, the TCP port of the same memo answers as before.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use afterimage_wire::ClientOptions;
use afterimage_wire::blocking::Client;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::{HEADER_LEN, Header, Message};

use crate::common::{PATIENCE, Running};

/// A memo with a page, and a client of its TCP port.
struct Memo {
    running: Running,
    page: SocketAddr,
    client: Client,
}

impl Memo {
    fn start() -> Memo {
        let args = ["serve", "--memory", "8MiB", "--model", "raw", "--http", "127.0.0.1:0"];
        let running = Running::start(&args);
        let page = running.printed_address("gateway listening on http://");
        let client = Client::connect(running.addr(), ClientOptions::new()).unwrap();
        client.classify(&[7; 784]).unwrap();
        Memo { running, page, client }
    }

    /// The TCP port answers a hit, within a time that no queue of the attack fits in.
    fn is_unharmed(&self) {
        let since = Instant::now();
        self.client.classify(&[7; 784]).unwrap();
        let took = since.elapsed();
        assert!(took < Duration::from_secs(2), "a hit took {took:?}:\n{}", self.running.log());
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.page).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// The status of a request, without reading more of the response than the gateway sends.
    fn status(&self, head: &str, body: &[u8]) -> u16 {
        let mut stream = self.connect();
        stream.write_all(head.as_bytes()).unwrap();
        // The gateway may refuse the request before it has the body.
        let _ = stream.write_all(body);
        status(&mut stream)
    }
}

/// The status of the response on a connection; 0 if the connection ends without one.
fn status(stream: &mut TcpStream) -> u16 {
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    let head = String::from_utf8_lossy(&reply).into_owned();
    head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
}

/// The resident memory of a process in MiB.
fn memory_mib(process: u32) -> u64 {
    memory_kib(process) / 1024
}

/// The same in KiB.
fn memory_kib(process: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse().unwrap()
}

#[test]
fn a_huge_upload_is_refused_and_not_stored() {
    let memo = Memo::start();
    let before = memory_mib(memo.running.pid());
    // Two gigabytes announced: refused from the header.
    let head = "POST /v1/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: \
                2147483648\r\n\r\n";
    assert_eq!(memo.status(head, b""), 413);
    // The same in chunks of unknown number: refused at the limit.
    let mut stream = memo.connect();
    let head = "POST /v1/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: \
                chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = [b"100000\r\n".as_slice(), &vec![0; 1 << 20], b"\r\n"].concat();
    let sent = (0..2048).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(sent < 200, "the gateway has taken {sent} MiB");
    assert!([413, 0].contains(&status(&mut stream)));
    let grown = memory_mib(memo.running.pid()).saturating_sub(before);
    assert!(grown < 100, "the upload has taken {grown} MiB");
    memo.is_unharmed();
}

#[test]
fn a_picture_that_grows_in_memory_is_refused() {
    let memo = Memo::start();
    let before = memory_mib(memo.running.pid());
    for (width, height) in [(60_000, 60_000), (8192, 8192), (1, u32::MAX / 2)] {
        // The header announces the size. The pixels would follow.
        let mut bomb = Vec::new();
        let mut encoder = png::Encoder::new(&mut bomb, width, height);
        encoder.set_color(png::ColorType::Rgba);
        encoder.set_depth(png::BitDepth::Sixteen);
        drop(encoder.write_header().unwrap());
        let head = format!(
            "POST /v1/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            bomb.len()
        );
        let status = memo.status(&head, &bomb);
        assert!([400, 413].contains(&status), "{width} × {height}: {status}");
    }
    let grown = memory_mib(memo.running.pid()).saturating_sub(before);
    assert!(grown < 150, "the pictures have taken {grown} MiB");
    memo.is_unharmed();
}

#[test]
fn idle_and_dripping_connections_delay_no_other_client() {
    let memo = Memo::start();
    let mut open: Vec<TcpStream> = (0..400).map(|_| memo.connect()).collect();
    for (i, stream) in open.iter_mut().enumerate() {
        // Nothing, a part of a header, or a part of a body.
        let part = [
            "",
            "POST /v1/classify HT",
            "POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\nx",
        ];
        let _ = stream.write_all(part[i % part.len()].as_bytes());
    }
    let get = "GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    assert_eq!(memo.status(get, b""), 200);
    memo.is_unharmed();
}

#[test]
fn malformed_forms_get_a_client_error() {
    let memo = Memo::start();
    let nested = "--b\r\ncontent-disposition: form-data; name=\"a\"\r\n".repeat(2000);
    for (kind, body) in [
        ("multipart/form-data", ""),
        ("multipart/form-data; boundary=", "--\r\n\r\n"),
        ("multipart/form-data; boundary=b", ""),
        ("multipart/form-data; boundary=b", "--b"),
        ("multipart/form-data; boundary=b", "--b\r\ncontent-disposition: x\r\n\r\n\r\n--b--"),
        (
            "multipart/form-data; boundary=b",
            "--b\r\ncontent-disposition: form-data; name=\"a\"\r\n\r\nno end",
        ),
        ("multipart/form-data; boundary=b", &nested),
        ("application/json", "{\"images\":["),
        ("application/json", &"[".repeat(100_000)),
    ] {
        let head = format!(
            "POST /v1/classify HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-type: {kind}\r\n\
             content-length: {}\r\n\r\n",
            body.len()
        );
        let status = memo.status(&head, body.as_bytes());
        let start = &body[..body.len().min(40)];
        assert!((400..500).contains(&status), "{kind} {start:?}: {status}");
    }
    memo.is_unharmed();
}

#[test]
fn no_path_leaves_the_pages() {
    let memo = Memo::start();
    let long = format!("/{}", "a".repeat(60_000));
    for path in [
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/../../etc/passwd",
        "/page/..%2f..%2fetc%2fpasswd",
        "/page/app.js%00.html",
        "/page//app.js",
        "//etc/passwd",
        "/v1/memory/../classify",
        "/v2/models/..%2f..%2f/infer",
        "http://elsewhere/metrics/../etc/passwd",
        &long,
    ] {
        let head = format!("GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let status = memo.status(&head, b"");
        assert!((400..500).contains(&status), "{}: {status}", &path[..path.len().min(60)]);
    }
    memo.is_unharmed();
}

/// The start of an HTTP/2 connection: the preface and empty settings.
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Floods of small HTTP/2 frames: the connection ends or is served, and others are not delayed.
#[test]
fn floods_of_small_http2_frames_delay_no_other_client() {
    let memo = Memo::start();
    let before = memory_mib(memo.running.pid());
    let ping = b"\0\0\x08\x06\0\0\0\0\0pingpong".to_vec();
    let settings = b"\0\0\0\x04\0\0\0\0\0".to_vec();
    // A header block without its end: `:method: GET` as an indexed field.
    let start = b"\0\0\x01\x01\0\0\0\0\x01\x82".to_vec();
    let continuation = b"\0\0\x01\x09\0\0\0\0\x01\x84".to_vec();
    let priority = b"\0\0\x05\x02\0\0\0\0\x01\0\0\0\0\x10".to_vec();
    for (name, first, frame, must_end) in [
        ("ping", vec![], ping, false),
        ("settings", vec![], settings, false),
        ("priority", vec![], priority, false),
        ("continuation", start, continuation, true),
    ] {
        let mut stream = memo.connect();
        stream.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
        stream.write_all(&[HTTP2, &first].concat()).unwrap();
        let many = frame.repeat(1000);
        let sent = (0..300).take_while(|_| stream.write_all(&many).is_ok()).count();
        if must_end {
            // Part of the flood may be in buffers of the system when the gateway closes.
            let end = stream.read_to_end(&mut Vec::new());
            let waits = end.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
            assert!(!waits, "{name}: the connection is open after {sent} thousand frames");
        }
        let get = "GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        assert_eq!(memo.status(get, b""), 200, "{name}");
        memo.is_unharmed();
    }
    let grown = memory_mib(memo.running.pid()).saturating_sub(before);
    assert!(grown < 100, "the floods have taken {grown} MiB");
}

/// Connections that were busy once and are quiet now hold less than 10 KiB each: 10,000 of them
/// hold less than 100 MiB.
#[test]
fn quiet_connections_return_their_memory() {
    const CONNECTIONS: u64 = 1000;
    const READS: u64 = 1000;
    let running = Running::start(&["cache", "--memory", "8MiB", "--max-connections", "1100"]);
    let mut requests = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut requests);
    (0..READS).for_each(|key| Message::CacheRead { key, budget_ms: 0 }.encode(key, &mut requests));
    let burst = || {
        let mut stream = TcpStream::connect(running.addr()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&requests).unwrap();
        let mut head = [0; HEADER_LEN];
        for _ in 0..=READS {
            stream.read_exact(&mut head).unwrap();
            let len = Header::decode(&head).unwrap().body_len as usize;
            stream.read_exact(&mut vec![0; len]).unwrap();
        }
        stream
    };
    let mut held = vec![burst()];
    // The table's memory is allocated in the first second.
    std::thread::sleep(Duration::from_secs(2));
    let before = memory_kib(running.pid());
    held.extend((1..CONNECTIONS).map(|_| burst()));
    let each = || memory_kib(running.pid()).saturating_sub(before) as f64 / CONNECTIONS as f64;
    let until = Instant::now() + PATIENCE;
    while each() >= 10.0 {
        assert!(Instant::now() < until, "{:.1} KiB for each connection", each());
        std::thread::sleep(Duration::from_millis(200));
    }
    println!("{:.1} KiB for each connection", each());
    drop(held);
}
