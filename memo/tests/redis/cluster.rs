//! A cluster of three with a replica for one of them, and servers with mutual TLS only.

use std::fmt::Write;
use std::process::Command;

use afterimage_wire::Client;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::tls::ClientFiles;

use crate::node::{Node, Pki, installed, installed_with_tls};
use crate::{ask, memo, memo_with, until};

/// Three nodes that share the slots.
async fn cluster() -> Vec<Node> {
    let nodes: Vec<Node> = (0..3).map(|_| Node::start_for_cluster()).collect();
    form_cluster(&nodes).await;
    nodes
}

/// Makes these nodes one cluster.
pub(crate) async fn form_cluster(nodes: &[Node]) {
    for node in nodes {
        node.until_up().await;
    }
    let addrs: Vec<String> = nodes.iter().map(Node::addr).collect();
    let mut create = vec!["--cluster", "create"];
    create.extend(addrs.iter().map(String::as_str));
    create.push("--cluster-yes");
    nodes[0].cli(&create);
    until("the cluster is formed", async || nodes.iter().all(is_formed)).await;
}

fn is_formed(node: &Node) -> bool {
    node.cli(&["cluster", "info"]).contains("cluster_state:ok")
}

async fn memo_of(nodes: &[Node]) -> Client {
    let addrs: Vec<String> = nodes.iter().map(Node::addr).collect();
    memo(&format!("redis+cluster://{}", addrs.join(","))).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_of_three_stores_across_its_slots() {
    if !installed("the test of a Redis cluster") {
        return;
    }
    let nodes = cluster().await;
    let client = memo_of(&nodes).await;
    until("all answers are stored", async || ask(&client, 0..200).await == 200).await;
    let sizes: Vec<usize> = nodes.iter().map(Node::keys).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");

    // Many lookups at once, over all slots.
    let calls: Vec<_> = (0..200)
        .map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[i, 1, 2, 3]).await.unwrap() })
        })
        .collect();
    for (i, call) in calls.into_iter().enumerate() {
        let label = call.await.unwrap();
        assert_eq!((label.label, label.origin), (i as u16, Origin::Hit));
    }

    slots_move(&nodes, &client).await;
}

/// The slots of the first node move to the second. First each slot is in migration (`ASK`), then it
/// has moved (`MOVED`).
async fn slots_move(nodes: &[Node], client: &Client) {
    let id = |node: &Node| node.cli(&["cluster", "myid"]).trim().to_owned();
    let (from, to) = (id(&nodes[0]), id(&nodes[1]));
    let slots = slots_of(&nodes[0]);
    assert!(slots.clone().count() > 5000, "a third of all slots");
    let script = |state: &str, node: &str| {
        slots.clone().fold(String::new(), |mut script, slot| {
            let _ = writeln!(script, "cluster setslot {slot} {state} {node}");
            script
        })
    };
    let before = nodes[0].keys();
    nodes[1].script(&script("importing", &from));
    nodes[0].script(&script("migrating", &to));
    // The first node still serves the keys that it has. The second node serves all others of these
    // slots from now on.
    until("all answers are found during the move", async || ask(client, 0..250).await == 250).await;
    assert_eq!(nodes[0].keys(), before, "new keys go where their slots go");
    let all = nodes.iter().map(Node::keys).sum::<usize>();
    assert_eq!(all, 250, "no key is in two places");

    nodes[0].script("flushall\n");
    for node in nodes {
        node.script(&script("node", &to));
    }
    until("all answers are found after the move", async || ask(client, 0..250).await == 250).await;
    // (The first node, left without slots, makes itself a replica.)
    assert_eq!(nodes[1].keys() + nodes[2].keys(), 250);
}

/// The slots that a node owns.
fn slots_of(node: &Node) -> std::ops::RangeInclusive<u32> {
    let nodes = node.cli(&["cluster", "nodes"]);
    let own = nodes.lines().find(|line| line.contains("myself")).unwrap();
    let (first, last) = own.split_whitespace().last().unwrap().split_once('-').unwrap();
    first.parse().unwrap()..=last.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_go_on_while_a_node_dies_and_its_replica_takes_over() {
    if !installed("the test of a cluster's failover") {
        return;
    }
    let mut nodes = cluster().await;
    let replica = Node::start_for_cluster();
    replica.until_up().await;
    let of = nodes[0].cli(&["cluster", "myid"]).trim().to_owned();
    let add = ["--cluster", "add-node", &replica.addr(), &nodes[0].addr(), "--cluster-slave"];
    replica.cli(&[&add[..], &["--cluster-master-id", &of]].concat());
    let client = memo_of(&nodes).await;
    until("all answers are stored", async || ask(&client, 0..200).await == 200).await;
    until("the replica has its share", async || {
        let share = nodes[0].keys();
        share > 20 && replica.keys() == share
    })
    .await;

    nodes[0].kill();
    // `ask` fails at an error or a wrong label, from the first request on.
    let hits = ask(&client, 0..200).await;
    assert!(hits < 200, "a third of the answers is out of reach at first");
    until("the replica has taken over", async || {
        replica.cli(&["info", "replication"]).contains("role:master")
    })
    .await;
    until("all answers are stored", async || ask(&client, 0..200).await == 200).await;
    until("and so is what is new", async || ask(&client, 200..250).await == 50).await;
}

/// The authority of the server's certificate, and a client certificate from it.
fn known(pki: &Pki) -> ClientFiles {
    let [ca, cert, key] = [&pki.authority.cert, &pki.client.cert, &pki.client.key];
    ClientFiles { ca: Some(ca.clone()), cert: Some(cert.clone()), key: Some(key.clone()) }
}

#[tokio::test]
async fn answers_are_stored_through_mutual_tls() {
    if !installed_with_tls("answers_are_stored_through_mutual_tls") {
        return;
    }
    let pki = Pki::new();
    let node = Node::start_with_tls(&pki, false);
    node.until_up().await;
    let url = format!("rediss://{}", node.addr());
    let client = memo_with(&url, known(&pki)).await;
    until("an answer is stored", async || ask(&client, 0..1).await > 0).await;
    // A client without a certificate is refused.
    let stranger = ClientFiles { cert: None, key: None, ..known(&pki) };
    let stranger = memo_with(&url, stranger).await;
    assert_eq!(ask(&stranger, 0..1).await, 0);
}

#[tokio::test]
async fn reloads_a_new_certificate_and_ignores_a_broken_one() {
    if !installed_with_tls("reloads_a_new_certificate_and_ignores_a_broken_one") {
        return;
    }
    let pki = Pki::new();
    let node = Node::start_with_tls(&pki, false);
    node.until_up().await;
    // A certificate that Redis does not accept, at first.
    let others = afterimage_testkit::pki::Authority::new(pki.folder.path(), "others");
    let own = others.issue("own", "memo");
    let files = ClientFiles {
        ca: Some(pki.authority.cert.clone()),
        cert: Some(own.cert.clone()),
        key: Some(own.key.clone()),
    };
    let client = memo_with(&format!("rediss://{}", node.addr()), files).await;
    assert_eq!(ask(&client, 0..20).await, 0);
    assert_eq!(node.keys(), 0);

    assert_eq!(pki.authority.issue("own", "memo").cert, own.cert);
    hang_up();
    until("the new one is used", async || ask(&client, 0..20).await == 20).await;
    // A working connection is replaced, too, because its certificate may have expired.
    let before = connections(&node);
    assert!(!before.is_empty());
    pki.authority.issue("own", "memo");
    hang_up();
    until("it is another connection", async || {
        ask(&client, 0..20).await;
        let now = connections(&node);
        !now.is_empty() && now.iter().all(|id| !before.contains(id))
    })
    .await;
    assert_eq!(ask(&client, 0..20).await, 20);
    std::fs::write(&own.cert, "broken").unwrap();
    hang_up();
    // No event marks a failed reload. The present connections continue.
    for _ in 0..20 {
        until("all answers are stored", async || ask(&client, 0..20).await == 20).await;
    }
}

/// The ids of a server's connections, except that of `redis-cli`.
fn connections(node: &Node) -> Vec<String> {
    let list = node.cli(&["client", "list"]);
    let others = list.lines().filter(|line| !line.contains("cmd=client"));
    others.filter_map(|line| line.split(' ').next().map(str::to_owned)).collect()
}

/// Sends SIGHUP to this process, which handles it since a memo runs.
fn hang_up() {
    let pid = std::process::id().to_string();
    assert!(Command::new("kill").args(["-HUP", &pid]).status().unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_with_mutual_tls_stores_across_its_slots() {
    if !installed_with_tls("a_cluster_with_mutual_tls_stores_across_its_slots") {
        return;
    }
    let pki = Pki::new();
    let nodes: Vec<Node> = (0..3).map(|_| Node::start_with_tls(&pki, true)).collect();
    form_cluster(&nodes).await;
    let addrs: Vec<String> = nodes.iter().map(Node::addr).collect();
    // One node is given; it names the others.
    let url = format!("rediss+cluster://{}", addrs[0]);
    let client = memo_with(&url, known(&pki)).await;
    until("all answers are stored", async || ask(&client, 0..200).await == 200).await;
    let sizes: Vec<usize> = nodes.iter().map(Node::keys).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");
    let stranger = ClientFiles { cert: None, key: None, ..known(&pki) };
    let stranger = memo_with(&url, stranger).await;
    assert_eq!(ask(&stranger, 0..20).await, 0);
}
