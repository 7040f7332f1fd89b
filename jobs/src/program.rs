//! Any program as a handler: input on standard input, output on standard output, progress on
//! standard error.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};

use crate::Code;
use crate::engine::MAX_BYTES;
use crate::job::Outcome;
use crate::worker::{Handler, Running, Task};

/// The exit code of a program that says: another attempt cannot succeed. It is `EX_DATAERR` of
/// `sysexits.h`.
const NO_RETRY: i32 = 65;

/// The time that a program has to end after SIGTERM.
const PATIENCE: Duration = Duration::from_secs(2);

/// A program that runs one job per process.
///
/// It gets the input on standard input, and the environment variables `JOB_ID`,
/// `JOB_DEFINITION` and `JOB_ATTEMPT`. With exit code 0, its standard output is the
/// result. With another one the attempt has failed; 65 says that a retry is in vain. A line on
/// standard error is progress, and the last one is the error.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
    code: Code,
}

impl Program {
    /// A program with arguments. A name without a slash is looked up in `PATH`.
    ///
    /// # Errors
    /// If it is not found or cannot be read.
    pub fn new(program: impl AsRef<Path>, args: Vec<OsString>) -> io::Result<Self> {
        let path = find(program.as_ref())?;
        let text = std::fs::read(&path)?;
        let parts: Vec<&[u8]> = args.iter().map(|arg| arg.as_encoded_bytes()).collect();
        let code = Code::of(&[&[&text[..]], &parts[..]].concat());
        Ok(Program { path, args, code })
    }

    /// The digest of the program's file and its arguments. Libraries that it loads and files that
    /// it reads are not part of it.
    #[must_use]
    pub fn code(&self) -> Code {
        self.code
    }
}

/// The file of a program.
fn find(program: &Path) -> io::Result<PathBuf> {
    if program.components().count() > 1 || program.is_absolute() {
        return std::fs::canonicalize(program);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|folder| folder.join(program));
    found.into_iter().find(|file| file.is_file()).ok_or_else(|| {
        let text = format!("{} is not in PATH; name a file with ./", program.display());
        io::Error::new(io::ErrorKind::NotFound, text)
    })
}

impl Handler for Program {
    fn run(&self, task: Task) -> Running {
        let mut command = Command::new(&self.path);
        command
            .args(&self.args)
            .env("JOB_ID", task.id.to_string())
            .env("JOB_DEFINITION", &*task.definition)
            .env("JOB_ATTEMPT", task.attempt.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        #[cfg(unix)]
        command.process_group(0);
        let path = self.path.clone();
        Box::pin(async move {
            match command.spawn() {
                Ok(child) => follow(child, task).await,
                Err(error) => failed(format!("cannot start {}: {error}", path.display()), true),
            }
        })
    }
}

fn failed(error: String, retry: bool) -> Outcome {
    Outcome::Failed { error, retry }
}

/// Feeds a program, reads its output, and waits for its end.
async fn follow(mut child: Child, task: Task) -> Outcome {
    let mut stdin = child.stdin.take().expect("it is piped");
    let stdout = child.stdout.take().expect("it is piped");
    let stderr = child.stderr.take().expect("it is piped");
    let feed = async {
        // A program may end without reading its input.
        let _ = stdin.write_all(&task.input).await;
        drop(stdin);
    };
    let collect = async {
        let mut output = Vec::new();
        let limit = MAX_BYTES as u64 + 1;
        stdout.take(limit).read_to_end(&mut output).await.map(|_| output)
    };
    let progress = async {
        let (mut lines, mut last) = (BufReader::new(stderr).split(b'\n'), Vec::new());
        while let Ok(Some(line)) = lines.next_segment().await {
            if !line.trim_ascii().is_empty() {
                last = line[..line.len().min(1024)].to_vec();
                task.report(last.clone());
            }
        }
        String::from_utf8_lossy(&last).trim().to_owned()
    };
    let ended = {
        let whole = async { tokio::join!(feed, collect, progress) };
        tokio::select! {
            ended = whole => Some(ended),
            () = task.stop.cancelled() => None,
            () = tokio::time::sleep(task.deadline) => None,
        }
    };
    let Some(((), output, last)) = ended else {
        end(&mut child).await;
        return failed("stopped by the worker".to_owned(), true);
    };
    let output = match output {
        Ok(output) if output.len() > MAX_BYTES => {
            end(&mut child).await;
            return failed(format!("the result has more than {MAX_BYTES} bytes, the limit"), false);
        }
        Ok(output) => output,
        Err(error) => return failed(format!("cannot read the result: {error}"), true),
    };
    match child.wait().await {
        Ok(status) if status.success() => Outcome::Succeeded(output.into()),
        Ok(status) => {
            let error = if last.is_empty() { status.to_string() } else { last };
            failed(error, status.code() != Some(NO_RETRY))
        }
        Err(error) => failed(format!("cannot wait for the program: {error}"), true),
    }
}

/// Ends a program and its children: SIGTERM first, SIGKILL after a pause.
async fn end(child: &mut Child) {
    signal(child, Signal::Terminate);
    if tokio::time::timeout(PATIENCE, child.wait()).await.is_err() {
        signal(child, Signal::Kill);
        let _ = child.kill().await;
    }
}

enum Signal {
    Terminate,
    Kill,
}

#[cfg(unix)]
fn signal(child: &Child, signal: Signal) {
    let group = child.id().and_then(|id| rustix::process::Pid::from_raw(id.cast_signed()));
    let signal = match signal {
        Signal::Terminate => rustix::process::Signal::TERM,
        Signal::Kill => rustix::process::Signal::KILL,
    };
    if let Some(group) = group {
        let _ = rustix::process::kill_process_group(group, signal);
    }
}

#[cfg(not(unix))]
fn signal(_: &Child, _: Signal) {}
