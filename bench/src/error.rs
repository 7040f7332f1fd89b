//! The errors of a run.

use std::io;
use std::net::SocketAddr;

use afterimage_wire::Status;
use afterimage_wire::proto::{BodyError, FrameError, Role, Shape};
use afterimage_wire::text::escape_text;

use crate::report::Report;

/// The reason why a run has no valid report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The plan is invalid. The text names the field to change.
    #[error("the plan cannot be run: {what}")]
    Plan {
        /// The field, its value and the allowed values.
        what: String,
    },
    /// The server does not answer, or the connection broke during the handshake.
    #[error("cannot connect to {addr} ({source}); start the server, or correct the address")]
    Connect {
        /// The server.
        addr: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// The server refused the connection, mostly because of a wrong token.
    #[error("{addr} refused the connection: {status}: {}", escape_text(text))]
    Refused {
        /// The server.
        addr: SocketAddr,
        /// The server's reason.
        status: Status,
        /// The reason for people.
        text: String,
    },
    /// The server does not speak the protocol.
    #[error("{addr} does not speak the protocol: {what}")]
    Protocol {
        /// The server.
        addr: SocketAddr,
        /// The unexpected reply.
        what: String,
    },
    /// The kind of service does not fit the target.
    #[error("{addr} is a {service}, which does not take these requests")]
    Service {
        /// The server.
        addr: SocketAddr,
        /// Its kind.
        service: Role,
    },
    /// The images do not fit the server's model.
    #[error("{addr} takes images of {shape} bytes; the images of the population have {image_len}")]
    Shape {
        /// The server.
        addr: SocketAddr,
        /// The shape that the model takes.
        shape: Shape,
        /// Bytes in an image of the population.
        image_len: usize,
    },
    /// A load thread could not be pinned to its CPU.
    #[error("cannot pin a load thread to CPU {cpu}: {source}")]
    Pin {
        /// The CPU.
        cpu: usize,
        /// The error of the system.
        source: io::Error,
    },
    /// The server gave wrong answers, or replies to no request. The figures of such a run are
    /// invalid; the report helps to find the cause.
    #[error("{} wrong answers and {} replies to no request{}",
        .0.wrong, .0.unexpected, .0.first_example())]
    Wrong(Box<Report>),
}

impl BenchError {
    pub(crate) fn frame(addr: SocketAddr, error: FrameError) -> Self {
        BenchError::Protocol { addr, what: error.to_string() }
    }

    pub(crate) fn body(addr: SocketAddr, error: BodyError) -> Self {
        BenchError::Protocol { addr, what: error.to_string() }
    }
}
