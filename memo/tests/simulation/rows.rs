//! Requests of several rows for several models, and flush and forget: their plan and their checks.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::{Answer, Origin, RowAnswer};
use afterimage_wire::client::{CallOptions, Infer, Inference};
use afterimage_wire::{CallError, Status};
use tokio::time::{Instant, sleep_until};

use super::checks::{FEW, SLACK, WAYS, is_possible};
use super::classifier::label;
use super::determinism::Dice;
use super::doubles::Defect;
use super::history::{STORM_MS, Settings, Weather};
use super::models::{NAMES, row, stamp_in};
use super::play::{PATIENT, RECOVERY};
use super::world::{MAX_QUEUE_WAIT, World};
use super::{CLIENTS, MEMO};

/// A request of rows.
#[derive(Clone, Debug)]
pub(super) struct RowsAsk {
    pub(super) at: Duration,
    pub(super) client: usize,
    /// The index of the model in `NAMES`.
    pub(super) name: usize,
    pub(super) rows: Vec<u8>,
    pub(super) timeout: Duration,
    pub(super) refresh: bool,
    pub(super) no_store: bool,
}

/// A command of an operator.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chore {
    pub(super) at: Duration,
    pub(super) client: usize,
    pub(super) what: Command,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Command {
    Flush { name: usize },
    FlushAll,
    Forget { name: usize, number: u8 },
}

/// A flush that the memo has confirmed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flushed {
    name: usize,
    /// Answers from now on have at least this stamp.
    stamp: u32,
    at: Instant,
    /// The memo that confirmed it.
    boot: usize,
}

/// A request of rows and its result.
#[derive(Clone, Debug)]
pub(super) struct RowsOutcome {
    pub(super) ask: RowsAsk,
    began: Instant,
    ended: Instant,
    /// The number of memos that had started when it ended.
    boot: usize,
    pub(super) result: Result<Inference, CallError>,
}

impl RowsOutcome {
    /// The part that counts when two runs of a seed are compared.
    fn summary(&self) -> (usize, &[u8], Result<Vec<Origin>, Status>) {
        let origins = |answers: &Inference| answers.rows.iter().map(|row| row.origin).collect();
        let result = self.result.as_ref().map(origins).map_err(CallError::status);
        (self.ask.name, &self.ask.rows, result)
    }

    /// The number of hits.
    pub(super) fn hits(&self) -> usize {
        let is_hit = |row: &&RowAnswer| row.origin == Origin::Hit;
        self.result.as_ref().map_or(0, |answers| answers.rows.iter().filter(is_hit).count())
    }
}

impl fmt::Display for RowsOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RowsAsk { client, name, rows, timeout, refresh, no_store, .. } = &self.ask;
        let took = self.ended - self.began;
        write!(f, "client {client}, model {:?}, rows {rows:?}, {timeout:?}", NAMES[*name])?;
        write!(
            f,
            "{}{}: ",
            if *refresh { ", refresh" } else { "" },
            if *no_store { ", no store" } else { "" }
        )?;
        match &self.result {
            Ok(answers) => {
                let origins: Vec<_> = answers.rows.iter().map(|row| row.origin).collect();
                write!(f, "{origins:?} of model {}", answers.digest[0])?;
            }
            Err(error) => write!(f, "{error}")?,
        }
        write!(f, " after {took:?}")
    }
}

impl Settings {
    /// The requests of rows of a history.
    pub(super) fn rows_asks(&self) -> Vec<RowsAsk> {
        let mut dice = Dice::new(self.seed, 7);
        let stormy = self.weather == Weather::Stormy;
        let calm = self.weather == Weather::Calm;
        let mut asks: Vec<_> = (0..10 + dice.below(40))
            .map(|_| RowsAsk {
                at: Duration::from_millis(dice.of(0..=STORM_MS)),
                client: dice.below(self.clients),
                name: dice.below(NAMES.len()),
                rows: (0..1 + dice.below(8)).map(|_| self.image(&mut dice)).collect(),
                timeout: Duration::from_millis(match stormy {
                    true => dice.pick(&[5, 30, 100, 500, 2000, 70_000]),
                    false => 5000,
                }),
                refresh: !calm && dice.one_in(10),
                no_store: !calm && dice.one_in(10),
            })
            .collect();
        asks.sort_by_key(|ask| ask.at);
        asks
    }

    /// The commands of a history's operators. None in calm weather, whose calls are counted.
    pub(super) fn chores(&self) -> Vec<Chore> {
        let mut dice = Dice::new(self.seed, 8);
        let count = if self.weather == Weather::Calm { 0 } else { dice.below(8) };
        let mut chore = || {
            let name = dice.below(NAMES.len());
            let what = match dice.below(4) {
                0 => Command::FlushAll,
                1 => Command::Forget { name, number: self.image(&mut dice) },
                _ => Command::Flush { name },
            };
            let at = Duration::from_millis(dice.of(0..=STORM_MS));
            Chore { at, client: dice.below(self.clients), what }
        };
        (0..count).map(|_| chore()).collect()
    }
}

/// Sends rows and records the result.
pub(super) async fn call(world: Arc<World>, start: Instant, ask: RowsAsk) {
    sleep_until(start + ask.at).await;
    let began = Instant::now();
    let result = infer(&world, &ask).await;
    let (ended, boot) = (Instant::now(), world.boots());
    let outcome = RowsOutcome { ask, began, ended, boot, result };
    world.network.trace(|trace| trace.event(outcome.summary(), || outcome.to_string()));
    world.rows.lock().unwrap().push(outcome);
}

async fn infer(world: &World, ask: &RowsAsk) -> Result<Inference, CallError> {
    let rows = ask.rows.iter().map(|&number| row(ask.name, number));
    let mut request = Infer::rows(NAMES[ask.name], rows);
    if ask.refresh {
        request = request.refresh();
    }
    if ask.no_store {
        request = request.no_store();
    }
    let options = CallOptions::new().timeout(ask.timeout);
    world.clients[ask.client].infer_with(&request, options).await
}

/// Runs an operator's command.
pub(super) async fn command(world: Arc<World>, start: Instant, chore: Chore) {
    sleep_until(start + chore.at).await;
    let Chore { client, what, .. } = chore;
    world.network.trace(|trace| trace.event(client, || format!("client {client}: {what:?}")));
    let (names, flushes) = match what {
        Command::FlushAll => (1..NAMES.len(), true),
        Command::Flush { name } => (name..name + 1, true),
        Command::Forget { name, .. } => (name..name + 1, false),
    };
    let stamps: Vec<_> = match flushes {
        true => names
            .filter(|&name| name > 0)
            .map(|name| (name, world.models[name - 1].bump()))
            .collect(),
        false => Vec::new(),
    };
    let boot = world.boots();
    let admin = world.clients[client].admin();
    let done = match what {
        _ if world.defect == Some(Defect::IgnoredFlush) => Ok(()),
        Command::FlushAll => admin.flush("").await,
        // Without a name, a flush is of all models.
        Command::Flush { name: 0 } => Ok(()),
        Command::Flush { name } => admin.flush(NAMES[name]).await,
        Command::Forget { name, number } => {
            admin.forget(NAMES[name], "", &row(name, number)).await.map(drop)
        }
    };
    match done {
        Ok(()) if world.boots() == boot => {
            let at = Instant::now();
            let flushed = stamps.into_iter().map(|(name, stamp)| Flushed { name, stamp, at, boot });
            world.flushed.lock().unwrap().extend(flushed);
        }
        Ok(()) => {}
        Err(error) if is_possible(&error) => {}
        Err(error) => world.network.complain(format!("{what:?}: {error}")),
    }
}

/// Checks one request: each row has the right answer or the request a typed error, in time.
pub(super) fn check(world: &World, outcome: &RowsOutcome, mended: Instant) {
    let complain = |what: &str| world.network.complain(format!("{what}: {outcome}"));
    let (settings, ask) = (&world.settings, &outcome.ask);
    let took = outcome.ended - outcome.began;
    if took > ask.timeout + SLACK {
        complain("past its deadline");
    }
    let over = outcome.began > mended + RECOVERY && ask.timeout >= PATIENT;
    match &outcome.result {
        Ok(answers) => {
            let digest = answers.digest[0];
            let stamps: Option<Vec<u32>> = std::iter::zip(&ask.rows, &answers.rows)
                .map(|(&number, row)| right(ask.name, digest, number, &row.answer))
                .collect();
            match stamps.and_then(|stamps| stamps.into_iter().min()) {
                None => complain("a wrong answer"),
                Some(stamp) if ask.name > 0 && stamp < required(world, outcome) => {
                    complain("an answer older than the flush");
                }
                Some(_) => {}
            }
            if ask.refresh && outcome.hits() > 0 {
                complain("a stored answer in place of a new one");
            }
            let live = match ask.name {
                0 => world.live(),
                name => vec![world.models[name - 1].digest()],
            };
            if over && !live.contains(&digest) {
                complain("an old model's answer long after the change");
            }
        }
        Err(error) if !is_possible(error) => complain("an error that must not be"),
        Err(error) if over || settings.weather != Weather::Stormy => {
            let few_may_wait = settings.max_waiting < FEW;
            if !(few_may_wait && error.status() == Status::Overloaded) {
                complain("everything should work");
            }
        }
        Err(_) => {}
    }
    if settings.weather == Weather::CacheOnly {
        let waits = if ask.name > 0 { MAX_QUEUE_WAIT } else { Duration::ZERO };
        let limit = settings.lookup_budget + Duration::from_millis(settings.classifier_ms) + WAYS;
        let crowding =
            world.network.crowding(CLIENTS + ask.client, MEMO, outcome.began, outcome.ended);
        let limit = limit + waits + crowding;
        if took > limit {
            complain("a cache in trouble costs too much");
        }
    }
}

/// The stamp of a right answer (0 for a label); `None` for a wrong one.
pub(super) fn right(name: usize, digest: u8, number: u8, answer: &Answer) -> Option<u32> {
    match answer {
        Answer::Label(found) => (name == 0 && *found == label(digest, number)).then_some(0),
        Answer::Bytes(found) => stamp_in(found, digest, number).filter(|_| name > 0),
    }
}

/// The least stamp of an answer: that of the last flush which the same memo had confirmed before.
fn required(world: &World, outcome: &RowsOutcome) -> u32 {
    let flushed = world.flushed.lock().unwrap();
    let before = |flushed: &&Flushed| {
        flushed.name == outcome.ask.name
            && flushed.at < outcome.began
            && flushed.boot == outcome.boot
    };
    flushed.iter().filter(before).map(|flushed| flushed.stamp).max().unwrap_or(0)
}

/// Rows that only [`takes_back`] requests: two.
const LAST: [u8; 2] = [251, 252];

/// Rows of the label model that `takes_back` makes the classifiers compute.
pub(super) const CALLS_AT_THE_END: u64 = 2 + 1 + 2;

/// After the storm: stored answers are hits, `forget` takes one back, and `flush` takes all back.
pub(super) async fn takes_back(world: &World) {
    use Origin::{Hit, Miss};
    let last = world.clients.len() - 1;
    for (name, &model) in NAMES.iter().enumerate() {
        let asked = async |client: usize, expected: [Origin; 2]| {
            let ask = RowsAsk {
                at: Duration::ZERO,
                client,
                name,
                rows: LAST.to_vec(),
                timeout: Duration::from_secs(5),
                refresh: false,
                no_store: false,
            };
            let answers = infer(world, &ask).await;
            let origins: Result<Vec<Origin>, _> =
                answers.map(|answers| answers.rows.iter().map(|row| row.origin).collect());
            if origins.as_deref().ok() != Some(&expected[..]) {
                let found = format!("{origins:?}, not {expected:?}");
                world.network.complain(format!("after the storm model {model:?} gave {found}"));
            }
        };
        let admin = world.clients[0].admin();
        asked(0, [Miss, Miss]).await;
        asked(last, [Hit, Hit]).await;
        let forgotten = admin.forget(model, "", &row(name, LAST[0])).await;
        asked(last, [Miss, Hit]).await;
        let ignored = world.defect == Some(Defect::IgnoredFlush);
        let flushed = if ignored { Ok(()) } else { admin.flush(model).await };
        asked(0, [Miss, Miss]).await;
        asked(last, [Hit, Hit]).await;
        if forgotten.is_err() || flushed.is_err() {
            world.network.complain(format!("after the storm {forgotten:?}, {flushed:?}"));
        }
    }
}

/// In calm weather: one computation for each requested row of a model of bytes.
pub(super) fn calls(world: &World, outcomes: &[RowsOutcome]) {
    if world.settings.weather != Weather::Calm {
        return;
    }
    for (name, model) in (1..).zip(&world.models) {
        let of_model = outcomes.iter().filter(|outcome| outcome.ask.name == name);
        let rows: BTreeSet<u8> = of_model.flat_map(|outcome| outcome.ask.rows.clone()).collect();
        let (calls, rows) = (model.rows(), rows.len() as u64 + CALLS_AT_THE_END);
        if calls != rows {
            let name = NAMES[name];
            world.network.complain(format!("model {name:?}: {calls} calls for {rows} rows"));
        }
    }
}
