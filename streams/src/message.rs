//! Messages of the streams service, all JSON.
//!
//! A client opens a stream of the TCP protocol named [`STREAM`], with an [`Open`] as its header.
//! The service sends one [`Reply::Accepted`], which says at which byte the client begins. The
//! client sends the bytes of the file from there on. The service sends a [`Report`] as a progress
//! message at most ten times a second, and at the end one [`Reply`] more. Each reply is a line.

use serde::{Deserialize, Serialize};

use crate::folder::Start;
use crate::run::{OnBad, Plan, Report};

/// The name of the stream.
pub const STREAM: &str = "fold";

/// Bytes of the longest reply.
pub const MAX_REPLY: usize = 16 << 10;

/// The parameters of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// What to compute.
    #[serde(flatten)]
    pub plan: Plan,
    /// What to do with records that the fold refuses.
    #[serde(default)]
    pub on_bad: OnBad,
    /// The id of the run's checkpoint; without one there is no checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Whether the run begins, or continues at the checkpoint of `id`.
    #[serde(default)]
    pub start: Start,
}

/// A message of the service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "reply")]
pub enum Reply {
    /// The run begins or continues.
    Accepted {
        /// The offset of the first byte to send.
        offset: u64,
    },
    /// The bytes have ended, and this is the result.
    Result(Report),
    /// The run has ended with an error. The checkpoint stays at the last whole record before it.
    Failed {
        /// The reason, for people.
        reason: String,
        /// The offset of the bytes that the error is about.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    },
}
