//! The hits that a proxy would have given, from a recorded access log or a HAR file.

use std::collections::HashMap;
use std::io::BufRead;
use std::time::Duration;

use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{StatusCode, Uri};
use serde_json::Value;

use crate::access::row_hash;
use crate::called::{Called, call_keys};
use crate::policy::{Policy, ROUTING_FIELDS, Sharing};

/// The longest line of an access log.
const MAX_LINE: u64 = 8 << 20;

/// The largest body of a call in a HAR file, after its decompression.
const MAX_BODY: usize = 64 << 20;

/// The result so far. Memory without a limit is assumed, and answers that never expire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// Inference calls.
    pub calls: u64,
    /// Calls whose rows are not known: their answers are not stored.
    pub unknown_calls: u64,
    /// Calls with rows that were all known.
    pub hits: u64,
    /// Rows of the calls with known rows.
    pub rows: u64,
    /// Rows that an earlier call, or the same one, had asked for.
    pub repeated_rows: u64,
    /// The time of all calls without a proxy.
    pub time: Duration,
    /// The part of it that belongs to repeated rows.
    pub saved: Duration,
    /// Lines or entries that are no record of a call.
    pub skipped: u64,
}

impl Estimate {
    /// The share of the rows that would have come from memory, from 0 to 1.
    pub fn hit_ratio(&self) -> f64 {
        if self.rows == 0 { 0.0 } else { self.repeated_rows as f64 / self.rows as f64 }
    }
}

/// Reads records of calls in the order of their time.
#[derive(Debug, Default)]
pub struct Estimator {
    estimate: Estimate,
    /// The time of each row that the server has computed.
    seen: HashMap<u64, Duration>,
}

impl Estimator {
    /// Reads an access log of a proxy. Lines of another form are counted and skipped.
    ///
    /// # Errors
    /// When `log` cannot be read.
    pub fn read_log(&mut self, mut log: impl BufRead) -> std::io::Result<()> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if std::io::Read::take(&mut log, MAX_LINE).read_until(b'\n', &mut line)? == 0 {
                return Ok(());
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let known = serde_json::from_slice(&line).ok().and_then(|line| self.read_line(&line));
            self.estimate.skipped += u64::from(known.is_none());
        }
    }

    fn read_line(&mut self, line: &Value) -> Option<()> {
        let origin = line["origin"].as_str()?;
        let time = Duration::from_micros(line["duration_us"].as_u64()?);
        let hashes = line["hashes"].as_array()?.iter();
        let hash = |hash: &Value| u64::from_str_radix(hash.as_str()?, 16).ok();
        let hashes = hashes.map(hash).collect::<Option<Vec<u64>>>()?;
        let expected = if line["protocol"].as_str()? == "grpc" { 0 } else { 200 };
        // The proxy does not always know the status of a gRPC call that passes through.
        let is_success = line["status"].as_u64() == Some(expected);
        let hits = usize::try_from(line["hits"].as_u64()?).ok()?.min(hashes.len());
        // A waiter of a call in flight has its rows from that call.
        let hits = if origin == "coalesced" { hashes.len() } else { hits };
        self.add(if is_success { &hashes } else { &[] }, hits, time);
        Some(())
    }

    /// Reads a recording of a browser or of a proxy in the format HAR 1.2. Calls with equal bodies
    /// are equal, with any credentials.
    ///
    /// # Errors
    /// When `har` is not such a file.
    pub fn read_har(&mut self, har: &[u8]) -> Result<(), HarError> {
        let har: Value = serde_json::from_slice(har)?;
        let entries = har["log"]["entries"].as_array().ok_or(HarError::NoEntries)?;
        let mut entries: Vec<&Value> = entries.iter().collect();
        entries.sort_by_key(|entry| entry["startedDateTime"].as_str());
        for entry in entries {
            self.estimate.skipped += u64::from(self.read_entry(entry).is_none());
        }
        Ok(())
    }

    fn read_entry(&mut self, entry: &Value) -> Option<()> {
        let request = &entry["request"];
        let uri: Uri = request["url"].as_str()?.parse().ok()?;
        let called = Called::by(uri.path())?;
        if request["method"].as_str()? != "POST" {
            return None;
        }
        let time = Duration::try_from_secs_f64(entry["time"].as_f64()? / 1000.0).ok()?;
        let mut headers = HeaderMap::new();
        for field in request["headers"].as_array()? {
            let name = HeaderName::from_bytes(field["name"].as_str()?.as_bytes());
            let value = HeaderValue::from_str(field["value"].as_str()?);
            // HAR files of HTTP/2 have `:path` and the like.
            if let (Ok(name), Ok(value)) = (name, value) {
                headers.append(name, value);
            }
        }
        let key_fields = ROUTING_FIELDS.map(HeaderName::from_static).to_vec();
        let policy = Policy { sharing: Sharing::Shared, key_fields };
        let query = uri.query().filter(|query| !called.takes(query));
        let body = request["postData"]["text"].as_str().unwrap_or_default().to_owned();
        // The body in the file has no compression.
        headers.remove(hyper::header::CONTENT_ENCODING);
        let keys = policy.decide(&headers, query, None).ok().and_then(|directives| {
            let target = uri.path_and_query()?;
            let body = body.into();
            call_keys(&called, target, &headers, &body, &directives.key, MAX_BODY).ok()
        });
        let is_success = entry["response"]["status"] == StatusCode::OK.as_u16();
        let hashes = match keys.filter(|_| is_success) {
            Some((model, keys)) => keys.iter().map(|key| row_hash(&[0; 32], &model, key)).collect(),
            None => Vec::new(),
        };
        self.add(&hashes, 0, time);
        Some(())
    }

    /// Adds a call with these rows, of which so many came from memory.
    fn add(&mut self, hashes: &[u64], hits: usize, time: Duration) {
        let estimate = &mut self.estimate;
        estimate.calls += 1;
        if hashes.is_empty() {
            estimate.unknown_calls += 1;
            estimate.time += time;
            return;
        }
        let computed = u32::try_from(hashes.len() - hits).unwrap_or(u32::MAX);
        let each = time.checked_div(computed);
        let (mut repeated, mut saved) = (0, Duration::ZERO);
        for hash in hashes {
            let known = self.seen.get(hash).copied();
            // The server's time for the row: now, or when it computed the row.
            let cost = if hits == 0 { each } else { known.or(each) }.unwrap_or_default();
            estimate.time += cost;
            if known.is_some() {
                repeated += 1;
                saved += cost;
            }
            if hits == 0 || known.is_none() {
                self.seen.insert(*hash, cost);
            }
        }
        estimate.rows += hashes.len() as u64;
        estimate.repeated_rows += repeated;
        estimate.hits += u64::from(repeated == hashes.len() as u64);
        estimate.saved += saved;
    }

    /// The result.
    pub fn estimate(&self) -> &Estimate {
        &self.estimate
    }
}

/// Why a file is not a HAR file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HarError {
    /// It is not JSON.
    #[error("the file is neither an access log nor JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// It has no requests.
    #[error("the file is JSON without log.entries, so it is not a HAR file")]
    NoEntries,
}
