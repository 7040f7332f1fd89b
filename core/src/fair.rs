//! A bounded queue that serves its clients in turn, and tenants by weight.
//!
//! A first-in-first-out queue lets one client that floods it delay all others. Here each client has
//! a queue of its own. [`FairQueue::pop`] takes from the tenants in turn by weight, and within a
//! tenant from its clients in turn (deficit round robin: Shreedhar and Varghese, "Efficient Fair
//! Queueing Using Deficit Round-Robin", IEEE/ACM Transactions on Networking 4(3), 1996, with items
//! of equal cost). So an item of a client that has nothing else waiting is served within one round
//! of its tenant, and a tenant gets no more for opening more connections.
//!
//! One capacity bounds all items. A client may have as many waiting as there are free places
//! (Choudhury and Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches",
//! IEEE/ACM Transactions on Networking 6(2), 1998). A single busy client takes half of the
//! capacity, and `n` of them settle at `1/(n+1)` each. Busy tenants divide what their clients take
//! together by weight ([`fair_share`]). A client with fewer than [`GUARANTEED`] items waiting is
//! admitted also when the others have filled the queue.

use std::collections::VecDeque;
use std::collections::hash_map::Entry;
use std::fmt;

use fxhash::FxHashMap;

/// The client that an item belongs to: for example a connection, within its tenant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientId {
    /// The group of clients that it belongs to.
    pub tenant: Tenant,
    /// Its number within the process.
    pub number: u64,
}

/// A client without a tenant of its own.
impl From<u64> for ClientId {
    fn from(number: u64) -> Self {
        ClientId { tenant: Tenant::default(), number }
    }
}

/// A group of clients that counts as one against the other groups, by its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tenant {
    /// Its number within the process; 0 for the clients without a tenant of their own.
    pub number: u8,
    /// Items that it gets in each round; 0 counts as 1. The latest weight of a tenant counts.
    pub weight: u8,
}

impl Default for Tenant {
    fn default() -> Self {
        Tenant { number: 0, weight: 1 }
    }
}

/// Items that each client may always have waiting. So the queue holds at most
/// `capacity + GUARANTEED × clients` items.
pub const GUARANTEED: usize = 16;

/// The amount that one client may hold of a limit of which `free` is left: `free` for clients of
/// one tenant. Several tenants divide by weight what all clients would hold, and each divides its
/// part among its clients. `clients` and `weight` are of the client's tenant, `all_clients` and
/// `all_weights` are sums over the tenants that hold something now.
pub fn fair_share(
    free: usize,
    weight: usize,
    clients: usize,
    all_clients: usize,
    all_weights: usize,
) -> usize {
    let part = free as u128 * weight as u128 * all_clients as u128;
    let share = part / (all_weights.max(1) as u128 * clients.max(1) as u128);
    usize::try_from(share).unwrap_or(usize::MAX)
}

/// Ends a list of nodes.
const NONE: u32 = u32::MAX;

/// The bounded queue. It is a pure data structure: callers lock it.
///
/// ```
/// use afterimage_core::FairQueue;
///
/// let mut queue = FairQueue::new(1000);
/// for item in 0..100 {
///     queue.push(1.into(), item).unwrap();
/// }
/// queue.push(2.into(), 100).unwrap();
/// assert_eq!(queue.pop(), Some(0));
/// assert_eq!(queue.pop(), Some(100), "the second client waits for one item, not for a hundred");
/// ```
pub struct FairQueue<T> {
    capacity: usize,
    len: usize,
    /// All items, and free nodes, in one allocation.
    nodes: Vec<Node<T>>,
    free: u32,
    clients: FxHashMap<(u8, u64), Client>,
    tenants: FxHashMap<u8, Clients>,
    /// The tenants with items, the next one to serve first.
    turns: VecDeque<u8>,
    /// Items that the first tenant in `turns` may still have in this turn.
    credit: u8,
    /// The sum of the weights of the tenants in `turns`.
    weights: usize,
    /// The turns of a tenant that had no items left, to be used again.
    spare: VecDeque<u64>,
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
}

/// The clients of a tenant that have items.
#[derive(Debug)]
struct Clients {
    weight: u8,
    /// The next one to serve first.
    turns: VecDeque<u64>,
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
            tenants: FxHashMap::default(),
            turns: VecDeque::new(),
            credit: 0,
            weights: 0,
            spare: VecDeque::new(),
        }
    }

    /// Appends an item for `client`.
    ///
    /// # Errors
    /// [`Refused`], with the item, when the client has used its [share](fair_share) of the free
    /// places, and at least [`GUARANTEED`].
    pub fn push(&mut self, client: ClientId, item: T) -> Result<(), Refused<T>> {
        let (tenant, weight) = (client.tenant.number, client.tenant.weight.max(1));
        let waiting = self.clients.get(&(tenant, client.number)).map_or(0, |client| client.len);
        let limit = self.limit(tenant, weight, waiting);
        if waiting >= limit || self.len >= NONE as usize {
            return Err(Refused { item, waiting, limit });
        }
        let node = self.node(item);
        match self.clients.entry((tenant, client.number)) {
            Entry::Occupied(client) => {
                let client = client.into_mut();
                self.nodes[client.tail as usize].next = node;
                client.tail = node;
                client.len += 1;
            }
            Entry::Vacant(entry) => {
                entry.insert(Client { head: node, tail: node, len: 1 });
                self.take_turn(tenant, weight, client.number);
            }
        }
        let clients = self.tenants.get_mut(&tenant).expect("a client has a tenant");
        self.weights = self.weights - usize::from(clients.weight) + usize::from(weight);
        clients.weight = weight;
        self.len += 1;
        Ok(())
    }

    /// Items that a client with so many items may have waiting.
    fn limit(&self, tenant: u8, weight: u8, waiting: usize) -> usize {
        let free = self.capacity.saturating_sub(self.len);
        let is_new = usize::from(waiting == 0);
        let (clients, other) = match self.tenants.get(&tenant) {
            Some(found) => (found.turns.len(), self.weights - usize::from(found.weight)),
            None => (0, self.weights),
        };
        let (clients, all) = (clients + is_new, self.clients.len() + is_new);
        let weight = usize::from(weight);
        let share = fair_share(free, weight, clients, all, other + weight);
        share.min(waiting + free).max(GUARANTEED)
    }

    /// Appends a client without items to the turns of its tenant.
    fn take_turn(&mut self, tenant: u8, weight: u8, client: u64) {
        let spare = &mut self.spare;
        let clients = self.tenants.entry(tenant).or_insert_with(|| {
            if self.turns.is_empty() {
                self.credit = weight;
            }
            self.turns.push_back(tenant);
            self.weights += usize::from(weight);
            Clients { weight, turns: std::mem::take(spare) }
        });
        clients.turns.push_back(client);
    }

    /// Takes the next item, in turn.
    pub fn pop(&mut self) -> Option<T> {
        let tenant = *self.turns.front()?;
        let clients = self.tenants.get_mut(&tenant).expect("a tenant with a turn has clients");
        let number = clients.turns.pop_front().expect("a tenant with a turn has clients");
        let client = self.clients.get_mut(&(tenant, number)).expect("a client with a turn");
        let node = &mut self.nodes[client.head as usize];
        let item = node.item.take();
        let emptied = client.head;
        client.head = std::mem::replace(&mut node.next, self.free);
        self.free = emptied;
        client.len -= 1;
        self.len -= 1;
        self.credit -= 1;
        if client.len == 0 {
            self.clients.remove(&(tenant, number));
        } else {
            clients.turns.push_back(number);
        }
        let is_empty = clients.turns.is_empty();
        if is_empty {
            let clients = self.tenants.remove(&tenant).expect("it is here");
            self.weights -= usize::from(clients.weight);
            self.spare = clients.turns;
        }
        if is_empty || self.credit == 0 {
            self.turns.pop_front();
            if !is_empty {
                self.turns.push_back(tenant);
            }
            self.credit = self.turns.front().map_or(0, |next| self.tenants[next].weight);
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
        self.clients.len()
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

    fn of(tenant: u8, weight: u8, number: u64) -> ClientId {
        ClientId { tenant: Tenant { number: tenant, weight }, number }
    }

    #[test]
    fn tenants_are_served_in_turn_by_weight() {
        let mut queue = FairQueue::new(100);
        for i in 0..6 {
            queue.push(of(1, 1, 7), (1, i)).unwrap();
            queue.push(of(2, 2, 7), (2, i)).unwrap();
        }
        let order: Vec<_> = drain(&mut queue).into_iter().map(|(client, _)| client).collect();
        assert_eq!(order, [1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 1, 1]);
    }

    #[test]
    fn connections_of_a_tenant_share_its_turns() {
        let mut queue = FairQueue::new(1000);
        for number in 0..10 {
            (0..10).for_each(|_| queue.push(of(1, 1, number), (1, number)).unwrap());
        }
        (0..10).for_each(|_| queue.push(of(2, 1, 0), (2, 0)).unwrap());
        let order = drain(&mut queue);
        let first: Vec<_> = order[..20].iter().filter(|item| item.0 == 1).map(|i| i.1).collect();
        assert_eq!(first, (0..10).collect::<Vec<_>>(), "each connection once");
    }

    /// Pushes items of all clients in turn, until each is refused.
    fn fill(queue: &mut FairQueue<usize>, clients: &[ClientId], held: &mut [usize]) {
        let mut grew = true;
        while std::mem::take(&mut grew) {
            for (i, client) in clients.iter().enumerate() {
                if queue.push(*client, i).is_ok() {
                    held[i] += 1;
                    grew = true;
                }
            }
        }
    }

    #[test]
    fn places_are_divided_by_the_weights_of_tenants() {
        // Ten connections of one tenant beside one of another with twice the weight.
        let mut clients: Vec<_> = (0..10).map(|number| of(1, 1, number)).collect();
        clients.push(of(2, 2, 0));
        let mut queue = FairQueue::new(1200);
        let mut held = vec![0; clients.len()];
        fill(&mut queue, &clients, &mut held);
        for _ in 0..5000 {
            held[queue.pop().unwrap()] -= 1;
            fill(&mut queue, &clients, &mut held);
        }
        let (many, one) = (held[..10].iter().sum::<usize>(), held[10]);
        assert!((1090..=1110).contains(&(many + one)), "{held:?}: 11 of 12 parts");
        assert!((one as f64 / many as f64 - 2.0).abs() < 0.2, "{held:?}");
    }

    #[test]
    fn a_tenant_with_a_place_is_admitted_beside_a_full_one() {
        let mut queue = FairQueue::new(1000);
        let clients: Vec<_> = (0..50).map(|number| of(1, 100, number)).collect();
        fill(&mut queue, &clients, &mut [0; 50]);
        (0..GUARANTEED).for_each(|_| queue.push(of(2, 1, 0), 0).unwrap());
    }

    #[test]
    fn a_full_queue_keeps_places_for_a_new_client() {
        let mut queue = FairQueue::new(1000);
        let greedy =
            |queue: &mut FairQueue<u64>, id| while queue.push(ClientId::from(id), id).is_ok() {};
        greedy(&mut queue, 1);
        assert_eq!(queue.len(), 500);
        for id in 2..=100 {
            greedy(&mut queue, id);
        }
        assert!(queue.len() <= 1000 + 100 * GUARANTEED, "{}", queue.len());
        queue.push(101.into(), 101).unwrap();
        let before = drain(&mut queue).iter().position(|&id| id == 101);
        assert!(before.unwrap() <= 100, "served within one round");
    }

    #[test]
    fn a_refusal_names_what_waits_and_the_limit() {
        let mut queue = FairQueue::new(40);
        for item in 0..20 {
            queue.push(1.into(), item).unwrap();
        }
        assert_eq!(queue.push(1.into(), 20), Err(Refused { item: 20, waiting: 20, limit: 20 }));
        for item in 20..36 {
            queue.push(2.into(), item).unwrap();
        }
        assert_eq!(queue.push(2.into(), 36).unwrap_err().limit, GUARANTEED);
        assert_eq!(drain(&mut queue).len(), 36);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_and_each_client_keeps_its_order(
            operations in proptest::collection::vec((0u64..5, 0u8..4, any::<bool>()), 0..300),
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
                } else if queue.push(of(client as u8 % 3, weight, client), (client, i)).is_ok() {
                    model[client as usize].push_back(i);
                }
                let busy = model.iter().filter(|items| !items.is_empty()).count();
                prop_assert_eq!(queue.clients(), busy);
                prop_assert_eq!(queue.len(), model.iter().map(VecDeque::len).sum::<usize>());
                prop_assert!(queue.len() <= 64 + 5 * GUARANTEED);
            }
            for (client, item) in drain(&mut queue) {
                prop_assert_eq!(model[client as usize].pop_front(), Some(item));
            }
            prop_assert!(model.iter().all(VecDeque::is_empty));
            prop_assert_eq!((queue.weights, queue.tenants.len()), (0, 0));
            prop_assert!(queue.nodes.len() <= 64 + 5 * GUARANTEED, "nodes are used again");
        }
    }
}
