//! Redis as the store: real servers, a single one and a cluster of three, started here and ended by
//! their pid. Skipped, and said so, where `redis-server` is not installed.

#![allow(clippy::unwrap_used)]

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_memo::key::ModelId;
use afterimage_memo::store::{Redis, RemoteOptions, RemoteStore};
use afterimage_memo::upstream::{Answer, Job};
use afterimage_memo::{Classifier, MemoOptions, MemoService, Secret, Store};
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Shape, stats::Stats};
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::{Client, ClientOptions};

const PATIENCE: Duration = Duration::from_secs(60);

/// A server of our own, killed when the test ends.
struct Node {
    child: Child,
    port: u16,
    folder: tempfile::TempDir,
    cluster: bool,
}

impl Node {
    fn start(cluster: bool) -> Node {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        Node { child: Node::spawn(port, &folder, cluster), port, folder, cluster }
    }

    fn spawn(port: u16, folder: &tempfile::TempDir, cluster: bool) -> Child {
        let mut command = Command::new("redis-server");
        command.args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.arg("--dir").arg(folder.path());
        if cluster {
            command.args(["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]);
        }
        command.stdout(Stdio::null()).spawn().unwrap()
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = Node::spawn(self.port, &self.folder, self.cluster);
    }

    fn cli(&self, args: &[&str]) -> String {
        let mut command = Command::new("redis-cli");
        let output = command.args(["-p", &self.port.to_string()]).args(args).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    async fn until_up(&self) {
        until("redis answers", async || self.cli(&["ping"]).trim() == "PONG").await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that is free now, low enough that a cluster's bus port, 10,000 above, exists.
fn free_port() -> u16 {
    loop {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        if port < 55_000 && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

/// Whether the test can run; says so when it cannot.
fn installed(test: &str) -> bool {
    let found = ["redis-server", "redis-cli"].iter().all(|program| {
        let run = Command::new(program).arg("--version").stdout(Stdio::null()).status();
        run.is_ok_and(|status| status.success())
    });
    if !found {
        eprintln!("SKIPPED {test}: redis-server and redis-cli are not installed");
    }
    found
}

/// Answers with the image's first byte.
struct FirstByte(Arc<ModelId>);

impl Classifier for FirstByte {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn classify(&self, jobs: Vec<Job>) {
        for Job { image, reply } in jobs {
            reply.send(Ok(Answer { label: image[0].into(), model: Arc::clone(&self.0) }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

async fn memo(url: &str) -> Client {
    let shape = Shape::new(&[4]).unwrap();
    let model = Arc::new(ModelId { digest: [1; 32], shape, classes: 256 });
    // A busy machine is not what these tests are about.
    let lookup_budget = Duration::from_millis(300);
    let options = RemoteOptions { lookup_budget, ..RemoteOptions::default() };
    let store = Store::Remote(RemoteStore::new(Redis::connect_lazy(url).unwrap(), options));
    let options = MemoOptions::new(Secret::new([7; 32]));
    let service = Arc::new(MemoService::new(store, FirstByte(model), options));
    let server = Server::bind("127.0.0.1:0", service, ServerOptions::default()).await.unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    Client::connect(addr, ClientOptions::new()).await.unwrap()
}

async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Asks about `count` images and gives how many of the answers were remembered.
async fn ask(client: &Client, count: u8) -> usize {
    let mut remembered = 0;
    for i in 0..count {
        let label = client.classify(&[i, 1, 2, 3]).await.unwrap();
        assert_eq!(label.class, u16::from(i));
        remembered += usize::from(label.origin == Origin::Memoized);
    }
    remembered
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_single_redis_remembers_is_missed_by_nobody_when_it_dies_and_used_again_when_it_is_back()
{
    if !installed("the test of a single Redis") {
        return;
    }
    let mut node = Node::start(false);
    node.until_up().await;
    let client = memo(&format!("redis://127.0.0.1:{}", node.port)).await;
    until("all is remembered", async || ask(&client, 100).await == 100).await;
    assert_eq!(node.cli(&["dbsize"]).trim(), "100");

    // What others write under our keys is a miss and put right.
    for key in node.cli(&["--raw", "keys", "*"]).split('\n').filter(|key| key.len() == 11).take(5) {
        node.cli(&["set", key, "a foreign value"]);
    }
    ask(&client, 100).await;
    until("all is remembered again", async || ask(&client, 100).await == 100).await;

    node.kill();
    assert_eq!(ask(&client, 100).await, 0);
    let start = Instant::now();
    ask(&client, 100).await;
    assert!(start.elapsed() < Duration::from_secs(10), "the breaker keeps requests from waiting");
    node.restart();
    until("it is used again", async || ask(&client, 20).await == 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_three_remembers_across_its_slots() {
    if !installed("the test of a Redis cluster") {
        return;
    }
    let nodes = [Node::start(true), Node::start(true), Node::start(true)];
    for node in &nodes {
        node.until_up().await;
    }
    let addrs: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)).collect();
    let mut create = vec!["--cluster", "create"];
    create.extend(addrs.iter().map(String::as_str));
    create.push("--cluster-yes");
    nodes[0].cli(&create);
    until("the cluster is formed", async || {
        nodes.iter().all(|node| node.cli(&["cluster", "info"]).contains("cluster_state:ok"))
    })
    .await;

    let client = memo(&format!("redis+cluster://{}", addrs.join(","))).await;
    until("all is remembered", async || ask(&client, 200).await == 200).await;
    let sizes: Vec<usize> =
        nodes.iter().map(|node| node.cli(&["dbsize"]).trim().parse().unwrap()).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");

    // Many at once, as a batch of lookups over all slots.
    let calls: Vec<_> = (0..200)
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[i, 1, 2, 3]).await.unwrap() })
        })
        .collect();
    for (i, call) in calls.into_iter().enumerate() {
        let label = call.await.unwrap();
        assert_eq!((label.class, label.origin), (i as u16, Origin::Memoized));
    }
}
