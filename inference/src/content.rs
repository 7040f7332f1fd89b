//! The content of a call: a request of the Open Inference Protocol, or inputs for embeddings.

use afterimage_core::{Answer, Rows};
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{HeaderMap, Response};

use crate::embeddings::{self, Format};
use crate::forward::ResponseBody;
use crate::headers::{JSON_LENGTH, json_len};
use crate::oip;

/// The content of a call, and how the memo answers it.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// A request of the Open Inference Protocol. The memo answers it whole.
    Whole,
    /// A request of the Open Inference Protocol. The memo answers each row for itself.
    Rows(Box<oip::Rows>),
    /// Inputs for embeddings. Each is a row.
    Embeddings(embeddings::Request),
}

/// The answers in a response, and the version of the model that the response states.
pub(crate) struct Answers {
    pub(crate) version: Option<String>,
    pub(crate) answers: Rows<Answer>,
}

impl Content {
    /// The number of rows; `None` for a request that is answered whole.
    pub(crate) fn rows(&self) -> Option<usize> {
        match self {
            Content::Whole => None,
            Content::Rows(rows) => Some(rows.len()),
            Content::Embeddings(request) => Some(request.inputs.len()),
        }
    }

    /// Whether these positions are all rows in their order. The client's own bytes ask for them.
    pub(crate) fn is_all(&self, positions: &[u32]) -> bool {
        let is_all = |len| len == positions.len() && (0..len).eq(usizes(positions));
        self.rows().is_none_or(is_all)
    }

    /// A body that asks for some of the rows. `None` if it has no form over HTTP.
    pub(crate) fn part(&self, positions: &[u32]) -> Option<oip::Encoded> {
        let asked: Vec<usize> = usizes(positions).collect();
        match self {
            Content::Whole => None,
            Content::Rows(rows) => rows.select(&asked).to_http(oip::Encoding::AsReceived),
            Content::Embeddings(request) => {
                Some(oip::Encoded { body: request.select(&asked).to_json(), json_len: None })
            }
        }
    }

    /// The answers to store, from a response with these rows: one of the whole, or one for each
    /// row.
    pub(crate) fn answers(
        &self,
        headers: &HeaderMap,
        body: &Bytes,
        positions: &[u32],
    ) -> Result<Answers, &'static str> {
        const UNKNOWN: &str = "the response is not understood";
        if let Content::Embeddings(request) = self {
            let asked: Vec<usize> = usizes(positions).collect();
            let rows = embeddings::parse_response(body, &request.select(&asked));
            let rows = rows.map_err(|_| UNKNOWN)?;
            let version = rows.first().and_then(|row| row.model.clone());
            let answers = rows.iter().map(|row| Answer::Bytes(row.to_bytes())).collect();
            return Ok(Answers { version, answers });
        }
        let json_len = json_len(headers).map_err(|()| "the length of the JSON is not a number")?;
        let response = oip::Response::parse(body.clone(), json_len).map_err(|_| UNKNOWN)?;
        Answers::of(response, self.rows().map(|_| positions.len()))
    }
}

impl Answers {
    /// The answers in a response of the Open Inference Protocol: one, or one for each of so many
    /// rows.
    pub(crate) fn of(
        response: oip::Response,
        rows: Option<usize>,
    ) -> Result<Answers, &'static str> {
        let version = response.version.clone();
        let parts = match rows {
            None => vec![response],
            Some(rows) => {
                response.split_rows(rows).ok_or("an output has another number of rows")?
            }
        };
        let answers = parts.iter().map(|part| Answer::Bytes(part.to_bytes())).collect();
        Ok(Answers { version, answers })
    }
}

fn usizes(positions: &[u32]) -> impl Iterator<Item = usize> {
    positions.iter().map(|position| *position as usize)
}

/// The form of the response that a client wants.
#[derive(Debug)]
pub(crate) enum Form {
    /// The Open Inference Protocol: the request's id, and the encoding.
    Inference { id: Option<String>, wanted: oip::OutputEncoding },
    /// Embeddings in this format.
    Embeddings(Format),
}

/// The answer to a call of the Open Inference Protocol: from its stored rows, or from the stored
/// whole.
pub(crate) fn assembled(answers: impl ExactSizeIterator<Item = Answer>) -> Option<oip::Response> {
    let is_one = answers.len() == 1;
    let read = |answer| oip::Response::from_bytes(bytes(answer)?).ok();
    let mut rows = answers.map(read).collect::<Option<Vec<_>>>()?;
    if is_one { rows.pop() } else { oip::Response::assemble(&rows) }
}

/// A response of the Open Inference Protocol, in the encoding that the client asked for.
pub(crate) fn rendered(
    answer: &oip::Response,
    id: Option<&str>,
    wanted: &oip::OutputEncoding,
) -> Option<Response<ResponseBody>> {
    let oip::Encoded { body, json_len } = answer.render(id, wanted)?;
    let mut response = Response::new(ResponseBody::full(body));
    let headers = response.headers_mut();
    match json_len {
        None => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        Some(len) => {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
            headers.insert(JSON_LENGTH, HeaderValue::from(len));
        }
    }
    Some(response)
}

/// A response with embeddings, from stored rows.
pub(crate) fn embedded(
    answers: impl Iterator<Item = Answer>,
    format: Format,
) -> Option<Response<ResponseBody>> {
    let read = |answer| embeddings::Row::from_bytes(bytes(answer)?).ok();
    let rows = answers.map(read).collect::<Option<Vec<_>>>()?;
    let mut response = Response::new(ResponseBody::full(embeddings::render(&rows, format)?));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Some(response)
}

/// The bytes of a stored answer.
pub(crate) fn bytes(answer: Answer) -> Option<Bytes> {
    match answer {
        Answer::Bytes(stored) => Some(stored),
        Answer::Label(_) => None,
    }
}
