//! Texts of peers and foreign files on the terminal and in the log: escaped, on one line.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};

use afterimage_wire::proto::handshake::VERSION;
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Message, Role, Shape, Status, Welcome};

use crate::common::{Done, Running, file, folder, run};
use crate::pgm_binary;

/// A text that clears the screen, forges lines, hides and reverses characters.
const HOSTILE: &str = "evil\x1b[2J\r\nforged\u{9b}1m\u{202e}\u{200b}\u{7f}";

/// A server with hostile texts in its Welcome, its statistics and its errors.
fn hostile_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || answer(stream.unwrap()));
        }
    });
    addr
}

/// Answers each frame until the client closes.
fn answer(mut stream: TcpStream) -> Option<()> {
    loop {
        let mut head = [0; HEADER_LEN];
        stream.read_exact(&mut head).ok()?;
        let header = Header::decode(&head)?;
        stream.read_exact(&mut vec![0; header.body_len as usize]).ok()?;
        let mut out = Vec::new();
        reply_to(header.kind).encode(header.id, &mut out);
        if header.kind == Kind::ClassifyReq {
            Message::GoAway { text: HOSTILE }.encode(0, &mut out);
        }
        stream.write_all(&out).ok()?;
    }
}

fn reply_to(kind: Kind) -> Message<'static> {
    match kind {
        Kind::Hello => Message::Welcome(Welcome {
            version: VERSION,
            service: Role::Classifier,
            features: 0,
            max_body: 1 << 20,
            window: 100,
            classes: 10,
            digest: [7; 32],
            shape: Shape::new(&[28, 28]).unwrap(),
            name: HOSTILE.into(),
        }),
        Kind::StatsReq => {
            let mut stats = Stats::default();
            for name in ["service", "version", "store", HOSTILE] {
                stats.push(name, Value::Text(HOSTILE.into()));
            }
            stats.push(&format!("counter {HOSTILE}"), Value::Counter(7));
            Message::StatsResp(stats)
        }
        _ => Message::Error { status: Status::UpstreamError, text: HOSTILE, connection: false },
    }
}

/// Fails if a text would obey the peer, or if the peer began a line of it.
fn assert_safe(what: &str, text: &str) {
    let unsafe_char = |char: &char| char.is_control() || "\u{202e}\u{200b}".contains(*char);
    let found = text.chars().filter(|&char| char != '\n').find(unsafe_char);
    assert_eq!(found, None, "{what}: {text:?}");
    assert!(!text.lines().any(|line| line.trim_start().starts_with("forged")), "{what}: {text:?}");
}

fn assert_done_safe(args: &[&str]) -> Done {
    let done = run(args);
    assert_safe(&format!("standard output of {args:?}"), &done.stdout);
    assert_safe(&format!("standard error of {args:?}"), &done.stderr);
    let all = format!("{}{}", done.stdout, done.stderr);
    assert!(all.contains("evil"), "{args:?} shows no text of the server: {all:?}");
    done
}

#[test]
fn texts_of_a_server_are_escaped_in_every_command() {
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    let at = hostile_server().to_string();
    assert_done_safe(&["stats", &at, "--over", "0s"]).succeeded();
    let json = assert_done_safe(&["stats", &at, "--over", "0s", "--json"]).succeeded();
    let values: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(values["values"]["version"], HOSTILE, "JSON keeps the text");
    assert_done_safe(&["snapshot", &at]);
    assert_done_safe(&["classify", "--server", &at, &image]);
    let bench = ["bench", &at, "--count", "20", "--warmup", "0s"];
    assert_done_safe(&bench);
    assert_done_safe(&[&bench[..], &["--json"]].concat());
}

#[test]
fn texts_of_a_classifier_are_escaped_in_the_log_of_a_memo() {
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    let at = hostile_server().to_string();
    let mut memo = Running::start(&["memo", "--classifier", &at, "--log", "trace"]);
    let started = std::time::Instant::now();
    while !memo.log().contains("the classifier did not answer") {
        assert!(started.elapsed() < crate::common::PATIENCE, "{}", memo.log());
        run(&["classify", "--server", &memo.place(), &image]);
    }
    let done = assert_done_safe(&["classify", "--server", &memo.place(), &image]);
    assert!(!done.status.success());
    memo.kill();
    let log = memo.log();
    assert_safe("the log", &log);
    assert!(log.contains(r"evil\u{1b}[2J\r\nforged\u{9b}"), "{log}");
}

#[test]
fn names_of_files_are_escaped() {
    let folder = folder();
    let name = file(&folder, "evil\x1b[2J\nforged.pgm", pgm_binary(&[7; 784], 28));
    let broken = file(&folder, "evil\x1b[2J\nforged", "no image");
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    for path in [&name, &broken, &format!("{name}.missing")] {
        assert_done_safe(&["classify", "--server", &memo.place(), path]);
    }
    assert_done_safe(&["eval", "--data", &name]);
    assert_done_safe(&["stats", &memo.place(), "--token-file", &format!("{name}.missing")]);
    let snapshot = folder.path().join("evil\x1b[2J\nforged.snapshot");
    let snapshot = snapshot.to_str().unwrap();
    let mut cache = Running::start(&["cache", "--memory", "8MiB", "--snapshot", snapshot]);
    run(&["snapshot", &cache.place()]).succeeded();
    cache.signal(rustix::process::Signal::TERM);
    cache.wait();
    assert_safe("the log", &cache.log());
    assert!(cache.log().contains("entries to"), "{}", cache.log());
}
