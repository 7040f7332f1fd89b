//! The protocol, pure: bytes in, values out, and back.
//!
//! A byte from the socket meets these files in this order: [`header`] finds the frame,
//! [`message`] says what it means ([`handshake`], [`stats`] and [`snapshot`] hold the long bodies),
//! and [`Status`] names what went wrong. [`codec`] offers the same to users of `tokio-util`.
//!
//! To add a message: give it a number in [`header::Kind`], a variant with its `encode` and `decode`
//! arms in [`message::Message`], a section in `PROTOCOL.md` and a vector in `vectors/make.py`.

mod body;
pub mod codec;
pub mod handshake;
pub mod header;
pub mod message;
mod reader;
pub mod snapshot;
pub mod stats;

pub use afterimage_core::{Shape, Status};
pub use body::BodyError;
pub use handshake::{Hello, Role, Welcome};
pub use header::{Frame, FrameError, HEADER_LEN, Header, Kind};
pub use message::Message;
pub use snapshot::Snapshot;
