//! The outcomes of requests and their latencies.
//!
//! In JSON a histogram is a text: HdrHistogram's compressed V2 encoding in base64, as other tools
//! read it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::{Deserialize, Serialize};

/// The longest latency of a histogram, an hour. Longer ones are recorded as an hour and counted as
/// out of range.
pub(crate) const MAX_LATENCY_NS: u64 = 3_600_000_000_000;

/// Significant decimal digits of a latency, for a precision of a thousandth.
pub(crate) const DIGITS: u8 = 3;

/// The kind of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The memo had the answer in its store, or the cache has the key.
    Hit,
    /// The memo took the answer of an identical request in flight.
    Coalesced,
    /// The classifier computed the answer, or the cache does not have the key.
    #[serde(alias = "computed")]
    Miss,
    /// An error reply.
    Failed,
}

impl Outcome {
    /// All outcomes, in the order of the tables.
    pub const ALL: [Outcome; 4] =
        [Outcome::Hit, Outcome::Coalesced, Outcome::Miss, Outcome::Failed];

    /// The name in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Hit => "hit",
            Outcome::Coalesced => "coalesced",
            Outcome::Miss => "miss",
            Outcome::Failed => "failed",
        }
    }
}

/// The latencies of the requests with one outcome, in nanoseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    /// From the moment a request was due.
    #[serde(with = "text")]
    pub from_due: Histogram<u64>,
    /// From the moment it was handed to the kernel.
    #[serde(with = "text")]
    pub from_sent: Histogram<u64>,
}

impl Default for Latencies {
    fn default() -> Self {
        Latencies { from_due: new_histogram(), from_sent: new_histogram() }
    }
}

/// An empty histogram of latencies in nanoseconds.
pub(crate) fn new_histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_LATENCY_NS, DIGITS)
        .expect("the bounds are constants that the histogram allows")
}

impl Latencies {
    pub(crate) fn add(&mut self, other: &Latencies) {
        let same = "both histograms have the same bounds";
        self.from_due.add(&other.from_due).expect(same);
        self.from_sent.add(&other.from_sent).expect(same);
    }
}

/// Histograms as text.
mod text {
    use serde::de::Error as _;
    use serde::ser::Error as _;
    use serde::{Deserialize, Deserializer as From, Serializer as To};

    use super::*;

    /// Writes a histogram as text.
    pub(crate) fn serialize<S: To>(histogram: &Histogram<u64>, to: S) -> Result<S::Ok, S::Error> {
        let mut bytes = Vec::new();
        V2DeflateSerializer::new()
            .serialize(histogram, &mut bytes)
            .map_err(|error| S::Error::custom(format!("a histogram: {error:?}")))?;
        to.serialize_str(&STANDARD.encode(bytes))
    }

    /// Reads it back.
    pub(crate) fn deserialize<'de, D: From<'de>>(from: D) -> Result<Histogram<u64>, D::Error> {
        let text = String::deserialize(from)?;
        let bytes = STANDARD
            .decode(text)
            .map_err(|error| D::Error::custom(format!("a histogram is no base64: {error}")))?;
        Deserializer::new()
            .deserialize(&mut bytes.as_slice())
            .map_err(|error| D::Error::custom(format!("no histogram: {error:?}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_survive_json() {
        let mut latencies = Latencies::default();
        for value in [1, 1_000, 123_456_789, 3_600_000_000_000] {
            latencies.from_due.record(value).unwrap();
        }
        let json = serde_json::to_string(&latencies).unwrap();
        assert!(json.contains("\"HISTFAAA"), "{json}");
        assert_eq!(serde_json::from_str::<Latencies>(&json).unwrap(), latencies);
        for wrong in ["!", "aGVsbG8="] {
            let json = format!("{{\"from_due\": \"{wrong}\", \"from_sent\": \"{wrong}\"}}");
            let error = serde_json::from_str::<Latencies>(&json).unwrap_err().to_string();
            assert!(error.contains("histogram"), "{error}");
        }
    }
}
