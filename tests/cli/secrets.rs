//! Secrets stay out of help, logs and errors.

use std::io::{Read, Write};
use std::net::TcpStream;

use afterimage_wire::proto::Message;
use afterimage_wire::proto::handshake::Hello;
use rustix::process::Signal;

use crate::common::{Running, file, folder, run, run_with};

use crate::{SECRET, SERVICES, pgm_binary, unused_address};

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
    ] {
        let done = run(args);
        assert!(!done.status.success(), "{done:#?}");
        let said = format!("{}{}", done.stdout, done.stderr);
        assert!(!said.contains("sesame"), "{args:?}: {said}");
        assert!(!said.is_empty(), "{args:?}");
    }
}
