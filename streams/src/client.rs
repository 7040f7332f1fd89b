//! A client of the streams service: sends a file, shows progress, and continues after lost
//! connections.

use std::io::{self, Read, Seek};
use std::time::Duration;

use afterimage_wire::Connection;
use afterimage_wire::client::CallError;
use afterimage_wire::stream::{Stream, StreamError, StreamReader};
use bytes::Bytes;
use tokio::task::JoinHandle;

use crate::message::{MAX_REPLY, Open, Reply, STREAM};
use crate::run::Report;

/// Bytes of a chunk.
const CHUNK: usize = 256 << 10;

/// Why a file has no result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SendError {
    /// The service could not be reached, or refused the connection.
    #[error("the service cannot be reached")]
    Call(#[from] CallError),
    /// The stream ended early.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The file cannot be read.
    #[error("cannot read the input")]
    Read(#[from] io::Error),
    /// The input is shorter than the part of it that was processed before.
    #[error("the input ends before byte {offset}, at which the run continues")]
    Short {
        /// The offset.
        offset: u64,
    },
    /// The run ended with an error.
    #[error("{0}")]
    Failed(String),
    /// The service broke the protocol.
    #[error("the service sent an invalid reply")]
    Reply,
}

impl SendError {
    /// Whether the same run may succeed later, at its checkpoint.
    pub fn is_retryable(&self) -> bool {
        match self {
            SendError::Call(error) => error.is_retryable(),
            SendError::Stream(error) => error.is_retryable(),
            _ => false,
        }
    }
}

/// The bytes of a run.
#[allow(async_fn_in_trait, reason = "callers name the type")]
pub trait Source {
    /// Moves to `offset`.
    ///
    /// # Errors
    /// If the input cannot be read, or ends before.
    async fn seek(&mut self, offset: u64) -> Result<(), SendError>;

    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// If the input cannot be read.
    async fn read(&mut self) -> Result<Bytes, SendError>;
}

/// A file, which can be read from any offset.
#[derive(Debug)]
pub struct Seekable<R>(Reader<R>);

impl<R: Read + Seek + Send + 'static> Seekable<R> {
    /// A file.
    pub fn new(file: R) -> Self {
        Seekable(Reader::new(file))
    }
}

impl<R: Read + Seek + Send + 'static> Source for Seekable<R> {
    async fn seek(&mut self, offset: u64) -> Result<(), SendError> {
        let file = self.0.idle().await?;
        if file.seek(io::SeekFrom::End(0))? < offset {
            return Err(SendError::Short { offset });
        }
        file.seek(io::SeekFrom::Start(offset))?;
        Ok(())
    }

    async fn read(&mut self) -> Result<Bytes, SendError> {
        Ok(self.0.read().await?)
    }
}

/// A pipe, which is read once. A run that continues reads and drops the bytes before its offset.
#[derive(Debug)]
pub struct Pipe<R> {
    reader: Reader<R>,
    position: u64,
    /// Bytes that were read and not sent.
    rest: Bytes,
}

impl<R: Read + Send + 'static> Pipe<R> {
    /// A pipe at its start.
    pub fn new(pipe: R) -> Self {
        Pipe { reader: Reader::new(pipe), position: 0, rest: Bytes::new() }
    }
}

impl<R: Read + Send + 'static> Source for Pipe<R> {
    async fn seek(&mut self, offset: u64) -> Result<(), SendError> {
        if offset < self.position {
            let text = format!("byte {offset} of a pipe cannot be read again");
            return Err(io::Error::new(io::ErrorKind::Unsupported, text).into());
        }
        while self.position < offset {
            let mut bytes = self.reader.read().await?;
            if bytes.is_empty() {
                return Err(SendError::Short { offset });
            }
            let skipped = (offset - self.position).min(bytes.len() as u64);
            self.rest = bytes.split_off(skipped as usize);
            self.position += skipped;
        }
        Ok(())
    }

    async fn read(&mut self) -> Result<Bytes, SendError> {
        let mut bytes = std::mem::take(&mut self.rest);
        if bytes.is_empty() {
            bytes = self.reader.read().await?;
        }
        self.position += bytes.len() as u64;
        Ok(bytes)
    }
}

/// Reads on a thread that may block. A read whose caller stopped waiting is kept for the next call.
#[derive(Debug)]
struct Reader<R> {
    /// `None` while a thread reads.
    idle: Option<R>,
    reading: Option<JoinHandle<(R, io::Result<Bytes>)>>,
}

impl<R: Read + Send + 'static> Reader<R> {
    fn new(reader: R) -> Self {
        Reader { idle: Some(reader), reading: None }
    }

    /// The next bytes; none at the end.
    async fn read(&mut self) -> io::Result<Bytes> {
        if let Some(mut reader) = self.idle.take() {
            self.reading = Some(tokio::task::spawn_blocking(move || {
                let bytes = chunk(&mut reader);
                (reader, bytes)
            }));
        }
        let Some(reading) = &mut self.reading else {
            return Err(io::Error::other("a read failed"));
        };
        let (reader, bytes) = reading.await.map_err(io::Error::other)?;
        (self.idle, self.reading) = (Some(reader), None);
        bytes
    }

    /// The reader, once no thread reads. The bytes of the last read are dropped.
    async fn idle(&mut self) -> io::Result<&mut R> {
        if self.reading.is_some() {
            self.read().await?;
        }
        self.idle.as_mut().ok_or_else(|| io::Error::other("a read failed"))
    }
}

fn chunk(reader: &mut impl Read) -> io::Result<Bytes> {
    let mut bytes = vec![0; CHUNK];
    loop {
        match reader.read(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => {
                bytes.truncate(read?);
                return Ok(bytes.into());
            }
        }
    }
}

/// Sends the bytes of `source`, and returns the result. `progress` gets the state of the work.
///
/// # Errors
/// [`SendError`]. If [`is_retryable`](SendError::is_retryable), the run can be resumed by its id.
pub async fn send(
    connection: &Connection,
    open: &Open,
    source: &mut impl Source,
    mut progress: impl FnMut(&Report),
) -> Result<Report, SendError> {
    let header = serde_json::to_vec(open).map_err(|_| SendError::Reply)?;
    let stream = connection.open(STREAM, header).await?;
    let Stream { reader, mut writer, progress: mut messages } = stream;
    let mut replies = Replies { reader, line: Vec::new() };
    let offset = match replies.next().await? {
        Reply::Accepted { offset } => offset,
        Reply::Failed { reason, .. } => return Err(SendError::Failed(reason)),
        Reply::Result(_) => return Err(SendError::Reply),
    };
    source.seek(offset).await?;
    let sending = async {
        loop {
            let bytes = source.read().await?;
            if bytes.is_empty() {
                break;
            }
            writer.write(bytes).await?;
        }
        writer.finish()?;
        Ok::<_, SendError>(())
    };
    let watching = async {
        while let Some(message) = messages.next().await {
            if let Ok(report) = serde_json::from_slice(&message) {
                progress(&report);
            }
        }
    };
    let finishing = async {
        match replies.next().await? {
            Reply::Result(report) => Ok(report),
            Reply::Failed { reason, .. } => Err(SendError::Failed(reason)),
            Reply::Accepted { .. } => Err(SendError::Reply),
        }
    };
    let mut sending = std::pin::pin!(sending);
    let mut watching = std::pin::pin!(watching);
    let mut finishing = std::pin::pin!(finishing);
    let (mut is_sent, mut is_watched) = (false, false);
    loop {
        tokio::select! {
            biased;
            () = &mut watching, if !is_watched => is_watched = true,
            // An error of the run explains why sending failed, so it comes first.
            result = &mut finishing => return result,
            sent = &mut sending, if !is_sent => match sent {
                Ok(()) => is_sent = true,
                Err(error @ (SendError::Read(_) | SendError::Short { .. })) => return Err(error),
                // The other half has the reason, at once.
                Err(error) => {
                    let reason = tokio::time::timeout(GRACE, &mut finishing).await;
                    return reason.unwrap_or(Err(error));
                }
            },
        }
    }
}

/// The longest wait for the reason why a stream ended.
const GRACE: Duration = Duration::from_secs(1);

/// The replies of the service, one in each line.
struct Replies {
    reader: StreamReader,
    line: Vec<u8>,
}

impl Replies {
    async fn next(&mut self) -> Result<Reply, SendError> {
        loop {
            if let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
                let reply = serde_json::from_slice(&self.line[..end]);
                self.line.drain(..=end);
                return reply.map_err(|_| SendError::Reply);
            }
            if self.line.len() > MAX_REPLY {
                return Err(SendError::Reply);
            }
            match self.reader.read().await? {
                Some(bytes) => self.line.extend_from_slice(&bytes),
                None => return Err(SendError::Reply),
            }
        }
    }
}
