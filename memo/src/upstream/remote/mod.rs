//! Classifiers across the network: anything that speaks the protocol, other memos included. One, or several that
//! share the work.
//!
//! **One model at a time.** Replicas may differ in model while a rollout is under way. The memo then
//! stands for the model that most of them have (see [`Balance::vote`]), says so in its `Welcome`,
//! and asks only those that have it: an image never gets now this, now that model's answer, and
//! whoever files answers under the memo's digest files them right. When the majority changes, all
//! connections are told at once. Before a replica's answer is believed, it is held against the
//! model that was asked for: the one in the `Welcome` of the very connection that brought it.
//!
//! **What goes wrong elsewhere is asked again elsewhere**: classification has no effects. What a replica
//! turned away unbegun (it drains), or was never sent, is free; anything else takes from the
//! [`RetryBudget`]. One that hangs or fails is ejected for a while ([`health`]).

mod balance;
mod budget;
mod health;
mod places;
mod replica;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_wire::client::Stage;
use afterimage_wire::proto::Status;
use afterimage_wire::proto::Welcome;
use afterimage_wire::proto::message::Label;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::{CallError, Client};
use arc_swap::ArcSwapOption;
use arrayvec::ArrayVec;

use super::{Answer, Classifier, Failure, Job, OnChange, Reply, Wanted};
use crate::clock;
use crate::key::ModelId;
#[cfg(test)]
use crate::plant::{self, Bug};
use balance::{Balance, Ejected};
use budget::RetryBudget;
use health::Outcome;
use replica::Replica;

pub use places::{Connect, Place, Resolve};

/// How often a request is sent again at most. Whoever fails three times would fail the fourth time, too.
const RETRIES: usize = 2;

/// Replicas at most: a name that stands for more is taken to mean its first ones. Each has a connection and
/// is looked at with every miss.
pub const MAX_REPLICAS: usize = 64;

/// Replicas that statistics name one by one.
const MAX_IN_STATS: usize = 16;

/// A replica that owes answers and has given none for this share of the timeout is held to hang: long before its
/// requests time out, and long after an answer was due.
const PATIENCE_SHARE: u32 = 4;

/// How remote classifiers are asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteOptions {
    /// What one attempt may take. The default is 5 s.
    pub timeout: Duration,
    /// Retries in hundredths of the requests. The default is 10.
    pub retry_percent: u32,
    /// Retries that may be saved up, and are there from the start. The default, 4,096, is what may be in
    /// flight on a busy replica when it dies.
    pub retry_burst: u32,
    /// Where chance begins when replicas are drawn; `None`, the default, is chance itself. For simulations
    /// that must be repeatable.
    pub seed: Option<u64>,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        RemoteOptions {
            timeout: Duration::from_secs(5),
            retry_percent: 10,
            retry_burst: 4096,
            seed: None,
        }
    }
}

/// Clients of classifiers.
pub struct Remote {
    options: RemoteOptions,
    state: Mutex<State>,
    /// The model that the memo stands for.
    model: ArcSwapOption<ModelId>,
    on_change: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    retries: AtomicU64,
    retries_denied: AtomicU64,
    moved: AtomicU64,
}

#[derive(Debug)]
struct State {
    balance: Balance<Arc<Replica>>,
    budget: RetryBudget,
    /// Why a name could not be looked up the last time.
    unresolved: Option<String>,
}

impl Remote {
    /// The one classifier behind `client`, which should fail fast: while the classifier is away,
    /// misses fail at once. Each attempt may take `timeout`.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(client: Client, timeout: Duration) -> Arc<Self> {
        let options = RemoteOptions { timeout, ..RemoteOptions::default() };
        Remote::of_clients([client], options)
    }

    /// The classifiers behind these clients, as [`Remote::new`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn of_clients(
        clients: impl IntoIterator<Item = Client>,
        options: RemoteOptions,
    ) -> Arc<Self> {
        let remote = Remote::empty(options);
        for client in clients {
            remote.add(client);
        }
        remote
    }

    fn empty(options: RemoteOptions) -> Arc<Self> {
        use std::hash::{BuildHasher, Hasher, RandomState};
        let seed = options.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let balance = Balance::new(options.timeout / PATIENCE_SHARE, seed);
        let budget = RetryBudget::new(options.retry_percent, options.retry_burst);
        Arc::new(Remote {
            options,
            state: Mutex::new(State { balance, budget, unresolved: None }),
            model: ArcSwapOption::empty(),
            on_change: Mutex::new(None),
            retries: AtomicU64::new(0),
            retries_denied: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        })
    }

    /// Takes a replica in and watches its connections come and go.
    fn add(self: &Arc<Self>, client: Client) -> u64 {
        let replica = Replica::new(client);
        let number = self.lock().balance.add(Arc::clone(&replica));
        let mut changes = replica.client.changes();
        let (remote, replica) = (Arc::downgrade(self), Arc::downgrade(&replica));
        let look = move || {
            let (remote, replica) = (remote.upgrade()?, replica.upgrade()?);
            remote.connection(number, replica.model());
            Some(())
        };
        look();
        tokio::spawn(async move { while changes.next().await && look().is_some() {} });
        number
    }

    /// Gives a replica up; what is in flight on it is still answered.
    fn remove(self: &Arc<Self>, number: u64) {
        let removed = self.lock().balance.remove(number);
        if let Some(replica) = removed {
            self.vote();
            tokio::spawn(async move { replica.client.close().await });
        }
    }

    fn connection(&self, number: u64, model: Option<Arc<ModelId>>) {
        self.lock().balance.connection(clock::now(), number, model);
        self.vote();
    }

    /// Sees which model the replicas stand for now, and tells when it is another one.
    fn vote(&self) {
        let changed = {
            let state = self.lock();
            let present = self.model.load_full();
            let elected = state.balance.vote(present.as_ref());
            let changed = elected != present;
            if changed {
                self.model.store(elected);
            }
            changed
        };
        if changed {
            let tell = self.on_change.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(tell) = tell {
                tell();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics half-way under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request to the replica that suits it best.
    fn send(self: &Arc<Self>, mut call: Call) {
        let now = clock::now();
        let timeout = match call.reply.wanted(now) {
            Wanted::NoMore => return,
            Wanted::Always => self.options.timeout,
            Wanted::Until(deadline) => (deadline - now).min(self.options.timeout),
        };
        call.cut_short = timeout < self.options.timeout;
        if !call.tried.is_empty() {
            self.retries.fetch_add(1, Relaxed);
        }
        let (picked, silent) = {
            let mut state = self.lock();
            let silent = state.balance.eject_silent(now);
            (state.pick(now, &call), silent)
        };
        self.ejected(silent, "it owes answers and gives none");
        match picked {
            Ok((number, replica)) => {
                call.tried.push(number);
                let (remote, image) = (Arc::clone(self), Arc::clone(&call.image));
                let from = Arc::clone(&replica);
                replica.client.submit_classify(&image, timeout, move |outcome| {
                    remote.ended(call, number, &from, outcome);
                });
            }
            Err(failure) => call.reply.send(Err(failure)),
        }
    }

    /// A replica has answered, or failed to.
    fn ended(
        self: &Arc<Self>,
        call: Call,
        number: u64,
        replica: &Replica,
        outcome: Result<(Label, Arc<Welcome>), CallError>,
    ) {
        let verdict = match &outcome {
            Ok(_) => Verdict { outcome: Outcome::Answered, again: Again::Never },
            Err(error) => Verdict::of(error),
        };
        let about_it = match verdict.outcome {
            Outcome::TimedOut if call.cut_short => Outcome::CutShort,
            outcome => outcome,
        };
        let ejected = self.lock().balance.ended(clock::now(), number, about_it);
        let reason = outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        self.ejected(ejected, &reason);
        match outcome {
            Ok((label, welcome)) => {
                let model = replica.model_of(&welcome);
                let is_asked_for = call.reply.model().is_none_or(|asked| *asked == model);
                #[cfg(test)]
                let is_asked_for = is_asked_for || plant::is_planted(Bug::SkipModelCheck);
                if is_asked_for {
                    return call.reply.send(Ok(Answer { label: label.class, model }));
                }
                // Another model's answer is nobody's here. Another replica may have the right one.
                self.moved.fetch_add(1, Relaxed);
                self.again(call, Again::Free, Failure::moved());
            }
            Err(error) => {
                let id = call.reply.request_id();
                let server = replica.address();
                tracing::debug!(id, server, %error, "the classifier did not answer");
                let again = match error.status() {
                    // Its time was that of those who waited then. If somebody waits still, he came later.
                    Status::DeadlineExceeded if call.cut_short => Again::Free,
                    _ => verdict.again,
                };
                self.again(call, again, failure(&error, server));
            }
        }
    }

    /// Asks another replica, if that is worth while and the budget allows it.
    fn again(self: &Arc<Self>, call: Call, again: Again, failure: Failure) {
        let allowed = call.tried.len() <= RETRIES
            && match again {
                Again::Never => false,
                Again::Free => true,
                Again::Paid => {
                    let mut state = self.lock();
                    // Who is asked in vain costs no more for being asked again.
                    let elsewhere = state.balance.offers(call.reply.model(), &call.tried);
                    let allowed = elsewhere && state.budget.spend();
                    if elsewhere && !allowed {
                        self.retries_denied.fetch_add(1, Relaxed);
                    }
                    allowed
                }
            };
        if !allowed {
            return call.reply.send(Err(failure));
        }
        self.send(call);
    }

    fn ejected(&self, ejected: impl IntoIterator<Item = Ejected<Arc<Replica>>>, reason: &str) {
        let mut any = false;
        for Ejected { replica, time } in ejected {
            any = true;
            let server = replica.address();
            tracing::warn!(server, ?time, reason, "a classifier gets no requests for a while");
        }
        if any {
            self.vote();
        }
    }
}

impl State {
    /// Where a call goes next.
    fn pick(&mut self, now: Instant, call: &Call) -> Result<(u64, Arc<Replica>), Failure> {
        let model = call.reply.model();
        if call.tried.is_empty() {
            self.budget.earn();
        }
        let picked = self
            .balance
            .pick(now, model, &call.tried)
            .or_else(|| self.balance.pick(now, model, &[]));
        if let Some(picked) = picked {
            return Ok(picked);
        }
        if self.balance.any_connected() {
            // The model has gone with the last replica that had it.
            return Err(Failure::moved());
        }
        // Nobody is there: who is asked says why, or is just changing to a new connection.
        self.balance.pick_any(now, &call.tried).ok_or_else(|| Failure {
            status: Status::UpstreamCrashed,
            text: self.unresolved.clone().unwrap_or_else(|| "there is no classifier yet".into()),
        })
    }
}

/// A request on its way.
struct Call {
    image: Arc<[u8]>,
    reply: Reply,
    /// The numbers of the replicas that were asked.
    tried: ArrayVec<u64, { RETRIES + 1 }>,
    /// The last attempt had less time than it might have had, since nobody waited longer.
    cut_short: bool,
}

/// What an error means for the replica and for the request.
struct Verdict {
    outcome: Outcome,
    again: Again,
}

/// Whether a request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// It would fail elsewhere, too.
    Never,
    /// It was not begun.
    Free,
    /// Work was done on it, or may have been.
    Paid,
}

impl Verdict {
    fn of(error: &CallError) -> Self {
        let (outcome, again) = match error {
            CallError::Server { status, .. } => match status {
                Status::ShuttingDown => (Outcome::Refused, Again::Free),
                Status::BadArgument | Status::TooLarge => (Outcome::Answered, Again::Never),
                Status::Overloaded | Status::DeadlineExceeded => (Outcome::Refused, Again::Paid),
                _ => (Outcome::Failed, Again::Paid),
            },
            CallError::DeadlineExceeded { stage: Stage::Connecting, .. } => {
                (Outcome::Lost, Again::Paid)
            }
            CallError::DeadlineExceeded { .. } => (Outcome::TimedOut, Again::Paid),
            CallError::ConnectionLost { .. } => (Outcome::Lost, Again::Paid),
            CallError::Unavailable { .. } | CallError::Refused { .. } => {
                (Outcome::Lost, Again::Paid)
            }
            CallError::Closed => (Outcome::Lost, Again::Free),
            CallError::TooLarge { .. } | CallError::BadArgument { .. } => {
                (Outcome::Lost, Again::Never)
            }
            CallError::QueueFull { .. } => (Outcome::Lost, Again::Paid),
            _ => (Outcome::Failed, Again::Paid),
        };
        Verdict { outcome, again }
    }
}

impl Classifier for Arc<Remote> {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.model.load_full()
    }

    fn on_change(&self, tell: OnChange) {
        *self.on_change.lock().unwrap_or_else(PoisonError::into_inner) = Some(tell.into());
    }

    fn trouble(&self) -> Option<String> {
        let state = self.lock();
        let mut members = state.balance.members();
        let trouble = members.find_map(|(_, member)| {
            let error = member.replica.client.last_error()?;
            Some(format!("{}: {error}", member.replica.address()))
        });
        trouble.or_else(|| state.unresolved.clone())
    }

    fn is_idle(&self) -> bool {
        let state = self.lock();
        state.balance.any_connected() && state.balance.in_flight() == 0
    }

    fn classify(&self, jobs: Vec<Job>) {
        for Job { image, reply } in jobs {
            self.send(Call {
                image: image.into(),
                reply,
                tried: ArrayVec::new(),
                cut_short: false,
            });
        }
    }

    fn stats(&self, stats: &mut Stats) {
        let state = self.lock();
        let connected = state.balance.members().filter(|(_, m)| m.model.is_some()).count();
        stats.text("classifier", "remote");
        stats.text("classifier_connected", if connected > 0 { "yes" } else { "no" });
        stats.gauge("classifiers", state.balance.members().count() as u64);
        stats.gauge("classifiers_connected", connected as u64);
        stats.counter("classifier_ejections", state.balance.ejections);
        stats.counter("classifier_retries", self.retries.load(Relaxed));
        stats.counter("classifier_retries_denied", self.retries_denied.load(Relaxed));
        stats.counter("classifier_answers_of_other_models", self.moved.load(Relaxed));
        for (i, (_, member)) in state.balance.members().take(MAX_IN_STATS).enumerate() {
            let about = match &member.model {
                None => "not connected".to_owned(),
                Some(model) => {
                    let state = if member.health.is_well() { "well" } else { "ejected" };
                    let [a, b, c, d, ..] = model.digest;
                    let in_flight = member.health.in_flight;
                    format!("{state}, model {a:02x}{b:02x}{c:02x}{d:02x}…, {in_flight} in flight")
                }
            };
            let address = member.replica.address();
            stats.text(&format!("classifier_{}", i + 1), format!("{address}: {about}"));
        }
    }
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("state", &*self.lock()).finish_non_exhaustive()
    }
}

/// What the memo's client is told of an error of the memo's own client.
fn failure(error: &CallError, server: &str) -> Failure {
    let status = match error.status() {
        // These are about the memo's request, not about the client's.
        Status::Unauthenticated
        | Status::Unsupported
        | Status::TooLarge
        | Status::DeadlineExceeded => Status::UpstreamError,
        status => status,
    };
    Failure { status, text: format!("classifier {server}: {error}") }
}
