//! The start of a connection with TLS: the handshake before its first frame.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::HandshakeKind;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::Place;
use super::connection::{Connection, DRAIN_QUIET};
use super::end::{End, Refusal};
use super::greeting::begins_tls;
use super::metrics::Counters;
use super::service::Service;
use super::shared::Shared;
use crate::sched::one_poll_per_turn;
use crate::tls::ServerTls;

/// Bytes of one read below TLS, which reads 4 KiB by itself. Half of them may stay in memory while
/// the connection does not read.
const READ_LEN: usize = 8 << 10;

/// Bytes of the first read: enough to recognize TLS.
const FIRST_LEN: usize = 1 << 10;

/// Bytes that a TLS session encrypts before it sends them. It keeps them while the peer does not
/// read.
const SEND_LEN: usize = 8 << 10;

/// Bytes that a TLS session has in the budget of all buffers: a record that is being decrypted, and
/// encrypted bytes. It gets them even if the budget is exhausted.
const TLS_BUFFERS: usize = (16 << 10) + READ_LEN / 2 + SEND_LEN;

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
    let _counted = shared.buffers.take(TLS_BUFFERS);
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

/// Sends a connection above a limit the reason, after a TLS handshake.
pub(super) async fn refuse<S: Service>(
    shared: &Shared<S>,
    io: impl AsyncRead + AsyncWrite + Unpin,
    text: String,
    turn: OwnedSemaphorePermit,
) {
    let Some(tls) = &shared.options.tls else { return };
    let accepting = TlsAcceptor::from(tls.config()).accept(io);
    let accepting = one_poll_per_turn(&shared.tls_permits, accepting);
    if let Ok(Ok(stream)) = timeout(shared.options.handshake_timeout, accepting).await {
        super::refuse(stream, text, Some(turn)).await;
    }
}

/// Outcome of the first step on a connection of a server with TLS.
enum Secured<IO> {
    Tls(Box<TlsStream<Ahead<IO>>>),
    /// The first bytes are not TLS.
    Not(Ahead<IO>),
    /// The handshake failed; its alert may still be on its way.
    Failed(io::Error, Ahead<IO>),
}

async fn secure<S: Service, IO: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared<S>,
    tls: &ServerTls,
    io: IO,
) -> Result<Secured<IO>, End> {
    let mut io = Ahead { io, bytes: Vec::new(), start: 0 };
    // A silent peer waits here and uses no TLS permit.
    io.read_first().await.map_err(End::Io)?;
    if io.bytes.is_empty() {
        return Err(End::Closed);
    }
    if !begins_tls(&io.bytes) {
        return Ok(Secured::Not(io));
    }
    let accepting = TlsAcceptor::from(tls.config()).accept(io).into_fallible();
    match one_poll_per_turn(&shared.tls_permits, accepting).await {
        Ok(mut stream) => {
            stream.get_mut().1.set_buffer_limit(Some(SEND_LEN));
            let resumed = stream.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
            Counters::add(&shared.counters.tls_handshakes, 1);
            Counters::add(&shared.counters.tls_resumed, resumed.into());
            Ok(Secured::Tls(Box::new(stream)))
        }
        Err((error, io)) => Ok(Secured::Failed(error, io)),
    }
}

/// A transport that reads more than TLS asks for. The bytes ahead are freed as soon as TLS has
/// taken them, so a quiet connection has none.
struct Ahead<IO> {
    io: IO,
    bytes: Vec<u8>,
    start: usize,
}

impl<IO: AsyncRead + Unpin> Ahead<IO> {
    async fn read_first(&mut self) -> io::Result<()> {
        let mut first = [0; FIRST_LEN];
        let len = self.io.read(&mut first).await?;
        self.bytes = first[..len].to_vec();
        Ok(())
    }
}

impl<IO: AsyncRead + Unpin> AsyncRead for Ahead<IO> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.start == self.bytes.len() {
            if buf.remaining() >= READ_LEN {
                return Pin::new(&mut self.io).poll_read(cx, buf);
            }
            let mut block = [const { MaybeUninit::uninit() }; READ_LEN];
            let mut block = ReadBuf::uninit(&mut block);
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut block))?;
            let (now, later) = block.filled().split_at(buf.remaining().min(block.filled().len()));
            buf.put_slice(now);
            (self.bytes, self.start) = (later.to_vec(), 0);
            return Poll::Ready(Ok(()));
        }
        let ahead = &self.bytes[self.start..];
        let len = ahead.len().min(buf.remaining());
        buf.put_slice(&ahead[..len]);
        self.start += len;
        if self.start == self.bytes.len() {
            (self.bytes, self.start) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite + Unpin> AsyncWrite for Ahead<IO> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Closes the sending half, and discards input for a moment.
async fn see_off(mut io: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<()> {
    io.shutdown().await?;
    tokio::io::copy(&mut io.take(LINGER_BYTES), &mut tokio::io::sink()).await?;
    Ok(())
}
