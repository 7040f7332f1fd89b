//! Histograms as text: HdrHistogram's compressed V2 encoding in base64, which other tools read as
//! well.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hdrhistogram::Histogram;
use hdrhistogram::serialization::{Deserializer, Serializer, V2DeflateSerializer};
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer as From, Serializer as To};

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

#[cfg(test)]
mod tests {
    use crate::tally::Latencies;

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
