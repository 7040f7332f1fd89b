//! The start of a connection with TLS: the handshake before its first frame.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::HandshakeKind;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::Place;
use super::connection::{Connection, DRAIN_QUIET};
use super::counters::Counters;
use super::end::{End, Refusal};
use super::greeting::begins_tls;
use super::service::Service;
use super::shared::Shared;
use crate::sched::one_poll_per_turn;
use crate::tls::ServerTls;

/// Bytes of one read below TLS, which reads 4 KiB by itself: the longest record.
const READ_LEN: usize = 16 << 10;

/// How long and how much is read after a failed handshake, so that the close does not overtake the
/// alert.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 64 << 10;

/// Serves one connection with TLS until it ends. `place` frees its ticket after a valid `Hello`.
pub(super) async fn serve<S: Service>(
    shared: &Shared<S>,
    tls: &ServerTls,
    io: impl AsyncRead + AsyncWrite + Unpin,
    place: Option<Place>,
    drain: CancellationToken,
) -> End {
    let opened = Instant::now();
    let late = opened + shared.options.handshake_timeout;
    let secured = {
        let securing = timeout_at(late, secure(shared, tls, io));
        let drained = async {
            drain.cancelled().await;
            tokio::time::sleep(DRAIN_QUIET).await;
        };
        tokio::select! {
            biased;
            secured = securing => secured,
            () = drained => return End::Drained,
        }
    };
    match secured {
        Ok(Ok(Secured::Tls(stream))) => {
            Connection::new(shared, stream, place).opened_at(opened).run(drain).await
        }
        Ok(Ok(Secured::Not(io))) => {
            Connection::new(shared, io, place).opened_at(opened).without_tls().run(drain).await
        }
        Ok(Ok(Secured::Failed(error, io))) => {
            Counters::add(&shared.counters.tls_failed, 1);
            // The connection has failed whether or not this succeeds.
            let _ = timeout(LINGER, see_off(io)).await;
            End::Tls(error)
        }
        Ok(Err(end)) => end,
        Err(_) => {
            Counters::add(&shared.counters.tls_failed, 1);
            End::Refused(Refusal::TlsTimeout)
        }
    }
}

/// Outcome of the first step on a connection of a server with TLS.
enum Secured<IO> {
    Tls(Box<TlsStream<BufReader<IO>>>),
    /// The first bytes are not TLS.
    Not(BufReader<IO>),
    /// The handshake failed; its alert may still be on its way.
    Failed(io::Error, BufReader<IO>),
}

async fn secure<S: Service, IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared<S>,
    tls: &ServerTls,
    io: IO,
) -> Result<Secured<IO>, End> {
    let mut io = BufReader::with_capacity(READ_LEN, io);
    // A silent peer waits here and uses no TLS permit.
    let first = io.fill_buf().await.map_err(End::Io)?;
    if first.is_empty() {
        return Err(End::Closed);
    }
    if !begins_tls(first) {
        return Ok(Secured::Not(io));
    }
    let accepting = TlsAcceptor::from(tls.config()).accept(io).into_fallible();
    match one_poll_per_turn(&shared.tls_permits, accepting).await {
        Ok(stream) => {
            let resumed = stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
            Counters::add(&shared.counters.tls_handshakes, 1);
            Counters::add(&shared.counters.tls_resumed, resumed.into());
            Ok(Secured::Tls(Box::new(stream)))
        }
        Err((error, io)) => Ok(Secured::Failed(error, io)),
    }
}

/// Closes the sending half, and discards input for a moment.
async fn see_off(mut io: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    io.shutdown().await?;
    tokio::io::copy(&mut io.take(LINGER_BYTES), &mut tokio::io::sink()).await?;
    Ok(())
}
