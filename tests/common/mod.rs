//! Helpers for the real binary: services as child processes, commands run to their end, and the two
//! ways to talk to a service.
//!
//! Nothing here outlives its test: a child is killed, by its process id, when its guard is dropped,
//! and everything that waits has a limit.

// Each test file uses a part of this.
#![allow(dead_code)]

pub(crate) mod load;
pub(crate) mod talk;

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_classifier::{Metadata, Model};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine; what takes longer hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// How often something is looked at that is waited for.
const TICK: Duration = Duration::from_millis(5);

/// A command of the binary, with none of this shell's settings.
fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_afterimage"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("AFTERIMAGE_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A service in a process of its own. Dropped, it is killed; when its test fails, its log is
/// printed.
pub(crate) struct Running {
    args: Vec<String>,
    addr: SocketAddr,
    child: Child,
    log: Log,
    /// Reads the log, until the process has ended.
    reader: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a service on a free port and waits for the line that says which.
    pub(crate) fn start(args: &[&str]) -> Running {
        Running::start_with_env(args, &[])
    }

    /// The same with environment variables.
    pub(crate) fn start_with_env(args: &[&str], env: &[(&str, &str)]) -> Running {
        let listen = ["--listen", "127.0.0.1:0"];
        let given =
            args.contains(&"--listen") || env.iter().any(|(name, _)| name.ends_with("LISTEN"));
        // Tests that run at once would share the page's default address.
        let no_page = ["--http", "off"];
        // Of `jobs serve` and others, `serve` is the second word.
        let is_serve =
            args.contains(&"serve") && !args.contains(&"jobs") && !args.contains(&"stream");
        let wants_none = is_serve && !args.contains(&"--http");
        let listen = listen.iter().filter(|_| !given);
        let no_page = no_page.iter().filter(|_| wants_none);
        let args: Vec<&str> = args.iter().chain(listen).chain(no_page).copied().collect();
        Running::try_start(&args, env).unwrap_or_else(|log| panic!("{args:?} ended:\n{log}"))
    }

    /// Starts a service as systemd does with a socket unit: with `socket` as its file descriptor 3.
    pub(crate) fn start_with_socket(args: &[&str], socket: TcpListener) -> Running {
        let binary = command(args);
        let mut shell = Command::new("bash");
        shell.arg("-c").arg(r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_PID=$$ exec "$@""#);
        shell.arg("bash").arg(binary.get_program()).args(binary.get_args());
        for (name, value) in binary.get_envs() {
            assert!(value.is_none());
            shell.env_remove(name);
        }
        shell.stdin(OwnedFd::from(socket)).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::spawn(shell, args).unwrap_or_else(|log| panic!("{args:?} ended:\n{log}"))
    }

    /// The same where no file may have more than so many KiB. Writes beyond fail.
    pub(crate) fn start_with_file_limit(args: &[&str], kib: u32) -> Running {
        let args = [args, &["--listen", "127.0.0.1:0"]].concat();
        let mut limited = Command::new("dash");
        // Blocks of 512 bytes.
        let blocks = 2 * kib;
        limited.arg("-c").arg(format!("ulimit -f {blocks}; exec \"$0\" \"$@\""));
        let plain = command(&args);
        limited.arg(plain.get_program()).args(plain.get_args());
        limited.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Running::spawn(limited, &args).unwrap_or_else(|log| panic!("{args:?} ended:\n{log}"))
    }

    fn try_start(args: &[&str], env: &[(&str, &str)]) -> Result<Running, String> {
        let mut command = command(args);
        command.envs(env.iter().copied());
        Running::spawn(command, args)
    }

    fn spawn(mut command: Command, args: &[&str]) -> Result<Running, String> {
        let mut child = command.spawn().expect("the binary starts");
        let log = Log::default();
        let reader = Some(log.follow(child.stderr.take().expect("it is piped")));
        let stdout = child.stdout.take().expect("it is piped");
        // Until its address is known, and ever after, the guard owns the child.
        let addr = SocketAddr::from(([127, 0, 0, 1], 0));
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        let mut running = Running { args, addr, child, log, reader };
        match running.first_line(stdout) {
            Some(line) => {
                let addr = line.trim_end().rsplit_once(" listening on ").map(|(_, addr)| addr);
                // A gateway prints the URL of its page.
                let host =
                    |addr: &str| Some(addr.strip_prefix("http://")?.strip_suffix('/')?.to_owned());
                let addr = addr.map(|addr| host(addr).unwrap_or_else(|| addr.to_owned()));
                let addr = addr.and_then(|addr| addr.parse().ok());
                running.addr = addr.unwrap_or_else(|| panic!("no address in {line:?}"));
                Ok(running)
            }
            None => {
                let _ = running.wait();
                Err(running.log())
            }
        }
    }

    /// The first line of its standard output, or `None` when that ends without one.
    fn first_line(&self, stdout: impl Read + Send + 'static) -> Option<String> {
        let (sender, receiver) = std::sync::mpsc::channel();
        let log = self.log.clone();
        std::thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            let mut line = String::new();
            let read = stdout.read_line(&mut line).is_ok_and(|len| len > 0);
            let _ = sender.send(read.then_some(line));
            log.drain(stdout);
        });
        receiver.recv_timeout(PATIENCE).expect("the line that says where it listens, in time")
    }

    /// The address that it has printed after these words, ended by a slash.
    pub(crate) fn printed_address(&self, words: &str) -> SocketAddr {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            let after = log.split_once(words).map(|(_, after)| after);
            if let Some((address, _)) = after.and_then(|after| after.split_once('/')) {
                return address.parse().unwrap_or_else(|_| panic!("no address: {address:?}"));
            }
            assert!(Instant::now() < deadline, "no {words:?}:\n{log}");
            std::thread::sleep(TICK);
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The same as a text for another's flag.
    pub(crate) fn place(&self) -> String {
        self.addr.to_string()
    }

    /// Ends it as a crash would (SIGKILL).
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a signal can be sent");
        self.wait();
    }

    /// Makes it hang (SIGSTOP), and returns when not one of its threads runs any more.
    pub(crate) fn hang(&self) {
        self.signal(Signal::STOP);
        let pid = Pid::from_child(&self.child);
        let stopped = waitpid(Some(pid), WaitOptions::UNTRACED).expect("a child can be waited for");
        assert!(stopped.is_some_and(|(_, status)| status.stopped()), "{:?} ended", self.args);
    }

    /// Lets it go on after [`Running::hang`].
    pub(crate) fn go_on(&self) {
        self.signal(Signal::CONT);
    }

    /// Sends it a signal: SIGTERM or SIGINT, to end.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("a signal can be sent");
    }

    /// Waits for its end, and fails when that does not come. Then its log is whole.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                if let Some(reader) = self.reader.take() {
                    reader.join().expect("a reader does not panic");
                }
                return status;
            }
            assert!(Instant::now() < deadline, "{:?} does not end", self.args);
            std::thread::sleep(TICK);
        }
    }

    /// Starts it again, on the port that it had.
    pub(crate) fn restart(&mut self) {
        let args: Vec<String> = self.args.clone();
        self.restart_as(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Starts it again, on the port that it had, with other flags.
    pub(crate) fn restart_as(&mut self, args: &[&str]) {
        *self = self.successor(args);
    }

    /// Starts another one on its port as soon as that is free: at its end, or when it drains.
    pub(crate) fn successor(&self, args: &[&str]) -> Running {
        let listen = self.place();
        let mut args = args.to_vec();
        match args.iter().position(|&arg| arg == "--listen") {
            None => args.extend(["--listen", &listen]),
            Some(at) => args[at + 1] = &listen,
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Running::try_start(&args, &[]) {
                Ok(running) => return running,
                Err(log) if log.contains("in use") && Instant::now() < deadline => {
                    std::thread::sleep(TICK);
                }
                Err(log) => panic!("{args:?} does not start:\n{log}"),
            }
        }
    }

    /// Its standard error, as far as it has been read: all of it after its
    /// end.
    pub(crate) fn log(&self) -> String {
        self.log.text()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A process that has ended already is no error here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let mut text = format!("log of {:?} on {}:\n", self.args, self.addr);
            for line in self.log().lines() {
                let _ = writeln!(text, "    {line}");
            }
            eprint!("{text}");
        }
    }
}

/// The output of a process, as it arrives.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn follow(&self, source: impl Read + Send + 'static) -> JoinHandle<()> {
        let log = self.clone();
        std::thread::spawn(move || log.drain(source))
    }

    fn drain(&self, mut source: impl Read) {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = source.read(&mut bytes) {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&bytes[..len]);
        }
    }

    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// Fails unless the command succeeded without warnings. Returns its output.
    pub(crate) fn succeeded(self) -> String {
        assert!(self.status.success(), "{self:#?}");
        self.stdout
    }

    /// Fails unless the command failed with exit code 1 and one line on standard error, which is
    /// the program's own; gives the line.
    pub(crate) fn failed_with_a_line(self) -> String {
        assert_eq!(self.status.code(), Some(1), "{self:#?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:#?}");
        assert!(self.stderr.starts_with("afterimage: "), "{self:#?}");
        assert!(self.stderr.len() < 400, "{self:#?}");
        self.stderr
    }
}

/// Runs a command to its end.
pub(crate) fn run(args: &[&str]) -> Done {
    run_with(args, |_| {})
}

/// Runs a command to its end, in a folder of its own or with an environment.
pub(crate) fn run_with(args: &[&str], prepare: impl FnOnce(&mut Command)) -> Done {
    let mut command = command(args);
    prepare(&mut command);
    let mut child = command.spawn().expect("the binary starts");
    let (stdout, stderr) = (Log::default(), Log::default());
    // Either may go elsewhere.
    let readers: Vec<JoinHandle<()>> = [
        child.stdout.take().map(|output| stdout.follow(output)),
        child.stderr.take().map(|output| stderr.follow(output)),
    ]
    .into_iter()
    .flatten()
    .collect();
    let deadline = Instant::now() + 2 * PATIENCE;
    let status = loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => break status,
            None if Instant::now() < deadline => std::thread::sleep(TICK),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                panic!("{args:?} does not end:\n{}{}", stdout.text(), stderr.text());
            }
        }
    };
    for reader in readers {
        reader.join().expect("a reader does not panic");
    }
    Done { status, stdout: stdout.text(), stderr: stderr.text() }
}

/// A folder for a test's files.
pub(crate) fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder can be made")
}

/// A file in a folder that its owner alone can read, and its path as a flag takes it.
pub(crate) fn file(folder: &TempDir, name: &str, bytes: impl AsRef<[u8]>) -> String {
    let path: PathBuf = folder.path().join(name);
    std::fs::write(&path, bytes).expect("a file can be written");
    let owners = PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(&path, owners).expect("its owner may do so");
    text(&path)
}

/// A path as a flag takes it.
pub(crate) fn text(path: impl AsRef<OsStr>) -> String {
    path.as_ref().to_str().expect("temporary paths are UTF-8").to_owned()
}

/// A model that answers every image otherwise than [`Model::raw`] does: the same machines, each
/// with the label of the next.
pub(crate) fn contrary_model() -> Model {
    let raw = Model::raw();
    let labels = raw.labels().iter().map(|label| (label + 1) % 10).collect();
    let (map, svm) = (raw.features().expect("it has"), raw.svm().expect("it has"));
    Model::new(map.clone(), svm.clone(), labels, Metadata::default())
        .expect("labels that stand once each, as before")
}

/// Drawn digits, and the answer of a model to each.
pub(crate) fn answered(seed: u64, count: usize, model: &Model) -> (Population, Vec<u16>) {
    let population = Population::drawn(seed, count);
    let label = |i| model.classify(population.image(i)).expect("digits are of the model's size");
    let labels = (0..count).map(label).collect();
    (population, labels)
}

/// Waits for something to come true.
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut is_true: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !is_true().await {
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} for this: {what}");
        tokio::time::sleep(TICK).await;
    }
}

/// Drives a page in a real browser (`tests/page/drive.py`), if Chromium and Python's `playwright`
/// are installed. With axe-core (`npm install axe-core` in `target/axe`) it also checks
/// accessibility.
pub(crate) fn drive_page(page: SocketAddr, image: &str) {
    const AXE: &str = "target/axe/node_modules/axe-core/axe.min.js";
    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !has("chromium", &["--version"]) || !has(&python, &["-c", "import playwright.sync_api"]) {
        println!("SKIPPED: the page in a browser: chromium or playwright is not installed");
        return;
    }
    let url = format!("http://{page}/");
    let mut script = vec!["tests/page/drive.py", "chromium", &url, image];
    match std::path::Path::new(AXE).exists() {
        true => script.push(AXE),
        false => println!("SKIPPED: accessibility of the page: axe-core is not installed"),
    }
    let output = Command::new(python).args(script).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    assert!(output.status.success() && text.contains("no foreign request"), "{text}");
    println!("{text}");
}
