//! The speed of the client, against a server that answers without work.
//!
//! `cargo bench -p afterimage-wire --bench client`
//!
//! Every answer is checked. Client and server share the machine: the pipelined figures are those of
//! both together.

use std::error::Error;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use afterimage_wire::client::{Classified, Reply};
use afterimage_wire::proto::message::{
    Classification, Message, Origin, put_cache_resp, put_classify_resp,
};
use afterimage_wire::proto::{Frame, Role, Shape, Welcome};
use afterimage_wire::{Client, ClientOptions, blocking};
use tokio::runtime::Builder;
use tokio::sync::mpsc;

const IMAGE: [u8; 784] = [7; 784];
const CLASS: u16 = 7;
const WINDOW: u32 = 1024;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let address = serve()?;
    let current = Builder::new_current_thread().enable_all().build()?;
    let multi = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;

    raw_depth_1(address)?;
    let client = blocking::Client::connect(address, ClientOptions::new())?;
    depth_1("blocking", || client.classify(&IMAGE).map(|label| label.label))?;
    blocking_threads(&client, 8)?;
    current.block_on(depth_1_async("async, one thread", address))?;
    multi.block_on(async { tokio::spawn(depth_1_spawned(address)).await? })?;

    for tasks in [64, 1024] {
        current.block_on(pipelined("one thread", address, tasks))?;
        multi.block_on(pipelined("two threads", address, tasks))?;
    }
    multi.block_on(callbacks(address))?;
    multi.block_on(many_reads(address))?;
    Ok(())
}

/// The lower bound: the same bytes over a bare socket.
fn raw_depth_1(address: SocketAddr) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    let mut request = Vec::new();
    let image = &IMAGE;
    let budget_ms = 0;
    Message::ClassifyReq { image, budget_ms }.encode(1, &mut request);
    let mut reply = [0; 18];
    depth_1("bare socket", || {
        stream.write_all(&request)?;
        stream.read_exact(&mut reply)?;
        Ok::<_, std::io::Error>(u16::from_le_bytes([reply[16], reply[17]]))
    })
}

fn depth_1<E: Error + Send + Sync + 'static>(
    name: &str,
    mut call: impl FnMut() -> Result<u16, E>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut latencies = histogram();
    for n in 0..55_000 {
        let start = Instant::now();
        assert_eq!(call()?, CLASS);
        if n >= 5_000 {
            latencies.saturating_record(start.elapsed().as_nanos() as u64);
        }
    }
    report(name, &latencies);
    Ok(())
}

fn histogram() -> hdrhistogram::Histogram<u64> {
    hdrhistogram::Histogram::new_with_bounds(1, 60_000_000_000, 3)
        .expect("these bounds are allowed")
}

fn report(name: &str, latencies: &hdrhistogram::Histogram<u64>) {
    let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1e3;
    println!(
        "depth 1, {name:<20} p50 {:6.1} us   p99 {:6.1} us   p99.9 {:6.1} us",
        us(0.5),
        us(0.99),
        us(0.999)
    );
}

async fn depth_1_async(
    name: &str,
    address: SocketAddr,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let client = Client::connect(address, ClientOptions::new()).await?;
    let latencies = measure(&client).await;
    report(name, &latencies);
    Ok(())
}

async fn depth_1_spawned(address: SocketAddr) -> Result<(), Box<dyn Error + Send + Sync>> {
    let client = Client::connect(address, ClientOptions::new()).await?;
    report("async, two threads", &measure(&client).await);
    Ok(())
}

async fn measure(client: &Client) -> hdrhistogram::Histogram<u64> {
    let mut latencies = histogram();
    for n in 0..55_000 {
        let start = Instant::now();
        let label = client.classify(&IMAGE).await.expect("the server answers");
        assert_eq!(label.label, CLASS);
        if n >= 5_000 {
            latencies.saturating_record(start.elapsed().as_nanos() as u64);
        }
    }
    latencies
}

async fn pipelined(
    name: &str,
    address: SocketAddr,
    tasks: u64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let client = Client::connect(address, ClientOptions::new()).await?;
    let each = 1_500_000 / tasks;
    let start = Instant::now();
    let callers: Vec<_> = (0..tasks)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move {
                for _ in 0..each {
                    let label = client.classify(&IMAGE).await.expect("the server answers");
                    assert_eq!(label.label, CLASS);
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await?;
    }
    rate(&format!("classify, {tasks} tasks on {name}"), tasks * each, start.elapsed());
    Ok(())
}

fn blocking_threads(
    client: &blocking::Client,
    threads: u64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    const EACH: u64 = 20_000;
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..EACH {
                    let label = client.classify(&IMAGE).expect("the server answers");
                    assert_eq!(label.label, CLASS);
                }
            });
        }
    });
    rate(&format!("classify, {threads} blocking threads"), threads * EACH, start.elapsed());
    Ok(())
}

/// As a service uses the client: each reply sends the next request from its callback.
async fn callbacks(address: SocketAddr) -> Result<(), Box<dyn Error + Send + Sync>> {
    const DEPTH: u64 = 256;
    const TOTAL: u64 = 3_000_000;
    /// Dropped by the last of the callbacks.
    struct Load {
        left: AtomicU64,
        _done: mpsc::Sender<()>,
    }
    fn next(client: &Client, load: Arc<Load>) {
        let again = client.clone();
        let reply = Reply::call(move |outcome: Classified| {
            let (label, _) = outcome.expect("the server answers");
            assert_eq!(label.label, CLASS);
            if load.left.fetch_sub(1, Ordering::Relaxed) as i64 > 0 {
                next(&again, load);
            }
        });
        client.submit_classify(&IMAGE, Duration::from_secs(10), reply);
    }
    let client = Client::connect(address, ClientOptions::new()).await?;
    let (_done, mut receiver) = mpsc::channel(1);
    let left = AtomicU64::new(TOTAL - DEPTH);
    let load = Arc::new(Load { left, _done });
    let start = Instant::now();
    for _ in 0..DEPTH {
        next(&client, Arc::clone(&load));
    }
    drop(load);
    receiver.recv().await;
    assert_eq!(client.counters().received, TOTAL);
    rate(&format!("classify, {DEPTH} deep by callbacks"), TOTAL, start.elapsed());
    Ok(())
}

async fn many_reads(address: SocketAddr) -> Result<(), Box<dyn Error + Send + Sync>> {
    let client = Client::connect(address, ClientOptions::new()).await?;
    let keys: Vec<u64> = (0..512).collect();
    let start = Instant::now();
    for _ in 0..8000 {
        assert_eq!(client.cache().get_many(&keys).await?[7], Some(1));
    }
    rate("cache_get_many of 512", 8000 * 512, start.elapsed());
    Ok(())
}

fn rate(name: &str, calls: u64, elapsed: Duration) {
    let per_second = calls as f64 / elapsed.as_secs_f64();
    println!("{name:<40} {:.2} M round trips/s", per_second / 1e6);
}

fn serve() -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || converse(stream));
        }
    });
    Ok(address)
}

fn converse(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut input, mut end, mut out) = (vec![0; 1 << 20], 0, Vec::new());
    loop {
        let read = stream.read(&mut input[end..])?;
        if read == 0 {
            return Ok(());
        }
        end += read;
        let mut start = 0;
        while let Ok(Some(frame)) = Frame::decode(&input[start..end], 4096) {
            start += frame.header.frame_len();
            answer(frame, &mut out);
        }
        input.copy_within(start..end, 0);
        end -= start;
        stream.write_all(&out)?;
        out.clear();
    }
}

fn answer(frame: Frame<'_>, out: &mut Vec<u8>) {
    let id = frame.header.id;
    match Message::decode(frame) {
        Ok(Message::ClassifyReq { image, .. }) => {
            let (class, origin) = (image[0].into(), Origin::Hit);
            put_classify_resp(out, id, Classification { label: class, origin });
        }
        Ok(Message::CacheRead { .. }) => put_cache_resp(out, id, Some(1)),
        Ok(Message::Hello(_)) => Message::Welcome(Welcome {
            version: 1,
            service: Role::Memo,
            features: 0,
            max_body: 4096,
            window: WINDOW,
            classes: 10,
            digest: [0; 32],
            shape: Shape::new(&[28, 28]).unwrap_or_default(),
            name: "thoughtless".into(),
        })
        .encode(id, out),
        other => eprintln!("the bench does not ask for {other:?}"),
    }
}
