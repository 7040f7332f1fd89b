//! The checks of a history: they must hold under all faults.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use afterimage_wire::client::CallOptions;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::{CallError, Status};
use tokio::time::Instant;

use super::classifier::{Classifier, image, label};
use super::history::{Ask, Weather};
use super::play::{PATIENT, RECOVERY};
use super::rows::{CALLS_AT_THE_END, RowsOutcome};
use super::world::World;
use super::{CLIENTS, MEMO};

/// The time that a call may take beyond its timeout: the timer's granularity, and the pause before
/// a request is repeated at a server that shuts down.
pub(super) const SLACK: Duration = Duration::from_millis(20);

/// The time that a request may take beyond the lookup budget and the classifier's time, in any
/// state of the cache: the links between client, memo and classifier, rounded to milliseconds.
/// Large rows on the client's connection come on top: `Network::crowding`.
pub(super) const WAYS: Duration = Duration::from_millis(20);

/// Below this limit of requests in flight, `Overloaded` is an allowed answer.
pub(super) const FEW: usize = 100;

/// A call and its result.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    pub(super) ask: Ask,
    pub(super) began: Instant,
    pub(super) ended: Instant,
    /// The answer, and the digest in the connection's `Welcome`.
    pub(super) result: Result<(Classification, Option<[u8; 32]>), CallError>,
}

impl Outcome {
    pub(super) fn is_hit(&self) -> bool {
        matches!(self.result, Ok((Classification { origin: Origin::Hit, .. }, _)))
    }

    /// The part that counts when two runs of a seed are compared.
    pub(super) fn summary(&self) -> (usize, u8, Result<(u16, Origin), Status>) {
        let result = self.result.as_ref().map(|(label, _)| (label.label, label.origin));
        (self.ask.client, self.ask.image, result.map_err(CallError::status))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ask { client, image, timeout, manner, .. } = self.ask;
        let took = self.ended - self.began;
        write!(f, "client {client}, image {image}, {manner:?}, {timeout:?}: ")?;
        match &self.result {
            Ok((label, digest)) => {
                let model = digest.map(|digest| digest[0]);
                write!(f, "{} ({:?}) of model {model:?}", label.label, label.origin)?;
            }
            Err(error) => write!(f, "{error}")?,
        }
        write!(f, " after {took:?}")
    }
}

/// Checks one call: the right label or a typed error, in time, and an answer where one is promised.
pub(super) fn outcome(world: &World, outcome: &Outcome, mended: Instant) {
    let complain = |what: &str| world.network.complain(format!("{what}: {outcome}"));
    let (settings, took) = (&world.settings, outcome.ended - outcome.began);
    if took > outcome.ask.timeout + SLACK {
        complain("past its deadline");
    }
    match &outcome.result {
        Ok((answer, digest)) => {
            let right = match digest {
                Some(digest) => world
                    .model_of(digest)
                    .is_some_and(|model| label(model, outcome.ask.image) == answer.label),
                None => (1..=settings.models)
                    .any(|model| label(model, outcome.ask.image) == answer.label),
            };
            if !right {
                complain("a wrong label");
            }
        }
        Err(error) if !is_possible(error) => complain("an error that must not be"),
        Err(_) => {}
    }
    let over = outcome.began > mended + RECOVERY && outcome.ask.timeout >= PATIENT;
    if over || settings.weather != Weather::Stormy {
        let live = world.live();
        let few_may_wait = settings.max_waiting < FEW;
        match &outcome.result {
            Err(error) if few_may_wait && error.status() == Status::Overloaded => {}
            Err(_) => complain("everything should work"),
            Ok((_, Some(digest))) if over && !live.contains(&digest[0]) => {
                complain("an old model's answer long after the change");
            }
            Ok(_) => {}
        }
    }
    if settings.weather == Weather::CacheOnly {
        let limit = settings.lookup_budget + Duration::from_millis(settings.classifier_ms) + WAYS;
        let host = CLIENTS + outcome.ask.client;
        let limit = limit + world.network.crowding(host, MEMO, outcome.began, outcome.ended);
        if took > limit {
            complain("a cache in trouble costs too much");
        }
    }
}

/// Whether a client in this weather may get this error.
pub(super) fn is_possible(error: &CallError) -> bool {
    match error {
        CallError::Server { status, .. } => matches!(
            status,
            Status::UpstreamError
                | Status::UpstreamCrashed
                | Status::UpstreamCorrupt
                | Status::Overloaded
                | Status::DeadlineExceeded
                | Status::ShuttingDown
        ),
        CallError::DeadlineExceeded { .. }
        | CallError::ConnectionLost { .. }
        | CallError::Unavailable { .. } => true,
        _ => false,
    }
}

/// In calm weather: one call for each requested image.
pub(super) fn calls(world: &World, outcomes: &[Outcome], rows: &[RowsOutcome]) {
    if world.settings.weather != Weather::Calm {
        return;
    }
    let rows = rows.iter().filter(|outcome| outcome.ask.name == 0);
    let rows = rows.flat_map(|outcome| outcome.ask.rows.iter().copied());
    let images = outcomes.iter().map(|outcome| outcome.ask.image);
    let images: BTreeSet<u8> = images.chain(rows).collect();
    // The images that `answers_from_the_store` and `takes_back` request after the storm are extra.
    let images = images.len() as u64 + 1 + CALLS_AT_THE_END;
    let calls: u64 = world.classifiers.iter().map(Classifier::calls).sum();
    if calls != images {
        world.network.complain(format!("{calls} calls for {images} images"));
    }
}

/// After the storm: the second request for an image is a hit.
pub(super) async fn answers_from_the_store(world: &World) {
    let options = || CallOptions::new().timeout(Duration::from_secs(5));
    // An image that no other request has used.
    let image = image(u8::MAX);
    let classes = world.live().into_iter().map(|model| label(model, u8::MAX));
    let classes: Vec<u16> = classes.collect();
    for (client, origin) in [(0, Origin::Miss), (world.clients.len() - 1, Origin::Hit)] {
        match world.clients[client].classify_with(&image, options()).await {
            Ok(answer) if answer.origin == origin && classes.contains(&answer.label) => {}
            answer => {
                let complaint = format!("after the storm {answer:?}, not {origin:?} {classes:?}");
                world.network.complain(complaint);
            }
        }
    }
}

/// In the end there is no call in flight, no waiter, no request without its reply, and no byte on
/// the network.
pub(super) fn settled(world: &World) {
    let (waiting, under_way) = world.in_flight();
    if (waiting, under_way) != (0, 0) {
        world.network.complain(format!("in the end {waiting} wait for {under_way} calls"));
    }
    let alive = world.memos_alive();
    if alive != 1 {
        world.network.complain(format!("in the end there are {alive} memos"));
    }
    for (number, client) in world.clients.iter().enumerate() {
        let counters = client.counters();
        if (counters.in_flight, counters.queued_bytes) != (0, 0) {
            world.network.complain(format!("in the end client {number} has {counters:?}"));
        }
    }
    for complaint in world.network.unanswered().into_iter().chain(world.network.unread()) {
        world.network.complain(complaint);
    }
}
