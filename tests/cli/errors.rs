//! Help screens, errors of one clear line, and escaped texts of peers and foreign files.

use std::io::{Read, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use afterimage_wire::proto::handshake::VERSION;
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Message, Role, Shape, Status, Welcome};
use rustix::process::Signal;

use crate::common::{Done, Running, file, folder, run, text};
use crate::{SECRET, SERVICES, pgm_binary, unused_address};

#[test]
fn a_port_that_is_taken_is_one_clear_line() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = holder.local_addr().unwrap().to_string();
    for command in SERVICES {
        let line = run(&[command, "--listen", &addr]).failed_with_no_more_than_logs();
        assert!(line.contains(&addr) && line.contains("in use"), "{line}");
    }
}

#[test]
fn files_that_are_missing_or_broken_are_named_in_one_line() {
    let folder = folder();
    let missing = text(folder.path().join("missing"));
    let broken = file(&folder, "broken", "this is no such file");
    let empty = file(&folder, "empty", "");
    for command in ["serve", "classifier", "memo"] {
        for path in [&missing, &broken, &empty] {
            let line = run(&[command, "--listen", "127.0.0.1:0", "--model", path])
                .failed_with_no_more_than_logs();
            assert!(line.contains(path), "{line}");
        }
    }
    for command in SERVICES {
        for path in [&missing, &empty] {
            let line = run(&[command, "--listen", "127.0.0.1:0", "--token-file", path])
                .failed_with_no_more_than_logs();
            assert!(line.contains("token"), "{line}");
        }
    }
    for path in [&missing, &broken] {
        for args in [
            &["memo", "--listen", "127.0.0.1:0", "--secret-file", path][..],
            &["eval", "--model", path, "--data", path],
            &["eval", "--model", "raw", "--data", path],
            &["train", "--data", path],
            &["demo", "--data", path],
            &["demo", "--model", path],
            &["bench", "--images", path],
            &["bench", "--workload", path],
            &["bench", "compare", path],
            &["bench", "report", path],
            &["cache", "--config", path],
        ] {
            let line = run(args).failed_with_no_more_than_logs();
            assert!(line.contains(path.as_str()), "{args:?}: {line}");
        }
    }
}

#[test]
fn no_pipe_and_no_device_hangs_a_command() {
    let folder = folder();
    let fifo = text(folder.path().join("fifo"));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let commands = [
        "stats --token-file FILE",
        "cache --listen 127.0.0.1:0 --token-file FILE",
        "cache --listen 127.0.0.1:0 --admin-token-file FILE",
        "memo --listen 127.0.0.1:0 --secret-file FILE",
        "memo --listen 127.0.0.1:0 --classifier 127.0.0.1:1 --classifier-token-file FILE",
        "memo --listen 127.0.0.1:0 --store 127.0.0.1:1 --store-token-file FILE",
        "memo --listen 127.0.0.1:0 --store redis://127.0.0.1:1 --store-password-file FILE",
        "cache --listen 127.0.0.1:0 --tls-cert FILE --tls-key FILE",
        "stats --tls --tls-ca FILE",
        "stats --config FILE",
        "classifier --listen 127.0.0.1:0 --model FILE",
        "eval --model FILE",
        "import FILE",
        "bench 127.0.0.1:1 --workload FILE",
        "bench 127.0.0.1:1 --images FILE",
        "bench compare FILE",
    ];
    // A silent pipe takes seconds.
    std::thread::scope(|scope| {
        for (path, expected) in [(&fifo[..], "nothing came through"), ("/dev/zero", "too large")] {
            for command in commands {
                scope.spawn(move || {
                    let args: Vec<&str> = command.split(' ').collect();
                    let args: Vec<&str> =
                        args.iter().map(|&arg| if arg == "FILE" { path } else { arg }).collect();
                    let line = run(&args).failed_with_no_more_than_logs();
                    assert!(line.contains(path) && line.contains(expected), "{args:?}: {line}");
                });
            }
        }
    });
}

#[test]
fn a_byte_order_mark_is_named() {
    let folder = folder();
    let marked = file(&folder, "marked", "\u{feff}[cache]\n");
    for command in [
        "stats --token-file FILE",
        "cache --listen 127.0.0.1:0 --token-file FILE",
        "memo --listen 127.0.0.1:0 --secret-file FILE",
        "memo --listen 127.0.0.1:0 --store redis://127.0.0.1:1 --store-password-file FILE",
        "stats --config FILE",
        "import FILE",
        "bench 127.0.0.1:1 --workload FILE",
    ] {
        let args: Vec<&str> =
            command.split(' ').map(|arg| if arg == "FILE" { &marked } else { arg }).collect();
        let line = run(&args).failed_with_no_more_than_logs();
        assert!(line.contains(&marked) && line.contains("byte-order mark"), "{args:?}: {line}");
    }
}

#[test]
fn a_wrong_value_names_the_flag_and_the_value() {
    for args in [
        ["serve", "--threads", "many"],
        ["cache", "--memory", "12 parsecs"],
        ["memo", "--store", "nowhere"],
        ["memo", "--lookup-budget", "soon"],
        ["serve", "--linger", "201us"],
        ["classifier", "--linger", "1s"],
        ["train", "--features", "magic"],
        ["stats", "--timeout", "5"],
        ["cache", "--listen", "here"],
        ["serve", "--log", "loud=quiet=very"],
        // Taken for a module's name, it would turn all logs off.
        ["serve", "--log", "debgu"],
        ["serve", "--log", "info,afterimage_memo"],
    ] {
        let done = run(&args);
        assert!(done.status.code().is_some_and(|code| code != 0), "{done:#?}");
        let first = done.stderr.lines().next().unwrap_or_default();
        assert!(first.contains(args[2]) && first.contains(args[1]), "{done:#?}");
        assert!(done.stdout.is_empty(), "{done:#?}");
    }
    for args in [
        &["serve", "--max-body", "5GiB"][..],
        &["demo", "--images", "5"],
        &["bench", "--target", "moon"],
    ] {
        let line = run(args).failed_with_no_more_than_logs();
        assert!(line.contains(args[2]) || line.contains("5.0 GiB"), "{args:?}: {line}");
    }
}

#[test]
fn a_server_that_is_not_there_is_one_clear_line() {
    let addr = unused_address();
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    for args in [
        &["classify", "--server", &addr, &image][..],
        &["stats", &addr],
        &["bench", &addr, "--count", "1"],
        &["bench", "--count", "1", "--target", &format!("tcp://{addr}")],
        &["bench", "find-max", &addr],
        &["bench", "ab", &addr, &addr],
    ] {
        let line = run(args).failed_with_no_more_than_logs();
        assert!(line.to_lowercase().contains("refused"), "{args:?}: {line}");
    }
}

#[test]
fn an_address_error_names_what_is_expected() {
    for (args, expected) in [
        (&["stats", "7400"][..], "expected HOST:PORT, for example 127.0.0.1:7400"),
        (&["stats", "--server", "7400"], "expected HOST:PORT, for example 127.0.0.1:7400"),
        (&["serve", "--listen", ":19030"], "for example 0.0.0.0:19030"),
        (&["cache", "--listen", "unix:/run/x"], "Unix sockets are not supported"),
        (
            &["memo", "--classifier", "http://127.0.0.1:8000/predict"],
            "expected http://HOST:PORT/v2/models/NAME",
        ),
        (&["memo", "--classifier", "redis://127.0.0.1"], "Redis is a store and cannot classify"),
        (&["memo", "--store", "foo"], "redis://127.0.0.1:6379"),
    ] {
        let done = run(args);
        assert_eq!(done.status.code(), Some(2), "{done:#?}");
        let first = done.stderr.lines().next().unwrap_or_default();
        assert!(first.contains(expected), "{args:?}: {first}");
    }
    let twice = run(&["stats", "127.0.0.1:1", "--server", "127.0.0.1:2"]).failed_with_a_line();
    assert!(twice.contains("given twice"), "{twice}");
}

#[test]
fn a_refused_connection_says_how_to_start_a_server() {
    let addr = unused_address();
    for args in [&["stats", &addr][..], &["stats", "--server", &addr], &["snapshot", &addr]] {
        let line = run(args).failed_with_a_line();
        let expected = format!(
            "afterimage: cannot connect to {addr} (connection refused); start a server with: \
             afterimage serve\n"
        );
        assert_eq!(line, expected, "{args:?}");
    }
}

#[test]
fn a_port_of_another_protocol_is_named() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = holder.local_addr().unwrap().to_string();
    let other = std::thread::spawn(move || {
        let (mut stream, _) = holder.accept().unwrap();
        stream.write_all(b"-ERR unknown command\r\n").unwrap();
    });
    let line = run(&["stats", &addr]).failed_with_a_line();
    other.join().unwrap();
    assert!(line.contains(&format!("{addr} is not an Afterimage server")), "{line}");
    // A port that accepts connections and says nothing.
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = holder.local_addr().unwrap().to_string();
    let line = run(&["stats", &addr, "--timeout", "200ms"]).failed_with_a_line();
    assert!(line.contains(&addr) && line.contains("is it an Afterimage server?"), "{line}");
}

#[test]
fn a_service_of_the_wrong_kind_is_one_clear_line() {
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    let line =
        run(&["classify", "--server", &cache.place(), &image]).failed_with_no_more_than_logs();
    assert!(line.contains("cache"), "{line}");
    // The load generator names the service and the flag that does not fit it.
    let line = run(&["bench", &cache.place(), "--images", "drawn"]).failed_with_no_more_than_logs();
    assert!(line.contains("is a cache") && line.contains("remove --images"), "{line}");
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let line = run(&["bench", &memo.place(), "--read-share", "0.5", "--population", "10"])
        .failed_with_no_more_than_logs();
    assert!(line.contains("is a memo") && line.contains("--read-share"), "{line}");
}

#[test]
fn a_limit_of_zero_is_refused_and_named() {
    for (command, flag) in [
        ("memo", "--max-waiting"),
        ("serve", "--max-waiting"),
        ("serve", "--max-queued"),
        ("classifier", "--max-queued"),
        ("cache", "--max-connections"),
        ("cache", "--window"),
    ] {
        let done = run(&[command, flag, "0"]);
        assert_eq!(done.status.code(), Some(2), "{done:#?}");
        assert!(
            done.stderr.starts_with(&format!("error: invalid value '0' for '{flag}")),
            "{done:#?}"
        );
    }
}

#[test]
fn a_public_address_needs_a_token_or_insecure() {
    let folder = folder();
    let token = file(&folder, "token", SECRET);
    let tenants = file(&folder, "tenants", format!("search {SECRET} 3"));
    for command in SERVICES {
        for listen in ["0.0.0.0:0", "[::]:0"] {
            let line = run(&[command, "--listen", listen]).failed_with_no_more_than_logs();
            assert!(line.contains("--token-file") && line.contains("--insecure"), "{line}");
        }
        for allowed in
            [&["--insecure"][..], &["--token-file", &token], &["--tenant-file", &tenants]]
        {
            let args = [&[command, "--listen", "0.0.0.0:0"][..], allowed].concat();
            let mut service = Running::start(&args);
            service.signal(Signal::TERM);
            assert_eq!(service.wait().code(), Some(0));
        }
    }
}

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
    for format in ["text", "json"] {
        let snapshot = folder.path().join(format!("{HOSTILE} {format}"));
        let snapshot = snapshot.to_str().unwrap();
        let flags = ["cache", "--memory", "8MiB", "--snapshot", snapshot, "--log-format", format];
        let mut cache = Running::start(&flags);
        run(&["snapshot", &cache.place()]).succeeded();
        cache.signal(Signal::TERM);
        cache.wait();
        let log = cache.log();
        assert_safe("the log", &log);
        assert!(log.contains("entries to"), "{log}");
        for line in log.lines().filter(|_| format == "json") {
            serde_json::from_str::<serde_json::Value>(line).unwrap();
        }
    }
}

const COMMANDS: [&str; 23] = [
    "estimate",
    "models",
    "key",
    "ping",
    "doctor",
    "completions",
    "man",
    "proxy",
    "gateway",
    "forget",
    "flush",
    "serve",
    "cache",
    "classifier",
    "memo",
    "classify",
    "train",
    "eval",
    "import",
    "demo",
    "bench",
    "stats",
    "snapshot",
];

#[test]
fn every_commands_help_explains_every_flag() {
    for command in COMMANDS {
        let help = run(&[command, "--help"]).succeeded();
        assert!(help.lines().next().is_some_and(|line| line.len() > 10), "{help}");
        assert!(help.contains(&format!("Usage: afterimage {command}")), "{help}");
        let lines: Vec<&str> = help.lines().map(str::trim).collect();
        let mut flags = 0;
        for (i, line) in lines.iter().enumerate() {
            let line = line.strip_prefix("-h, ").unwrap_or(line);
            let Some(flag) = line.strip_prefix("--") else { continue };
            flags += 1;
            // The purpose stands behind two spaces, or on the next line.
            let next = || lines[i + 1];
            let purpose = flag.split_once("  ").map_or_else(next, |(_, purpose)| purpose.trim());
            assert!(purpose.len() > 9, "{command}: no purpose of --{flag} in\n{help}");
            assert!(!purpose.starts_with(['-', '[']), "{command}: --{flag} has {purpose:?}");
        }
        assert!(flags >= 4, "{help}");
    }
}

#[test]
fn the_programs_help_names_every_command_and_the_settings() {
    let help = run(&["--help"]).succeeded();
    for command in COMMANDS {
        assert!(help.contains(&format!("  {command} ")), "{command} in\n{help}");
    }
    assert!(help.contains("AFTERIMAGE_") && help.contains("--config"), "{help}");
    assert!(run(&["--version"]).succeeded().starts_with("afterimage "));
}
