//! The Python client in `clients/python/`, by its own tests and against this crate's server.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use afterimage_testkit::pki::{Authority, Issued};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Role, Shape, Status};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service, Token};
use afterimage_wire::tls::{ServerFiles, ServerTls};

const IMAGE_LEN: usize = 28 * 28;

/// The class of an image is its first byte's last digit; every other answer is given late.
struct LastDigit;

impl Service for LastDigit {
    fn identity(&self) -> Identity {
        Identity {
            service: Role::Classifier,
            digest: [1; 32],
            classes: 10,
            shape: Shape::new(&[28, 28]).unwrap(),
        }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else { continue };
            if image.len() != IMAGE_LEN {
                batch.error(i, Status::BadArgument, "an image has 784 bytes");
                continue;
            }
            let label = Classification { label: u16::from(image[0] % 10), origin: Origin::Miss };
            if i % 2 == 0 {
                batch.label(i, label);
            } else {
                let later = batch.later(i);
                tokio::spawn(async move { later.label(label) });
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_passes_its_tests_and_understands_this_server() {
    let old = "import sys; sys.exit(sys.version_info < (3, 9))";
    match Command::new("python3").args(["-c", old]).status() {
        Ok(status) if status.success() => {}
        _ => {
            eprintln!("skipped: there is no python3, or one older than 3.9");
            return;
        }
    }
    let token = Token::new("open sesame").unwrap();
    let options = ServerOptions { token: Some(token), ..ServerOptions::default() };
    let server = Server::bind("127.0.0.1:0", Arc::new(LastDigit), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    let serving = tokio::spawn(server.serve(std::future::pending()));
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let Issued { cert, key } = authority.issue("server", "localhost");
    let tls = ServerTls::load(ServerFiles { cert, key, client_ca: None }).unwrap();
    let options = ServerOptions { tls: Some(tls), ..ServerOptions::default() };
    let server = Server::bind("127.0.0.1:0", Arc::new(LastDigit), options).await.unwrap();
    let tls_port = server.local_addr().unwrap().port();
    let serving_tls = tokio::spawn(server.serve(std::future::pending()));
    let ca = authority.cert.clone();
    let tests = tokio::task::spawn_blocking(move || {
        let wire = Path::new(env!("CARGO_MANIFEST_DIR"));
        Command::new("python3")
            .args(["-B", "-m", "unittest"])
            .current_dir(wire.join("clients/python"))
            .env("AFTERIMAGE_MEMO", addr.to_string())
            .env("AFTERIMAGE_TOKEN", "open sesame")
            .env("AFTERIMAGE_TLS", format!("localhost:{tls_port}"))
            .env("AFTERIMAGE_CA", ca)
            .output()
    });
    let output = tests.await.unwrap().unwrap();
    serving.abort();
    serving_tls.abort();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(!said.contains("skipped"), "{said}");
}

#[test]
fn the_vectors_are_what_their_maker_makes() {
    let new = "import sys; sys.exit(sys.version_info < (3, 11))";
    match Command::new("python3").args(["-c", new]).status() {
        Ok(status) if status.success() => {}
        _ => {
            eprintln!("skipped: there is no python3, or one older than 3.11");
            return;
        }
    }
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/make.py");
    let output = Command::new("python3").arg("-B").arg(make).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
