//! What every service does to start: a runtime, a socket, a line that says where, and a good end.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use afterimage_cache::SnapshotWriter;
use afterimage_wire::server::{Server, ServerOptions, Service, until_terminated};
use afterimage_wire::tls::ServerTls;
use anyhow::{Context, bail};
use tokio::runtime::{Builder, Runtime};

use crate::args::ServerArgs;
use crate::print::say;

/// A runtime with this many threads for sockets. One needs no work-stealing between threads and is
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

/// Serves what `build` makes on `listen` until SIGTERM or SIGINT. `build` runs inside the runtime,
/// since clients of other services live there.
pub(crate) fn serve<S: Service>(
    args: &ServerArgs,
    listen: &str,
    build: impl FnOnce() -> anyhow::Result<S>,
) -> anyhow::Result<()> {
    let options = args.options()?;
    make_room_for(options.max_connections);
    let addr = resolve(listen)?;
    if !addr.ip().is_loopback() {
        check_exposed(listen, &options, args.insecure())?;
    }
    runtime(args.threads())?.block_on(async {
        if let Some(tls) = &options.tls {
            tokio::spawn(tls.keep_current());
        }
        let service = Arc::new(build()?);
        let kind = service.identity().service;
        let server = Server::bind(addr, service, options)
            .await
            .with_context(|| format!("cannot listen on {addr}"))?;
        // Before anybody knows that we are there: whoever does may end us at once.
        let terminated = until_terminated();
        // For as long as we serve.
        let _full = keep_on_when_a_file_cannot_grow();
        // On standard output, so that whoever started us learns the port. A service whose starter
        // does not want to know serves all the same.
        let addr = server.local_addr()?;
        let _ = say!("{kind} listening on {addr}");
        server.serve(terminated).await;
        Ok(())
    })
}

/// What a service must ask of those who reach it from other machines: a token, or certificates. TLS
/// alone hides what is said, and lets everybody in.
fn check_exposed(listen: &str, options: &ServerOptions, insecure: bool) -> anyhow::Result<()> {
    let asks_for_certificates = options.tls.as_ref().is_some_and(ServerTls::asks_for_certificates);
    if options.token.is_none() && !asks_for_certificates && !insecure {
        let but =
            if options.tls.is_some() { "TLS alone lets anybody in" } else { "anybody may come" };
        bail!(
            "--listen {listen} can be reached from other machines, and {but}: give --token-file or \
             --tls-client-ca, or --insecure if that is meant"
        );
    }
    if options.token.is_some() && options.tls.is_none() {
        tracing::warn!(
            "clients show their token in clear on {listen}: where the network is not yours, give \
             --tls-cert and --tls-key, or put TLS in front"
        );
    }
    Ok(())
}

/// A file above the process's limit (`ulimit -f`) is an error of the write, as on a full disk, and
/// not the end of the process: that is what a signal means that somebody listens to.
#[cfg(unix)]
fn keep_on_when_a_file_cannot_grow() -> Option<tokio::signal::unix::Signal> {
    let too_large = rustix::process::Signal::XFSZ.as_raw();
    tokio::signal::unix::signal(tokio::signal::unix::SignalKind::from_raw(too_large)).ok()
}

#[cfg(not(unix))]
fn keep_on_when_a_file_cannot_grow() {}

/// Writes a table's last snapshot, when all connections are closed.
pub(crate) fn last_snapshot(writer: Option<SnapshotWriter>) -> anyhow::Result<()> {
    if let Some(writer) = writer {
        writer.finish()?;
    }
    Ok(())
}

/// Makes room for as many connections as are allowed: each takes a file descriptor, and the soft
/// limit is often far below what the system grants to whoever asks.
#[cfg(unix)]
fn make_room_for(connections: usize) {
    use rustix::process::{Resource, getrlimit, setrlimit};
    // Listeners, clients of other services, snapshots, the runtime's own.
    const OTHERS: u64 = 64;
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
            "--max-connections is {connections}, and the system lets this process have {current} \
             file descriptors: raise the limit (ulimit -n), or allow fewer connections"
        );
    }
}

#[cfg(not(unix))]
fn make_room_for(_: usize) {}

/// The host of a host:port.
pub(crate) fn host(place: &str) -> &str {
    place.rsplit_once(':').map_or(place, |(host, _port)| host)
}

/// Whether what is sent to this host:port stays on this machine.
pub(crate) fn is_here(place: &str) -> bool {
    let host = host(place).trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// The first address that `text` (host:port) stands for.
pub(crate) fn resolve(text: &str) -> anyhow::Result<SocketAddr> {
    let mut found = text.to_socket_addrs().with_context(|| format!("{text:?} is no host:port"))?;
    found.next().with_context(|| format!("{text:?} has no address"))
}
