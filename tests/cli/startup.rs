//! The start and the end of a service: checks, log lines, signals, and secrets that no text shows.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::Instant;

use afterimage_wire::proto::Message;
use afterimage_wire::proto::handshake::Hello;
use rustix::process::Signal;

use crate::common::{PATIENCE, Running, file, folder, run, run_with};
use crate::{SECRET, SERVICES, pgm_binary, unused_address};

/// Ends a service and gives its whole log.
fn log_of(mut service: Running) -> String {
    service.signal(Signal::TERM);
    assert_eq!(service.wait().code(), Some(0));
    service.log()
}

#[test]
fn sigquit_drains_and_user_signals_do_nothing() {
    for command in SERVICES {
        let mut service = Running::start(&[command]);
        service.signal(Signal::USR1);
        service.signal(Signal::USR2);
        run(&["stats", &service.place(), "--over", "0s"]).succeeded();
        service.signal(Signal::QUIT);
        assert_eq!(service.wait().code(), Some(0), "{command}");
        assert!(service.log().contains("SIGQUIT: draining"), "{command}: {}", service.log());
    }
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
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
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

#[test]
fn a_wrong_token_is_one_clear_line_that_does_not_tell_it() {
    let folder = folder();
    let (right, wrong) = (file(&folder, "right", SECRET), file(&folder, "wrong", "swordfish"));
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    let memo = Running::start(&["serve", "--memory", "8MiB", "--token-file", &right]);
    let addr = memo.place();
    for args in [
        &["stats", &addr][..],
        &["classify", "--server", &addr, &image],
        &["bench", &addr, "--count", "10", "--warmup", "0s"],
    ] {
        for token in [&["--token-file", &wrong][..], &["--token", "sesame"], &[]] {
            let line = run(&[args, token].concat()).failed_with_no_more_than_logs();
            assert!(line.contains("token") || line.contains("unauthenticated"), "{line}");
            for secret in [SECRET, "swordfish", "sesame"] {
                assert!(!line.contains(secret), "{line}");
            }
        }
        run(&[args, &["--token-file", &right]].concat()).succeeded();
    }
}

#[test]
fn tenants_are_admitted_by_token_and_have_no_admin_rights() {
    let folder = folder();
    let tenants = file(&folder, "tenants", format!("search {SECRET} 3\nbatch swordfish"));
    let admin = file(&folder, "admin", "operator");
    let memo = Running::start(&[
        "serve",
        "--memory",
        "8MiB",
        "--tenant-file",
        &tenants,
        "--admin-token-file",
        &admin,
    ]);
    let addr = memo.place();
    for token in [SECRET, "swordfish", "operator"] {
        run(&["stats", &addr, "--token", token]).succeeded();
    }
    let line = run(&["stats", &addr, "--token", "other"]).failed_with_no_more_than_logs();
    assert!(line.contains("the token is wrong"), "{line}");
    let line = run(&["flush", &addr, "--token", SECRET]).failed_with_no_more_than_logs();
    assert!(line.contains("admin"), "{line}");
    for (text, expected) in [
        ("search", "--tenant-file: "),
        ("search operator", "--tenant-file has the token of --admin-token-file"),
    ] {
        let bad = file(&folder, "bad", text);
        let flags = ["--tenant-file", &bad, "--admin-token-file", &admin];
        let line = run(&[&["cache"][..], &flags].concat()).failed_with_no_more_than_logs();
        assert!(line.contains(expected) && !line.contains("operator"), "{line}");
    }
}

#[test]
fn a_token_is_found_in_no_help_no_log_and_no_stats() {
    let folder = folder();
    let token_file = file(&folder, "token", SECRET);
    for command in SERVICES {
        for way in [&["--token", SECRET][..], &["--token-file", &token_file]] {
            let flags = [&[command, "--log", "trace"][..], way].concat();
            let mut service = Running::start(&flags);
            let stats = run(&[&["stats", &service.place(), "--log", "trace"][..], way].concat());
            assert!(stats.status.success(), "{stats:#?}");
            assert!(!stats.stdout.contains(SECRET) && !stats.stderr.contains(SECRET), "{stats:#?}");
            run(&["stats", &service.place(), "--token", "wrong"]).failed_with_first_line();
            service.signal(Signal::TERM);
            service.wait();
            let log = service.log();
            assert!(log.len() > 100, "trace says something");
            assert!(!log.contains(SECRET), "{log}");
        }
    }
}

#[test]
fn no_help_shows_a_token_of_the_environment_or_the_file() {
    let folder = folder();
    for command in ["serve", "cache", "classifier", "memo", "classify", "bench", "stats"] {
        let path = file(&folder, "settings.toml", format!("[{command}]\ntoken = \"{SECRET}\"\n"));
        for args in [&[command, "--help"][..], &[command, "-h"], &[command, "--no-such-flag"]] {
            let from_environment = run_with(args, |command| {
                command.env("AFTERIMAGE_TOKEN", SECRET);
            });
            let from_file = run(&[args, &["--config", &path]].concat());
            for done in [from_environment, from_file] {
                let said = done.stdout + &done.stderr;
                assert!(!said.contains(SECRET), "{args:?}: {said}");
            }
        }
    }
}

#[test]
fn a_memos_secret_file_is_found_in_no_log_and_no_stats() {
    let folder = folder();
    let secret = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
    let path = file(&folder, "secret", secret);
    let mut memo = Running::start(&["serve", "--log", "trace", "--secret-file", &path]);
    let stats = run(&["stats", &memo.place()]).succeeded();
    memo.signal(Signal::TERM);
    memo.wait();
    assert!(!stats.contains(secret) && !memo.log().contains(secret));
}

#[test]
fn a_memo_with_a_remote_store_warns_without_a_secret_file() {
    let folder = folder();
    let path = file(&folder, "secret", "00112233445566778899aabbccddeeff".repeat(2));
    let (cache, redis) = (unused_address(), format!("redis://{}", unused_address()));
    let with = ["--secret-file", path.as_str()];
    for (cache, secret, warns) in [
        (cache.as_str(), &[][..], true),
        (&redis, &[], true),
        ("embedded", &[], false),
        (&cache, &with, false),
        (&redis, &with, false),
    ] {
        let flags = [&["memo", "--model", "raw", "--store", cache][..], secret].concat();
        let mut memo = Running::start(&flags);
        memo.signal(Signal::TERM);
        memo.wait();
        let log = memo.log();
        let warning = log.lines().find(|line| line.contains("--secret-file"));
        assert_eq!(warning.is_some(), warns, "{flags:?}:\n{log}");
        if let Some(line) = warning {
            assert!(line.contains(" WARN ") && line.contains("lost on restart"), "{line}");
        }
    }
}

#[test]
fn a_flood_of_wrong_tokens_is_one_warning() {
    let folder = folder();
    let token_file = file(&folder, "token", SECRET);
    let cache = Running::start(&["cache", "--memory", "8MiB", "--token-file", &token_file]);
    for _ in 0..20 {
        let mut stream = TcpStream::connect(cache.addr()).unwrap();
        let mut hello = Vec::new();
        Message::Hello(Hello::new(b"swordfish")).encode(1, &mut hello);
        stream.write_all(&hello).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    let log = cache.log();
    let warnings: Vec<&str> =
        log.lines().filter(|line| line.contains("missing or wrong token")).collect();
    assert_eq!(warnings.len(), 1, "{log}");
    assert!(warnings[0].contains("peer=127.0.0.1:") && warnings[0].contains("count=1"), "{log}");
    assert!(!log.contains("swordfish"), "{log}");
}

#[test]
fn no_error_shows_the_password_of_an_address() {
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    for args in [
        &["stats", "redis://:sesame@127.0.0.1:1"][..],
        &["stats", "--server", "redis://u:sesame@127.0.0.1:1"],
        &["snapshot", "rediss://:sesame@h"],
        &["classify", "--server", "redis://:sesame@127.0.0.1:1", &image],
        &["forget", "redis://:sesame@h"],
        &["proxy", "http://u:sesame@127.0.0.1:1"],
        &["memo", "--classifier", "http://u:sesame@h:80,h:81"],
        &["memo", "--store", "redis://:sesame@127.0.0.1:99999"],
        &["serve", "--listen", "tcp://u:sesame@h"],
        &["bench", "http://u:ses@ame:sesame@127.0.0.1:1/x"],
        &["bench", "redis://127.0.0.1:1/?password=sesame"],
        &["memo", "--listen", "127.0.0.1:0", "--store", "redis://127.0.0.1:1/?password=sesame"],
        &["stats", "redis://127.0.0.1:1/?a=b&auth_token=sesame#x"],
        &["stats", "u:sesame@127.0.0.1:1"],
        &["stats", "--server=:sesame@127.0.0.1:1"],
        &["proxy", "u:sesame@127.0.0.1:1"],
        &["proxy", "redis://:open sesame@127.0.0.1:1"],
        &["stats", "redis:/:sesame@h:1"],
        &["memo", "--store", "redis:sesame@h"],
        &["memo", "--classifier", "h:1,h:sesame@h"],
        &["serve", "--listen", ":sesame@h"],
        &["memo", "--listen", "127.0.0.1:0", "--store", "redis://:sesame"],
        &["doctor", "--store", "redis://u:sesame"],
        &["doctor", "--store", "redis://:sesame@127.0.0.1:1/x"],
    ] {
        let done = run(args);
        assert!(!done.status.success(), "{done:#?}");
        let said = format!("{}{}", done.stdout, done.stderr);
        assert!(!said.contains("sesame"), "{args:?}: {said}");
        assert!(!said.is_empty(), "{args:?}");
    }
}
