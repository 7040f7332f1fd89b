//! Comparisons of answers: a client's call is asked again, whole or in part.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hyper::StatusCode;

use crate::call::Call;
use crate::content::Content;
use crate::endpoint::{Whole, read};
use crate::forward::Replica;
use crate::grpc;
use crate::models::Model;
use crate::purity::Verdict;
use crate::{embeddings, oip};

/// The longest time of a call that is asked again.
const AGAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// What the comparison of some answers has found.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Comparison {
    /// Answers that were compared.
    pub(crate) rows: u64,
    /// Answers that are not equal to the bit.
    pub(crate) disagreements: u64,
    /// The greatest difference between two numbers; infinite if other parts differ.
    pub(crate) greatest: f64,
    /// The same in relation to the greatest number of its tensor.
    pub(crate) relative: f64,
}

impl Comparison {
    /// Compares stored answers, one for one.
    pub(crate) fn of(content: &Content, expected: &[&Bytes], found: &[Bytes]) -> Self {
        let mut comparison = Comparison { rows: expected.len() as u64, ..Comparison::default() };
        if expected.len() != found.len() {
            comparison.add(f64::INFINITY, f64::INFINITY);
            return comparison;
        }
        for (expected, found) in expected.iter().zip(found) {
            if *expected == found {
                continue;
            }
            let distance = match content {
                Content::Embeddings(_) => embeddings::distance(expected, found),
                _ => oip::distance(expected, found),
            };
            match distance {
                // The numbers of the embeddings are equal; the counts of tokens are no answer.
                Some((0.0, _)) if matches!(content, Content::Embeddings(_)) => {}
                Some((greatest, relative)) => comparison.add(greatest, relative),
                None => comparison.add(f64::INFINITY, f64::INFINITY),
            }
        }
        comparison
    }

    fn add(&mut self, greatest: f64, relative: f64) {
        self.disagreements += 1;
        self.greatest = self.greatest.max(greatest);
        self.relative = self.relative.max(relative);
    }
}

/// The greatest difference between two lists of numbers, absolute and in relation to the greatest
/// number. `None` if one has a NaN where the other has not, or if infinities differ.
pub(crate) fn distance(
    numbers: impl Iterator<Item = (f64, f64)>,
    (mut greatest, mut relative): (f64, f64),
) -> Option<(f64, f64)> {
    let (mut widest, mut scale) = (0.0f64, 0.0f64);
    for (one, two) in numbers {
        if one == two || (one.is_nan() && two.is_nan()) {
            scale = if one.is_finite() { scale.max(one.abs()) } else { scale };
            continue;
        }
        let difference = (one - two).abs();
        if !difference.is_finite() {
            return None;
        }
        widest = widest.max(difference);
        scale = scale.max(one.abs()).max(two.abs());
    }
    greatest = greatest.max(widest);
    if widest > 0.0 {
        relative = relative.max(widest / scale);
    }
    Some((greatest, relative))
}

/// A call of a client that can be asked again, in its own protocol and with its own fields.
#[derive(Clone)]
pub(crate) enum Again {
    Http(Arc<Call>),
    Grpc(Arc<grpc::Call>),
}

/// The answer to a call that was asked again.
#[derive(Debug)]
pub(crate) enum Repeated {
    /// One answer for each row, or one for a call that is answered whole.
    Answers(Vec<Bytes>),
    /// The server refused the request, or its answer does not fit the rows.
    Refused,
    /// No answer, or one that says nothing about the model.
    Nothing,
}

impl Again {
    /// The client's body, as it came.
    pub(crate) fn body(&self) -> &Bytes {
        match self {
            Again::Http(call) => call.body(),
            Again::Grpc(call) => &call.body,
        }
    }

    /// Asks a server again about some rows of `content`, or about the whole call.
    pub(crate) async fn ask(
        &self,
        replica: &Replica,
        content: &Content,
        positions: Option<&[u32]>,
        limit: usize,
    ) -> Repeated {
        let asking = async {
            match self {
                Again::Http(call) => repeat_http(call, replica, content, positions, limit).await,
                Again::Grpc(call) => call.repeat(replica, content, positions, limit).await,
            }
        };
        let asked = tokio::time::timeout(AGAIN_TIMEOUT, asking).await;
        asked.ok().flatten().unwrap_or(Repeated::Nothing)
    }
}

async fn repeat_http(
    call: &Call,
    replica: &Replica,
    content: &Content,
    positions: Option<&[u32]>,
    limit: usize,
) -> Option<Repeated> {
    let all: Vec<u32> = (0..content.rows().unwrap_or(1) as u32).collect();
    let positions = positions.unwrap_or(&all);
    let request = match content.is_all(positions) {
        true => call.request(),
        false => call.request_with(content.part(positions)?),
    };
    let (head, body) = replica.send(request).await.ok()?.into_parts();
    match head.status {
        StatusCode::OK => {}
        // Another time may bring an answer.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS => {
            return None;
        }
        status if status.is_client_error() => return Some(Repeated::Refused),
        _ => return None,
    }
    let Ok(Whole::Complete(body)) = read(body, limit).await else { return None };
    Some(Repeated::of(content.answers(&head.headers, &body, positions)))
}

impl Repeated {
    /// The answers in a reply that was understood.
    pub(crate) fn of(answers: Result<crate::content::Answers, &'static str>) -> Self {
        let Ok(answers) = answers else { return Repeated::Refused };
        let bytes = answers.answers.into_iter().map(crate::content::bytes);
        bytes.collect::<Option<_>>().map_or(Repeated::Nothing, Repeated::Answers)
    }
}

/// A comparison that is due: a probe of this number, or an audit without a number. Dropping it ends
/// it without a result.
pub(crate) struct Probe {
    pub(crate) model: Arc<Model>,
    pub(crate) digest: [u8; 32],
    pub(crate) content: Content,
    pub(crate) number: Option<u32>,
    is_ended: bool,
}

impl Probe {
    pub(crate) fn new(model: Arc<Model>, content: Content, number: Option<u32>) -> Self {
        let digest = model.digest();
        Probe { model, digest, content, number, is_ended: false }
    }

    /// The rows to ask again.
    pub(crate) fn rows(&self) -> Vec<u32> {
        let len = self.content.rows().unwrap_or(1);
        match self.number {
            Some(number) => crate::purity::probe_rows(number, len),
            None => (0..len as u32).collect(),
        }
    }

    /// Asks a server again about some of the rows that it answered with `answers`, and compares.
    pub(crate) async fn compare(
        &self,
        again: &Again,
        replica: &Replica,
        answers: &[Bytes],
        limit: usize,
    ) -> Option<Comparison> {
        let rows = self.rows();
        match again.ask(replica, &self.content, Some(&rows), limit).await {
            Repeated::Answers(found) => {
                let expected = rows.iter().map(|row| answers.get(*row as usize));
                let expected: Vec<&Bytes> = expected.collect::<Option<_>>()?;
                Some(Comparison::of(&self.content, &expected, &found))
            }
            Repeated::Refused => Some(Comparison::refused()),
            Repeated::Nothing => None,
        }
    }

    /// Takes the result as evidence. Returns a new verdict.
    pub(crate) fn end(mut self, comparison: Option<Comparison>) -> Option<Verdict> {
        self.is_ended = true;
        self.model.purity.probed(self.digest, comparison)
    }
}

impl Comparison {
    /// The server refuses rows alone that it takes in a batch.
    pub(crate) fn refused() -> Self {
        let (greatest, relative) = (f64::INFINITY, f64::INFINITY);
        Comparison { rows: 1, disagreements: 1, greatest, relative }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if !self.is_ended {
            self.model.purity.probed(self.digest, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_absolute_and_relative() {
        let far = |pairs: &[(f64, f64)]| distance(pairs.iter().copied(), (0.0, 0.0));
        assert_eq!(far(&[(1.0, 1.0), (f64::NAN, f64::NAN)]), Some((0.0, 0.0)));
        assert_eq!(far(&[(4.0, 4.0), (1.0, 1.5)]), Some((0.5, 0.125)));
        assert_eq!(far(&[(1.0, f64::NAN)]), None);
        assert_eq!(far(&[(f64::INFINITY, f64::INFINITY)]), Some((0.0, 0.0)));
        assert_eq!(far(&[(f64::INFINITY, 1.0)]), None);
    }
}
