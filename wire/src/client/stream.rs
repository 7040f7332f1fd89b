//! Streams of a client.

use bytes::Bytes;

use super::Connection;
use super::error::CallError;
use super::infer::check_name;
use crate::proto::stream::MAX_STREAM_HEADER;
use crate::proto::{Kind, StreamOpen, Welcome};
use crate::stream::{Stream, StreamError};

impl Connection {
    /// Opens a stream: `name` is its service or method, `header` its parameters. Needs a server of
    /// version 2. Returns when there is a connection; the server may still refuse the stream, which
    /// is an error of its halves. A stream ends with its connection and with the client, and is not
    /// opened again by itself.
    ///
    /// ```no_run
    /// # use std::error::Error;
    /// # async fn example(client: afterimage_wire::Connection) -> Result<(), Box<dyn Error>> {
    /// let mut stream = client.open("fold/mean", "{}").await?;
    /// stream.writer.write("1\n2\n3\n").await?;
    /// stream.writer.finish()?;
    /// while let Some(chunk) = stream.reader.read().await? {
    ///     println!("{}", String::from_utf8_lossy(&chunk));
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`CallError::OldServer`] if the server speaks version 1 only, [`CallError::Invalid`] if the
    /// name or the header is too long, and the errors of connecting.
    pub async fn open(&self, name: &str, header: impl Into<Bytes>) -> Result<Stream, CallError> {
        check_name("name of a stream", name)?;
        let header = header.into();
        if header.len() > MAX_STREAM_HEADER {
            let (bytes, limit) = (header.len(), MAX_STREAM_HEADER);
            let reason = format!("the header of a stream has {bytes} bytes; the limit is {limit}");
            return Err(CallError::Invalid { reason: reason.into() });
        }
        let shared = self.shared();
        let patience = shared.options.timeout;
        let opening = async {
            loop {
                shared.connected(patience).await?;
                // Between the two calls the connection may be lost: wait for the next one.
                if let Some(opened) = self.open_now(name, &header) {
                    return opened;
                }
            }
        };
        match tokio::time::timeout(patience, opening).await {
            Ok(outcome) => outcome,
            Err(_) => {
                Err(shared.connected(std::time::Duration::ZERO).await.err().unwrap_or_else(|| {
                    let reason = format!("no connection took the stream within {patience:?}");
                    CallError::Invalid { reason: reason.into() }
                }))
            }
        }
    }

    /// Opens a stream on the present connection; `None` if there is none.
    fn open_now(&self, name: &str, header: &Bytes) -> Option<Result<Stream, CallError>> {
        self.shared().with(|state, effects| {
            let outbound = state.current()?;
            if let Err(error) = check(&outbound.welcome, name, header) {
                return Some(Err(error));
            }
            match outbound.streams.open(name, header.clone()) {
                Ok(stream) => {
                    effects.wake(outbound.rouse());
                    Some(Ok(stream))
                }
                Err(StreamError::Lost { .. }) => None,
                Err(error) => {
                    let reason = error.to_string().into();
                    Some(Err(CallError::Invalid { reason }))
                }
            }
        })
    }
}

/// Whether this server takes the stream, as far as its `Welcome` says.
fn check(welcome: &Welcome, name: &str, header: &Bytes) -> Result<(), CallError> {
    let needed = Kind::StreamOpen.since();
    if welcome.version < needed {
        return Err(CallError::OldServer { needed, version: welcome.version });
    }
    let (bytes, limit) = (StreamOpen { credit: 0, name, header }.body_len(), welcome.max_body);
    if bytes > limit as usize {
        return Err(CallError::TooLarge { bytes, limit });
    }
    Ok(())
}
