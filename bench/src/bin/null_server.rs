//! The speed of the load generator: a server that only answers on one CPU, the generator on
//! another.
//!
//! `cargo run --release -p afterimage-bench --bin null_server -- cache 16384`
//!
//! Arguments, all optional and in this order: the load (`cache`, `mixed` for half writes, or
//! `classify`), depth, connections, seconds, access (`uniform` or an exponent of Zipf's law).
//! `serve ADDRESS` only serves, for a generator in another process; `all FOLDER` measures several
//! loads and writes a record.

use std::env;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use afterimage_bench::record::{Machine, Record, Run};
use afterimage_bench::workload::{Access, Keys, Population};
use afterimage_bench::{Plan, Report, Span, run};
use afterimage_wire::proto::header::{DEFAULT_MAX_BODY, flags};
use afterimage_wire::proto::message::{Classification, Origin, put_cache_resp, put_classify_resp};
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Message, Role, Shape, Welcome};
use rustix::thread::{CpuSet, sched_setaffinity};

const KEYS: Keys = Keys { count: 1_000_000, read_share: 1.0, salt: 0 };

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = env::args().skip(1).collect();
    let arg = |i: usize, otherwise: &str| args.get(i).cloned().unwrap_or(otherwise.into());
    let what = arg(0, "cache");
    if what == "serve" {
        let service = if arg(2, "cache") == "cache" { Role::Cache } else { Role::Memo };
        accept(TcpListener::bind(arg(1, "127.0.0.1:0"))?, service, None);
        return Ok(());
    }

    if what == "all" {
        return record(Path::new(&arg(1, "target/bench")));
    }
    let seconds = Duration::from_secs(arg(3, "5").parse()?);
    let load = Load { what: &what, depth: arg(1, "1").parse()?, connections: arg(2, "1").parse()? };
    let mut plan = load.plan(seconds)?;
    let access = arg(4, "uniform");
    if access != "uniform" {
        plan.access = Access::Zipf { exponent: access.parse()? };
    }
    println!("{}", run(&plan, &mut |_| {})?);
    Ok(())
}

/// The kind of request, and the number in flight.
struct Load<'a> {
    what: &'a str,
    depth: usize,
    connections: usize,
}

impl Load<'_> {
    /// Starts a server on CPU 1, and plans this load for it on CPU 0.
    fn plan(&self, stop: Duration) -> Result<Plan, Box<dyn Error>> {
        let service = if self.what == "classify" { Role::Memo } else { Role::Cache };
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let addr = listener.local_addr()?;
        thread::spawn(move || accept(listener, service, Some(1)));
        let plan = match service {
            Role::Memo => Plan::classify(addr, Arc::new(Population::drawn(1, 10_000))),
            _ => {
                let read_share = if self.what == "mixed" { 0.5 } else { 1.0 };
                Plan::cache(addr, Keys { read_share, ..KEYS })
            }
        };
        Ok(Plan {
            depth: self.depth,
            connections: self.connections,
            warmup: Span::Time(stop / 4),
            stop: Span::Time(stop),
            pin: vec![0],
            ..plan
        })
    }
}

/// Measures the generator at several depths, the best of some rounds each, and writes a record.
fn record(folder: &Path) -> Result<(), Box<dyn Error>> {
    const ROUNDS: usize = 5;
    let mut record = Record::new("generator", Path::new("."), Machine::here(), Vec::new());
    let loads =
        [("cache", 16_384), ("mixed", 16_384), ("cache", 64), ("classify", 1024), ("classify", 64)];
    for (what, depth) in loads {
        let load = Load { what, depth, connections: 1 };
        let mut best: Option<Report> = None;
        for _ in 0..ROUNDS {
            let report = run(&load.plan(Duration::from_secs(1))?, &mut |_| {})?;
            let better = |best: &Report| report.throughput_per_s > best.throughput_per_s;
            if best.as_ref().is_none_or(better) {
                best = Some(report);
            }
        }
        let Some(report) = best else { continue };
        let (name, rate) = (format!("{what}, depth {depth}"), report.throughput_per_s / 1e6);
        println!("{name:<24}{rate:>8.2} M/s, {:.1} ns each", report.generator.cpu_ns_per_request);
        record.figures.insert(format!("{name}, M/s"), rate);
        record.runs.push(Run { name, report });
    }
    println!("recorded in {}", record.write(folder)?.display());
    Ok(())
}

fn accept(listener: TcpListener, service: Role, cpu: Option<usize>) {
    if let Ok(addr) = listener.local_addr() {
        // The end of the line flushes it for the parent process.
        println!("null {service} listening on {addr}");
    }
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            if let Some(cpu) = cpu {
                let mut cpus = CpuSet::new();
                cpus.set(cpu);
                let _ = sched_setaffinity(None, &cpus);
            }
            serve(stream, service)
        });
    }
}

/// Answers all requests of one connection, until it closes or sends an invalid frame.
fn serve(mut stream: TcpStream, service: Role) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut input = vec![0; 128 << 10];
    let mut output = Vec::with_capacity(256 << 10);
    let mut end = 0;
    loop {
        let read = stream.read(&mut input[end..]).ok().filter(|&read| read > 0)?;
        end += read;
        let mut start = 0;
        while let Some(header) = Header::decode(&input[start..end]) {
            let id = header.id;
            let Some(frame) = input[start..end].get(..header.frame_len()) else {
                break;
            };
            let body = &frame[HEADER_LEN..];
            start += frame.len();
            match header.kind {
                Kind::CacheReq if header.flags & flags::WRITE != 0 => {}
                Kind::CacheReq => {
                    let key = u64::from_le_bytes(body.try_into().ok()?);
                    put_cache_resp(&mut output, id, Some(KEYS.value(key)));
                }
                Kind::ClassifyReq => {
                    let class = u16::from(*body.get(400)?) % 10;
                    let origin = Origin::Hit;
                    put_classify_resp(&mut output, id, Classification { label: class, origin });
                }
                Kind::Ping => Message::Pong(body).encode(id, &mut output),
                Kind::Hello => Message::Welcome(welcome(service)).encode(id, &mut output),
                _ => return None,
            }
        }
        stream.write_all(&output).ok()?;
        output.clear();
        input.copy_within(start..end, 0);
        end -= start;
    }
}

fn welcome(service: Role) -> Welcome {
    let shape = match service {
        Role::Cache => Shape::default(),
        _ => Shape::new(&[28, 28]).unwrap_or_default(),
    };
    Welcome {
        version: 1,
        service,
        features: 0,
        max_body: DEFAULT_MAX_BODY,
        window: u32::MAX,
        classes: 10,
        digest: [0; 32],
        shape,
        name: "null server".into(),
    }
}
