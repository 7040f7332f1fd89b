//! Warnings about a Redis that cannot be used: each names the cause, and none is repeated often.

use std::io::Write;
use std::net::TcpListener as StdListener;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use afterimage_memo::store::RedisOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::node::{Node, Pki, installed, installed_with_tls};
use crate::{ask, memo, memo_of, until};

/// The warnings of this test process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The memos' warnings that contain `part`.
fn warnings(part: &str) -> Vec<String> {
    static LOG: OnceLock<Log> = OnceLock::new();
    let log = LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        let logs = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_env_filter("off,afterimage_memo=warn")
            .with_writer(move || writer.clone());
        logs.init();
        log
    });
    let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    text.lines().filter(|line| line.contains(part)).map(str::to_owned).collect()
}

/// Runs a memo on the store at `url`, until a warning about it contains `cause`.
async fn warns(url: &str, server: &str, cause: &str) {
    warnings("");
    let client = memo(url).await;
    until(cause, async || {
        ask(&client, 0..2).await;
        let mut warnings = warnings(server);
        // Until the first attempt has failed, only the breaker has warned.
        warnings.retain(|line| line.contains("Redis does not"));
        let found = warnings.iter().any(|line| line.contains(cause));
        assert!(found || warnings.is_empty(), "{cause:?} is not in {warnings:?}");
        found
    })
    .await;
}

#[tokio::test]
async fn a_wrong_login_is_named_as_the_cause() {
    if !installed("a_wrong_login_is_named_as_the_cause") {
        return;
    }
    let node = Node::start_with(&["--requirepass", "hunter2"]);
    let (addr, port) = (node.addr(), node.port);
    node.until_it_listens().await;
    warns(&format!("redis://:wrong@{addr}"), &addr, "wrong user or password").await;
    drop(node);
    let node = Node::start_with(&["--requirepass", "hunter2"]);
    node.until_it_listens().await;
    assert_ne!(node.port, port);
    warns(&format!("redis://{}", node.addr()), &node.addr(), "requires a password").await;
    assert_eq!(warnings("hunter2").len() + warnings("wrong@").len(), 0);
}

#[tokio::test]
async fn a_password_file_gives_the_login() {
    if !installed("a_password_file_gives_the_login") {
        return;
    }
    let node = Node::start_with(&["--requirepass", "p@ss/#word"]);
    node.until_it_listens().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("password");
    std::fs::write(&file, "p@ss/#word\n").unwrap();
    let options = RedisOptions { password_file: Some(file), ..RedisOptions::default() };
    let client = memo_of(&format!("redis://{}", node.addr()), options).await;
    until("an answer is a hit", async || ask(&client, 0..1).await > 0).await;
}

#[tokio::test]
async fn a_missing_database_is_named_as_the_cause() {
    if !installed("a_missing_database_is_named_as_the_cause") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    warns(&format!("redis://{}/99", node.addr()), &node.addr(), "no database of this number").await;
}

#[tokio::test]
async fn tls_to_a_plain_port_is_named_as_the_cause() {
    if !installed("tls_to_a_plain_port_is_named_as_the_cause") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    warns(&format!("rediss://{}", node.addr()), &node.addr(), "write redis://").await;
}

#[tokio::test]
async fn a_plain_connection_to_a_tls_port_is_named_as_the_cause() {
    if !installed_with_tls("a_plain_connection_to_a_tls_port_is_named_as_the_cause") {
        return;
    }
    let pki = Pki::new();
    let node = Node::start_with_tls(&pki, false);
    node.until_up().await;
    warns(&format!("redis://{}", node.addr()), &node.addr(), "rediss://").await;
}

#[tokio::test]
async fn a_closed_port_is_named_as_the_cause() {
    // No server of a test listens below port 1024, or at these addresses.
    warns("redis://127.0.0.2:1", "127.0.0.2:1", "refused").await;
    warns("redis+cluster://127.0.0.3:1", "127.0.0.3:1", "refused").await;
}

#[tokio::test]
async fn a_silent_port_is_named_as_the_cause() {
    let silent = StdListener::bind("127.0.0.1:0").unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    warns(&format!("redis://{addr}"), &addr, "timed out").await;
}

#[tokio::test]
async fn an_unknown_host_is_named_as_the_cause() {
    warns("redis://no-such-host.invalid:1", "no-such-host.invalid", "look").await;
}

#[tokio::test]
async fn a_single_address_of_a_cluster_suggests_the_other_scheme() {
    if !installed("a_single_address_of_a_cluster_suggests_the_other_scheme") {
        return;
    }
    let nodes: Vec<Node> = (0..3).map(|_| Node::start_for_cluster()).collect();
    crate::cluster::form_cluster(&nodes).await;
    let addr = nodes[0].addr();
    let client = memo(&format!("redis://{addr}")).await;
    until("MOVED is explained", async || {
        ask(&client, 0..20).await;
        warnings(&addr).iter().any(|line| line.contains("redis+cluster://"))
    })
    .await;
    let node = Node::start();
    node.until_up().await;
    warns(&format!("redis+cluster://{}", node.addr()), &node.addr(), "write redis://").await;
}

#[tokio::test]
async fn an_error_text_cannot_forge_log_lines() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = stream.read(&mut bytes).await {
                    // Each command begins with an asterisk, and no argument here contains one.
                    for _ in bytes[..len].iter().filter(|&&byte| byte == b'*') {
                        let _ = stream.write_all(b"-ERR \x1b[31m\xe2\x80\xaefdp\r\n").await;
                    }
                }
            });
        }
    });
    warns(&format!("redis://{addr}"), &addr, r"\u{1b}[31m\u{202e}fdp").await;
}

#[tokio::test]
async fn a_store_that_stays_away_is_warned_of_rarely() {
    let addr = "127.0.0.4:1";
    let client = memo(&format!("redis+cluster://{addr}")).await;
    warnings("");
    for _ in 0..30 {
        ask(&client, 0..3).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let warnings = warnings(addr);
    let count = |part: &str| warnings.iter().filter(|line| line.contains(part)).count();
    // One of the store and one of the breaker.
    assert_eq!((count("Redis does not answer"), warnings.len()), (1, 2), "{warnings:?}");
}

#[tokio::test]
async fn a_cluster_that_goes_away_is_warned_of_rarely() {
    if !installed("a_cluster_that_goes_away_is_warned_of_rarely") {
        return;
    }
    let mut nodes: Vec<Node> = (0..3).map(|_| Node::start_for_cluster()).collect();
    crate::cluster::form_cluster(&nodes).await;
    let addrs: Vec<String> = nodes.iter().map(Node::addr).collect();
    let client = memo(&format!("redis+cluster://{}", addrs.join(","))).await;
    warnings("");
    until("an answer is a hit", async || ask(&client, 0..5).await == 5).await;
    let of_cluster = || warnings(&addrs[0]);
    let before = of_cluster().len();
    nodes.iter_mut().for_each(Node::kill);
    for _ in 0..30 {
        ask(&client, 0..3).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let warnings = of_cluster();
    let (causes, others): (Vec<_>, Vec<_>) =
        warnings[before..].iter().partition(|line| line.contains("Redis does not answer"));
    assert_eq!(causes.len(), 1, "{warnings:?}");
    let named = ["refused", "closed", "connection", "reset"];
    assert!(named.iter().any(|part| causes[0].contains(part)), "{causes:?}");
    // At most one of the breaker and one of the writes.
    assert!(others.len() <= 2, "{warnings:?}");
}
