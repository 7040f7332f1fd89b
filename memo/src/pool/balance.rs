//! The choice of a replica for each request, and of the model that the pool serves. Pure: time is
//! an argument, and randomness comes from a seed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::splitmix::{STEP, mix};
use smallvec::SmallVec;

use super::endpoint::{BatchLimit, Endpoint};
use super::health::{Health, Outcome};
use super::limit::Limit;
use afterimage_core::ModelId;

/// The chance of each replica, on the stack for a usual number of them.
type Shares = SmallVec<[f64; 8]>;

/// A replica, its health and its model.
#[derive(Debug)]
pub(super) struct Member<R> {
    pub(super) replica: R,
    pub(super) health: Health,
    pub(super) limit: Limit,
    /// The model of its open connection; `None` without one.
    pub(super) model: Option<Arc<ModelId>>,
}

impl<R> Member<R> {
    /// Whether it has as many rows in flight as its limit allows.
    fn is_full(&self) -> bool {
        self.health.in_flight >= self.limit.get()
    }
}

/// The replicas of a pool, by numbers that are never used twice.
#[derive(Debug)]
pub(super) struct Balance<R> {
    members: Vec<(u64, Member<R>)>,
    numbers: u64,
    random: u64,
    /// The time without an answer after which a replica counts as hung.
    patience: Duration,
    pub(super) ejections: u64,
}

/// A replica that was ejected, and for how long. For the log.
pub(super) struct Ejected<R> {
    pub(super) replica: R,
    pub(super) time: Duration,
}

impl Balance<Arc<dyn Endpoint>> {
    /// The rows that every connected replica of `model` takes together; one row without a replica.
    pub(super) fn batch(&self, model: &Arc<ModelId>) -> BatchLimit {
        let usable =
            self.members().filter(|&(number, member)| fits(number, member, Some(model), &[]));
        let limits = usable.map(|(_, member)| member.replica.batch());
        limits.reduce(BatchLimit::min).unwrap_or(BatchLimit::ONE_ROW)
    }
}

impl<R: Clone> Balance<R> {
    pub(super) fn new(patience: Duration, seed: u64) -> Self {
        Balance { members: Vec::new(), numbers: 0, random: seed, patience, ejections: 0 }
    }

    /// Adds a replica and returns its number.
    pub(super) fn add(&mut self, replica: R) -> u64 {
        self.numbers += 1;
        let (health, limit) = (Health::new(), Limit::new());
        self.members.push((self.numbers, Member { replica, health, limit, model: None }));
        self.numbers
    }

    /// Removes a replica.
    pub(super) fn remove(&mut self, number: u64) -> Option<R> {
        let at = self.members.iter().position(|(other, _)| *other == number)?;
        Some(self.members.remove(at).1.replica)
    }

    pub(super) fn members(&self) -> impl Iterator<Item = (u64, &Member<R>)> {
        self.members.iter().map(|(number, member)| (*number, member))
    }

    fn member(&mut self, number: u64) -> Option<&mut Member<R>> {
        self.members.iter_mut().find(|(other, _)| *other == number).map(|(_, member)| member)
    }

    /// Records that a replica is connected and runs `model`, or is not connected (`None`).
    pub(super) fn connection(&mut self, now: Instant, number: u64, model: Option<Arc<ModelId>>) {
        if let Some(member) = self.member(number) {
            if model.is_some() {
                member.health.connected(now);
            }
            member.model = model;
        }
    }

    /// The model that most replicas run. `present` stays on a tie, and while no replica is
    /// connected.
    ///
    /// Connected and healthy replicas count; if no replica is healthy, all connected ones. A model
    /// whose answers cannot be stored counts only if there is no other.
    pub(super) fn vote(&self, present: Option<&Arc<ModelId>>) -> Option<Arc<ModelId>> {
        let healthy = |member: &Member<R>| member.health.is_healthy();
        let good = |model: &ModelId| model.objection().is_none();
        self.majority(present, |member, model| healthy(member) && good(model))
            .or_else(|| self.majority(present, |_, model| good(model)))
            .or_else(|| self.majority(present, |_, _| true))
            .or_else(|| present.cloned())
    }

    fn majority(
        &self,
        present: Option<&Arc<ModelId>>,
        counts: impl Fn(&Member<R>, &ModelId) -> bool,
    ) -> Option<Arc<ModelId>> {
        let voters = || {
            self.members.iter().filter_map(|(_, member)| {
                member.model.as_ref().filter(|model| counts(member, model))
            })
        };
        let votes = |model: &Arc<ModelId>| voters().filter(|other| *other == model).count();
        // Of several models with the most votes the first wins, so that the outcome is repeatable.
        let mut best: Option<(&Arc<ModelId>, usize)> = None;
        for model in voters() {
            let votes = votes(model);
            if best.is_none_or(|(_, most)| votes > most) {
                best = Some((model, votes));
            }
        }
        let (winner, most) = best?;
        match present {
            Some(present) if votes(present) >= most => Some(Arc::clone(present)),
            _ => Some(Arc::clone(winner)),
        }
    }

    /// Ejects the replicas that have owed answers for too long.
    pub(super) fn eject_silent(&mut self, now: Instant) -> Vec<Ejected<R>> {
        let silent: Vec<u64> = self
            .members()
            .filter(|(_, member)| member.health.is_silent(now, self.patience))
            .map(|(number, _)| number)
            .collect();
        silent.into_iter().filter_map(|number| self.eject(now, number)).collect()
    }

    /// Chooses a replica of `model` (`None`: of any model) that is not in `tried`, for a request of
    /// this number of rows. `None` if no such replica is connected.
    ///
    /// Draws two replicas at random and takes the one with fewer requests in flight (Mitzenmacher,
    /// "The power of two choices in randomized load balancing", IEEE TPDS 12(10), 2001). A replica
    /// that warms up is drawn less often. An ejected replica is drawn only if all are ejected: an
    /// ejection is a guess, and an attempt that may fail is better than no attempt. A replica at
    /// its limit of requests in flight is drawn only if all are.
    pub(super) fn pick(
        &mut self,
        now: Instant,
        model: Option<&Arc<ModelId>>,
        tried: &[u64],
        rows: usize,
    ) -> Option<(u64, R)> {
        let shares_by = |share: &dyn Fn(&Member<R>) -> f64| -> Shares {
            let share = |(number, member): (u64, &Member<R>)| {
                if fits(number, member, model, tried) { share(member) } else { 0.0 }
            };
            self.members().map(share).collect()
        };
        let none = |shares: &[f64]| shares.iter().all(|&share| share == 0.0);
        let mut shares = shares_by(&|member| match member.is_full() {
            true => 0.0,
            false => member.health.share(now),
        });
        if none(&shares) {
            shares = shares_by(&|member| member.health.share(now));
        }
        if none(&shares) {
            shares = shares_by(&|_| 1.0);
        }
        let first = self.draw(&shares)?;
        shares[first] = 0.0;
        let chosen = match self.draw(&shares) {
            Some(second) if self.load(second) < self.load(first) => second,
            _ => first,
        };
        let (number, member) = &mut self.members[chosen];
        member.health.sent(now, rows);
        Some((*number, member.replica.clone()))
    }

    /// Whether a request that waits should be sent now: a replica with `model` has fewer requests
    /// in flight than its limit allows. Ejected replicas count when all are. Also true without a
    /// replica, since such a request fails at once.
    pub(super) fn has_place(&self, model: Option<&Arc<ModelId>>) -> bool {
        let usable = || self.members().filter(|&(number, member)| fits(number, member, model, &[]));
        let any_healthy = usable().any(|(_, member)| member.health.is_healthy());
        let mut counted =
            usable().filter(|(_, member)| member.health.is_healthy() || !any_healthy).peekable();
        counted.peek().is_none() || counted.any(|(_, member)| !member.is_full())
    }

    /// A replica has answered a request of this number of rows after this time, while others waited
    /// for a place.
    pub(super) fn adapt_limit(&mut self, number: u64, took: Duration, rows: usize) {
        if let Some(member) = self.member(number) {
            member.limit.answered(took, rows);
        }
    }

    /// Whether a connected replica of `model` is not in `tried`.
    pub(super) fn offers(&self, model: Option<&Arc<ModelId>>, tried: &[u64]) -> bool {
        self.members().any(|(number, member)| fits(number, member, model, tried))
    }

    /// Whether a connected and healthy replica of `model` is not in `tried`.
    pub(super) fn offers_healthy(&self, model: Option<&Arc<ModelId>>, tried: &[u64]) -> bool {
        self.members().any(|(number, member)| {
            fits(number, member, model, tried) && member.health.is_healthy()
        })
    }

    /// Chooses any replica, connected or not; one that is not in `tried` if possible.
    pub(super) fn pick_any(
        &mut self,
        now: Instant,
        tried: &[u64],
        rows: usize,
    ) -> Option<(u64, R)> {
        let fresh = |(number, _): &(u64, Member<R>)| f64::from(u8::from(!tried.contains(number)));
        let fresh: Shares = self.members.iter().map(fresh).collect();
        let all = Shares::from_elem(1.0, self.members.len());
        let chosen = self.draw(&fresh).or_else(|| self.draw(&all))?;
        let (number, member) = &mut self.members[chosen];
        member.health.sent(now, rows);
        Some((*number, member.replica.clone()))
    }

    /// Whether any replica is connected.
    pub(super) fn any_connected(&self) -> bool {
        self.members().any(|(_, member)| member.model.is_some())
    }

    /// The rows in flight on all replicas.
    pub(super) fn in_flight(&self) -> usize {
        self.members().map(|(_, member)| member.health.in_flight).sum()
    }

    /// Records the end of a request with this number of rows. Returns the replica if this ejects
    /// it.
    pub(super) fn ended(
        &mut self,
        now: Instant,
        number: u64,
        outcome: Outcome,
        rows: usize,
    ) -> Option<Ejected<R>> {
        let ejects = self.member(number)?.health.ended(now, outcome, rows);
        ejects.then(|| self.eject(now, number)).flatten()
    }

    /// Ejects a replica, unless it is the last healthy and connected one of its model. A replica
    /// that fails is better than none, and a replica of another model cannot replace it.
    fn eject(&mut self, now: Instant, number: u64) -> Option<Ejected<R>> {
        let own = self.member(number)?.model.clone();
        if !self.offers_healthy(own.as_ref(), &[number]) {
            return None;
        }
        let chance = self.chance();
        let member = self.member(number)?;
        let time = member.health.eject(now, chance);
        let replica = member.replica.clone();
        self.ejections += 1;
        Some(Ejected { replica, time })
    }

    fn load(&self, at: usize) -> usize {
        self.members[at].1.health.in_flight
    }

    /// Draws an index in proportion to the shares.
    fn draw(&mut self, shares: &[f64]) -> Option<usize> {
        let sum: f64 = shares.iter().sum();
        if sum == 0.0 {
            return None;
        }
        let mut left = self.chance() * sum;
        let fits = |share: &f64| {
            left -= share;
            left < 0.0 && *share > 0.0
        };
        shares.iter().position(fits).or_else(|| shares.iter().rposition(|&share| share > 0.0))
    }

    /// A random number from 0 to below 1.
    fn chance(&mut self) -> f64 {
        self.random = self.random.wrapping_add(STEP);
        (mix(self.random) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Whether a replica runs `model` and is not in `tried`.
fn fits<R>(number: u64, member: &Member<R>, model: Option<&Arc<ModelId>>, tried: &[u64]) -> bool {
    !tried.contains(&number)
        && member.model.as_ref().is_some_and(|own| model.is_none_or(|model| own == model))
}

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_wire::proto::Shape;

    const PATIENCE: Duration = Duration::from_secs(1);

    fn model(digest: u8) -> Arc<ModelId> {
        let shape = Shape::new(&[4]).unwrap();
        Arc::new(ModelId::labels([digest; 32], Some(shape), 10))
    }

    /// Replicas with these models (0 for no connection), named by their index.
    fn balance(models: &[u8]) -> (Balance<usize>, Instant) {
        // Well after the connections, so that all are warm.
        let connected = Instant::now();
        let mut balance = Balance::new(PATIENCE, 7);
        for (i, &digest) in models.iter().enumerate() {
            let number = balance.add(i);
            balance.connection(connected, number, (digest > 0).then(|| model(digest)));
        }
        (balance, connected + Duration::from_secs(3600))
    }

    fn vote(models: &[u8], present: u8) -> Option<u8> {
        let present = (present > 0).then(|| model(present));
        balance(models).0.vote(present.as_ref()).map(|model| model.digest[0])
    }

    /// Lets a replica fail ten times; returns whether this ejected it.
    fn fail(balance: &mut Balance<usize>, now: Instant, number: u64) -> bool {
        (0..10).any(|_| {
            balance.member(number).unwrap().health.sent(now, 1);
            balance.ended(now, number, Outcome::Failed, 1).is_some()
        })
    }

    #[test]
    fn the_majority_sets_the_model_and_a_tie_keeps_it() {
        assert_eq!(vote(&[], 0), None);
        assert_eq!(vote(&[1, 2, 2], 1), Some(2));
        assert_eq!(vote(&[1, 1, 2, 2], 1), Some(1));
        assert_eq!(vote(&[1, 1, 2, 2], 2), Some(2));
        assert_eq!(vote(&[1, 1, 2, 2], 3), Some(1));
        assert_eq!(vote(&[0, 0, 2], 1), Some(2), "an unconnected replica does not count");
        assert_eq!(vote(&[0, 0], 1), Some(1), "the last model stays while no replica is connected");
    }

    #[test]
    fn ejected_replicas_vote_only_if_no_other_is_connected() {
        let (mut balance, now) = balance(&[1, 1, 1, 2, 2]);
        assert!(fail(&mut balance, now, 1) && fail(&mut balance, now, 2));
        assert_eq!(balance.vote(Some(&model(1))), Some(model(2)));
        for gone in [3, 4, 5] {
            balance.connection(now, gone, None);
        }
        assert_eq!(balance.vote(Some(&model(2))), Some(model(1)));
    }

    #[test]
    fn a_replica_of_another_model_is_no_replacement() {
        let (mut balance, now) = balance(&[1, 2, 2]);
        assert!(!fail(&mut balance, now, 1), "no other replica runs its model");
        balance.pick(now, Some(&model(1)), &[], 1).unwrap();
        assert!(balance.eject_silent(now + PATIENCE).is_empty(), "not even when it hangs");
        assert!(fail(&mut balance, now, 2), "the third replica runs the same model");
        assert!(!fail(&mut balance, now, 3), "the third is the last one now");
        assert!(
            balance.offers(Some(&model(2)), &[3]) && !balance.offers_healthy(Some(&model(2)), &[3])
        );
    }

    #[test]
    fn picks_an_untried_replica_of_the_requested_model() {
        let (mut balance, now) = balance(&[1, 2, 1, 0]);
        for _ in 0..100 {
            let (number, _) = balance.pick(now, Some(&model(1)), &[], 1).unwrap();
            let (other, _) = balance.pick(now, Some(&model(1)), &[number], 1).unwrap();
            assert_eq!([number.min(other), number.max(other)], [1, 3]);
            assert!(balance.pick(now, Some(&model(1)), &[1, 3], 1).is_none());
            assert!(balance.pick(now, Some(&model(9)), &[], 1).is_none());
        }
    }

    #[test]
    fn the_less_loaded_of_two_balances_unequal_replicas() {
        // The first answers one request in a step, the others four each: 9, and 8 requests come.
        let (mut balance, now) = balance(&[1, 1, 1]);
        let mut waiting = [0_usize; 3];
        let mut most = 0;
        for _ in 0..10_000 {
            for _ in 0..8 {
                let (_, at) = balance.pick(now, Some(&model(1)), &[], 1).unwrap();
                waiting[at] += 1;
            }
            for (at, speed) in [(0, 1), (1, 4), (2, 4)] {
                for _ in 0..speed.min(waiting[at]) {
                    waiting[at] -= 1;
                    balance.ended(now, at as u64 + 1, Outcome::Answered, 1);
                }
            }
            most = most.max(waiting[0]);
        }
        assert!(most < 60, "{most} requests wait for the slow replica (17,000 with round robin)");
    }

    #[test]
    fn an_ejected_replica_is_used_only_without_another() {
        let (mut balance, now) = balance(&[1, 1]);
        assert!(fail(&mut balance, now, 1));
        for _ in 0..100 {
            assert_eq!(balance.pick(now, Some(&model(1)), &[], 1).unwrap().0, 2);
        }
        assert!(!fail(&mut balance, now, 2), "the last one stays");
        balance.connection(now, 2, None);
        for _ in 0..10 {
            assert_eq!(balance.pick(now, Some(&model(1)), &[], 1).unwrap().0, 1);
        }
        assert_eq!(balance.ejections, 1);
    }

    #[test]
    fn a_full_replica_gets_no_request_while_another_has_a_place() {
        let (mut balance, now) = balance(&[1, 1, 2]);
        let one = model(1);
        let mut sent = [0; 2];
        while balance.has_place(Some(&one)) {
            let (number, _) = balance.pick(now, Some(&one), &[], 1).unwrap();
            sent[number as usize - 1] += 1;
        }
        assert_eq!(sent, [Limit::new().get(); 2]);
        balance.ended(now, 2, Outcome::Answered, 1);
        assert!(balance.has_place(Some(&one)));
        assert_eq!(balance.pick(now, Some(&one), &[], 1).unwrap().0, 2);
        assert!(!balance.has_place(Some(&one)), "the third has another model");
        assert!(balance.pick(now, Some(&one), &[], 1).is_some(), "a retry is sent all the same");
        assert!(balance.has_place(Some(&model(9))), "without a replica it fails at once");
    }

    #[test]
    fn a_hung_replica_is_ejected_after_the_silence_limit() {
        let (mut balance, now) = balance(&[1, 1]);
        balance.pick(now, Some(&model(1)), &[2], 1).unwrap();
        assert!(balance.eject_silent(now + PATIENCE / 2).is_empty());
        assert_eq!(balance.eject_silent(now + PATIENCE).len(), 1);
        assert_eq!(balance.pick(now + PATIENCE, Some(&model(1)), &[], 1).unwrap().0, 2);
    }

    #[test]
    fn who_warms_up_gets_a_growing_share() {
        let (mut balance, now) = balance(&[1, 1]);
        balance.connection(now, 1, Some(model(1)));
        let mut share = |now| {
            let mut to_first = 0;
            for _ in 0..1000 {
                let (number, _) = balance.pick(now, Some(&model(1)), &[], 1).unwrap();
                to_first += usize::from(number == 1);
                balance.ended(now, number, Outcome::Answered, 1);
            }
            to_first
        };
        let shares = [0, 5, 10].map(|seconds| share(now + Duration::from_secs(seconds)));
        assert!(shares[0] < 200 && shares[0] < shares[1] && shares[1] < shares[2], "{shares:?}");
        assert!(shares[2] > 400, "{shares:?}");
    }
}
