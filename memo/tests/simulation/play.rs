//! Plays one history: the storm with its requests and faults, the calm after it, and the end.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_memo::key::KeySpace;
use afterimage_wire::client::{CallOptions, Reply};
use afterimage_wire::proto::message::Classification;
use afterimage_wire::{CallError, Client, Status};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::checks::{self, Outcome};
use super::classifier::image;
use super::determinism::Dice;
use super::determinism::Digest;
use super::doubles::Defect;
use super::history::{Ask, Fault, Manner, Settings, Trouble};
use super::models::{NAMES, OF_BYTES, identities, row};
use super::network::Network;
use super::rows::{self, RowsAsk, RowsOutcome};
use super::world::World;
use super::{CLASSIFIERS, CLIENTS};

/// The time after the last fault within which everything works again.
pub(super) const RECOVERY: Duration = Duration::from_secs(1);

/// The time for which it must then work.
const FINE: Duration = Duration::from_millis(400);

/// The pause between two requests of the calm after the storm.
const EVERY: Duration = Duration::from_millis(20);

/// The timeout of a request in the calm, longer than any request takes when all is well.
pub(super) const PATIENT: Duration = Duration::from_millis(900);

/// The time after the last request in which all calls end: the classifier's timeout, and the period
/// of a client's check of its lost connections.
const QUIET: Duration = Duration::from_secs(4);

/// The time in which the last request arrives. Its client may have left.
const ARRIVES: Duration = Duration::from_millis(50);

/// The virtual time in which each history ends.
const FOR_EVER: Duration = Duration::from_secs(600);

/// The time until all first connections are made.
const WARM_UP: Duration = Duration::from_millis(100);

/// The period of the check of the limits.
const WATCH_EVERY: Duration = Duration::from_millis(7);

/// Images from this number on are requested after the storm only.
const FIRST_NEW_IMAGE: u8 = 100;

/// The pause before a refused request is repeated: time for the `GoAway` to arrive.
const PAUSE: Duration = Duration::from_millis(10);

/// The result of a history.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) digest: Digest,
    pub(super) complaints: Vec<String>,
    pub(super) requests: usize,
    pub(super) answers: usize,
    pub(super) hits: usize,
    pub(super) faults: usize,
}

/// Plays the history of a seed.
pub(super) fn play(seed: u64, defect: Option<Defect>, prints: bool) -> Report {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    runtime.block_on(async {
        let settings = Settings::of(seed);
        let network = Network::new(seed, CLIENTS + settings.clients, settings.window, prints);
        network.trace(|trace| trace.event(seed, || format!("{settings:?}")));
        let played = timeout(FOR_EVER, play_with(settings, defect, network.clone())).await;
        let mut report = played.unwrap_or_else(|_| Report {
            digest: network.trace(|trace| trace.digest()),
            complaints: vec![format!("it is not over after {FOR_EVER:?}")],
            requests: 0,
            answers: 0,
            hits: 0,
            faults: 0,
        });
        report.complaints.extend(network.complaints());
        report
    })
}

async fn play_with(settings: Settings, defect: Option<Defect>, network: Network) -> Report {
    let (asks, faults) = (settings.asks(), settings.faults());
    let count = faults.len();
    let world = World::start(settings, defect, network.clone());
    sleep(WARM_UP).await;
    let start = Instant::now();
    let watcher = tokio::spawn(watch(Arc::clone(&world)));

    let outcomes = Arc::new(Mutex::new(Vec::new()));
    let mut callers = JoinSet::new();
    for ask in asks {
        callers.spawn(call(Arc::clone(&world), start, ask, Arc::clone(&outcomes)));
    }
    for ask in world.settings.rows_asks() {
        callers.spawn(rows::call(Arc::clone(&world), start, ask));
    }
    for chore in world.settings.chores() {
        callers.spawn(rows::command(Arc::clone(&world), start, chore));
    }
    let mut storm = JoinSet::new();
    for (number, fault) in faults.into_iter().enumerate() {
        storm.spawn(strike(Arc::clone(&world), start, number as u64, fault));
    }
    while let Some(struck) = storm.join_next().await {
        struck.expect("a fault is no panic");
    }
    let mended = Instant::now();
    recover(&world, mended, &outcomes).await;
    while let Some(called) = callers.join_next().await {
        called.expect("a caller does not panic");
    }
    sleep(ARRIVES).await;
    // Requests whose clients have left wait until their deadlines.
    let quiet = Instant::now() + QUIET;
    while world.in_flight() != (0, 0) && Instant::now() < quiet {
        sleep(WATCH_EVERY).await;
    }
    checks::answers_from_the_store(&world).await;
    rows::takes_back(&world).await;
    sleep(QUIET).await;
    watcher.abort();

    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap());
    for outcome in &outcomes {
        checks::outcome(&world, outcome, mended);
    }
    let of_rows = std::mem::take(&mut *world.rows.lock().unwrap());
    for outcome in &of_rows {
        rows::check(&world, outcome, mended);
    }
    checks::calls(&world, &outcomes, &of_rows);
    rows::calls(&world, &of_rows);
    checks::settled(&world);
    let asked = |outcome: &RowsOutcome| outcome.ask.rows.len();
    Report {
        digest: network.trace(|trace| trace.digest()),
        complaints: Vec::new(),
        requests: outcomes.len() + of_rows.iter().map(asked).sum::<usize>(),
        answers: outcomes.iter().filter(|outcome| outcome.result.is_ok()).count()
            + of_rows.iter().filter(|outcome| outcome.result.is_ok()).map(asked).sum::<usize>(),
        hits: outcomes.iter().filter(|outcome| outcome.is_hit()).count()
            + of_rows.iter().map(RowsOutcome::hits).sum::<usize>(),
        faults: count,
    }
}

/// Sends requests while everything recovers, and for a while after that: an image of the storm, and
/// each time one new image, since a memo may not notice the state of its classifier without a miss.
async fn recover(world: &Arc<World>, mended: Instant, outcomes: &Arc<Mutex<Vec<Outcome>>>) {
    let mut dice = Dice::new(world.settings.seed, 6);
    let mut callers = JoinSet::new();
    let mut new_images = FIRST_NEW_IMAGE..u8::MAX;
    while mended.elapsed() < RECOVERY + FINE {
        let at = Duration::ZERO;
        let new = new_images.next().map(|image| (0, image));
        let known =
            (0..world.settings.clients).map(|client| (client, world.settings.image(&mut dice)));
        for (client, image) in new.into_iter().chain(known) {
            let ask = Ask { at, client, image, timeout: PATIENT, manner: Manner::Callback };
            callers.spawn(call(Arc::clone(world), mended, ask, Arc::clone(outcomes)));
        }
        // The store of bytes has a breaker of its own, and recovers with lookups.
        for name in 0..NAMES.len() {
            let rows = vec![world.settings.image(&mut dice), world.settings.image(&mut dice)];
            let client = dice.below(world.settings.clients);
            let (refresh, no_store) = (false, false);
            let ask = RowsAsk { at, client, name, rows, timeout: PATIENT, refresh, no_store };
            callers.spawn(rows::call(Arc::clone(world), mended, ask));
        }
        sleep(EVERY).await;
    }
    while let Some(called) = callers.join_next().await {
        called.expect("a caller does not panic");
    }
}

/// Makes one call and records its result.
async fn call(world: Arc<World>, start: Instant, ask: Ask, outcomes: Arc<Mutex<Vec<Outcome>>>) {
    sleep_until(start + ask.at).await;
    let client = &world.clients[ask.client];
    let began = Instant::now();
    let result = match ask.manner {
        Manner::Callback => call_back(client, &ask).await,
        Manner::Wait => wait(client, &ask).await,
        Manner::HangUp(after) => match timeout(after, wait(client, &ask)).await {
            Ok(result) => result,
            Err(_) => return,
        },
    };
    let outcome = Outcome { ask, began, ended: Instant::now(), result };
    world.network.trace(|trace| trace.event(outcome.summary(), || outcome.to_string()));
    outcomes.lock().unwrap().push(outcome);
}

type Answer = Result<(Classification, Option<[u8; 32]>), CallError>;

/// A server that shuts down, or whose model has changed, refuses requests that it has not started.
/// A caller with callbacks repeats them itself, as the memo does.
async fn call_back(client: &Client, ask: &Ask) -> Answer {
    let deadline = Instant::now() + ask.timeout;
    let mut retries = 2;
    loop {
        let (sender, receiver) = oneshot::channel();
        let left = deadline.saturating_duration_since(Instant::now());
        client.submit_classify(
            &image(ask.image),
            left,
            Reply::call(move |answer| {
                drop(sender.send(answer));
            }),
        );
        match receiver.await.expect("a callback is called") {
            Ok((label, welcome)) => return Ok((label, Some(welcome.digest))),
            Err(CallError::Server { status: Status::ShuttingDown, .. }) if retries > 0 => {
                retries -= 1;
                sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}

async fn wait(client: &Client, ask: &Ask) -> Answer {
    let options = CallOptions::new().timeout(ask.timeout);
    client.classify_with(&image(ask.image), options).await.map(|label| (label, None))
}

/// Starts a fault and ends it.
async fn strike(world: Arc<World>, start: Instant, number: u64, fault: Fault) {
    sleep_until(start + fault.at).await;
    let network = &world.network;
    network
        .trace(|trace| trace.event(number, || format!("{:?} for {:?}", fault.what, fault.lasts)));
    match fault.what {
        Trouble::Crash { host, .. } | Trouble::Drain { host, .. } if !world.is_up(host) => {}
        Trouble::Crash { host, silent, keep } => {
            world.crash(host, silent);
            sleep(fault.lasts).await;
            world.boot(host, keep);
        }
        Trouble::Drain { host, keep } => {
            world.drain(host).await;
            world.boot(host, keep);
        }
        Trouble::Stop { host } => {
            network.stop(host, true);
            sleep(fault.lasts).await;
            network.stop(host, false);
        }
        Trouble::Cut { a, b } => {
            network.cut(a, b, true);
            sleep(fault.lasts).await;
            network.cut(a, b, false);
        }
        Trouble::Slow { a, b } => {
            network.slow(a, b, Some(5..=150));
            sleep(fault.lasts).await;
            network.slow(a, b, None);
        }
        Trouble::Reset { a, b } => network.reset(a, b),
        Trouble::Poison => poison(&world, number, fault.lasts).await,
        Trouble::Corrupt { host } => {
            let classifier = &world.classifiers[host - CLASSIFIERS];
            let model = &world.models[number as usize % OF_BYTES];
            classifier.set_corrupt(true);
            model.set_fails(true);
            sleep(fault.lasts).await;
            classifier.set_corrupt(false);
            model.set_fails(false);
        }
        Trouble::NewModel { host, .. } if !world.is_up(host) => {}
        Trouble::NewModel { host, model } => {
            world.drain(host).await;
            world.classifiers[host - CLASSIFIERS].set_model(model);
            world.models[number as usize % OF_BYTES].set_version(model);
            world.boot(host, true);
        }
    }
    network.trace(|trace| trace.event(number, || format!("{:?} is over", fault.what)));
}

/// Writes invalid values into the table: flipped bits, other labels under a valid tag, values of
/// other keys, and noise.
async fn poison(world: &World, number: u64, lasts: Duration) {
    let mut dice = Dice::new(world.settings.seed, 100 + number);
    let until = Instant::now() + lasts;
    loop {
        let table = world.table();
        let entries: Vec<_> = table.entries().map(|entry| (entry.key, entry.value)).collect();
        for &(key, value) in &entries {
            let other = entries[dice.below(entries.len())].1;
            let planted = match dice.below(6) {
                0 => value ^ 1 << dice.below(64),
                1 => value ^ (1 + dice.bits() % 0xff),
                2 | 3 => other,
                4 => dice.bits(),
                _ => continue,
            };
            table.insert(key, planted);
        }
        poison_bytes(world, &mut dice);
        if Instant::now() >= until {
            return;
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// The same for stored answers of bytes: flipped bits, values of other keys, cut values, and noise.
fn poison_bytes(world: &World, dice: &mut Dice) {
    let (store, secret, now) = (world.bytes(), world.secret(), Instant::now().into_std());
    let mut other = None;
    for id in identities() {
        let name = NAMES.iter().position(|name| *name == id.name).expect("a model of bytes");
        let keys = KeySpace::new(&secret, Arc::new(id), dice.below(3) as u64);
        let keys = keys.expect("a complete model");
        for _ in 0..4 {
            let key = keys.hash(&row(name, world.settings.image(dice))).identity();
            let Some(found) = store.get(key, now) else { continue };
            let mut value = found.value.to_vec();
            match (dice.below(4), other.replace(found.value)) {
                (0, Some(other)) => value = other.to_vec(),
                (1, _) => value.truncate(dice.below(value.len().max(1))),
                (2, _) => value.fill(dice.bits() as u8),
                _ if value.is_empty() => {}
                _ => {
                    let at = dice.below(value.len());
                    value[at] ^= 1 << dice.below(8);
                }
            }
            store.insert(key, value.into(), None, now);
        }
    }
}

/// Checks the limits again and again.
async fn watch(world: Arc<World>) {
    loop {
        let (waiting, _) = world.in_flight();
        let cap = world.settings.max_waiting;
        if waiting > cap {
            world.network.complain(format!("{waiting} wait in the memo; the cap is {cap}"));
        }
        sleep(WATCH_EVERY).await;
    }
}
