//! A Redis that hangs, is slow, is missing or comes back: its cost, the time until it is used
//! again, and the warnings.
//!
//! ```text
//! REDIS_ROUNDS=20 cargo test -p afterimage-memo --test redis soon_after -- --nocapture
//! ```

use std::io::Write;
use std::net::TcpListener as StdListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use afterimage_memo::store::{RedisOptions, StoreOptions};
use afterimage_wire::Client;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::node::{Node, Pki, installed, installed_with_tls};
use crate::{ask, counter, memo, memo_of, memo_within, stats, until};

/// Sends requests until the breaker is open. Then checks that only a probe now and then waits for
/// the store.
pub(crate) async fn is_bypassed(client: &Client) {
    until("the breaker opens", async || {
        ask(client, 0..4).await;
        stats(client).await.get("store_breaker") == Some(&Value::Text("open".into()))
    })
    .await;
    let before = stats(client).await;
    let start = Instant::now();
    ask(client, 0..200).await;
    let elapsed = start.elapsed();
    let after = stats(client).await;
    let more = |name| after.counter_value(name) - before.counter_value(name);
    let (waited, bypassed) = (more("store_lookups"), more("store_lookups_bypassed"));
    assert_eq!(waited + bypassed, 200);
    // The probes: one at the start, and one after each pause.
    let probes = elapsed.div_duration_f64(StoreOptions::default().probe_every) as u64 + 1;
    assert!(waited <= probes, "{waited} of 200 requests waited, in {elapsed:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hung_redis_is_bypassed_and_used_again_soon() {
    if !installed("the test of a Redis that hangs") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    until("all answers are stored", async || ask(&client, 0..20).await == 20).await;
    node.signal("STOP");
    is_bypassed(&client).await;
    node.signal("CONT");
    until_back(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_redis_is_bypassed_until_it_is_fast_again() {
    if !installed("the test of a slow Redis") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    let delay_ms = Arc::new(AtomicU64::new(0));
    let port = slow_proxy(node.addr(), Arc::clone(&delay_ms)).await;
    let client = memo(&format!("redis://127.0.0.1:{port}")).await;
    until("all answers are stored", async || ask(&client, 0..20).await == 20).await;
    // Longer than the lookup budget, and shorter than the time after which the server counts as
    // dead.
    delay_ms.store(500, Ordering::SeqCst);
    is_bypassed(&client).await;
    delay_ms.store(0, Ordering::SeqCst);
    until_back(&client).await;
}

/// A port that forwards to the server at `addr` and delays its replies.
async fn slow_proxy(addr: String, delay_ms: Arc<AtomicU64>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&addr).await else { continue };
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (near.into_split(), far.into_split());
            let delay_ms = Arc::clone(&delay_ms);
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(len @ 1..) = from_server.read(&mut bytes).await {
                    let delay = Duration::from_millis(delay_ms.load(Ordering::SeqCst));
                    tokio::time::sleep(delay).await;
                    if to_client.write_all(&bytes[..len]).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_speaks_no_redis_costs_no_answer_and_soon_no_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = [0; 4096];
                while let Ok(1..) = stream.read(&mut bytes).await {
                    let _ = stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
                }
            });
        }
    });
    let client = memo(&format!("redis://127.0.0.1:{port}")).await;
    assert_eq!(ask(&client, 0..100).await, 0);
    is_bypassed(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_stored_inputs_at_once_are_as_many_hits() {
    const INPUTS: u32 = 10_000;
    if !installed("ten_thousand_stored_inputs_at_once_are_as_many_hits") {
        return;
    }
    let node = Node::start();
    node.until_up().await;
    // The defaults, or ten times that much time for a build without optimization.
    let mut limits = StoreOptions::default();
    if cfg!(debug_assertions) {
        limits.lookup_budget *= 10;
        limits.max_queue_wait *= 10;
    }
    let url = format!("redis://{}", node.addr());
    let client = memo_within(&url, RedisOptions::default(), limits).await;
    let burst = async || {
        let asked = (0..INPUTS).map(|number| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&number.to_le_bytes()).await.unwrap() })
        });
        let mut hits = 0;
        for (number, answer) in asked.collect::<Vec<_>>().into_iter().enumerate() {
            let answer = answer.await.unwrap();
            assert_eq!(answer.label, number as u16 % 256);
            hits += u32::from(answer.origin == Origin::Hit);
        }
        hits
    };
    until("the memo is connected", async || ask(&client, 200..202).await == 2).await;
    burst().await;
    until("all answers are stored", async || node.keys() >= INPUTS as usize).await;
    let before = stats(&client).await;
    assert_eq!(burst().await, INPUTS);
    let after = stats(&client).await;
    for name in ["store_breaker_opened", "store_lookups_failed"] {
        assert_eq!(after.counter_value(name), before.counter_value(name), "{name}");
    }
}

/// The longest allowed recovery without `REDIS_RECOVERY_MS`: the promised second for an optimized
/// build. A busy machine needs longer and sets the variable.
const RECOVERY_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });

/// The number of outages without `REDIS_ROUNDS`.
const ROUNDS: u32 = 3;

/// The shortest outage: the growing pause between attempts to connect has reached its limit.
const OUTAGE: Duration = Duration::from_millis(1500);

/// Each outage is longer by this time, so that servers come back at different moments of the pause.
const LONGER: Duration = Duration::from_millis(70);

/// A number from the environment.
fn number(name: &str) -> Option<u32> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?} and should be a number")))
}

/// The longest allowed recovery.
fn limit() -> Duration {
    number("REDIS_RECOVERY_MS").map_or(RECOVERY_LIMIT, |ms| Duration::from_millis(ms.into()))
}

/// Sends requests until one is a hit. Returns the time, which must be below the limit.
pub(crate) async fn until_back(client: &Client) -> Duration {
    let start = Instant::now();
    until("it is used again", async || ask(client, 0..1).await > 0).await;
    let took = start.elapsed();
    assert!(took < limit(), "it took {took:?} until it was used again");
    took
}

/// Sends requests during an outage: no request fails, and soon none waits.
async fn last(outage: Duration, client: &Client) {
    is_bypassed(client).await;
    let start = Instant::now();
    while start.elapsed() < outage {
        ask(client, 0..10).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Causes some outages of a server, and prints the recovery time of each.
async fn outages(
    what: &str,
    mut begin: impl FnMut(&mut Node),
    mut end: impl AsyncFnMut(&mut Node),
) {
    let mut node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    let mut took = Vec::new();
    for round in 0..number("REDIS_ROUNDS").unwrap_or(ROUNDS) {
        until("all answers are stored", async || ask(&client, 0..10).await == 10).await;
        begin(&mut node);
        last(OUTAGE + LONGER * round, &client).await;
        end(&mut node).await;
        took.push(until_back(&client).await);
    }
    took.sort_unstable();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    println!(
        "Redis {what} {} times: back after {median:.0?} (median), {longest:.0?} (longest)",
        took.len()
    );
    assert!(counter(&client, "store_breaker_opened").await >= took.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_was_killed_is_used_again_soon_after_it_listens() {
    if !installed("the test of recovery from a Redis that was killed") {
        return;
    }
    outages("killed", Node::kill, async |node: &mut Node| {
        node.restart();
        node.until_it_listens().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_hung_is_used_again_soon_after_it_goes_on() {
    if !installed("the test of recovery from a Redis that hangs") {
        return;
    }
    let stop = |node: &mut Node| node.signal("STOP");
    outages("stopped", stop, async |node: &mut Node| node.signal("CONT")).await;
}

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
