//! Inference calls: recognized by their path, read, and turned into keys of rows.

use std::io::Read as _;

use bytes::Bytes;
use flate2::read::{GzDecoder, ZlibDecoder};
use hyper::HeaderMap;
use hyper::header::CONTENT_ENCODING;
use hyper::http::uri::PathAndQuery;
use smallvec::SmallVec;

use crate::headers::json_len;
use crate::policy::Bypass;
use crate::{embeddings, oip};

/// The first byte of the key of a whole call, of a row, and of an input for an embedding. Their
/// answers have different forms.
pub(crate) const WHOLE: u8 = 0;
pub(crate) const ROW: u8 = 1;
const EMBEDDING: u8 = 2;

/// Bytes of the name of a model in a request for embeddings. Names come from clients.
pub(crate) const MAX_NAME: usize = 256;

/// The key of a call or of a row.
pub(crate) fn key(kind: u8, prefix: &[u8], parts: &oip::KeyParts) -> Bytes {
    let mut key = Vec::with_capacity(1 + prefix.len() + parts.total_len());
    key.push(kind);
    key.extend_from_slice(prefix);
    parts.iter().for_each(|part| key.extend_from_slice(part));
    key.into()
}

/// The name of a model for embeddings in the memo.
pub(crate) fn embedder(name: &str, path: &str) -> String {
    format!("{name} at {path}")
}

/// The keys of the inputs for embeddings.
pub(crate) fn embedding_keys(request: &embeddings::Request, prefix: &[u8]) -> Vec<Bytes> {
    let parts = |row| oip::KeyParts { head: request.key_bytes(row), data: SmallVec::new() };
    (0..request.inputs.len()).map(|row| key(EMBEDDING, prefix, &parts(row))).collect()
}

/// The model and the keys of a recorded call, whose batches are answered whole.
pub(crate) fn call_keys(
    called: &Called,
    target: &PathAndQuery,
    headers: &HeaderMap,
    body: &Bytes,
    prefix: &[u8],
    limit: usize,
) -> Result<(String, Vec<Bytes>), Bypass> {
    let body = decoded(headers, body, limit)?;
    match called {
        Called::Model(path) => {
            let request = parse(headers, body, path)?;
            Ok((path.clone(), vec![key(WHOLE, prefix, &request.key_parts())]))
        }
        Called::Embeddings => {
            let request = embeddings::Request::parse(&body).map_err(|_| Bypass::NotUnderstood)?;
            let name = request.model.as_deref().unwrap_or_default();
            Ok((embedder(name, target.as_str()), embedding_keys(&request, prefix)))
        }
    }
}

/// A call, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Called {
    /// A model of the Open Inference Protocol: its name, or `NAME/versions/VERSION`. It stays
    /// encoded, because servers differ in their decoding.
    Model(String),
    /// Embeddings. The body has the name of the model.
    Embeddings,
}

impl Called {
    /// The call at this path, if its answer can be stored.
    pub(crate) fn by(path: &str) -> Option<Called> {
        if path.ends_with("/embeddings") {
            return Some(Called::Embeddings);
        }
        let model = path.strip_prefix("/v2/models/")?.strip_suffix("/infer")?;
        (!model.is_empty()).then(|| Called::Model(model.to_owned()))
    }

    /// Whether the meaning of this query is known. Azure's has the version of the protocol; the
    /// query is part of the model's path.
    pub(crate) fn takes(&self, query: &str) -> bool {
        let is_version = query.starts_with("api-version=") && !query.contains('&');
        *self == Called::Embeddings && is_version
    }
}

/// Reads the body of a call of the Open Inference Protocol.
pub(crate) fn parse(headers: &HeaderMap, body: Bytes, model: &str) -> Result<oip::Request, Bypass> {
    let json_len = json_len(headers).map_err(|()| Bypass::NotUnderstood)?;
    let request = oip::Request::parse(body, json_len).map_err(|error| {
        tracing::debug!(model, %error, "cannot read a call; forwarded it unchanged");
        Bypass::NotUnderstood
    })?;
    if let Some(refusal) = request.refusal() {
        return Err(Bypass::Refused(refusal));
    }
    let name = model.split_once("/versions/").map_or(model, |(name, _)| name);
    Ok(request.for_model(name))
}

/// Whether a request loads or unloads a model.
pub(crate) fn changes_models(path: &str) -> bool {
    path.starts_with("/v2/repository/models/")
        && (path.ends_with("/load") || path.ends_with("/unload"))
}

/// The body without gzip or deflate.
///
/// # Errors
/// The reason, if it has another encoding, is damaged, or has more than `limit` bytes.
pub fn decoded(headers: &HeaderMap, body: &Bytes, limit: usize) -> Result<Bytes, Bypass> {
    let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
    let (encoding, more) = (encodings.next(), encodings.next());
    if more.is_some() {
        return Err(Bypass::Encoding);
    }
    let Some(encoding) = encoding else { return Ok(body.clone()) };
    let mut plain = Vec::new();
    let most = limit as u64 + 1;
    let read = match encoding.as_bytes().to_ascii_lowercase().as_slice() {
        b"" | b"identity" => return Ok(body.clone()),
        b"gzip" | b"x-gzip" => GzDecoder::new(&body[..]).take(most).read_to_end(&mut plain),
        b"deflate" => ZlibDecoder::new(&body[..]).take(most).read_to_end(&mut plain),
        _ => return Err(Bypass::Encoding),
    };
    match read {
        Ok(len) if len <= limit => Ok(plain.into()),
        Ok(_) => Err(Bypass::TooLarge),
        Err(_) => Err(Bypass::NotUnderstood),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use hyper::header::HeaderValue;

    use super::*;

    #[test]
    fn calls_are_recognized_by_their_path() {
        let model = |name: &str| Some(Called::Model(name.to_owned()));
        assert_eq!(Called::by("/v2/models/m/infer"), model("m"));
        assert_eq!(Called::by("/v2/models/a/b/versions/3/infer"), model("a/b/versions/3"));
        assert_eq!(Called::by("/v2/models/a%2Fb/infer"), model("a%2Fb"));
        for other in ["/v2/models//infer", "/v2/models/infer", "/v2/models/m/generate", "/infer"] {
            assert_eq!(Called::by(other), None, "{other}");
        }
        // OpenAI, OpenVINO, KServe, Infinity, Azure.
        for path in [
            "/v1/embeddings",
            "/v3/embeddings",
            "/openai/v1/embeddings",
            "/embeddings",
            "/openai/deployments/x/embeddings",
        ] {
            assert_eq!(Called::by(path), Some(Called::Embeddings), "{path}");
        }
        for other in ["/v1/models", "/v1/embeddings/x", "/v1/my_embeddings", "/v1/chat/completions"]
        {
            assert_eq!(Called::by(other), None, "{other}");
        }
        assert!(Called::Embeddings.takes("api-version=2024-10-21"));
        assert!(!Called::Embeddings.takes("api-version=1&key=2"));
        assert!(!Called::Model("m".into()).takes("api-version=1"));
        assert!(changes_models("/v2/repository/models/m/load"));
        assert!(changes_models("/v2/repository/models/m/unload"));
        assert!(!changes_models("/v2/repository/index"));
    }

    #[test]
    fn compressed_bodies_are_decoded_within_the_limit() {
        let body = vec![7; 10_000];
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&body).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
        zlib.write_all(&body).unwrap();
        for (encoding, bytes) in [
            ("gzip", gzip.finish().unwrap()),
            ("deflate", zlib.finish().unwrap()),
            ("identity", body.clone()),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
            let bytes = Bytes::from(bytes);
            assert_eq!(decoded(&headers, &bytes, 10_000).unwrap(), body, "{encoding}");
            if encoding != "identity" {
                assert_eq!(decoded(&headers, &bytes, 9_999), Err(Bypass::TooLarge));
                let cut = bytes.slice(..bytes.len() - 9);
                assert_eq!(decoded(&headers, &cut, 10_000), Err(Bypass::NotUnderstood));
            }
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("br"));
        assert_eq!(decoded(&headers, &Bytes::new(), 9), Err(Bypass::Encoding));
    }
}
