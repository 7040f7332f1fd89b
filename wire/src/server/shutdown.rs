//! When to stop: SIGTERM or SIGINT.

/// Ready when the process is asked to stop: SIGTERM or SIGINT (Ctrl-C elsewhere). A second signal
/// while the first one's draining goes on ends the process at once with exit code 130, so that an
/// impatient operator is obeyed.
pub async fn until_terminated() {
    signal().await;
    tokio::spawn(async {
        signal().await;
        std::process::exit(130);
    });
}

#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(mut terminate), Ok(mut interrupt)) => {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
                _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
            }
        }
        // No handler, no graceful end; the signal's default action still ends the process.
        _ => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn signal() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}
