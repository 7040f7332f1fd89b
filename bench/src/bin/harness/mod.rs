//! Servers of a comparison as processes on CPU 0, and the figures found so far.

// Each program uses a part of it.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::{Plan, Report, run};

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// The results of a comparison so far, for people and for the record.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) runs: Vec<Run>,
    pub(crate) text: Vec<String>,
    pub(crate) figures: BTreeMap<String, f64>,
}

impl Findings {
    /// Prints a line, or several, and keeps it.
    pub(crate) fn say(&mut self, lines: &str) {
        println!("{lines}");
        self.text.extend(lines.split('\n').map(str::to_owned));
    }

    pub(crate) fn figure(&mut self, name: &str, value: f64) {
        self.figures.insert(name.to_owned(), value);
    }

    /// Writes all of it as a record into `folder`, and says where.
    pub(crate) fn record(
        self,
        name: &str,
        machine: Machine,
        command: &str,
        folder: &Path,
    ) -> Result<()> {
        let Findings { runs, text, figures } = self;
        let mut record = Record::new(name, Path::new("."), machine, runs);
        record.command = command.split(' ').map(str::to_owned).collect();
        (record.text, record.figures) = (text, figures);
        println!("recorded in {}", record.write(folder)?.display());
        Ok(())
    }
}

/// The run in the middle by throughput.
pub(crate) fn median(mut reports: Vec<Report>) -> Report {
    reports.sort_by(|a, b| a.throughput_per_s.total_cmp(&b.throughput_per_s));
    reports.swap_remove(reports.len() / 2)
}

/// How long a server may take until it listens: Python takes seconds to import its libraries.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, which ends with this value.
pub(crate) struct Process {
    process: Child,
    /// Where it listens.
    pub(crate) addr: SocketAddr,
    /// How it was started, for the record.
    pub(crate) command: String,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Process {
    /// Starts a program that says on its first line where it listens.
    pub(crate) fn telling(program: &Path, arguments: &[&str]) -> Result<Self> {
        let (mut command, shown) = on_cpu_0(&program.to_string_lossy(), arguments);
        let mut process = command.stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        if let Some(output) = process.stdout.take() {
            BufReader::new(output).read_line(&mut line)?;
        }
        let addr = line.trim().rsplit(' ').next().unwrap_or_default().parse();
        let addr = addr.map_err(|_| format!("{shown} says {line:?} and no address"))?;
        Ok(Process { process, addr, command: shown })
    }

    /// Starts a program with its port as the last two arguments: `flag` and a free port.
    /// `prepare` may set its environment and folder.
    pub(crate) fn told(
        program: &str,
        arguments: &[&str],
        flag: &str,
        prepare: impl FnOnce(&mut Command),
    ) -> Result<Self> {
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let port = addr.port().to_string();
        let (mut command, shown) = on_cpu_0(program, &[arguments, &[flag, &port]].concat());
        prepare(&mut command);
        let mut process = command.stdout(Stdio::null()).spawn()?;
        let until = Instant::now() + PATIENCE;
        while TcpStream::connect(addr).is_err() {
            if Instant::now() > until || process.try_wait()?.is_some() {
                let _ = process.kill();
                return Err(format!("{shown} does not listen").into());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(Process { process, addr, command: shown })
    }

    /// CPU time of all its threads so far.
    pub(crate) fn cpu_ns(&self) -> Result<u64> {
        let mut sum = 0;
        for thread in fs::read_dir(format!("/proc/{}/task", self.process.id()))? {
            let text = fs::read_to_string(thread?.path().join("schedstat"))?;
            sum += text.split(' ').next().unwrap_or_default().parse::<u64>()?;
        }
        Ok(sum)
    }

    /// Bytes that it has in memory.
    pub(crate) fn resident(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).ok_or("no VmRSS")?;
        Ok(kib.parse::<u64>()? * 1024)
    }
}

/// The command that runs this on the first CPU, and how it is shown.
fn on_cpu_0(program: &str, arguments: &[&str]) -> (Command, String) {
    let mut command = Command::new("taskset");
    command.args(["-c", "0", program]).args(arguments).stdin(Stdio::null());
    let name = program.rsplit('/').next().unwrap_or(program);
    (command, format!("{name} {}", arguments.join(" ")))
}

/// Redis without persistence and with one thread.
pub(crate) fn redis() -> Result<Process> {
    let quiet = ["--save", "", "--appendonly", "no", "--activerehashing", "no"];
    let one = ["--io-threads", "1", "--bind", "127.0.0.1"];
    Process::told("redis-server", &[&quiet[..], &one].concat(), "--port", |_| {})
}

/// A run without any fault.
pub(crate) fn checked(plan: &Plan) -> Result<Report> {
    let report = run(plan, &mut |_| {})?;
    match &report.problems()[..] {
        [] => Ok(report),
        problems => Err(format!("{}: {}", report.settings.addr, problems.join("; ")).into()),
    }
}
