//! Durable cycles of jobs per second over TCP: submit, lease, run, finish, and the result at the
//! client. The program of `jobs` in `bench/scripts/run.sh`.
//!
//! Argument: the folder for the store; its disk decides the figures. Server, workers and clients
//! share one process and its cores. Every result is checked. Each cycle waits for two commits, each
//! with a sync. The time of a bare sync of the same disk is printed beside them.

#![allow(clippy::unwrap_used, reason = "a measurement stops at the first fault")]

use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage_jobs::worker::{Running, Task};
use afterimage_jobs::{
    Client, Code, Definition, JobService, Outcome, Server, ServerOptions, Sqlite, Submission,
    Submit, Worker,
};
use afterimage_wire::{ClientOptions, Connection};
use tokio_util::sync::CancellationToken;

/// Jobs in flight.
const DEPTHS: [usize; 4] = [1, 16, 256, 4096];

const MEASURE: Duration = Duration::from_secs(4);

/// Connections of clients, and of workers, at most.
const CONNECTIONS: usize = 4;

#[tokio::main]
async fn main() {
    let folder = std::env::args().skip(1).find(|arg| !arg.starts_with("--"));
    let folder = folder.unwrap_or_else(|| "target".to_owned());
    let folder = tempfile::tempdir_in(folder).unwrap();
    println!("a bare sync of 4 KiB takes {:?} (median)", bare_sync(folder.path()));
    println!("{:>9}  {:>10}  {:>9}  {:>9}", "in flight", "jobs/s", "p50", "p99");
    for depth in DEPTHS {
        let file = folder.path().join(format!("{depth}.db"));
        let (rate, p50, p99) = cycles(&file, depth).await;
        println!("{depth:>9}  {rate:>10.0}  {p50:>9.2?}  {p99:>9.2?}");
    }
    let (rate, p50) = remembered(&folder.path().join("remembered.db")).await;
    println!("remembered results: {rate:.0}/s with 256 in flight, p50 {p50:.2?} with 1");
}

/// The median time of a write and a sync.
fn bare_sync(folder: &Path) -> Duration {
    let mut file = std::fs::File::create(folder.join("sync")).unwrap();
    let mut times: Vec<Duration> = (0..200)
        .map(|_| {
            let since = Instant::now();
            file.write_all(&[7; 4096]).unwrap();
            file.sync_data().unwrap();
            since.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

/// A server on a file, and its address.
async fn serve(file: &Path) -> std::net::SocketAddr {
    let jobs = Server::start(Sqlite::open(file).unwrap(), &ServerOptions::default()).unwrap();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let service = Arc::new(JobService::new(jobs));
    let server = afterimage_wire::server::Server::new(listener, service, Default::default());
    tokio::spawn(async move { server.serve(std::future::pending::<()>()).await });
    address
}

async fn client(address: std::net::SocketAddr) -> Client {
    let connection = Connection::connect(address, ClientOptions::new()).await.unwrap();
    Client::open(&connection).await.unwrap()
}

/// Starts workers whose result is the input, reversed.
async fn workers(address: std::net::SocketAddr, depth: usize) -> CancellationToken {
    let stop = CancellationToken::new();
    let count = CONNECTIONS.min(depth);
    for number in 0..count {
        let handler = |task: Task| -> Running {
            let output: Vec<u8> = task.input.iter().rev().copied().collect();
            Box::pin(std::future::ready(Outcome::Succeeded(output.into())))
        };
        let worker = Worker::new(format!("worker-{number}"))
            .concurrency((2 * depth).div_ceil(count) as u32)
            .with(Definition::new("reverse"), Code::of(&[b"reverse"]), handler);
        let connection = Connection::connect(address, ClientOptions::new()).await.unwrap();
        tokio::spawn(worker.run(connection, stop.clone()));
    }
    let client = client(address).await;
    while client
        .definitions()
        .await
        .unwrap()
        .first()
        .is_none_or(|one| one.idle_workers < count as u32)
    {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop
}

/// Cycles per second with this many in flight, and percentiles of their times.
async fn cycles(file: &Path, depth: usize) -> (f64, Duration, Duration) {
    let address = serve(file).await;
    let stop = workers(address, depth).await;
    let (next, is_over) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicBool::new(false)));
    let mut clients = Vec::new();
    for _ in 0..CONNECTIONS.min(depth) {
        clients.push(client(address).await);
    }
    let since = Instant::now();
    let tasks: Vec<_> = (0..depth)
        .map(|index| {
            let client = clients[index % clients.len()].clone();
            let (next, is_over) = (Arc::clone(&next), Arc::clone(&is_over));
            tokio::spawn(async move {
                let mut times = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let input = next.fetch_add(1, Ordering::Relaxed).to_le_bytes();
                    let since = Instant::now();
                    let submit = Submit::new("reverse", input.to_vec());
                    let (_, end) = client.run(submit).await.unwrap();
                    let output = end.expect("a new input").await.unwrap().output.unwrap();
                    assert!(output.iter().rev().eq(&input), "the result is the input, reversed");
                    times.push(since.elapsed());
                }
                times
            })
        })
        .collect();
    tokio::time::sleep(MEASURE).await;
    is_over.store(true, Ordering::Relaxed);
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.unwrap());
    }
    let rate = times.len() as f64 / since.elapsed().as_secs_f64();
    stop.cancel();
    times.sort_unstable();
    (rate, times[times.len() / 2], times[times.len() * 99 / 100])
}

/// Remembered results per second with 256 in flight, and the median time of one alone.
async fn remembered(file: &Path) -> (f64, Duration) {
    let address = serve(file).await;
    let stop = workers(address, 1).await;
    let client = client(address).await;
    let submit = || Submit::new("reverse", &b"input"[..]);
    let (_, end) = client.run(submit()).await.unwrap();
    end.unwrap().await.unwrap();
    let mut times = Vec::new();
    for _ in 0..20_000 {
        let since = Instant::now();
        let answer = client.submit(submit()).await.unwrap();
        times.push(since.elapsed());
        assert!(matches!(answer, Submission::Remembered { output, .. } if output == "tupni"));
    }
    times.sort_unstable();
    let since = Instant::now();
    let tasks: Vec<_> = (0..256)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                for _ in 0..1000 {
                    client.submit(submit()).await.unwrap();
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    let rate = 256_000.0 / since.elapsed().as_secs_f64();
    stop.cancel();
    (rate, times[times.len() / 2])
}
