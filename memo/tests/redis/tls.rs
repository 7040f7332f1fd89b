//! A Redis server that speaks mutual TLS and nothing else.

use std::process::{Child, Command, Stdio};

use afterimage_memo::store::RedisTls;

use crate::node::{free_port, installed};
use crate::pki::Authority;
use crate::{ask, memo_with, until};

/// Killed when it is dropped.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn answers_are_remembered_through_mutual_tls() {
    if !installed("answers_are_remembered_through_mutual_tls") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let server = authority.issue("server", "127.0.0.1");
    let client = authority.issue("client", "memo");
    let port = free_port();
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--bind", "127.0.0.1", "--save", "", "--tls-auth-clients", "yes"]);
    command.args(["--tls-port", &port.to_string()]).arg("--dir").arg(folder.path());
    command.arg("--tls-cert-file").arg(&server.cert).arg("--tls-key-file").arg(&server.key);
    command.arg("--tls-ca-cert-file").arg(&authority.cert);
    let _redis = Killed(command.stdout(Stdio::null()).spawn().unwrap());

    let read = |path| std::fs::read(path).unwrap();
    let (ca, identity) = (Some(read(&authority.cert)), (read(&client.cert), read(&client.key)));
    let url = format!("rediss://127.0.0.1:{port}");
    let known = memo_with(&url, RedisTls { ca: ca.clone(), identity: Some(identity) }).await;
    until("an answer is remembered", async || ask(&known, 0..1).await > 0).await;
    // Nobody else is let in.
    let unknown = memo_with(&url, RedisTls { ca, identity: None }).await;
    assert_eq!(ask(&unknown, 0..1).await, 0);
}
