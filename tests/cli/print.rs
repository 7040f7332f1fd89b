//! Standard output without a reader, or on a full disk.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::common::{Done, PATIENCE, Running, file, folder, run, run_with, text};
use afterimage_classifier::Model;

/// The exit code that a shell gives for a program that SIGPIPE has ended.
const SIGPIPE: i32 = 128 + 13;

/// Runs a command with closed standard output.
fn unread(args: &[&str]) -> Done {
    run_with(args, |command| {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        command.stdout(writer);
    })
}

/// Runs a command with its standard output on a full disk.
fn onto_a_full_disk(args: &[&str]) -> Done {
    run_with(args, |command| {
        command.stdout(File::create("/dev/full").unwrap());
    })
}

/// The arguments that make a run quick.
const QUICK: [&str; 6] = ["--count", "200", "--warm-up", "0s", "--population", "100"];

#[test]
fn a_command_whose_reader_has_gone_ends_quietly() {
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let folder = folder();
    let snapshot = text(folder.path().join("snapshot"));
    let cache = Running::start(&["cache", "--memory", "8MiB", "--snapshot", &snapshot]);
    let (place, cache) = (memo.place(), cache.place());
    let idx = [&[0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 28, 0, 0, 0, 28][..], &[7; 784]].concat();
    let digit = file(&folder, "digit", &idx);
    let model = text(folder.path().join("raw.safetensors"));
    Model::raw().write(Path::new(&model)).unwrap();
    let data = mnist(&folder);
    let records = text(folder.path().join("records"));
    let with = |args: &[&str]| [&["bench", place.as_str()][..], &QUICK, args].concat().join("\n");
    let record = ["--repeat", "6", "--record", &records];
    run(&with(&record).split('\n').collect::<Vec<_>>()).succeeded();
    let kept = fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
    let (kept, page) = (text(kept), text(folder.path().join("page.html")));
    for args in [
        with(&[]),
        with(&["--json"]),
        with(&["--depth", "1,8,64"]),
        ["bench", "compare", &kept, &kept].join("\n"),
        ["bench", "report", &kept, "--html", &page].join("\n"),
        ["bench", "find-max", &place, "--duration", "10ms", "--p99", "1s"].join("\n"),
        ["stats", &place, "--over", "0s"].join("\n"),
        ["stats", &place, "--over", "0s", "--json"].join("\n"),
        ["stats", &place, "--watch"].join("\n"),
        ["classify", &digit, &digit, "--server", &place].join("\n"),
        ["snapshot", &cache].join("\n"),
        ["eval", "--model", "raw", "--data", &data].join("\n"),
        ["eval", "--model", "raw", "--data", &data, "--json"].join("\n"),
        ["demo", "--images", "50", "--model", &model].join("\n"),
    ] {
        let args: Vec<&str> = args.split('\n').collect();
        let done = unread(&args);
        assert_eq!((done.status.code(), done.stderr.as_str()), (Some(SIGPIPE), ""), "{args:?}");
    }
}

/// A folder with a test set of three images.
fn mnist(folder: &tempfile::TempDir) -> String {
    let head = [0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 28, 0, 0, 0, 28];
    let pixels: Vec<u8> = (0..3 * 784).map(|i| (i % 251) as u8).collect();
    file(folder, "t10k-images-idx3-ubyte", [&head[..], &pixels].concat());
    file(folder, "t10k-labels-idx1-ubyte", [0, 0, 8, 1, 0, 0, 0, 3, 1, 2, 3]);
    text(folder.path())
}

#[test]
fn output_that_cannot_be_written_is_an_error_like_any_other() {
    if !Path::new("/dev/full").exists() {
        return eprintln!("SKIPPED: there is no /dev/full here");
    }
    let memo = Running::start(&["serve", "--memory", "8MiB", "--model", "raw"]);
    let place = memo.place();
    for args in [&["stats", &place, "--over", "0s"][..], &["bench", &place, "--count", "10"]] {
        let line = onto_a_full_disk(args).failed_with_a_line();
        assert!(line.contains("cannot write to standard output: "), "{line}");
    }
}

/// A process that ends with its test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_service_runs_without_a_reader_of_its_output() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    // A port that was free a moment ago.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    command.args(["cache", "--memory", "8MiB", "--listen", &addr, "--log", "error"]);
    let _cache = Guard(command.stdin(Stdio::null()).stdout(writer).spawn().unwrap());
    let until = Instant::now() + PATIENCE;
    while !run(&["stats", &addr, "--over", "0s"]).stdout.contains("capacity") {
        assert!(Instant::now() < until, "the cache does not answer");
    }
}
