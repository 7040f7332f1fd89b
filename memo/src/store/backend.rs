//! What a store over the network must be able to do.

use std::fmt;
use std::time::Duration;

use afterimage_wire::Client;
use afterimage_wire::proto::stats::Stats;

/// Takes what a lookup found: as many values as keys, or `None` for no answer.
pub type Callback = Box<dyn FnOnce(Option<Vec<Option<i64>>>) + Send>;

/// A store over the network. Its methods return at once.
pub trait Backend: fmt::Debug + Send + Sync + 'static {
    /// What statistics call it.
    fn name(&self) -> &'static str;

    /// Where it is, for log lines.
    fn address(&self) -> &str {
        self.name()
    }

    /// Whether it can be reached, as far as is known.
    fn is_connected(&self) -> bool;

    /// Looks `keys` up and calls `then`, once, within `budget`.
    fn get_many(&self, keys: &[u64], budget: Duration, then: Callback);

    /// Sends a value on its way. If it does not arrive, a later lookup is a miss.
    fn set(&self, key: u64, value: i64);

    /// Adds what it counts of its own to `stats`.
    fn stats(&self, _stats: &mut Stats) {}
}

/// An Afterimage cache. The client should fail fast: while the cache is away, a lookup is a miss at
/// once.
impl Backend for Client {
    fn name(&self) -> &'static str {
        "afterimage"
    }

    fn address(&self) -> &str {
        self.server()
    }

    fn is_connected(&self) -> bool {
        Client::is_connected(self)
    }

    fn get_many(&self, keys: &[u64], budget: Duration, then: Callback) {
        self.submit_cache_get_many(keys, budget, move |values| then(values.ok()));
    }

    fn set(&self, key: u64, value: i64) {
        // A full queue or a lost connection: a miss later, and nothing to do about it now.
        let _ = self.cache_set(key, value);
    }
}
