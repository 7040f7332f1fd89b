//! The command line as people and scripts use it: output, errors, settings, and secrets that it
//! does not print.

#![allow(clippy::unwrap_used)]

mod bench;
#[path = "../common/mod.rs"]
mod common;
mod deploy;
mod errors;
mod import;
mod operators;
mod print;
mod schema;
mod settings;
mod startup;
mod stats;
mod tools;

use std::io::Write as _;
use std::net::TcpListener;
use std::time::Duration;

use afterimage_wire::proto::Welcome;
use flate2::Compression;
use flate2::write::GzEncoder;

use common::talk::{Raw, within};
use common::{Done, Running};

pub(crate) const SERVICES: [&str; 4] = ["serve", "cache", "classifier", "memo"];

/// A secret that must not appear in any output.
pub(crate) const SECRET: &str = "hunter2-is-the-secret";

/// The time limit for the part of a test that talks to a service.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

/// The Welcome of this service.
pub(crate) fn welcome(service: &Running) -> Welcome {
    let mut welcome = None;
    within(LIMIT, async {
        welcome = Some(Raw::open(service.addr(), "").await.1);
    });
    welcome.unwrap()
}

/// An address of this machine without a server.
pub(crate) fn unused_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

pub(crate) fn pgm_binary(pixels: &[u8], width: usize) -> Vec<u8> {
    let height = pixels.len() / width;
    [format!("P5\n{width} {height}\n255\n").as_bytes(), pixels].concat()
}

/// An IDX file of unsigned bytes with these dimensions.
pub(crate) fn idx(dims: &[usize], values: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, 8, dims.len() as u8];
    for &dim in dims {
        // IDX is big-endian: the lowest byte last.
        bytes.extend(u32::try_from(dim).unwrap().to_le_bytes().iter().rev());
    }
    bytes.extend_from_slice(values);
    bytes
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

impl Done {
    /// Fails unless the command failed with exit code 1, and standard error has only lines of the
    /// log and one error at the end. Returns the error.
    pub(crate) fn failed_with_no_more_than_logs(mut self) -> String {
        let is_log = |line: &str| line.contains(" INFO ") || line.contains(" WARN ");
        let kept: Vec<&str> = self.stderr.lines().filter(|line| !is_log(line)).collect();
        self.stderr = kept.join("\n");
        self.failed_with_a_line()
    }

    /// Fails unless the command failed with exit code 1. Returns the first line of its error.
    pub(crate) fn failed_with_first_line(self) -> String {
        assert_eq!(self.status.code(), Some(1), "{self:#?}");
        self.stderr.lines().next().unwrap_or_default().to_owned()
    }
}
