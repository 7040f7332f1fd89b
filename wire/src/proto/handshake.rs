//! `Hello` and `Welcome`: the two messages that open a connection.
//!
//! Byte tables in `PROTOCOL.md`, section "Handshake".

use core::fmt;

use afterimage_core::Shape;
use afterimage_core::model::DIGEST_LEN;
use afterimage_core::model::MAX_DIMS;
use arrayvec::ArrayVec;
use bytes::BufMut;

use super::BodyError;
use super::body::Reader;

/// The first eight bytes of both bodies. A peer that does not send them speaks another protocol.
pub const MAGIC: [u8; 8] = *b"AFTERIMG";

/// The oldest version of the protocol that this crate speaks.
pub const OLDEST_VERSION: u16 = 1;

/// The newest version of the protocol. Version 2 adds values of bytes, inference, and deletion of
/// stored answers.
pub const VERSION: u16 = 2;

/// Bytes in the longest token. Longer than any sensible secret, short enough for a handshake frame.
pub const MAX_TOKEN_LEN: usize = 1024;

/// The first message of a client.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The oldest protocol version that the client speaks.
    pub version_min: u16,
    /// The newest protocol version that the client speaks.
    pub version_max: u16,
    /// Bits of optional features that the client asks for; none is assigned.
    pub features: u32,
    /// The token that the server may demand; empty for none. At most [`MAX_TOKEN_LEN`].
    pub token: &'a [u8],
}

impl<'a> Hello<'a> {
    /// A `Hello` for all versions that this crate speaks, with a token (empty for none).
    pub fn new(token: &'a [u8]) -> Self {
        Hello { version_min: OLDEST_VERSION, version_max: VERSION, features: 0, token }
    }

    /// The newest version that both sides speak, if there is one.
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.version_max.min(VERSION);
        (newest >= self.version_min.max(OLDEST_VERSION)).then_some(newest)
    }

    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&MAGIC);
        out.put_u16_le(self.version_min);
        out.put_u16_le(self.version_max);
        out.put_u32_le(self.features);
        let token = &self.token[..self.token.len().min(MAX_TOKEN_LEN)];
        out.put_u16_le(token.len() as u16);
        out.put_slice(token);
    }

    pub(super) fn decode(body: &'a [u8]) -> Result<Self, BodyError> {
        let mut reader = Reader::new(body);
        if reader.array("magic")? != MAGIC {
            return Err(BodyError::WrongMagic);
        }
        let version_min = reader.u16("oldest version")?;
        let version_max = reader.u16("newest version")?;
        let features = reader.u32("features")?;
        let token_len = usize::from(reader.u16("token length")?);
        if token_len > MAX_TOKEN_LEN {
            let limit = MAX_TOKEN_LEN as u64;
            return Err(BodyError::OutOfRange {
                field: "token length",
                value: token_len as u64,
                limit,
            });
        }
        let token = reader.bytes(token_len, "token")?;
        reader.skip_extensions()?;
        Ok(Hello { version_min, version_max, features, token })
    }
}

impl fmt::Debug for Hello<'_> {
    /// Omits the token: it is a secret, and debug output ends up in logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hello")
            .field("version_min", &self.version_min)
            .field("version_max", &self.version_max)
            .field("features", &self.features)
            .field("token_len", &self.token.len())
            .finish()
    }
}

/// The kind of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Role {
    /// Answers `ClassifyReq`, from its store where it can.
    Memo,
    /// Answers `CacheReq`.
    Cache,
    /// Answers `ClassifyReq` with its model.
    Classifier,
    /// Has the stream `jobs`; answers no requests but the common ones.
    Jobs,
    /// Has streams of records: folds over files of any size.
    Streams,
    /// A service of a newer version.
    Unknown(u8),
}

impl Role {
    /// The number on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Role::Memo => 1,
            Role::Cache => 2,
            Role::Classifier => 3,
            Role::Jobs => 4,
            Role::Streams => 5,
            Role::Unknown(code) => code,
        }
    }

    /// The service of a number on the wire.
    pub const fn from_code(code: u8) -> Self {
        match code {
            1 => Role::Memo,
            2 => Role::Cache,
            3 => Role::Classifier,
            4 => Role::Jobs,
            5 => Role::Streams,
            other => Role::Unknown(other),
        }
    }

    /// Whether it answers `ClassifyReq`.
    pub const fn classifies(self) -> bool {
        matches!(self, Role::Memo | Role::Classifier)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Role::Memo => f.write_str("memo"),
            Role::Cache => f.write_str("cache"),
            Role::Classifier => f.write_str("classifier"),
            Role::Jobs => f.write_str("jobs"),
            Role::Streams => f.write_str("streams"),
            Role::Unknown(code) => write!(f, "service {code}"),
        }
    }
}

/// A server's answer to a `Hello` that it accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The protocol version of this connection.
    pub version: u16,
    /// The kind of the service.
    pub service: Role,
    /// Bits of optional features that the server grants; none is assigned.
    pub features: u32,
    /// The largest body, in bytes, that the server accepts.
    pub max_body: u32,
    /// Requests of this connection that the server works on at once. At the limit it stops
    /// reading.
    pub window: u32,
    /// Number of classes of the model; labels are below it. 0 if the answers are bytes, or if
    /// there is no model.
    pub classes: u32,
    /// SHA-256 of the model; zeros if there is none or it is not known.
    pub digest: [u8; DIGEST_LEN],
    /// The input that the model takes; no dimensions if it is not known.
    pub shape: Shape,
    /// The server's name and version, for people: at most 255 bytes.
    pub name: String,
}

impl Welcome {
    pub(super) fn encode(&self, out: &mut impl BufMut) {
        out.put_slice(&MAGIC);
        out.put_u16_le(self.version);
        out.put_u8(self.service.code());
        out.put_u8(self.shape.dims().len() as u8);
        out.put_u32_le(self.features);
        out.put_u32_le(self.max_body);
        out.put_u32_le(self.window);
        out.put_u32_le(self.classes);
        out.put_slice(&self.digest);
        for &dim in self.shape.dims() {
            out.put_u32_le(dim);
        }
        let name = super::body::truncate(&self.name, u8::MAX.into());
        out.put_u8(name.len() as u8);
        out.put_slice(name.as_bytes());
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, BodyError> {
        let mut reader = Reader::new(body);
        if reader.array("magic")? != MAGIC {
            return Err(BodyError::WrongMagic);
        }
        let version = reader.u16("version")?;
        let service = Role::from_code(reader.u8("service")?);
        let dims = reader.u8("number of dimensions")?;
        if usize::from(dims) > MAX_DIMS {
            let (value, limit) = (dims.into(), MAX_DIMS as u64);
            return Err(BodyError::OutOfRange { field: "number of dimensions", value, limit });
        }
        let features = reader.u32("features")?;
        let max_body = reader.u32("largest body")?;
        let window = reader.u32("window")?;
        let classes = reader.u32("number of classes")?;
        let digest = reader.array("digest")?;
        let mut extent = ArrayVec::<u32, MAX_DIMS>::new();
        for _ in 0..dims {
            extent.push(reader.u32("dimension")?);
        }
        let shape = Shape::new(&extent).expect("the number of dimensions was checked");
        let name_len = reader.u8("name length")?;
        let name = reader.text(name_len.into(), "name")?.to_owned();
        reader.skip_extensions()?;
        Ok(Welcome { version, service, features, max_body, window, classes, digest, shape, name })
    }
}
