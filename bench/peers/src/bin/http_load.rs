//! Load for an HTTP/1.1 service that takes an image as a POST's body and answers JSON with a
//! "label" and "memoized" or "origin". Usage:
//! http_load ADDRESS[/PATH] CONNECTIONS PIPELINED SECONDS [labels]
//!
//! Written by hand over a socket, since a real HTTP client would use more of its core than the
//! server does of its own. Connections are kept alive; on each, so many requests are on their way.
//! Prints one line of JSON; with `labels` goes on until every image was answered, and prints their
//! labels, too.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_peers::{IMAGES, Seen, WARMUP, finish, images};
use anyhow::{Context, bail, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

/// The longest answer that is waited for.
const MAX_ANSWER: usize = 64 << 10;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, connections, pipelined, seconds, rest @ ..] = &args[..] else {
        bail!("usage: http_load ADDRESS CONNECTIONS PIPELINED SECONDS [labels]");
    };
    let (connections, pipelined): (usize, usize) = (connections.parse()?, pipelined.parse()?);
    let measure = Duration::from_secs_f64(seconds.parse()?);
    let population = images();
    let seen = Rc::new(RefCell::new(Seen::new(WARMUP, !rest.is_empty())));
    let local = LocalSet::new();
    let tasks: Vec<_> = (0..connections)
        .map(|first| {
            let (address, population, seen) = (address.clone(), population.clone(), seen.clone());
            local.spawn_local(async move {
                let stride = (first, connections);
                connection(&address, &population, &seen, stride, pipelined, measure).await
            })
        })
        .collect();
    finish(local, tasks, &seen, !rest.is_empty()).await
}

/// Asks for every n-th image in turn until the time is over and all is answered.
async fn connection(
    address: &str,
    population: &Population,
    seen: &RefCell<Seen>,
    (first, step): (usize, usize),
    pipelined: usize,
    measure: Duration,
) -> anyhow::Result<()> {
    let (address, path) = address.split_once('/').unwrap_or((address, "classify"));
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let head = format!(
        "POST /{path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\n\
         Content-Length: {}\r\n\r\n",
        population.image_len()
    );
    let (mut image, mut waiting) = (first, VecDeque::new());
    let (mut output, mut input) = (Vec::new(), Vec::new());
    loop {
        while waiting.len() < pipelined && !seen.borrow().is_over(measure) {
            output.extend_from_slice(head.as_bytes());
            output.extend_from_slice(population.image(image));
            waiting.push_back((image, Instant::now()));
            image = (image + step) % IMAGES;
        }
        stream.write_all(&output).await?;
        output.clear();
        if waiting.is_empty() {
            return Ok(());
        }
        ensure!(stream.read_buf(&mut input).await? > 0, "the server closed the connection");
        while let Some((label, memoized, len)) = answer(&input)? {
            input.drain(..len);
            let (image, sent) = waiting.pop_front().context("an answer too many")?;
            seen.borrow_mut().answer(image, label, memoized, sent);
        }
        ensure!(input.len() < MAX_ANSWER, "an answer without an end");
    }
}

/// The first answer in `input`: its label, whether it was a hit, and its length.
fn answer(input: &[u8]) -> anyhow::Result<Option<(u16, bool, usize)>> {
    let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") else {
        return Ok(None);
    };
    let head = std::str::from_utf8(&input[..end])?.to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{}", head.lines().next().unwrap_or_default());
    let len = head.lines().find_map(|line| line.strip_prefix("content-length:"));
    let len: usize = len.context("an answer without a length")?.trim().parse()?;
    let Some(body) = input.get(end + 4..end + 4 + len) else {
        return Ok(None);
    };
    let body: serde_json::Value = serde_json::from_slice(body)?;
    let label = body["label"].as_u64().context("an answer without a label")?;
    Ok(Some((label as u16, body["memoized"] == true || body["origin"] == "hit", end + 4 + len)))
}
