//! One connection: the handshake, then bytes out and frames in, none of it copied more than once.

use std::io::{self, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use afterimage_wire::proto::header::MAX_HANDSHAKE_BODY;
use afterimage_wire::proto::{Frame, FrameError, HEADER_LEN, Header, Hello, Message, Welcome};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::plan::BenchError;

/// The largest body of a reply that a load generator has any use for: the longest error text, and
/// room. More is a server gone astray.
const MAX_REPLY_BODY: u32 = 4096;

/// Bytes that one read may bring. Big enough for thousands of replies, small enough for the L2 cache.
const INPUT_LEN: usize = 128 << 10;

const _: () = assert!(INPUT_LEN > HEADER_LEN + MAX_REPLY_BODY as usize);
const _: () = assert!(INPUT_LEN > HEADER_LEN + MAX_HANDSHAKE_BODY as usize);

/// How long a read that may block does so at most. Time limits are noticed this late.
const TICK: Duration = Duration::from_millis(50);

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    /// Encoded and not yet taken by the kernel: `output[output_at..]`.
    pub(crate) output: Vec<u8>,
    output_at: usize,
    input: Vec<u8>,
    input_start: usize,
    input_end: usize,
}

/// Why a connection can be used no more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    #[error("the server closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
}

impl From<Errno> for Lost {
    fn from(errno: Errno) -> Self {
        Lost::Io(errno.into())
    }
}

/// Whether a read may wait for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// It returns at once.
    No,
    /// It waits, for some milliseconds at most.
    Some,
}

impl Connection {
    /// Connects, says hello and hears the welcome, within `timeout` for each step.
    pub(crate) fn open(
        addr: SocketAddr,
        token: &[u8],
        timeout: Duration,
    ) -> Result<(Self, Welcome), BenchError> {
        let failed = |source| BenchError::Connect { addr, source };
        let stream = TcpStream::connect_timeout(&addr, timeout).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(timeout)).map_err(failed)?;
        stream.set_write_timeout(Some(timeout)).map_err(failed)?;
        let mut connection = Connection {
            stream,
            output: Vec::new(),
            output_at: 0,
            input: vec![0; INPUT_LEN],
            input_start: 0,
            input_end: 0,
        };
        Message::Hello(Hello::new(token)).encode(0, &mut connection.output);
        connection.stream.write_all(&connection.output).map_err(failed)?;
        connection.output.clear();
        let welcome = loop {
            if connection.receive(Wait::Some).map_err(|lost| failed(lost.into_io()))? == 0 {
                return Err(failed(io::ErrorKind::TimedOut.into()));
            }
            let bytes = &connection.input[..connection.input_end];
            let frame = Frame::decode(bytes, MAX_HANDSHAKE_BODY)
                .map_err(|error| BenchError::frame(addr, error))?;
            let Some(frame) = frame else { continue };
            match Message::decode(frame).map_err(|error| BenchError::body(addr, error))? {
                Message::Welcome(welcome) => {
                    connection.input_start = frame.header.frame_len();
                    break welcome;
                }
                Message::Error { status, text, .. } => {
                    return Err(BenchError::Refused { addr, status, text: text.to_owned() });
                }
                _ => {
                    let what = format!("a {} where a Welcome belongs", frame.header.kind.name());
                    return Err(BenchError::Protocol { addr, what });
                }
            }
        };
        connection.stream.set_read_timeout(Some(TICK)).map_err(failed)?;
        Ok((connection, welcome))
    }

    /// Whether bytes wait for the kernel to take them.
    pub(crate) fn has_output(&self) -> bool {
        self.output_at < self.output.len()
    }

    /// Hands the output to the kernel, as much as it takes without waiting.
    pub(crate) fn flush(&mut self) -> Result<(), Lost> {
        while self.has_output() {
            let rest = &self.output[self.output_at..];
            match send(&self.stream, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => self.output_at += sent,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.output.clear();
        self.output_at = 0;
        Ok(())
    }

    /// Reads once. Returns how many bytes came: 0 for none yet.
    pub(crate) fn receive(&mut self, wait: Wait) -> Result<usize, Lost> {
        if self.input_start > 0 {
            // What is left is part of one frame.
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
        }
        let flags = match wait {
            Wait::No => RecvFlags::DONTWAIT,
            Wait::Some => RecvFlags::empty(),
        };
        match recv(&self.stream, &mut self.input[self.input_end..], flags) {
            Ok((0, _)) => Err(Lost::Closed),
            Ok((len, _)) => {
                self.input_end += len;
                Ok(len)
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Passes every whole frame that has been received to `each`, in place.
    ///
    /// Header and body go separately, in registers: a [`Frame`] handed through memory cost a third of
    /// the time of a small reply.
    #[inline]
    pub(crate) fn frames(&mut self, mut each: impl FnMut(Header, &[u8])) -> Result<(), Lost> {
        let mut rest = &self.input[self.input_start..self.input_end];
        while let Some(header) = Header::decode(rest) {
            if header.body_len > MAX_REPLY_BODY {
                return Err(FrameError::TooLarge { header, limit: MAX_REPLY_BODY }.into());
            }
            let Some((frame, behind)) = rest.split_at_checked(header.frame_len()) else {
                break;
            };
            rest = behind;
            each(header, &frame[HEADER_LEN..]);
        }
        self.input_start = self.input_end - rest.len();
        Ok(())
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Lost {
    fn into_io(self) -> io::Error {
        match self {
            Lost::Closed => io::ErrorKind::UnexpectedEof.into(),
            Lost::Io(error) => error,
            Lost::Frame(error) => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}
