//! The transport of a connection: a socket, with or without TLS.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

use afterimage_wire::proto::FrameError;
use afterimage_wire::tls::ClientTls;
use afterimage_wire::tls::rustls::ClientConnection;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// The size of a read beneath TLS: some records.
const ARRIVED_LEN: usize = 64 << 10;

/// The reason why a connection is unusable.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    #[error("the server closed the connection")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Senseless(String),
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

/// A connected socket, with or without TLS.
#[derive(Debug)]
pub(crate) struct Channel {
    pub(crate) stream: TcpStream,
    tls: Option<Box<Tls>>,
}

#[derive(Debug)]
struct Tls {
    session: ClientConnection,
    /// Bytes of the socket that the session has not taken yet: `arrived[start..end]`.
    arrived: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Channel {
    /// The stream, after the TLS handshake if `tls` is given. The stream's time limits apply.
    pub(crate) fn new(mut stream: TcpStream, tls: Option<&ClientTls>) -> io::Result<Self> {
        let tls = match tls {
            None => None,
            Some(tls) => {
                let name = tls.name_for(&host(stream.peer_addr()?)).map_err(io::Error::other)?;
                let mut session =
                    ClientConnection::new(tls.config(), name).map_err(io::Error::other)?;
                while session.is_handshaking() {
                    session.complete_io(&mut stream)?;
                }
                let arrived = vec![0; ARRIVED_LEN].into();
                Some(Box::new(Tls { session, arrived, start: 0, end: 0 }))
            }
        };
        Ok(Channel { stream, tls })
    }

    /// Hands bytes over, as many as are taken without waiting: [`Errno::AGAIN`] for none.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<usize, Lost> {
        let Some(tls) = &mut self.tls else {
            return Ok(send(&self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?);
        };
        tls.flush(&self.stream)?;
        let taken = tls.session.writer().write(bytes)?;
        match tls.flush(&self.stream) {
            Err(Lost::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
            flushed => flushed?,
        }
        Ok(taken)
    }

    /// Whether taken bytes wait for the kernel.
    pub(crate) fn keeps(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.session.wants_write())
    }

    /// Hands the kept bytes to the kernel, as many as it takes.
    pub(crate) fn flush(&mut self) -> Result<(), Lost> {
        match &mut self.tls {
            None => Ok(()),
            Some(tls) => tls.flush(&self.stream),
        }
    }

    /// Reads: the number of bytes, 0 at the end of the stream.
    pub(crate) fn recv(&mut self, into: &mut [u8], wait: Wait) -> Result<usize, Lost> {
        match &mut self.tls {
            None => Ok(recv(&self.stream, into, wait.flags())?.0),
            Some(tls) => tls.recv(&self.stream, into, wait),
        }
    }
}

impl Lost {
    pub(crate) fn into_io(self) -> io::Error {
        match self {
            Lost::Closed => io::ErrorKind::UnexpectedEof.into(),
            Lost::Io(error) => error,
            Lost::Senseless(what) => io::Error::new(io::ErrorKind::InvalidData, what),
            Lost::Frame(error) => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Tls {
    fn flush(&mut self, stream: &TcpStream) -> Result<(), Lost> {
        while self.session.wants_write() {
            self.session.write_tls(&mut Unwaiting(stream))?;
        }
        Ok(())
    }

    /// Reads all available bytes: `poll` does not report bytes that are left here.
    fn recv(&mut self, stream: &TcpStream, into: &mut [u8], wait: Wait) -> Result<usize, Lost> {
        let mut len = 0;
        loop {
            match self.session.reader().read(&mut into[len..]) {
                Ok(0) => return Ok(len),
                Ok(read) => {
                    len += read;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if self.start == self.end {
                if len > 0 {
                    return Ok(len);
                }
                (self.start, self.end) = (0, recv(stream, &mut *self.arrived, wait.flags())?.0);
            }
            let mut rest = &self.arrived[self.start..self.end];
            self.start += self.session.read_tls(&mut rest)?;
            self.session.process_new_packets().map_err(io::Error::other)?;
        }
    }
}

impl Wait {
    fn flags(self) -> RecvFlags {
        match self {
            Wait::No => RecvFlags::DONTWAIT,
            Wait::Some => RecvFlags::empty(),
        }
    }
}

/// Writes to a socket without waiting, independent of the socket's settings.
struct Unwaiting<'a>(&'a TcpStream);

impl Write for Unwaiting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match send(self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Err(Errno::AGAIN) => Err(io::ErrorKind::WouldBlock.into()),
            sent => Ok(sent?),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn host(addr: SocketAddr) -> String {
    addr.ip().to_string()
}
