//! The in-flight table of one connection: the request of each id, and its times.
//!
//! An id is a running number and a slot, so finding a request is one index and one comparison, and
//! no id is ever used twice on a connection.

use std::collections::HashSet;

use crate::workload::MAX_POPULATION;

/// Bits of an id that name the slot. See [`crate::plan::MAX_DEPTH`].
const SLOT_BITS: u32 = 20;
const SLOT_MASK: u64 = (1 << SLOT_BITS) - 1;

/// The id of every write: writes have no reply, so nothing needs to distinguish them. The running
/// number of a request starts at 1, so no request has it.
pub(crate) const WRITE_ID: u64 = 0;

/// Stands for no image and no key: their numbers are below [`crate::workload::MAX_POPULATION`].
const FENCE: u32 = u32::MAX;

/// Stands for an image or key that is in no population.
const FRESH: u32 = u32::MAX - 1;

const _: () = assert!(MAX_POPULATION <= FRESH as usize);

/// The subject of a request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// The image or key of this number.
    About(u32),
    /// A new image or key.
    Fresh,
    /// Nothing: a ping after writes, whose reply confirms them.
    Fence,
}

/// A request in flight. Two of them fill a cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(crate) struct Request {
    id: u64,
    /// When it was to be sent, in nanoseconds since the run's epoch.
    pub(crate) due_ns: u64,
    /// When it was handed to the kernel.
    pub(crate) sent_ns: u64,
    about: u32,
    /// Writes sent just before it, which its reply confirms.
    pub(crate) writes: u32,
}

const _: () = assert!(size_of::<Request>() == 32);

impl Request {
    const NONE: Request = Request { id: EMPTY, due_ns: 0, sent_ns: 0, about: FENCE, writes: 0 };

    /// Its subject.
    #[inline]
    pub(crate) fn asked(&self) -> Asked {
        match self.about {
            FENCE => Asked::Fence,
            FRESH => Asked::Fresh,
            about => Asked::About(about),
        }
    }
}

/// The request of an id in a reply.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Closed {
    /// A request, removed from the table.
    Request(Request),
    /// A request that has timed out: the reply is late.
    Late,
    /// No open request: the id is unknown, or its request was answered before.
    Nothing,
}

/// All requests in flight on a connection.
#[derive(Debug)]
pub(crate) struct InFlight {
    slots: Vec<Request>,
    free: Vec<u32>,
    issued: u64,
    given_up: HashSet<u64>,
    /// Slots of the requests that are encoded and not yet handed to the kernel.
    unsent: Vec<u32>,
}

/// The id of an empty slot: as [`WRITE_ID`], it is never that of a request.
const EMPTY: u64 = 0;

impl InFlight {
    /// A table for `depth` requests.
    pub(crate) fn new(depth: usize) -> Self {
        debug_assert!(depth as u64 <= SLOT_MASK + 1, "a slot fits its bits");
        let slots = depth as u32;
        InFlight {
            slots: vec![Request::NONE; depth],
            free: (0..slots).rev().collect(),
            issued: 0,
            given_up: HashSet::new(),
            unsent: Vec::with_capacity(depth.min(4096)),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds a request; `None` when the table is full.
    #[inline]
    pub(crate) fn open(&mut self, due_ns: u64, asked: Asked, writes: u32) -> Option<u64> {
        let slot = self.free.pop()?;
        self.issued += 1;
        let id = self.issued << SLOT_BITS | u64::from(slot);
        let about = match asked {
            Asked::About(about) => about,
            Asked::Fresh => FRESH,
            Asked::Fence => FENCE,
        };
        let sent_ns = u64::MAX;
        self.slots[slot as usize] = Request { id, due_ns, sent_ns, about, writes };
        self.unsent.push(slot);
        Some(id)
    }

    /// Notes when the requests taken in since the last call were handed to the kernel.
    #[inline]
    pub(crate) fn mark_sent(&mut self, sent_ns: u64) {
        for slot in self.unsent.drain(..) {
            self.slots[slot as usize].sent_ns = sent_ns;
        }
    }

    /// Takes out the request that a reply with this id answers.
    #[inline]
    pub(crate) fn close(&mut self, id: u64) -> Closed {
        let slot = (id & SLOT_MASK) as usize;
        match self.slots.get_mut(slot) {
            Some(request) if request.id == id && id != EMPTY => {
                let found = *request;
                request.id = EMPTY;
                self.free.push(slot as u32);
                Closed::Request(found)
            }
            _ if self.given_up.remove(&id) => Closed::Late,
            _ => Closed::Nothing,
        }
    }

    /// Gives up the requests that were sent before `before_ns`, passing each to `each`.
    pub(crate) fn give_up(&mut self, before_ns: u64, mut each: impl FnMut(Request)) {
        for (slot, request) in self.slots.iter_mut().enumerate() {
            if request.id != EMPTY && request.sent_ns < before_ns {
                each(*request);
                self.given_up.insert(request.id);
                request.id = EMPTY;
                self.free.push(slot as u32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_find_their_requests_in_any_order_and_only_once() {
        let mut flight = InFlight::new(3);
        let ids: Vec<u64> =
            (0..3).map(|i| flight.open(i, Asked::About(i as u32), 0).unwrap()).collect();
        assert_eq!(flight.open(9, Asked::Fence, 0), None);
        for i in [2usize, 0, 1] {
            let Closed::Request(request) = flight.close(ids[i]) else { panic!("not found") };
            assert_eq!(request.asked(), Asked::About(i as u32));
            assert!(matches!(flight.close(ids[i]), Closed::Nothing));
        }
        assert!(flight.is_empty());
        let again = flight.open(0, Asked::Fence, 0).unwrap();
        assert!(!ids.contains(&again), "an id was used twice");
    }

    #[test]
    fn ids_of_writes_and_unknown_ids_match_no_request() {
        let mut flight = InFlight::new(2);
        assert!(matches!(flight.close(WRITE_ID), Closed::Nothing));
        assert!(matches!(flight.close(1 << SLOT_BITS), Closed::Nothing));
        assert!(matches!(flight.close(u64::MAX), Closed::Nothing));
        assert_eq!(flight.len(), 0);
    }

    #[test]
    fn a_reply_after_its_request_was_given_up_is_late_once() {
        let mut flight = InFlight::new(2);
        let old = flight.open(0, Asked::About(1), 5).unwrap();
        flight.mark_sent(10);
        let new = flight.open(0, Asked::About(2), 0).unwrap();
        flight.mark_sent(20);
        let mut given_up = Vec::new();
        flight.give_up(15, |request| given_up.push((request.asked(), request.writes)));
        assert_eq!(given_up, [(Asked::About(1), 5)]);
        assert!(matches!(flight.close(old), Closed::Late));
        assert!(matches!(flight.close(old), Closed::Nothing));
        assert!(matches!(flight.close(new), Closed::Request(_)));
    }
}
