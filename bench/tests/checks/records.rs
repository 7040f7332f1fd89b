//! The documents show the committed records, and committing a record keeps them up to date.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::workload::Keys;
use afterimage_bench::{Plan, Span, run};

const DOCUMENTS: [&str; 3] = ["README.md", "bench/README.md", "docs/performance.md"];

/// Runs a script of `root` with Python; `None`, with a note, where Python is missing or too old.
fn script(root: &Path, arguments: &[&str]) -> Option<Output> {
    let version = "import sys; sys.exit(sys.version_info < (3, 11))";
    let python = Command::new("python3").args(["-c", version]).status();
    if !python.is_ok_and(|status| status.success()) {
        // Past the harness, which hides the output of a test that passes.
        let _ = writeln!(std::io::stderr(), "SKIPPED: there is no Python 3.11");
        return None;
    }
    let (name, rest) = arguments.split_first().unwrap();
    let path = root.join("bench/scripts").join(name);
    // Without bytecode, which Python would write into the source tree.
    Some(Command::new("python3").arg("-B").arg(path).args(rest).output().unwrap())
}

fn succeeds(output: &Output) -> bool {
    output.status.success()
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// A copy of the files that the scripts read and write.
fn copy() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["bench/scripts", "bench/records", "docs"] {
        let (from, to) = (repository().join(name), folder.path().join(name));
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_file() {
                fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
            }
        }
    }
    for name in ["README.md", "bench/README.md", "bench/targets.toml"] {
        fs::copy(repository().join(name), folder.path().join(name)).unwrap();
    }
    folder
}

/// A record of a short run against a fake server that answers nothing: only its form matters.
fn record(name: &str, figure: (&str, f64)) -> Record {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.accept());
    let keys = Keys { count: 1, read_share: 1.0, salt: 0 };
    let plan = Plan {
        dialect: afterimage_bench::Dialect::Echo,
        stop: Span::Requests(1),
        ..Plan::cache(addr, keys)
    };
    let report = run(&plan, &mut |_| {}).unwrap();
    let runs = vec![Run { name: "a run".into(), report }];
    let mut record = Record::new(name, Path::new("."), Machine::default(), runs);
    record.figures.insert(figure.0.into(), figure.1);
    record
}

#[test]
fn the_documents_show_the_committed_records() {
    let Some(output) = script(repository(), &["performance.py", "--check"]) else { return };
    assert!(succeeds(&output), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_changed_record_makes_the_documents_stale() {
    let folder = copy();
    let path = folder.path().join("bench/records/cache.json");
    let mut record = Record::read(&path).unwrap();
    record.figures.insert("afterimage M/s".into(), 12.345);
    fs::write(&path, serde_json::to_string(&record).unwrap()).unwrap();
    let Some(output) = script(folder.path(), &["performance.py", "--check"]) else { return };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!succeeds(&output), "{said}");
    for document in DOCUMENTS {
        assert!(said.contains(document), "{said}");
    }
}

#[test]
fn a_committed_record_is_trimmed_shown_and_in_the_history() {
    let folder = copy();
    let root = folder.path();
    let new =
        record("cache", ("afterimage M/s", 12.345)).write(&root.join("target/bench")).unwrap();
    let Some(output) = script(root, &["records.py", "keep", new.to_str().unwrap()]) else { return };
    assert!(succeeds(&output), "{}", String::from_utf8_lossy(&output.stderr));
    let committed = fs::read_to_string(root.join("bench/records/cache.json")).unwrap();
    assert!(!committed.contains("timeline") && !committed.contains("histograms"));
    let history = fs::read_to_string(root.join("bench/records/history.csv")).unwrap();
    let old = fs::read_to_string(repository().join("bench/records/history.csv")).unwrap();
    assert_eq!(history.lines().count(), old.lines().count() + 1);
    assert!(history.contains(",afterimage M/s,12.345,M/s\n"), "{history}");
    assert!(succeeds(&script(root, &["performance.py", "--check"]).unwrap()));
    assert!(fs::read_to_string(root.join("README.md")).unwrap().contains("12.3 M reads"));
}
