//! A cluster of three, with a replica for one of them.

use std::fmt::Write;

use afterimage_wire::Client;
use afterimage_wire::proto::message::Origin;

use crate::node::{Node, installed};
use crate::{ask, memo, until};

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
async fn a_cluster_of_three_remembers_across_its_slots() {
    if !installed("the test of a Redis cluster") {
        return;
    }
    let nodes = cluster().await;
    let client = memo_of(&nodes).await;
    until("all is remembered", async || ask(&client, 0..200).await == 200).await;
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
    until("all is remembered on the way", async || ask(client, 0..250).await == 250).await;
    assert_eq!(nodes[0].keys(), before, "new keys go where their slots go");
    let all = nodes.iter().map(Node::keys).sum::<usize>();
    assert_eq!(all, 250, "no key is in two places");

    nodes[0].script("flushall\n");
    for node in nodes {
        node.script(&script("node", &to));
    }
    until("all is remembered at the new place", async || ask(client, 0..250).await == 250).await;
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
    until("all is remembered", async || ask(&client, 0..200).await == 200).await;
    until("the replica has its share", async || {
        let share = nodes[0].keys();
        share > 20 && replica.keys() == share
    })
    .await;

    nodes[0].kill();
    // `ask` fails at an error or a wrong label, from the first request on.
    let remembered = ask(&client, 0..200).await;
    assert!(remembered < 200, "a third of the answers is out of reach at first");
    until("the replica has taken over", async || {
        replica.cli(&["info", "replication"]).contains("role:master")
    })
    .await;
    until("all is remembered", async || ask(&client, 0..200).await == 200).await;
    until("and so is what is new", async || ask(&client, 200..250).await == 50).await;
}
