//! Connections of HTTP/2 alone, whose streams go to the service without hyper: for gRPC.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::server::Builder;
use h2::{Ping, Reason, RecvStream};
use hyper::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use crate::connection::{Active, Activity, CONNECTION_WINDOW, STREAM_WINDOW};
use crate::listener::{Connections, Peer, listen};
use crate::options::HttpOptions;
use crate::respond::{Resets, Respond};
use crate::transport::Transport;

/// The largest frame of a client. One frame then has a whole tensor of usual size, and it is not
/// copied.
const MAX_FRAME: u32 = 1 << 20;

/// The interval of pings while calls are in flight. A client that answers none within the same time
/// is gone: its calls end.
const PING_EVERY: Duration = Duration::from_secs(30);

/// The time for an idle client to close a connection after GOAWAY.
const GOODBYE: Duration = Duration::from_secs(2);

/// The protocols that TLS offers (ALPN).
const PROTOCOLS: [&[u8]; 1] = [b"h2"];

/// A service of HTTP/2 streams.
pub trait StreamService: Send + Sync + 'static {
    /// Serves one stream. The listener drops the future when the connection ends. A stream that the
    /// client resets must be noticed with [`Respond::reset`].
    fn call(
        &self,
        request: Request<RecvStream>,
        respond: Respond,
        peer: &Arc<Peer>,
    ) -> impl Future<Output = ()> + Send + 'static;
}

/// Serves HTTP/2 connections of `socket`, with the limits of [`serve`](crate::serve), until `stop`
/// is cancelled, and then for `drain_timeout` at most. HTTP/1.1 is refused.
pub async fn serve_streams(
    socket: TcpListener,
    service: impl StreamService,
    options: HttpOptions,
    stop: CancellationToken,
) {
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(options.max_streams)
        .max_header_list_size(options.max_header_bytes)
        .max_pending_accept_reset_streams(options.max_reset_streams)
        .max_frame_size(MAX_FRAME)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let connections = Streams { service, options: options.clone(), builder };
    listen(socket, connections, &PROTOCOLS, options, stop).await;
}

struct Streams<S> {
    service: S,
    options: HttpOptions,
    builder: Builder,
}

impl<S: StreamService> Connections for Streams<S> {
    const IS_HTTP2_ALONE: bool = true;

    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        activity: Arc<Activity>,
        stop: CancellationToken,
    ) {
        let transport = Transport::new(stream, self.options.write_timeout, Arc::clone(&activity));
        let handshake = self.builder.handshake::<_, Bytes>(Box::pin(transport));
        let handshake = timeout(self.options.header_timeout, handshake);
        let handshake = tokio::select! {
            handshake = handshake => handshake,
            () = stop.cancelled() => return,
        };
        let mut connection = match handshake {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                tracing::debug!(address = %peer.address, %error, "no HTTP/2 handshake");
                return;
            }
            Err(_) => {
                tracing::debug!(address = %peer.address, "an HTTP/2 handshake took too long");
                return;
            }
        };
        activity.established();
        let peer = Arc::new(peer);
        let resets = Arc::new(Resets::new(self.options.max_resets));
        let mut calls = JoinSet::new();
        let mut pings = connection.ping_pong();
        let mut alive_until = None;
        let mut next_ping = pin!(sleep_until(Instant::now() + PING_EVERY));
        let (mut is_stopping, mut closes_at) = (false, None);
        loop {
            if resets.exceeded.is_cancelled() {
                tracing::debug!(address = %peer.address, "the client resets too many streams");
                // The calls end first, so that the service has no work for this client.
                drop(calls);
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                let closed = std::future::poll_fn(|context| connection.poll_closed(context));
                let _ = timeout(GOODBYE, closed).await;
                return;
            }
            let closing = async {
                match closes_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                accepted = connection.accept() => match accepted {
                    Some(Ok((request, respond))) => {
                        let mut respond = Respond::new(respond, &resets);
                        if respond.is_reset() {
                            continue;
                        }
                        let active = Active::new(&activity);
                        let mut call = Box::pin(self.service.call(request, respond, &peer));
                        // Most calls are answered from memory and end at once. A task of their own
                        // would cost more than the answer.
                        let is_done = std::future::poll_fn(|context| {
                            std::task::Poll::Ready(call.as_mut().poll(context).is_ready())
                        });
                        if !is_done.await {
                            calls.spawn(async move {
                                call.await;
                                drop(active);
                            });
                        }
                    }
                    Some(Err(error)) => {
                        tracing::debug!(address = %peer.address, %error, "a connection failed");
                        return;
                    }
                    None => return,
                },
                Some(_) = calls.join_next() => {}
                // The loop begins with the end of the connection.
                () = resets.exceeded.cancelled() => {}
                () = stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    connection.graceful_shutdown();
                }
                reason = activity.expires(&self.options), if closes_at.is_none() => {
                    tracing::debug!(address = %peer.address, reason, "closing a connection");
                    connection.graceful_shutdown();
                    closes_at = Some(Instant::now() + GOODBYE);
                }
                // A call that arrived at the same time has its time.
                () = closing => match activity.is_idle() {
                    true => return,
                    false => closes_at = Some(Instant::now() + GOODBYE),
                },
                () = next_ping.as_mut() => {
                    next_ping.as_mut().reset(Instant::now() + PING_EVERY);
                    if activity.is_idle() {
                        continue;
                    }
                    if alive_until.is_some_and(|until| until <= Instant::now()) {
                        tracing::debug!(address = %peer.address, "the client answers no ping");
                        return;
                    }
                    if let Some(pings) = &mut pings
                        && pings.send_ping(Ping::opaque()).is_ok()
                    {
                        alive_until = Some(Instant::now() + PING_EVERY);
                    }
                }
                pong = async { match &mut pings {
                    Some(pings) => std::future::poll_fn(|context| pings.poll_pong(context)).await.is_ok(),
                    None => std::future::pending().await,
                } }, if alive_until.is_some() => {
                    if pong { alive_until = None; } else { return; }
                }
            }
        }
    }
}
