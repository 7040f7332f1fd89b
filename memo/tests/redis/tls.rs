//! Redis servers with mutual TLS only: a single one and a cluster.

use std::process::Command;

use afterimage_wire::tls::ClientFiles;

use crate::cluster::form_cluster;
use crate::node::{Node, Pki, installed_with_tls};
use crate::{ask, memo_with, until};

/// The authority of the server's certificate, and a client certificate from it.
fn known(pki: &Pki) -> ClientFiles {
    let [ca, cert, key] = [&pki.authority.cert, &pki.client.cert, &pki.client.key];
    ClientFiles { ca: Some(ca.clone()), cert: Some(cert.clone()), key: Some(key.clone()) }
}

#[tokio::test]
async fn answers_are_remembered_through_mutual_tls() {
    if !installed_with_tls("answers_are_remembered_through_mutual_tls") {
        return;
    }
    let pki = Pki::new();
    let node = Node::start_with_tls(&pki, false);
    node.until_up().await;
    let url = format!("rediss://{}", node.addr());
    let client = memo_with(&url, known(&pki)).await;
    until("an answer is remembered", async || ask(&client, 0..1).await > 0).await;
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
        until("all is remembered", async || ask(&client, 0..20).await == 20).await;
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
    until("all is remembered", async || ask(&client, 0..200).await == 200).await;
    let sizes: Vec<usize> = nodes.iter().map(Node::keys).collect();
    assert_eq!(sizes.iter().sum::<usize>(), 200);
    assert!(sizes.iter().all(|&size| size > 20), "every node has its share: {sizes:?}");
    let stranger = ClientFiles { cert: None, key: None, ..known(&pki) };
    let stranger = memo_with(&url, stranger).await;
    assert_eq!(ask(&stranger, 0..20).await, 0);
}
