//! Jobs with real processes: a server, workers that run a program, and the commands of a client.

#![allow(clippy::unwrap_used)]
#![cfg(unix)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Running, folder, run, run_with, text};
use tempfile::TempDir;

/// A program that doubles each line of its input, after a pause, and counts its runs.
const PROGRAM: &str = "#!/bin/sh
echo \"$JOB_ID\" >> \"$RUNS\"
echo half way >&2
sleep \"${PAUSE:-0}\"
sed 's/.*/&&/'
";

struct Jobs {
    folder: TempDir,
    server: Running,
}

impl Jobs {
    fn start() -> Jobs {
        let folder = folder();
        let data = text(folder.path().join("jobs.db"));
        let server = Running::start(&["jobs", "serve", "--data", &data]);
        let jobs = Jobs { folder, server };
        jobs.program("double", PROGRAM);
        jobs
    }

    fn program(&self, name: &str, script: &str) -> String {
        let path = self.folder.path().join(name);
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        text(path)
    }

    fn worker(&self, program: &str, pause: &str, flags: &[&str]) -> Worker {
        let exec = text(self.folder.path().join(program));
        let place = self.server.place();
        let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
        command
            .args(["jobs", "worker", "--definition", "double", "--exec", &exec])
            .args(["--server", &place])
            .args(flags)
            .env("RUNS", self.folder.path().join("runs"))
            .env("PAUSE", pause)
            .stdout(Stdio::null());
        Worker(command.spawn().unwrap())
    }

    /// The output of a command of a client.
    fn ask(&self, args: &[&str]) -> String {
        let place = self.server.place();
        let args = [&["jobs"], args, &["--server", &place, "--timeout", "30s"]].concat();
        run(&args).succeeded()
    }

    fn submit(&self, input: &str) -> String {
        self.ask(&["submit", "double", "--text", input]).trim().to_owned()
    }

    /// Submits and waits; the result, and the line on standard error.
    fn result(&self, input: &str) -> (String, String) {
        let place = self.server.place();
        let args = ["jobs", "submit", "double", "--text", input, "--wait", "--server", &place];
        let done = run_with(&args, |_| {});
        assert!(done.status.success(), "{done:#?}");
        (done.stdout, done.stderr)
    }

    fn runs(&self) -> usize {
        let runs = fs::read_to_string(self.folder.path().join("runs"));
        runs.map_or(0, |runs| runs.lines().count())
    }

    fn until(&self, what: &str, mut is_true: impl FnMut(&Jobs) -> bool) {
        let deadline = Instant::now() + common::PATIENCE;
        while !is_true(self) {
            assert!(Instant::now() < deadline, "waited for this: {what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn count(&self, state: &str) -> usize {
        self.ask(&["list", "--state", state, "--limit", "1000", "--json"]).lines().count()
    }
}

struct Worker(Child);

impl Worker {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

#[test]
fn results_survive_killed_workers_and_servers() {
    let mut jobs = Jobs::start();
    let mut first = jobs.worker("double", "0.2", &["--jobs", "4", "--name", "first"]);
    jobs.until("the worker is there", |jobs| jobs.ask(&["definitions"]).contains("double"));
    let ids: Vec<String> = (0..12).map(|i| jobs.submit(&format!("input {i}"))).collect();
    jobs.until("jobs run", |jobs| jobs.runs() > 4);
    let _second = jobs.worker("double", "0", &["--jobs", "2", "--name", "second"]);
    first.kill();
    jobs.until("all jobs have succeeded", |jobs| jobs.count("succeeded") == 12);
    let runs = jobs.runs();
    assert!((12..=16).contains(&runs), "a killed worker runs at most 4 jobs twice, not {runs}");
    for (i, id) in ids.iter().enumerate() {
        let file = text(jobs.folder.path().join("result"));
        jobs.ask(&["show", id, "--output", &file]);
        assert_eq!(fs::read_to_string(file).unwrap(), format!("input {i}input {i}"));
    }
    // The same input again is answered from memory: nothing runs.
    let (result, note) = jobs.result("input 7");
    assert_eq!((result.as_str(), jobs.runs()), ("input 7input 7", runs));
    assert!(note.contains("remembered") && note.contains(&ids[7]), "{note}");
    let before = jobs.ask(&["events", "--json"]);

    jobs.server.kill();
    jobs.server.restart();
    assert_eq!(jobs.ask(&["events", "--json"]), before, "a restart keeps the log");
    assert_eq!(jobs.count("succeeded"), 12);
    let (result, note) = jobs.result("input 11");
    assert!(result == "input 11input 11" && note.contains("remembered"), "{result} {note}");
    assert_eq!(jobs.runs(), runs, "nothing runs again after a restart");
}

#[test]
fn a_dead_worker_is_replaced_in_less_than_3_seconds() {
    let jobs = Jobs::start();
    let mut dead = jobs.worker("double", "60", &[]);
    jobs.until("the worker is there", |jobs| jobs.ask(&["definitions"]).contains("double"));
    let id = jobs.submit("one");
    jobs.until("the job runs", |jobs| jobs.runs() == 1);
    let _healthy = jobs.worker("double", "0", &[]);
    jobs.until("the other one is there", |jobs| {
        let line = jobs.ask(&["definitions", "--json"]);
        line.contains("\"idle_workers\":1")
    });
    let killed = Instant::now();
    dead.kill();
    jobs.until("it runs again", |jobs| jobs.runs() == 2);
    assert!(killed.elapsed() < Duration::from_secs(3), "it took {:?}", killed.elapsed());
    jobs.until("it has ended", |jobs| jobs.count("succeeded") == 1);
    let shown = jobs.ask(&["show", &id]);
    assert!(shown.contains("lost the lease") && shown.contains("attempt 2"), "{shown}");
}

#[test]
fn a_running_job_shows_progress_and_can_be_cancelled() {
    let jobs = Jobs::start();
    let _worker = jobs.worker("double", "60", &[]);
    jobs.until("the worker is there", |jobs| jobs.ask(&["definitions"]).contains("double"));
    let id = jobs.submit("one");
    jobs.until("progress is shown", |jobs| jobs.ask(&["show", &id]).contains("half way"));
    jobs.ask(&["cancel", &id]);
    assert!(jobs.ask(&["show", &id]).contains("cancelled"));
    // The worker is free again: its program was stopped.
    let other = jobs.submit("two");
    jobs.until("the next job runs", |jobs| jobs.ask(&["show", &other]).contains("leased"));
    let refused = run(&["jobs", "cancel", &id, "--server", &jobs.server.place()]);
    let line = refused.failed_with_a_line();
    assert!(line.contains("is cancelled; only jobs that have not ended"), "{line}");
}

#[test]
fn a_failed_job_says_why_and_can_be_retried() {
    let jobs = Jobs::start();
    let script = "#!/bin/sh\necho $JOB_ID >> \"$RUNS\"\n\
                  [ -e \"$RUNS.good\" ] && exec cat\necho no disk >&2\nexit 1\n";
    jobs.program("fails", script);
    let limits = ["--max-attempts", "2", "--backoff", "10ms"];
    let _worker = jobs.worker("fails", "0", &limits);
    jobs.until("the worker is there", |jobs| jobs.ask(&["definitions"]).contains("double"));
    let id = jobs.submit("one");
    jobs.until("it has failed", |jobs| jobs.count("failed") == 1);
    assert_eq!(jobs.runs(), 2, "two attempts");
    assert!(jobs.ask(&["list"]).contains("no disk"));
    fs::write(jobs.folder.path().join("runs.good"), "").unwrap();
    jobs.ask(&["retry", &id]);
    jobs.until("it has succeeded", |jobs| jobs.count("succeeded") == 1);
}

#[test]
fn a_changed_program_does_not_answer_for_the_old_one() {
    let jobs = Jobs::start();
    {
        let _worker = jobs.worker("double", "0", &[]);
        jobs.until("the worker is there", |jobs| jobs.ask(&["definitions"]).contains("double"));
        assert_eq!(jobs.result("a").0, "aa");
    }
    assert_eq!(jobs.result("a").0, "aa", "remembered without a worker");
    assert_eq!(jobs.runs(), 1);
    jobs.program("double", "#!/bin/sh\necho >> \"$RUNS\"\nsed 's/.*/&&&/'\n");
    let _worker = jobs.worker("double", "0", &[]);
    jobs.until("the new code is known", |jobs| {
        jobs.ask(&["definitions", "--json"]).contains("\"idle_workers\":1")
    });
    assert_eq!(jobs.result("a").0, "aaa");
    assert_eq!(jobs.runs(), 2);
}

#[test]
fn two_servers_do_not_share_a_file() {
    let jobs = Jobs::start();
    let data = text(jobs.folder.path().join("jobs.db"));
    let other = run(&["jobs", "serve", "--data", &data, "--listen", "127.0.0.1:0"]);
    assert!(!other.status.success());
    assert!(other.stderr.contains("in use by another process"), "{}", other.stderr);
    let line = run(&["jobs", "list", "--server", "127.0.0.1:9"]).failed_with_a_line();
    assert!(line.contains("start a server with: afterimage jobs serve"), "{line}");
}
