//! The sockets of a process: those that systemd passes (socket activation), or its own.
//!
//! A passed socket is used for the listener with the same address. So a unit `memo.socket` with
//! `ListenStream=127.0.0.1:7400` needs no other flags than `--listen 127.0.0.1:7400`, and clients
//! can connect while the service restarts.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};

use afterimage_wire::server::ServerOptions;
use listenfd::ListenFd;
use tokio::net::TcpListener;

use crate::config::ListenerConfig;
use crate::process::ConfigError;

/// The sockets that no listener has taken yet.
pub(crate) struct Sockets {
    passed: Vec<(SocketAddr, StdListener)>,
}

impl Sockets {
    /// The sockets that were passed to this process (`LISTEN_FDS`, `LISTEN_PID`). The first call
    /// takes them.
    pub(crate) fn of_process() -> Self {
        let mut found = ListenFd::from_env();
        let mut passed = Vec::new();
        for index in 0..found.len() {
            let socket = found.take_tcp_listener(index).and_then(|socket| match socket {
                Some(socket) => Ok(Some((socket.local_addr()?, socket))),
                None => Ok(None),
            });
            match socket {
                Ok(socket) => passed.extend(socket),
                Err(error) => tracing::warn!(
                    "file descriptor {} was passed and is not a TCP socket: {error}",
                    // The first one after the standard streams.
                    3 + index
                ),
            }
        }
        Sockets { passed }
    }

    /// Takes the ports of these listeners.
    pub(crate) async fn take_all(
        &mut self,
        listeners: &[ListenerConfig],
    ) -> Result<Vec<(TcpListener, SocketAddr, ServerOptions)>, ConfigError> {
        let mut sockets = Vec::new();
        for ListenerConfig { address, options } in listeners {
            let (socket, bound) = self.take(*address).await?;
            sockets.push((socket, bound, options.clone()));
        }
        Ok(sockets)
    }

    /// Takes a port: the passed socket with this address, or a new one.
    pub(crate) async fn take(
        &mut self,
        address: SocketAddr,
    ) -> Result<(TcpListener, SocketAddr), ConfigError> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::AddrInUse => ConfigError::InUse(address),
            _ => ConfigError::Listen(address, error),
        };
        let passed = self.passed.iter().position(|(passed, _)| *passed == address);
        let socket = match passed {
            Some(index) => {
                let (_, socket) = self.passed.swap_remove(index);
                tracing::info!("listens on the socket {address} that the process was given");
                socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket))
            }
            None => TcpListener::bind(address).await,
        };
        let socket = socket.map_err(failed)?;
        let bound = socket.local_addr().map_err(failed)?;
        Ok((socket, bound))
    }

    /// Logs the passed sockets that no listener has taken, and closes them.
    pub(crate) fn warn_of_unused(self) {
        for (address, _) in self.passed {
            tracing::warn!(
                "the process was given a socket on {address}, and no listener has this address; \
                 check --listen and the socket unit"
            );
        }
    }
}
