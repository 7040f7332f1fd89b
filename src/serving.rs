//! The life of a service process: runtime, socket, start-up log, signals, drain, last log line.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Instant;

use afterimage_cache::SnapshotWriter;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Identity, Server, ServerOptions, Service, until_terminated};
use afterimage_wire::tls::ServerTls;
use anyhow::{Context, anyhow, bail};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};

use crate::args::ServerArgs;
use crate::format::{grouped, long_time, percent};
use crate::net;
use crate::print::say;

/// The end of a service's help: examples and signals.
pub(crate) fn service_help(examples: &str) -> String {
    format!(
        "Examples:\n{examples}\n\n\
         Signals:\n  \
           SIGTERM, SIGINT  Finish requests in flight, write the snapshot, exit\n  \
           SIGHUP           Reload certificates"
    )
}

/// A runtime with this many threads for sockets. A single thread needs no work stealing and is
/// faster without.
pub(crate) fn runtime(threads: usize) -> anyhow::Result<Runtime> {
    let mut builder = match threads {
        1 => Builder::new_current_thread(),
        _ => Builder::new_multi_thread(),
    };
    if threads > 1 {
        builder.worker_threads(threads);
    }
    builder.enable_all().build().context("cannot start the threads for sockets")
}

/// Serves the service that `build` makes on `listen` until SIGTERM or SIGINT. `build` runs inside
/// the runtime because clients of other services need it, and after the port is taken because it
/// may allocate a table and load a model.
pub(crate) fn serve<S: Service>(
    args: &ServerArgs,
    listen: &str,
    build: impl FnOnce() -> anyhow::Result<S>,
) -> anyhow::Result<()> {
    let mut options = args.options()?;
    raise_descriptor_limit(options.max_connections);
    let addr = net::resolve(listen).context("--listen")?;
    if !addr.ip().is_loopback() {
        check_exposed(listen, &options, args.insecure())?;
        options.open_admin = asks_for_certificates(&options);
    }
    runtime(args.threads())?.block_on(async {
        reload_on_hangup(&options);
        let listener = TcpListener::bind(addr).await.map_err(|error| match error.kind() {
            ErrorKind::AddrInUse => anyhow!(
                "cannot listen on {addr}: the address is in use; choose another one with --listen"
            ),
            _ => anyhow!("cannot listen on {addr}: {error}"),
        })?;
        let addr = listener.local_addr()?;
        let service = Arc::new(build()?);
        let identity = service.identity();
        check_max_body(&options, &identity)?;
        let server = Server::new(listener, Arc::clone(&service), options);
        // Installed before the address is printed: a supervisor may send SIGTERM right after.
        let terminated = until_terminated();
        let _file_size_signal = ignore_file_size_limit();
        // The reader of standard output may be gone; the service runs all the same.
        let _ = say!("{} listening on {addr}", identity.service);
        let started = Instant::now();
        server.serve(terminated).await;
        let mut stats = Stats::default();
        service.stats(&mut stats);
        let uptime = long_time(started.elapsed());
        tracing::info!("stopped after {uptime}: {}", summary(&stats));
        Ok(())
    })
}

/// The work of a service in one line: its requests and its hit ratio.
fn summary(stats: &Stats) -> String {
    let count = |name| stats.counter_value(name);
    if stats.get("hits").is_none() {
        return format!("{} images classified", grouped(count("engine_scored")));
    }
    let hits = count("hits");
    let reads = hits + count("misses") + count("coalesced");
    let requests = grouped(reads + count("writes"));
    match reads {
        0 => format!("{requests} requests"),
        _ => format!("{requests} requests, hit ratio {}", percent(hits as f64 / reads as f64)),
    }
}

/// Refuses a body limit that no request fits in.
fn check_max_body(options: &ServerOptions, identity: &Identity) -> anyhow::Result<()> {
    /// A key and a value, each of 8 bytes.
    const CACHE_WRITE: usize = 16;
    let (what, needed) = match (identity.service, identity.shape.byte_len()) {
        (Role::Cache, _) => ("a cache write", CACHE_WRITE),
        (_, Some(len)) => ("an input of the model", len),
        // A classifier elsewhere announces its input later.
        (_, None) => return Ok(()),
    };
    if (options.max_body as usize) < needed {
        bail!("--max-body is {} bytes; {what} needs {needed}", options.max_body);
    }
    Ok(())
}

/// Keeps SIGHUP from ending the process, and reloads the server's certificates on it.
fn reload_on_hangup(options: &ServerOptions) {
    if let Some(tls) = &options.tls {
        tokio::spawn(tls.keep_current());
    }
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        // Clients of other services reload their certificates by handlers of their own.
        if let Ok(mut hangup) = signal(SignalKind::hangup()) {
            tokio::spawn(async move {
                while hangup.recv().await.is_some() {
                    tracing::info!("SIGHUP: reloading certificates, if there are any");
                }
            });
        }
    }
}

fn asks_for_certificates(options: &ServerOptions) -> bool {
    options.tls.as_ref().is_some_and(ServerTls::asks_for_certificates)
}

/// Refuses a public address without authentication. TLS without client certificates encrypts and
/// does not authenticate.
fn check_exposed(listen: &str, options: &ServerOptions, insecure: bool) -> anyhow::Result<()> {
    if options.token.is_none() && !asks_for_certificates(options) && !insecure {
        bail!(
            "--listen {listen} is reachable from other machines without authentication; set \
             --token-file or --tls-client-ca, or --insecure to allow it"
        );
    }
    if options.token.is_some() && options.tls.is_none() {
        tracing::warn!(
            "clients send their token to {listen} unencrypted; on an untrusted network set \
             --tls-cert and --tls-key"
        );
    }
    Ok(())
}

/// Makes a write above the file size limit (`ulimit -f`) fail like one on a full disk. A handler
/// replaces the signal's default action, which ends the process.
#[cfg(unix)]
fn ignore_file_size_limit() -> Option<tokio::signal::unix::Signal> {
    let too_large = rustix::process::Signal::XFSZ.as_raw();
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(too_large)).ok()
}

#[cfg(not(unix))]
fn ignore_file_size_limit() {}

/// Writes a table's last snapshot, after the last request.
pub(crate) fn last_snapshot(writer: Option<SnapshotWriter>) -> anyhow::Result<()> {
    if let Some(writer) = writer {
        writer.finish()?;
    }
    Ok(())
}

/// Raises the soft limit of file descriptors to what `--max-connections` needs. It is often far
/// below the hard limit.
#[cfg(unix)]
fn raise_descriptor_limit(connections: usize) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    // Listeners, clients of other services, snapshots, the runtime's own, and connections that are
    // refused or evicted and still closing.
    const OTHERS: u64 = 64 + 320;
    let mut limit = getrlimit(Resource::Nofile);
    let needed = connections as u64 + OTHERS;
    if limit.current.is_none_or(|current| current >= needed) {
        return;
    }
    limit.current = Some(limit.maximum.map_or(needed, |maximum| maximum.min(needed)));
    let granted = setrlimit(Resource::Nofile, limit).is_ok();
    let current = getrlimit(Resource::Nofile).current.unwrap_or(needed);
    if !granted || current < needed {
        tracing::warn!(
            "--max-connections {connections} needs {needed} file descriptors and the limit is \
             {current}; raise it (ulimit -n) or allow fewer connections"
        );
    }
}

#[cfg(not(unix))]
fn raise_descriptor_limit(_: usize) {}

#[cfg(test)]
mod tests {
    use afterimage_wire::proto::stats::Value;

    use super::*;

    #[test]
    fn the_last_line_counts_requests_and_hits() {
        let mut memo = Stats::default();
        memo.push("hits", Value::Counter(990));
        memo.push("misses", Value::Counter(9));
        memo.push("coalesced", Value::Counter(1));
        assert_eq!(summary(&memo), "1,000 requests, hit ratio 99.00 %");
        let mut cache = Stats::default();
        cache.push("hits", Value::Counter(0));
        cache.push("misses", Value::Counter(0));
        cache.push("writes", Value::Counter(7));
        assert_eq!(summary(&cache), "7 requests");
        let mut classifier = Stats::default();
        classifier.push("engine_scored", Value::Counter(12_345));
        assert_eq!(summary(&classifier), "12,345 images classified");
    }
}
