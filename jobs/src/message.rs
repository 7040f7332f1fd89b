//! Messages of the jobs service, as bytes. [PROTOCOL.md](https://github.com/afterimage-cache/afterimage/blob/main/jobs/PROTOCOL.md)
//! is the reference.
//!
//! A stream named `jobs` carries messages in both directions. Each has a length, a kind, and the
//! number of a call: a response has the number of its request. The tables at the end of this file
//! are the only list of messages.

use std::sync::Arc;
use std::time::Duration;

use afterimage_core::Status;
use bytes::{Buf, Bytes, BytesMut};

use crate::engine::{Counts, Grant, Overview, Submit, Verdict};
use crate::job::Outcome;
use crate::store::{Event, Filter, Kind, Record};
use crate::{Code, Definition, JobId, State, Timestamp, Token};

/// The name of the stream.
pub const STREAM: &str = "jobs";

/// The version of the messages, the first byte of the stream's header.
pub const VERSION: u8 = 1;

/// The longest message. It fits an input or a result of 1 MiB, and lists.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Bytes before the fields of a message: length, kind, call.
const HEAD: usize = 9;

/// A message that does not follow the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Malformed {
    /// A message is longer than the limit.
    #[error("a message has {0} bytes; the limit is {MAX_MESSAGE}")]
    TooLong(usize),
    /// A message ends inside a field.
    #[error("message {kind:#04x} ends early")]
    Truncated {
        /// Its kind.
        kind: u8,
    },
    /// A message has bytes after its fields.
    #[error("message {kind:#04x} has {bytes} bytes too many")]
    Trailing {
        /// Its kind.
        kind: u8,
        /// The bytes after its fields.
        bytes: usize,
    },
    /// A field has an invalid value.
    #[error("message {kind:#04x} has an invalid {what}")]
    Invalid {
        /// Its kind.
        kind: u8,
        /// The field.
        what: &'static str,
    },
    /// The kind is not known.
    #[error("message kind {0:#04x} is not known")]
    UnknownKind(u8),
}

/// Splits the bytes of a stream into messages.
#[derive(Debug, Default)]
pub struct Splitter {
    buffer: BytesMut,
}

/// One message: kind, call, fields.
type Message = (u8, u32, Bytes);

impl Splitter {
    /// Adds bytes of the stream.
    pub fn push(&mut self, chunk: &[u8]) {
        self.buffer.extend_from_slice(chunk);
    }

    /// The next message, if all its bytes have arrived.
    ///
    /// # Errors
    /// [`Malformed`] if its length is not valid.
    pub fn next_message(&mut self) -> Result<Option<Message>, Malformed> {
        let Some(&length) = self.buffer.first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(Malformed::TooLong(length));
        }
        if length < HEAD - 4 {
            return Err(Malformed::Truncated { kind: 0 });
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        let mut message = self.buffer.split_to(4 + length).freeze();
        message.advance(4);
        let (kind, call) = (message.get_u8(), message.get_u32_le());
        Ok(Some((kind, call, message)))
    }
}

/// Takes fields from the front of a message.
#[derive(Debug)]
struct Reader {
    kind: u8,
    rest: Bytes,
}

impl Reader {
    fn bytes(&mut self, len: usize) -> Result<Bytes, Malformed> {
        if self.rest.len() < len {
            return Err(Malformed::Truncated { kind: self.kind });
        }
        Ok(self.rest.split_to(len))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let bytes = self.bytes(N)?;
        Ok(bytes[..].try_into().expect("`bytes` gave exactly N bytes"))
    }

    fn invalid(&self, what: &'static str) -> Malformed {
        Malformed::Invalid { kind: self.kind, what }
    }
}

/// A value in a message.
trait Field: Sized {
    fn put(&self, out: &mut Vec<u8>);
    fn get(from: &mut Reader) -> Result<Self, Malformed>;
}

macro_rules! integers {
    ($($type:ty)*) => {
        $(impl Field for $type {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }

            fn get(from: &mut Reader) -> Result<Self, Malformed> {
                Ok(<$type>::from_le_bytes(from.array()?))
            }
        })*
    };
}

integers! { u8 u16 u32 u64 u128 }

/// A field that is sent as another one.
macro_rules! fields_as {
    ($($type:ty as $other:ty, $what:literal: $to:expr, $back:expr;)*) => {
        $(impl Field for $type {
            fn put(&self, out: &mut Vec<u8>) {
                let to: fn(&$type) -> $other = $to;
                to(self).put(out);
            }

            fn get(from: &mut Reader) -> Result<Self, Malformed> {
                let back: fn($other) -> Option<$type> = $back;
                back(<$other>::get(from)?).ok_or_else(|| from.invalid($what))
            }
        })*
    };
}

fields_as! {
    bool as u8, "flag": |flag| u8::from(*flag), |byte| (byte < 2).then_some(byte == 1);
    JobId as u128, "id": |id| id.bits(), |bits| Some(JobId::from_bits(bits));
    Token as u64, "token": |token| token.0, |bits| Some(Token(bits));
    Timestamp as u64, "time": |time| time.0, |millis| Some(Timestamp(millis));
    State as u8, "state": |state| state.code(), State::from_code;
    Status as u16, "status": |status| status.code(), |code| Some(Status::from_code(code));
    Duration as u64, "duration": |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX),
        |millis| Some(Duration::from_millis(millis));
    Verdict as u8, "verdict": |verdict| *verdict as u8, |byte| match byte {
        0 => Some(Verdict::GoOn),
        1 => Some(Verdict::Soon),
        2 => Some(Verdict::Stop),
        _ => None,
    };
}

impl Field for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self);
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        let len = u32::get(from)? as usize;
        from.bytes(len)
    }
}

impl Field for String {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self.as_bytes());
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        let bytes = Bytes::get(from)?;
        str::from_utf8(&bytes).map(str::to_owned).map_err(|_| from.invalid("text"))
    }
}

impl Field for Arc<str> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self.as_bytes());
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        let bytes = Bytes::get(from)?;
        str::from_utf8(&bytes).map(Arc::from).map_err(|_| from.invalid("text"))
    }
}

impl Field for Code {
    fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        Ok(Code(from.array()?))
    }
}

impl<T: Field> Field for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        Ok(if bool::get(from)? { Some(T::get(from)?) } else { None })
    }
}

impl<T: Field> Field for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        self.iter().for_each(|value| value.put(out));
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        let count = u32::get(from)?;
        // Not reserved at once: the count is the peer's claim.
        (0..count).map(|_| T::get(from)).collect()
    }
}

impl<A: Field, B: Field> Field for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        Ok((A::get(from)?, B::get(from)?))
    }
}

impl Field for Outcome {
    fn put(&self, out: &mut Vec<u8>) {
        match self {
            Outcome::Succeeded(output) => {
                0_u8.put(out);
                output.put(out);
            }
            Outcome::Failed { error, retry } => {
                (if *retry { 1_u8 } else { 2 }).put(out);
                error.put(out);
            }
        }
    }

    fn get(from: &mut Reader) -> Result<Self, Malformed> {
        match u8::get(from)? {
            0 => Ok(Outcome::Succeeded(Bytes::get(from)?)),
            retry @ (1 | 2) => Ok(Outcome::Failed { error: Field::get(from)?, retry: retry == 1 }),
            _ => Err(from.invalid("outcome")),
        }
    }
}

/// The fields of a struct, in this order.
macro_rules! structs {
    ($($type:ident { $($field:ident),* $(,)? })*) => {
        $(impl Field for $type {
            fn put(&self, out: &mut Vec<u8>) {
                $(self.$field.put(out);)*
            }

            fn get(from: &mut Reader) -> Result<Self, Malformed> {
                Ok($type { $($field: Field::get(from)?,)* })
            }
        })*
    };
}

structs! {
    Submit { definition, input, priority, delay, expires, fresh }
    Definition {
        name, version, memory, max_attempts, backoff, max_backoff, lease, deadline, concurrency,
    }
    Kind { definition, code, unstable }
    Counts { remembered, joined, accepted, succeeded, failed }
    Overview { kind, waiting, running, idle_workers, counts }
    Record {
        id, definition, version, state, priority, attempts, failures, due, expires, ended, event,
        detail,
    }
    Event { position, previous, job, definition, state, attempt, at, detail }
    Filter { definition, state, before, limit }
    Grant { id, token, definition, attempt, lease, deadline, input }
    Beat { id, token, progress }
}

/// A worker's report on one of its jobs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Beat {
    /// The job.
    pub id: JobId,
    /// The token of the lease.
    pub token: Token,
    /// The state of the work, for people; empty if it has not changed.
    pub progress: Bytes,
}

/// One table makes the type, the encoder and the decoder of the messages in one direction.
macro_rules! messages {
    ($(#[$doc:meta])* $name:ident {
        $($(#[$variant_doc:meta])* $kind:literal $variant:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty),* $(,)?
        })*
    }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$variant_doc])* $variant { $($(#[$field_doc])* $field: $type,)* },)*
        }

        impl $name {
            /// Appends the message.
            pub fn encode(&self, call: u32, out: &mut Vec<u8>) {
                let start = out.len();
                out.extend_from_slice(&[0; 4]);
                match self {
                    $($name::$variant { $($field),* } => {
                        out.push($kind);
                        call.put(out);
                        $($field.put(out);)*
                    })*
                }
                let length = (out.len() - start - 4) as u32;
                out[start..start + 4].copy_from_slice(&length.to_le_bytes());
            }

            /// The message of this kind with these fields.
            ///
            /// # Errors
            /// [`Malformed`] if the kind is not known or a field is not valid.
            pub fn decode(kind: u8, fields: Bytes) -> Result<Self, Malformed> {
                let mut from = Reader { kind, rest: fields };
                let message = match kind {
                    $($kind => $name::$variant { $($field: Field::get(&mut from)?,)* },)*
                    _ => return Err(Malformed::UnknownKind(kind)),
                };
                match from.rest.len() {
                    0 => Ok(message),
                    bytes => Err(Malformed::Trailing { kind, bytes }),
                }
            }
        }
    };
}

messages! {
    /// A message to the server.
    Request {
        /// Queue a job.
        0x01 Submit {
            /// The job.
            submit: Submit,
            /// The call of the `Ended` that follows; 0 if the client does not wait.
            wait: u32,
        }
        /// Wait for the end of a job.
        0x02 Wait {
            /// The job.
            id: JobId,
        }
        /// Show a job.
        0x03 Show {
            /// The job.
            id: JobId,
        }
        /// List jobs, newest first.
        0x04 List {
            /// The jobs of the list.
            filter: Filter,
        }
        /// Cancel a job.
        0x05 Cancel {
            /// The job.
            id: JobId,
        }
        /// Queue a job again that has ended without a result. Needs admin rights.
        0x06 Retry {
            /// The job.
            id: JobId,
        }
        /// List definitions.
        0x07 Definitions {}
        /// Create or change a definition. Needs admin rights.
        0x08 Define {
            /// The definition.
            definition: Definition,
        }
        /// Read the log of all steps.
        0x09 Events {
            /// Events after this position.
            after: u64,
            /// The largest number of events.
            limit: u32,
            /// Wait until there is an event.
            wait: bool,
        }
        /// Start to work, once for a stream.
        0x10 Attach {
            /// A name for people.
            name: String,
            /// What the worker runs.
            definitions: Vec<(Definition, Code)>,
        }
        /// Allow more grants. Without a response.
        0x11 Credit {
            /// The number of further grants.
            jobs: u32,
        }
        /// Get no more jobs: the worker ends after its running ones. Without a response.
        0x14 Drain {}
        /// Report that jobs are worked on.
        0x12 Beats {
            /// The jobs.
            beats: Vec<Beat>,
        }
        /// Report the end of an attempt. It also allows one more grant.
        0x13 Finish {
            /// The job.
            id: JobId,
            /// The token of the lease.
            token: Token,
            /// The end.
            outcome: Outcome,
        }
    }
}

messages! {
    /// A message from the server.
    Response {
        /// The request has had its effect.
        0x80 Done {}
        /// A job was queued, or joined.
        0x81 Queued {
            /// The job.
            id: JobId,
            /// An equal job was there before.
            joined: bool,
            /// Jobs of the definition that wait.
            waiting: u64,
        }
        /// The result is remembered. No `Ended` follows.
        0x82 Remembered {
            /// The job that computed it.
            id: JobId,
            /// The result.
            output: Bytes,
        }
        /// A job has ended.
        0x83 Ended {
            /// The job.
            record: Record,
            /// The result, if it has succeeded.
            output: Option<Bytes>,
        }
        /// A job.
        0x84 Shown {
            /// The job.
            record: Record,
            /// The newest report of its worker.
            progress: Bytes,
            /// The result, if it has succeeded.
            output: Option<Bytes>,
            /// Its steps.
            history: Vec<Event>,
        }
        /// Jobs, newest first.
        0x85 Listed {
            /// The jobs.
            records: Vec<Record>,
        }
        /// Definitions, by name.
        0x87 Definitions {
            /// The definitions.
            definitions: Vec<Overview>,
        }
        /// Steps of jobs.
        0x89 Events {
            /// The steps, in order.
            events: Vec<Event>,
        }
        /// A job for this worker. Its call is 0.
        0x90 Granted {
            /// The job and its lease.
            grant: Grant,
        }
        /// The answer to `Beats`.
        0x92 Verdicts {
            /// An answer for each job.
            verdicts: Vec<(JobId, Verdict)>,
        }
        /// The request has no effect.
        0xff Refused {
            /// The reason, for programs.
            status: Status,
            /// The reason, for people.
            text: String,
        }
    }
}
