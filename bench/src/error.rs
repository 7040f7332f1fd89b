//! The errors of a run.

use std::io;
use std::net::SocketAddr;

use afterimage_wire::Status;
use afterimage_wire::proto::{BodyError, FrameError, Role, Shape};

use crate::report::Report;

/// Why there is no report, or none to be believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BenchError {
    /// The plan contradicts itself. Mend the field that the text names.
    #[error("the plan cannot be run: {what}")]
    Plan {
        /// Which field, its value and what it may be.
        what: String,
    },
    /// Nobody answers there, or the connection broke before the handshake was over.
    #[error("cannot connect to {addr}: {source}")]
    Connect {
        /// Where.
        addr: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// The server does not want to talk to us: mostly a wrong token.
    #[error("{addr} refuses the connection: {status}: {text}")]
    Refused {
        /// Where.
        addr: SocketAddr,
        /// The server's reason.
        status: Status,
        /// The same for people.
        text: String,
    },
    /// What answers there does not speak the protocol.
    #[error("{addr} does not speak the protocol: {what}")]
    Protocol {
        /// Where.
        addr: SocketAddr,
        /// What came instead.
        what: String,
    },
    /// The server is of another kind than the target needs.
    #[error("{addr} is a {service}, which does not answer such requests")]
    Service {
        /// Where.
        addr: SocketAddr,
        /// What it says it is.
        service: Role,
    },
    /// The server's model takes other images than the population has.
    #[error("{addr} takes images of {shape} bytes; the population's have {image_len}")]
    Shape {
        /// Where.
        addr: SocketAddr,
        /// What the server takes.
        shape: Shape,
        /// Bytes in an image of the population.
        image_len: usize,
    },
    /// A load thread could not be tied to its CPU.
    #[error("cannot tie a load thread to CPU {cpu}: {source}")]
    Pin {
        /// Which CPU.
        cpu: usize,
        /// What the system says.
        source: io::Error,
    },
    /// The server gave wrong answers, or replies that nobody asked for. No figure of such a run
    /// means anything; the report is here to find the cause.
    #[error("{} wrong answers and {} replies that nobody asked for{}",
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
