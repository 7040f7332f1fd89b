//! Records: the reports of a measurement with date, command, commit and machine, as files.
//!
//! A record is one JSON file in `bench/records`, named after its date and what it is about. Its
//! fields are those of [`Record`]. Quote ratios from one record; an absolute figure from a shared
//! machine means little.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use afterimage_core::file;
use serde::{Deserialize, Serialize};

use crate::address::redacted_command;
use crate::report::Report;

/// The version of the format. It grows when a field changes its meaning or is removed.
pub const FORMAT: u32 = 1;

/// The largest record that is read.
const MAX_RECORD_BYTES: u64 = 1 << 30;

/// Runs of one measurement, and the details to repeat it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// [`FORMAT`].
    pub format: u32,
    /// Its name, part of the file name.
    pub name: String,
    /// The date in UTC: `2026-11-21T06:00:00Z`.
    pub date: String,
    /// The command line that made it, without secrets.
    pub command: Vec<String>,
    /// The state of the code.
    pub commit: Commit,
    /// The machine.
    pub machine: Machine,
    /// The runs, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Other figures by name, such as ratios of runs.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// The printed output, line by line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub text: Vec<String>,
}

/// One run of a record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Its name within the record.
    pub name: String,
    /// Its report.
    pub report: Report,
}

/// The state of the working copy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The commit's hash; `None` outside of a repository.
    pub hash: Option<String>,
    /// Whether tracked files were changed since. Such a record cannot be repeated exactly.
    pub changed: Option<bool>,
}

/// The machine, as the system describes it; `None` for unknown values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The processor's model name.
    pub cpu: Option<String>,
    /// CPUs that this process may use.
    pub cpus: Option<usize>,
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// The kernel's name and version.
    pub kernel: Option<String>,
    /// The load average of the minute before. Above 0, other work may have disturbed the figures.
    pub load_before: Option<f64>,
}

impl Record {
    /// A record of these runs by this process, now. Asks git about the working copy at
    /// `repository`.
    pub fn new(name: &str, repository: &Path, machine: Machine, runs: Vec<Run>) -> Self {
        Record {
            format: FORMAT,
            name: name.to_owned(),
            date: utc(SystemTime::now()),
            command: redacted_command(std::env::args()),
            commit: Commit::of(repository),
            machine,
            runs,
            figures: BTreeMap::new(),
            text: Vec::new(),
        }
    }

    /// Writes the record into a new file in `directory`, and returns the path.
    ///
    /// # Errors
    /// Errors of the file system.
    pub fn write(&self, directory: &Path) -> io::Result<PathBuf> {
        fs::create_dir_all(directory)?;
        let json = serde_json::to_string_pretty(self)?;
        let day = self.date.get(..10).unwrap_or(&self.date);
        let name: String = self
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .collect();
        let mut number = 1;
        loop {
            let suffix = if number == 1 { String::new() } else { format!("-{number}") };
            let path = directory.join(format!("{day}-{name}{suffix}.json"));
            match File::create_new(&path) {
                Ok(mut file) => {
                    if let Err(error) = writeln!(file, "{json}") {
                        // A part of a record cannot be read. If it stays, the error tells of it.
                        let _ = fs::remove_file(&path);
                        return Err(error);
                    }
                    return Ok(path);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads a record back. Histograms are not in it.
    ///
    /// # Errors
    /// Errors of the file system; `InvalidData` when the file is not a record of this format.
    pub fn read(path: &Path) -> io::Result<Self> {
        let record: Record =
            serde_json::from_slice(&file::read(path, MAX_RECORD_BYTES)?).map_err(|error| {
                let text = format!("it is not a record of `afterimage bench`: {error}");
                io::Error::new(io::ErrorKind::InvalidData, text)
            })?;
        if record.format != FORMAT {
            let (path, format) = (path.display(), record.format);
            let text = format!("{path} has format {format}; this version reads {FORMAT}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(record)
    }
}

impl Commit {
    /// The commit that the working copy at `repository` stands on.
    pub fn of(repository: &Path) -> Self {
        let git = |arguments: &[&str]| {
            let output =
                Command::new("git").arg("-C").arg(repository).args(arguments).output().ok()?;
            let text = String::from_utf8(output.stdout).ok()?;
            output.status.success().then(|| text.trim().to_owned())
        };
        Commit {
            hash: git(&["rev-parse", "HEAD"]),
            changed: git(&["status", "--porcelain", "--untracked-files=no"])
                .map(|changes| !changes.is_empty()),
        }
    }
}

impl Machine {
    /// This machine. Call it before the runs, which would add to the load.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).ok();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        Machine {
            cpu: read("/proc/cpuinfo").and_then(|text| field(&text, "model name")),
            // All there are: this process may be pinned to one of them.
            cpus: read("/proc/cpuinfo")
                .map(|text| text.lines().filter(|line| line.starts_with("processor")).count())
                .filter(|&cpus| cpus > 0)
                .or_else(|| std::thread::available_parallelism().ok().map(usize::from)),
            memory: read("/proc/meminfo")
                .and_then(|text| field(&text, "MemTotal"))
                .and_then(|total| total.split(' ').next()?.parse::<u64>().ok())
                .map(|kib| kib * 1024),
            kernel: read("/proc/sys/kernel/osrelease")
                .map(|release| format!("{} {}", std::env::consts::OS, release.trim())),
            load_before: read("/proc/loadavg")
                .and_then(|text| text.split(' ').next()?.parse().ok()),
        }
    }
}

/// A moment in UTC, by the Gregorian calendar, as RFC 3339 writes it.
fn utc(moment: SystemTime) -> String {
    let seconds = moment.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (mut days, second) = (seconds / 86_400, seconds % 86_400);
    let mut year = 1970;
    let leap = |year: u64| {
        (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
    };
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    let (day, hour, minute) = (days + 1, second / 3600, second / 60 % 60);
    let second = second % 60;
    format!("{year}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn dates_follow_the_calendar() {
        let at = |seconds| utc(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_709_251_199), "2024-02-29T23:59:59Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }

    #[test]
    fn a_record_says_what_was_measured_and_never_overwrites_another() {
        let directory = tempfile::tempdir().unwrap();
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let record = Record::new("Cache, hot", here, Machine::here(), Vec::new());
        let (first, second) =
            (record.write(directory.path()).unwrap(), record.write(directory.path()).unwrap());
        assert_ne!(first, second);
        assert!(first.to_string_lossy().ends_with("-cache--hot.json"), "{first:?}");
        let read = Record::read(&second).unwrap();
        assert_eq!((read.name, read.date), (record.name, record.date));
        assert_eq!((read.machine, read.commit), (record.machine, record.commit));
        assert!(!read.command.is_empty());
    }

    #[test]
    fn there_is_no_commit_outside_of_a_repository() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(Commit::of(directory.path()), Commit::default());
    }

    #[test]
    fn refuses_a_record_of_another_format() {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path();
        let record = Record { format: 99, ..Record::new("x", here, Machine::default(), vec![]) };
        let path = record.write(here).unwrap();
        let error = Record::read(&path).unwrap_err();
        assert!(error.to_string().contains("format 99"), "{error}");
    }
}
