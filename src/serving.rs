//! The life of a service process: runtime, socket, start-up log, signals, drain, last log line.

use std::time::{Duration, Instant};

use afterimage_cache::metrics as cache;
use afterimage_classifier::metrics as engine;
use afterimage_jobs::metrics as jobs;
use afterimage_memo::metrics as memo;
use afterimage_streams::metrics as streams;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{ServerOptions, until_terminated};
use afterimage_wire::tls::ServerTls;
use anyhow::{Context, bail};
use tokio::runtime::{Builder, Runtime};

use crate::args::{ServerArgs, Size};
use crate::config::{Config, ListenerConfig};
use crate::format::{grouped, long_time, percent};
use crate::net;
use crate::print::say;
use crate::process::Process;

/// The end of a service's help: examples and signals.
pub(crate) fn service_help(examples: &str) -> String {
    format!(
        "Examples:\n{examples}\n\n\
         Signals:\n  \
           SIGTERM, SIGINT, SIGQUIT  Finish requests in flight, write the snapshot, exit\n  \
           SIGHUP                    Reload certificates, tokens, tenants and API keys"
    )
}

/// The number of threads for sockets; 0 means one per core.
pub(crate) fn threads(wanted: usize) -> usize {
    match wanted {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
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

/// Serves the services of a configuration until a signal to stop. `config` runs inside the runtime
/// because clients of other services need it. It gets the listener of the flags.
pub(crate) fn serve(
    args: &ServerArgs,
    listen: &str,
    config: impl FnOnce(ListenerConfig) -> anyhow::Result<Config>,
) -> anyhow::Result<()> {
    let mut options = args.options()?;
    raise_descriptor_limit(options.max_connections);
    let address = net::resolve(listen).context("--listen")?;
    if !address.ip().is_loopback() {
        check_exposed(listen, &options, args.insecure())?;
        options.open_admin = asks_for_certificates(&options);
    }
    run(args.threads(), || {
        let mut config = config(ListenerConfig { address, options })?;
        config.admin = args.admin.config()?;
        Ok(config)
    })
}

/// Runs a configuration on this many threads until a signal to stop. `config` runs inside the
/// runtime.
pub(crate) fn run(
    threads: usize,
    config: impl FnOnce() -> anyhow::Result<Config>,
) -> anyhow::Result<()> {
    runtime(threads)?.block_on(async {
        // Installed first: without a handler, SIGHUP ends the process.
        let mut hangups = Hangups::listen();
        let process = Process::start(config()?).await?;
        // Installed before the address is printed: a supervisor may send SIGTERM right after.
        let terminated = until_terminated();
        let _ignored = ignore_user_signals();
        for (service, address) in process.addresses() {
            // Standard output may be closed; the service runs all the same.
            let _ = say!("{service} listening on {address}");
        }
        let proxy = process.proxy().map(|(proxy, address)| {
            let _ = say!("proxy listening on {address}");
            proxy.clone()
        });
        if let Some(address) = process.grpc() {
            let _ = say!("proxy listening on grpc://{address}");
        }
        if let Some(page) = process.page() {
            let _ = say!("gateway listening on {page}");
        }
        if let Some(address) = process.admin() {
            let _ = say!("metrics and probes on http://{address}/metrics");
        }
        notify("READY=1");
        tokio::spawn(return_memory());
        let started = Instant::now();
        let mut terminated = std::pin::pin!(terminated);
        loop {
            tokio::select! {
                () = &mut terminated => break,
                () = hangups.next() => reload(&process),
            }
        }
        notify("STOPPING=1");
        let services: Vec<_> = process.services().cloned().collect();
        let is_gateway = services.is_empty() && proxy.is_none();
        let drained = process.drain(Duration::MAX).await;
        let uptime = long_time(started.elapsed());
        for service in services {
            let mut stats = Stats::default();
            service.stats(&mut stats);
            tracing::info!("stopped after {uptime}: {}", summary(&stats));
        }
        if is_gateway {
            tracing::info!("stopped after {uptime}");
        }
        if let Some(proxy) = proxy {
            let mut stats = Stats::default();
            proxy.stats(&mut stats);
            let report = proxy.observed().unwrap_or_else(|| summary(&stats));
            tracing::info!("stopped after {uptime}: {report}");
            if let Some(log) = proxy.access_log() {
                log.close(LOG_TIMEOUT);
            }
        }
        Ok(drained?)
    })
}

/// The longest time to write the last lines of an access log.
const LOG_TIMEOUT: Duration = Duration::from_secs(2);

/// The work of a service in one line: its requests and its hit ratio.
fn summary(stats: &Stats) -> String {
    let count = |name| stats.counter_value(name);
    if stats.get(jobs::ACCEPTED.name).is_some() {
        let (ended, known) = (count(jobs::SUCCEEDED.name), count(jobs::REMEMBERED.name));
        return format!(
            "{} jobs succeeded, {} answers from memory",
            grouped(ended),
            grouped(known)
        );
    }
    if stats.get(streams::STARTED.name).is_some() {
        let [runs, bytes] = [streams::STARTED, streams::BYTES].map(|metric| count(metric.name));
        return format!("{} runs, {}", grouped(runs), Size(bytes));
    }
    if stats.get(cache::HITS.name).is_none() {
        return format!("{} images classified", grouped(count(engine::SCORED.name)));
    }
    let hits = count(cache::HITS.name);
    let reads = hits + count(cache::MISSES.name) + count(memo::COALESCED.name);
    let requests = grouped(reads + count(cache::WRITES.name));
    match reads {
        0 => format!("{requests} requests"),
        _ => format!("{requests} requests, hit ratio {}", percent(hits as f64 / reads as f64)),
    }
}

/// Reports the state of the process to systemd, if systemd started it with `Type=notify`.
#[cfg(target_os = "linux")]
fn notify(state: &str) {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes() {
        // A name without a file.
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|address| {
        UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &address).map(drop)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "cannot report {state} to systemd");
    }
}

#[cfg(not(target_os = "linux"))]
fn notify(_: &str) {}

/// Reloads the files of a process. Clients with certificates and password files reload them by
/// handlers of their own.
fn reload(process: &Process) {
    tracing::info!("SIGHUP: reloading certificates and token files, if there are any");
    if let Err(error) = process.reload() {
        tracing::warn!("{error}");
    }
}

/// SIGHUP, the request to reload files; `None` if no handler could be installed.
#[cfg(unix)]
struct Hangups(Option<tokio::signal::unix::Signal>);

#[cfg(unix)]
impl Hangups {
    fn listen() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Hangups(signal(SignalKind::hangup()).ok())
    }

    async fn next(&mut self) {
        if let Some(hangups) = &mut self.0
            && hangups.recv().await.is_some()
        {
            return;
        }
        std::future::pending().await
    }
}

#[cfg(not(unix))]
struct Hangups;

#[cfg(not(unix))]
impl Hangups {
    fn listen() -> Self {
        Hangups
    }

    async fn next(&mut self) {
        std::future::pending().await
    }
}

fn asks_for_certificates(options: &ServerOptions) -> bool {
    options.tls.as_ref().is_some_and(ServerTls::asks_for_certificates)
}

/// Refuses a public address without authentication. TLS without client certificates encrypts and
/// does not authenticate.
fn check_exposed(listen: &str, options: &ServerOptions, insecure: bool) -> anyhow::Result<()> {
    if !options.has_token() && !asks_for_certificates(options) && !insecure {
        bail!(
            "--listen {listen} is reachable from other machines without authentication; set \
             --token-file or --tls-client-ca, or --insecure to allow it"
        );
    }
    if options.has_token() && options.tls.is_none() {
        tracing::warn!(
            "clients send their token to {listen} unencrypted; on an untrusted network set \
             --tls-cert and --tls-key"
        );
    }
    Ok(())
}

/// The shortest interval between two returns of free memory.
const RETURN_EVERY: Duration = Duration::from_secs(2);

/// Released bytes of buffers that are worth a return.
const MIN_RETURN: u64 = 16 << 20;

/// Returns memory to the system after bursts on many connections. Without it, their buffers stay in
/// the allocator, since it cannot release a page below a block in use.
async fn return_memory() {
    let mut returned = 0;
    loop {
        tokio::time::sleep(RETURN_EVERY).await;
        let released = afterimage_wire::server::released_bytes();
        if released - returned >= MIN_RETURN {
            returned = released;
            // It fails only while the runtime ends.
            let _ = tokio::task::spawn_blocking(afterimage_cache::return_free_memory).await;
        }
    }
}

/// Makes a write above the file size limit (`ulimit -f`) fail like one on a full disk, in every
/// command. The signal's default action ends the process, and what it has measured is lost.
#[cfg(unix)]
pub(crate) fn ignore_file_size_limit() {
    use tokio::signal::unix::{SignalKind, signal};
    let too_large = SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw());
    // The handler stays when the runtime ends.
    if let Ok(runtime) = Builder::new_current_thread().enable_io().build() {
        let _guard = runtime.enter();
        let _ = signal(too_large);
    }
}

#[cfg(not(unix))]
pub(crate) fn ignore_file_size_limit() {}

/// Handlers of SIGUSR1 and SIGUSR2, which do nothing. Their default action ends the process without
/// a drain, and other servers reopen their logs on them.
#[cfg(unix)]
fn ignore_user_signals() -> [Option<tokio::signal::unix::Signal>; 2] {
    use tokio::signal::unix::{SignalKind, signal};
    [SignalKind::user_defined1(), SignalKind::user_defined2()].map(|kind| signal(kind).ok())
}

#[cfg(not(unix))]
fn ignore_user_signals() {}

/// The file descriptors that a service needs for this many connections.
#[cfg(unix)]
pub(crate) fn descriptors_for(connections: usize) -> u64 {
    // Listeners, clients of other services, snapshots, the runtime's own, and connections that are
    // refused or evicted and still closing.
    const OTHERS: u64 = 64 + 320;
    connections as u64 + OTHERS
}

/// Raises the soft limit of file descriptors to the need of `--max-connections`. It is often far
/// below the hard limit.
#[cfg(unix)]
pub(crate) fn raise_descriptor_limit(connections: usize) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let needed = descriptors_for(connections);
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
