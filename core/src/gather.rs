//! One reply in exchange for many: the parts of an outcome, gathered in order.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::reply::{Reply, Sink, Wanted, Watch};
use crate::status::Failure;

/// Turns one owed reply into `len` owed replies, one for each part of the outcome.
///
/// When the last part has arrived, `combine` makes the outcome from all parts, in their order. The
/// first part that fails fails the whole. The replies say that they are wanted as long as the
/// whole is.
///
/// ```
/// use afterimage_core::{Failure, Reply, gather};
///
/// let (sender, outcomes) = std::sync::mpsc::channel();
/// let whole = Reply::call(move |sum: Result<u32, Failure>| sender.send(sum).unwrap());
/// let parts: Vec<_> = gather(3, whole, |parts: Vec<u32>| parts.into_iter().sum()).collect();
/// for (i, part) in parts.into_iter().enumerate() {
///     part.send(Ok(i as u32));
/// }
/// assert_eq!(outcomes.recv().unwrap(), Ok(3));
/// ```
///
/// # Panics
/// When `len` is 0: there would be no part to wait for.
pub fn gather<P, T>(
    len: usize,
    whole: Reply<Result<T, Failure>>,
    combine: impl FnOnce(Vec<P>) -> T + Send + 'static,
) -> impl Iterator<Item = Reply<Result<P, Failure>>>
where
    P: Send + 'static,
    T: Send + 'static,
{
    assert!(len > 0, "an outcome has at least one part");
    let watch = whole.watch();
    let parts = std::iter::repeat_with(|| None).take(len).collect();
    let state = State { whole, combine, left: len, parts };
    let gather = Arc::new(Gather { watch, state: Mutex::new(Some(state)) });
    (0..len as u64).map(move |part| Reply::new(Arc::<Gather<P, T, _>>::clone(&gather), part))
}

struct Gather<P, T: Send + 'static, F> {
    /// Whether the whole is still wanted.
    watch: Watch<Result<T, Failure>>,
    /// `None` after the first failure, and after the last part.
    state: Mutex<Option<State<P, T, F>>>,
}

struct State<P, T: Send + 'static, F> {
    whole: Reply<Result<T, Failure>>,
    combine: F,
    left: usize,
    parts: Vec<Option<P>>,
}

impl<P, T, F> Sink<Result<P, Failure>> for Gather<P, T, F>
where
    P: Send + 'static,
    T: Send + 'static,
    F: FnOnce(Vec<P>) -> T + Send,
{
    fn wanted(&self, _: u64, now: Instant) -> Wanted {
        self.watch.wanted(now)
    }

    fn is_wanted(&self, _: u64, now: Instant) -> bool {
        self.watch.is_wanted(now)
    }

    fn deliver(&self, part: u64, outcome: Result<P, Failure>, at: Option<Instant>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(gathering) = &mut *state else { return };
        let whole = match outcome {
            Ok(outcome) => {
                // Each part has one reply, and a reply delivers once.
                gathering.parts[part as usize] = Some(outcome);
                gathering.left -= 1;
                if gathering.left > 0 {
                    return;
                }
                Ok(())
            }
            Err(failure) => Err(failure),
        };
        let Some(State { whole: reply, combine, parts, .. }) = state.take() else { return };
        // The receiver's code runs outside of the lock.
        drop(state);
        let whole = whole.map(|()| combine(parts.into_iter().flatten().collect()));
        match at {
            Some(at) => reply.send_at(whole, at),
            None => reply.send(whole),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Status;

    type Outcomes = std::sync::mpsc::Receiver<Result<Vec<u8>, Failure>>;

    fn start(len: usize) -> (Vec<Reply<Result<u8, Failure>>>, Outcomes) {
        let (sender, outcomes) = std::sync::mpsc::channel();
        let whole = Reply::call(move |outcome| sender.send(outcome).unwrap());
        (gather(len, whole, |parts| parts).collect(), outcomes)
    }

    #[test]
    fn parts_come_in_their_order_whatever_the_order_of_arrival() {
        let (parts, outcomes) = start(4);
        for (i, part) in parts.into_iter().enumerate().rev() {
            assert!(outcomes.try_recv().is_err(), "one is missing");
            part.send(Ok(i as u8));
        }
        assert_eq!(outcomes.iter().collect::<Vec<_>>(), [Ok(vec![0, 1, 2, 3])]);
    }

    #[test]
    fn the_first_failure_is_the_outcome_and_the_only_one() {
        let (mut parts, outcomes) = start(3);
        parts.remove(0).send(Ok(1));
        parts.remove(0).send(Err(Failure::new(Status::Overloaded, "full")));
        drop(parts);
        let all: Vec<_> = outcomes.iter().collect();
        assert_eq!(all, [Err(Failure::new(Status::Overloaded, "full"))]);
    }

    #[test]
    fn a_dropped_part_fails_the_whole() {
        let (parts, outcomes) = start(2);
        drop(parts);
        assert_eq!(outcomes.iter().collect::<Vec<_>>(), [Err(Failure::abandoned())]);
    }
}
