//! The command line as a person or a script meets it: what it prints, how it fails, where its
//! settings come from, and what it keeps to itself.

#![allow(clippy::unwrap_used)]

mod common;

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::TcpListener;
use std::process::Command;
use std::time::Duration;

use afterimage_bench::workload::Population;
use afterimage_classifier::{Image, Model};
use afterimage_wire::proto::Welcome;
use flate2::Compression;
use flate2::write::GzEncoder;
use rustix::process::Signal;
use tempfile::TempDir;

use common::talk::{Raw, within};
use common::{Done, Running, answered, file, folder, run, run_with, text};

const COMMANDS: [&str; 12] = [
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

const SERVICES: [&str; 4] = ["serve", "cache", "classifier", "memo"];

/// What must be found nowhere but where it was given.
const SECRET: &str = "hunter2-is-the-secret";

/// The longest that the part of a test may take that talks to a service.
const LIMIT: Duration = Duration::from_secs(60);

/// What the service at this address says of itself.
fn welcome(service: &Running) -> Welcome {
    let mut welcome = None;
    within(LIMIT, async {
        welcome = Some(Raw::open(service.addr(), "").await.1);
    });
    welcome.unwrap()
}

/// An address of this machine at which nobody listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

// ---- Help ----

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
        assert!(flags >= 5, "{help}");
    }
}

#[test]
fn the_programs_help_names_every_command_and_where_settings_come_from() {
    let help = run(&["--help"]).succeeded();
    for command in COMMANDS {
        assert!(help.contains(&format!("  {command} ")), "{command} in\n{help}");
    }
    assert!(help.contains("AFTERIMAGE_") && help.contains("--config"), "{help}");
    assert!(run(&["--version"]).succeeded().starts_with("afterimage "));
}

// ---- Errors ----

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
fn a_wrong_value_names_the_flag_and_the_value() {
    for args in [
        ["serve", "--threads", "many"],
        ["cache", "--memory", "12 parsecs"],
        ["memo", "--cache", "nowhere"],
        ["memo", "--lookup-budget", "soon"],
        ["bench", "--target", "moon"],
        ["train", "--features", "magic"],
        ["stats", "--timeout", "5"],
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
        &["cache", "--listen", "here"],
        &["demo", "--images", "5"],
    ] {
        let line = run(args).failed_with_no_more_than_logs();
        assert!(line.contains(args[2]) || line.contains("5.0 GiB"), "{args:?}: {line}");
    }
}

#[test]
fn a_setting_that_does_not_exist_is_named_with_its_file() {
    let folder = folder();
    for (settings, named) in [
        ("[serve]\nthread = 1", "\"thread\""),
        ("[surf]\nthreads = 1", "[surf]"),
        ("threads = 1", "\"threads\""),
        ("[serve\n", "TOML"),
    ] {
        let path = file(&folder, "settings.toml", settings);
        let line = run(&["serve", "--config", &path]).failed_with_first_line();
        assert!(line.contains(named) && line.contains(&path), "{line}");
    }
}

#[test]
fn a_wrong_value_is_told_of_where_it_stands() {
    let folder = folder();
    for (command, flag, value) in [
        ("serve", "threads", "many"),
        ("cache", "memory", "12 parsecs"),
        ("train", "features", "magic"),
        ("stats", "timeout", "5"),
    ] {
        let path = file(&folder, "settings.toml", format!("[{command}]\n{flag} = \"{value}\""));
        let line = run(&[command, "--config", &path]).failed_with_a_line();
        let named = format!("settings file {path}: {flag} is {value:?}: ");
        assert!(line.contains(&named) && !line.contains("--"), "{line}");

        let variable = format!("AFTERIMAGE_{}", flag.to_uppercase());
        let set = |process: &mut Command| {
            process.env(&variable, value);
        };
        let line = run_with(&[command], set).failed_with_a_line();
        let named = format!("the environment variable {variable} is {value:?}: ");
        assert!(line.contains(&named) && !line.contains("--"), "{line}");
        // The environment beats the file, and the flag beats both.
        let line = run_with(&[command, "--config", &path], set).failed_with_a_line();
        assert!(line.contains(&named), "{line}");
        let done = run_with(&[command, &format!("--{flag}"), "?"], set);
        assert!(done.stderr.contains(&format!("--{flag}")), "{done:#?}");
    }
    let path = file(&folder, "settings.toml", "log = \"debgu\"");
    let line = run(&["serve", "--config", &path]).failed_with_a_line();
    assert!(line.contains("log is \"debgu\": \"debgu\" is no level"), "{line}");
}

#[test]
fn settings_that_exclude_each_other_are_told_of_by_the_names_they_stand_under() {
    let folder = folder();
    let token_file = file(&folder, "token", "sesame");
    for command in ["serve", "stats"] {
        let both = |process: &mut Command| {
            process.env("AFTERIMAGE_TOKEN", "sesame").env("AFTERIMAGE_TOKEN_FILE", &token_file);
        };
        let args =
            [&[command][..], if command == "stats" { &["127.0.0.1:1"] } else { &[] }].concat();
        let line = run_with(&args, both).failed_with_a_line();
        let named = "AFTERIMAGE_TOKEN_FILE and AFTERIMAGE_TOKEN are both set";
        let turned = "AFTERIMAGE_TOKEN and AFTERIMAGE_TOKEN_FILE are both set";
        assert!(line.contains(named) || line.contains(turned), "{line}");
        assert!(!line.contains("--") && !line.contains("sesame"), "{line}");
        // On the command line they are flags; one that beats the environment is none too many.
        let done = run(&[&args[..], &["--token", "x", "--token-file", &token_file]].concat());
        assert!(done.stderr.contains("'--token <TOKEN>' cannot be used with"), "{done:#?}");
        let settings = format!("[{command}]\ntoken = \"sesame\"\ntoken-file = \"{token_file}\"");
        let settings = file(&folder, "settings.toml", settings);
        let line = run(&[&args[..], &["--config", &settings]].concat()).failed_with_a_line();
        assert!(line.contains("token and token-file are both set"), "{line}");
    }
}

#[test]
fn a_server_that_is_not_there_is_one_clear_line() {
    let addr = nobody();
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
    for addr in ["nowhere", "127.0.0.1", "127.0.0.1:port"] {
        let line = run(&["stats", addr, "--timeout", "2s"]).failed_with_no_more_than_logs();
        assert!(line.contains("connect") || line.contains(addr), "{line}");
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
fn a_service_of_the_wrong_kind_is_one_clear_line() {
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    let folder = folder();
    let image = file(&folder, "digit.pgm", pgm_binary(&[7; 784], 28));
    let line =
        run(&["classify", "--server", &cache.place(), &image]).failed_with_no_more_than_logs();
    assert!(line.contains("cache"), "{line}");
    // The generator asks who is there, and is told what does not fit.
    let line = run(&["bench", &cache.place(), "--images", "drawn"]).failed_with_no_more_than_logs();
    assert!(line.contains("is a cache") && line.contains("leave --images away"), "{line}");
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let line = run(&["bench", &memo.place(), "--read-share", "0.5", "--population", "10"])
        .failed_with_no_more_than_logs();
    assert!(line.contains("is a memo") && line.contains("--read-share"), "{line}");
}

// ---- Settings ----

#[test]
fn a_flag_beats_the_environment_beats_the_file_beats_the_default() {
    let folder = folder();
    let settings = "[cache]\nmemory = \"8MiB\"\nwindow = 11\nmax-body = \"64KiB\"\n\
                    insecure = false\nlisten = \"127.0.0.1:0\"\n[memo]\nwindow = 99\n";
    let path = file(&folder, "settings.toml", settings);
    let window = |args: &[&str], env: &[(&str, &str)]| {
        let service = Running::start_with_env(&[&["cache"], args].concat(), env);
        let welcome = welcome(&service);
        (welcome.window, welcome.max_body)
    };
    let config = ["--config", path.as_str()];
    let variable = ("AFTERIMAGE_WINDOW", "22");
    assert_eq!(window(&["--memory", "8MiB"], &[]), (16_384, 1 << 20));
    assert_eq!(window(&config, &[]), (11, 64 << 10));
    assert_eq!(window(&[], &[("AFTERIMAGE_CONFIG", &path)]), (11, 64 << 10));
    assert_eq!(window(&config, &[variable]), (22, 64 << 10));
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &[variable]), (33, 64 << 10));
    assert_eq!(window(&["--memory", "8MiB", "--window", "33"], &[variable]), (33, 1 << 20));
    // Each setting by itself: one from the flag, another from the environment.
    let variables = [variable, ("AFTERIMAGE_MAX_BODY", "32KiB")];
    assert_eq!(window(&[&config[..], &["--window", "33"]].concat(), &variables), (33, 32 << 10));
}

#[test]
fn every_command_takes_its_settings_from_the_environment_and_from_the_file() {
    let folder = folder();
    let addr = nobody();
    let path = file(&folder, "settings.toml", "[stats]\ntimeout = \"wrong\"\n[demo]\nimages = 7");
    // Seen by what it complains of.
    let line = run(&["demo", "--config", &path]).failed_with_no_more_than_logs();
    assert!(line.contains("--images is 7"), "{line}");
    let done = run_with(&["demo", "--config", &path], |command| {
        command.env("AFTERIMAGE_IMAGES", "8");
    });
    assert!(done.failed_with_no_more_than_logs().contains("--images is 8"));
    let done = run(&["stats", &addr, "--config", &path]);
    assert!(!done.status.success() && done.stderr.contains("wrong"), "{done:#?}");
    let done = run_with(&["bench", &addr], |command| {
        command.env("AFTERIMAGE_COUNT", "none");
    });
    assert!(!done.status.success() && done.stderr.contains("none"), "{done:#?}");
}

#[test]
fn a_token_flag_beats_a_token_of_the_settings_file() {
    let folder = folder();
    let token = file(&folder, "token", SECRET);
    let settings = "[cache]\ntoken = \"of-the-file\"\nmemory = \"8MiB\"";
    let path = file(&folder, "settings.toml", settings);
    let cache = Running::start(&["cache", "--config", &path, "--token-file", &token]);
    run(&["stats", &cache.place(), "--token", SECRET]).succeeded();
}

#[test]
fn a_flag_that_needs_another_finds_it_in_the_settings_file() {
    let folder = folder();
    let snapshot = text(folder.path().join("snapshot"));
    let settings = format!("[cache]\nsnapshot = {snapshot:?}\n[bench]\nrate = 500.0");
    let path = file(&folder, "settings.toml", settings);
    let args = ["cache", "--memory", "8MiB", "--snapshot-every", "1h"];
    let cache = Running::start(&[&args[..], &["--config", &path]].concat());
    let bench = ["bench", &cache.place(), "--poisson", "--count", "50"];
    run(&[&bench[..], &["--warmup", "0s", "--config", &path]].concat()).succeeded();
    // And without it there, says so.
    let line = run(&[&args[..], &["--listen", "127.0.0.1:0"]].concat());
    assert!(line.failed_with_no_more_than_logs().contains("--snapshot-every needs --snapshot"));
    let line = run(&bench).failed_with_no_more_than_logs();
    assert!(line.contains("--poisson needs --rate"), "{line}");
}

#[test]
fn an_address_that_others_reach_wants_a_token_or_a_word() {
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

// ---- Secrets ----

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
fn a_token_from_the_environment_or_the_settings_file_is_found_in_no_help() {
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

// ---- Images ----

fn pgm_binary(pixels: &[u8], width: usize) -> Vec<u8> {
    let height = pixels.len() / width;
    [format!("P5\n{width} {height}\n255\n").as_bytes(), pixels].concat()
}

fn pgm_text(pixels: &[u8], width: usize) -> Vec<u8> {
    let mut text = format!("P2\n# drawn\n{width} {}\n255\n", pixels.len() / width);
    for row in pixels.chunks(width) {
        for pixel in row {
            write!(text, "{pixel} ").unwrap();
        }
        text.push('\n');
    }
    text.into_bytes()
}

fn png(pixels: &[u8], width: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, pixels.len() as u32 / width);
    encoder.set_color(png::ColorType::Grayscale);
    let mut writer = encoder.write_header().unwrap();
    writer.write_image_data(pixels).unwrap();
    writer.finish().unwrap();
    bytes
}

/// An IDX file of unsigned bytes with these dimensions.
fn idx(dims: &[usize], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    for &dim in dims {
        // IDX is big-endian: the lowest byte last.
        bytes.extend(u32::try_from(dim).unwrap().to_le_bytes().iter().rev());
    }
    bytes.extend_from_slice(values);
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// The columns of a line of `classify`: label, origin, and the file's name at its end.
fn columns(line: &str) -> (u16, &str, &str) {
    let mut words = line.split_whitespace();
    let (label, origin) = (words.next().unwrap(), words.next().unwrap());
    let micros: f64 = words.next().unwrap().parse().unwrap();
    assert!(micros > 0.0 && words.next() == Some("µs"), "{line:?}");
    (label.parse().unwrap(), origin, words.next().unwrap())
}

#[test]
fn classify_reads_every_format_and_says_what_was_remembered() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let (digits, labels) = answered(21, 5, &Model::raw());
    let (of, one) = (|i| digits.image(i), [1, 28, 28]);
    let files = [
        file(&folder, "0.png", png(of(0), 28)),
        file(&folder, "1.pgm", pgm_binary(of(1), 28)),
        file(&folder, "2.pgm", pgm_text(of(2), 28)),
        file(&folder, "3.idx", idx(&one, of(3))),
        file(&folder, "4.idx.gz", gzip(&idx(&one, of(4)))),
    ];
    for expected in ["computed", "remembered"] {
        let mut args = vec!["classify", "--server", &server];
        args.extend(files.iter().map(String::as_str));
        let printed = run(&args).succeeded();
        assert_eq!(printed.lines().count(), files.len(), "{printed}");
        for ((line, file), &label) in printed.lines().zip(&files).zip(&labels) {
            assert_eq!(columns(line), (label, expected, file.as_str()));
        }
    }
    // The same digit in another format is the same image.
    let again = file(&folder, "again.png", png(of(1), 28));
    let printed = run(&["classify", "--server", &server, &again]).succeeded();
    assert_eq!(columns(printed.trim_end()), (labels[1], "remembered", again.as_str()));
    // Dark on light, turned round, is the same image, too.
    let dark: Vec<u8> = of(0).iter().map(|pixel| 255 - pixel).collect();
    let dark = file(&folder, "dark.png", png(&dark, 28));
    let printed = run(&["classify", "--server", &server, "--invert", &dark]).succeeded();
    assert_eq!(columns(printed.trim_end()), (labels[0], "remembered", dark.as_str()));
}

#[test]
fn classify_asks_about_every_image_of_an_idx_file_up_to_a_limit() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let (digits, labels) = answered(22, 6, &Model::raw());
    let bytes = idx(&[6, 28, 28], digits.bytes());
    for path in [file(&folder, "six.idx", &bytes), file(&folder, "six.idx.gz", gzip(&bytes))] {
        let printed = run(&["classify", "--server", &server, &path]).succeeded();
        let classes: Vec<u16> = printed.lines().map(|line| columns(line).0).collect();
        assert_eq!(classes, labels, "{printed}");
        let printed = run(&["classify", "--server", &server, "--limit", "2", &path]).succeeded();
        assert_eq!(printed.lines().count(), 2, "{printed}");
        assert!(printed.lines().all(|line| columns(line).1 == "remembered"), "{printed}");
    }
}

#[test]
fn classify_names_the_file_that_is_no_image_of_the_servers_size_and_does_the_rest() {
    let folder = folder();
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let server = memo.place();
    let small = file(&folder, "small.pgm", pgm_binary(&[0; 27 * 27], 27));
    let text_file = file(&folder, "notes.txt", "this is not an image");
    let missing = text(folder.path().join("missing.png"));
    let good = file(&folder, "good.png", png(&[0; 784], 28));
    for (bad, words) in [
        (&small, &["27×27", "28×28"][..]),
        (&text_file, &["PNG, PGM or IDX"]),
        (&missing, &["No such file"]),
    ] {
        let done = run(&["classify", "--server", &server, bad, &good]);
        assert_eq!(done.status.code(), Some(1), "{done:#?}");
        let line = done.stderr.lines().next().unwrap();
        assert!(line.contains(bad.as_str()), "{done:#?}");
        for word in words {
            assert!(line.contains(word), "{done:#?}");
        }
        assert_eq!(done.stderr.lines().count(), 2, "one line for the file, one for the command");
        assert_eq!(line.matches(bad.as_str()).count(), 1, "it is named once: {line}");
        assert_eq!(columns(done.stdout.trim_end()).2, good, "the other file is done");
    }
}

// ---- Models ----

/// A data set of drawn digits, as the four files that MNIST comes in; two of them gzipped.
fn data_set(train: usize, test: usize) -> TempDir {
    let folder = folder();
    let (train, test) = (Population::drawn(31, train), Population::drawn(32, test));
    let labels = |digits: &Population| -> Vec<u8> {
        digits.labels().unwrap().iter().map(|&label| label as u8).collect()
    };
    let images = |digits: &Population| idx(&[digits.len(), 28, 28], digits.bytes());
    let labels = |digits: &Population| idx(&[digits.len()], &labels(digits));
    file(&folder, "train-images-idx3-ubyte", images(&train));
    file(&folder, "train-labels-idx1-ubyte.gz", gzip(&labels(&train)));
    file(&folder, "t10k-images-idx3-ubyte.gz", gzip(&images(&test)));
    file(&folder, "t10k-labels-idx1-ubyte", labels(&test));
    folder
}

#[test]
fn train_makes_the_same_file_twice_and_eval_and_a_service_take_it() {
    let data = data_set(200, 100);
    let data = text(data.path());
    let train = |out: &TempDir| {
        let args = ["train", "--features", "raw", "--c", "0.01", "--data", &data];
        let args = [&args[..], &["--out", "model.safetensors"]].concat();
        let printed = run_with(&args, |command| {
            command.current_dir(out.path());
        })
        .succeeded();
        assert!(printed.contains("wrote model.safetensors"), "{printed}");
        std::fs::read(out.path().join("model.safetensors")).unwrap()
    };
    let (one, two) = (folder(), folder());
    let bytes = train(&one);
    assert_eq!(bytes, train(&two));
    let path = text(one.path().join("model.safetensors"));
    let model = Model::read(path.as_ref()).unwrap();

    let printed = run(&["eval", "--model", &path, "--data", &data]).succeeded();
    assert!(printed.contains(&model.digest().to_string()), "{printed}");
    let digits = Population::drawn(32, 100);
    let labels = digits.labels().unwrap();
    let wrong = |&i: &usize| model.classify(digits.image(i)).unwrap() != labels[i];
    let wrong = (0..100).filter(wrong).count();
    assert!(wrong < 50, "{wrong} of 100 wrong: nothing was learned");
    assert!(printed.contains(&format!("{wrong} of 100")), "{wrong} wrong, and it says\n{printed}");
    for word in ["precision", "recall"] {
        assert!(printed.to_lowercase().contains(word), "{printed}");
    }

    let sheet = text(one.path().join("worst.png"));
    let asked = ["--worst", &sheet, "--worst-count", "12"];
    let eval = [&["eval", "--model", &path, "--data", &data], &asked[..]].concat();
    let printed = run(&eval).succeeded();
    assert!(printed.contains(&format!("wrote {sheet}: the 12 worst of 100")), "{printed}");
    assert!(Image::read(sheet.as_ref()).unwrap().shape().len() > 12 * 112 * 112);
    let json = run(&[&eval[..], &["--json"]].concat()).succeeded();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["images"], &json["wrong"]), (&100.into(), &wrong.into()));
    assert_eq!(json["model"], model.digest().to_string());
    let worst = json["worst"].as_array().unwrap();
    assert_eq!(worst.len(), 12);
    assert!(worst[..wrong.min(12)].iter().all(|example| example["label"] != example["answer"]));
    let many = ["--worst", &sheet, "--worst-count", "1001"];
    let line = run(&[&["eval", "--model", &path, "--data", &data], &many[..]].concat());
    let line = line.failed_with_no_more_than_logs();
    assert!(line.contains("--worst-count"), "{line}");
    let nowhere = ["--worst", "/no/such/folder/worst.png"];
    let line = run(&[&["eval", "--model", &path, "--data", &data], &nowhere[..]].concat());
    assert!(line.failed_with_no_more_than_logs().contains("/no/such/folder"), "it names the file");

    let service = Running::start(&["serve", "--memory", "8MiB", "--model", &path]);
    assert_eq!(welcome(&service).digest, model.digest().0);
    let demo = run(&["demo", "--data", &data]).failed_with_no_more_than_logs();
    assert!(demo.contains("100 distinct digits"), "{demo}");
}

#[test]
fn train_refuses_what_it_cannot_learn_from_in_one_line() {
    let data = data_set(20, 10);
    let place = text(data.path());
    for (args, named) in [
        (&["--c=-1"][..], "C is -1"),
        (&["--c", "NaN"], "C is NaN"),
        (&["--out", "/no/such/folder/model"], "/no/such/folder/model"),
    ] {
        let line = run(&[&["train", "--features", "raw", "--data", &place][..], args].concat())
            .failed_with_no_more_than_logs();
        assert!(line.contains(named), "{line}");
    }
    // A file that is cut short.
    let labels = data.path().join("t10k-labels-idx1-ubyte");
    std::fs::write(&labels, &std::fs::read(&labels).unwrap()[..12]).unwrap();
    let line = run(&["eval", "--model", "raw", "--data", &place]).failed_with_no_more_than_logs();
    assert!(line.contains("t10k-labels-idx1-ubyte"), "{line}");
}

// ---- The demo, the load generator, the stats ----

#[test]
fn the_demo_prints_its_figures() {
    let printed = run(&["demo", "--images", "2000", "--model", "raw"]).succeeded();
    for figure in [
        "2000 distinct drawn digits",
        "p50",
        "p90",
        "p99",
        "cold",
        "hot",
        "speed-up",
        "hits",
        "2000 misses",
        "every hot answer equals the cold one: 2000 of 2000",
        "classification errors:",
    ] {
        assert!(printed.contains(figure), "{figure:?} in\n{printed}");
    }
}

#[test]
fn bench_measures_a_memo_and_a_cache_and_checks_their_answers() {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let cache = Running::start(&["cache", "--memory", "8MiB"]);
    let few = ["--count", "2000", "--warmup", "0s", "--population", "100", "--depth", "16"];
    let report = |addr: &str, more: &[&str]| {
        let printed = run(&[&["bench", addr, "--json"][..], &few, more].concat()).succeeded();
        let mut record = serde_json::from_str::<serde_json::Value>(&printed).unwrap();
        record["runs"][0]["report"].take()
    };
    let of_memo = report(&memo.place(), &["--connections", "3", "--zipf", "1"]);
    assert_eq!((&of_memo["sent"], &of_memo["answered"]), (&2000.into(), &2000.into()));
    assert_eq!((&of_memo["wrong"], &of_memo["failed"]), (&0.into(), &0.into()));
    assert!(of_memo["hit_ratio"].as_f64().unwrap() > 0.5, "{of_memo:#}");
    let of_cache = report(&cache.place(), &["--prefill", "--read-share", "0.9"]);
    assert_eq!((&of_cache["sent"], &of_cache["wrong"]), (&2000.into(), &0.into()));
    assert_eq!(of_cache["hit_ratio"].as_f64(), Some(1.0), "{of_cache:#}");
    // For people.
    let printed = run(&[&["bench", &memo.place()][..], &few].concat()).succeeded();
    assert!(printed.contains("p99"), "{printed}");
}

#[test]
fn stats_prints_what_each_service_counts() {
    for (command, names) in [
        ("serve", &["hits", "misses", "coalesced", "rejected_tags", "engine_scored"][..]),
        ("cache", &["hits", "misses", "evictions", "entries", "memory_bytes"]),
        ("classifier", &["engine_scored", "engine_batches", "engine_queued"]),
    ] {
        let service = Running::start(&[command]);
        let printed = run(&["stats", &service.place()]).succeeded();
        for name in names.iter().chain(&["uptime_ms", "connections_open", "requests"]) {
            let line = printed.lines().find(|line| line.split_whitespace().next() == Some(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1));
            let number = value.and_then(|value| value.parse::<i64>().ok());
            assert!(number.is_some(), "{command}: {name} in\n{printed}");
        }
    }
}

impl Done {
    /// Fails unless the command failed with exit code 1 and its error is the last line on standard
    /// error, with nothing before it but the log's lines; gives the error.
    fn failed_with_no_more_than_logs(mut self) -> String {
        let is_log = |line: &str| line.contains(" INFO ") || line.contains(" WARN ");
        let kept: Vec<&str> = self.stderr.lines().filter(|line| !is_log(line)).collect();
        self.stderr = kept.join("\n");
        self.failed_with_a_line()
    }

    /// Fails unless the command failed with exit code 1; gives the first line of its error.
    fn failed_with_first_line(self) -> String {
        assert_eq!(self.status.code(), Some(1), "{self:#?}");
        self.stderr.lines().next().unwrap_or_default().to_owned()
    }
}
