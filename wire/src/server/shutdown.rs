//! When to stop: SIGTERM or SIGINT.

/// Ready when the process is asked to stop: SIGTERM or SIGINT (Ctrl-C elsewhere). A second signal
/// while the first one's draining goes on ends the process at once with exit code 130, so that an
/// impatient operator is obeyed.
///
/// Signals count from this call on, not only once the future is polled: call it before you tell
/// anybody that you are there.
///
/// # Panics
/// Outside of a tokio runtime with I/O enabled.
pub fn until_terminated() -> impl Future<Output = ()> + Send {
    let mut signals = Signals::listen();
    async move {
        signals.next().await;
        tokio::spawn(async move {
            signals.next().await;
            std::process::exit(130);
        });
    }
}

/// The signals to stop; `None` when no handler could be installed. There is no graceful end then;
/// the signal's default action still ends the process.
#[cfg(unix)]
struct Signals(Option<(tokio::signal::unix::Signal, tokio::signal::unix::Signal)>);

#[cfg(unix)]
impl Signals {
    fn listen() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        Signals(signal(SignalKind::terminate()).ok().zip(signal(SignalKind::interrupt()).ok()))
    }

    async fn next(&mut self) {
        let Some((terminate, interrupt)) = &mut self.0 else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn listen() -> Self {
        Signals
    }

    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
