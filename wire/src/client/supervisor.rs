//! The client's task: it connects, drives the connection, and reconnects when it is lost.

use std::future::poll_fn;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};

use super::connection::{Driver, Ended};
use super::connection_error::ConnectionError;
use super::connector::Connector;
use super::handshake::{Security, shake_hands};
use super::shared::Shared;
use super::state::Life;
use crate::proto::Welcome;
use crate::splitmix::SplitMix64;
use crate::stream::Streams;
use crate::text::{Escaped, Report};

/// Pause before the next attempt after a refusal: long enough not to burden the server, short
/// enough to notice a corrected configuration without a restart.
const REFUSED_WAIT: Duration = Duration::from_secs(5);

/// Time that a closed client has to write what is left.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Time that a server has after that to read it all and close: servers linger for a second.
const LINGER: Duration = Duration::from_secs(1);

/// Connections that may finish their requests before the next one must wait: a server that keeps
/// sending `GoAway` must not use up the client's sockets.
const MAX_DRAINING: usize = 4;

/// Keeps the client connected until it is closed.
pub(super) async fn supervise<C: Connector>(
    shared: Arc<Shared>,
    connector: C,
    security: impl Security,
) {
    let _end = End(Arc::clone(&shared));
    let clock = tokio::spawn(Arc::clone(&shared).keep_time());
    let _stop_clock = StopOnDrop(clock.abort_handle());
    let options = &shared.options;
    let seed = options.backoff_seed.unwrap_or_else(random_seed);
    let mut backoff = Backoff::new(options.backoff_min, options.backoff_max, seed);
    let mut attempt = 0;
    let mut failures = 0;
    loop {
        let server: Arc<str> = connector.address(attempt).into();
        let opened = tokio::select! {
            biased;
            () = shared.closed() => return,
            opened = open(&shared, &connector, &security, attempt) => opened,
        };
        attempt += 1;
        let mut wait = None;
        match opened {
            Ok((transport, welcome, input)) => {
                let welcome_name = welcome.name.clone();
                let welcome = Arc::new(welcome);
                let attached = Attached::new(&shared, &server, &welcome);
                let driver = Driver::new(
                    transport,
                    Arc::clone(&shared),
                    attached.number,
                    Arc::clone(&server),
                    welcome,
                    Arc::clone(&attached.streams),
                    &input,
                );
                if failures > 0 {
                    tracing::info!(%server, name = %Escaped(welcome_name), "connected");
                }
                failures = 0;
                match drive(driver, attached, &server).await {
                    Driven::Closed => return,
                    Driven::Unhealthy => {}
                    Driven::Healthy { go_away: false } => backoff.reset(),
                    Driven::Healthy { go_away: true } => {
                        if shared.lock().draining() < MAX_DRAINING {
                            backoff.reset();
                            wait = Some(Duration::ZERO);
                        }
                    }
                }
            }
            Err(error) => {
                // Warn on the first failure in a row and on every permanent one; log the rest at
                // debug.
                if error.is_permanent() || failures == 0 {
                    tracing::warn!(%server, error = %Escaped(Report(&error)), "cannot connect");
                } else {
                    tracing::debug!(%server, error = %Escaped(Report(&error)), "cannot connect");
                }
                failures += 1;
                let error = Arc::new(error);
                if error.is_permanent() {
                    wait = Some(REFUSED_WAIT / 2 + backoff.jitter(REFUSED_WAIT / 2));
                } else if failures % connector.addresses() != 0 {
                    wait = Some(Duration::ZERO);
                }
                shared.with(|state, effects| state.attempt_failed(server, error, effects));
            }
        }
        tokio::select! {
            biased;
            () = shared.closed() => return,
            () = sleep(wait.unwrap_or_else(|| backoff.next_delay())) => {}
        }
    }
}

async fn open<C: Connector, S: Security>(
    shared: &Shared,
    connector: &C,
    security: &S,
    attempt: u64,
) -> Result<(S::Secured<C::Transport>, Welcome, Vec<u8>), ConnectionError> {
    shared.lock().attempt();
    let after = shared.options.connect_timeout;
    let transport = match timeout(after, connector.connect(attempt)).await {
        Ok(Ok(transport)) => transport,
        Ok(Err(error)) => return Err(ConnectionError::Connect(error)),
        Err(_) => return Err(ConnectionError::ConnectTimeout { after }),
    };
    let after = shared.options.handshake_timeout;
    let shaking = async {
        let mut transport = security.secure(transport, connector.host(attempt)).await?;
        let (welcome, input) = shake_hands(&mut transport, &shared.options).await?;
        Ok((transport, welcome, input))
    };
    match timeout(after, shaking).await {
        Ok(shaken) => shaken,
        Err(_) => Err(ConnectionError::HandshakeTimeout { after }),
    }
}

/// How a driven connection ended.
enum Driven {
    Closed,
    Unhealthy,
    Healthy { go_away: bool },
}

async fn drive<T>(mut driver: Driver<T>, mut attached: Attached, server: &str) -> Driven
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let ended = until_flushed(&attached.shared, poll_fn(|cx| driver.poll_drive(cx))).await;
    let healthy = driver.is_healthy();
    match ended {
        None => return Driven::Closed,
        Some(Ended::Finished) => {
            linger(driver).await;
            return Driven::Closed;
        }
        Some(Ended::Lost(cause)) => {
            tracing::debug!(server, cause = %Escaped(Report(&cause)), "the connection is lost");
            attached.lose(cause);
        }
        Some(Ended::GoAway) => {
            tokio::spawn(drain(driver, attached));
            // At once, except for a server that does nothing but send `GoAway`.
            return if healthy { Driven::Healthy { go_away: true } } else { Driven::Unhealthy };
        }
    }
    if healthy { Driven::Healthy { go_away: false } } else { Driven::Unhealthy }
}

/// Drives a connection without new requests until the last one is answered.
async fn drain<T: AsyncRead + AsyncWrite + Unpin>(mut driver: Driver<T>, mut attached: Attached) {
    let ended = until_flushed(&attached.shared, poll_fn(|cx| driver.poll_drive(cx))).await;
    match ended {
        Some(Ended::Lost(cause)) => attached.lose(cause),
        Some(Ended::Finished) => {
            attached.lose(ConnectionError::ClosedByPeer);
            drop(attached);
            linger(driver).await;
        }
        _ => attached.lose(ConnectionError::ClosedByPeer),
    }
}

/// Waits briefly until the server has received all writes and closed the connection.
async fn linger<T: AsyncRead + AsyncWrite + Unpin>(driver: Driver<T>) {
    let _ = timeout(LINGER, driver.see_off()).await;
}

/// Waits for `driven`, but only briefly once the client is closed.
async fn until_flushed(shared: &Shared, driven: impl Future<Output = Ended>) -> Option<Ended> {
    let late = async {
        shared.closed().await;
        sleep(FLUSH_TIMEOUT).await;
    };
    tokio::select! {
        biased;
        ended = driven => Some(ended),
        () = late => None,
    }
}

/// A connection's entry in the shared state; removed when this is dropped, however its task ends.
struct Attached {
    shared: Arc<Shared>,
    number: u64,
    streams: Arc<Streams>,
    cause: Option<ConnectionError>,
}

impl Attached {
    fn new(shared: &Arc<Shared>, server: &Arc<str>, welcome: &Arc<Welcome>) -> Self {
        let now = shared.now();
        let (number, streams) = shared.with(|state, effects| {
            state.attach(now, Arc::clone(server), Arc::clone(welcome), effects)
        });
        Attached { shared: Arc::clone(shared), number, streams, cause: None }
    }

    fn lose(&mut self, cause: ConnectionError) {
        self.cause = Some(cause);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let cause = self.cause.take().unwrap_or_else(|| {
            // No cause is set: the task itself was dropped, and the client with it.
            self.shared.terminate();
            ConnectionError::ClosedByPeer
        });
        self.shared.with(|state, effects| state.lose(self.number, &Arc::new(cause), effects));
    }
}

/// Ends the client with its task, even if the runtime drops the task.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.terminate();
        self.0.with(|state, effects| {
            state.life = Life::Gone;
            effects.changed = true;
        });
    }
}

struct StopOnDrop(tokio::task::AbortHandle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The waits between failed attempts to connect. Pure: a seed goes in, durations come out.
///
/// Exponential with full jitter: each wait is drawn evenly from zero to a ceiling that doubles with
/// every failure. A thousand clients that lost the same server thus return spread over the whole
/// interval instead of together (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog,
/// 2015).
#[derive(Debug)]
pub(super) struct Backoff {
    min: Duration,
    max: Duration,
    ceiling: Duration,
    random: SplitMix64,
}

impl Backoff {
    /// Waits whose ceiling grows from `min` to `max`.
    pub(super) fn new(min: Duration, max: Duration, seed: u64) -> Self {
        let max = max.max(min);
        Backoff { min, max, ceiling: min, random: SplitMix64(seed) }
    }

    /// The next wait; the one after it may be twice as long.
    pub(super) fn next_delay(&mut self) -> Duration {
        let delay = self.jitter(self.ceiling);
        self.ceiling = self.ceiling.saturating_mul(2).min(self.max);
        delay
    }

    /// Starts again at `min`, after a healthy connection.
    pub(super) fn reset(&mut self) {
        self.ceiling = self.min;
    }

    /// A duration drawn evenly from zero to `ceiling`.
    pub(super) fn jitter(&mut self, ceiling: Duration) -> Duration {
        ceiling.mul_f64(self.random.share())
    }
}

/// A seed that differs from process to process and from call to call.
pub(super) fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(20);
    const MAX: Duration = Duration::from_secs(1);

    #[test]
    fn every_wait_is_below_a_doubling_ceiling() {
        for seed in 0..1000 {
            let mut backoff = Backoff::new(MIN, MAX, seed);
            let mut ceiling = MIN;
            for _ in 0..20 {
                assert!(backoff.next_delay() <= ceiling);
                ceiling = (ceiling * 2).min(MAX);
            }
            backoff.reset();
            assert!(backoff.next_delay() <= MIN);
        }
    }

    #[test]
    fn waits_are_spread_over_the_whole_interval() {
        let mut backoff = Backoff::new(MIN, MIN, 7);
        let mut quarters = [0; 4];
        for _ in 0..4000 {
            let delay = backoff.next_delay();
            quarters[(delay.as_secs_f64() / MIN.as_secs_f64() * 4.0) as usize] += 1;
        }
        assert!(quarters.iter().all(|&n| n > 800), "{quarters:?}");
    }

    #[test]
    fn a_maximum_below_the_minimum_is_raised_to_it() {
        let mut backoff = Backoff::new(MAX, MIN, 1);
        for _ in 0..100 {
            assert!(backoff.next_delay() <= MAX);
        }
    }
}
