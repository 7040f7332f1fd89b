//! Errors: one clear line each.

use std::io::Write as _;
use std::net::TcpListener;
use std::process::Command;

use rustix::process::Signal;

use crate::common::{Running, file, folder, run, text};

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
        (&["memo", "--classifier", "http://127.0.0.1:8000/predict"], "HTTP is not supported"),
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
fn a_public_address_needs_a_token_or_insecure() {
    let folder = folder();
    let token = file(&folder, "token", SECRET);
    for command in SERVICES {
        for listen in ["0.0.0.0:0", "[::]:0"] {
            let line = run(&[command, "--listen", listen]).failed_with_no_more_than_logs();
            assert!(line.contains("--token-file") && line.contains("--insecure"), "{line}");
        }
        for allowed in [&["--insecure"][..], &["--token-file", &token]] {
            let args = [&[command, "--listen", "0.0.0.0:0"][..], allowed].concat();
            let mut service = Running::start(&args);
            service.signal(Signal::TERM);
            assert_eq!(service.wait().code(), Some(0));
        }
    }
}
