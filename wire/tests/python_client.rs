//! The tests of the Python client, against this crate's server, and the check of the vectors.

#![allow(clippy::unwrap_used, reason = "tests panic")]

use std::ffi::OsString;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::pki::{Authority, Issued};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Role, Shape, Status};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service, Token};
use afterimage_wire::stream::{IncomingStream, Stream, StreamError};
use afterimage_wire::tls::{ServerFiles, ServerTls};
use bytes::Bytes;
use tokio::task::JoinHandle;

const IMAGE_LEN: usize = 28 * 28;

/// The label of an image is the last digit of its first byte. Every second answer comes late.
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
                let later = batch.row_reply(i);
                tokio::spawn(async move { later.send(Ok(label.into())) });
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}

    fn open(&self, stream: IncomingStream) {
        match stream.name() {
            "echo" => drop(tokio::spawn(echo(stream.accept()))),
            "count" => drop(tokio::spawn(count(stream.accept()))),
            "pour" => {
                let bytes = str::from_utf8(stream.header()).unwrap().parse().unwrap();
                drop(tokio::spawn(pour(stream.accept(), bytes)));
            }
            "idle" => drop(tokio::spawn(idle(stream.accept()))),
            name => {
                let text = format!("there is no stream \"{name}\"");
                stream.refuse(Status::BadArgument, &text);
            }
        }
    }
}

/// Returns each chunk.
async fn echo(mut stream: Stream) -> Result<(), StreamError> {
    while let Some(chunk) = stream.reader.read().await? {
        stream.writer.write(chunk).await?;
    }
    stream.writer.finish()
}

/// Counts bytes, with progress, and returns the number.
async fn count(mut stream: Stream) -> Result<(), StreamError> {
    let mut count = 0;
    while let Some(chunk) = stream.reader.read().await? {
        count += chunk.len();
        stream.writer.progress(count.to_string())?;
    }
    stream.writer.write(count.to_string()).await?;
    stream.writer.finish()
}

/// Sends this many bytes in chunks of 256 KiB. Each chunk repeats the numbers from 0 to 250.
async fn pour(mut stream: Stream, mut bytes: usize) -> Result<(), StreamError> {
    let chunk: Bytes = (0..256 << 10).map(|i| (i % 251) as u8).collect::<Vec<u8>>().into();
    while bytes > 0 {
        let len = bytes.min(chunk.len());
        stream.writer.write(chunk.slice(..len)).await?;
        bytes -= len;
    }
    stream.writer.finish()
}

/// Neither reads nor writes.
async fn idle(mut stream: Stream) {
    while stream.progress.next().await.is_some() {}
}

/// An interpreter of at least this version, if the machine has one.
///
/// `TEST_PYTHON` names one with more packages, for example NumPy.
fn python(minor: u32) -> Option<OsString> {
    let candidates = [std::env::var_os("TEST_PYTHON"), Some("python3".into())];
    let check = format!("import sys; sys.exit(sys.version_info < (3, {minor}))");
    let found = candidates.into_iter().flatten().find(|candidate| {
        let status = Command::new(candidate).args(["-c", &check]).status();
        status.is_ok_and(|status| status.success())
    });
    if found.is_none() {
        eprintln!("SKIPPED: the machine has no Python 3.{minor} or newer");
    }
    found
}

/// A server on a free port of 127.0.0.1.
async fn serve(options: ServerOptions) -> (u16, JoinHandle<()>) {
    let server = Server::bind("127.0.0.1:0", Arc::new(LastDigit), options).await.unwrap();
    let port = server.local_addr().unwrap().port();
    (port, tokio::spawn(server.serve(std::future::pending())))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_passes_its_tests_with_this_server() {
    let Some(python) = python(9) else { return };
    let token = Token::new("open sesame").unwrap();
    let options = ServerOptions { token: Some(token), ..ServerOptions::default() };
    let (port, serving) = serve(options).await;
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let Issued { cert, key } = authority.issue("server", "localhost");
    let tls = ServerTls::load(ServerFiles { cert, key, client_ca: None }).unwrap();
    let options = ServerOptions { tls: Some(tls), ..ServerOptions::default() };
    let (tls_port, serving_tls) = serve(options).await;
    let idle_timeout = Duration::from_secs(1);
    let options = ServerOptions { idle_timeout, ..ServerOptions::default() };
    let (idle_port, serving_idle) = serve(options).await;
    let ca = authority.cert.clone();
    let tests = tokio::task::spawn_blocking(move || {
        let wire = Path::new(env!("CARGO_MANIFEST_DIR"));
        Command::new(python)
            .args(["-B", "-m", "unittest", "-v"])
            .current_dir(wire.join("clients/python"))
            .env("TEST_MEMO", format!("127.0.0.1:{port}"))
            .env("TEST_TOKEN", "open sesame")
            .env("TEST_IDLE", format!("127.0.0.1:{idle_port}"))
            .env("TEST_STREAMS", format!("127.0.0.1:{port}"))
            .env("TEST_TLS", format!("localhost:{tls_port}"))
            .env("TEST_CA", ca)
            .output()
    });
    let output = tests.await.unwrap().unwrap();
    for serving in [serving, serving_tls, serving_idle] {
        serving.abort();
    }
    let report = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{report}");
    for line in report.lines() {
        if line.starts_with("SKIPPED: ") {
            eprintln!("{line}");
        }
        assert!(!line.contains("skipped 'set TEST_"), "{line}");
    }
}

#[test]
fn make_py_makes_the_vectors() {
    let Some(python) = python(11) else { return };
    let make = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/make.py");
    let output = Command::new(python).arg("-B").arg(make).arg("--check").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
