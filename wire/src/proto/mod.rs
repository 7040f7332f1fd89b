//! The protocol without I/O: bytes to messages and messages to bytes.
//!
//! [`header`] finds the frame in a stream. [`message`] decodes it; [`handshake`], [`stats`] and
//! [`snapshot`] hold the long bodies; [`infer`] holds those of inference, [`stream`] those of
//! streams. [`Status`] names errors. [`codec`] is the same for `tokio-util`.
//!
//! To add a message: give it a number in [`header::Kind`], a variant with its `encode` and `decode`
//! arms in [`message::Message`], a section in `PROTOCOL.md` and a vector in `vectors/make.py`.

mod body;
pub mod codec;
pub mod handshake;
pub mod header;
pub mod infer;
pub mod message;
pub mod snapshot;
pub mod stats;
pub mod stream;

pub use afterimage_core::{Shape, Status};
pub use body::BodyError;
pub use handshake::{Hello, Role, Welcome};
pub use header::{Frame, FrameError, HEADER_LEN, Header, Kind};
pub use infer::{InferReq, InferResp};
pub use message::Message;
pub use snapshot::Snapshot;
pub use stream::{StreamFrame, StreamOpen};
