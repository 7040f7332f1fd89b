//! Checks of replies: each is compared with its request.

use afterimage_wire::Status;
use afterimage_wire::proto::header::flags;
use afterimage_wire::proto::{Frame, Header, Kind, Message};
use afterimage_wire::text::escape_text;

use super::weight;
use crate::dialect::http::{self, Response};
use crate::dialect::ordered::{self, Judge as _};
use crate::flight::{Asked, Closed, InFlight, Request, WRITE_ID};
use crate::outcome::Outcome;
use crate::plan::Target;
use crate::tally::Tally;

/// Stands for an image or key outside the population, in an example of a wrong answer.
const NO_SUBJECT: u32 = u32::MAX;

/// Checks the replies of one read.
pub(crate) struct Judge<'a> {
    pub(super) flight: &'a mut InFlight,
    pub(super) target: &'a Target,
    /// The server echoes requests.
    pub(super) echo: bool,
    /// Classes of the server's model: no label is as large.
    pub(super) classes: u32,
    pub(super) tally: &'a mut Tally,
    pub(super) now_ns: u64,
    pub(super) in_window: bool,
    /// The part of the connection's depth that these replies have freed.
    pub(super) closed: usize,
    /// The reason of a GoAway.
    pub(super) goaway: Option<String>,
    /// The reason why the connection is unusable.
    pub(super) ended: Option<String>,
}

impl Judge<'_> {
    /// Judges one frame. The most frequent replies are read here; all others take a slower path
    /// that reports errors.
    #[inline]
    pub(super) fn reply(&mut self, header: Header, body: &[u8]) {
        let exists = header.flags & flags::EXISTS != 0;
        let (answer, outcome) = match (header.kind, self.target) {
            (Kind::ClassifyResp, Target::Classify { .. })
                if let Ok(class) = <[u8; 2]>::try_from(body) =>
            {
                (i64::from(u16::from_le_bytes(class)), origin(header.flags))
            }
            (Kind::CacheResp, Target::Cache(_))
                if exists && let Ok(value) = <[u8; 8]>::try_from(body) =>
            {
                (i64::from_le_bytes(value), Outcome::Hit)
            }
            (Kind::CacheResp, Target::Cache(_)) if !exists && body.is_empty() => (0, Outcome::Miss),
            (Kind::CacheReq, Target::Cache(_))
                if self.echo
                    && let Ok(key) = <[u8; 8]>::try_from(body) =>
            {
                (i64::from_le_bytes(key), Outcome::Hit)
            }
            _ => return self.rare(Frame { header, body }),
        };
        self.answer(header.id, answer, outcome);
    }

    /// Judges a response of an HTTP server to the call with this id.
    pub(super) fn response(&mut self, id: Option<u64>, response: &Response<'_>) {
        let Some(id) = id else { return self.stray() };
        let Some(request) = self.close(id) else { return };
        let (Asked::About(about), Target::Call(calls)) = (request.asked(), self.target) else {
            return self.stray();
        };
        if response.code != 200 {
            self.tally.error(http::status(response.code).code());
            return self.sample(&request, Outcome::Failed);
        }
        if let Err((answer, expected)) = calls.check(about, &response.body) {
            self.tally.wrong(about, answer.cast_signed(), expected.cast_signed());
        }
        self.sample(&request, response.outcome);
    }

    /// Judges the answer to a new image or key: a label must be below the number of classes, and a
    /// key has no value.
    fn fresh(&mut self, request: &Request, answer: i64, outcome: Outcome) {
        let possible = match self.target {
            Target::Classify { .. } => answer < i64::from(self.classes) && outcome != Outcome::Hit,
            Target::Cache(_) => outcome == Outcome::Miss,
            Target::Call(_) => false,
        };
        if !possible {
            self.tally.wrong(NO_SUBJECT, answer, -1);
        }
        self.sample(request, outcome);
    }

    /// Judges any frame.
    #[inline(never)]
    fn rare(&mut self, frame: Frame<'_>) {
        let header = frame.header;
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(error) => {
                self.ended = Some(format!("invalid {}: {error}", header.kind.name()));
                return;
            }
        };
        match message {
            Message::GoAway { text } => {
                self.goaway = Some(escape_text(text).into_owned());
                return;
            }
            Message::Error { status, text, connection: true } => {
                let text = escape_text(text);
                self.ended = Some(format!("the server ended the connection: {status}: {text}"));
                return;
            }
            Message::Error { status, .. }
                if header.id == WRITE_ID && matches!(self.target, Target::Cache(_)) =>
            {
                // A refused write. The fence behind it closes it.
                self.tally.error(status.code());
                return;
            }
            _ => {}
        }
        let Some(request) = self.close(header.id) else { return };
        match (request.asked(), message) {
            (Asked::Fence, Message::Pong(_)) => {}
            (asked, Message::Error { status, .. }) => {
                self.tally.error(status.code());
                if asked != Asked::Fence {
                    self.sample(&request, Outcome::Failed);
                }
            }
            // A reply of the wrong kind is not an answer.
            _ => self.stray(),
        }
    }

    /// Takes the request with this id out of flight, or notes that there is none.
    #[inline(always)]
    fn close(&mut self, id: u64) -> Option<Request> {
        match self.flight.close(id) {
            Closed::Request(request) => {
                let weight = weight(&request);
                self.closed += weight;
                self.tally.counts.writes_confirmed += u64::from(request.writes);
                self.tally.counts.in_window += if self.in_window { weight as u64 } else { 0 };
                Some(request)
            }
            Closed::Late => {
                self.tally.counts.late += 1;
                None
            }
            Closed::Nothing => {
                self.stray();
                None
            }
        }
    }

    #[inline]
    fn sample(&mut self, request: &Request, outcome: Outcome) {
        let due_ns = self.now_ns.saturating_sub(request.due_ns);
        self.tally.sample(outcome, due_ns, self.now_ns.saturating_sub(request.sent_ns));
    }
}

impl ordered::Judge for Judge<'_> {
    #[inline(always)]
    fn answer(&mut self, id: u64, answer: i64, outcome: Outcome) {
        let Some(request) = self.close(id) else {
            return;
        };
        let about = match request.asked() {
            Asked::About(about) => about,
            Asked::Fresh => return self.fresh(&request, answer, outcome),
            Asked::Fence => return self.stray(),
        };
        let expected = match self.target {
            Target::Classify { answers, .. } => match answers.check(about, answer as u16) {
                Ok(()) => answer,
                Err(expected) => expected.into(),
            },
            Target::Cache(_) if outcome == Outcome::Miss => answer,
            Target::Cache(keys) if self.echo => keys.key(about).cast_signed(),
            Target::Cache(keys) => keys.value(keys.key(about)),
            Target::Call(_) => return self.stray(),
        };
        if answer != expected {
            self.tally.wrong(about, answer, expected);
        }
        self.sample(&request, outcome);
    }

    fn fence(&mut self, id: u64) {
        if let Some(request) = self.close(id)
            && request.asked() != Asked::Fence
        {
            self.stray();
        }
    }

    #[cold]
    fn failed(&mut self, id: Option<u64>, status: Status) {
        self.tally.error(status.code());
        if let Some(request) = id.and_then(|id| self.close(id))
            && request.asked() != Asked::Fence
        {
            self.sample(&request, Outcome::Failed);
        }
    }

    #[cold]
    fn stray(&mut self) {
        self.tally.unexpected += 1;
    }
}

/// The outcome in the flags of a `ClassifyResp`, as the protocol's decoder reads them.
#[inline]
fn origin(bits: u8) -> Outcome {
    if bits & flags::HIT != 0 {
        Outcome::Hit
    } else if bits & flags::COALESCED != 0 {
        Outcome::Coalesced
    } else {
        Outcome::Miss
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_wire::proto::message::Origin;

    #[test]
    fn flags_are_read_as_by_the_protocols_decoder() {
        for bits in 0..=u8::MAX {
            let header =
                Header { body_len: 2, kind: Kind::ClassifyResp, flags: bits, status: 0, id: 1 };
            let message = Message::decode(Frame { header, body: &[7, 0] });
            let Ok(Message::ClassifyResp(label)) = message else {
                panic!("flags {bits:#04x} are not an answer")
            };
            let expected = match label.origin {
                Origin::Hit => Outcome::Hit,
                Origin::Coalesced => Outcome::Coalesced,
                Origin::Miss => Outcome::Miss,
            };
            assert_eq!(origin(bits), expected, "flags {bits:#04x}");
        }
    }
}
