//! Redis servers, each killed when its test ends.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};

use crate::until;
use afterimage_testkit::pki::{Authority, Issued};

/// A server, killed when it is dropped.
pub(crate) struct Node {
    child: Child,
    pub(crate) port: u16,
    folder: tempfile::TempDir,
    flags: Vec<String>,
    /// The arguments that `redis-cli` needs to log in.
    cli: Vec<String>,
}

/// The settings of a cluster's node. The time after which a silent node counts as failed is short,
/// so that its replica takes over soon, and long enough for a busy machine.
const CLUSTER: &[&str] = &[
    "--cluster-enabled",
    "yes",
    "--cluster-config-file",
    "nodes.conf",
    "--cluster-node-timeout",
    "1000",
    "--repl-diskless-sync-delay",
    "0",
];

impl Node {
    pub(crate) fn start() -> Node {
        Node::start_with(&["--repl-diskless-sync-delay", "0"])
    }

    pub(crate) fn start_for_cluster() -> Node {
        Node::start_with(CLUSTER)
    }

    pub(crate) fn start_with(flags: &[&str]) -> Node {
        let port = free_port();
        let port_flags = ["--port", &port.to_string()];
        Node::start_at(port, &[&port_flags, flags].concat(), Vec::new())
    }

    /// A server with mutual TLS only, for clients and for the other nodes of a cluster.
    pub(crate) fn start_with_tls(pki: &Pki, for_cluster: bool) -> Node {
        let Pki { authority, server, client, .. } = pki;
        let [ca, cert, key, client_cert, client_key] =
            [&authority.cert, &server.cert, &server.key, &client.cert, &client.key]
                .map(|path| path.to_str().unwrap());
        let port = free_port();
        let mut flags = vec!["--port", "0", "--tls-auth-clients", "yes"];
        let tls_port = port.to_string();
        flags.extend(["--tls-port", &tls_port, "--tls-ca-cert-file", ca]);
        flags.extend(["--tls-cert-file", cert, "--tls-key-file", key]);
        if for_cluster {
            flags.extend(["--tls-cluster", "yes", "--tls-replication", "yes"]);
            flags.extend(CLUSTER);
        }
        let cli = ["--tls", "--cacert", ca, "--cert", client_cert, "--key", client_key];
        Node::start_at(port, &flags, cli.map(str::to_owned).into())
    }

    fn start_at(port: u16, flags: &[&str], cli: Vec<String>) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let flags: Vec<String> = flags.iter().map(|&flag| flag.to_owned()).collect();
        Node { child: spawn(&folder, &flags), port, folder, flags, cli }
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Stops the server (SIGSTOP) or continues it (SIGCONT).
    pub(crate) fn signal(&self, name: &str) {
        let mut command = Command::new("kill");
        let done = command.args([&format!("-{name}"), &self.child.id().to_string()]).status();
        assert!(done.unwrap().success());
    }

    pub(crate) fn restart(&mut self) {
        self.child = spawn(&self.folder, &self.flags);
    }

    pub(crate) fn addr(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The output of `redis-cli`.
    pub(crate) fn cli(&self, args: &[&str]) -> String {
        let output = self.redis_cli().args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Lets `redis-cli` execute many commands, one on each line.
    pub(crate) fn script(&self, commands: &str) {
        let mut command = self.redis_cli();
        command.stdin(Stdio::piped()).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
        assert!(child.wait().unwrap().success());
    }

    fn redis_cli(&self) -> Command {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string()]).args(&self.cli);
        command
    }

    /// The number of keys.
    pub(crate) fn keys(&self) -> usize {
        self.cli(&["dbsize"]).trim().parse().unwrap_or(0)
    }

    /// Waits until the server accepts connections.
    pub(crate) async fn until_it_listens(&self) {
        until("redis listens", async || TcpStream::connect(self.addr()).is_ok()).await;
    }

    pub(crate) async fn until_up(&self) {
        until("redis answers", async || self.cli(&["ping"]).trim() == "PONG").await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(folder: &tempfile::TempDir, flags: &[String]) -> Child {
    let mut command = Command::new("redis-server");
    command.args(["--bind", "127.0.0.1", "--save", ""]);
    command.arg("--dir").arg(folder.path()).args(flags);
    command.stdout(Stdio::null()).spawn().unwrap()
}

/// A certificate authority, and the certificates that it has signed.
pub(crate) struct Pki {
    pub(crate) authority: Authority,
    pub(crate) server: Issued,
    pub(crate) client: Issued,
    pub(crate) folder: tempfile::TempDir,
}

impl Pki {
    pub(crate) fn new() -> Pki {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new(folder.path(), "ca");
        let server = authority.issue("server", "127.0.0.1");
        let client = authority.issue("client", "memo");
        Pki { authority, server, client, folder }
    }
}

/// A port that is free now, low enough that a cluster's bus port, 10,000 above, exists.
pub(crate) fn free_port() -> u16 {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        if port < 55_000 && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

/// Whether the installed Redis supports TLS, which is an option of its build.
pub(crate) fn installed_with_tls(test: &str) -> bool {
    if !installed(test) {
        return false;
    }
    // A server with TLS accepts the flag, or ends with another error about it.
    let refused =
        Command::new("redis-server").args(["--port", "0", "--tls-port"]).output().unwrap();
    let found = !String::from_utf8_lossy(&refused.stdout).contains("Bad directive");
    if !found {
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: this redis-server has no TLS");
    }
    found
}

/// Whether a test can run. Prints a skip past the test harness, which hides the output of passing
/// tests.
pub(crate) fn installed(test: &str) -> bool {
    let found = ["redis-server", "redis-cli"].iter().all(|program| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    });
    if !found {
        let why = "redis-server and redis-cli are not installed";
        let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
    }
    found
}
