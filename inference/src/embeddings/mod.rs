//! OpenAI-style embeddings (`POST /v1/embeddings`): each input is a row.
//!
//! A string and its list of one have one key. A list of tokens has another, also if the string
//! spells it. `encoding_format` and `user` are not part of the key, every other field is. A [`Row`]
//! keeps the server's answer, and [`render`] writes it as floats or as base64.
//!
//! ```
//! use afterimage_inference::embeddings::{self, Format, Request};
//!
//! let request = Request::parse(br#"{"model": "e5", "input": ["a", "b", "a"]}"#)?;
//! assert_eq!(request.inputs.len(), 3);
//! assert_eq!(request.key_bytes(0), request.key_bytes(2));
//!
//! // Row 0 is known. Only row 1 goes upstream.
//! let ask = Request::parse(&request.select(&[1]).to_json())?;
//! let reply = br#"{"object": "list", "model": "e5", "usage": {"prompt_tokens": 2},
//!     "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]}"#;
//! let rows = embeddings::parse_response(reply, &ask)?;
//! let body = embeddings::render(&rows, Format::Float).expect("the rows have one model");
//! assert!(str::from_utf8(&body).unwrap().contains("[0.5,0.25]"));
//! # Ok::<(), afterimage_inference::oip::Error>(())
//! ```

mod request;
mod response;

pub use request::{Format, Input, Request};
pub(crate) use response::distance;
pub use response::{Row, parse_response, render};
