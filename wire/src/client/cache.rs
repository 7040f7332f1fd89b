//! The client of a cache service: a label table, and a byte store.

use std::time::Duration;

use afterimage_core::Reply;
use bytes::Bytes;

use super::call::{Tries, ask_many, read};
use super::error::CallError;
use super::options::CallOptions;
use super::request::{Body, EncodedRequest, Request};
use super::waiter::{Answer, BytesRead, Values, Waiter, Written};
use super::{client_type, infer};
use crate::proto::Kind;
use crate::proto::header::{MAX_VALUE, flags};
use crate::proto::message::{BYTES_WRITE_HEAD, BytesKey};

client_type! {
    /// A client of a cache service.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
    /// use afterimage_wire::{CacheClient, ClientOptions};
    ///
    /// let cache = CacheClient::connect("127.0.0.1:7401", ClientOptions::new()).await?;
    /// cache.set(42, -7)?;
    /// assert_eq!(cache.get(42).await?, Some(-7));
    /// cache.write_bytes(&[1; 16], b"any bytes", None).await?;
    /// assert_eq!(cache.read_bytes(&[1; 16]).await?.as_deref(), Some(&b"any bytes"[..]));
    /// # Ok(()) }
    /// ```
    CacheClient
}

impl CacheClient {
    /// The value of a key, if the cache service has one.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn get(&self, key: u64) -> Result<Option<i64>, CallError> {
        let (request, options) = (Request::<&[u8]>::CacheRead(key), CallOptions::new());
        match read(self.shared(), request, options).await? {
            Answer::Value(value) => Ok(value),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// The values of many keys, in the order of the keys. They are in flight together, as far as
    /// the window allows. If one read fails, all fail.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn get_many(&self, keys: &[u64]) -> Result<Vec<Option<i64>>, CallError> {
        let mut tries = Tries::new(self.shared(), CallOptions::new());
        loop {
            match ask_many(self.shared(), keys, tries.left).await {
                Ok(values) => return Ok(values),
                Err(error) => tries.another(error).await?,
            }
        }
    }

    /// Stores a value. There is no reply: `Ok` means that the write is queued or sent, not that it
    /// arrived. Does not wait, so it may be called outside of async code.
    ///
    /// # Errors
    /// [`CallError::QueueFull`], [`CallError::Closed`], and [`CallError::Unavailable`],
    /// [`CallError::Refused`] or [`CallError::Protocol`] as other calls.
    pub fn set(&self, key: u64, value: i64) -> Result<(), CallError> {
        self.shared().submit_write(key, value)
    }

    /// The bytes of a key, if the cache service has some. Needs a cache service of version 2. A
    /// large value keeps the memory that it was received in, at most about twice its size.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn read_bytes(&self, key: &BytesKey) -> Result<Option<Bytes>, CallError> {
        self.bytes(bytes_read(key)).await
    }

    /// Stores bytes under a key, for the time `ttl`, in whole seconds. Returns when the
    /// cache service has them; it may drop them at any time. At most 16 MiB.
    ///
    /// # Errors
    /// As [`CacheClient::read_bytes`]; [`CallError::Invalid`] if the value is too long.
    pub async fn write_bytes(
        &self,
        key: &BytesKey,
        value: &[u8],
        ttl: Option<Duration>,
    ) -> Result<(), CallError> {
        let body = write_body(key, value, ttl)?;
        self.bytes(bytes_write(&body)).await.map(drop)
    }

    async fn bytes<B: Body + Copy>(&self, request: Request<B>) -> Result<Option<Bytes>, CallError> {
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Bytes(value) => Ok(value),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Reads many keys. `reply` gets all values, in the order of the keys, or the first error.
    /// Otherwise as [`Client::submit_classify`](super::Client::submit_classify).
    pub fn submit_get_many(&self, keys: &[u64], timeout: Duration, reply: Reply<Values>) {
        self.shared().submit_many(keys, timeout, reply);
    }

    /// Reads the bytes of a key. `reply` gets the outcome of [`CacheClient::read_bytes`]. Otherwise
    /// as [`Client::submit_classify`](super::Client::submit_classify).
    pub fn submit_read_bytes(&self, key: &BytesKey, timeout: Duration, reply: Reply<BytesRead>) {
        self.shared().submit(bytes_read(key), timeout, Waiter::BytesRead(reply));
    }

    /// Stores bytes under a key. `reply` gets the outcome of [`CacheClient::write_bytes`].
    /// Otherwise as [`Client::submit_classify`](super::Client::submit_classify).
    pub fn submit_write_bytes(
        &self,
        key: &BytesKey,
        value: &[u8],
        ttl: Option<Duration>,
        timeout: Duration,
        reply: Reply<Written>,
    ) {
        match write_body(key, value, ttl) {
            Ok(body) => {
                self.shared().submit(bytes_write(&body), timeout, Waiter::Written(reply));
            }
            Err(error) => drop(reply.send(Err(error))),
        }
    }
}

/// A read of the bytes of a key.
fn bytes_read(key: &BytesKey) -> Request<&[u8]> {
    let request = EncodedRequest::plain(Kind::BytesReq, 0, &key[..]);
    Request::Encoded(EncodedRequest { has_budget: true, ..request })
}

fn bytes_write(body: &Bytes) -> Request<&Bytes> {
    Request::Encoded(EncodedRequest::plain(Kind::BytesReq, flags::WRITE, body))
}

/// The body of a write of bytes.
fn write_body(key: &BytesKey, value: &[u8], ttl: Option<Duration>) -> Result<Bytes, CallError> {
    if value.len() > MAX_VALUE {
        let reason = format!("the value has {} bytes; the limit is {MAX_VALUE}", value.len());
        return Err(CallError::Invalid { reason: reason.into() });
    }
    let mut body = Vec::with_capacity(BYTES_WRITE_HEAD + value.len());
    body.extend_from_slice(key);
    body.extend_from_slice(&infer::ttl_s(ttl).to_le_bytes());
    body.extend_from_slice(value);
    Ok(body.into())
}
