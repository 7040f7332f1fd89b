//! The start and the end of a service: checks, log lines, signals.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::time::Instant;

use rustix::process::Signal;

use crate::common::{PATIENCE, Running, file, folder, run};

use crate::{SECRET, SERVICES};

/// Ends a service and gives its whole log.
fn log_of(mut service: Running) -> String {
    service.signal(Signal::TERM);
    assert_eq!(service.wait().code(), Some(0));
    service.log()
}

#[test]
fn sighup_never_ends_a_service() {
    for command in SERVICES {
        let service = Running::start(&[command]);
        service.signal(Signal::HUP);
        let deadline = Instant::now() + PATIENCE;
        while !service.log().contains("SIGHUP") {
            assert!(Instant::now() < deadline, "{command} does not log the signal");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        run(&["stats", &service.place(), "--over", "0s"]).succeeded();
        log_of(service);
    }
}

#[test]
fn the_log_begins_with_version_and_settings() {
    let args = ["serve", "--memory", "8MiB", "--token", SECRET, "--listen", "127.0.0.1:0"];
    let log = log_of(Running::start(&args));
    let first = log.lines().next().unwrap();
    for part in [
        &format!(" INFO afterimage {}", env!("CARGO_PKG_VERSION")),
        "serve: ",
        "listen=127.0.0.1:0",
        "memory=8MiB",
        "token=(hidden)",
        "other settings have their defaults",
    ] {
        assert!(first.contains(part), "{part:?} in {first}");
    }
    let last = log.lines().last().unwrap();
    assert!(last.contains(" INFO stopped after ") && last.contains("0 requests"), "{last}");
}

#[test]
fn the_last_log_line_counts_requests_and_hits() {
    let folder = folder();
    let image = file(&folder, "digit.pgm", crate::pgm_binary(&[7; 784], 28));
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    for _ in 0..4 {
        run(&["classify", "--server", &memo.place(), &image]).succeeded();
    }
    let log = log_of(memo);
    let last = log.lines().last().unwrap();
    assert!(last.contains("4 requests, hit ratio 75.00 %"), "{last}");
}

#[test]
fn the_port_is_checked_before_the_table_is_made() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = holder.local_addr().unwrap().to_string();
    let folder = folder();
    let missing = folder.path().join("missing").to_str().unwrap().to_owned();
    for more in [["--memory", "4000TiB"], ["--snapshot", "/no/such/folder/snapshot"]] {
        for command in ["serve", "cache", "memo"] {
            let args = [&[command, "--listen", &addr][..], &more].concat();
            let line = run(&args).failed_with_no_more_than_logs();
            assert!(line.contains("in use"), "{line}");
        }
    }
    let args = ["classifier", "--listen", &addr, "--model", &missing];
    let line = run(&args).failed_with_no_more_than_logs();
    assert!(line.contains("in use"), "{line}");
}

#[test]
fn a_body_limit_that_no_request_fits_in_is_refused() {
    for (command, needed) in [("serve", 784), ("classifier", 784), ("memo", 784), ("cache", 16)] {
        let args = [command, "--listen", "127.0.0.1:0", "--max-body", "10"];
        let line = run(&args).failed_with_no_more_than_logs();
        let expected = format!("needs {needed}");
        assert!(line.contains("--max-body is 10 bytes") && line.contains(&expected), "{line}");
        let exact = needed.to_string();
        log_of(Running::start(&[command, "--max-body", &exact]));
    }
}

#[test]
fn a_readable_settings_file_with_a_token_is_warned_of() {
    use std::os::unix::fs::PermissionsExt;
    let folder = folder();
    for (settings, warns) in [
        (format!("[cache]\ntoken = \"{SECRET}\""), true),
        ("[memo]\nstore = \"redis://:pw@127.0.0.1:1\"\n[cache]\nwindow = 7".into(), true),
        ("[cache]\nwindow = 7".into(), false),
    ] {
        let path = file(&folder, "settings.toml", &settings);
        for mode in [0o600, 0o644] {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            let log = log_of(Running::start(&["cache", "--config", &path]));
            let found = log.contains("every user of this machine can read or change it");
            assert_eq!(found, warns && mode == 0o644, "{settings} {mode:o}:\n{log}");
            assert!(!log.contains(SECRET) && !log.contains(":pw@"), "{log}");
        }
    }
}

#[test]
fn the_password_of_redis_comes_from_a_file() {
    let folder = folder();
    let password = file(&folder, "password", "p@ss word\n");
    let redis = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("redis://{}", redis.local_addr().unwrap());
    let memo = Running::start(&["memo", "--store", &url, "--store-password-file", &password]);
    let (mut stream, _) = redis.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut seen, mut bytes) = (String::new(), [0; 512]);
    while !seen.contains("p@ss word\r\n") {
        let len = stream.read(&mut bytes).unwrap();
        assert!(len > 0, "the memo sent no password: {seen:?}");
        seen.push_str(&String::from_utf8_lossy(&bytes[..len]));
    }
    let _ = stream.write_all(b"-ERR this is no Redis\r\n");
    let log = log_of(memo);
    assert!(!log.contains("p@ss"), "{log}");

    let both = url.replace("redis://", "redis://:sesame@");
    for (store, named) in [
        (both.as_str(), "set one of them"),
        ("127.0.0.1:1", "is for Redis"),
        ("embedded", "needs a remote store"),
    ] {
        let args = ["memo", "--listen", "127.0.0.1:0", "--store", store];
        let args = [&args[..], &["--store-password-file", &password]].concat();
        let line = run(&args).failed_with_no_more_than_logs();
        assert!(line.contains(named) && !line.contains("sesame"), "{line}");
    }
}
