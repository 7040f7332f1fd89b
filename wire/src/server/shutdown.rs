//! The signals to stop: SIGTERM, SIGINT and SIGQUIT.

/// Ready when the process receives SIGTERM, SIGINT or SIGQUIT (Ctrl-C on other systems). A second
/// signal while the server drains ends the process at once, with exit code 130.
///
/// The handlers are installed by this call, not by the first poll: call it before a supervisor
/// learns that the service is ready.
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

/// The signals to stop; `None` if no handler could be installed. The default action of a signal
/// then ends the process without a drain.
#[cfg(unix)]
struct Signals(Option<[tokio::signal::unix::Signal; 3]>);

#[cfg(unix)]
impl Signals {
    fn listen() -> Self {
        use tokio::signal::unix::{SignalKind, signal};
        let install = || {
            let [terminate, interrupt, quit] =
                [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()];
            std::io::Result::Ok([signal(terminate)?, signal(interrupt)?, signal(quit)?])
        };
        Signals(install().ok())
    }

    async fn next(&mut self) {
        let Some([terminate, interrupt, quit]) = &mut self.0 else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
            _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
            _ = quit.recv() => tracing::info!("SIGQUIT: draining"),
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
