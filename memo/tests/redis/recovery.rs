//! The time until a Redis that died or hung is used again, under constant load.
//!
//! ```text
//! REDIS_ROUNDS=20 cargo test -p afterimage-memo --test redis recovery -- --nocapture
//! ```

use std::time::{Duration, Instant};

use afterimage_wire::Client;

use crate::node::{Node, installed};
use crate::trouble::is_bypassed;
use crate::{ask, counter, memo, until};

/// The longest allowed recovery without `REDIS_RECOVERY_MS`: the promised second for an optimized
/// build. A busy machine needs longer and sets the variable.
const RECOVERY_LIMIT: Duration = Duration::from_secs(if cfg!(debug_assertions) { 3 } else { 1 });

/// The number of outages without `REDIS_ROUNDS`.
const ROUNDS: u32 = 3;

/// The shortest outage: the growing pause between attempts to connect has reached its limit.
const OUTAGE: Duration = Duration::from_millis(1500);

/// Each outage is longer by this time, so that servers come back at different moments of the pause.
const LONGER: Duration = Duration::from_millis(70);

/// A number from the environment.
fn number(name: &str) -> Option<u32> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is {text:?} and should be a number")))
}

/// The longest allowed recovery.
fn limit() -> Duration {
    number("REDIS_RECOVERY_MS").map_or(RECOVERY_LIMIT, |ms| Duration::from_millis(ms.into()))
}

/// Sends requests until one is a hit. Returns the time, which must be below the limit.
pub(crate) async fn until_back(client: &Client) -> Duration {
    let start = Instant::now();
    until("it is used again", async || ask(client, 0..1).await > 0).await;
    let took = start.elapsed();
    assert!(took < limit(), "it took {took:?} until it was used again");
    took
}

/// Sends requests during an outage: no request fails, and soon none waits.
async fn last(outage: Duration, client: &Client) {
    is_bypassed(client).await;
    let start = Instant::now();
    while start.elapsed() < outage {
        ask(client, 0..10).await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Causes some outages of a server, and prints the recovery time of each.
async fn outages(
    what: &str,
    mut begin: impl FnMut(&mut Node),
    mut end: impl AsyncFnMut(&mut Node),
) {
    let mut node = Node::start();
    node.until_up().await;
    let client = memo(&format!("redis://{}", node.addr())).await;
    let mut took = Vec::new();
    for round in 0..number("REDIS_ROUNDS").unwrap_or(ROUNDS) {
        until("all is remembered", async || ask(&client, 0..10).await == 10).await;
        begin(&mut node);
        last(OUTAGE + LONGER * round, &client).await;
        end(&mut node).await;
        took.push(until_back(&client).await);
    }
    took.sort_unstable();
    let (median, longest) = (took[took.len() / 2], took[took.len() - 1]);
    println!(
        "Redis {what} {} times: back after {median:.0?} (median), {longest:.0?} (longest)",
        took.len()
    );
    assert!(counter(&client, "store_breaker_opened").await >= took.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_was_killed_is_used_again_soon_after_it_listens() {
    if !installed("the test of recovery from a Redis that was killed") {
        return;
    }
    outages("killed", Node::kill, async |node: &mut Node| {
        node.restart();
        node.until_it_listens().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_hung_is_used_again_soon_after_it_goes_on() {
    if !installed("the test of recovery from a Redis that hangs") {
        return;
    }
    let stop = |node: &mut Node| node.signal("STOP");
    outages("stopped", stop, async |node: &mut Node| node.signal("CONT")).await;
}
