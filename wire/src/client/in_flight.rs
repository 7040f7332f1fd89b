//! The table of calls without an outcome, found by request id.
//!
//! Pure: no socket and no clock; time is an argument. It is a slab whose slots count their calls:
//! an id is `generation << 32 | slot`, and a slot's generation grows when its call leaves. So an id
//! is never reused while it is in flight, and a reply that comes late (after a timeout, a
//! cancellation, or twice) finds no call instead of the slot's next one.

use std::time::Instant;

/// Calls without an outcome, and the earliest deadline among them.
#[derive(Debug)]
pub(super) struct InFlight<C> {
    slots: Vec<Slot<C>>,
    free: Vec<u32>,
    /// No deadline in the table is earlier. It may belong to a call that has left.
    earliest: Option<Instant>,
    /// The generations of a slot have wrapped, so that old ids cannot be distinguished from new
    /// ones.
    ran_over: bool,
}

#[derive(Debug)]
struct Slot<C> {
    generation: u32,
    tenant: Option<(Instant, C)>,
}

/// The first generation, above 0: no id is below 2³², and small ids are free for the connection's
/// own frames.
const FIRST_GENERATION: u32 = 1;

impl<C> InFlight<C> {
    /// An empty table.
    pub(super) fn new() -> Self {
        InFlight { slots: Vec::new(), free: Vec::new(), earliest: None, ran_over: false }
    }

    /// How many calls are in the table.
    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether the table is empty.
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Inserts a call and returns its id.
    pub(super) fn insert(&mut self, deadline: Instant, call: C) -> u64 {
        if self.earliest.is_none_or(|earliest| deadline < earliest) {
            self.earliest = Some(deadline);
        }
        let slot = self.free.pop().unwrap_or_else(|| {
            let slot = u32::try_from(self.slots.len()).expect("memory ends before 2^32 slots do");
            self.slots.push(Slot { generation: FIRST_GENERATION, tenant: None });
            slot
        });
        let place = &mut self.slots[slot as usize];
        debug_assert!(place.tenant.is_none(), "a free slot has no tenant");
        place.tenant = Some((deadline, call));
        u64::from(place.generation) << 32 | u64::from(slot)
    }

    /// The deadline and the call of this id, if it is in flight.
    pub(super) fn get_mut(&mut self, id: u64) -> Option<(Instant, &mut C)> {
        let slot = self.slots.get_mut(slot_of(id))?;
        if slot.generation != generation_of(id) {
            return None;
        }
        let (deadline, call) = slot.tenant.as_mut()?;
        Some((*deadline, call))
    }

    /// Whether this id was given to a call that has left since: a late reply is no violation.
    pub(super) fn has_left(&self, id: u64) -> bool {
        self.slots.get(slot_of(id)).is_some_and(|slot| {
            let generations = FIRST_GENERATION..slot.generation;
            self.ran_over || generations.contains(&generation_of(id))
        })
    }

    /// Removes the call of this id; `None` if the id is not in flight.
    pub(super) fn remove(&mut self, id: u64) -> Option<C> {
        let slot = self.slots.get(slot_of(id))?;
        if slot.generation != generation_of(id) {
            return None;
        }
        self.vacate(slot_of(id)).map(|(_, call)| call)
    }

    /// Removes all calls for which `leaves` is true and hands them to `taken`.
    pub(super) fn remove_where(
        &mut self,
        mut leaves: impl FnMut(&C) -> bool,
        mut taken: impl FnMut(C),
    ) {
        for slot in 0..self.slots.len() {
            if matches!(&self.slots[slot].tenant, Some((_, call)) if leaves(call))
                && let Some((_, call)) = self.vacate(slot)
            {
                taken(call);
            }
        }
    }

    /// The time at which [`InFlight::expire`] should be called next. It may be too early, never too
    /// late.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.earliest
    }

    /// Removes all calls whose deadline is not after `now` and hands them to `taken`.
    ///
    /// It visits every slot, but only when the earliest deadline is due.
    pub(super) fn expire(&mut self, now: Instant, mut taken: impl FnMut(C)) {
        if self.earliest.is_none_or(|earliest| now < earliest) {
            return;
        }
        self.earliest = None;
        for slot in 0..self.slots.len() {
            match self.slots[slot].tenant {
                Some((deadline, _)) if deadline <= now => {
                    if let Some((_, call)) = self.vacate(slot) {
                        taken(call);
                    }
                }
                Some((deadline, _)) if self.earliest.is_none_or(|earliest| deadline < earliest) => {
                    self.earliest = Some(deadline);
                }
                _ => {}
            }
        }
    }

    fn vacate(&mut self, slot: usize) -> Option<(Instant, C)> {
        let place = self.slots.get_mut(slot)?;
        let tenant = place.tenant.take()?;
        place.generation = place.generation.checked_add(1).unwrap_or_else(|| {
            self.ran_over = true;
            FIRST_GENERATION
        });
        self.free.push(slot as u32);
        Some(tenant)
    }
}

fn slot_of(id: u64) -> usize {
    (id & u64::from(u32::MAX)) as usize
}

fn generation_of(id: u64) -> u32 {
    (id >> 32) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{HashMap, HashSet};
    use std::time::Duration;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn ten_thousand_calls_in_flight_have_ten_thousand_ids() {
        let (mut table, now) = (InFlight::new(), Instant::now());
        let mut ids: Vec<u64> = (0..10_000).map(|n| table.insert(now, n)).collect();
        for round in 0..3 {
            let distinct: HashSet<u64> = ids.iter().copied().collect();
            assert_eq!((distinct.len(), table.len()), (10_000, 10_000));
            for id in ids.iter_mut().step_by(2 + round) {
                assert!(table.remove(*id).is_some());
                *id = table.insert(now, 0);
            }
        }
    }

    #[test]
    fn a_late_id_never_finds_the_slots_next_tenant() {
        let (mut table, now) = (InFlight::new(), Instant::now());
        let first = table.insert(now, "first");
        assert_eq!(table.remove(first), Some("first"));
        let second = table.insert(now, "second");
        assert_eq!(slot_of(first), slot_of(second), "the slot is used again");
        assert_eq!(table.remove(first), None);
        assert_eq!(table.get_mut(first), None);
        assert_eq!(table.remove(second), Some("second"));
    }

    #[test]
    fn a_generation_that_runs_over_skips_the_small_ids() {
        let (mut table, now) = (InFlight::new(), Instant::now());
        let id = table.insert(now, ());
        table.slots[slot_of(id)].generation = u32::MAX;
        assert_eq!(table.remove(u64::from(u32::MAX) << 32), Some(()));
        assert_eq!(table.insert(now, ()) >> 32, u64::from(FIRST_GENERATION));
    }

    #[test]
    fn unknown_ids_find_nothing() {
        let mut table = InFlight::new();
        table.insert(Instant::now(), ());
        for id in [0, 1, u64::MAX, 1 << 32 | 7, 2 << 32] {
            assert_eq!(table.remove(id), None, "{id}");
            assert!(!table.has_left(id), "{id}");
        }
    }

    #[test]
    fn distinguishes_an_abandoned_call_from_an_unknown_id() {
        let (mut table, now) = (InFlight::new(), Instant::now());
        let first = table.insert(now, ());
        assert!(!table.has_left(first), "it is there");
        table.remove(first);
        assert!(table.has_left(first) && !table.has_left(first + (1 << 32)));
        let second = table.insert(now, ());
        assert!(table.has_left(first) && !table.has_left(second));
        // After four thousand million calls in one slot, the generation wraps.
        table.slots[slot_of(second)].generation = u32::MAX;
        assert!(table.remove(u64::from(u32::MAX) << 32).is_some());
        assert!(table.has_left(second) && table.has_left(u64::from(u32::MAX) << 32));
        assert!(!table.has_left(1), "that slot never was");
    }

    #[test]
    fn expires_what_is_due_and_knows_the_next_deadline() {
        let (mut table, start) = (InFlight::new(), Instant::now());
        for ms in [30, 10, 20] {
            table.insert(at(start, ms), ms);
        }
        assert_eq!(table.next_deadline(), Some(at(start, 10)));
        let mut expired = Vec::new();
        table.expire(at(start, 9), |call| expired.push(call));
        assert!(expired.is_empty());
        table.expire(at(start, 20), |call| expired.push(call));
        expired.sort_unstable();
        assert_eq!(expired, [10, 20]);
        assert_eq!(table.next_deadline(), Some(at(start, 30)));
        table.expire(at(start, 30), |call| expired.push(call));
        assert_eq!((table.len(), table.next_deadline()), (0, None));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Insert(u64),
        Remove(usize),
        Expire(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0u64..100).prop_map(Op::Insert),
            any::<usize>().prop_map(Op::Remove),
            (0u64..100).prop_map(Op::Expire),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_a_map_whose_keys_never_come_back(ops in prop::collection::vec(op(), 1..200)) {
            let start = Instant::now();
            let mut table = InFlight::new();
            let mut model: HashMap<u64, u64> = HashMap::new();
            let mut seen: Vec<u64> = Vec::new();
            for op in ops {
                match op {
                    Op::Insert(ms) => {
                        let id = table.insert(at(start, ms), ms);
                        prop_assert!(!seen.contains(&id));
                        seen.push(id);
                        model.insert(id, ms);
                    }
                    Op::Remove(n) if !seen.is_empty() => {
                        let id = seen[n % seen.len()];
                        prop_assert_eq!(table.remove(id), model.remove(&id));
                    }
                    Op::Remove(_) => {}
                    Op::Expire(ms) => {
                        let mut expired = Vec::new();
                        table.expire(at(start, ms), |call| expired.push(call));
                        expired.sort_unstable();
                        let mut due: Vec<u64> = model.values().copied().filter(|&d| d <= ms).collect();
                        due.sort_unstable();
                        prop_assert_eq!(expired, due);
                        model.retain(|_, d| *d > ms);
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                let earliest = model.values().min().map(|&ms| at(start, ms));
                prop_assert!(earliest.is_none() || table.next_deadline() <= earliest);
            }
        }
    }
}
