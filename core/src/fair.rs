//! A bounded queue that serves its clients in turn.
//!
//! A first-in-first-out queue lets one client that floods it delay all others. Here each client
//! has a queue of its own, and [`FairQueue::pop`] takes from them in turn by weight (deficit round
//! robin: Shreedhar and Varghese, "Efficient Fair Queueing Using Deficit Round-Robin", IEEE/ACM
//! Transactions on Networking 4(3), 1996, with items of equal cost). So an item of a client that
//! has nothing else waiting is served within one round.
//!
//! One capacity bounds all items. A client may have as many waiting as there are free places
//! (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches",
//! IEEE/ACM Transactions on Networking 6(2), 1998). A single busy client takes half of the
//! capacity, and `n` of them settle at `1/(n+1)` each. A client with fewer than [`GUARANTEED`]
//! items waiting is admitted also when the others have filled the queue.

use std::collections::VecDeque;
use std::fmt;

use fxhash::FxHashMap;

/// The client that an item belongs to: a connection, a token or a tenant, as the caller decides.
pub type ClientId = u64;

/// Items that each client may always have waiting. So the queue holds at most
/// `capacity + GUARANTEED × clients` items.
pub const GUARANTEED: usize = 16;

/// Ends a list of nodes.
const NONE: u32 = u32::MAX;

/// The bounded queue. It is a pure data structure: callers lock it.
///
/// ```
/// use afterimage_core::FairQueue;
///
/// let mut queue = FairQueue::new(1000);
/// for item in 0..100 {
///     queue.push(1, 1, item).unwrap();
/// }
/// queue.push(2, 1, 100).unwrap();
/// assert_eq!(queue.pop(), Some(0));
/// assert_eq!(queue.pop(), Some(100), "the second client waits for one item, not for a hundred");
/// ```
pub struct FairQueue<T> {
    capacity: usize,
    len: usize,
    /// All items, and free nodes, in one allocation.
    nodes: Vec<Node<T>>,
    free: u32,
    clients: FxHashMap<ClientId, Client>,
    /// The clients with items, the next one to serve first.
    turns: VecDeque<ClientId>,
    /// Items that the first client in `turns` may still have in this turn.
    credit: u32,
}

struct Node<T> {
    item: Option<T>,
    next: u32,
}

#[derive(Clone, Copy, Debug)]
struct Client {
    head: u32,
    tail: u32,
    len: usize,
    weight: u32,
}

/// An item that the queue has no place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused<T> {
    /// The item.
    pub item: T,
    /// Items of the same client that wait already.
    pub waiting: usize,
    /// Items that this client may have waiting now.
    pub limit: usize,
}

impl<T> FairQueue<T> {
    /// An empty queue for `capacity` items, at least 1 and at most 2³² − 2.
    ///
    /// # Panics
    /// When `capacity` is out of range.
    pub fn new(capacity: usize) -> Self {
        assert!((1..NONE as usize).contains(&capacity), "a capacity of {capacity} items");
        FairQueue {
            capacity,
            len: 0,
            nodes: Vec::new(),
            free: NONE,
            clients: FxHashMap::default(),
            turns: VecDeque::new(),
            credit: 0,
        }
    }

    /// Appends an item for `client`. A client of weight `n` gets `n` items in each round; 0 counts
    /// as 1. The latest weight of a client counts.
    ///
    /// # Errors
    /// [`Refused`], with the item, when the client has as many items waiting as places are free,
    /// and at least [`GUARANTEED`].
    pub fn push(&mut self, client: ClientId, weight: u32, item: T) -> Result<(), Refused<T>> {
        let waiting = self.clients.get(&client).map_or(0, |client| client.len);
        let free = self.capacity.saturating_sub(self.len);
        let share = free.saturating_mul(weight.max(1) as usize).min(waiting + free);
        let limit = share.max(GUARANTEED);
        if waiting >= limit || self.len >= NONE as usize {
            return Err(Refused { item, waiting, limit });
        }
        let node = self.node(item);
        let fresh = Client { head: node, tail: node, len: 0, weight: 1 };
        let client = match self.clients.entry(client) {
            std::collections::hash_map::Entry::Occupied(client) => {
                let client = client.into_mut();
                self.nodes[client.tail as usize].next = node;
                client.tail = node;
                client
            }
            std::collections::hash_map::Entry::Vacant(entry) => {
                if self.turns.is_empty() {
                    self.credit = weight.max(1);
                }
                self.turns.push_back(client);
                entry.insert(fresh)
            }
        };
        client.len += 1;
        client.weight = weight.max(1);
        self.len += 1;
        Ok(())
    }

    /// Takes the next item, in turn.
    pub fn pop(&mut self) -> Option<T> {
        let id = *self.turns.front()?;
        let client = self.clients.get_mut(&id).expect("a client with a turn has items");
        let node = &mut self.nodes[client.head as usize];
        let item = node.item.take();
        let emptied = client.head;
        client.head = std::mem::replace(&mut node.next, self.free);
        self.free = emptied;
        client.len -= 1;
        self.len -= 1;
        self.credit -= 1;
        let is_empty = client.len == 0;
        if is_empty {
            self.clients.remove(&id);
        }
        if is_empty || self.credit == 0 {
            self.turns.pop_front();
            if !is_empty {
                self.turns.push_back(id);
            }
            self.credit = self.turns.front().map_or(0, |next| self.clients[next].weight);
        }
        item
    }

    /// Items that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no item waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Clients with items that wait.
    pub fn clients(&self) -> usize {
        self.turns.len()
    }

    fn node(&mut self, item: T) -> u32 {
        let node = Node { item: Some(item), next: NONE };
        if self.free == NONE {
            self.nodes.push(node);
            return self.nodes.len() as u32 - 1;
        }
        let at = self.free;
        self.free = std::mem::replace(&mut self.nodes[at as usize], node).next;
        at
    }
}

impl<T> fmt::Debug for FairQueue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FairQueue")
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .field("clients", &self.clients())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn drain<T>(queue: &mut FairQueue<T>) -> Vec<T> {
        std::iter::from_fn(|| queue.pop()).collect()
    }

    #[test]
    fn clients_are_served_in_turn_by_weight() {
        let mut queue = FairQueue::new(100);
        for i in 0..6 {
            queue.push(1, 1, (1, i)).unwrap();
            queue.push(2, 2, (2, i)).unwrap();
        }
        let order: Vec<_> = drain(&mut queue).into_iter().map(|(client, _)| client).collect();
        assert_eq!(order, [1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 1, 1]);
    }

    #[test]
    fn a_full_queue_keeps_places_for_a_new_client() {
        let mut queue = FairQueue::new(1000);
        let greedy = |queue: &mut FairQueue<u64>, id| while queue.push(id, 1, id).is_ok() {};
        greedy(&mut queue, 1);
        assert_eq!(queue.len(), 500);
        for id in 2..=100 {
            greedy(&mut queue, id);
        }
        assert!(queue.len() <= 1000 + 100 * GUARANTEED, "{}", queue.len());
        queue.push(101, 1, 101).unwrap();
        let before = drain(&mut queue).iter().position(|&id| id == 101);
        assert!(before.unwrap() <= 100, "served within one round");
    }

    #[test]
    fn a_refusal_names_what_waits_and_the_limit() {
        let mut queue = FairQueue::new(40);
        for item in 0..20 {
            queue.push(1, 1, item).unwrap();
        }
        assert_eq!(queue.push(1, 1, 20), Err(Refused { item: 20, waiting: 20, limit: 20 }));
        for item in 20..36 {
            queue.push(2, 1, item).unwrap();
        }
        assert_eq!(queue.push(2, 1, 36).unwrap_err().limit, GUARANTEED);
        assert_eq!(drain(&mut queue).len(), 36);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_each_client_keeps_its_order(
            operations in proptest::collection::vec((0u64..5, 0u32..4, any::<bool>()), 0..300),
        ) {
            let mut queue = FairQueue::new(64);
            let mut model: Vec<VecDeque<usize>> = vec![VecDeque::new(); 5];
            for (i, (client, weight, pops)) in operations.into_iter().enumerate() {
                if pops {
                    match queue.pop() {
                        Some((client, item)) => {
                            prop_assert_eq!(model[client as usize].pop_front(), Some(item));
                        }
                        None => prop_assert!(model.iter().all(VecDeque::is_empty)),
                    }
                } else if queue.push(client, weight, (client, i)).is_ok() {
                    model[client as usize].push_back(i);
                }
                prop_assert_eq!(queue.len(), model.iter().map(VecDeque::len).sum::<usize>());
                prop_assert!(queue.len() <= 64 + 5 * GUARANTEED);
            }
            for (client, item) in drain(&mut queue) {
                prop_assert_eq!(model[client as usize].pop_front(), Some(item));
            }
            prop_assert!(model.iter().all(VecDeque::is_empty));
            prop_assert!(queue.nodes.len() <= 64 + 5 * GUARANTEED, "nodes are used again");
        }
    }
}
