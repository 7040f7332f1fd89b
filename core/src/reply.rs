//! The exactly-once hand-over of an outcome.
//!
//! A [`Reply`] is the duty to answer one request. It is a value: the code that holds it owes the
//! outcome. Sending it discharges the duty; dropping it sends [`Outcome::abandoned`]. So each
//! request gets one outcome, also when the code in between panics, returns early or forgets.
//!
//! A reply does not allocate. It points at a [`Sink`], which many replies share, and carries a
//! token that names the request there: a connection's reply buffer with a request id, or a call
//! with the index of a row.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A result that can say that it was given up. An error implements it for each `Result` with it.
pub trait Outcome: Send + 'static {
    /// The outcome of a reply that was dropped.
    fn abandoned() -> Self;
}

impl<T: Send + 'static, E: Outcome> Outcome for Result<T, E> {
    fn abandoned() -> Self {
        Err(E::abandoned())
    }
}

/// How long an outcome is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// At least one waiter has no deadline.
    Always,
    /// The last waiter leaves at this time. A new waiter may join before.
    Until(Instant),
    /// All waiters have left. The work need not be done; drop the reply.
    NoMore,
}

impl Wanted {
    /// How long the outcome is wanted for two groups of waiters.
    #[must_use]
    pub fn or(self, other: Wanted) -> Wanted {
        match (self, other) {
            (Wanted::NoMore, other) => other,
            (wanted, Wanted::NoMore) => wanted,
            (Wanted::Until(a), Wanted::Until(b)) => Wanted::Until(a.max(b)),
            _ => Wanted::Always,
        }
    }
}

/// The receiving end of replies.
pub trait Sink<T>: Send + Sync {
    /// How long the outcome for `token` is wanted at `now`.
    fn wanted(&self, token: u64, now: Instant) -> Wanted {
        let _ = (token, now);
        Wanted::Always
    }

    /// Whether the outcome for `token` is wanted at all: as [`wanted`](Self::wanted), at less cost
    /// where a sink can do that.
    fn is_wanted(&self, token: u64, now: Instant) -> bool {
        self.wanted(token, now) != Wanted::NoMore
    }

    /// Gives the replies of the parts of an outcome away, if each part has a reply of its own. The
    /// outcome for `token` is then not delivered as a whole.
    fn take_parts(&self, token: u64) -> Option<Vec<Reply<T>>>
    where
        T: Outcome,
    {
        let _ = token;
        None
    }

    /// Announces that the outcome for `token` follows soon, so that the sink can prefetch memory.
    fn prefetch(&self, token: u64) {
        let _ = token;
    }

    /// Takes the outcome for `token`, once. `at` is when it was known, read once for a whole
    /// batch; `None` when the reply was dropped.
    fn deliver(&self, token: u64, outcome: T, at: Option<Instant>);
}

/// The duty to answer one request, once, from any thread.
///
/// ```
/// use afterimage_core::{Outcome, Reply};
///
/// #[derive(Debug, PartialEq)]
/// enum Answer { Label(u16), GivenUp }
/// impl Outcome for Answer {
///     fn abandoned() -> Self { Answer::GivenUp }
/// }
///
/// let (sender, answers) = std::sync::mpsc::channel();
/// let to = sender.clone();
/// Reply::call(move |answer| to.send(answer).unwrap()).send(Answer::Label(7));
/// drop(Reply::call(move |answer| sender.send(answer).unwrap()));
/// assert_eq!(answers.iter().collect::<Vec<_>>(), [Answer::Label(7), Answer::GivenUp]);
/// ```
#[must_use = "dropping a reply sends the outcome `abandoned`"]
pub struct Reply<T: Outcome> {
    /// Taken when the duty is discharged.
    sink: Option<Arc<dyn Sink<T>>>,
    token: u64,
}

impl<T: Outcome> Reply<T> {
    /// A reply to `sink` for the request that the sink knows as `token`.
    pub fn new(sink: Arc<dyn Sink<T>>, token: u64) -> Self {
        Reply { sink: Some(sink), token }
    }

    /// A reply that calls `callback`. It allocates once.
    pub fn call(callback: impl FnOnce(T) + Send + 'static) -> Self {
        Reply::new(Arc::new(Callback(Mutex::new(Some(callback)))), 0)
    }

    /// The request, as the sink knows it.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// How long the outcome is wanted. Call it right before costly work, and drop the reply on
    /// [`Wanted::NoMore`].
    pub fn wanted(&self, now: Instant) -> Wanted {
        let Some(sink) = &self.sink else { return Wanted::NoMore };
        // A sink that panics still gets its outcome.
        let wanted = guard("asked for its deadline", || sink.wanted(self.token, now));
        wanted.unwrap_or(Wanted::Always)
    }

    /// Whether the outcome is wanted at all.
    pub fn is_wanted(&self, now: Instant) -> bool {
        let Some(sink) = &self.sink else { return false };
        let wanted = guard("asked for its deadline", || sink.is_wanted(self.token, now));
        wanted.unwrap_or(true)
    }

    /// A handle that reports whether the outcome is wanted while the reply is elsewhere.
    pub fn watch(&self) -> Watch<T> {
        Watch { sink: self.sink.clone(), token: self.token }
    }

    /// The replies of the parts, in order, if each part of the outcome has a reply of its own. So
    /// one part can fail, or be given up, without the others.
    ///
    /// # Errors
    /// The reply itself, if the outcome has no such parts.
    pub fn into_parts(mut self) -> Result<Vec<Reply<T>>, Reply<T>> {
        let taken = self.sink.as_ref().and_then(|sink| sink.take_parts(self.token));
        let Some(parts) = taken else { return Err(self) };
        self.sink = None;
        Ok(parts)
    }

    /// A reply for another kind of outcome, which `convert` turns into this one. It allocates once.
    ///
    /// ```
    /// use afterimage_core::{Failure, Reply};
    ///
    /// let (sender, lengths) = std::sync::mpsc::channel();
    /// let length =
    ///     Reply::call(move |length: Result<usize, Failure>| sender.send(length).unwrap());
    /// let text = length.accept(|text: Result<String, Failure>| text.map(|text| text.len()));
    /// text.send(Ok("four".to_owned()));
    /// assert_eq!(lengths.recv().unwrap(), Ok(4));
    /// ```
    pub fn accept<U: Outcome>(self, convert: impl FnOnce(U) -> T + Send + 'static) -> Reply<U>
    where
        T: Outcome,
    {
        let watch = self.watch();
        Reply::new(Arc::new(Converted { watch, owed: Mutex::new(Some((self, convert))) }), 0)
    }

    /// Announces that the outcome follows soon.
    pub fn prefetch(&self) {
        if let Some(sink) = &self.sink {
            guard("told to prefetch", || sink.prefetch(self.token));
        }
    }

    /// Sends the outcome, known at `at`. Returns false when the sink panicked.
    #[inline]
    pub fn send_at(mut self, outcome: T, at: Instant) -> bool {
        self.deliver(outcome, Some(at))
    }

    /// Sends the outcome. Returns false when the sink panicked.
    pub fn send(mut self, outcome: T) -> bool {
        self.deliver(outcome, None)
    }

    #[inline]
    fn deliver(&mut self, outcome: T, at: Option<Instant>) -> bool {
        let Some(sink) = self.sink.take() else { return true };
        guard("answered", || sink.deliver(self.token, outcome, at)).is_some()
    }
}

impl<T: Outcome> Drop for Reply<T> {
    fn drop(&mut self) {
        if self.sink.is_some() {
            self.deliver(T::abandoned(), None);
        }
    }
}

impl<T: Outcome> fmt::Debug for Reply<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("token", &self.token)
            .field("owed", &self.sink.is_some())
            .finish()
    }
}

/// Reports whether the outcome of a [`Reply`] is wanted, without the duty to send it.
pub struct Watch<T> {
    sink: Option<Arc<dyn Sink<T>>>,
    token: u64,
}

impl<T> Watch<T> {
    /// How long the outcome is wanted.
    pub fn wanted(&self, now: Instant) -> Wanted {
        self.sink.as_ref().map_or(Wanted::NoMore, |sink| sink.wanted(self.token, now))
    }

    /// Whether the outcome is wanted at all.
    pub fn is_wanted(&self, now: Instant) -> bool {
        self.sink.as_ref().is_some_and(|sink| sink.is_wanted(self.token, now))
    }
}

impl<T> Clone for Watch<T> {
    fn clone(&self) -> Self {
        Watch { sink: self.sink.clone(), token: self.token }
    }
}

impl<T> fmt::Debug for Watch<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("token", &self.token).finish_non_exhaustive()
    }
}

/// Runs a sink's code. A panic there is the receiver's bug: it is logged, and the thread that
/// answers continues with the other replies.
#[inline]
fn guard<R>(when: &str, code: impl FnOnce() -> R) -> Option<R> {
    let result = catch_unwind(AssertUnwindSafe(code)).ok();
    if result.is_none() {
        tracing::error!("the receiver of a reply panicked when it was {when}");
    }
    result
}

/// A reply of one kind of outcome as the sink of another.
struct Converted<T: Outcome, F> {
    /// Whether the outcome is wanted, without a lock.
    watch: Watch<T>,
    /// Taken when the outcome arrives.
    owed: Mutex<Option<(Reply<T>, F)>>,
}

impl<T: Outcome, U, F: FnOnce(U) -> T + Send> Sink<U> for Converted<T, F> {
    fn wanted(&self, _: u64, now: Instant) -> Wanted {
        self.watch.wanted(now)
    }

    fn is_wanted(&self, _: u64, now: Instant) -> bool {
        self.watch.is_wanted(now)
    }

    fn prefetch(&self, _: u64) {
        if let Some(sink) = &self.watch.sink {
            sink.prefetch(self.watch.token);
        }
    }

    fn deliver(&self, _: u64, outcome: U, at: Option<Instant>) {
        let owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A conversion that panics drops the reply, which then says that it was given up.
        let Some((reply, convert)) = owed else { return };
        let outcome = convert(outcome);
        match at {
            Some(at) => reply.send_at(outcome, at),
            None => reply.send(outcome),
        };
    }
}

/// A sink for one reply.
struct Callback<F>(Mutex<Option<F>>);

impl<T, F: FnOnce(T) + Send> Sink<T> for Callback<F> {
    fn deliver(&self, _: u64, outcome: T, _: Option<Instant>) {
        let callback = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(callback) = callback {
            callback(outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    enum Answer {
        Label(u16),
        Abandoned,
    }

    impl Outcome for Answer {
        fn abandoned() -> Self {
            Answer::Abandoned
        }
    }

    /// Records its outcomes; its behaviour depends on the token.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Answer)>>);

    const UNWANTED: u64 = 100;
    const PANICS: u64 = 200;

    impl Recorder {
        fn got(&self) -> Vec<(u64, Answer)> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    impl Sink<Answer> for Recorder {
        fn wanted(&self, token: u64, _: Instant) -> Wanted {
            assert!(token != PANICS, "planned");
            if token == UNWANTED { Wanted::NoMore } else { Wanted::Always }
        }

        fn deliver(&self, token: u64, answer: Answer, _: Option<Instant>) {
            self.0.lock().unwrap().push((token, answer));
            assert!(token != PANICS, "planned");
        }
    }

    #[test]
    fn each_reply_delivers_once_whether_sent_or_dropped() {
        let sink = Arc::new(Recorder::default());
        Reply::new(sink.clone(), 1).send(Answer::Label(7));
        drop(Reply::new(sink.clone(), 2));
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            let _reply = Reply::new(sink.clone(), 3);
            panic!("planned");
        }));
        assert!(unwound.is_err());
        assert_eq!(
            sink.got(),
            [(1, Answer::Label(7)), (2, Answer::Abandoned), (3, Answer::Abandoned)]
        );
    }

    #[test]
    fn the_sink_says_whether_the_outcome_is_wanted() {
        let (sink, now) = (Arc::new(Recorder::default()), Instant::now());
        let reply = Reply::new(sink.clone(), UNWANTED);
        assert_eq!((reply.wanted(now), reply.is_wanted(now)), (Wanted::NoMore, false));
        reply.send(Answer::Abandoned);
        let reply = Reply::new(sink, 1);
        assert_eq!((reply.wanted(now), reply.is_wanted(now)), (Wanted::Always, true));
        reply.send(Answer::Abandoned);
    }

    #[test]
    fn a_converted_reply_delivers_once_and_forwards_questions() {
        let (sink, now) = (Arc::new(Recorder::default()), Instant::now());
        let convert =
            |label: Result<u16, crate::Failure>| label.map_or(Answer::Abandoned, Answer::Label);
        Reply::new(sink.clone(), 1).accept(convert).send(Ok(7));
        drop(Reply::new(sink.clone(), 2).accept(convert));
        let unwanted = Reply::new(sink.clone(), UNWANTED).accept(convert);
        assert_eq!((unwanted.wanted(now), unwanted.is_wanted(now)), (Wanted::NoMore, false));
        drop(unwanted);
        Reply::new(sink.clone(), 3)
            .accept(|_: Result<u16, crate::Failure>| panic!("planned"))
            .send(Ok(1));
        let given_up = |token| (token, Answer::Abandoned);
        assert_eq!(
            sink.got(),
            [(1, Answer::Label(7)), given_up(2), given_up(UNWANTED), given_up(3)]
        );
    }

    #[test]
    fn a_sink_that_panics_does_not_stop_the_sender() {
        let sink = Arc::new(Recorder::default());
        let reply = Reply::new(sink.clone(), PANICS);
        assert_eq!(reply.wanted(Instant::now()), Wanted::Always);
        assert!(!reply.send(Answer::Label(1)));
        assert!(Reply::new(sink.clone(), 1).send(Answer::Label(2)));
        assert_eq!(sink.got().len(), 2);
    }
}
