//! An auditor that reads every connection and keeps the protocol's accounts. Each request has
//! exactly one reply, of the right kind, in time, with the label of the model that the connection
//! was welcomed with. The clients' view is not enough: a missing reply looks like a slow one to a
//! caller with a timeout.

use std::collections::BTreeMap;
use std::time::Duration;

use afterimage_core::RowAnswer;
use afterimage_wire::Status;
use afterimage_wire::proto::header::MAX_MAX_BODY;
use afterimage_wire::proto::{Frame, InferResp, Kind, Message};
use tokio::time::Instant;

use super::classifier::label;
use super::models::NAMES;
use super::rows;
use afterimage_memo::SWEEP_EVERY;

/// The time that a memo may take beyond a request's deadline: the period of its check of the
/// flights, and twice the millisecond that a timer is rounded to.
const BUDGET_SLACK: Duration = SWEEP_EVERY.saturating_add(Duration::from_millis(2));

/// The accounts of one connection.
#[derive(Debug, Default)]
pub(super) struct Auditor {
    /// The incomplete frame that each side has written.
    partial: [Vec<u8>; 2],
    open: BTreeMap<u64, Asked>,
    /// The server promises to keep deadlines while fewer requests than this are in flight. Above
    /// the limit it does not read.
    window: Option<usize>,
    /// The digest in the server's `Welcome`.
    told: Option<[u8; 32]>,
    /// Whether a fault delayed bytes on this connection: times prove nothing then.
    pub(super) disturbed: bool,
}

/// A request without a reply.
#[derive(Clone, Debug)]
struct Asked {
    kind: Kind,
    /// When its last byte arrives, if nothing delays it.
    at: Instant,
    budget: Option<Duration>,
    /// The rows of the request, and their model, if it has some.
    rows: Vec<u8>,
    name: usize,
}

impl Auditor {
    /// Empty accounts. `window` is set for a server that keeps deadlines.
    pub(super) fn new(window: Option<usize>, disturbed: bool) -> Self {
        Auditor { window, disturbed, ..Auditor::default() }
    }

    /// Reads bytes of one side (0: the client) that arrive at this time. Returns a complaint about
    /// them.
    pub(super) fn wrote(&mut self, side: usize, bytes: &[u8], arrives: Instant) -> Option<String> {
        let mut partial = std::mem::take(&mut self.partial[side]);
        partial.extend_from_slice(bytes);
        let mut at = 0;
        let mut complaint = None;
        while let Ok(Some(frame)) = Frame::decode(&partial[at..], MAX_MAX_BODY) {
            at += frame.header.frame_len();
            let wrong = match side {
                0 => self.request(frame, arrives),
                _ => self.reply(frame, Instant::now()),
            };
            complaint = complaint.or(wrong);
        }
        partial.drain(..at);
        self.partial[side] = partial;
        complaint
    }

    fn request(&mut self, frame: Frame<'_>, at: Instant) -> Option<String> {
        let kind = frame.header.kind;
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return Some(format!("a malformed {kind:?}: {error}")),
        };
        let (name, rows) = match message {
            Message::ClassifyReq { image, .. } => (0, image.first().copied().into_iter().collect()),
            Message::InferReq(request) => {
                let name = NAMES.iter().position(|name| *name == request.model).unwrap_or(0);
                (name, request.rows.iter().filter_map(|row| row.first().copied()).collect())
            }
            _ => (0, Vec::new()),
        };
        let budget = match message {
            Message::CacheWrite { .. } => return None,
            Message::ClassifyReq { budget_ms, .. } | Message::CacheRead { budget_ms, .. } => {
                (budget_ms > 0).then(|| Duration::from_millis(budget_ms.into()))
            }
            Message::InferReq(request) => request.budget(),
            _ => None,
        };
        let id = frame.header.id;
        self.disturbed |= self.window.is_some_and(|window| self.open.len() >= window);
        let twice = self.open.insert(id, Asked { kind, at, budget, rows, name }).is_some();
        twice.then(|| format!("id {id} is used again while it is in flight"))
    }

    fn reply(&mut self, frame: Frame<'_>, now: Instant) -> Option<String> {
        let id = frame.header.id;
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => return Some(format!("a malformed {:?}: {error}", frame.header.kind)),
        };
        if let Message::Error { status: Status::Internal, text, .. } = message {
            return Some(format!("request {id} got an internal error: {text}"));
        }
        if let Message::Welcome(welcome) = &message {
            self.told = Some(welcome.digest);
        }
        let kind = match message {
            Message::GoAway { .. } | Message::Error { connection: true, .. } => return None,
            Message::Welcome(_) => Some(Kind::Hello),
            Message::Pong(_) => Some(Kind::Ping),
            Message::StatsResp(_) => Some(Kind::StatsReq),
            Message::CacheResp { .. } => Some(Kind::CacheReq),
            Message::ClassifyResp(_) => Some(Kind::ClassifyReq),
            Message::InferResp(_) => Some(Kind::InferReq),
            Message::BytesResp { .. } => Some(Kind::BytesReq),
            Message::ForgetResp { .. } => Some(Kind::ForgetReq),
            Message::FlushResp => Some(Kind::FlushReq),
            Message::Error { .. } => None,
            _ => return Some(format!("a {:?} from a server", frame.header.kind)),
        };
        let Some(asked) = self.open.remove(&id) else {
            return Some(format!("a second reply to request {id}, or one to none"));
        };
        if kind.is_some_and(|kind| kind != asked.kind) {
            return Some(format!(
                "request {id}, a {:?}, got a {:?}",
                asked.kind, frame.header.kind
            ));
        }
        if let Message::ClassifyResp(answer) = &message
            && self.window.is_some()
            && !self.is_right(asked.rows.first().copied(), answer.label)
        {
            return Some(format!("request {id} got a wrong label, {}", answer.label));
        }
        if let Message::InferResp(response) = &message
            && self.window.is_some()
            && !are_right(&asked, response)
        {
            return Some(format!("request {id} got a wrong answer"));
        }
        let took = now.saturating_duration_since(asked.at);
        let judged = self.window.is_some() && !self.disturbed;
        match asked.budget {
            Some(budget) if judged && took > budget + BUDGET_SLACK => {
                Some(format!("request {id} took {took:?}; its budget was {budget:?}"))
            }
            _ => None,
        }
    }

    /// Whether the model of the connection gives this label to an image. A classifier's own answers
    /// are not judged: some classifiers give impossible labels on purpose.
    fn is_right(&self, image: Option<u8>, class: u16) -> bool {
        let told = self.told.filter(|digest| digest[0] != 0 && *digest == [digest[0]; 32]);
        told.zip(image).is_some_and(|(digest, image)| label(digest[0], image) == class)
    }

    /// Whether one side has sent a part of a frame.
    pub(super) fn is_within_a_frame(&self) -> bool {
        self.partial.iter().any(|partial| !partial.is_empty())
    }

    /// The requests without a reply.
    pub(super) fn unanswered(&self) -> usize {
        self.open.len()
    }
}

/// Whether a model gives these answers to the rows of a request, one to each.
fn are_right(asked: &Asked, response: &InferResp<'_>) -> bool {
    let answers = response.answers.to_rows();
    let right = |(&number, row): (&u8, &RowAnswer)| {
        rows::right(asked.name, response.digest[0], number, &row.answer).is_some()
    };
    answers.len() == asked.rows.len() && asked.rows.iter().zip(&answers).all(right)
}

#[cfg(test)]
mod tests {
    use afterimage_wire::proto::message::{
        Classification, Origin, put_classify_req, put_classify_resp,
    };

    use super::*;

    /// The complaint about a reply to request 1 after `took`, when the request has 5 ms.
    async fn reply_after(auditor: &mut Auditor, took: Duration) -> Option<String> {
        tokio::time::sleep(took).await;
        let mut frame = Vec::new();
        put_classify_resp(
            &mut frame,
            1,
            Classification { label: label(1, 5), origin: Origin::Miss },
        );
        auditor.told = Some([1; 32]);
        auditor.wrote(1, &frame, Instant::now())
    }

    fn asked() -> Auditor {
        let (mut auditor, mut frame) = (Auditor::new(Some(10), false), Vec::new());
        put_classify_req(&mut frame, 1, &[5; 8], 5);
        assert_eq!(auditor.wrote(0, &frame, Instant::now()), None);
        auditor
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_past_the_budget_is_noticed() {
        assert_eq!(reply_after(&mut asked(), BUDGET_SLACK).await, None);
        let complaint = reply_after(&mut asked(), Duration::from_millis(100)).await;
        assert!(complaint.is_some_and(|text| text.contains("its budget was")));
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_reply_is_noticed() {
        let mut auditor = asked();
        reply_after(&mut auditor, Duration::ZERO).await;
        let complaint = reply_after(&mut auditor, Duration::ZERO).await;
        assert!(complaint.is_some_and(|text| text.contains("a second reply")));
    }
}
